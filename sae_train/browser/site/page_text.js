import * as data from './data.js';
import {code, fail, h, link, number, percent, tell, tokens} from './dom.js';

// A text, and what `draw` makes of the answer for it. Compare has two of them.
export function textForm({query, ask, draw}) {
  const text = h('textarea', {name: 'text', value: query.text ?? '', spellcheck: 'false'});
  const button = h('button', {class: 'main'}, 'Read it');
  const state = h('span', {class: 'soft', role: 'status'});
  const result = h('div', {});
  let running = null;
  async function run(position = null) {
    running?.abort();
    running = new AbortController();
    const mine = running;
    button.disabled = true;
    try {
      const found = await ask({text: text.value, position}, {signal: mine.signal, progress: message => { state.textContent = `${message.progress} …`; }});
      if (mine !== running) return;
      state.textContent = '';
      tell('read');
      result.replaceChildren(...draw(found, run));
    } catch (error) { if (mine === running) { state.textContent = ''; result.replaceChildren(fail(error)); } }
    if (mine === running) button.disabled = false;
  }
  const form = h('form', {onsubmit: event => { event.preventDefault(); run(); }},
    h('label', {}, 'A text of your own', text), h('div', {class: 'bar'}, button, state));
  return {form, result, run, text, leave: () => { running?.abort(); running = null; }};
}

function firings(sae, list, pieces, pick, picked) {
  return h('div', {class: 'scroll'}, h('table', {}, h('thead', {}, h('tr', {}, ['latent', 'value', 'on', 'share', ''].map(name => h('th', {scope: 'col'}, name)))),
    h('tbody', {}, list.map(one => h('tr', {}, h('td', {}, h('a', {href: link([sae.id, one.latent])}, one.latent)), h('td', {}, number(one.value)),
      h('td', {}, code(pieces[one.position])), h('td', {class: one.share < 0 ? 'down' : 'up'}, percent(one.share)),
      h('td', {}, pick ? h('button', {class: 'small', 'aria-pressed': String(one.latent === picked), onclick: () => pick(one.latent)}, 'shade') : null))))));
}

// The answer for one SAE: shaded tokens, the chosen token's latents, those of the whole text.
export function textResult(sae, found, {run, chosen = null, onlyText = false}) {
  const shaded = {latent: chosen ?? found.overall[0]?.latent ?? null, token: found.position};
  const box = h('div', {});
  function draw() {
    const values = found.values[shaded.latent] ?? found.tokens.map(() => 0);
    const pick = latent => { if (found.values[latent]) { shaded.latent = latent; draw(); } };
    const press = at => { shaded.token = at; draw(); };
    const chances = found.likely.map(one => [h('dt', {}, code(one.token)), h('dd', {}, percent(one.probability))]);
    const here = found.strongest[shaded.token];
    box.replaceChildren(
      h('p', {class: 'soft small'}, shaded.latent === null ? 'No latent fires.' : ['Shaded by ', h('a', {href: link([sae.id, shaded.latent])}, `latent ${shaded.latent}`), `, greatest value ${number(Math.max(...values))}. Choose a token to see its latents.`]),
      h('div', {class: 'card'}, tokens(found.tokens, values, Math.max(...values, 1e-9), {press, pressed: shaded.token})),
      h('div', {class: 'grid'},
        h('section', {class: 'card'}, h('h2', {}, 'Strongest of the text'), firings(sae, found.overall, found.tokens, pick, shaded.latent)),
        h('section', {class: 'card'}, h('h2', {}, 'On ', code(found.tokens[shaded.token]), `, ${found.active[shaded.token]} active`),
          here.length ? firings(sae, here, found.tokens, null) : h('p', {class: 'soft'}, 'The SAE isn\'t used on this token, or nothing fires.'),
          run && shaded.token !== found.position ? h('button', {onclick: () => run(shaded.token)}, 'Shares of the token after this one') : null),
        onlyText ? null : h('section', {class: 'card'}, h('h2', {}, 'What follows ', code(found.tokens[found.position])),
          h('p', {class: 'small soft'}, 'Shares are of the logit of ', code(found.predicted.token), ` (${percent(found.predicted.probability)}), by f · (decoder · gradient).`),
          h('dl', {class: 'rank'}, chances.flat()), h('h3', {}, 'Latents that decide it most'), firings(sae, found.effective, found.tokens, pick, shaded.latent))));
  }
  draw();
  return box;
}

export async function textPage(sae, query) {
  const latent = /^\d+$/.test(query.latent ?? '') ? Number(query.latent) : null;
  const form = textForm({query,
    ask: (body, how) => {
      history.replaceState(null, '', link([sae.id, 'text'], {text: body.text, latent}));
      return data.ask(sae.id, 'explore', {...body, latents: latent === null ? [] : [latent]}, how);
    },
    draw: (found, run) => [textResult(sae, found, {run, chosen: latent})]});
  if (query.text) form.run();
  return {title: `Try a text: ${sae.name}`, leave: form.leave, content: [h('h1', {}, 'Try a text'),
    h('p', {class: 'soft'}, 'The model runs here; the first text waits until it is loaded.'), form.form, form.result]};
}
