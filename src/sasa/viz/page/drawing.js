// ---- colours: viridis for weights, cividis for layers, purple and orange for signs --------------------------
const ramp = (text) => {
  const anchors = text.split(" ").map((c) => [0, 2, 4].map((i) => parseInt(c.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, v) => {
    const x = (v / 255) * (anchors.length - 1), i = Math.min(Math.floor(x), anchors.length - 2);
    return anchors[i].map((a, c) => Math.round(a + (anchors[i + 1][c] - a) * (x - i)));
  });
};
const VIRIDIS = ramp("440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725");
const CIVIDIS = ramp("00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838");
const SIGNS = ramp("7f3b08 b35806 e08214 fdb863 fee0b6 f7f7f7 d8daeb b2abd2 8073ac 542788 2d004b");
const solid = new Map([VIRIDIS, CIVIDIS, SIGNS].map((colours) => [colours, colours.map((c) => `rgb(${c})`)]));
const index = (x) => Math.min(255, Math.max(0, Math.round(x * 255)));
const pick = (colours, x, alpha = 1) => (alpha === 1 ? solid.get(colours)[index(x)] : `rgba(${colours[index(x)]},${alpha})`);

// ---- drawing ------------------------------------------------------------------------------------------------
// Sizes are read once: to ask for them after each change would lay out the page again, many times a frame.
let sizes = new Map();
function sizeOf(canvas, aspect) {
  if (!sizes.has(canvas)) {
    if (aspect) canvas.style.aspectRatio = `1 / ${aspect}`;
    const width = canvas.clientWidth || 1;
    sizes.set(canvas, { width, height: aspect ? width * aspect : canvas.clientHeight || 1, aspect });
  }
  const found = sizes.get(canvas);
  if (found.aspect === aspect) return found;
  sizes.delete(canvas);
  return sizeOf(canvas, aspect);
}
function fit(canvas, aspect) { // height / width; returns a context in CSS pixels
  const { width, height } = sizeOf(canvas, aspect), dpr = devicePixelRatio || 1;
  const w = Math.max(1, Math.round(width * dpr)), h = Math.max(1, Math.round(height * dpr));
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const context = canvas.getContext("2d");
  context.setTransform(w / width, 0, 0, h / height, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}
const stripes = new OffscreenCanvas(6, 6);
{
  const ink = stripes.getContext("2d");
  for (const [colour, shift] of [["rgba(255,255,255,0.75)", 0], ["rgba(0,0,0,0.7)", 1.5]]) {
    ink.strokeStyle = colour; ink.beginPath();
    for (const s of [-6, 0, 6, 12]) { ink.moveTo(s + shift, 7); ink.lineTo(s + shift + 8, -1); }
    ink.stroke();
  }
}
function hatch(context, x, y, w, h) {
  context.fillStyle = context.createPattern(stripes, "repeat");
  context.fillRect(x, y, w, h);
}
function box(context, x, y, w, h, wide = 1.5) { // seen on any ground
  context.lineWidth = wide + 2; context.strokeStyle = "rgba(0,0,0,0.85)"; context.strokeRect(x, y, w, h);
  context.lineWidth = wide; context.strokeStyle = "#fff"; context.strokeRect(x, y, w, h);
}
// One map of the window: values of K taps.
function drawTaps(canvas, layer, found, colour, tap) {
  const [kh, kw] = layer.axes.map((axis) => axis.kernel);
  const { context, width, height } = fit(canvas, kh / kw), w = width / kw, h = height / kh;
  found.taps.forEach((one, t) => {
    context.fillStyle = colour(t);
    context.fillRect(one.dx * w, one.dy * h, w + 1, h + 1);
    if (one.outside) hatch(context, one.dx * w, one.dy * h, w, h);
  });
  const cy = Math.floor((kh - 1) / 2), cx = Math.floor((kw - 1) / 2), r = Math.max(2, Math.min(w, h) * 0.16);
  context.beginPath(); context.arc((cx + 0.5) * w, (cy + 0.5) * h, r, 0, 7);
  context.lineWidth = 3; context.strokeStyle = "#000"; context.stroke();
  context.lineWidth = 1.5; context.strokeStyle = "#fff"; context.stroke();
  if (tap >= 0) box(context, found.taps[tap].dx * w + 1.5, found.taps[tap].dy * h + 1.5, w - 3, h - 3);
}
function drawBar(canvas, colours) {
  const { context, width, height } = fit(canvas);
  for (let i = 0; i < 64; i++) { context.fillStyle = pick(colours, i / 63); context.fillRect((i * width) / 64, 0, width / 64 + 1, height); }
}
