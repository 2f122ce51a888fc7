// The tab "Memory": where every byte of the arena lies when, what stays besides, and two plans side by side.

class MemoryView {
  constructor(box, app) {
    this.app = app;
    this.entries = el('select', { 'aria-label': 'Entry', onchange: () => this.show() });
    this.other = el('select', { 'aria-label': 'Compare with', onchange: () => this.show() });
    this.same = el('input', { type: 'checkbox', checked: true, id: 'same-scale', onchange: () => this.show() });
    this.file = el('input', { type: 'file', accept: '.html', hidden: true, onchange: () => this.load() });
    this.legend = el('div', { class: 'legend flat' });
    this.body = el('div', { class: 'memory' });
    this.hidden = new Set();
    clear(box).append(
      el('div', { class: 'bar' }, el('label', {}, 'Entry', this.entries), el('label', {}, 'Compare with', this.other),
        el('button', { type: 'button', text: 'Load another page…', title: 'Takes the plan of a page that was written before', onclick: () => this.file.click() }), this.file,
        el('label', { class: 'check' }, this.same, 'same scale'), el('span', { class: 'grow' }), this.legend),
      this.body);
  }

  setData(data) {
    this.data = data;
    const list = data.plan.entries;
    clear(this.entries).append(...list.map((e) => el('option', { value: e.name, text: `${e.name} · ${bytes(e.arena.total)}` })));
    const main = list.filter((e) => !e.name.startsWith('prepare')).reduce((a, b) => (a && a.arena.total >= b.arena.total ? a : b), null) || list[0];
    if (main) this.entries.value = main.name;
    this.others();
    this.show();
  }

  /** The pages that can be compared with. */
  others() {
    const all = this.app.all.filter((d) => d !== this.data);
    clear(this.other).append(el('option', { value: '', text: '–' }), ...all.map((d) => el('option', { value: this.app.all.indexOf(d), text: d.title })));
    this.other.value = all.length ? String(this.app.all.indexOf(all[0])) : '';
    this.other.disabled = !all.length;
  }

  async load() {
    const file = this.file.files[0];
    if (!file) return;
    try {
      const added = await this.app.add(await file.text());
      this.others();
      this.other.value = String(this.app.all.indexOf(added));
      this.show();
    } catch (e) { this.app.fault(`${file.name}: ${e.message}`); }
  }

  show() {
    const second = this.other.value === '' ? null : this.app.all[Number(this.other.value)], name = this.entries.value;
    const sides = [this.data, second].filter(Boolean).map((d) => ({ d, e: d.plan.entries.find((e) => e.name === name) || d.plan.entries.reduce((a, b) => (a.arena.total >= b.arena.total ? a : b)) }));
    if (!sides[0]?.e) return;
    const top = this.same.checked && sides.length > 1 ? Math.max(...sides.map((s) => s.e.arena.total)) : 0;
    this.same.parentElement.hidden = sides.length < 2;
    clear(this.body);
    this.arenas = sides.map(({ d, e }) => {
      const a = new Arena(this.app, d, e, (x, k) => this.pick(x, k));
      a.scale = top;
      a.hidden = this.hidden;
      return a;
    });
    this.panel = el('div', { class: 'picked' });
    this.body.append(el('div', { class: `arenas n${sides.length}` }, sides.map(({ d, e }, i) => el('section', { class: 'arena' },
      el('h3', {}, sides.length > 1 ? `${d.title} · ${e.name}` : e.name, el('span', { class: 'muted', text: ` arena ${bytes(e.arena.total)}, most alive at once ${bytes(e.arena.peak)}, ${count(e.arena.size.length)} buffers, ${count(e.steps.kernel.length)} launches` })),
      this.arenas[i].canvas))), this.panel);
    if (sides.length > 1) this.panel.append(this.differences(sides));
    this.pick(this.arenas[0], -1);
    this.showLegend();
    this.arenas.forEach((a) => a.draw());
  }

  showLegend() {
    const used = new Map();
    for (const a of this.arenas) a.a.kind.forEach((k, i) => used.set(k, (used.get(k) || 0) + a.a.size[i]));
    clear(this.legend).append(...Object.keys(LIFE).filter((k) => used.has(k)).map((k) => el('button', { type: 'button', class: 'chip', 'aria-pressed': String(!this.hidden.has(k)), onclick: () => {
      if (this.hidden.has(k)) this.hidden.delete(k); else this.hidden.add(k);
      this.showLegend();
      this.arenas.forEach((a) => a.draw());
    } }, el('i', { style: `background:var(--m-${k})` }), LIFE[k])));
  }

  pick(arena, k) {
    const box = el('div', { class: 'columns' });
    if (k >= 0) box.append(el('section', {}, el('h3', { text: 'Buffer' }), facts(arena.facts(k))));
    box.append(this.alive(arena));
    const d = this.arenas.map((a) => a.data);
    box.append(...[...new Set(d)].map((x) => this.stays(x, d.length > 1)));
    const old = this.panel.querySelector('.columns');
    if (old) old.replaceWith(box); else this.panel.append(box);
  }

  /** What is alive at the peak, by who makes it. */
  alive(arena) {
    const a = arena.a, groups = new Map();
    for (let k = 0; k < a.size.length; k++) {
      if (a.first[k] > arena.peakAt || a.last[k] <= arena.peakAt) continue;
      const name = arena.owner(k).split(' [')[0].replace(/\.\d+(?=\.|$)/g, '.*') || 'other', key = `${name}|${a.kind[k]}`, g = groups.get(key) || { name, kind: a.kind[k], n: 0, size: 0 };
      g.n++;
      g.size += a.size[k];
      groups.set(key, g);
    }
    const s = arena.entry.steps, at = s.wave.findIndex((w) => w === arena.peakAt), rows = [...groups.values()].sort((x, y) => y.size - x.size);
    return el('section', {}, el('h3', { text: `Alive at the peak (${arena.step(at < 0 ? null : at)})` }), el('table', {}, rows.slice(0, 14).map((g) => el('tr', {},
      el('td', {}, el('i', { class: 'swatch', style: `background:var(--m-${g.kind})` }), g.name), el('td', { class: 'num', text: `×${g.n}` }), el('td', { class: 'num', text: bytes(g.size) })))));
  }

  /** What lives outside the arena. */
  stays(d, named) {
    const groups = new Map(), what = (p) => (p.role === 'train' ? 'trained' : p.source === 'zeros' ? (/^adam\./.test(p.name) ? 'optimizer state' : /^grad\./.test(p.name) ? 'gradients' : 'state') : p.source === 'adapter' ? 'adapter' : p.source === 'derived' ? 'derived weights' : 'weights');
    for (const p of d.planParams()) {
      const key = `${what(p)}, ${p.stays}`, g = groups.get(key) || { n: 0, size: 0 };
      g.n++;
      g.size += p.bytes;
      groups.set(key, g);
    }
    const rows = [...groups].sort((a, b) => b[1].size - a[1].size), most = rows[0]?.[1].size || 1;
    return el('section', {}, el('h3', { text: named ? `Beside the arena: ${d.title}` : 'Beside the arena' }), el('table', {}, rows.map(([k, g]) => el('tr', {}, el('td', { text: k }), el('td', { class: 'num', text: `×${g.n}` }),
      el('td', { class: 'num', text: bytes(g.size) }), el('td', { class: 'track' }, el('i', { style: `width:${(100 * g.size) / most}%` }))))));
  }

  differences(sides) {
    const of = ({ e }) => { const m = new Map(); e.arena.kind.forEach((k, i) => m.set(k, (m.get(k) || 0) + e.arena.size[i])); return m; };
    const [a, b] = sides.map(of), row = (t, x, y) => el('tr', {}, el('td', { text: t }), el('td', { class: 'num', text: bytes(x) }), el('td', { class: 'num', text: bytes(y) }), el('td', { class: `num ${y > x ? 'minus' : y < x ? 'plus' : ''}`, text: y === x ? '=' : `${y > x ? '+' : '−'}${bytes(Math.abs(y - x))}` }));
    return el('section', { class: 'differences' }, el('h3', { text: 'Difference' }), el('table', {}, el('thead', {}, el('tr', {}, el('th'), el('th', { class: 'num', text: sides[0].d.title }), el('th', { class: 'num', text: sides[1].d.title }), el('th', { class: 'num', text: 'second − first' }))),
      el('tbody', {}, row('arena', sides[0].e.arena.total, sides[1].e.arena.total), row('most alive at once', sides[0].e.arena.peak, sides[1].e.arena.peak),
        ...Object.keys(LIFE).filter((k) => a.has(k) || b.has(k)).map((k) => row(`buffers: ${LIFE[k]}`, a.get(k) || 0, b.get(k) || 0)))));
  }
}
