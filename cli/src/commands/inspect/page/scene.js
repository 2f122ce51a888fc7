// What is drawn: the visible part of a tree, laid out, in absolute coordinates.

const HEAD = 28, PAD = 16;

class Scene {
  constructor(tree, metrics) {
    this.tree = tree;
    this.metrics = metrics;
    this.build();
  }

  build() {
    const { entry, root } = this.tree;
    this.elems = [];
    this.shown = new Int32Array(entry.n).fill(-1);       // node → the element that stands for it
    this.make(root, -1, 0);
    this.connect();
    for (let k = this.elems.length - 1; k >= 0; k--) this.measure(this.elems[k]);
    this.elems[0].x = this.elems[0].y = 0;
    this.lines = [];
    for (const e of this.elems) this.place(e);
    this.width = this.elems[0].w;
    this.height = this.elems[0].h;
  }

  make(item, parent, depth) {
    const id = this.elems.length, e = { id, item, kind: item.kind, parent, depth, kids: [], edges: [], links: new Map(), x: 0, y: 0, w: 0, h: 0 };
    this.elems.push(e);
    if (item.kind === 'node') { this.shown[item.i] = id; return id; }
    if (!item.open) { for (const i of item.nodes()) this.shown[i] = id; return id; }
    if (item.kind === 'stack') for (const m of item.members.slice(1)) for (const i of m.nodes()) this.shown[i] = id;
    for (const c of item.visible()) e.kids.push(this.make(c, id, depth + 1));
    return id;
  }

  /** Edges between the children of one element, each once, with how many it stands for. */
  connect() {
    const { entry, tree } = { entry: this.tree.entry, tree: this.tree };
    for (let v = 0; v < entry.n; v++) {
      if (this.shown[v] < 0) continue;
      for (const u of entry.inputs(v)) {
        if (this.shown[u] < 0 || tree.hidden(u)) continue;
        let a = this.shown[u], b = this.shown[v];
        while (a !== b && this.elems[a].depth > this.elems[b].depth) a = this.elems[a].parent;
        while (a !== b && this.elems[b].depth > this.elems[a].depth) b = this.elems[b].parent;
        while (a !== b && this.elems[a].parent !== this.elems[b].parent) { a = this.elems[a].parent; b = this.elems[b].parent; }
        if (a === b) continue;
        const links = this.elems[this.elems[a].parent].links, key = a * 2097152 + b;
        links.set(key, (links.get(key) || 0) + 1);
      }
    }
  }

  measure(e) {
    const it = e.item;
    if (e.kind === 'node') {
      const en = this.tree.entry, name = this.label(it.i), type = en.type(it.i);
      e.w = clamp(Math.max(name.length * 7.4 + 26, Math.min(type.length, 30) * 6.3 + 22), 74, 232);
      e.h = this.metrics ? 50 : 38;
      return;
    }
    const title = it.name.length * 7.6 + (e.kind === 'stack' || it.stack ? 126 : 66);
    if (!it.open) { e.w = clamp(title, 150, 380); e.h = this.metrics ? 58 : 46; return; }
    const size = e.kids.map((k) => [this.elems[k].w, this.elems[k].h]), local = new Map(e.kids.map((k, i) => [k, i]));
    const pairs = [...e.links.keys()].map((key) => [local.get(Math.floor(key / 2097152)), local.get(key % 2097152)]);
    let sign = e.kids.length;
    e.kids.forEach((k, i) => { sign = mix(mix(sign, this.elems[k].item.id ?? -1 - this.elems[k].item.i), Math.round(size[i][0] * 8 + size[i][1] * 4096)); });
    pairs.forEach(([a, b]) => { sign = mix(mix(sign, a), b); });
    if (it.laid?.sign !== sign) it.laid = { sign, ...layered(size, pairs) };
    e.layout = it.laid;
    e.w = Math.max(it.laid.w + 2 * PAD, title);
    e.h = it.laid.h + HEAD + 2 * PAD;
    e.shift = (e.w - it.laid.w) / 2;
  }

  place(e) {
    if (!e.layout) return;
    const l = e.layout, ox = e.x + e.shift, oy = e.y + HEAD + PAD;
    e.kids.forEach((k, i) => { this.elems[k].x = ox + l.x[i]; this.elems[k].y = oy + l.y[i]; });
    [...e.links.entries()].forEach(([key, n], k) => {
      const a = this.elems[Math.floor(key / 2097152)], b = this.elems[key % 2097152], back = !!l.back[k];
      const bends = l.bends[k].map(([x, y]) => [x + ox, y + oy]);
      const pts = back
        ? [[a.x + a.w / 2, a.y], ...bends.reverse(), [b.x + b.w / 2, b.y + b.h]]
        : [[a.x + a.w / 2, a.y + a.h], ...bends, [b.x + b.w / 2, b.y]];
      const xs = pts.map((p) => p[0]), ys = pts.map((p) => p[1]);
      this.lines.push({ a: a.id, b: b.id, n, back, pts, x0: Math.min(...xs), x1: Math.max(...xs), y0: Math.min(...ys), y1: Math.max(...ys) });
    });
  }

  /** What stands on a node. */
  label(i) {
    const e = this.tree.entry, op = e.opName(i);
    if (op === 'input') return e.attrs(i).replaceAll('"', '');
    if (op === 'param') return e.params[e.param(i)]?.name.split('.').slice(-2).join('.') ?? op;
    if (op === 'const') return e.attrs(i).slice(0, 20);
    return op;
  }

  /** The element at a point of the drawing, the innermost. */
  hit(x, y) {
    let e = this.elems[0], found = null;
    const inside = (k) => x >= k.x && x <= k.x + k.w && y >= k.y && y <= k.y + k.h;
    while (e && inside(e)) {
      found = e;
      e = e.kids.map((k) => this.elems[k]).find(inside);
    }
    return found && found.id !== 0 ? found : null;
  }
}

/** Numbers per node for an overlay, and their sums per box. */
class Metrics {
  constructor(data, stage, tree, kind) {
    this.kind = kind;
    this.tree = tree;
    const e = tree.entry, n = e.n;
    this.value = new Float64Array(n);
    this.unit = { bytes, flops: count, time: duration, saved: bytes, trained: count }[kind];
    this.extra = new Map();
    if (kind === 'bytes') for (let i = 0; i < n; i++) this.value[i] = data.nodeBytes(e, i);
    if (kind === 'flops') for (let i = 0; i < n; i++) this.value[i] = e.flops[i];
    if (kind === 'saved') for (const [v, s] of data.saved(stage, e)) this.value[v] = s.bytes;
    if (kind === 'trained') {
      for (let i = 0; i < n; i++) {
        for (const u of e.inputs(i)) { const p = e.param(u); if (p >= 0 && e.params[p]?.role === 'train') this.value[i] += data.elements(e.params[p].type); }
      }
    }
    if (kind === 'time') this.times(data, stage, e);
    this.sums = new Map();
    this.most = this.value.reduce((m, v) => Math.max(m, v), 0);
    this.total = this.value.reduce((s, v) => s + v, 0) + [...this.extra.values()].reduce((s, v) => s + v, 0);
  }

  /** Measured times. A launch of a plan has its own; nodes of a graph share those of their module by their work. */
  times(data, stage, e) {
    const t = data.profile?.by.get(e.name);
    if (!t) { this.missing = true; return; }
    if (stage.launches) {
      for (let i = 0; i < e.n; i++) this.value[i] = t.steps.get(e.step[i])?.ns || 0;
      return;
    }
    const steps = data.plan.entries.find((p) => p.name === e.name).steps, part = this.tree.part, groups = new Map(), spent = new Map();
    const key = (p, origin) => `${p}|${origin.split(' [')[0]}`;
    for (let i = 0; i < e.n; i++) {
      if (e.isLeaf(i) || VIEWS.has(e.opName(i))) continue;
      const k = key(part[i], e.origin(i));
      if (!groups.has(k)) groups.set(k, []);
      groups.get(k).push(i);
    }
    for (const [s, x] of t.steps) {
      const k = key(steps.part[s], data.strings[steps.from[s]]);
      spent.set(k, (spent.get(k) || 0) + x.ns);
    }
    for (const [k, ns] of spent) {
      const list = groups.get(k);
      if (!list) {
        const [l, module] = k.split('|'), box = this.tree.find(this.tree.both ? PARTS[l] : '', module);
        this.extra.set(box ?? this.tree.root, (this.extra.get(box ?? this.tree.root) || 0) + ns);
        continue;
      }
      const work = list.map((i) => e.flops[i] / 12 + data.nodeBytes(e, i) + 1), all = work.reduce((a, b) => a + b, 0);
      list.forEach((i, j) => { this.value[i] = (ns * work[j]) / all; });
    }
  }

  of(elem) {
    if (elem.kind === 'node') return this.value[elem.item.i];
    return this.sum(elem.item);
  }

  sum(box) {
    if (this.sums.has(box)) return this.sums.get(box);
    let s = this.extra.get(box) || 0;
    const parts = box.kind === 'stack' ? box.members : box.items;
    for (const c of parts) s += c.kind === 'node' ? this.value[c.i] : this.sum(c);
    this.sums.set(box, s);
    return s;
  }
}
