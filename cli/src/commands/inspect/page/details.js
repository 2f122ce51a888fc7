// The panel beside the graph: everything known of what was chosen.

function details(view, item) {
  const box = clear(view.details);
  if (!item) { overview(view, box); return; }
  if (item.kind === 'node') nodeDetails(view, box, item.i); else boxDetails(view, box, item.box);
  box.scrollTop = 0;
}

function facts(rows) {
  return el('dl', {}, rows.filter((r) => r && r[1] !== '' && r[1] !== null && r[1] !== undefined).flatMap(([k, v]) => [el('dt', { text: k }), el('dd', {}, v)]));
}

const section = (title, ...body) => el('section', {}, el('h3', { text: title }), ...body);

/** A link to a node of the same entry. */
function nodeLink(view, i) {
  const e = view.entry, p = e.param(i);
  return el('button', { type: 'button', class: 'link', onclick: () => (view.tree.hidden(i) ? nodeDetails(view, clear(view.details), i) : view.reveal(i)) },
    el('span', { class: `dot k-${category(baseOp(e, i))}` }), el('span', { class: 'mono', text: `%${i}` }), ' ', el('b', { text: p >= 0 ? e.params[p].name : e.opName(i) }),
    el('span', { class: 'mono muted', text: ` ${e.type(i)}` }));
}

function linkList(view, list) {
  const shown = list.slice(0, 60).map((i) => nodeLink(view, i));
  if (list.length > 60) shown.push(el('div', { class: 'muted', text: `… ${list.length - 60} more` }));
  return el('div', { class: 'links' }, shown);
}

function nodeDetails(view, box, i) {
  const { data, entry: e, tree } = view, stage = data.graphs[view.stage], p = e.param(i), param = p >= 0 ? e.params[p] : null;
  const saved = data.saved(stage, e).get(i), rule = e.rule(i), part = tree.both ? PARTS[tree.part[i]] : '';
  const kernel = e.kernelOf ? e.kernelOf(i) : -1, k = kernel >= 0 ? data.kernels[kernel] : null;
  const time = e.step ? data.profile?.by.get(e.name)?.steps.get(e.step[i]) : null;
  const shape = /\[(.*)\]/.exec(e.type(i))?.[1];
  box.append(
    el('header', {}, el('span', { class: `dot k-${category(baseOp(e, i))}` }), el('h2', { text: param ? param.name : e.opName(i) }), el('span', { class: 'mono muted', text: `%${i}` })),
    facts([
      ['type', el('code', { text: e.type(i) })],
      ['dtype', e.kernelOf ? '' : e.type(i).split('[')[0]],
      ['shape', e.kernelOf || shape === undefined ? '' : shape ? `${shape.split(',').join(' × ')}  (${count(data.elements(e.type(i)))} values)` : 'scalar'],
      ['attributes', e.attrs(i) && p < 0 ? el('code', { text: e.attrs(i) }) : ''],
      ['role', param && param.role], ['source', param && param.source], ['stays', param && param.stays],
      ['bytes', bytes(param ? param.bytes : data.nodeBytes(e, i)) + (!param && VIEWS.has(e.opName(i)) ? ' (a view)' : '')],
      ['FLOPs', e.flops[i] ? count(e.flops[i]) : ''],
      ['time', time ? `${duration(time.ns / time.calls)} a launch, ${count(time.calls)} launches, ${duration(time.ns)} in all` : ''],
      ['origin', e.module(i)], ['part', part],
      ['made by', rule ? el('button', { type: 'button', class: 'link', onclick: () => view.app.goRule(rule) }, `rule ${ruleNumber(data, rule)} · ${rule}`) : ''],
      ['kernel', k ? el('button', { type: 'button', class: 'link', onclick: () => view.app.goKernel(kernel) }, k.name) : ''],
    ]));
  if (saved) box.append(section('Kept for backward', facts([['bytes', bytes(saved.bytes)], ['why', saved.reason], ['to drop it', dropText(saved)]])));
  const ins = Array.from(e.inputs(i)), outs = e.users()[i], roots = e.roots.filter(([v]) => v === i);
  if (ins.length) box.append(section(`Inputs (${ins.length})`, linkList(view, ins)));
  if (outs.length) box.append(section(`Users (${outs.length})`, linkList(view, outs)));
  if (roots.length) box.append(section('Result', ...roots.map(([, r]) => el('div', { text: typeof r === 'string' ? `output “${r}”` : `assigned to ${e.params[r]?.name ?? '@' + r}` }))));
  if (!e.kernelOf) box.append(section('Text', el('pre', { class: 'line', text: e.line(i) })));
}

/** What would let a kept value go. */
function dropText(s) {
  const ways = [];
  if (s.only) ways.push('only gradients of trained weights read it: train other sites, or fewer columns');
  if (Number.isFinite(s.us) && s.us > 0) ways.push(`building it again costs about ${s.us >= 1000 ? (s.us / 1000).toFixed(1) + ' ms' : s.us.toFixed(1) + ' µs'}: a smaller --budget does that`);
  return ways.join('; or ') || 'nothing: it cannot be built again';
}

const ruleNumber = (data, name) => data.rules.findIndex((r) => r[0] === name) + 1;

function boxDetails(view, box, b) {
  const { data, entry: e, tree } = view, stage = data.graphs[view.stage], nodes = [...b.nodes()], inside = new Set(nodes);
  const ops = new Map(), params = new Map(), from = new Map(), to = new Map();
  let flops = 0, size = 0;
  for (const i of nodes) {
    ops.set(e.opName(i), (ops.get(e.opName(i)) || 0) + 1);
    flops += e.flops[i];
    size += data.nodeBytes(e, i);
    for (const u of e.inputs(i)) {
      const p = e.param(u);
      if (p >= 0) params.set(p, e.params[p]);
      else if (!inside.has(u) && !tree.hidden(u)) from.set(u, true);
    }
    for (const w of e.users()[i]) if (!inside.has(w)) to.set(i, true);
  }
  const list = [...params.values()], sum = (f) => list.filter(f).reduce((s, p) => s + p.bytes, 0), saved = data.saved(stage, e);
  const kept = nodes.filter((i) => saved.has(i));
  const time = data.profile?.by.has(e.name) ? new Metrics(data, stage, tree, 'time').sum(b) : null;
  const stack = b.kind === 'stack' ? b : b.stack;
  box.append(
    el('header', {}, el('h2', { text: b.kind === 'stack' ? b.name : b.path.slice(1).replaceAll('/', '.') }), b.kind === 'stack' ? el('span', { class: 'pill', text: `×${b.members.length}` }) : null),
    el('div', { class: 'row' },
      el('button', { type: 'button', text: b.open ? 'Close' : 'Open', onclick: () => { view.toggle(b); details(view, view.selected); } }),
      stack ? el('button', { type: 'button', text: b.kind === 'stack' ? `Show all ${stack.members.length} apart` : 'Fold equal layers', onclick: () => view.spread(b) }) : null),
    stack ? el('p', { class: 'muted', text: `${stack.members.length} layers compute the same: operators, types, roles and edges are equal.` }) : null,
    facts([
      ['nodes', count(nodes.length)], ['FLOPs', count(flops)], ['results', bytes(size)],
      ['time', time ? `${duration(time)}, ${percent(time / data.profile.by.get(e.name).total)} of the entry` : ''],
      ['parameters', list.length ? `${count(list.length)}, ${bytes(sum(() => true))}` : ''],
      ['trained', sum((p) => p.role === 'train') ? bytes(sum((p) => p.role === 'train')) : ''],
      ['kept', kept.length ? `${kept.length} values, ${bytes(kept.reduce((s, i) => s + saved.get(i).bytes, 0))}` : ''],
    ]),
    section('Operators', el('div', { class: 'bars' }, [...ops].sort((a, c) => c[1] - a[1]).map(([name, n]) => el('div', { class: 'bar-row' },
      el('span', { text: name }), el('span', { class: 'track' }, el('i', { style: `width:${(100 * n) / Math.max(...ops.values())}%`, class: `k-${category(name)}` })), el('span', { class: 'num', text: String(n) }))))));
  if (list.length) {
    box.append(section(`Parameters (${list.length})`, el('table', {}, list.slice(0, 80).map((p) => el('tr', { class: p.role === 'train' ? 'train' : '' },
      el('td', { text: p.name }), el('td', { class: 'mono', text: p.type }), el('td', { text: p.role }))))));
  }
  if (from.size) box.append(section('Comes in', linkList(view, [...from.keys()])));
  if (to.size) box.append(section('Goes out', linkList(view, [...to.keys()])));
}

/** Nothing chosen: the entry as a whole, and how to get about. */
function overview(view, box) {
  const { data, entry: e } = view, stage = data.graphs[view.stage];
  const trained = stage.params.filter((p) => p.role === 'train'), sum = (l) => l.reduce((s, p) => s + p.bytes, 0);
  const saved = data.saved(stage, e);
  box.append(
    el('header', {}, el('h2', { text: data.title })),
    facts([
      ['stage', stageName(stage.label)], ['entry', e.name], ['nodes', count(e.n)],
      ['FLOPs', count(e.flops.reduce((a, b) => a + b, 0))],
      ['parameters', `${count(stage.params.length)}, ${bytes(sum(stage.params))}`],
      ['trained', trained.length ? `${count(trained.length)}, ${bytes(sum(trained))}` : ''],
      ['kept', saved.size ? `${saved.size} values, ${bytes([...saved.values()].reduce((s, v) => s + v.bytes, 0))}` : ''],
      ['counts', Object.entries(data.symbols).map(([k, v]) => `${k}=${v}`).join('  ')],
      ['target', [data.plan.arch, data.raw.dtype].filter(Boolean).join(', ')],
    ]),
    section('Inputs', el('table', {}, (data.plan.entries.find((p) => p.name === e.name)?.inputs ?? []).map(([n, t]) => el('tr', {}, el('td', { text: n }), el('td', { class: 'mono', text: t }))))),
    section('Getting about', el('table', { class: 'keys' }, [['drag, wheel', 'move, zoom'], ['double-click, ⊞', 'open or close a box'], ['×N', 'show equal layers apart'], ['/', 'search'],
      ['↑ ↓ ← →', 'follow edges'], ['Enter, S', 'open, spread'], ['+ − 0', 'zoom, fit'], ['1 … 5', 'tabs']].map(([k, t]) => el('tr', {}, el('td', {}, el('kbd', { text: k })), el('td', { text: t }))))));
}
