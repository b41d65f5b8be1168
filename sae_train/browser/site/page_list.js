import * as data from './data.js';
import {code, fail, h, link, number, percent} from './dom.js';

const SORTS = {frequency: 'frequency', maximum: 'maximum', mean: 'mean', top_logit: 'top logit', bottom_logit: 'bottom logit',
  nearest_cosine: 'nearest cosine', score: 'explanation score', latent: 'number'};
const PLACES = {token: 'tokens', explanation: 'explanations', context: 'contexts'};
const COUNT = 100;

export async function listPage(sae, given) {
  const query = {sort: 'frequency', order: 'falling', where: 'token', text: '', page: '0', after: '-1', ...given};
  const go = change => { location.hash = link([sae.id], {...query, page: '0', after: '-1', ...change}); };
  const choose = (key, names, words) => h('label', {}, words, h('select', {value: query[key], onchange: event => go({[key]: event.target.value})},
    Object.entries(names).map(([value, name]) => h('option', {value, selected: query[key] === value}, name))));
  const text = h('input', {type: 'search', value: query.text, name: 'text', placeholder: 'words'});
  const jump = h('input', {type: 'number', min: 0, max: sae.width - 1, name: 'jump', placeholder: '17'});
  const submit = act => event => { event.preventDefault(); act(); };
  const controls = h('div', {class: 'bar'},
    h('form', {role: 'search', class: 'bar', style: {flex: '1 1 auto'}, onsubmit: submit(() => go({text: text.value}))},
      h('label', {class: 'wide'}, 'Search', text), choose('where', PLACES, 'in'), h('button', {}, 'Search')),
    choose('sort', SORTS, 'Sort by'), choose('order', {falling: 'falling', rising: 'rising'}, 'order'),
    h('form', {class: 'bar', onsubmit: submit(() => { if (jump.value !== '') location.hash = link([sae.id, jump.value]); })},
      h('label', {}, 'Latent', jump), h('button', {}, 'Open')));
  const head = [
    h('h1', {}, sae.label),
    h('ul', {class: 'facts'}, [['width', sae.width.toLocaleString('en')], ['alive', percent(sae.alive / sae.width)], ['L0', number(sae.l0)],
      ['FVU', number(sae.fvu)], ['without outlying tokens', number(sae.fvu_without_outlying)],
      ['of the median token', number(sae.fvu_median_token)], ['delta loss', number(sae.delta_loss)], ['tokens read', sae.tokens.toLocaleString('en')]]
      .map(([name, value]) => h('li', {}, h('span', {}, `${name} `), h('b', {}, value)))), controls];
  const title = `Latents of ${sae.name}`;
  let found;
  try {
    found = await data.list(sae.id, {sort: query.sort, order: query.order, text: query.text, where: query.where,
      offset: COUNT * Number(query.page), count: COUNT, after: query.after});
  } catch (error) { return {title, content: [...head, fail(error)]}; }
  const page = Number(query.page), pages = Math.max(1, Math.ceil(found.total / COUNT));
  const turn = (words, to, shown) => shown ? h('a', {href: link([sae.id], {...query, page: to}), rel: words.toLowerCase()}, words) : h('span', {class: 'soft'}, words);
  const words = [query.text ? `${found.total.toLocaleString('en')} found` : `${found.total.toLocaleString('en')} latents`,
    pages > 1 ? `, page ${(page + 1).toLocaleString('en')} of ${pages.toLocaleString('en')}` : ''];
  const more = found.searched < sae.width && h('p', {}, `Contexts of the latents up to ${(found.searched - 1).toLocaleString('en')} were searched. `,
    h('a', {href: link([sae.id], {...query, page: 0, after: found.searched - 1})}, 'Search on'));
  const rows = found.rows.map(row => h('tr', {},
    h('td', {}, h('a', {href: link([sae.id, row.latent])}, row.latent)),
    sae.explained ? h('td', {class: 'words'}, row.explanation ?? h('span', {class: 'soft'}, '–')) : null,
    h('td', {}, percent(row.frequency)), h('td', {class: 'optional'}, number(row.maximum)),
    h('td', {class: 'left'}, code(row.top_input)), h('td', {class: 'left optional'}, code(row.top_logit_token)),
    h('td', {class: 'optional'}, number(row.top_logit)),
    sae.explained ? h('td', {class: 'optional'}, number(row.score)) : null));
  const columns = [['latent', ''], ['explanation', 'left'], ['fires on', ''], ['maximum', 'optional'], ['most on', 'left'],
    ['raises', 'left optional'], ['logit', 'optional'], ['score', 'optional']].filter(([name]) => sae.explained || !['explanation', 'score'].includes(name));
  return {title, content: [...head, more || null, h('div', {class: 'scroll card', tabindex: 0, role: 'region', 'aria-label': 'list of latents'},
    h('table', {}, h('caption', {}, words), h('thead', {}, h('tr', {}, columns.map(([name, kind]) => h('th', {scope: 'col', class: kind || null}, name)))), h('tbody', {}, rows))),
    h('nav', {'aria-label': 'pages of the list'}, turn('Previous', page - 1, page > 0), turn('Next', page + 1, page + 1 < pages))].filter(Boolean)};
}
