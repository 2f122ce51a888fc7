// The tab "Profile": measured times by kernel and by module, and the launches in time.

class ProfileView {
  constructor(box, app) {
    this.app = app;
    this.box = box;
  }

  setData(data) {
    this.data = data;
    const p = data.profile;
    clear(this.box);
    if (!p) {
      this.box.append(el('div', { class: 'empty' }, el('p', { text: 'No times here. Measure a run and give the file to inspect:' }),
        el('pre', { text: 'pleach run MODEL --prompt "…" --profile p.json\npleach inspect MODEL --html out.html --profile p.json' }),
        el('p', { text: 'generate and train take --profile too. The file is a chrome trace as well: perfetto opens it.' })));
      return;
    }
    this.canvas = el('canvas', { class: 'timeline', tabindex: '0', role: 'img', 'aria-label': 'launches in time' });
    this.box.append(el('div', { class: 'profile' },
      el('p', { class: 'muted', text: `${p.command}, ${p.threads} threads; ${duration(p.total)} in launches${p.machine[0] ? `; the machine: ${count(p.machine[0])}FLOP/s and ${bytes(p.machine[1])}/s, measured` : ''}` }),
      el('section', {}, el('h3', { text: `Launches in time (the first ${count(p.timeline.ns.length)}; wheel zooms, drag moves)` }), this.canvas),
      el('div', { class: 'columns' }, this.kernels(p), this.modules(p))));
    this.events();
    this.pointer();
    new ResizeObserver(() => this.paint()).observe(this.canvas);
  }

  bar(share, cls = '') { return el('td', { class: 'track' }, el('i', { style: `width:${100 * share}%`, class: cls })); }

  kernels(p) {
    const rows = this.data.kernels.map((k, i) => ({ k, i, ...p.kernels[i] })).filter((r) => r.calls).sort((a, b) => b.ns - a.ns), most = rows[0]?.ns || 1;
    return el('section', {}, el('h3', { text: 'By kernel' }), el('table', {}, el('thead', {}, el('tr', {}, ['kernel', 'launches', 'each', 'in all', 'share', ''].map((t, k) => el('th', { class: k ? 'num' : '', text: t })))),
      el('tbody', {}, rows.slice(0, 40).map((r) => el('tr', {}, el('td', {}, el('button', { type: 'button', class: 'link', text: r.k.name, onclick: () => this.app.goKernel(r.i) })), el('td', { class: 'num', text: count(r.calls) }), el('td', { class: 'num', text: duration(r.ns / r.calls) }),
        el('td', { class: 'num', text: duration(r.ns) }), el('td', { class: 'num', text: percent(r.ns / p.total) }), this.bar(r.ns / most, `c-${r.k.class}`))))));
  }

  modules(p) {
    const groups = new Map();
    for (const e of this.data.plan.entries) {
      const t = p.by.get(e.name);
      if (!t) continue;
      for (const [s, x] of t.steps) {
        const name = this.data.strings[e.steps.from[s]].split(' [')[0].replace(/\.\d+(?=\.|$)/g, '.*') || '(none)', half = e.steps.part.includes(1) ? ` · ${PARTS[e.steps.part[s]]}` : '';
        const key = `${name}|${e.name}${half}`, g = groups.get(key) || { name, entry: e.name + half, ns: 0, n: 0 };
        g.ns += x.ns;
        g.n++;
        groups.set(key, g);
      }
    }
    const rows = [...groups.values()].sort((a, b) => b.ns - a.ns), most = rows[0]?.ns || 1;
    return el('section', {}, el('h3', { text: 'By module' }), el('table', {}, el('thead', {}, el('tr', {}, ['module', 'entry', 'steps', 'time', 'share', ''].map((t, k) => el('th', { class: k > 1 ? 'num' : '', text: t })))),
      el('tbody', {}, rows.slice(0, 40).map((g) => el('tr', {}, el('td', { text: g.name }), el('td', { class: 'nowrap', text: g.entry }), el('td', { class: 'num', text: String(g.n) }), el('td', { class: 'num', text: duration(g.ns) }), el('td', { class: 'num', text: percent(g.ns / p.total) }), this.bar(g.ns / most))))));
  }

  events() {
    const t = this.data.profile.timeline;
    let at = 0;
    this.list = t.ns.map((ns, i) => { at += t.gap[i]; return { at, ns, entry: t.entry[i], step: t.step[i] }; });
    const begin = this.list[0]?.at || 0;
    this.list.forEach((e) => { e.at -= begin; });
    this.end = Math.max(1, ...this.list.map((e) => e.at + e.ns));
    this.range = [0, this.end];
    this.rows = [...new Set(this.list.map((e) => e.entry))];
  }

  paint() {
    const w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    if (!w) return;
    const c = fitCanvas(this.canvas), p = this.app.palette, [lo, hi] = this.range, x = (t) => 96 + ((t - lo) / (hi - lo)) * (w - 104), row = (h - 30) / this.rows.length;
    c.fillStyle = p.panel;
    c.fillRect(0, 0, w, h);
    c.font = '11px system-ui, sans-serif';
    c.textBaseline = 'middle';
    this.rows.forEach((r, k) => { c.fillStyle = p.text; c.fillText(clip(c, this.data.plan.entries[r]?.name ?? '', 86), 6, 8 + row * (k + 0.5)); });
    c.save();
    c.beginPath(); c.rect(96, 0, w - 104, h); c.clip();
    for (const e of this.list) {
      if (e.at > hi || e.at + e.ns < lo) continue;
      const s = this.data.plan.entries[e.entry]?.steps, k = s && this.data.kernels[s.kernel[e.step]], a = x(e.at), b = Math.max(0.6, x(e.at + e.ns) - a), y = 8 + row * this.rows.indexOf(e.entry) + 3;
      c.fillStyle = colour(`--c-${k?.class ?? 'row'}`) || p.accent;
      c.fillRect(a, y, b > 3 ? b - 0.5 : b, row - 6);
      if (b > 60 && k) { c.fillStyle = p.onaccent; c.fillText(clip(c, k.name, b - 8), a + 4, y + (row - 6) / 2); }
    }
    c.restore();
    c.fillStyle = p.muted;
    c.textAlign = 'center';
    for (let k = 0; k <= 5; k++) { const t = lo + ((hi - lo) * k) / 5; c.fillText(duration(t), clamp(x(t), 110, w - 30), h - 10); }
    c.textAlign = 'left';
  }

  pointer() {
    const c = this.canvas, time = (e) => { const r = c.getBoundingClientRect(); return this.range[0] + ((e.clientX - r.left - 96) / (r.width - 104)) * (this.range[1] - this.range[0]); };
    let drag = null;
    c.addEventListener('wheel', (e) => {
      e.preventDefault();
      const t = time(e), k = Math.exp(clamp(e.deltaY, -200, 200) * 0.002), [lo, hi] = this.range;
      this.range = [Math.max(0, t - (t - lo) * k), Math.min(this.end, t + (hi - t) * k)];
      this.paint();
    }, { passive: false });
    c.addEventListener('pointerdown', (e) => { drag = { x: e.clientX, range: this.range.slice() }; c.setPointerCapture(e.pointerId); });
    c.addEventListener('pointerup', () => { drag = null; });
    c.addEventListener('pointerleave', () => tip.hide());
    c.addEventListener('dblclick', () => { this.range = [0, this.end]; this.paint(); });
    c.addEventListener('pointermove', (e) => {
      if (drag) {
        const d = ((drag.x - e.clientX) / (c.clientWidth - 104)) * (drag.range[1] - drag.range[0]), a = clamp(drag.range[0] + d, 0, this.end - (drag.range[1] - drag.range[0]));
        this.range = [a, a + drag.range[1] - drag.range[0]];
        this.paint();
        return;
      }
      const t = time(e), x = this.list.find((v) => v.at <= t && t < v.at + v.ns);
      if (!x) { tip.hide(); return; }
      const en = this.data.plan.entries[x.entry], s = en.steps;
      tip.show(e.clientX, e.clientY, [el('b', { text: this.data.kernels[s.kernel[x.step]].name }), `${en.name}, step ${x.step}`, this.data.strings[s.from[x.step]], duration(x.ns)]);
    });
  }
}
