// The data of a page: unpacked once, read through small accessors.

const VIEWS = new Set(['reshape', 'transpose', 'broadcast', 'after', 'stop_gradient', 'slice']);
const MOVES = new Set(['reshape', 'transpose', 'broadcast', 'slice', 'pad', 'concat', 'cast', 'after', 'stop_gradient']);

async function unpack(base64) {
  const raw = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
  if (typeof DecompressionStream === 'undefined') throw new Error('this browser lacks DecompressionStream; use one of 2023 or later');
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

/** What an operator is, for its colour. */
function category(op) {
  if (op === 'matmul') return 'product';
  if (op.startsWith('attention')) return 'attention';
  if (op.startsWith('reduce') || op === 'sum' || op === 'max_reduce') return 'reduce';
  if (op === 'gather' || op.startsWith('scatter')) return 'index';
  if (op === 'input') return 'input';
  if (op === 'param') return 'param';
  if (op === 'const' || op === 'iota') return 'const';
  if (MOVES.has(op)) return 'move';
  return 'element';
}

/** The parts of a training step. */
const PARTS = ['forward', 'backward', 'optimizer'];

/** An entry of a graph, or of a plan's launches: nodes in columns. */
class Entry {
  constructor(name, cols, strings, params) {
    Object.assign(this, cols);
    this.name = name;
    this.strings = strings;
    this.params = params;
    this.n = cols.op.length;
    this.start = new Uint32Array(this.n + 1);
    for (let i = 0; i < this.n; i++) this.start[i + 1] = this.start[i] + cols.arity[i];
    this.at = new Uint32Array(this.start[this.n]);
    for (let i = 0; i < this.n; i++) for (let k = this.start[i]; k < this.start[i + 1]; k++) this.at[k] = i - cols.in[k];
  }
  inputs(i) { return this.at.subarray(this.start[i], this.start[i + 1]); }
  opText(i) { return this.strings[this.op[i]]; }
  opName(i) { const s = this.opText(i), t = s.indexOf('\t'); return t < 0 ? s : s.slice(0, t); }
  attrs(i) { const s = this.opText(i), t = s.indexOf('\t'); return t < 0 ? '' : s.slice(t + 1); }
  type(i) { return this.strings[this.ty[i]]; }
  origin(i) { return this.strings[this.from[i]]; }
  module(i) { const o = this.origin(i), b = o.indexOf(' ['); return b < 0 ? o : o.slice(0, b); }
  rule(i) { const m = /\[([^\]]+)\]$/.exec(this.origin(i)); return m ? m[1] : ''; }
  param(i) { const m = /^@(\d+)/.exec(this.attrs(i)); return this.opName(i) === 'param' && m ? Number(m[1]) : -1; }
  isLeaf(i) { const o = this.opName(i); return o === 'param' || o === 'const' || o === 'iota'; }
  users() {
    if (!this.readers) {
      this.readers = Array.from({ length: this.n }, () => []);
      for (let i = 0; i < this.n; i++) for (const u of this.inputs(i)) if (this.readers[u].at(-1) !== i) this.readers[u].push(i);
    }
    return this.readers;
  }
  /** The part of a training step that each node is of, as a place in PARTS: forward; backward depends on the factor of the loss; the
      optimizer on its settings. All zero for an entry without a backward part. */
  parts(seed, settings) {
    if (this.part) return this.part;
    const part = this.given ? Uint8Array.from(this.given) : new Uint8Array(this.n);
    const inputs = new Map([[`input\t"${seed}"`, 1], ...settings.map((s) => [`input\t"${s}"`, 2])]);
    const of = Array.from(this.op, (_, i) => inputs.get(this.opText(i)) || 0);
    if (!this.given && of.includes(1)) {
      for (let i = 0; i < this.n; i++) part[i] = this.inputs(i).reduce((m, u) => Math.max(m, part[u]), of[i]);
    }
    this.part = part;
    return part;
  }
  /** The line of the text form. */
  line(i) {
    const ids = Array.from(this.inputs(i), (v) => `%${v}`).join(', '), op = this.opName(i), a = this.attrs(i);
    const call = ids || !(op === 'input' || op === 'param' || op === 'const' || op === 'iota') ? `(${ids})` : '';
    const from = this.origin(i) ? ` from "${this.origin(i)}"` : '';
    return `%${i} = ${op}${call}${a ? ' ' + a : ''} : ${this.type(i)}${from}`;
  }
  rootLines() {
    return this.roots.map(([v, k]) => (typeof k === 'string' ? `output "${k}" %${v}` : `assign @${k} %${v}`));
  }
}

/** Everything of one payload. */
class Data {
  constructor(raw) {
    this.raw = raw;
    // pages that were written before say in which half a launch is
    raw.settings ||= [];
    for (const e of raw.plan.entries) e.steps.part ||= e.steps.late;
    this.title = raw.title;
    this.plan = raw.plan;
    this.kernels = raw.kernels;
    this.passes = raw.passes || [];
    this.rules = raw.rules || [];
    this.strings = raw.strings;
    this.symbols = Object.fromEntries(raw.plan.symbols);
    this.widths = { f32: 4, i32: 4, bf16: 2, f16: 2, bool: 1 };
    this.graphs = [];
    let before = new Map(), params = null;
    for (const g of raw.graphs || []) {
      if (g.params) params = this.columnsToParams(g.params);
      const entries = g.entries.map((e) => (e.same ? before.get(e.name) : new Entry(e.name, e, raw.strings, params)));
      before = new Map(entries.map((e) => [e.name, e]));
      this.graphs.push({ label: g.label, pass: g.pass, params, entries });
    }
    const runs = this.plan.entries.map((e) => launches(this, e));
    this.graphs.push({ label: 'launches', launches: true, pass: null, params: this.planParams(), entries: runs });
    this.profile = raw.profile ? joinProfile(this, raw.profile) : null;
  }
  columnsToParams(c) {
    const s = this.strings;
    return c.name.map((n, i) => ({ name: s[n], type: s[c.ty[i]], role: s[c.role[i]], bytes: c.bytes[i], source: s[c.source[i]] }));
  }
  planParams() {
    if (!this.pp) {
      const p = this.plan.params, s = this.strings;
      this.pp = p.name.map((name, i) => ({ name, type: s[p.ty[i]], bytes: p.bytes[i], role: s[p.role[i]], source: s[p.source[i]], stays: s[p.stays[i]] }));
    }
    return this.pp;
  }
  /** Elements of a type at the page's counts. */
  elements(type) {
    const m = /^(\w+)\[([^\]]*)\]/.exec(type);
    if (!m) return 0;
    return m[2].split(',').filter((d) => d !== '').reduce((n, d) => n * (Number(d) || this.symbols[d] || 1), 1);
  }
  typeBytes(type) {
    const d = /^(\w+)\[/.exec(type);
    return d ? this.elements(type) * (this.widths[d[1]] || 4) : 0;
  }
  /** Bytes of a node's result; views and parameters take none of their own. */
  nodeBytes(e, i) {
    if (e.sizes) return e.sizes[i];
    const op = e.opName(i);
    return e.isLeaf(i) || VIEWS.has(op) ? 0 : this.typeBytes(e.type(i));
  }
  /** Kept values of an entry: node → facts. */
  saved(stage, e) {
    const s = this.raw.saved;
    if (!s || s.entry !== e.name || stage.launches || this.graphs.indexOf(stage) < s.graph) return new Map();
    return new Map(s.values.map(([v, name, size, reason, only, us]) => [v, { name, bytes: size, reason, only: !!only, us }]));
  }
}

/** The launches of a plan's entry as a graph: one node per step, input and parameter. */
function launches(data, p) {
  const strings = [''], number = new Map([['', 0]]);
  const id = (s) => { if (!number.has(s)) { number.set(s, strings.length); strings.push(s); } return number.get(s); };
  const cols = { op: [], ty: [], from: [], arity: [], in: [], flops: [], roots: [], sizes: [], step: [], given: [] };
  const made = new Map();
  const push = (op, ty, from, inputs, flops, size, step, part) => {
    const at = cols.op.length;
    cols.op.push(id(op)); cols.ty.push(id(ty)); cols.from.push(id(from)); cols.arity.push(inputs.length);
    cols.in.push(...inputs.map((v) => at - v)); cols.flops.push(flops); cols.sizes.push(size); cols.step.push(step); cols.given.push(part);
    return at;
  };
  const source = (b) => {
    if (made.has(b)) return made.get(b);
    const kind = p.buffers.kind[b];
    let v = -1;
    if (kind[0] === 'i') v = push(`input\t"${p.inputs[kind[1]][0]}"`, p.inputs[kind[1]][1], '', [], 0, 0, -1, 0);
    else if (kind[0] === 'p') v = push(`param\t@${kind[1]}`, data.planParams()[kind[1]].type, '', [], 0, 0, -1, 0);
    if (v >= 0) made.set(b, v);
    return v;
  };
  const s = p.steps;
  for (let i = 0; i < s.kernel.length; i++) {
    const k = data.kernels[s.kernel[i]], reads = s.buffers[i].slice(0, s.reads[i]), writes = s.buffers[i].slice(s.reads[i]);
    const inputs = [...new Set(reads.map(source).filter((v) => v >= 0))];
    const outs = k.out ? k.out.join(' ') : bytes(writes.reduce((n, b) => n + p.buffers.bytes[b], 0));
    const size = writes.reduce((n, b) => n + (p.buffers.kind[b] === 'a' || p.buffers.kind[b] === 'o' ? p.buffers.bytes[b] : 0), 0);
    const v = push(`${k.name}\t`, outs, data.strings[s.from[i]], inputs, k.flops, size, i, s.part[i]);
    writes.forEach((b) => made.set(b, v));
  }
  p.outputs.forEach(([name, , b]) => { if (made.has(b)) cols.roots.push([made.get(b), name]); });
  const e = new Entry(p.name, cols, strings, data.planParams());
  e.kernelOf = (i) => (cols.step[i] < 0 ? -1 : s.kernel[cols.step[i]]);
  return e;
}

/** Times by entry and step. */
function joinProfile(data, p) {
  const by = new Map();
  for (const e of p.entries) {
    const steps = new Map(e.step.map((s, i) => [s, { calls: e.calls[i], ns: e.ns[i], least: e.least[i] }]));
    by.set(e.name, { steps, total: e.ns.reduce((a, b) => a + b, 0) });
  }
  const kernels = data.kernels.map(() => ({ calls: 0, ns: 0 }));
  for (const e of data.plan.entries) {
    const t = by.get(e.name);
    if (t) for (const [s, x] of t.steps) { const k = kernels[e.steps.kernel[s]]; k.calls += x.calls; k.ns += x.ns; }
  }
  const total = [...by.values()].reduce((n, e) => n + e.total, 0);
  return { ...p, by, kernels, total };
}
