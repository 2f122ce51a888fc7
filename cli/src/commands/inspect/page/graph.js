// The tab "Graph": a canvas with its tools, search, pointer and keys.

class GraphView {
  constructor(box, app) {
    this.app = app;
    this.view = { x: 0, y: 0, scale: 1 };
    this.stage = 0;
    this.entry = null;
    this.overlay = '';
    this.params = false;
    this.selected = null;        // { kind: 'node', i } or { kind: 'box', box }
    this.hover = null;
    this.trees = new Map();
    this.results = [];
    this.build(box);
  }

  build(box) {
    const option = (v, t) => el('option', { value: v, text: t });
    this.stages = el('select', { 'aria-label': 'Stage', onchange: () => { this.stage = Number(this.stages.value); this.setEntries(); } });
    this.entries = el('select', { 'aria-label': 'Entry', onchange: () => this.open() });
    this.overlays = el('select', { 'aria-label': 'Overlay', onchange: () => { this.overlay = this.overlays.value; this.rebuild(true); } },
      option('', 'No overlay'), option('bytes', 'Bytes'), option('flops', 'FLOPs'), option('time', 'Time'), option('trained', 'Trained values'),
      option('saved', 'Kept for backward'));
    this.query = el('input', { type: 'search', placeholder: 'Search  ( / )', 'aria-label': 'Search nodes', spellcheck: 'false',
      oninput: () => this.search(), onkeydown: (e) => this.searchKey(e) });
    const button = (text, title, f) => el('button', { type: 'button', title, 'aria-label': title, text, onclick: f });
    const check = el('input', { type: 'checkbox', id: 'show-params', onchange: (e) => { this.params = e.target.checked; this.open(); } });
    this.canvas = el('canvas', { tabindex: '0', 'aria-label': 'Graph; arrow keys follow edges, Enter opens, plus and minus zoom', role: 'application' });
    this.list = el('div', { class: 'results', hidden: true, role: 'listbox', 'aria-label': 'Found' });
    this.legend = el('div', { class: 'legend' });
    this.details = el('aside', { class: 'details', 'aria-label': 'Details' });
    this.crumbs = el('div', { class: 'crumbs' });
    clear(box).append(
      el('div', { class: 'bar' },
        el('label', {}, 'Stage', this.stages), el('label', {}, 'Entry', this.entries), el('label', {}, 'Overlay', this.overlays),
        el('label', { class: 'check' }, check, 'parameters'),
        el('span', { class: 'grow' }),
        el('div', { class: 'search' }, this.query, this.list),
        button('Open all', 'Open every box (Shift+E)', () => this.all(true)), button('Fold all', 'Close every box (Shift+C)', () => this.all(false)),
        button('−', 'Zoom out (-)', () => this.zoom(1 / 1.3)), button('+', 'Zoom in (+)', () => this.zoom(1.3)), button('Fit', 'Show everything (0)', () => this.fit(true))),
      el('div', { class: 'split' }, el('div', { class: 'stage' }, this.canvas, this.legend, this.crumbs), this.details));
    this.pointer();
    this.canvas.addEventListener('keydown', (e) => this.key(e));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  setData(data) {
    this.data = data;
    this.trees.clear();
    clear(this.stages).append(...data.graphs.map((g, i) => el('option', { value: i, text: stageName(g.label) })));
    const n = data.graphs.length;
    this.stage = n > 1 ? n - 2 : 0;       // the final graph; a plan has its launches only
    this.stages.value = String(this.stage);
    for (const o of this.overlays.options) {
      o.disabled = (o.value === 'time' && !data.profile) || (o.value === 'saved' && !data.raw.saved);
    }
    this.setEntries();
  }

  setEntries() {
    const old = this.entries.value, list = this.data.graphs[this.stage].entries;
    clear(this.entries).append(...list.map((e) => el('option', { value: e.name, text: `${e.name} · ${e.n}` })));
    const both = (e) => { const late = e.parts(this.data.raw.seed, this.data.raw.settings).reduce((n, l) => n + (l > 0), 0); return late > e.n / 8 && late < e.n; };
    const keep = list.find((e) => e.name === old) || list.find(both) || list.find((e) => !e.name.startsWith('prepare')) || list[0];
    if (keep) this.entries.value = keep.name;
    this.open();
  }

  /** Shows the chosen entry of the chosen stage. */
  open() {
    const g = this.data.graphs[this.stage], e = g.entries.find((x) => x.name === this.entries.value);
    if (!e) return;
    this.entry = e;
    const key = `${this.stage}/${e.name}/${this.params}`;
    if (!this.trees.has(key)) this.trees.set(key, new Tree(this.data, e, { params: this.params }));
    this.tree = this.trees.get(key);
    this.selected = null;
    this.results = [];
    this.query.value = '';
    this.list.hidden = true;
    this.rebuild(false);
    this.fit(false);
    details(this, null);
  }

  rebuild(keep) {
    this.metrics = this.overlay ? new Metrics(this.data, this.data.graphs[this.stage], this.tree, this.overlay) : null;
    const t = performance.now();
    this.scene = new Scene(this.tree, this.metrics);
    this.layoutMs = performance.now() - t;
    if (keep && this.selected) details(this, this.selected);
    this.showLegend();
    this.draw();
  }

  /** Rebuilds with an element held where it is on the screen. */
  around(item, change) {
    const find = () => this.scene.elems.find((e) => e.item === item || (item.kind === 'node' && e.kind === 'node' && e.item.i === item.i));
    const before = find(), at = before && [before.x * this.view.scale + this.view.x, before.y * this.view.scale + this.view.y];
    change();
    this.rebuild(true);
    const after = find();
    if (at && after) { this.view.x = at[0] - after.x * this.view.scale; this.view.y = at[1] - after.y * this.view.scale; }
    this.draw();
  }

  toggle(box) { this.around(box, () => { box.open = !box.open; }); }

  spread(box) {
    const stack = box.kind === 'stack' ? box : box.stack;
    if (!stack) return;
    this.around(box.kind === 'stack' ? stack.members[0] : stack, () => {
      stack.spread = !stack.spread;
      if (stack.spread) stack.members[0].open = stack.open; else stack.open = stack.members[0].open;
    });
    if (this.selected?.box === box) this.select(null);
  }

  all(open) { this.tree.setAll(open); this.select(null); this.rebuild(false); this.fit(false); }

  // The view

  fit(smooth) {
    const w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    if (!w || !this.scene) return;
    const s = clamp(Math.min((w - 40) / this.scene.width, (h - 40) / this.scene.height), 0.004, 1.1);
    // a long graph starts at its top at a size that can be read
    const readable = Math.max(s, Math.min(0.72, (w - 40) / this.scene.width));
    const scale = s < 0.6 && !smooth ? readable : s;
    this.move({ scale, x: (w - this.scene.width * scale) / 2, y: scale > s ? 14 : (h - this.scene.height * scale) / 2 }, smooth);
  }

  move(to, smooth) {
    cancelAnimationFrame(this.flight);
    if (!smooth || matchMedia('(prefers-reduced-motion: reduce)').matches) { Object.assign(this.view, to); this.draw(); return; }
    const from = { ...this.view }, begin = performance.now();
    const step = (now) => {
      const t = clamp((now - begin) / 220, 0, 1), k = t * (2 - t), a = Math.exp(Math.log(from.scale) * (1 - k) + Math.log(to.scale) * k);
      const f = from.scale === to.scale ? k : (a - from.scale) / (to.scale - from.scale);
      this.view.scale = a;
      this.view.x = from.x + (to.x - from.x) * f;
      this.view.y = from.y + (to.y - from.y) * f;
      this.draw();
      if (t < 1) this.flight = requestAnimationFrame(step);
    };
    this.flight = requestAnimationFrame(step);
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const v = this.view, s = clamp(v.scale * factor, 0.003, 4), k = s / v.scale;
    this.view = { scale: s, x: x - (x - v.x) * k, y: y - (y - v.y) * k };
    this.draw();
  }

  /** Brings an element into the middle, large enough to read. */
  centre(e) {
    const w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    const scale = clamp(Math.max(this.view.scale, 0.7), 0.2, Math.max(0.2, Math.min(1.2, (w - 30) / e.w)));
    const tall = e.h * scale > h - 60;
    this.move({ scale, x: w / 2 - (e.x + e.w / 2) * scale, y: tall ? 30 - e.y * scale : h / 2 - (e.y + e.h / 2) * scale }, true);
  }

  draw() {
    if (this.pending || !this.scene) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.paint(); });
  }

  paint() {
    if (!this.canvas.clientWidth) return 0;
    const c = fitCanvas(this.canvas), begin = performance.now();
    const id = this.selected ? this.elemOf(this.selected)?.id ?? null : null;
    const found = this.results.length ? new Set(this.results.slice(0, 300).map((i) => this.scene.shown[i]).filter((k) => k >= 0)) : null;
    this.drawn = drawScene(c, this.canvas.clientWidth, this.canvas.clientHeight, this.scene, this.view,
      { p: this.app.palette, metrics: this.metrics, selected: id, hover: this.hover, found });
    this.paintMs = performance.now() - begin;
    return this.paintMs;
  }

  elemOf(item) {
    return item.kind === 'node' ? this.scene.elems[this.scene.shown[item.i]] : this.scene.elems.find((e) => e.item === item.box);
  }

  // Choosing

  select(item) {
    this.selected = item;
    details(this, item);
    this.draw();
  }

  /** Opens whatever hides a node, chooses it and goes there. */
  reveal(i) {
    this.tree.reveal(i);
    this.rebuild(false);
    this.select({ kind: 'node', i });
    const e = this.scene.elems[this.scene.shown[i]];
    if (e) this.centre(e);
  }

  pointer() {
    const c = this.canvas, at = (e) => { const r = c.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
    const world = ([x, y]) => [(x - this.view.x) / this.view.scale, (y - this.view.y) / this.view.scale];
    let drag = null;
    c.addEventListener('pointerdown', (e) => { drag = { from: at(e), view: { ...this.view }, moved: false }; c.setPointerCapture(e.pointerId); c.focus(); });
    c.addEventListener('pointermove', (e) => {
      const p = at(e);
      if (drag) {
        const dx = p[0] - drag.from[0], dy = p[1] - drag.from[1];
        if (Math.hypot(dx, dy) > 3) drag.moved = true;
        if (drag.moved) { this.view.x = drag.view.x + dx; this.view.y = drag.view.y + dy; this.draw(); tip.hide(); }
        return;
      }
      const w = world(p), hit = this.scene?.hit(...w), id = hit && !(hit.item.open && w[1] > hit.y + HEAD) ? hit.id : null;
      c.style.cursor = hit && hit.kind !== 'node' && signAt(c.getContext('2d'), hit, ...w) ? 'pointer' : id === null ? 'grab' : 'default';
      if (id !== this.hover) { this.hover = id; this.draw(); }
      if (id === null) tip.hide(); else tip.show(e.clientX, e.clientY, this.tipOf(hit));
    });
    c.addEventListener('pointerup', (e) => {
      const moved = drag?.moved;
      drag = null;
      if (moved || !this.scene) return;
      const w = world(at(e)), hit = this.scene.hit(...w);
      if (!hit) { this.select(null); return; }
      if (hit.kind === 'node') { this.select(hit.item); return; }
      const sign = signAt(c.getContext('2d'), hit, ...w);
      if (sign === 'toggle') this.toggle(hit.item);
      else if (sign === 'spread') this.spread(hit.item);
      else if (!hit.item.open || w[1] <= hit.y + HEAD) this.select({ kind: 'box', box: hit.item });
      else this.select(null);
    });
    c.addEventListener('dblclick', (e) => {
      const w = world(at(e)), hit = this.scene.hit(...w);
      if (hit && hit.kind !== 'node' && !signAt(c.getContext('2d'), hit, ...w)) this.toggle(hit.item);
    });
    c.addEventListener('pointerleave', () => { this.hover = null; tip.hide(); this.draw(); });
    c.addEventListener('wheel', (e) => {
      e.preventDefault();
      if (e.ctrlKey || e.metaKey || !e.shiftKey && Math.abs(e.deltaY) > Math.abs(e.deltaX)) this.zoom(Math.exp(-clamp(e.deltaY, -240, 240) * 0.0022), ...at(e));
      else { this.view.x -= e.deltaX || e.deltaY; this.draw(); }
    }, { passive: false });
  }

  tipOf(hit) {
    const value = this.metrics ? [`${overlayName(this.overlay)}: ${this.metrics.of(hit) ? this.metrics.unit(this.metrics.of(hit)) : '–'}`] : [];
    if (hit.kind !== 'node') return [el('b', { text: hit.item.path.slice(1).replaceAll('/', '.') || hit.item.name }), `${count(hit.item.count())} nodes; double-click opens and closes`, ...value];
    const i = hit.item.i;
    return [el('b', { text: this.scene.label(i) }), `%${i} : ${this.entry.type(i)}`, this.entry.origin(i), ...value].filter(Boolean);
  }

  // Searching

  search() {
    const q = this.query.value.trim().toLowerCase(), e = this.entry;
    this.results = [];
    if (q) {
      const words = q.split(/\s+/);
      for (let i = 0; i < e.n; i++) {
        const p = e.param(i), text = `%${i} ${e.opText(i)} ${e.type(i)} ${e.origin(i)} ${p >= 0 ? e.params[p].name + ' ' + e.params[p].role : ''}`.toLowerCase();
        if (words.every((w) => text.includes(w))) this.results.push(this.tree.hidden(i) ? e.users()[i].find((u) => !this.tree.hidden(u)) ?? -1 : i);
      }
      this.results = [...new Set(this.results)].filter((i) => i >= 0);
    }
    this.found = -1;
    this.list.hidden = !q;
    const row = (i) => el('button', { type: 'button', role: 'option', 'data-node': i, onclick: () => { this.found = this.results.indexOf(i); this.reveal(i); this.mark(); } },
      el('b', { text: this.scene.label(i) }), el('span', { class: 'mono', text: ` %${i} ${e.type(i)}` }), el('small', { text: e.origin(i) }));
    clear(this.list).append(el('div', { class: 'hint', text: `${count(this.results.length)} found${this.results.length > 200 ? ', the first 200 listed' : ''}; Enter goes to the next` }), ...this.results.slice(0, 200).map(row));
    this.draw();
  }

  searchKey(ev) {
    if (ev.key === 'Escape') { this.query.value = ''; this.search(); this.canvas.focus(); }
    if (ev.key !== 'Enter' || !this.results.length) return;
    const n = this.results.length;
    this.found = (this.found + (ev.shiftKey ? n - 1 : 1)) % n;
    this.reveal(this.results[this.found]);
    this.mark();
  }

  mark() {
    this.list.querySelectorAll('button').forEach((b, k) => { b.setAttribute('aria-selected', String(k === this.found)); if (k === this.found) b.scrollIntoView({ block: 'nearest' }); });
  }

  key(e) {
    const act = { '+': () => this.zoom(1.25), '=': () => this.zoom(1.25), '-': () => this.zoom(0.8), 0: () => this.fit(true), E: () => this.all(true), C: () => this.all(false),
      Escape: () => this.select(null), Enter: () => this.selected?.box && this.toggle(this.selected.box), s: () => this.selected?.box && this.spread(this.selected.box),
      ArrowUp: () => this.step('up'), ArrowDown: () => this.step('down'), ArrowLeft: () => this.step('left'), ArrowRight: () => this.step('right') }[e.key];
    if (act && !e.ctrlKey && !e.metaKey) { e.preventDefault(); act(); }
  }

  /** To the next element along an edge, or beside. */
  step(way) {
    const s = this.scene, cur = this.selected && this.elemOf(this.selected);
    if (!cur) { const first = s.elems[0].kids[0]; if (first !== undefined) this.choose(s.elems[first]); return; }
    const mid = (e) => [e.x + e.w / 2, e.y + e.h / 2], [cx, cy] = mid(cur);
    const linked = way === 'up' ? s.lines.filter((l) => l.b === cur.id).map((l) => l.a) : way === 'down' ? s.lines.filter((l) => l.a === cur.id).map((l) => l.b) : [];
    const beside = s.elems[cur.parent].kids.filter((k) => k !== cur.id && (way === 'left' ? mid(s.elems[k])[0] < cx : way === 'right' ? mid(s.elems[k])[0] > cx : false) && Math.abs(mid(s.elems[k])[1] - cy) < 60);
    const list = (linked.length ? linked : beside).map((k) => s.elems[k]).sort((a, b) => Math.hypot(mid(a)[0] - cx, mid(a)[1] - cy) - Math.hypot(mid(b)[0] - cx, mid(b)[1] - cy));
    if (list.length) this.choose(list[0]);
    else if (way === 'up' && cur.parent > 0) this.choose(s.elems[cur.parent]);
  }

  choose(e) { this.select(e.kind === 'node' ? e.item : { kind: 'box', box: e.item }); this.centre(e); }

  showLegend() {
    const p = this.app.palette, chip = (c, t) => el('span', { class: 'chip' }, el('i', { style: `background:${c}` }), t);
    clear(this.legend);
    if (!this.metrics) {
      const names = { product: 'product', attention: 'attention', element: 'elementwise', reduce: 'reduction', index: 'gather, scatter', move: 'movement, cast', input: 'input' };
      this.legend.append(...Object.entries(names).map(([k, t]) => chip(p[k].base, t)));
    } else if (this.metrics.missing) this.legend.append('the profile has no times for this entry; see the entries of the last stages');
    else {
      this.legend.append(el('span', { class: 'ramp', style: `background:linear-gradient(90deg,${[0, 0.05, 0.2, 0.5, 1].map((x) => heat(p, x)).join(',')})` }),
        `${overlayName(this.overlay)}: up to ${this.metrics.unit(this.metrics.most)} a node, ${this.metrics.unit(this.metrics.total)} in all`);
    }
  }
}

const overlayName = (k) => ({ bytes: 'bytes of results', flops: 'FLOPs', time: 'time', trained: 'trained values', saved: 'kept for backward' }[k]);
const stageName = (label) => (label === 'launches' ? 'launches (kernels)' : label.replace(/^(\d+)-/, '$1 · after '));
