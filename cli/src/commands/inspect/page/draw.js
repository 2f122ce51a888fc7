// Drawing a scene on a canvas: what is too small to read is drawn as plain rectangles, what is outside not at all.

const KINDS = ['product', 'attention', 'element', 'reduce', 'index', 'move', 'input', 'param', 'const'];

/** Colours of the theme, mixed once. */
function palette() {
  const p = { text: colour('--text'), muted: colour('--muted'), panel: colour('--panel'), line: colour('--line'), accent: colour('--accent'),
    edge: colour('--edge'), bg: colour('--bg'), box: [0, 1, 2].map((k) => colour(`--box${k}`)), boxline: colour('--boxline'), heat: colour('--heat'),
    into: colour('--into'), out: colour('--out'), onaccent: colour('--onaccent') };
  for (const k of KINDS) {
    const c = colour(`--k-${k}`);
    p[k] = { base: c, fill: blend(c, p.panel, 0.14), line: blend(c, p.panel, 0.55) };
  }
  return p;
}

const parse = (c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16));
/** `share` of colour a on colour b. */
function blend(a, b, share) {
  const [x, y] = [parse(a), parse(b)];
  return `#${x.map((v, i) => Math.round(v * share + y[i] * (1 - share)).toString(16).padStart(2, '0')).join('')}`;
}

/** The colour of a value between nothing and all. */
const heat = (p, share) => blend(p.heat, p.panel, 0.06 + 0.86 * Math.sqrt(clamp(share, 0, 1)));

function drawScene(c, w, h, scene, view, state) {
  const { p, metrics, selected, hover, found } = state, s = view.scale;
  c.save();
  c.fillStyle = p.bg;
  c.fillRect(0, 0, w, h);
  c.translate(view.x, view.y);
  c.scale(s, s);
  const x0 = -view.x / s, y0 = -view.y / s, x1 = x0 + w / s, y1 = y0 + h / s;
  const seen = (e) => e.x < x1 && e.x + e.w > x0 && e.y < y1 && e.y + e.h > y0;
  let drawn = 0;
  // boxes first, outer before inner; then lines; then nodes
  const small = new Map(), nodes = [];
  const walk = (e) => {
    if (!seen(e)) return;
    drawn++;
    if (e.kind === 'node') {
      if (e.h * s < 9) {
        const k = fillOf(e, scene, p, metrics);
        if (!small.has(k)) small.set(k, []);
        small.get(k).push(e);
      } else nodes.push(e);
      return;
    }
    if (e.id !== 0) { if (e.item.open) openBox(c, e, s, p, metrics); else nodes.push(e); }
    if (e.w * s > 12) for (const k of e.kids) walk(scene.elems[k]);
  };
  walk(scene.elems[0]);
  drawLines(c, scene, s, p, x0, y0, x1, y1, selected);
  for (const [fill, list] of small) {
    c.fillStyle = fill;
    c.beginPath();
    for (const e of list) c.rect(e.x, e.y, e.w, e.h);
    c.fill();
  }
  for (const e of nodes) { if (e.kind === 'node') drawNode(c, e, scene, s, p, metrics); else closedBox(c, e, s, p, metrics); }
  if (selected) drawSelected(c, scene, s, p, selected);
  const mark = (id, col, width) => {
    const e = scene.elems[id];
    if (!e || !seen(e)) return;
    c.strokeStyle = col;
    c.lineWidth = width / s;
    round(c, e.x - 2 / s, e.y - 2 / s, e.w + 4 / s, e.h + 4 / s, 8);
    c.stroke();
  };
  if (found) for (const id of found) mark(id, p.heat, 2);
  if (hover !== null && hover !== selected) mark(hover, p.muted, 1.5);
  if (selected !== null) mark(selected, p.accent, 2.5);
  c.restore();
  return drawn;
}

function round(c, x, y, w, h, r) {
  c.beginPath();
  c.roundRect(x, y, w, h, r);
}

function fillOf(e, scene, p, metrics) {
  if (metrics) return heat(p, metrics.most ? metrics.of(e) / metrics.most : 0);
  return p[category(baseOp(scene.tree.entry, e.item.i))].line;
}

/** The operator that gives a launch its colour. */
function baseOp(entry, i) {
  const op = entry.opName(i), m = /^k\d+_([a-z]+)/.exec(op);
  if (!entry.kernelOf || !m) return op;
  return { mm: 'matmul', row: 'add', attention: 'attention', scatter: 'scatter_set', pack: 'reshape' }[m[1]] ?? 'add';
}

function drawNode(c, e, scene, s, p, metrics) {
  const en = scene.tree.entry, i = e.item.i, kind = p[category(baseOp(en, i))];
  const value = metrics ? metrics.of(e) : 0, share = metrics?.most ? value / metrics.most : 0;
  c.fillStyle = metrics ? heat(p, share) : kind.fill;
  c.strokeStyle = kind.line;
  c.lineWidth = 1;
  round(c, e.x, e.y, e.w, e.h, 6);
  c.fill();
  c.stroke();
  c.fillStyle = kind.base;
  c.fillRect(e.x, e.y + 5, 3, e.h - 10);
  if (e.h * s < 13) return;
  c.fillStyle = metrics && share > 0.35 ? p.onaccent : p.text;
  c.font = '600 12.5px system-ui, sans-serif';
  c.textBaseline = 'middle';
  c.textAlign = 'left';
  c.fillText(clip(c, scene.label(i), e.w - 16), e.x + 10, e.y + 13);
  if (s < 0.5) return;
  c.font = '11px ui-monospace, "DejaVu Sans Mono", monospace';
  if (!(metrics && share > 0.35)) c.fillStyle = p.muted;
  c.fillText(clip(c, en.type(i), e.w - 16), e.x + 10, e.y + 28);
  if (metrics) { c.font = '600 11px system-ui, sans-serif'; c.fillText(value ? metrics.unit(value) : '–', e.x + 10, e.y + 42); }
}

/** The sign that opens or closes, and how often a stack stands. Gives the left edge of the signs. */
function boxSigns(c, e, p, open) {
  let x = e.x + e.w - 14;
  const y = e.y + (open ? HEAD / 2 : 16);
  c.strokeStyle = p.muted;
  c.lineWidth = 1.4;
  round(c, x - 7, y - 7, 14, 14, 3);
  c.stroke();
  c.beginPath();
  c.moveTo(x - 4, y); c.lineTo(x + 4, y);
  if (!open) { c.moveTo(x, y - 4); c.lineTo(x, y + 4); }
  c.stroke();
  x -= 14;
  const stack = e.kind === 'stack' ? e.item : e.item.stack;
  if (stack) {
    const text = e.kind === 'stack' ? `×${stack.members.length}` : 'fold';
    c.font = '700 11px system-ui, sans-serif';
    const w = c.measureText(text).width + 12;
    c.fillStyle = e.kind === 'stack' ? p.accent : p.line;
    round(c, x - w, y - 9, w, 18, 9);
    c.fill();
    c.fillStyle = e.kind === 'stack' ? p.onaccent : p.text;
    c.textAlign = 'center';
    c.textBaseline = 'middle';
    c.fillText(text, x - w / 2, y + 0.5);
    x -= w + 6;
  }
  return x;
}

/** Which sign of a box a point is on. */
function signAt(c, e, x, y) {
  const cy = e.y + (e.item.open ? HEAD / 2 : 16);
  if (Math.abs(y - cy) > 11) return '';
  if (Math.abs(x - (e.x + e.w - 14)) < 10) return 'toggle';
  const stack = e.kind === 'stack' ? e.item : e.item.stack;
  if (stack) {
    c.font = '700 11px system-ui, sans-serif';
    const w = c.measureText(e.kind === 'stack' ? `×${stack.members.length}` : 'fold').width + 12, right = e.x + e.w - 28;
    if (x <= right && x >= right - w) return 'spread';
  }
  return '';
}

function openBox(c, e, s, p, metrics) {
  c.fillStyle = p.box[e.depth % 3];
  c.strokeStyle = p.boxline;
  c.lineWidth = Math.max(1, 0.7 / s);
  round(c, e.x, e.y, e.w, e.h, 9);
  c.fill();
  c.stroke();
  if (HEAD * s < 9) return;
  const right = boxSigns(c, e, p, true);
  c.textAlign = 'left';
  c.textBaseline = 'middle';
  c.font = '600 13px system-ui, sans-serif';
  c.fillStyle = p.text;
  const name = clip(c, e.item.name, right - e.x - 20);
  c.fillText(name, e.x + 12, e.y + HEAD / 2 + 1);
  if (!metrics) return;
  const after = c.measureText(name).width + 22;
  c.font = '11px system-ui, sans-serif';
  c.fillStyle = p.muted;
  c.fillText(clip(c, metrics.of(e) ? metrics.unit(metrics.of(e)) : '', right - e.x - after - 8), e.x + after, e.y + HEAD / 2 + 1);
}

function closedBox(c, e, s, p, metrics) {
  const fill = metrics ? heat(p, metrics.total ? metrics.of(e) / metrics.total : 0) : p.panel;
  c.lineWidth = Math.max(1.2, 0.8 / s);
  c.strokeStyle = p.boxline;
  if (e.kind === 'stack') {
    for (const d of [8, 4]) { c.fillStyle = blend(p.boxline, p.panel, 0.25); round(c, e.x + d, e.y + d, e.w, e.h, 8); c.fill(); c.stroke(); }
  }
  c.fillStyle = fill;
  round(c, e.x, e.y, e.w, e.h, 8);
  c.fill();
  c.stroke();
  if (e.h * s < 13) return;
  const right = boxSigns(c, e, p, false), strong = metrics && metrics.total && metrics.of(e) / metrics.total > 0.35;
  c.textAlign = 'left';
  c.textBaseline = 'middle';
  c.font = '600 13px system-ui, sans-serif';
  c.fillStyle = strong ? p.onaccent : p.text;
  c.fillText(clip(c, e.item.name, right - e.x - 14), e.x + 12, e.y + 17);
  if (e.h * s < 24) return;
  c.font = '11px system-ui, sans-serif';
  if (!strong) c.fillStyle = p.muted;
  const n = e.item.kind === 'stack' ? `${e.item.members.length} × ${e.item.members[0].count()} nodes` : `${e.item.count()} nodes`;
  c.fillText(n, e.x + 12, e.y + 34);
  if (metrics) { c.font = '600 11px system-ui, sans-serif'; c.fillText(metrics.of(e) ? metrics.unit(metrics.of(e)) : '–', e.x + 12, e.y + 49); }
}

function trace(c, pts, curved) {
  c.moveTo(pts[0][0], pts[0][1]);
  for (let i = 1; i < pts.length; i++) {
    const [ax, ay] = pts[i - 1], [bx, by] = pts[i], m = (ay + by) / 2;
    if (curved && ax !== bx) c.bezierCurveTo(ax, m, bx, m, bx, by); else c.lineTo(bx, by);
  }
}

function arrow(c, pts, s, up) {
  const [x, y] = pts.at(-1), k = 4.2, d = up ? -1 : 1;
  c.moveTo(x, y);
  c.lineTo(x - k, y - d * 7);
  c.lineTo(x + k, y - d * 7);
  c.closePath();
}

function drawLines(c, scene, s, p, x0, y0, x1, y1) {
  if (s < 0.015) return;
  const curved = s > 0.22, seen = scene.lines.filter((l) => l.x0 < x1 && l.x1 > x0 && l.y0 < y1 && l.y1 > y0 && (l.x1 - l.x0 + l.y1 - l.y0) * s > 3);
  c.strokeStyle = p.edge;
  c.lineWidth = s > 0.22 ? 1.3 : 0.6 / s;
  c.beginPath();
  for (const l of seen) if (!l.back) trace(c, l.pts, curved);
  c.stroke();
  c.setLineDash([5, 4]);
  c.beginPath();
  for (const l of seen) if (l.back) trace(c, l.pts, curved);
  c.stroke();
  c.setLineDash([]);
  if (s < 0.35) return;
  c.fillStyle = p.edge;
  c.beginPath();
  for (const l of seen) arrow(c, l.pts, s, l.back);
  c.fill();
}

/** What goes into the selected element and comes out of it, over everything, from and to the elements that are seen. */
function drawSelected(c, scene, s, p, id) {
  const { entry, hidden } = { entry: scene.tree.entry, hidden: scene.tree.hidden };
  const inside = new Set(), e = scene.elems[id];
  if (!e) return;
  const walk = (k) => { inside.add(k); scene.elems[k].kids.forEach(walk); };
  walk(id);
  const into = new Set(), out = new Set(), users = entry.users();
  const nodes = e.kind === 'node' ? [e.item.i] : e.item.nodes();
  for (const v of nodes) {
    for (const u of entry.inputs(v)) if (!hidden(u) && !inside.has(scene.shown[u])) into.add(scene.shown[u] * 2097152 + scene.shown[v]);
    for (const w of users[v]) if (!inside.has(scene.shown[w])) out.add(scene.shown[v] * 2097152 + scene.shown[w]);
  }
  for (const [set, col] of [[into, p.into], [out, p.out]]) {
    c.strokeStyle = c.fillStyle = col;
    c.lineWidth = Math.max(2, 1.6 / s);
    for (const key of [...set].slice(0, 400)) {
      const a = scene.elems[Math.floor(key / 2097152)], b = scene.elems[key % 2097152];
      if (!a || !b) continue;
      const direct = scene.lines.find((l) => l.a === a.id && l.b === b.id);
      const up = b.y + b.h < a.y;
      const pts = direct ? direct.pts : [[a.x + a.w / 2, up ? a.y : a.y + a.h], [b.x + b.w / 2, up ? b.y + b.h : b.y]];
      c.beginPath(); trace(c, pts, true); c.stroke();
      c.beginPath(); arrow(c, pts, s, up); c.fill();
    }
  }
}
