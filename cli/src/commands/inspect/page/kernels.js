// The tab "Kernels": a table to sort, and the code of one kernel at every level, with lines linked where they are known.

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
      this.code.append(el('div', { class: 'panes' }, ptx.length ? ptx : el('p', { class: 'empty', text: 'A plan holds machine code only: give inspect the model folder to see IR, MLIR and assembly.' })));
      return;
    }
    const ir = this.pane('IR', k.ir), mlir = this.pane('MLIR', k.mlir), asm = this.pane(k.language, k.code, k.lines);
    this.link(mlir, asm, k.lines);
    this.code.append(el('div', { class: 'panes' }, ir, mlir, asm));
    for (const p of [ir, mlir, asm]) p.list.set(p.lines.length);
    const first = k.lines.findIndex((l) => l > 0);
    if (first > 0) asm.list.show(first + 12);
  }

  pane(title, text, from) {
    const lines = text.replace(/\n$/, '').split('\n'), body = el('div', { class: 'text', tabindex: '0', 'aria-label': title });
    const box = el('div', { class: 'pane' }, el('div', { class: 'pane-head' }, el('b', { text: title }), el('span', { class: 'muted', text: `${count(lines.length)} lines` }),
      el('button', { type: 'button', text: 'Copy', onclick: () => navigator.clipboard?.writeText(text) })), body);
    box.marked = new Set();
    box.lines = lines;
    box.list = virtualList(body, 16, (i) => el('div', { class: `ln ${box.marked.has(i) ? 'on' : ''} ${from && from[i] ? 'linked' : ''}`, 'data-line': i, onmouseenter: () => box.enter?.(i), onclick: () => box.enter?.(i, true) },
      el('span', { class: 'no', text: String(i + 1) }), el('span', { class: 'code', text: lines[i].replaceAll('\t', '    ') })));
    return box;
  }

  /** Lines of MLIR and of machine code mark each other. */
  link(mlir, asm, from) {
    const to = new Map();
    from.forEach((m, i) => { if (m) { if (!to.has(m - 1)) to.set(m - 1, []); to.get(m - 1).push(i); } });
    const mark = (m, list, jump, other, at) => {
      mlir.marked = new Set(m === null ? [] : [m]);
      asm.marked = new Set(list);
      mlir.list.refresh();
      asm.list.refresh();
      if (jump && at !== undefined) other.list.show(at);
    };
    mlir.enter = (i, jump) => mark(i, to.get(i) || [], jump, asm, to.get(i)?.[0]);
    asm.enter = (i, jump) => { const m = from[i] ? from[i] - 1 : null; mark(m, m === null ? [] : to.get(m), jump, mlir, m === null ? undefined : m); };
  }
}
