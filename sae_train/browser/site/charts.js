// Inline SVG: a histogram and the frontier.
import {h, number, link} from './dom.js';

export function histogram(found, {log = false, label}) {
  if (!found) return h('p', {class: 'soft'}, 'It never fired on the text.');
  const [W, H, base] = [320, 92, 74];
  const heights = found.counts.map(count => log ? Math.log10(1 + count) : count);
  const most = Math.max(...heights, 1e-9);
  const step = W / heights.length;
  const [low, high] = [found.edges[0], found.edges.at(-1)];
  const total = found.counts.reduce((a, b) => a + b, 0);
  const bars = heights.map((height, at) => height ? h('rect', {
    class: 'bars', x: at * step + 0.5, width: Math.max(step - 1, 1), y: base - (height / most) * (base - 4), height: (height / most) * (base - 4),
  }, h('title', {}, `${number(found.edges[at])} to ${number(found.edges[at + 1])}: ${found.counts[at].toLocaleString('en')}`)) : null);
  return h('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img',
    'aria-label': `${label}: ${total.toLocaleString('en')} values between ${number(low)} and ${number(high)}`}, bars,
    h('line', {class: 'line', x1: 0, x2: W, y1: base, y2: base}),
    h('text', {x: 0, y: H - 4}, number(low)), h('text', {x: W, y: H - 4, 'text-anchor': 'end'}, number(high)));
}

// Round numbers between two, about as many as `count`.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= rough);
  return Array.from({length: Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1}, (_, at) => (Math.ceil(low / step - 1e-9) + at) * step);
}
const decades = [-3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap(power => [1, 2, 5].map(one => one * 10 ** power));

export function frontier(saes, key, label) {
  const points = saes.filter(one => one.l0 > 0 && one[key] !== null && one[key] !== undefined).sort((a, b) => a.l0 - b.l0);
  if (!points.length) return null;
  const [W, H, left, bottom] = [420, 250, 48, 34];
  const xs = points.map(one => Math.log10(one.l0)), ys = points.map(one => one[key]);
  const pad = (low, high) => { const by = (high - low) * 0.12 || Math.abs(high) * 0.1 || 0.1; return [low - by, high + by]; };
  const [x0, x1] = pad(Math.min(...xs), Math.max(...xs)), [y0, y1] = pad(Math.min(0, ...ys), Math.max(...ys));
  const x = value => left + (value - x0) / (x1 - x0) * (W - left - 10);
  const y = value => H - bottom - (value - Math.max(0, y0)) / (y1 - Math.max(0, y0)) * (H - bottom - 10);
  const marks = decades.filter(one => Math.log10(one) >= x0 && Math.log10(one) <= x1);
  return h('svg', {viewBox: `0 0 ${W} ${H}`, role: 'group', 'aria-label': `${label} by L0`},
    ticks(Math.max(0, y0), y1, 4).map(tick => [h('line', {class: 'line', x1: left, x2: W, y1: y(tick), y2: y(tick)}),
      h('text', {x: left - 6, y: y(tick) + 4, 'text-anchor': 'end'}, number(tick, 2))]),
    marks.map(mark => h('text', {x: x(Math.log10(mark)), y: H - bottom + 16, 'text-anchor': 'middle'}, number(mark, 2))),
    h('text', {x: W, y: H - 3, 'text-anchor': 'end'}, 'L0, logarithmic'),
    points.map((one, at) => {
      const dot = h('circle', {cx: x(xs[at]), cy: y(ys[at]), r: 6, fill: one.color},
        h('title', {}, `${one.label}: L0 ${number(one.l0)}, ${label} ${number(one[key])}`));
      const words = `${one.label}, L0 ${number(one.l0)}, ${label} ${number(one[key])}`;
      return one.width ? h('a', {svg: true, href: link([one.id]), 'aria-label': words}, dot) : dot;
    }));
}
