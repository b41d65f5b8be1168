// Where the numbers come from: the server of `sae browse`, or the files of a static copy.

async function json(path) {
  const answer = await fetch(path);
  let found = null;
  try { found = await answer.json(); } catch { /* told below */ }
  if (!answer.ok || found === null) throw new Error(found?.error ?? `${path} can't be read (${answer.status})`);
  return found;
}

let facts = null;
export const index = async () => facts ??= await json('data/index.json');
export const shownSae = async id => {
  const sae = (await index()).saes.find(one => one.id === id);
  if (!sae) throw new Error(`no SAE '${id}' is shown here`);
  if (!sae.width) throw new Error(`${sae.name} has no latents yet: write them with "sae latents ${sae.folder}"`);
  return sae;
};

const kept = new Map();
function shard(path) {
  if (kept.size > 40) kept.delete(kept.keys().next().value);
  if (!kept.has(path)) kept.set(path, json(path).catch(error => { kept.delete(path); throw error; }));
  return kept.get(path);
}

export async function latent(sae, number) {
  const {live, latents_shard: size} = await index();
  const {width} = await shownSae(sae);
  if (!(Number.isInteger(number) && number >= 0 && number < width))
    throw new Error(`${sae} has the latents 0 to ${width - 1}: there is no latent ${number}`);
  const base = `data/${encodeURIComponent(sae)}`;
  if (live) return json(`${base}/latents/${number}.json`);
  return (await shard(`${base}/latents-${Math.floor(number / size)}.json`))[number % size];
}

export async function list(sae, query) {
  if ((await index()).live) return json(`data/${encodeURIComponent(sae)}/list.json?${new URLSearchParams(query)}`);
  return listOfFiles(sae, query);
}

async function listOfFiles(sae, {sort, order, text, where, offset, count}) {
  const {columns_shard: size} = await index();
  const {width} = await shownSae(sae);
  const names = Array.from({length: Math.ceil(width / size)}, (_, n) => `data/${encodeURIComponent(sae)}/columns-${n}.json`);
  let rows = (await Promise.all(names.map(shard))).flat();
  if (text) {
    if (where === 'context') throw new Error('a copy without a server can\'t search contexts: open it with "sae browse"');
    const wanted = text.toLowerCase();
    const has = piece => piece !== null && piece.replaceAll('▁', ' ').toLowerCase().includes(wanted);
    rows = rows.filter(row => where === 'explanation' ? (row.explanation ?? '').toLowerCase().includes(wanted)
      : has(row.top_input) || has(row.top_logit_token) || has(row.bottom_logit_token));
  }
  const sign = order === 'falling' ? -1 : 1;
  rows = [...rows].sort((a, b) => a[sort] === null ? (b[sort] === null ? 0 : 1) : b[sort] === null ? -1
    : sign * (a[sort] - b[sort]) || a.latent - b.latent);
  return {total: rows.length, searched: width, rows: rows.slice(+offset, +offset + +count)};
}

// A live part: told its progress line by line, then the result.
export async function ask(sae, what, body, {progress = () => {}, signal} = {}) {
  if (!(await index()).live)
    throw new Error('this is a copy without a model: texts and steering need "sae browse" on the folder of the run');
  const answer = await fetch(`live/${encodeURIComponent(sae)}/${what}`,
    {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body), signal});
  if (!answer.ok) throw new Error((await answer.json()).error);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error('the server ended before it answered');
    waiting += value;
    const lines = waiting.split('\n');
    waiting = lines.pop();
    for (const message of lines.map(JSON.parse)) {
      if (message.error) throw new Error(message.error);
      if (message.result) return message.result;
      progress(message);
    }
  }
}
