import * as data from './data.js';
import {frontier} from './charts.js';
import {h, link, number, percent} from './dom.js';

export async function indexPage() {
  const {saes, live} = await data.index();
  const charts = [['delta_loss', 'delta loss, nats'], ['fvu', 'FVU']].map(([key, label]) => {
    const drawn = frontier(saes, key, label);
    return drawn && h('section', {class: 'card'}, h('h2', {}, label), drawn);
  });
  const rows = saes.map(one => h('tr', {},
    h('td', {class: 'left'}, one.width ? h('a', {href: link([one.id])}, one.label) : one.label),
    h('td', {class: 'left optional'}, one.width ? `${one.site}.${one.layer}${one.target ? ` → ${one.target}` : ''}` : '–'),
    h('td', {}, one.width ? one.width.toLocaleString('en') : '–'),
    h('td', {}, number(one.l0)), h('td', {}, number(one.fvu)),
    h('td', {class: 'optional'}, number(one.fvu_without_outlying)), h('td', {class: 'optional'}, number(one.fvu_median_token)),
    h('td', {}, number(one.delta_loss)),
    h('td', {class: 'optional'}, one.width ? percent(one.alive / one.width) : percent(one.alive_fraction)),
    h('td', {class: 'optional'}, number(one.mean_abs_cosine)),
    h('td', {class: 'left'}, one.width ? (one.explained ? `${one.explained.toLocaleString('en')} explained` : '')
      : h('span', {class: 'soft'}, 'no latents: ', h('code', {}, `sae latents ${one.folder}`)))));
  const models = [...new Set(saes.map(one => one.model).filter(Boolean))].join(', ');
  return {title: 'SAEs', content: [
    h('h1', {}, saes.length === 1 ? 'One SAE' : `${saes.length} SAEs`),
    h('p', {class: 'soft'}, models, live ? '' : ' · a copy without a model: trying texts and steering need "sae browse"'),
    h('div', {class: 'grid'}, charts),
    h('h2', {}, 'All of them'),
    h('div', {class: 'scroll card', tabindex: 0, role: 'region', 'aria-label': 'table of SAEs'}, h('table', {}, h('thead', {}, h('tr', {},
      [['SAE', 'left'], ['place', 'left optional'], ['width'], ['L0'], ['FVU'], ['without outlying tokens', 'optional'], ['of the median token', 'optional'],
        ['delta loss'], ['alive', 'optional'], ['mean |cosine|', 'optional'], ['', 'left']].map(([name, kind]) =>
        h('th', {scope: 'col', class: kind}, name)))), h('tbody', {}, rows))),
  ]};
}
