// The page: what is chosen, what shows it, and the pointer, the keyboard and the address that choose.
const $ = (id) => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const state = { image: 0, layer: "", row: 0, col: 0, head: 0, tap: -1, position: true, temperature: 1, rollout: false };
let pinned = false, tapPinned = false, picture = null, wanted = 0;

// ---- the page -----------------------------------------------------------------------------------------------
const image = () => page.images[state.image];
const taps = (one) => one.axes[0].kernel * one.axes[1].kernel;
const layer = () => { // where none is chosen: the first with the largest window
  const all = image().layers, most = Math.max(...all.map(taps));
  return all.find((one) => one.name === state.layer) || all.find((one) => taps(one) === most);
};
const format = (x, digits = 4) => (Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "−∞");
const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x);
function queryOf(one) { // the query whose window's centre is nearest to the pixel
  return [state.row, state.col].map((at, i) => {
    const first = centre(one, i, 0), { stride } = one.axes[i];
    const nearest = Math.floor((2 * (Math.floor(at / cells(one)[i]) - first) + stride) / (2 * stride));
    return Math.min(Math.max(nearest, 0), one.queries[i] - 1);
  });
}
function say(text, wrong = false) { $("message").textContent = text; $("message").classList.toggle("wrong", wrong); }

let found = null, framed = false;
function draw() { if (!framed) { framed = true; requestAnimationFrame(() => { framed = false; drawNow(); }); } }
function drawNow() {
  const one = layer(), [qi, qj] = queryOf(one);
  state.layer = one.name;
  state.head = Math.min(state.head, one.heads - 1);
  found = attend(one, qi, qj, state.position, state.temperature);
  const { K } = found, own = found.weight.subarray(state.head * K, (state.head + 1) * K);
  if (!tapPinned || state.tap >= K) { tapPinned = false; state.tap = own.reduce((best, x, t) => (x > own[best] ? t : best), 0); }
  $("pixel").textContent = `${state.row}, ${state.col}`;
  const same = one.queries.every((n, i) => n === image().size[i]);
  $("query").textContent = (same ? "" : `query ${qi}, ${qj} of ${one.queries[0]} × ${one.queries[1]}`) + (pinned ? " · pinned" : "");
  drawImage(one, own, qi, qj);
  drawHeads(one);
  drawEquation(one, own, qi, qj);
  remember();
}

function drawImage(one, own, qi, qj) {
  const canvas = $("image"), [H, W] = image().size, stage = canvas.parentElement;
  const most = Math.max(...own);
  let reach = "";
  if (!sizes.has(stage)) {
    const box = canvas.getBoundingClientRect(), from = stage.getBoundingClientRect();
    sizes.set(stage, { left: box.left - from.left, top: box.top - from.top, width: box.width, height: box.height });
  }
  const { context } = fit($("overlay")), back = sizes.get(stage), { left, top } = back;
  const cell = cells(one).map((n, i) => (n * [back.height, back.width][i]) / image().size[i]);
  const at = (tap) => [left + tap.x * cell[1], top + tap.y * cell[0]];
  const [rows, cols] = one.axes, tall = rows.dilation * cell[0], wide = cols.dilation * cell[1];
  if (state.rollout) {
    const layers = image().layers.slice(0, image().layers.indexOf(one) + 1);
    const share = rollOut(layers, qi, qj, image().size), peak = share.reduce((a, b) => Math.max(a, b), 0) || 1;
    const sheet = new OffscreenCanvas(W, H), ink = sheet.getContext("2d"), dots = ink.createImageData(W, H);
    share.forEach((x, i) => {
      const shade = Math.sqrt(x / peak), colour = VIRIDIS[Math.round(shade * 255)];
      dots.data.set([...colour, 70 + 165 * Math.min(1, shade * 1.5)], i * 4);
    });
    ink.putImageData(dots, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(sheet, left, top, back.width, back.height);
    const total = share.reduce((a, b) => a + b, 0), order = [];
    share.forEach((x, i) => { if (x) order.push([Math.hypot(Math.floor(i / W) - state.row, (i % W) - state.col), x]); });
    order.sort((a, b) => a[0] - b[0]);
    let sum = 0, radius = 0;
    for (const [far, x] of order) { sum += x; radius = far; if (sum >= 0.9 * total) break; }
    reach = `Through ${layers.length} attention layer${layers.length > 1 ? "s" : ""}, 90 % of what it sees lies within ${radius.toFixed(1)} pixels; ${((1 - total) * 100).toFixed(1)} % fell outside the image. Half passes by each layer, as residual connections do; convolutions are not counted.`;
  } else {
    found.taps.forEach((tap, t) => {
      const [x, y] = at(tap), dx = x + (cell[1] - wide) / 2, dy = y + (cell[0] - tall) / 2;
      if (tap.outside) hatch(context, dx, dy, wide, tall);
      context.fillStyle = pick(VIRIDIS, own[t] / most, tap.outside ? 0.45 : 0.72);
      context.fillRect(dx, dy, wide, tall);
    });
  }
  const [x0, y0] = at(found.taps[0]);
  box(context, x0 + (cell[1] - wide) / 2, y0 + (cell[0] - tall) / 2, wide * cols.kernel, tall * rows.kernel, 2);
  const cx = left + (centre(one, 1, qj) + 0.5) * cell[1], cy = top + (centre(one, 0, qi) + 0.5) * cell[0];
  context.beginPath(); context.arc(cx, cy, 4.5, 0, 7);
  context.fillStyle = pinned ? "#ff4d2e" : "#fff"; context.fill(); context.lineWidth = 2; context.strokeStyle = "#000"; context.stroke();
  if (!state.rollout && state.tap >= 0) {
    const [x, y] = at(found.taps[state.tap]);
    box(context, x + (cell[1] - wide) / 2, y + (cell[0] - tall) / 2, wide, tall, 1);
  }
  $("reach").textContent = reach;
  $("low").textContent = "0"; $("high").textContent = state.rollout ? "most (square root)" : format(most, 3);
  const name = image().label ? `${image().name}, ${image().label}` : image().name;
  canvas.setAttribute("aria-label", `${name}; pixel ${state.row}, ${state.col}; head ${state.head + 1} looks most at ${tapName(one, state.tap)}, weight ${own[state.tap].toFixed(2)}`);
}
function drawPicture() {
  const canvas = $("image"), [H, W] = image().size, dpr = devicePixelRatio || 1;
  // The element is the image and nothing else: its box has the image's proportions, also where height is short.
  sizes = new Map();
  canvas.style.aspectRatio = `${W} / ${H}`; canvas.style.width = `min(100%, ${((70 * W) / H).toFixed(1)}vh)`;
  const { context, width, height } = fit(canvas);
  context.imageSmoothingEnabled = width * dpr < 1.5 * W;
  if (picture) context.drawImage(picture, 0, 0, width, height);
  drawBar($("scale"), VIRIDIS); drawBar($("signs"), SIGNS);
}

const tapName = (one, t) => {
  const [rows, cols] = one.axes;
  const dy = (Math.floor(t / cols.kernel) - Math.floor((rows.kernel - 1) / 2)) * rows.dilation;
  const dx = ((t % cols.kernel) - Math.floor((cols.kernel - 1) / 2)) * cols.dilation;
  return `${signed(dy)}, ${signed(dx)}`;
};

function makeHeads(one) {
  const box = $("heads");
  if (box.children.length === one.heads && box.dataset.layer === one.name) return;
  sizes = new Map(); box.dataset.layer = one.name; box.classList.toggle("few", one.heads <= 4);
  box.replaceChildren(...Array.from({ length: one.heads }, (_, n) => {
    const button = document.createElement("button");
    button.type = "button"; button.dataset.head = n;
    const title = document.createElement("b"); title.textContent = `head ${n + 1}`;
    button.append(document.createElement("canvas"), title, document.createElement("span"));
    button.addEventListener("click", () => { state.head = n; tapPinned = false; draw(); });
    return button;
  }));
}
function drawHeads(one) {
  makeHeads(one);
  const { K, weight, taps } = found, rows = one.axes[0], cols = one.axes[1];
  [...$("heads").children].forEach((button, n) => {
    const own = weight.subarray(n * K, (n + 1) * K);
    let most = 0, bits = 0, far = 0;
    own.forEach((x, t) => {
      if (x > own[most]) most = t;
      if (x > 0) bits -= x * Math.log2(x);
      const dy = (taps[t].dy - Math.floor((rows.kernel - 1) / 2)) * rows.dilation, dx = (taps[t].dx - Math.floor((cols.kernel - 1) / 2)) * cols.dilation;
      far += x * Math.hypot(dy, dx);
    });
    button.setAttribute("aria-pressed", n === state.head);
    drawTaps(button.firstChild, one, found, (t) => pick(VIRIDIS, own[t] / own[most]), n === state.head ? state.tap : -1);
    button.lastChild.textContent = `max ${own[most].toFixed(2)}\n${bits.toFixed(1)} bits\n${far.toFixed(1)} px`;
    button.title = `largest weight ${own[most].toFixed(3)} at ${tapName(one, most)}; entropy ${bits.toFixed(2)} bits of ${Math.log2(K).toFixed(2)}; mean distance ${far.toFixed(2)} pixels of this layer's map`;
  });
}

function drawEquation(one, own, qi, qj) {
  const { K, taps } = found, n = state.head, t = state.tap, i = n * K + t;
  const values = { content: found.content[i], position: found.position[i], logit: found.content[i] + found.position[i], weight: own[t] };
  if (one.border === "mask" && taps[t].key < 0) values.logit = -Infinity;
  for (const [name, value] of Object.entries(values)) {
    const element = $("equation").querySelector(`[data-term="${name}"]`);
    element.textContent = format(value); element.dataset.value = value;
  }
  Object.assign($("equation").dataset, { layer: one.name, head: n, tap: t, query: `${qi}, ${qj}` });
  const outside = taps[t].outside ? ", outside the image" : "";
  const hot = state.temperature === 1 ? "" : `, softmax of logits / ${state.temperature}`;
  $("which").textContent = `head ${n + 1}, tap ${tapName(one, t)} from the pixel (row, column)${outside}${hot}`;
  const from = n * K, logits = (k) => found.content[from + k] + found.position[from + k];
  let most = 1e-9;
  for (let k = 0; k < K; k++) most = Math.max(most, Math.abs(found.content[from + k]), Math.abs(found.position[from + k]), Math.abs(logits(k)));
  const sign = (x) => pick(SIGNS, 0.5 + x / most / 2), peak = Math.max(...own);
  const map = (name) => $("taps").querySelector(`[data-map="${name}"]`);
  drawTaps(map("content"), one, found, (k) => sign(found.content[from + k]), t);
  drawTaps(map("position"), one, found, (k) => sign(found.position[from + k]), t);
  drawTaps(map("logit"), one, found, (k) => sign(logits(k)), t);
  drawTaps(map("weight"), one, found, (k) => pick(VIRIDIS, own[k] / peak), t);
  drawUnder(map("under"), one, t);
  $("least").textContent = format(-most, 2); $("most").textContent = format(most, 2);
}
function drawUnder(canvas, one, tap) {
  const [kh, kw] = one.axes.map((axis) => axis.kernel), { context, width, height } = fit(canvas, kh / kw);
  const w = width / kw, h = height / kh, [sy, sx] = cells(one);
  context.imageSmoothingEnabled = false;
  for (const { dy, dx, y, x, outside } of found.taps) {
    if (outside) hatch(context, dx * w, dy * h, w, h);
    else if (picture) context.drawImage(picture, x * sx, y * sy, sx, sy, dx * w, dy * h, w + 0.5, h + 0.5);
  }
  const { dy, dx } = found.taps[tap];
  box(context, dx * w + 1.5, dy * h + 1.5, w - 3, h - 3);
}

function showLayers() {
  const measure = $("measure").value, unit = measure === "entropy" ? "bits" : "px";
  $("layer").replaceChildren(...image().layers.map((one) => new Option(one.name, one.name)));
  $("layers").replaceChildren(...image().layers.map((one) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button"; button.dataset.layer = one.name;
    const { map, heads } = one[measure], [h, w] = one.queries, values = bytes(map.data);
    canvas.width = w; canvas.height = h;
    const context = canvas.getContext("2d"), dots = context.createImageData(w, h);
    values.forEach((x, i) => dots.data.set([...CIVIDIS[x], 255], i * 4));
    context.putImageData(dots, 0, 0);
    const name = document.createElement("b"), about = document.createElement("span");
    name.textContent = one.name;
    const mean = heads.reduce((a, b) => a + b, 0) / heads.length;
    about.textContent = `${one.axes[0].kernel}×${one.axes[1].kernel} on ${one.size[0]}×${one.size[1]} · ${mean.toFixed(2)} ${unit} (heads ${Math.min(...heads).toFixed(1)} to ${Math.max(...heads).toFixed(1)})`;
    button.append(canvas, name, about);
    button.addEventListener("click", () => setLayer(one.name));
    return button;
  }));
  $("measured").textContent = measure === "entropy"
    ? "Entropy of the weights at every query, mean of the heads, each layer in its own range: dark is one tap, bright is all taps evenly."
    : "Mean distance of what every query sees, in pixels of the layer's map, mean of the heads, each layer in its own range: dark is near, bright is far.";
  markLayer();
}
function markLayer() {
  const one = layer();
  state.layer = one.name; $("layer").value = one.name;
  const cell = cells(one);
  const size = cell.every((x) => x === 1) ? "" : `; a pixel of its map is ${cell.map((x) => +x.toFixed(2)).join(" × ")} of the image's`;
  $("about").textContent = `${one.axes[0].kernel}×${one.axes[1].kernel} window on ${one.size[0]}×${one.size[1]}, ${one.heads} heads of ${one.channels} channels${size}`;
  for (const button of $("layers").children) {
    button.setAttribute("aria-pressed", button.dataset.layer === one.name);
    if (button.dataset.layer === one.name) $("layers").scrollLeft = Math.max(0, button.offsetLeft - $("layers").offsetLeft - $("layers").clientWidth / 2 + button.clientWidth / 2);
  }
}
function setLayer(name) { state.layer = name; tapPinned = false; markLayer(); draw(); predictChanged(); }

// ---- images -------------------------------------------------------------------------------------------------
function showImages() {
  $("images").replaceChildren(...page.images.map((one, i) => {
    const button = document.createElement("button"), img = document.createElement("img");
    button.type = "button"; img.src = one.picture; img.alt = one.label ? `${one.name}, ${one.label}` : one.name; button.title = img.alt;
    button.append(img); button.setAttribute("aria-pressed", i === state.image);
    button.addEventListener("click", () => setImage(i));
    return button;
  }));
  const box = $("images"), chosen = box.children[state.image];
  box.scrollLeft = Math.max(0, chosen.offsetLeft - box.offsetLeft - box.clientWidth / 2 + chosen.clientWidth / 2);
}
async function setImage(i) {
  i = Math.min(Math.max(i, 0), page.images.length - 1);
  if (!page.images[i].layers) {
    say(`${page.images[i].name}: computing…`);
    try {
      const result = await (await fetch(`image/${encodeURIComponent(page.images[i].key)}`)).json();
      if (result.error) { say(result.error, true); return; }
      page.images[i] = result; say("");
    } catch (error) { say("The server does not answer: is sasa explore still running?", true); return; }
  }
  state.image = i;
  const [H, W] = image().size;
  state.row = Math.min(state.row, H - 1); state.col = Math.min(state.col, W - 1);
  picture = new Image();
  picture.src = image().picture;
  await picture.decode();
  const out = image().left_out;
  if (out.length) say(`Too large for this page, so left out: ${out.join(", ")}.`);
  $("position").disabled = !image().position;
  showImages(); showLayers(); drawPicture(); drawNow(); await predictChanged();
}
async function take(file) {
  if (!file) return;
  if (!page.server) { say("A saved page takes no images: run sasa explore for that.", true); return; }
  if (file.size > page.most_bytes) { say(`${file.name}: expected at most ${Math.round(page.most_bytes / 1e6)} MB, got ${Math.round(file.size / 1e6)} MB.`, true); return; }
  say(`${file.name}: computing…`);
  try {
    const answer = await fetch("explore", { method: "POST", headers: { "content-type": "application/octet-stream", "x-name": encodeURIComponent(file.name) }, body: file });
    const result = await answer.json();
    if (result.error) { say(result.error, true); return; }
    page.images.push(result); say("");
    await setImage(page.images.length - 1);
  } catch (error) { say("The server does not answer: is sasa explore still running?", true); }
}

// ---- state in the fragment ----------------------------------------------------------------------------------
let waiting = 0, written = "";
function remember() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const parts = new URLSearchParams({ image: state.image, layer: state.layer, pixel: `${state.row},${state.col}`, head: state.head });
    if (tapPinned) parts.set("tap", state.tap);
    if (!state.position) parts.set("position", "off");
    if (state.temperature !== 1) parts.set("temperature", state.temperature);
    if (state.rollout) parts.set("rollout", "on");
    written = "#" + parts.toString().replace(/%2C/g, ",");
    try { history.replaceState(null, "", written); } catch (error) { /* inside a notebook's frame */ }
  }, 150);
}
const count = (text, most) => (/^\d+$/.test(text || "") ? Math.min(+text, most) : null);
function recall() {
  const parts = new URLSearchParams(location.hash.slice(1)), pixel = (parts.get("pixel") || "").split(",");
  if (pixel.length === 2) { state.row = count(pixel[0], 1e6) ?? state.row; state.col = count(pixel[1], 1e6) ?? state.col; pinned = true; }
  state.layer = parts.get("layer") || state.layer;
  state.head = count(parts.get("head"), 1e6) ?? state.head;
  const tap = count(parts.get("tap"), 1e6);
  tapPinned = tap !== null; if (tapPinned) state.tap = tap;
  state.position = parts.get("position") !== "off";
  const temperature = [0.25, 0.5, 1, 2, 4].find((x) => String(x) === parts.get("temperature"));
  state.temperature = temperature || 1;
  state.rollout = parts.get("rollout") === "on";
  $("position").checked = state.position; $("rollout").checked = state.rollout;
  $("temperature").value = Math.log2(state.temperature); $("degrees").textContent = state.temperature;
  return count(parts.get("image"), page.images.length - 1) ?? state.image;
}

// ---- hands --------------------------------------------------------------------------------------------------
function setPixel(row, col) {
  const [H, W] = image().size;
  row = Math.min(Math.max(row, 0), H - 1); col = Math.min(Math.max(col, 0), W - 1);
  if (row === state.row && col === state.col) return;
  state.row = row; state.col = col; tapPinned = false;
  draw();
  if ($("cover").checked) predictChanged();
}
function pointed(event) {
  const area = $("image").getBoundingClientRect(), [H, W] = image().size;
  return [Math.floor(((event.clientY - area.top) / area.height) * H), Math.floor(((event.clientX - area.left) / area.width) * W)];
}
const canvas = $("image");
canvas.addEventListener("pointermove", (event) => { if (!pinned || event.buttons) setPixel(...pointed(event)); });
canvas.addEventListener("click", (event) => {
  const [row, col] = pointed(event), again = pinned && row === state.row && col === state.col;
  setPixel(row, col); pinned = !again; draw();
});
canvas.addEventListener("keydown", (event) => {
  const one = layer(), [row, col] = [state.row, state.col];
  const step = event.shiftKey ? one.axes.map((axis, i) => Math.max(1, Math.round(axis.stride * cells(one)[i]))) : [1, 1];
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (moves[event.key]) { const [y, x] = moves[event.key]; pinned = true; setPixel(row + y * step[0], col + x * step[1]); draw(); }
  else if (event.key === "Enter" || event.key === " ") { pinned = !pinned; draw(); }
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
  const names = image().layers.map((one) => one.name), at = names.indexOf(state.layer);
  if (event.key === "Escape") { pinned = tapPinned = false; draw(); }
  else if (event.key === "[" && at > 0) setLayer(names[at - 1]);
  else if (event.key === "]" && at < names.length - 1) setLayer(names[at + 1]);
  else if (/^[1-9]$/.test(event.key) && +event.key <= layer().heads) { state.head = event.key - 1; tapPinned = false; draw(); }
});
const tapAt = (event) => {
  const area = event.target.getBoundingClientRect(), [kh, kw] = layer().axes.map((axis) => axis.kernel);
  const y = Math.floor(((event.clientY - area.top) / area.height) * kh), x = Math.floor(((event.clientX - area.left) / area.width) * kw);
  return Math.min(Math.max(y, 0), kh - 1) * kw + Math.min(Math.max(x, 0), kw - 1);
};
for (const type of ["pointermove", "click"]) $("taps").addEventListener(type, (event) => {
  if (event.target.tagName === "CANVAS") { state.tap = tapAt(event); tapPinned = true; draw(); }
});
$("taps").addEventListener("keydown", (event) => {
  const [kh, kw] = layer().axes.map((axis) => axis.kernel), moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!moves[event.key]) return;
  const [y, x] = moves[event.key];
  const row = Math.min(Math.max(Math.floor(state.tap / kw) + y, 0), kh - 1), col = Math.min(Math.max((state.tap % kw) + x, 0), kw - 1);
  state.tap = row * kw + col; tapPinned = true; event.preventDefault(); draw();
});
$("layer").addEventListener("change", () => setLayer($("layer").value));
$("measure").addEventListener("change", showLayers);
$("rollout").addEventListener("change", () => { state.rollout = $("rollout").checked; draw(); });
$("position").addEventListener("change", () => { state.position = $("position").checked; draw(); predictChanged(); });
$("temperature").addEventListener("input", () => {
  state.temperature = 2 ** +$("temperature").value; $("degrees").textContent = state.temperature; draw(); predictChanged();
});
$("cover").addEventListener("change", predictChanged);
$("upload").addEventListener("change", async () => { const [file] = $("upload").files; $("upload").value = ""; await take(file); });
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("dropping"); take(event.dataTransfer.files[0]); });
addEventListener("hashchange", async () => { if (location.hash !== written) await setImage(recall()); });
addEventListener("resize", () => { drawPicture(); draw(); });
new ResizeObserver(() => { if (window.sasaReady) { drawPicture(); draw(); } }).observe($("taps"));

async function start() {
  if (page.note) { $("note").textContent = page.note; $("note").hidden = false; }
  if (!page.server) {
    $("upload").disabled = $("cover").disabled = true;
    $("choose").classList.add("off"); $("choose").title = $("covering").title = "needs the server: sasa explore";
  }
  const [H, W] = page.images[0].size || [0, 0];
  state.row = Math.floor(H / 2); state.col = Math.floor(W / 2);
  await setImage(recall());
  window.sasaReady = true;
}
window.sasaReady = false;
start().catch((error) => { say(`This page can't be shown: ${error.message}`, true); throw error; });
