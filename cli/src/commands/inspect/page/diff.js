// Two texts of a graph side by side. Lines are compared by what they compute, not by the numbers of their values.

/** A line as it is compared. */
function diffKey(e, i) {
  const ins = Array.from(e.inputs(i), (u) => (e.param(u) >= 0 ? `@${e.param(u)}` : e.opName(u))).join(',');
  return `${e.opText(i)}|${e.type(i)}|${e.module(i)}|${ins}`;
}

function entryLines(e) {
  if (!e) return { keys: [], text: () => '' };
  const roots = e.rootLines(), keys = [];
  for (let i = 0; i < e.n; i++) keys.push(diffKey(e, i));
  for (const r of roots) keys.push(r.replace(/%\d+/, '%'));
  return { keys, text: (i) => (i < e.n ? e.line(i) : roots[i - e.n]) };
}

/** Pairs `[i, j]` of equal lines, in order: lines that occur once on both sides anchor, what lies between is compared again. */
function matchLines(a, b) {
  const pairs = [];
  const walk = (a0, a1, b0, b1, depth) => {
    while (a0 < a1 && b0 < b1 && a[a0] === b[b0]) pairs.push([a0++, b0++]);
    const tail = [];
    while (a0 < a1 && b0 < b1 && a[a1 - 1] === b[b1 - 1]) tail.push([--a1, --b1]);
    if (a0 < a1 && b0 < b1) {
      const anchors = depth < 40 ? unique(a0, a1, b0, b1) : [];
      if (anchors.length) {
        let [pa, pb] = [a0, b0];
        for (const [i, j] of anchors) { walk(pa, i, pb, j, depth + 1); pairs.push([i, j]); pa = i + 1; pb = j + 1; }
        walk(pa, a1, pb, b1, depth + 1);
      } else if ((a1 - a0) * (b1 - b0) <= 250000) common(a0, a1, b0, b1);
    }
    pairs.push(...tail.reverse());
  };
  const unique = (a0, a1, b0, b1) => {
    const once = (t, lo, hi) => { const m = new Map(); for (let i = lo; i < hi; i++) m.set(t[i], m.has(t[i]) ? -1 : i); return m; };
    const ma = once(a, a0, a1), mb = once(b, b0, b1), list = [];
    for (let i = a0; i < a1; i++) if (ma.get(a[i]) === i && (mb.get(a[i]) ?? -1) >= 0) list.push([i, mb.get(a[i])]);
    return rising(list);
  };
  const common = (a0, a1, b0, b1) => {
    const n = a1 - a0, m = b1 - b0, t = new Uint16Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) t[i * (m + 1) + j] = a[a0 + i] === b[b0 + j] ? t[(i + 1) * (m + 1) + j + 1] + 1 : Math.max(t[(i + 1) * (m + 1) + j], t[i * (m + 1) + j + 1]);
    for (let i = 0, j = 0; i < n && j < m;) {
      if (a[a0 + i] === b[b0 + j]) pairs.push([a0 + i++, b0 + j++]);
      else if (t[(i + 1) * (m + 1) + j] >= t[i * (m + 1) + j + 1]) i++; else j++;
    }
  };
  walk(0, a.length, 0, b.length, 0);
  return pairs;
}

/** The longest part of a list whose second numbers rise. */
function rising(list) {
  const ends = [], before = new Int32Array(list.length).fill(-1);
  for (let k = 0; k < list.length; k++) {
    let lo = 0, hi = ends.length;
    while (lo < hi) { const m = (lo + hi) >> 1; if (list[ends[m]][1] < list[k][1]) lo = m + 1; else hi = m; }
    if (lo) before[k] = ends[lo - 1];
    ends[lo] = k;
  }
  const out = [];
  for (let k = ends.at(-1) ?? -1; k >= 0; k = before[k]) out.push(list[k]);
  return out.reverse();
}

/** Rows `{a, b}` (line numbers or null) of a diff; equal lines far from a change are put together as `{skip, rows}`. */
function diffRows(a, b, around = 3) {
  const pairs = matchLines(a.keys, b.keys), rows = [];
  let i = 0, j = 0, added = 0, gone = 0;
  const gap = (ai, bj) => {
    const n = Math.max(ai - i, bj - j);
    for (let k = 0; k < n; k++) rows.push({ a: i + k < ai ? i + k : null, b: j + k < bj ? j + k : null, change: true });
    gone += ai - i;
    added += bj - j;
    i = ai; j = bj;
  };
  for (const [x, y] of pairs) { gap(x, y); rows.push({ a: i++, b: j++, change: false }); }
  gap(a.keys.length, b.keys.length);
  const near = new Uint8Array(rows.length);
  rows.forEach((r, k) => { if (r.change) for (let d = -around; d <= around; d++) if (near[k + d] === 0) near[k + d] = 1; });
  const out = [];
  for (let k = 0; k < rows.length;) {
    if (near[k]) { out.push(rows[k++]); continue; }
    let e = k;
    while (e < rows.length && !near[e]) e++;
    if (e - k > 4) out.push({ skip: e - k, rows: rows.slice(k, e) }); else out.push(...rows.slice(k, e));
    k = e;
  }
  return { rows: out, added, gone };
}

/** Shows a diff in a box. */
function showDiff(box, a, b) {
  const d = diffRows(a, b), list = el('div', { class: 'diff-list', tabindex: '0', role: 'table', 'aria-label': 'before and after' });
  let rows = d.rows;
  const cell = (side, text, n, cls) => el('div', { class: `cell ${side} ${cls}`, role: 'cell' }, el('span', { class: 'no', text: n === null ? '' : String(n) }), el('span', { class: 'code', text, title: text }));
  const row = (k) => {
    const r = rows[k];
    if (r.skip) return el('button', { type: 'button', class: 'skip', text: `⋯ ${r.skip} equal lines`, onclick: () => { rows = [...rows.slice(0, k), ...r.rows, ...rows.slice(k + 1)]; v.set(rows.length); } });
    return el('div', { class: `diff-row ${r.change ? 'change' : ''}`, role: 'row' },
      cell('left', r.a === null ? '' : a.text(r.a), r.a, r.change ? (r.a === null ? 'none' : 'gone') : ''),
      cell('right', r.b === null ? '' : b.text(r.b), r.b, r.change ? (r.b === null ? 'none' : 'new') : ''));
  };
  const v = virtualList(list, 18, row);
  clear(box).append(el('div', { class: 'diff-head' }, el('b', { text: 'before' }), el('span', {}, el('b', { text: 'after' }), el('span', { class: 'minus', text: ` −${d.gone}` }), el('span', { class: 'plus', text: ` +${d.added}` }))), list);
  v.set(rows.length);
  return d;
}
