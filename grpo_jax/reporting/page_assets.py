"""Style and script of the report page, written into it as they are."""

STYLE = """
:root { color-scheme: light dark; --back: #fafafa; --card: #fff; --text: #1d2129;
  --faint: #667085; --line: #e2e5ea; --curve: #0072b2; --best: #0072b2;
  --worst: #c2500a; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1c2027;
  --text: #e4e7ec; --faint: #98a2b3; --line: #2f3540; --curve: #56b4e9;
  --best: #56b4e9; --worst: #e69f00; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 1200px; padding: 24px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; align-items: baseline; gap: 12px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 12px; }
.status, .chip { border: 1px solid var(--line); border-radius: 12px;
  padding: 1px 10px; font-size: 13px; color: var(--faint); white-space: nowrap; }
.cards { display: grid; gap: 12px; margin-top: 16px;
  grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.card, figure, .row, table, pre.text { background: var(--card); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.card strong { display: block; font-size: 21px; white-space: nowrap; }
.card .label, small, .note { color: var(--faint); font-size: 13px; }
.charts { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 14px;
  font-weight: 600; }
figcaption output { font-weight: 400; color: var(--faint); white-space: nowrap; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; }
.grid { stroke: var(--line); }
.raw { stroke: var(--curve); fill: none; opacity: .35; }
.trend { stroke: var(--curve); fill: none; stroke-width: 2; }
.band { fill: var(--curve); opacity: .12; }
.dot { fill: var(--curve); }
.cursor { stroke: var(--faint); stroke-dasharray: 3 3; }
details > summary { cursor: pointer; margin: 12px 0; color: var(--faint); }
form { display: flex; flex-wrap: wrap; gap: 12px; align-items: end;
  margin-bottom: 12px; }
label { font-size: 13px; color: var(--faint); display: grid; }
input, select, button { font: inherit; font-size: 14px; color: var(--text);
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 0 8px; height: 32px; box-sizing: border-box; }
input[type=number] { width: 84px; }
.wide { flex: 1; min-width: 180px; }
label span { color: var(--faint); }
#count { color: var(--faint); font-size: 13px; padding-bottom: 6px; }
.row { border: 1px solid var(--line); border-left: 4px solid var(--worst);
  border-radius: 8px; padding: 10px 14px; margin-bottom: 10px; }
.row.best { border-left-color: var(--best); }
.facts { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.facts b { margin-right: 6px; }
pre { margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 420px; overflow: auto; unicode-bidi: isolate;
  font: 13px/1.5 ui-monospace, monospace; }
pre.prompt { color: var(--faint); }
.two { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit,
  minmax(330px, 1fr)); }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 3px 10px 3px 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--faint); white-space: nowrap; width: 1%; }
td table tr:first-child > * { border-top: 0; }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const W = 380, H = 200, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;

function svg(name, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.append(node);
  return node;
}

function element(name, className, text, parent) {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;  // never innerHTML: a model wrote some of these texts
  if (parent) parent.append(node);
  return node;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  // The nearest size: the next larger one could leave two ticks of four.
  const unit = [1, 2, 5, 10].findLast((m) => m * power <= 1.5 * rough) * power;
  const found = [];
  for (let k = Math.ceil(low / unit - 1e-9); k * unit <= high + unit * 1e-9; k++)
    found.push(Number((k * unit).toPrecision(12)));
  return found;
}

function trend(values) {
  const window = Math.max(1, Math.floor(values.length / 25));
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= window ? values[i - window] : 0);
    return sum / Math.min(i + 1, window);
  });
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low < high) return [low, high];
  const pad = Math.abs(low) * 0.1;
  return pad ? [low - pad, high + pad] : [0, 1];
}

function bandOf(panel, steps, values) {
  if (!panel.band || !data.series[panel.band]) return null;
  const spread = new Map(data.series[panel.band][0].map(
    (step, i) => [step, data.series[panel.band][1][i]]));
  const kept = steps.map((_, i) => i).filter((i) => spread.has(steps[i]));
  const many = steps.length >= 40, smooth = (v) => many ? trend(v) : v;
  const middle = smooth(kept.map((i) => values[i]));
  const width = smooth(kept.map((i) => spread.get(steps[i])));
  return kept.map((i, k) => [steps[i], middle[k] - width[k], middle[k] + width[k]]);
}

function drawAxes(root, xs, ys, x, y) {
  for (const value of ticks(ys[0], ys[1], 4)) {
    const ends = {x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value)};
    svg("line", {class: "grid", ...ends}, root);
    svg("text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, root)
      .textContent = number(value);
  }
  for (const value of ticks(xs[0], xs[1], 5)) {
    if (!Number.isInteger(value)) continue;
    svg("text", {x: x(value), y: H - 6, "text-anchor": "middle"}, root)
      .textContent = value;
  }
}

function chart(panel) {
  const [steps, values] = data.series[panel.metric];
  const band = bandOf(panel, steps, values);
  const ys = range(band ? values.concat(...band.map((b) => b.slice(1))) : values);
  const xs = range(steps);
  const x = (v) => LEFT + (v - xs[0]) / (xs[1] - xs[0]) * (W - LEFT - RIGHT);
  const y = (v) => H - BOTTOM - (v - ys[0]) / (ys[1] - ys[0]) * (H - TOP - BOTTOM);
  const figure = element("figure", "", "");
  const caption = element("figcaption", "", panel.title, figure);
  const readout = element("output", "", panel.label, caption);
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `${panel.title}: ${panel.label} by step`}, figure);
  drawAxes(root, xs, ys, x, y);
  const path = (points) => points.map((p, i) => (i ? "L" : "M") + p.join(" ")).join("");
  const line = (of) => path(of.map((v, i) => [x(steps[i]), y(v)]));
  if (band) {
    const low = band.map((b) => [x(b[0]), y(b[1])]);
    const high = band.map((b) => [x(b[0]), y(b[2])]);
    svg("path", {class: "band", d: path(low.concat(high.reverse())) + "Z"}, root);
  }
  const many = steps.length >= 40 && !panel.sparse;
  if (many) svg("path", {class: "raw", d: line(values)}, root);
  svg("path", {class: "trend", d: line(many ? trend(values) : values)}, root);
  if (panel.sparse || steps.length === 1) values.forEach((v, i) =>
    svg("circle", {class: "dot", cx: x(steps[i]), cy: y(v), r: 3.5}, root));
  const cursor = svg("line", {class: "cursor", y1: TOP, y2: H - BOTTOM,
    visibility: "hidden"}, root);
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * W;
    let i = 0;
    steps.forEach((step, k) => {
      if (Math.abs(x(step) - at) < Math.abs(x(steps[i]) - at)) i = k;
    });
    cursor.setAttribute("x1", x(steps[i]));
    cursor.setAttribute("x2", x(steps[i]));
    cursor.setAttribute("visibility", "visible");
    readout.textContent = `step ${steps[i]}: ${number(values[i])}`;
  });
  root.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = panel.label;
  });
  return figure;
}

const curves = document.getElementById("curves");
for (const panel of data.panels) curves.append(chart(panel));
const every = document.getElementById("every");
every.addEventListener("toggle", () => {
  const place = every.querySelector("div");
  if (place.childElementCount) return;
  for (const name in data.series)
    place.append(chart({title: name, metric: name, label: ""}));
});

function completion(row) {
  const box = element("article", `row ${row.rank}`, "");
  const facts = element("div", "facts", "", box);
  const head = `step ${row.step} · ${row.rank} · reward ${number(row.reward)}`;
  element("b", "", head, facts);
  const chip = (text) => element("span", "chip", text, facts);
  for (const name in row.rewards) {
    const value = row.rewards[name];
    chip(`${name} ${value === null ? "none" : number(value)}`);
  }
  if (typeof row.advantage === "number") chip(`advantage ${number(row.advantage)}`);
  chip(`${row.length} tokens`);
  if (!row.finished) chip("cut at the limit");
  element("pre", "prompt", row.prompt, box);
  element("pre", "completion", row.completion, box);
  return box;
}

const filters = document.getElementById("filters");
const more = document.getElementById("more"), count = document.getElementById("count");
const PAGE = 30;
let chosen = [], shown = 0;

function showMore() {
  const place = document.getElementById("rows");
  for (const row of chosen.slice(shown, shown + PAGE)) place.append(completion(row));
  shown = Math.min(chosen.length, shown + PAGE);
  more.hidden = shown >= chosen.length;
}

function apply() {
  const field = (name) => filters.elements[name].value;
  const within = (value, low, high) => (low === "" || value >= Number(low)) &&
    (high === "" || value <= Number(high));
  const text = field("text").toLowerCase(), sort = field("sort");
  const key = sort.replace("-", ""), sign = sort.startsWith("-") ? -1 : 1;
  chosen = data.rows.filter((row) =>
    within(row.step, field("from"), field("to")) &&
    within(row.reward, field("low"), field("high")) &&
    (!field("rank") || row.rank === field("rank")) &&
    (row.prompt + "\\n" + row.completion).toLowerCase().includes(text));
  chosen.sort((a, b) => sign * (a[key] - b[key]));
  document.getElementById("rows").textContent = "";
  count.textContent = `${chosen.length} of ${data.rows.length}`;
  shown = 0;
  showMore();
}

filters.addEventListener("input", apply);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(apply));
more.addEventListener("click", showMore);
if (data.rows.length) apply(); else filters.hidden = true;
"""
