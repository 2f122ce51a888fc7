// Modules as nested boxes: built from the origins of nodes; equal layers in a row are one stack.

let boxes = 0;

class Box {
  constructor(name, parent, path) {
    this.id = boxes++;
    this.kind = 'box';
    this.name = name;
    this.parent = parent;
    this.path = path;
    this.items = [];      // boxes and { kind: 'node', i }, in the order of their first node
    this.open = false;
    this.first = Infinity;
  }
  /** What is drawn inside: stacks that were spread out are replaced by their members. */
  visible() {
    return this.items.flatMap((c) => (c.kind === 'stack' && c.spread ? c.members : [c]));
  }
  count() {
    return this.size ??= this.items.reduce((n, c) => n + (c.kind === 'node' ? 1 : c.count()), 0);
  }
  /** Every node inside. */
  *nodes() {
    for (const c of this.items) if (c.kind === 'node') yield c.i; else yield* c.nodes();
  }
}

/** Equal boxes in a row; closed or open it stands for all, and shows the inside of the first. */
class Stack extends Box {
  constructor(members, parent) {
    const num = (b) => /(\d+)$/.exec(b.name)[1], stem = members[0].name.replace(/\d+$/, '');
    super(`${stem}${num(members[0])}…${num(members.at(-1))}`, parent, members[0].path);
    this.kind = 'stack';
    this.members = members;
    this.spread = false;
    this.first = members[0].first;
  }
  visible() { return this.members[0].visible(); }
  count() { return this.size ??= this.members.reduce((n, b) => n + b.count(), 0); }
  *nodes() { for (const m of this.members) yield* m.nodes(); }
}

/** Module path as levels: a number belongs to the name before it. */
function levels(module) {
  const out = [];
  for (const p of module.split('.')) {
    if (!p) continue;
    if (/^\d+$/.test(p) && out.length) out[out.length - 1] += `.${p}`; else out.push(p);
  }
  return out;
}

class Tree {
  constructor(data, entry, options) {
    this.data = data;
    this.entry = entry;
    this.root = new Box(entry.name, null, '');
    this.root.open = true;
    this.home = new Array(entry.n).fill(null);      // the box of each node
    this.part = entry.parts(data.raw.seed, data.raw.settings);
    this.both = this.part.includes(1) && this.part.includes(0);
    this.hidden = (i) => !options.params && entry.isLeaf(i);
    const byPath = new Map([['', this.root]]);
    for (let i = 0; i < entry.n; i++) {
      if (this.hidden(i)) continue;
      let box = this.root, path = '';
      // a leaf without a module of its own stands with the first that reads it
      const user = entry.isLeaf(i) ? entry.users()[i][0] ?? i : i, reader = entry.module(i) ? i : user;
      const part = this.both ? [PARTS[this.part[reader]]] : [];
      for (const name of [...part, ...levels(entry.module(reader))]) {
        path += `/${name}`;
        let next = byPath.get(path);
        if (!next) {
          next = new Box(name, box, path);
          byPath.set(path, next);
          box.items.push(next);
        }
        next.first = Math.min(next.first, user);
        box = next;
      }
      box.items.push({ kind: 'node', i, first: user, parent: box });
      this.home[i] = box;
    }
    this.tidy(this.root);
    this.root.items.forEach((c) => this.stacks(c));
    this.root.items = this.group(this.root);
    this.openTop();
  }

  /** A box with nothing but one box in it becomes one with that. */
  tidy(box) {
    for (const c of box.items) if (c.kind === 'box') this.tidy(c);
    box.items = box.items.map((c) => {
      if (c.kind !== 'box' || c.items.length !== 1 || c.items[0].kind !== 'box') return c;
      const only = c.items[0];
      only.name = `${c.name}.${only.name}`;
      only.parent = box;
      return only;
    });
    box.items.sort((a, b) => a.first - b.first);
  }

  stacks(box) {
    if (box.kind === 'node') return;
    box.items.forEach((c) => this.stacks(c));
    box.items = this.group(box);
  }

  /** Runs of equal numbered boxes. */
  group(box) {
    const out = [];
    let run = [];
    const flush = () => {
      if (run.length > 1) {
        const s = new Stack(run, box);
        run.forEach((m) => { m.stack = s; });
        out.push(s);
      } else out.push(...run);
      run = [];
    };
    for (const c of box.items) {
      if (c.kind !== 'box' || !/\.\d+$/.test(c.name)) { flush(); out.push(c); continue; }
      if (run.length && (stem(run[0].name) !== stem(c.name) || this.signature(run[0]) !== this.signature(c))) flush();
      run.push(c);
    }
    flush();
    return out;
  }

  /** What a box computes, free of names and numbers. */
  signature(box) {
    if (box.sign !== undefined) return box.sign;
    const e = this.entry, inside = [...box.nodes()].sort((a, b) => a - b), place = new Map(inside.map((v, k) => [v, k]));
    let h = inside.length;
    for (const v of inside) {
      const own = e.param(v);
      h = mix(mix(h, own >= 0 ? hashText(e.params[own].role) : e.op[v] * 4 + 1), e.ty[v]);
      h = mix(h, hashText(this.home[v].path.slice(box.path.length)));
      for (const u of e.inputs(v)) {
        if (place.has(u)) h = mix(h, place.get(u) * 2);
        else {
          const p = e.param(u);
          h = p >= 0 ? mix(mix(h, e.ty[u]), hashText(e.params[p].role)) : mix(h, e.isLeaf(u) ? e.op[u] * 8 + 3 : 1);
        }
      }
    }
    return (box.sign = h);
  }

  /** At first: open whatever stays small. */
  openTop() {
    const open = (box, depth) => {
      for (const c of box.visible()) {
        if (c.kind === 'box' && depth > 0 && c.items.length <= 16) { c.open = true; open(c, depth - 1); }
      }
    };
    open(this.root, 2);
  }

  setAll(open) {
    const walk = (box) => {
      for (const c of box.items) {
        if (c.kind === 'node') continue;
        c.open = open;
        if (c.kind === 'stack') { c.spread = open; c.members.forEach((m) => { m.open = open; walk(m); }); } else walk(c);
      }
    };
    walk(this.root);
    if (!open) this.openTop();
  }

  /** Opens and spreads whatever hides a node. */
  reveal(i) {
    for (let b = this.home[i]; b; b = b.parent) {
      b.open = true;
      if (b.stack) {
        if (b.stack.members[0] === b) { if (!b.stack.spread) b.stack.open = true; } else b.stack.spread = true;
      }
    }
  }

  /** The box of a module path, the deepest there is. */
  find(half, module) {
    let path = half ? `/${half}` : '', best = null;
    const all = (this.paths ??= this.index());
    for (const l of levels(module)) { path += `/${l}`; if (all.has(path)) best = all.get(path); }
    return best;
  }

  index() {
    const map = new Map();
    const walk = (b) => {
      map.set(b.path, b);
      for (const c of b.items) if (c.kind === 'box') walk(c); else if (c.kind === 'stack') c.members.forEach(walk);
    };
    walk(this.root);
    return map;
  }
}

const stem = (name) => name.replace(/\d+$/, '');
