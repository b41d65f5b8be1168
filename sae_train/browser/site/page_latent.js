import * as data from './data.js';
import {histogram} from './charts.js';
import {code, h, link, number, percent, tell, tokens} from './dom.js';

const AROUND = 28;

function rank(title, rows, kind) {
  return rows.length ? [h('h3', {}, title), h('dl', {class: 'rank'}, rows.flatMap(row => [h('dt', {}, code(row.token)), h('dd', {class: kind}, (row.value > 0 ? '+' : '') + number(row.value))]))] : [];
}

function context(one, most) {
  const [begin, end] = [Math.max(0, one.peak - AROUND), Math.min(one.tokens.length, one.peak + AROUND)];
  const short = tokens(one.tokens.slice(begin, end), one.values.slice(begin, end), most, {peak: one.peak - begin});
  const where = `${one.subset ? one.subset + ', ' : ''}sequence ${one.sequence}, position ${one.position}`;
  return h('div', {class: 'context'}, h('div', {class: 'value', title: where}, number(one.values[one.peak])), short);
}

function similar(sae, latent, list) {
  const name = row => row.sae === latent.sae ? `latent ${row.index}` : `${row.index} of ${row.sae}`;
  return h('dl', {class: 'rank'}, list.flatMap(row => [
    h('dt', {title: name(row)}, row.id ? h('a', {href: link([row.id, row.index])}, name(row)) : name(row)),
    h('dd', {}, number(row.cosine))]));
}

function scores(explanation) {
  const shown = [];
  for (const [kind, score] of Object.entries(explanation.scores ?? {})) {
    if (score === null || typeof score !== 'object') continue;
    const value = score.balanced_accuracy ?? score.correlation;
    const unanswered = score.unanswered ? `${score.unanswered} of ${score.unanswered + score.texts} texts without an answer` : null;
    if (value === undefined || value === null) {
      if (unanswered) shown.push(h('li', {}, `${kind}: ${unanswered}`));
      continue;
    }
    const beside = [score.auc != null ? `AUC ${number(score.auc)}` : null, score.shuffled != null ? `with another's explanation ${number(score.shuffled)}` : null,
      score.chance != null ? `chance ${number(score.chance)}` : null, unanswered].filter(Boolean).join(', ');
    shown.push(h('li', {}, h('span', {}, `${kind} `), h('b', {}, number(value)), beside ? h('span', {}, ` (${beside})`) : ''));
  }
  return shown.length ? h('ul', {class: 'facts'}, shown) : null;
}

function explained(explanation) {
  return [h('p', {class: 'explanation'}, explanation.text), h('p', {class: 'soft small'}, `by ${explanation.model}, ${explanation.method}`), scores(explanation)];
}

export async function latentPage(sae, index) {
  const latent = await data.latent(sae.id, index);
  const title = `Latent ${index} of ${sae.name}`;
  const copy = h('button', {onclick: async () => {
    await navigator.clipboard.writeText(JSON.stringify(latent, null, 1));
    tell('copied'); copy.textContent = 'Copied'; setTimeout(() => { copy.textContent = 'Copy as JSON'; }, 1500);
  }}, 'Copy as JSON');
  const step = by => { const to = index + by; if (to >= 0 && to < sae.width) location.hash = link([sae.id, to]); };
  const keys = event => {
    if (event.target.closest('input, textarea, select') || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'ArrowLeft' || event.key === 'k') step(-1);
    if (event.key === 'ArrowRight' || event.key === 'j') step(1);
  };
  addEventListener('keydown', keys);
  const own = latent.neighbours.filter(row => row.sae === latent.sae), others = latent.neighbours.filter(row => row.sae !== latent.sae);
  const written = latent.explanations.at(-1), before = latent.explanations.slice(0, -1).reverse();
  const groups = [0, 1, 2, 3, 4, 5].map(interval => [interval, latent.contexts.filter(one => one.interval === interval)]).filter(([, list]) => list.length);
  const edges = at => `${number(latent.maximum * (5 - at) / 5)} to ${number(latent.maximum * (6 - at) / 5)}`;
  const share = at => latent.count ? `, ${percent(latent.interval_counts[at - 1] / latent.count)} of its firings` : '';
  return {title, leave: () => removeEventListener('keydown', keys), content: [
    h('div', {class: 'bar'}, h('h1', {style: {marginRight: 'auto'}}, `Latent ${index}`),
      index > 0 ? h('a', {href: link([sae.id, index - 1]), title: 'or the left arrow key', rel: 'prev'}, '‹ previous') : null,
      index + 1 < sae.width ? h('a', {href: link([sae.id, index + 1]), title: 'or the right arrow key', rel: 'next'}, 'next ›') : null,
      h('a', {href: link([sae.id, 'text'], {latent: index})}, 'Try a text'), h('a', {href: link([sae.id, 'steer'], {latent: index, strength: Math.round(2 * latent.maximum)})}, 'Steer'), copy),
    written ? h('div', {}, explained(written)) : null,
    before.length ? h('details', {}, h('summary', {}, before.length === 1 ? 'Another explanation' : `${before.length} other explanations`), before.map(explained)) : null,
    h('ul', {class: 'facts'}, [['fires on', percent(latent.frequency)], ['tokens', latent.count.toLocaleString('en')], ['maximum', number(latent.maximum)], ['mean', number(latent.mean)]]
      .map(([name, value]) => h('li', {}, h('span', {}, `${name} `), h('b', {}, value)))),
    h('div', {class: 'latent'},
      h('div', {}, groups.map(([interval, list]) => h('section', {}, h('h2', {}, interval === 0 ? 'Greatest values' : `Samples from ${edges(interval)}${share(interval)}`),
        h('div', {class: 'card'}, list.map(one => context(one, latent.maximum))))),
        groups.length ? null : h('p', {class: 'soft'}, 'It never fired on the text that was read.')),
      h('aside', {'aria-label': 'what it fires on, writes and resembles'},
        h('section', {class: 'card'}, h('h2', {}, 'Logits'), latent.logit_histogram ? histogram(latent.logit_histogram, {label: 'logits over the vocabulary'}) : h('p', {class: 'soft'}, 'It writes no residual stream.'),
          h('div', {class: 'pair'}, h('div', {}, rank('Raised', latent.top_logits, 'up')), h('div', {}, rank('Lowered', latent.bottom_logits, 'down')))),
        h('section', {class: 'card'}, h('h2', {}, 'Values where it fires'), histogram(latent.histogram, {log: true, label: 'values where it fires'}),
          h('p', {class: 'soft small'}, 'Counts on a logarithmic scale.'),
          latent.top_inputs.length ? [h('h3', {}, 'Tokens it fires on most'), h('dl', {class: 'rank'}, latent.top_inputs.flatMap(row => [h('dt', {}, code(row.token)), h('dd', {}, `${row.count.toLocaleString('en')} · lift ${number(row.lift)}`)]))] : []),
        h('section', {class: 'card'}, h('h2', {}, 'Similar latents'), own.length ? [h('h3', {}, 'In this SAE, cosine'), similar(sae, latent, own)] : [],
          others.length ? [h('h3', {}, 'In the other SAEs'), similar(sae, latent, others)] : [],
          latent.coactive.length ? [h('h3', {}, 'Fire on the same tokens'), h('dl', {class: 'rank'}, latent.coactive.flatMap(row => [h('dt', {}, h('a', {href: link([sae.id, row.index])}, `latent ${row.index}`)), h('dd', {}, number(row.score))]))] : []),
        latent.encoder_top.length ? h('section', {class: 'card'}, h('h2', {}, 'Read by the encoder'), rank('Tokens', latent.encoder_top, 'up'),
          latent.encoder_neighbours.length ? [h('h3', {}, 'Similar encoders'), similar(sae, latent, latent.encoder_neighbours)] : []) : null)),
  ].filter(one => one !== null)};
}
