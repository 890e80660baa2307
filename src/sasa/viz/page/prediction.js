// ---- prediction ---------------------------------------------------------------------------------------------
const effectKey = () => `${state.temperature}` + (state.position ? "" : " off");
function showPrediction(rows, why) {
  const table = document.createElement("table"), first = image().effects["1"] || [], plain = new Map(first.map((one) => [one.index, one.probability]));
  for (const { index, name, probability } of rows) {
    const line = table.insertRow(), bar = document.createElement("div");
    if (name === image().label) line.className = "label";
    line.insertCell().textContent = name;
    const cell = line.insertCell(); cell.className = "bar"; bar.style.width = `${Math.max(probability * 100, 0.3)}%`; cell.append(bar);
    const number = line.insertCell(); number.className = "number"; number.textContent = `${(probability * 100).toFixed(1)} %`;
    const change = line.insertCell(); change.className = "number dim";
    if (why && plain.has(index)) change.textContent = `${signed(+((probability - plain.get(index)) * 100).toFixed(1))}`;
  }
  $("prediction").replaceChildren(table);
  $("changed").textContent = why || (image().label ? `The image's class is ${image().label}.` : "");
}
async function predictChanged() {
  const { effects } = image(), mine = ++wanted, changes = [];
  if (!effects["1"]) { $("prediction").textContent = "This network's output is not that of a classifier."; $("changed").textContent = ""; return; }
  if (!state.position) changes.push("position terms off in every layer");
  if (state.temperature !== 1) changes.push(`temperature ${state.temperature} in every layer`);
  if ($("cover").checked) changes.push("the window covered with the image's mean colour");
  const why = changes.length ? `With ${changes.join(", ")}; at the right, the change in percentage points.` : "";
  if (!$("cover").checked && effects[effectKey()]) { showPrediction(effects[effectKey()], why); return; }
  if (!page.server) { showPrediction(effects["1"], ""); say("This prediction needs the server: sasa explore."); return; }
  await new Promise((done) => setTimeout(done, 120));
  if (mine !== wanted) return;
  const one = layer(), [qi, qj] = queryOf(one);
  const ask = { image: image().key, position: state.position, temperature: state.temperature };
  if ($("cover").checked) ask.cover = coverBox(one, qi, qj);
  try {
    const answer = await fetch("predict", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(ask) });
    const result = await answer.json();
    if (mine !== wanted) return;
    if (result.error) say(result.error, true); else { if (!ask.cover) effects[effectKey()] = result.prediction; showPrediction(result.prediction, why); }
  } catch (error) { say("The server does not answer: is sasa explore still running?", true); }
}
function coverBox(one, qi, qj) { // top, left, bottom, right in pixels of the image
  const taps = windowOf(one, qi, qj), [sy, sx] = cells(one), [H, W] = image().size;
  const clamp = (x, most) => Math.min(Math.max(Math.round(x), 0), most);
  const last = taps.at(-1);
  return [clamp(taps[0].y * sy, H), clamp(taps[0].x * sx, W), clamp((last.y + 1) * sy, H), clamp((last.x + 1) * sx, W)];
}
