// What a pixel sees. Everything is computed here from the queries, keys and embeddings of each layer:
//   logit_t = q[p]·k[p + t] + q[p]·(row[dy] + col[dx]),   weight = softmax over t of logit / temperature.

// ---- numbers ------------------------------------------------------------------------------------------------
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const decoded = new WeakMap();
function numbers(layer) {
  if (!decoded.has(layer)) {
    const floats = (part) => part && new Float32Array(bytes(part.data).buffer);
    decoded.set(layer, {
      q: new Int16Array(bytes(layer.query.data).buffer), k: new Int16Array(bytes(layer.key.data).buffer),
      step: layer.query.step * layer.key.step, qstep: layer.query.step,
      row: floats(layer.row), col: floats(layer.col), table: floats(layer.table),
    });
  }
  return decoded.get(layer);
}

const place = (axis, query, tap) => query * axis.stride + tap * axis.dilation - axis.before;
const centre = (layer, i, query) =>
  place(layer.axes[i], query, Math.floor((layer.axes[i].kernel - 1) / 2)) - layer.offset[i];

// Where every tap of a query's window lies on the layer's map, and whether that is outside the image.
function windowOf(layer, qi, qj) {
  const [rows, cols] = layer.axes, taps = [];
  for (let dy = 0; dy < rows.kernel; dy++) for (let dx = 0; dx < cols.kernel; dx++) {
    const y = place(rows, qi, dy), x = place(cols, qj, dx), my = y - layer.offset[0], mx = x - layer.offset[1];
    const known = y >= 0 && x >= 0 && y < layer.key_size[0] && x < layer.key_size[1];
    const outside = my < 0 || mx < 0 || my >= layer.size[0] || mx >= layer.size[1];
    taps.push({ dy, dx, y: my, x: mx, key: known ? y * layer.key_size[1] + x : -1, outside });
  }
  return taps;
}

// Logits and weights of one query: N * K numbers each, head by head.
function attend(layer, qi, qj, position, temperature) {
  const { q, k, step, qstep, row, col, table } = numbers(layer), N = layer.heads, D = layer.channels;
  const taps = windowOf(layer, qi, qj), K = taps.length, [kh, kw] = layer.axes.map((axis) => axis.kernel);
  const content = new Float64Array(N * K), place = new Float64Array(N * K), weight = new Float64Array(N * K);
  const Dr = row ? layer.row.shape[1] : 0, Dc = col ? layer.col.shape[1] : 0;
  const rows = new Float64Array(kh), cols = new Float64Array(kw);
  for (let n = 0; n < N; n++) {
    const at = ((qi * layer.queries[1] + qj) * N + n) * D;
    rows.fill(0); cols.fill(0);
    if (position) {
      for (let d = 0; d < Dr; d++) for (let t = 0; t < kh; t++) rows[t] += q[at + d] * row[(n * Dr + d) * kh + t];
      for (let d = 0; d < Dc; d++) for (let t = 0; t < kw; t++) cols[t] += q[at + D - Dc + d] * col[(n * Dc + d) * kw + t];
    }
    let most = -Infinity;
    for (let t = 0; t < K; t++) {
      const tap = taps[t], i = n * K + t;
      let sum = 0;
      if (tap.key >= 0) for (let d = 0, b = (tap.key * N + n) * D; d < D; d++) sum += q[at + d] * k[b + d];
      content[i] = sum * step;
      place[i] = (rows[tap.dy] + cols[tap.dx]) * qstep + (position && table ? table[i] : 0);
      weight[i] = layer.border === "mask" && tap.key < 0 ? -Infinity : (content[i] + place[i]) / temperature;
      most = Math.max(most, weight[i]);
    }
    let total = 0;
    for (let i = n * K; i < (n + 1) * K; i++) total += weight[i] = Math.exp(weight[i] - most);
    for (let i = n * K; i < (n + 1) * K; i++) weight[i] /= total;
  }
  return { taps, K, content, position: place, weight };
}

// ---- roll-out: sasa.viz.roll_out, layer by layer down to the pixels ----------------------------------------
let rolled = { key: "", means: new Map() };
function meanWeights(layer) {
  const key = `${state.image} ${state.position} ${state.temperature}`;
  if (rolled.key !== key) rolled = { key, means: new Map() };
  if (!rolled.means.has(layer)) {
    const [h, w] = layer.queries, K = layer.axes[0].kernel * layer.axes[1].kernel, N = layer.heads;
    const mean = new Float32Array(h * w * K);
    for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
      const { weight } = attend(layer, i, j, state.position, state.temperature), at = (i * w + j) * K;
      for (let n = 0; n < N; n++) for (let t = 0; t < K; t++) mean[at + t] += weight[n * K + t] / N;
    }
    rolled.means.set(layer, mean);
  }
  return rolled.means.get(layer);
}
// Pixels of an axis that one place of a map covers: sasa.viz.looking.cell.
function cellSize(size, places) {
  const whole = Math.ceil(size / places);
  if (Math.ceil(size / whole) !== places) return size / places;
  const power = 2 ** Math.ceil(Math.log2(whole));
  return Math.ceil(size / power) === places ? power : whole;
}
const cells = (one) => one.size.map((n, i) => cellSize(image().size[i], n)); // in pixels of the image
function cover(before, after) { // [from, to, share] along an axis
  const many = Math.max(before, after), few = Math.min(before, after), step = cellSize(many, few), count = new Array(few).fill(0);
  const pairs = Array.from({ length: many }, (_, i) => [i, Math.min(Math.floor(i / step), few - 1)]);
  if (after < before) return pairs.map(([i, j]) => [i, j, 1]);
  for (const [, j] of pairs) count[j]++;
  return pairs.map(([i, j]) => [j, i, 1 / count[j]]);
}
function spread(share, [h, w], [H, W]) {
  if (h === H && w === W) return share;
  const to = new Float32Array(H * W), cols = cover(w, W);
  for (const [i, I, a] of cover(h, H)) for (const [j, J, b] of cols) to[I * W + J] += share[i * w + j] * a * b;
  return to;
}
function rollOut(layers, qi, qj, size) {
  let share = new Float32Array(layers.at(-1).queries[0] * layers.at(-1).queries[1]);
  share[qi * layers.at(-1).queries[1] + qj] = 1;
  for (let l = layers.length - 1; l >= 0; l--) {
    const layer = layers[l], mean = meanWeights(layer), [H, W] = layer.size, [h, w] = layer.queries;
    const [rows, cols] = layer.axes, K = rows.kernel * cols.kernel, below = new Float32Array(H * W);
    const clamp = (x, most) => Math.min(Math.max(x, 0), most);
    for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
      const has = share[i * w + j];
      if (has < 1e-9) continue;
      below[clamp(centre(layer, 0, i), H - 1) * W + clamp(centre(layer, 1, j), W - 1)] += has / 2;
      for (let t = 0; t < K; t++) {
        const y = place(rows, i, Math.floor(t / cols.kernel)) - layer.offset[0], x = place(cols, j, t % cols.kernel) - layer.offset[1];
        if (y >= 0 && x >= 0 && y < H && x < W) below[y * W + x] += (has * mean[(i * w + j) * K + t]) / 2;
      }
    }
    share = spread(below, layer.size, l ? layers[l - 1].queries : size);
  }
  return share;
}
