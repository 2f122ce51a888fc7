// Small helpers: elements, numbers for people, clipping of text.

const $ = (selector, root) => (root || document).querySelector(selector);

/** An element with properties and children; `class`, `data-…`, `aria-…` and `on…` mean what they say. */
function el(tag, props, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) {
    if (v === undefined || v === null || v === false) continue;
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v);
    else if (k === 'text') e.textContent = v;
    else e.setAttribute(k, v === true ? '' : v);
  }
  for (const c of children.flat()) if (c !== null && c !== undefined) e.append(c);
  return e;
}

function clear(e) {
  e.replaceChildren();
  return e;
}

function bytes(n) {
  if (!Number.isFinite(n)) return '–';
  if (n < 1024) return `${Math.round(n)} B`;
  const units = ['KiB', 'MiB', 'GiB', 'TiB'];
  let x = n / 1024, u = 0;
  while (x >= 1024 && u + 1 < units.length) { x /= 1024; u++; }
  return `${x >= 100 ? x.toFixed(0) : x.toFixed(1)} ${units[u]}`;
}

function count(n) {
  if (!Number.isFinite(n)) return '–';
  for (const [limit, unit] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e4, 'k']]) {
    if (n >= limit) {
      const x = n / (limit === 1e4 ? 1e3 : limit);
      return `${x >= 100 ? x.toFixed(0) : x.toFixed(1)} ${unit}`;
    }
  }
  return Number.isInteger(n) ? String(n) : n.toFixed(1);
}

function duration(ns) {
  if (!Number.isFinite(ns)) return '–';
  if (ns < 1e3) return `${Math.round(ns)} ns`;
  if (ns < 1e6) return `${(ns / 1e3).toFixed(1)} µs`;
  if (ns < 1e9) return `${(ns / 1e6).toFixed(2)} ms`;
  return `${(ns / 1e9).toFixed(2)} s`;
}

function percent(x) {
  return Number.isFinite(x) ? `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %` : '–';
}

const clamp = (x, lo, hi) => Math.max(lo, Math.min(hi, x));

/** Mixes a number into a hash of 52 bits. */
function mix(h, x) {
  let a = (h & 0xffffffff) ^ x, b = Math.floor(h / 4294967296) ^ (x * 31);
  a = Math.imul(a ^ (a >>> 16), 2246822507) ^ Math.imul(b ^ (b >>> 13), 3266489909);
  b = Math.imul(b ^ (b >>> 16), 2246822507) ^ Math.imul(a ^ (a >>> 13), 3266489909);
  return 4294967296 * (1048575 & b) + (a >>> 0);
}

function hashText(s) {
  let h = s.length;
  for (let i = 0; i < s.length; i++) h = mix(h, s.charCodeAt(i));
  return h;
}

/** A value of the style sheet. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A canvas as large as its box in device pixels; gives its context, scaled to CSS pixels. */
function fitCanvas(canvas) {
  const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const c = canvas.getContext('2d');
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  return c;
}

/** `text` cut to `width` pixels with an ellipsis. */
function clip(c, text, width) {
  if (c.measureText(text).width <= width) return text;
  let lo = 0, hi = text.length;
  while (lo < hi) {
    const m = (lo + hi + 1) >> 1;
    if (c.measureText(text.slice(0, m) + '…').width <= width) lo = m; else hi = m - 1;
  }
  return lo ? text.slice(0, lo) + '…' : '';
}

/** A list of which only what is seen is in the page. `row(i)` makes the element of a row, all `height` high. */
function virtualList(box, height, row) {
  const pad = el('div', { class: 'pad' }), rows = el('div', { class: 'rows' });
  clear(box).append(pad, rows);
  let n = 0, shown = '';
  const draw = (force) => {
    const first = Math.max(0, Math.floor(box.scrollTop / height) - 10);
    const last = Math.min(n, Math.ceil((box.scrollTop + (box.clientHeight || 600)) / height) + 10);
    const key = `${first}-${last}`;
    if (key === shown && !force) return;
    shown = key;
    rows.style.transform = `translateY(${first * height}px)`;
    const list = [];
    for (let i = first; i < last; i++) list.push(row(i));
    rows.replaceChildren(...list);
  };
  box.onscroll = () => draw(false);
  new ResizeObserver(() => draw(true)).observe(box);
  return {
    set(length) { n = length; pad.style.height = `${n * height}px`; draw(true); },
    refresh() { draw(true); },
    show(i) {
      const top = i * height;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 2 * height) box.scrollTop = Math.max(0, top - box.clientHeight / 3);
      draw(true);
    },
  };
}

/** The tip that follows the pointer. */
const tip = {
  show(x, y, lines) {
    const t = $('#tip');
    clear(t).append(...lines.map((l) => (typeof l === 'string' ? el('div', { text: l }) : l)));
    t.hidden = false;
    const r = t.getBoundingClientRect();
    t.style.left = `${clamp(x + 14, 4, innerWidth - r.width - 4)}px`;
    t.style.top = `${y + r.height + 24 > innerHeight ? Math.max(4, y - r.height - 10) : y + 16}px`;
  },
  hide() { $('#tip').hidden = true; },
};
