// The tab "Kernels": a table to sort, and the code of one kernel at every level. A line of MLIR says in a comment which values of
// the kernel's IR it is written for, and the line table of the machine code which line of MLIR an instruction stems from: lines
// that belong together have one colour, and mark each other.

class KernelsView {
  constructor(box, app) {
    this.app = app;
    this.sort = ['share', -1];
    this.filter = el('input', { type: 'search', placeholder: 'Filter', 'aria-label': 'Filter kernels', oninput: () => this.table() });
    this.note = el('span', { class: 'muted' });
    this.head = el('thead');
    this.rows = el('tbody');
    this.code = el('div', { class: 'code-panes' });
    clear(box).append(el('div', { class: 'bar' }, this.filter, this.note), el('div', { class: 'kernel-split' },
      el('div', { class: 'scroll' }, el('table', { class: 'kernels' }, this.head, this.rows)), this.code));
  }

  setData(data) {
    this.data = data;
    const gpu = data.kernels.some((k) => k.launches?.length), [flops, band] = data.profile?.machine?.[0] ? data.profile.machine : data.raw.speeds;
    const uses = data.kernels.map(() => 0), prepare = data.kernels.map(() => 0);
    for (const e of data.plan.entries) for (const k of e.steps.kernel) (e.name.startsWith('prepare') ? prepare : uses)[k]++;
    this.list = data.kernels.map((k, i) => {
      const roof = Math.max(k.flops / flops, k.bytes / band) * 1e9, t = data.profile?.kernels[i], each = t?.calls ? t.ns / t.calls : NaN;
      return { i, k, name: k.name, class: k.class, signature: k.in ? `${k.in.join(', ')} → ${k.out.join(', ')}` : `${k.reads.length} → ${k.writes.length}`,
        uses: uses[i], prepare: prepare[i], tasks: k.tasks, flops: k.flops, bytes: k.bytes, intensity: k.bytes ? k.flops / k.bytes : 0,
        bound: k.flops / flops > k.bytes / band ? 'compute' : 'memory', share: roof * uses[i], roof, time: t?.ns || 0, each, reached: each ? roof / each : NaN,
        registers: Math.max(0, ...(k.launches || []).map((l) => l.registers || 0)), shared: Math.max(0, ...(k.launches || []).map((l) => l.shared || 0)) };
    });
    const all = this.list.reduce((s, r) => s + r.share, 0) || 1;
    this.list.forEach((r) => { r.share /= all; });
    this.columns = [['name', 'kernel'], ['class', 'class'], ['signature', 'signature'], ['uses', 'uses', 1], ['flops', 'FLOPs', 1, count], ['bytes', 'bytes', 1, bytes], ['intensity', 'FLOP/B', 1, (x) => x.toFixed(1)], ['bound', 'bound by'],
      ['share', 'roofline share', 1, percent]];
    if (data.profile) this.columns.push(['each', 'time', 1, duration], ['time', 'in all', 1, duration], ['reached', 'of roofline', 1, percent]);
    if (gpu) this.columns.push(['registers', 'registers', 1, (x) => x || '–'], ['shared', 'shared', 1, bytes]);
    if (data.profile) this.sort = ['time', -1];
    this.note.textContent = `${data.kernels.length} kernels, one launch at ${Object.entries(data.symbols).map(([k, v]) => `${k}=${v}`).join(' ')}; roofline of ${count(flops)}FLOP/s and ${bytes(band)}/s${data.profile?.machine?.[0] ? ' (measured with the profile)' : ' (the cost model’s)'}`;
    this.table();
    this.pick(this.sorted[0]?.i ?? -1);
  }

  table() {
    const [key, dir] = this.sort, q = this.filter.value.toLowerCase();
    clear(this.head).append(el('tr', {}, this.columns.map(([k, t, num]) => el('th', { class: num ? 'num' : '', 'aria-sort': k === key ? (dir > 0 ? 'ascending' : 'descending') : 'none' },
      el('button', { type: 'button', text: t + (k === key ? (dir > 0 ? ' ▲' : ' ▼') : ''), onclick: () => { this.sort = [k, k === key ? -dir : num ? -1 : 1]; this.table(); } })))));
    const value = (r) => { const v = r[key]; return typeof v === 'number' && !Number.isFinite(v) ? -Infinity : v; };
    this.sorted = this.list.filter((r) => `${r.name} ${r.class} ${r.signature}`.toLowerCase().includes(q)).sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return dir * (typeof x === 'string' ? x.localeCompare(y, 'en', { numeric: true }) : x - y) || a.i - b.i;
    });
    clear(this.rows).append(...this.sorted.map((r) => el('tr', { 'data-kernel': r.i, tabindex: '0', 'aria-selected': String(r.i === this.picked), onclick: () => this.pick(r.i), onkeydown: (e) => { if (e.key === 'Enter') this.pick(r.i); } },
      this.columns.map(([k, , num, f]) => el('td', { class: `${num ? 'num' : k === 'signature' ? 'mono sig' : ''}`, title: k === 'signature' ? r.signature : '' }, k === 'name' ? el('b', { text: r.name }) : k === 'class' ? el('span', { class: `tag c-${r.class}`, text: r.class }) : f ? String(f(r[k])) : String(r[k]))))));
  }

  pick(i) {
    this.picked = i;
    this.rows.querySelectorAll('tr').forEach((t) => t.setAttribute('aria-selected', String(Number(t.dataset.kernel) === i)));
    clear(this.code);
    if (i < 0) return;
    const k = this.data.kernels[i], where = new Map();
    for (const e of this.data.plan.entries) {
      const n = e.steps.kernel.filter((x) => x === i).length;
      if (n) where.set(e.name, n);
    }
    this.code.append(el('div', { class: 'kernel-head' }, el('h3', { text: k.name }), el('span', { class: 'muted', text: `${[...where].map(([e, n]) => `${e} ×${n}`).join(', ')}; ${count(k.tasks)} tasks, ${bytes(k.scratch)} scratch` }),
      ...(k.launches || []).map((l) => el('span', { class: 'muted', text: `grid ${l.grid.join('×')} of ${l.block}, ${bytes(l.shared)} shared${l.registers ? `, ${l.registers} registers` : ''}${l.spilled ? `, ${l.spilled} B spilled` : ''}` }))));
    if (!k.ir) {
      const ptx = (this.data.raw.ptx || []).map(([n, t]) => this.pane(n, t));
      this.linked = null;
      this.code.append(el('div', { class: 'panes' }, ptx.length ? ptx : el('p', { class: 'empty', text: 'A plan holds machine code only: give inspect the model folder to see IR, MLIR and assembly.' })));
      return;
    }
    const panes = [['IR', k.ir], ['MLIR', k.mlir], [k.language, k.code]].map(([title, text]) => this.pane(title, text));
    this.linked = new Linked(panes, k.lines, k.same);
    this.code.append(el('div', { class: 'panes' }, panes));
    for (const p of panes) p.list.set(p.lines.length);
    // begin where there is something to see
    for (const p of panes.slice(1)) { const first = p.values.findIndex((v) => v.length); if (first > 0) p.list.show(first + 12); }
  }

  pane(title, text) {
    const lines = text.replace(/\n$/, '').split('\n').map((l) => l.replace(/ \/\/( %\d+)+$/, '')), body = el('div', { class: 'text', tabindex: '0', 'aria-label': title });
    const box = el('div', { class: 'pane' }, el('div', { class: 'pane-head' }, el('b', { text: title }), el('span', { class: 'muted', text: `${count(lines.length)} lines` }),
      el('button', { type: 'button', text: 'Copy', onclick: () => navigator.clipboard?.writeText(text) })), body);
    Object.assign(box, { text, lines, values: [], marked: new Set() });
    box.list = virtualList(body, 16, (i) => {
      const of = box.values[i]?.[0];
      return el('div', { class: `ln${box.marked.has(i) ? ' on' : ''}${of === undefined ? '' : ' linked'}`, style: of === undefined ? null : `--h:${hue(of)}`, 'data-line': i,
        onmouseenter: () => this.linked?.enter(box, i, false), onclick: () => this.linked?.enter(box, i, true) },
      el('span', { class: 'no', text: String(i + 1) }), el('span', { class: 'code', text: lines[i].replaceAll('\t', '    ') }));
    });
    return box;
  }
}

/** A hue for a value, far from that of its neighbours. */
const hue = (v) => Math.round((v * 137.5 + 25) % 360);

/** The lines of IR, MLIR and machine code that belong together. `from`: the line of MLIR of each line of code, from 1; 0 for none.
    `same`: a GPU's kernel may have parts that compute the same, with code for one of them; for each value the one of that part. */
class Linked {
  constructor([ir, mlir, code], from, same) {
    Object.assign(this, { ir, mlir, code, from, pinned: null });
    const numbers = (l) => Array.from(l.matchAll(/%(\d+)/g), (m) => Number(m[1]));
    // a line of IR defines a value, or returns one
    ir.values = ir.lines.map((l) => (/^\s*(%\d+ =|output )/.test(l) ? numbers(l).slice(0, 1).map((v) => (same ? same[v] : v)) : []));
    mlir.values = mlir.text.split('\n').slice(0, mlir.lines.length).map((l) => { const at = l.lastIndexOf(' // %'); return at < 0 ? [] : numbers(l.slice(at)); });
    code.values = code.lines.map((_, i) => (from[i] ? mlir.values[from[i] - 1] : []));
    const written = new Set(mlir.values.flat());
    ir.values = ir.values.map((v) => v.filter((x) => written.has(x)));
    this.codeOf = new Map();
    from.forEach((m, i) => { if (m) { if (!this.codeOf.has(m - 1)) this.codeOf.set(m - 1, []); this.codeOf.get(m - 1).push(i); } });
  }

  /** Marks what belongs to a line; a click keeps it marked until the next one, and shows it. */
  enter(pane, i, click) {
    if (!click && this.pinned) return;
    const again = click && this.pinned?.pane === pane && this.pinned.i === i;
    if (click) this.pinned = again ? null : { pane, i };
    const marked = again ? { ir: [], mlir: [], code: [] } : this.of(pane, i);
    for (const k of ['ir', 'mlir', 'code']) {
      const on = (this[k].marked = new Set(marked[k]));
      // rows stay as they are: one that was made anew under the pointer would be entered again
      this[k].querySelectorAll('.ln').forEach((row) => row.classList.toggle('on', on.has(Number(row.dataset.line))));
      if (click && !again && this[k] !== pane && marked[k].length) this[k].list.show(marked[k][0]);
    }
  }

  of(pane, i) {
    const lines = (p, values) => p.values.flatMap((v, k) => (v.some((x) => values.includes(x)) ? [k] : []));
    const codeOf = (list) => list.flatMap((m) => this.codeOf.get(m) || []).sort((a, b) => a - b);
    if (pane === this.ir) {
      const mlir = lines(this.mlir, pane.values[i]);
      return { ir: lines(this.ir, pane.values[i]), mlir, code: codeOf(mlir) };
    }
    const m = pane === this.mlir ? i : this.from[i] - 1;
    if (!(m >= 0)) return { ir: [], mlir: [], code: [] };
    return { ir: lines(this.ir, this.mlir.values[m]), mlir: [m], code: codeOf([m]) };
  }
}
