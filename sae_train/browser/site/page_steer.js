import * as data from './data.js';
import {fail, h, link, tell, visible} from './dom.js';

export async function steerPage(sae, query) {
  const field = (name, words, attributes) => h('label', {}, words, h('input', {name, ...attributes}));
  const changes = h('div', {role: 'group', 'aria-label': 'latents to change'});
  function change(latent, mode, strength) {
    const row = h('div', {class: 'change'},
      field('latent', 'Latent', {type: 'number', min: 0, max: sae.width - 1, required: true, value: latent}),
      h('label', {}, 'what', h('select', {name: 'mode'}, [['add', 'add'], ['clamp', 'set to'], ['zero', 'switch off']].map(([value, words]) => h('option', {value, selected: value === mode}, words)))),
      field('strength', 'strength', {type: 'number', step: 'any', required: true, value: strength}),
      h('button', {type: 'button', onclick: () => row.remove()}, 'Remove'));
    return row;
  }
  const given = (query.changes ?? '').split(',').filter(Boolean).map(one => one.split(':'));
  const rows = given.length ? given : [[query.latent ?? '0', 'add', query.strength ?? '50']];
  changes.append(...rows.map(one => change(...one)));
  const text = h('textarea', {name: 'text', value: query.text ?? 'I think that', spellcheck: 'false'});
  const settings = {new_tokens: field('new_tokens', 'new tokens', {type: 'number', min: 1, max: 256, value: query.new_tokens ?? 40}),
    temperature: field('temperature', 'temperature', {type: 'number', min: 0, step: 0.1, value: query.temperature ?? 0.7}),
    seed: field('seed', 'seed', {type: 'number', min: 0, value: query.seed ?? 0})};
  const button = h('button', {class: 'main'}, 'Generate'), state = h('span', {class: 'soft', role: 'status'}), fault = h('div', {});
  const sides = Object.fromEntries(['plain', 'steered'].map(name => [name, h('div', {class: 'text', 'data-side': name})]));
  const result = h('div', {class: 'sides', hidden: true}, [['plain', 'As the model goes on'], ['steered', 'With the changes']].map(([name, words]) => h('section', {class: 'card'}, h('h2', {}, words), sides[name])));
  const put = (name, after) => sides[name].replaceChildren(...visible(text.value), h('mark', {}, visible(after)));
  let running = null;
  async function run() {
    running?.abort();
    const mine = running = new AbortController();
    const number = name => Number(settings[name].querySelector('input').value);
    const list = [...changes.children].map(row => { const of = name => row.querySelector(`[name=${name}]`).value; return {latent: Number(of('latent')), mode: of('mode'), strength: Number(of('strength'))}; });
    const body = {text: text.value, changes: list, new_tokens: number('new_tokens'), temperature: number('temperature'), seed: number('seed')};
    history.replaceState(null, '', link([sae.id, 'steer'], {text: body.text, changes: list.map(one => `${one.latent}:${one.mode}:${one.strength}`).join(','), new_tokens: body.new_tokens, temperature: body.temperature, seed: body.seed}));
    button.disabled = true;
    fault.replaceChildren();
    result.hidden = false;
    result.dataset.done = '';
    for (const name of ['plain', 'steered']) put(name, '');
    try {
      const found = await data.ask(sae.id, 'steer', body, {signal: mine.signal, progress: message => {
        state.textContent = `${message.progress} …`;
        for (const name of ['plain', 'steered']) if (name in message) put(name, message[name]);
      }});
      if (mine !== running) return;
      put('plain', found.plain);
      put('steered', found.steered);
      tell('generated');
      result.dataset.done = 'yes';
    } catch (error) { if (mine === running) { result.hidden = true; fault.replaceChildren(fail(error)); } }
    if (mine === running) { state.textContent = ''; button.disabled = false; }
  }
  const form = h('form', {onsubmit: event => { event.preventDefault(); run(); }}, h('label', {}, 'The beginning of a text', text), changes,
    h('div', {class: 'bar'}, h('button', {type: 'button', onclick: () => changes.append(change('', 'add', '50'))}, 'Another latent')),
    h('div', {class: 'bar'}, Object.values(settings), button, state));
  return {title: `Steer: ${sae.name}`, leave: () => { running?.abort(); running = null; }, content: [h('h1', {}, 'Steer'),
    h('p', {class: 'soft'}, 'Strength is in units of the latent\'s values. "Add" adds that much of its decoder row at every token; "set to" makes the latent that value.'), form, fault, result]};
}
