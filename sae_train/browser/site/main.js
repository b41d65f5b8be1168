// Addresses to pages: #/SAE/17, so that a link works on any web server.
import * as data from './data.js';
import {fail, h, link, tell} from './dom.js';
import {indexPage} from './page_index.js';
import {listPage} from './page_list.js';
import {latentPage} from './page_latent.js';
import {textPage} from './page_text.js';
import {steerPage} from './page_steer.js';
import {comparePage} from './page_compare.js';

const main = document.getElementById('main');
let turn = 0;  // of the page that is being made: a slower one may not overwrite a newer one
let leave = () => {};

function address() {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?');
  return {parts: path.split('/').filter(Boolean).map(decodeURIComponent), query: Object.fromEntries(new URLSearchParams(query))};
}

async function pageOf({parts, query}) {
  const [sae, what] = parts;
  if (!sae) return indexPage();
  if (sae === 'compare') return comparePage(query);
  const shown = await data.shownSae(sae);
  if (what === undefined) return listPage(shown, query);
  if (what === 'text') return textPage(shown, query);
  if (what === 'steer') return steerPage(shown, query);
  return latentPage(shown, /^\d+$/.test(what) ? Number(what) : NaN, query);
}

async function navigation({parts}) {
  const nav = document.getElementById('nav');
  const [sae, what] = parts;
  const saes = (await data.index()).saes;
  const shown = saes.find(one => one.id === sae);
  const items = [h('a', {href: '#/', class: 'where', 'aria-current': sae ? null : 'page'}, shown && saes.length > 1 ? `‹ ${shown.name}` : shown ? shown.name : 'SAEs')];
  if (shown?.width) {
    const item = (words, target, current) => h('a', {href: target, 'aria-current': current ? 'page' : null}, words);
    items.push(item('Latents', link([sae]), what === undefined), item('Try a text', link([sae, 'text']), what === 'text'),
      item('Steer', link([sae, 'steer']), what === 'steer'));
    if (saes.filter(one => one.width).length > 1) items.push(item('Compare', link(['compare'], {a: sae}), false));
  }
  nav.replaceChildren(...items);
}

async function show() {
  const mine = ++turn;
  leave();
  leave = () => {};
  try {
    const here = address();
    await navigation(here);
    const page = await pageOf(here);
    if (mine !== turn) return;
    leave = page.leave ?? leave;
    document.title = page.title;
    main.replaceChildren(...page.content);
  } catch (error) {
    if (mine !== turn) return;
    document.title = 'Latents: not found';
    main.replaceChildren(h('h1', {}, 'Not here'), fail(error), h('p', {}, h('a', {href: '#/'}, 'All SAEs')));
  }
  main.dataset.ready = location.hash;
  tell(document.title);
  scrollTo(0, 0);
}

addEventListener('hashchange', () => { if (location.hash !== '#main') { main.focus({preventScroll: true}); show(); } });
show();
