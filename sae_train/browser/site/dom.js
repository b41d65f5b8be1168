// Elements, numbers and tokens. Text only ever enters the page as text nodes.

export function h(name, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'rect', 'line', 'circle', 'path', 'text', 'title'].includes(name)
    || attributes.svg;
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', name)
                      : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false || key === 'svg') continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (key === 'style') Object.assign(element.style, value);
    else if (key === 'value') element.value = value;
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return element;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString('en');
  return String(Number(value.toPrecision(digits)));
}

export const percent = value => value === null || value === undefined ? '–'
  : `${number(100 * value, 3)} %`;

// A tokenizer's piece as text: ▁ is a space, <0x0A> its character.
export function textOf(piece) {
  const byte = /^<0x([0-7][0-9A-F])>$/.exec(piece);
  return byte ? String.fromCharCode(parseInt(byte[1], 16)) : piece.replaceAll('▁', ' ');
}

// Signs for what can't be seen; a line break is shown and kept.
export function visible(text) {
  const parts = [];
  for (const part of text.split(/(\n|[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff])/)) {
    if (part === '\n') parts.push(h('span', {class: 'sign'}, '⏎'), '\n');
    else if (part.length === 1 && /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/.test(part))
      parts.push(h('span', {class: 'sign'}, `\\u${part.charCodeAt(0).toString(16).padStart(4, '0')}`));
    else if (part) parts.push(part);
  }
  return parts;
}

export const code = piece => piece === null || piece === undefined ? '–'
  : h('code', {}, textOf(piece) ? visible(textOf(piece)).filter(part => part !== '\n') : '∅');

export function shade(value, most) {
  const share = most > 0 ? Math.min(1, Math.max(0, value / most)) : 0;
  return share > 0 ? {background: `rgba(var(--hot), ${(0.08 + 0.72 * share).toFixed(2)})`} : {};
}

// Tokens shaded by value; those that fire can be reached by keyboard and say their value.
export function tokens(pieces, values, most, {peak = -1, press = null, pressed = -1} = {}) {
  return h('div', {class: 'text'}, pieces.map((piece, at) => {
    const value = values ? values[at] : 0;
    const text = textOf(piece);
    const title = `${JSON.stringify(text)}: ${number(value)}`;
    return h('span', {
      class: at === peak ? 'token peak' : 'token', style: shade(value, most), title,
      tabindex: press || value > 0 ? 0 : null, 'aria-label': value > 0 || press ? title : null,
      role: press ? 'button' : value > 0 ? 'note' : null, 'aria-pressed': press ? String(at === pressed) : null,
      onclick: press ? () => press(at) : null,
      onkeydown: press ? event => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); press(at); } } : null,
    }, visible(text));
  }));
}

export const fail = error => h('p', {class: 'error', role: 'alert'}, String(error.message ?? error));

export function tell(text) { document.getElementById('status').textContent = text; }

export const link = (parts, query = {}) => {
  const given = Object.entries(query).filter(([, value]) => value !== '' && value !== null && value !== undefined);
  return `#/${parts.map(encodeURIComponent).join('/')}${given.length ? '?' + new URLSearchParams(given) : ''}`;
};
