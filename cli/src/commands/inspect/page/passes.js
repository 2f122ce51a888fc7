// The tab "Passes": what each pass did to the graph, which rules fired where, and how long everything took.

class PassesView {
  constructor(box, app) {
    this.app = app;
    this.list = el('nav', { class: 'passes', 'aria-label': 'Passes' });
    this.body = el('div', { class: 'pass' });
    clear(box).append(el('div', { class: 'split wide' }, this.list, this.body));
  }

  setData(data) {
    this.data = data;
    clear(this.list);
    clear(this.body);
    if (!data.passes.length) {
      this.body.append(el('p', { class: 'empty', text: 'A plan file holds no passes: give inspect the model folder to see them.' }));
      return;
    }
    const most = Math.max(...data.passes.map((p) => p.ms)), total = data.passes.reduce((s, p) => s + p.ms, 0);
    this.buttons = data.passes.map((p, i) => el('button', { type: 'button', class: p.changed === false ? 'same' : '', onclick: () => this.show(i) },
      el('span', { class: 'no', text: p.lowering ? '' : String(i + 1) }), el('b', { text: p.name }),
      el('span', { class: 'nodes', text: p.before !== null && p.before !== undefined ? `${count(p.before)} → ${count(p.after)}` : p.after ? count(p.after) : '' }),
      el('span', { class: 'ms' }, el('i', { style: `width:${Math.max(1, (100 * p.ms) / most)}%` })), el('span', { class: 'num', text: `${p.ms < 10 ? p.ms.toFixed(1) : p.ms.toFixed(0)} ms` })));
    this.list.append(...this.buttons, el('div', { class: 'total', text: `${total.toFixed(0)} ms in all` }));
    const first = data.passes.findIndex((p) => p.forms && p.forms.length);
    this.show(first >= 0 ? first : 0);
  }

  show(i) {
    const p = this.data.passes[i];
    this.current = i;
    this.buttons.forEach((b, k) => b.setAttribute('aria-current', String(k === i)));
    clear(this.body).append(
      el('header', {}, el('h2', { text: p.name }), p.changed === false ? el('span', { class: 'pill dim', text: 'changed nothing' }) : null),
      el('p', { class: 'muted', text: p.note || '' }));
    if (p.rules && p.rules.length) this.body.append(this.rules(p));
    if (p.forms && p.forms.length) this.body.append(this.forms(p));
    if (!p.lowering && p.changed !== false) this.body.append(this.diff(i));
    this.body.scrollTop = 0;
  }

  rules(p) {
    const rows = p.rules.slice().sort((a, b) => b[2] - a[2] || b[1] - a[1]).map(([r, fired, chosen]) => el('tr', { 'data-rule': this.data.rules[r][0], class: chosen ? 'used' : '' },
      el('td', { class: 'num', text: String(r + 1) }), el('td', {}, el('b', { text: this.data.rules[r][0] })), el('td', { text: this.data.rules[r][1] }),
      el('td', { class: 'num', text: count(fired) }), el('td', { class: 'num', text: count(chosen) })));
    return el('section', {}, el('h3', { text: 'Rules' }), el('table', { class: 'rules' },
      el('thead', {}, el('tr', {}, ['', 'rule', 'says', 'equalities found', 'nodes chosen'].map((t, k) => el('th', { text: t, class: k > 2 || !k ? 'num' : '' })))), el('tbody', {}, rows)));
  }

  /** Regions that were rewritten: each distinct one with where it stands. */
  forms(p) {
    const cards = p.forms.map((f) => {
      const made = [...new Set(f.after.map((s) => s[4]).filter((r) => r !== null))].sort((a, b) => a - b);
      const groups = new Map();
      for (const [entry, module] of f.sites) {
        const key = `${module.replace(/\.\d+(?=\.|$)/g, '.*') || 'whole entry'} in ${entry}`;
        groups.set(key, (groups.get(key) || 0) + 1);
      }
      const where = [...groups].map(([k, n]) => (n > 1 ? `${k} ×${n}` : k)).join(', ');
      const body = el('div', { class: 'sketches' });
      const card = el('details', { class: 'form' }, el('summary', {}, el('b', { text: where }),
        el('span', { class: 'pill', text: `by rule${made.length > 1 ? 's' : ''} ${made.map((r) => r + 1).join(', ')}` }),
        el('span', { class: 'muted', text: ` ${f.before.length} → ${f.after.length} nodes, ${f.cost[0].toFixed(1)} → ${f.cost[1].toFixed(1)} µs by the cost model` })), body);
      card.addEventListener('toggle', () => {
        if (!card.open || body.childElementCount) return;
        const names = made.map((r) => el('li', { value: r + 1 }, el('b', { text: this.data.rules[r][0] }), ` ${this.data.rules[r][1]}`));
        body.append(this.pair(f), el('ol', { class: 'made' }, names));
      });
      return card;
    });
    if (cards.length) cards[0].open = true;
    return el('section', {}, el('h3', { text: `Rewritten regions (${p.forms.length} distinct, ${count(p.forms.reduce((n, f) => n + f.sites.length, 0))} sites)` }), ...cards);
  }

  /** Before and after, at first only what was touched and its neighbours. */
  pair(f) {
    const box = el('div', { class: 'pair' }), sides = [['before', f.before, f.after, 0], ['after', f.after, f.before, 1]];
    const draw = (all) => clear(box).append(...sides.map(([name, mine, other, k]) => {
      const outputs = f.outputs.map((o) => o[k]), { keep, own } = touched(mine, other), part = all || keep.size < 2 ? null : partOf(mine, outputs, keep);
      const gone = k ? new Set() : new Set([...own].map((v) => (part ? part.order.indexOf(v) : v)));
      return el('figure', {}, el('figcaption', {}, `${name}: ${part ? `${keep.size} of ` : ''}${mine.length} nodes `,
        k && keep.size < mine.length ? el('button', { type: 'button', class: 'link', text: all ? 'only what was touched' : 'show all', onclick: () => draw(!all) }) : null),
      el('div', { class: 'scroll-x' }, part ? sketch(part.steps, part.outputs, gone) : sketch(mine, outputs, gone)));
    }));
    draw(false);
    return box;
  }

  diff(i) {
    const at = this.data.graphs.findIndex((g) => g.pass === i), before = this.data.graphs[at - 1], after = this.data.graphs[at];
    const names = [...new Set([...after.entries, ...before.entries].map((e) => e.name))];
    const of = (g, n) => g.entries.find((e) => e.name === n), changed = names.filter((n) => of(before, n) !== of(after, n));
    const box = el('div', { class: 'diff' }), note = el('span', { class: 'muted' });
    const pick = el('select', { 'aria-label': 'Entry of the diff', onchange: () => draw() }, changed.map((n) => el('option', { value: n, text: `${n}  ${of(before, n)?.n ?? 0} → ${of(after, n)?.n ?? 0}` })));
    const draw = () => {
      const d = showDiff(box, entryLines(of(before, pick.value)), entryLines(of(after, pick.value)));
      note.textContent = d.added + d.gone ? '' : 'only numbers of values moved';
    };
    const part = el('section', { class: 'grow' }, el('h3', { text: 'Diff' }), el('div', { class: 'row' }, el('label', {}, 'Entry', pick), note), box);
    // the box has a height only once it is in the page
    requestAnimationFrame(draw);
    return part;
  }

  goRule(name) {
    const i = this.data.passes.findIndex((p) => (p.rules || []).some(([r]) => this.data.rules[r][0] === name));
    if (i >= 0) this.show(i);
    const row = this.body.querySelector(`[data-rule="${name}"]`);
    if (row) { row.classList.add('flash'); row.scrollIntoView({ block: 'center' }); }
  }
}
