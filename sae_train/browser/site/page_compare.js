import * as data from './data.js';
import {h, link} from './dom.js';
import {textForm, textResult} from './page_text.js';

export async function comparePage(query) {
  const saes = (await data.index()).saes.filter(one => one.width);
  const chosen = [query.a ?? saes[0]?.id, query.b ?? saes.find(one => one.id !== (query.a ?? saes[0]?.id))?.id ?? saes[0]?.id];
  const go = (key, value) => { location.hash = link(['compare'], {a: chosen[0], b: chosen[1], text: form.text.value, [key]: value}); };
  const choose = (key, at) => h('label', {}, at ? 'and' : 'Compare', h('select', {onchange: event => go(key, event.target.value)},
    saes.map(one => h('option', {value: one.id, selected: one.id === chosen[at]}, one.label))));
  const form = textForm({query,
    ask: async (body, how) => {
      history.replaceState(null, '', link(['compare'], {a: chosen[0], b: chosen[1], text: body.text}));
      const found = [];
      for (const id of chosen) found.push(await data.ask(id, 'explore', body, how));
      return found;
    },
    draw: found => [h('div', {class: 'sides'}, found.map((one, at) => {
      const sae = saes.find(other => other.id === chosen[at]);
      return h('section', {'aria-label': sae.label}, h('h2', {}, sae.label), textResult(sae, one, {run: null, onlyText: true}));
    }))]});
  if (query.text) form.run();
  return {title: 'Compare two SAEs', leave: form.leave, content: [h('h1', {}, 'Two SAEs on one text'), h('div', {class: 'bar'}, choose('a', 0), choose('b', 1)), form.form, form.result]};
}
