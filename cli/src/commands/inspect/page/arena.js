// The arena of one entry: rectangles over launches and addresses, and the curve of live bytes above them.

const LIFE = { kept: 'kept for backward', forward: 'forward', rebuilt: 'built again', gradient: 'backward', activation: 'activation', window: 'inside a loop', output: 'output' };
const CURVE = 86, LEFT = 62, FOOT = 22;

class Arena {
  /** `scale`: bytes that the height stands for; 0 for this arena's own. */
  constructor(app, data, entry, onpick) {
    Object.assign(this, { app, data, entry, onpick });
    this.a = entry.arena;
    this.waves = Math.max(1, ...this.a.last);
    this.range = [0, this.waves];
    this.hidden = new Set();
    this.scale = 0;
    this.picked = -1;
    this.live = new Float64Array(this.waves);
    for (let k = 0; k < this.a.size.length; k++) for (let t = this.a.first[k]; t < this.a.last[k]; t++) this.live[t] += this.a.size[k];
    this.peakAt = this.live.reduce((m, v, t) => (v > this.live[m] ? t : m), 0);
    this.canvas = el('canvas', { tabindex: '0', role: 'img', 'aria-label': `arena of ${entry.name}: ${bytes(this.a.total)}, most alive ${bytes(this.a.peak)}` });
    this.pointer();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.savedOf = this.matchSaved();
  }

  /** Kept values by rectangle: the plan's list says why. It names them as buffers do, by module and operator. */
  matchSaved() {
    const free = this.data.plan.saved.map((s) => ({ ...s, bytes: s.unit_bytes * (this.data.symbols[s.symbol] || 1) })), out = new Map();
    const clean = (s) => s.split(' [')[0], module = (s) => clean(s.name.replace(/ \S+$/, ''));
    // a launch that makes several values bears the name of one: then the module around has to do
    const around = (a, b) => { const [x, y] = [a.split('.'), b.split('.')]; let n = 0; while (n < x.length && x[n] === y[n]) n++; return n >= Math.min(3, x.length, y.length); };
    const place = (from) => clean(from).replace(/ \S+$/, '');
    for (const fits of [(s, from) => s.name === from, (s, from) => module(s) === place(from), (s, from) => around(module(s), place(from))]) {
      for (let k = 0; k < this.a.buffer.length; k++) {
        if (this.a.kind[k] !== 'kept' || out.has(k)) continue;
        const size = this.entry.buffers.bytes[this.a.buffer[k]], at = free.findIndex((s) => !s.taken && s.bytes === size && fits(s, this.owner(k)));
        if (at >= 0) { free[at].taken = true; out.set(k, free[at]); }
      }
    }
    return out;
  }

  owner(k) { return this.data.strings[this.entry.buffers.from[this.a.buffer[k]]]; }

  step(i) {
    const s = this.entry.steps;
    return i === null || i === undefined ? 'given' : `${i}: ${this.data.strings[s.from[i]] || '–'} (${this.data.kernels[s.kernel[i]].name})`;
  }

  facts(k) {
    const [w, readers] = this.a.uses[k], s = this.savedOf.get(k), kind = this.a.kind[k], rows = [
      ['tensor', this.owner(k) || `buffer ${this.a.buffer[k]}`], ['kind', LIFE[kind]], ['bytes', `${bytes(this.a.size[k])} at ${this.a.at[k].toLocaleString('en')}`],
      ['written', `step ${this.step(w)}`], ['read', readers.length ? `${readers.length}×, last by step ${this.step(readers.at(-1))}` : 'by nobody'],
      ['alive', `waves ${this.a.first[k]}–${this.a.last[k] - 1} of ${this.waves}`]];
    if (kind === 'kept') {
      rows.push(['why kept', s ? s.reason : `the backward half reads it: step ${this.step(readers.at(-1))}`]);
      rows.push(['to drop it', s ? dropText({ only: s.trained_only, us: s.rebuild_us }) : 'a smaller --budget builds it again where it can']);
    } else if (kind === 'rebuilt') rows.push(['why', 'a forward value that was dropped to save memory, built again for the gradients that read it']);
    else if (kind === 'output') rows.push(['why kept', 'returned to the caller: lives until the entry ends']);
    return rows;
  }

  x(t) { return LEFT + ((t - this.range[0]) / (this.range[1] - this.range[0])) * (this.w - LEFT - 8); }
  y(b) { return this.h - FOOT - (b / this.top) * (this.h - FOOT - CURVE - 16); }

  draw() {
    if (this.waiting || !this.canvas.isConnected) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.paint(); });
  }

  paint() {
    this.w = this.canvas.clientWidth;
    this.h = this.canvas.clientHeight;
    if (!this.w || !this.h) return;
    const c = fitCanvas(this.canvas), p = this.app.palette, a = this.a;
    this.top = this.scale || a.total || 1;
    c.fillStyle = p.panel;
    c.fillRect(0, 0, this.w, this.h);
    const fill = Object.fromEntries(Object.keys(LIFE).map((k) => [k, colour(`--m-${k}`)])), faint = Object.fromEntries(Object.keys(LIFE).map((k) => [k, blend(fill[k], p.panel, 0.72)]));
    c.save();
    c.beginPath();
    c.rect(LEFT, 0, this.w - LEFT - 8, this.h);
    c.clip();
    for (let k = 0; k < a.size.length; k++) {
      if (this.hidden.has(a.kind[k]) || a.last[k] < this.range[0] || a.first[k] > this.range[1]) continue;
      const x = this.x(a.first[k]), y = this.y(a.at[k] + a.size[k]), w = Math.max(0.7, this.x(a.last[k]) - x), h = Math.max(0.7, this.y(a.at[k]) - y);
      c.fillStyle = k === this.picked || k === this.over ? fill[a.kind[k]] : faint[a.kind[k]];
      c.fillRect(x, y, w, h);
      if (w > 4 && h > 3) { c.strokeStyle = p.panel; c.lineWidth = 0.7; c.strokeRect(x, y, w, h); }
      if (w > 70 && h > 13) {
        c.fillStyle = p.text;
        c.font = '10.5px system-ui, sans-serif';
        c.textBaseline = 'middle';
        c.fillText(clip(c, this.owner(k).split('.').slice(-2).join('.'), w - 8), Math.max(x, LEFT) + 4, y + h / 2);
      }
      if (k === this.picked) { c.strokeStyle = p.text; c.lineWidth = 1.5; c.strokeRect(x, y, w, h); }
    }
    this.curve(c, p);
    c.restore();
    this.axes(c, p);
  }

  curve(c, p) {
    const most = this.scale || this.a.total || 1, y = (v) => CURVE - (v / most) * (CURVE - 16);
    c.beginPath();
    c.moveTo(this.x(0), y(0));
    for (let t = 0; t < this.waves; t++) { c.lineTo(this.x(t), y(this.live[t])); c.lineTo(this.x(t + 1), y(this.live[t])); }
    c.lineTo(this.x(this.waves), y(0));
    c.fillStyle = blend(p.accent, p.panel, 0.22);
    c.fill();
    c.strokeStyle = p.accent;
    c.lineWidth = 1.3;
    c.stroke();
    const px = this.x(this.peakAt + 0.5), py = y(this.live[this.peakAt]);
    c.strokeStyle = c.fillStyle = p.heat;
    c.setLineDash([3, 3]);
    c.beginPath(); c.moveTo(px, py); c.lineTo(px, this.h - FOOT); c.stroke();
    c.setLineDash([]);
    c.beginPath(); c.arc(px, py, 3.5, 0, 7); c.fill();
    c.font = '600 11px system-ui, sans-serif';
    c.textBaseline = 'middle';
    c.textAlign = px > this.w - 190 ? 'right' : 'left';
    c.fillText(`peak ${bytes(this.live[this.peakAt])}`, px + (c.textAlign === 'right' ? -8 : 8), Math.max(8, py));
    c.textAlign = 'left';
  }

  axes(c, p) {
    c.strokeStyle = p.line;
    c.fillStyle = p.muted;
    c.font = '10.5px system-ui, sans-serif';
    c.textBaseline = 'middle';
    c.textAlign = 'right';
    c.lineWidth = 1;
    for (let k = 0; k <= 4; k++) {
      const b = (this.top * k) / 4, y = this.y(b);
      c.fillText(bytes(b), LEFT - 6, y);
      c.beginPath(); c.moveTo(LEFT - 3, y); c.lineTo(LEFT, y); c.stroke();
    }
    c.fillText('live', LEFT - 6, CURVE - 30);
    c.beginPath(); c.moveTo(LEFT, 6); c.lineTo(LEFT, this.h - FOOT); c.lineTo(this.w - 8, this.h - FOOT); c.moveTo(LEFT, CURVE); c.lineTo(this.w - 8, CURVE); c.stroke();
    c.textAlign = 'center';
    const [lo, hi] = this.range, every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((s) => (hi - lo) / s <= 8) || 20000;
    c.textAlign = 'right';
    const note = 'launches in order', end = this.w - 10, free = end - c.measureText(note).width - 24;
    c.fillText(note, end, this.h - FOOT / 2);
    c.textAlign = 'center';
    for (let t = Math.ceil(lo / every) * every; t <= hi; t += every) if (this.x(t) < free) c.fillText(String(t), this.x(t), this.h - FOOT / 2);
    c.textAlign = 'left';
  }

  at(e) {
    const r = this.canvas.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top;
    if (x < LEFT) return -1;
    if (y < CURVE) return -1;
    const t = this.range[0] + ((x - LEFT) / (this.w - LEFT - 8)) * (this.range[1] - this.range[0]), b = ((this.h - FOOT - y) / (this.h - FOOT - CURVE - 16)) * this.top, a = this.a;
    let best = -1, near = 0.004 * this.top;
    for (let k = 0; k < a.size.length; k++) {
      if (this.hidden.has(a.kind[k]) || t < a.first[k] || t >= a.last[k]) continue;
      if (b >= a.at[k] && b < a.at[k] + a.size[k]) return k;
      const d = Math.min(Math.abs(b - a.at[k]), Math.abs(b - a.at[k] - a.size[k]));
      if (d < near) { near = d; best = k; }
    }
    return best;
  }

  pointer() {
    const c = this.canvas;
    let drag = null;
    c.addEventListener('pointerdown', (e) => { drag = { x: e.clientX, range: this.range.slice(), moved: false }; c.setPointerCapture(e.pointerId); });
    c.addEventListener('pointermove', (e) => {
      if (drag) {
        const d = ((drag.x - e.clientX) / (this.w - LEFT - 8)) * (drag.range[1] - drag.range[0]);
        if (Math.abs(e.clientX - drag.x) > 3) drag.moved = true;
        if (drag.moved) this.setRange(drag.range[0] + d, drag.range[1] + d);
        return;
      }
      const k = this.at(e);
      if (k !== this.over) { this.over = k; this.draw(); }
      if (k < 0) { tip.hide(); return; }
      tip.show(e.clientX, e.clientY, this.facts(k).map(([n, v]) => el('div', {}, el('b', { text: `${n} ` }), String(v))));
    });
    c.addEventListener('pointerup', (e) => { const moved = drag?.moved; drag = null; if (!moved) { this.picked = this.at(e); this.onpick(this, this.picked); this.draw(); } });
    c.addEventListener('pointerleave', () => { this.over = -1; tip.hide(); this.draw(); });
    c.addEventListener('wheel', (e) => {
      e.preventDefault();
      const r = c.getBoundingClientRect(), f = (e.clientX - r.left - LEFT) / (this.w - LEFT - 8), [lo, hi] = this.range, at = lo + f * (hi - lo), k = Math.exp(clamp(e.deltaY, -200, 200) * 0.002);
      const span = clamp((hi - lo) * k, 4, this.waves);
      this.setRange(at - f * span, at + (1 - f) * span);
    }, { passive: false });
    c.addEventListener('dblclick', () => this.setRange(0, this.waves));
  }

  setRange(lo, hi) {
    const span = hi - lo, a = clamp(lo, 0, Math.max(0, this.waves - span));
    this.range = [a, Math.min(this.waves, a + span)];
    this.draw();
  }
}
