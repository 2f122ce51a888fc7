// Layered drawing (after Sugiyama) of one box: circles broken, layers by longest way, crossings reduced by medians, columns
// straightened by least squares with the order kept. Everything is bounded, so a box of tens of thousands of nodes lays out too.

const GAP_X = 18, GAP_Y = 30;

/** `size[i] = [w, h]`, `edges = [[from, to], …]`. Gives positions of the upper left corners, the extent, and for every edge its
 *  bends from the first to the last. */
function layered(size, edges) {
  const n = size.length;
  if (n === 0) return { x: [], y: [], w: 0, h: 0, bends: [], back: [] };
  const out = Array.from({ length: n }, () => []);
  edges.forEach(([a, b], k) => out[a].push([b, k]));
  const back = new Uint8Array(edges.length);
  breakCircles(n, out, back);
  const layer = wrap(layersOf(n, edges, back), size);
  // long edges get a stop in every layer they cross, as long as there are not too many
  const depth = Math.max(...layer) + 1;
  const span = edges.map(([a, b], k) => { const [lo, hi] = back[k] ? [layer[b], layer[a]] : [layer[a], layer[b]]; return hi - lo; });
  const stops = span.reduce((t, s) => t + Math.max(0, s - 1), 0);
  const longest = stops > 6 * n + 4000 ? 8 : Infinity;
  const at = [], layers = Array.from({ length: depth }, () => []), width = [], down = [], up = [], chain = edges.map(() => []);
  const node = (l, w) => { const v = at.length; at.push(l); width.push(w); down.push([]); up.push([]); layers[l].push(v); return v; };
  for (let i = 0; i < n; i++) { at.push(layer[i]); width.push(size[i][0]); down.push([]); up.push([]); }
  const order = Array.from({ length: n }, (_, i) => i);
  order.forEach((i) => layers[layer[i]].push(i));
  edges.forEach(([a, b], k) => {
    if (a === b || span[k] > longest) return;
    const [top, bottom] = back[k] ? [b, a] : [a, b];
    let from = top;
    for (let l = layer[top] + 1; l < layer[bottom]; l++) {
      const d = node(l, 6);
      chain[k].push(d);
      down[from].push(d); up[d].push(from);
      from = d;
    }
    down[from].push(bottom); up[bottom].push(from);
  });
  const pos = orderLayers(layers, up, down, at.length);
  const x = columns(layers, pos, up, down, width, n);
  const height = layers.map((l) => l.reduce((h, v) => Math.max(h, v < n ? size[v][1] : 0), 0));
  const y = [];
  let total = 0;
  for (let l = 0; l < depth; l++) {
    y.push(total);
    const busy = layers[l].length > 40 ? Math.min(90, layers[l].length / 2) : 0;
    total += height[l] + (l + 1 < depth ? GAP_Y + busy : 0);
  }
  let left = Infinity, right = -Infinity;
  for (let v = 0; v < at.length; v++) { left = Math.min(left, x[v] - width[v] / 2); right = Math.max(right, x[v] + width[v] / 2); }
  const bends = edges.map((e, k) => chain[k].flatMap((d) => [[x[d] - left, y[at[d]]], [x[d] - left, y[at[d]] + height[at[d]]]]));
  return {
    x: size.map((s, i) => x[i] - s[0] / 2 - left),
    y: size.map((s, i) => y[layer[i]] + (height[layer[i]] - s[1]) / 2),
    w: right - left, h: total, bends, back, layer,
  };
}

/** Marks the edges of a depth-first walk that close a circle. */
function breakCircles(n, out, back) {
  const state = new Uint8Array(n), next = new Uint32Array(n);
  for (let r = 0; r < n; r++) {
    if (state[r]) continue;
    const stack = [r];
    state[r] = 1;
    while (stack.length) {
      const v = stack.at(-1);
      if (next[v] < out[v].length) {
        const [w, k] = out[v][next[v]++];
        if (state[w] === 1) back[k] = 1;
        else if (!state[w]) { state[w] = 1; stack.push(w); }
      } else { state[v] = 2; stack.pop(); }
    }
  }
}

/** The layer of each node: one below the lowest of those it reads; sources come as late as they may. */
function layersOf(n, edges, back) {
  const out = Array.from({ length: n }, () => []), waits = new Uint32Array(n);
  edges.forEach(([a, b], k) => {
    if (a === b) return;
    const [s, t] = back[k] ? [b, a] : [a, b];
    out[s].push(t);
    waits[t]++;
  });
  const sources = [], layer = new Uint32Array(n), queue = [];
  for (let i = 0; i < n; i++) if (!waits[i]) { queue.push(i); sources.push(i); }
  for (let q = 0; q < queue.length; q++) {
    const v = queue[q];
    for (const w of out[v]) {
      layer[w] = Math.max(layer[w], layer[v] + 1);
      if (--waits[w] === 0) queue.push(w);
    }
  }
  for (const v of sources) if (out[v].length) layer[v] = Math.min(...out[v].map((w) => layer[w])) - 1;
  return layer;
}

/** A layer that is much wider than the whole is high becomes several rows: nothing in it depends on anything else in it. */
function wrap(layer, size) {
  const area = size.reduce((s, [w, h]) => s + (w + GAP_X) * (h + GAP_Y), 0), most = Math.max(2400, 1.5 * Math.sqrt(area));
  const depth = layer.reduce((m, l) => Math.max(m, l), 0) + 1, rows = Array.from({ length: depth }, () => ({ width: 0, more: 0 }));
  const row = new Uint32Array(layer.length);
  for (let i = 0; i < layer.length; i++) {
    const r = rows[layer[i]];
    if (r.width && r.width + size[i][0] > most) { r.width = 0; r.more++; }
    r.width += size[i][0] + GAP_X;
    row[i] = r.more;
  }
  const first = [0];
  for (let l = 0; l < depth; l++) first.push(first[l] + rows[l].more + 1);
  return layer.map((l, i) => first[l] + row[i]);
}

/** Order inside the layers by medians of neighbours, downwards and upwards; gives the place of every node. */
function orderLayers(layers, up, down, n) {
  const pos = new Float64Array(n);
  const place = (l) => l.forEach((v, i) => { pos[v] = i; });
  layers.forEach(place);
  const sweeps = n > 20000 ? 2 : n > 4000 ? 4 : 10;
  let best = layers.map((l) => l.slice()), least = n < 3000 ? crossings(layers, down, pos) : Infinity;
  for (let s = 0; s < sweeps && least > 0; s++) {
    const downwards = s % 2 === 0, near = downwards ? up : down;
    for (let k = 1; k < layers.length; k++) {
      const l = layers[downwards ? k : layers.length - 1 - k];
      if (l.length < 2) continue;
      const key = new Map(l.map((v) => [v, near[v].length ? near[v].reduce((t, u) => t + pos[u], 0) / near[v].length : pos[v]]));
      l.sort((a, b) => key.get(a) - key.get(b) || pos[a] - pos[b]);
      place(l);
    }
    if (n < 3000) {
      const c = crossings(layers, down, pos);
      if (c < least) { least = c; best = layers.map((l) => l.slice()); }
    } else best = layers;
  }
  best.forEach((l, k) => { layers[k] = l; place(l); });
  return pos;
}

/** Crossings between neighbouring layers, counted by a tree of places. */
function crossings(layers, down, pos) {
  let total = 0;
  for (let k = 0; k + 1 < layers.length; k++) {
    const m = layers[k + 1].length, tree = new Int32Array(m + 1);
    let seen = 0;
    for (const v of layers[k]) {
      const ends = down[v].map((w) => pos[w]).sort((a, b) => a - b);
      for (const p of ends) {
        let before = 0;
        for (let i = p + 1; i > 0; i -= i & -i) before += tree[i];
        total += seen - before;
      }
      for (const p of ends) { for (let i = p + 1; i <= m; i += i & -i) tree[i]++; seen++; }
    }
  }
  return total;
}

/** Centres of all nodes: each layer takes the places its neighbours ask for, as near as order and widths allow. */
function columns(layers, pos, up, down, width, real) {
  const x = new Float64Array(width.length);
  for (const l of layers) {
    let at = 0;
    for (const v of l) { x[v] = at + width[v] / 2; at += width[v] + GAP_X; }
    for (const v of l) x[v] -= (at - GAP_X) / 2;
  }
  const rounds = width.length > 20000 ? 4 : 12;
  for (let r = 0; r < rounds; r++) {
    const downwards = r % 2 === 0;
    for (let k = 0; k < layers.length; k++) {
      const l = layers[downwards ? k : layers.length - 1 - k];
      const both = r >= rounds - 2;
      const want = l.map((v) => {
        const near = both ? [...up[v], ...down[v]] : downwards ? up[v] : down[v];
        return near.length ? near.reduce((t, u) => t + x[u], 0) / near.length : x[v];
      });
      const weight = l.map((v) => (v >= real ? 4 : 1) * ((downwards ? up[v] : down[v]).length ? 1 : 0.05));
      settle(l, want, weight, width, x);
    }
  }
  return x;
}

/** Least squares with order and gaps kept: neighbours that would overlap move as one block. */
function settle(l, want, weight, width, x) {
  const offset = new Float64Array(l.length);
  for (let i = 1; i < l.length; i++) offset[i] = offset[i - 1] + (width[l[i - 1]] + width[l[i]]) / 2 + (width[l[i]] <= 6 || width[l[i - 1]] <= 6 ? 8 : GAP_X);
  const blocks = [];
  for (let i = 0; i < l.length; i++) {
    let b = { sum: (want[i] - offset[i]) * weight[i], weight: weight[i], n: 1 };
    while (blocks.length && blocks.at(-1).sum / blocks.at(-1).weight >= b.sum / b.weight) {
      const a = blocks.pop();
      b = { sum: a.sum + b.sum, weight: a.weight + b.weight, n: a.n + b.n };
    }
    blocks.push(b);
  }
  let i = 0;
  for (const b of blocks) for (let k = 0; k < b.n; k++, i++) x[l[i]] = b.sum / b.weight + offset[i];
}
