// A small picture of a region before or after a rewrite.

const SVG = new DOMParser().parseFromString('<svg></svg>', 'text/html').body.firstChild.namespaceURI;

function svg(tag, props, ...children) {
  const e = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(props)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

/** The steps that a rewrite touched, with what they read and what reads them: of `mine` those that do not occur in `other`. */
function touched(mine, other) {
  const sign = (list) => list.map(([text, ins]) => `${text}(${ins.map((i) => list[i][0]).join(',')})`), left = new Map();
  for (const s of sign(other)) left.set(s, (left.get(s) || 0) + 1);
  const keep = new Set(), own = new Set();
  sign(mine).forEach((s, i) => {
    const n = left.get(s) || 0;
    if (n && mine[i][4] === null) left.set(s, n - 1); else if (!mine[i][2]) own.add(i);
  });
  mine.forEach(([, ins], i) => {
    if (own.has(i)) { keep.add(i); ins.forEach((u) => keep.add(u)); } else if (ins.some((u) => own.has(u))) keep.add(i);
  });
  return { keep, own };
}

/** Some of the steps, renumbered. */
function partOf(steps, outputs, keep) {
  const order = [...keep].sort((a, b) => a - b), at = new Map(order.map((v, k) => [v, k]));
  return { steps: order.map((v) => [steps[v][0], steps[v][1].filter((u) => at.has(u)).map((u) => at.get(u)), ...steps[v].slice(2)]), outputs: outputs.filter((o) => at.has(o)).map((o) => at.get(o)), order };
}

/** `steps`: [text, inputs, leaf, type, rule or null]. Nodes that a rule made are marked with its number, those in `gone` as going. */
function sketch(steps, outputs, gone = new Set()) {
  const size = steps.map(([text, , leaf, ty]) => [clamp(Math.max(text.length * 6.6, ty.length * 5.9) + 18, 50, 210), leaf ? 32 : 34]);
  const edges = steps.flatMap(([, ins], i) => ins.map((u) => [u, i])), l = layered(size, edges), w = Math.max(60, l.w) + 24, h = l.h + 44;
  const g = svg('svg', { viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: 'img', 'aria-label': `${steps.length} nodes` });
  edges.forEach(([a, b], k) => {
    const pts = [[l.x[a] + size[a][0] / 2, l.y[a] + size[a][1]], ...l.bends[k], [l.x[b] + size[b][0] / 2, l.y[b]]].map(([x, y]) => [x + 12, y + 12]);
    let d = `M${pts[0]}`;
    for (let i = 1; i < pts.length; i++) { const m = (pts[i - 1][1] + pts[i][1]) / 2; d += ` C${pts[i - 1][0]},${m} ${pts[i][0]},${m} ${pts[i]}`; }
    g.append(svg('path', { d, class: 'edge' }));
  });
  steps.forEach(([text, , leaf, ty, rule], i) => {
    const x = l.x[i] + 12, y = l.y[i] + 12, [bw, bh] = size[i];
    const box = svg('g', { class: leaf ? 'leaf' : gone.has(i) ? 'going' : rule === null ? 'plain' : 'ruled' });
    box.append(svg('rect', { x, y, width: bw, height: bh, rx: leaf ? 15 : 5 }));
    const name = svg('text', { x: x + bw / 2, y: y + 14, class: 'name' });
    name.textContent = leaf ? { run: 'input', train: 'trained', slot: 'adapter', base: 'weight', const: 'constant' }[text.split(' ')[0]] ?? text : text.slice(0, 30);
    const type = svg('text', { x: x + bw / 2, y: y + 27, class: 'type' });
    type.textContent = ty;
    box.append(name, type);
    if (rule !== null) {
      const badge = svg('text', { x: x + bw - 3, y: y - 2, class: 'badge' });
      badge.textContent = String(rule + 1);
      box.append(badge);
    }
    if (outputs.includes(i)) box.append(svg('path', { d: `M${x + bw / 2},${y + bh} v14 m-4,-6 l4,6 l4,-6`, class: 'edge out' }));
    g.append(box);
  });
  return g;
}
