// The explorer: two networks side by side, linked by the samples that are selected.
const SIDE = 4;

function choice(host, label, options, chosen, changed) {
  const select = element("select");
  for (const [value, text] of options) select.append(element("option", { value }, shorten(text, 60)));
  select.value = chosen;
  select.addEventListener("change", () => changed(select.value));
  host.append(element("label", {}, label, select));
  return select;
}

function tick(host, label, changed) {
  const box = element("input", { type: "checkbox" });
  box.addEventListener("change", () => changed(box.checked));
  host.append(element("label", { class: "tick" }, box, label));
  return box;
}

function press(host, label, pressed) {
  const button = element("button", { type: "button" }, label);
  button.addEventListener("click", pressed);
  host.append(button);
  return button;
}

function start(host, table) {
  const data = readExplorer(table), hard = hardOnes(data);
  const state = { view: data.views[0].name, pruned: 1, colour: "class", only: null, flipped: false, hard: false, box: null,
    from: null, current: -1, zoom: null, kind: 0 };
  const tools = element("div", { class: "knobs" }), panels = element("div", { class: "panels" });
  const legend = element("ul", { class: "key" }), said = element("p", { class: "said", "aria-live": "polite" });
  const about = element("p", { class: "said" }), lines = element("ul", { class: "key lines" }), spread = element("div", { class: "beside spread" });
  const detail = element("div", { class: "detail", "aria-live": "polite" }), hint = element("p", { class: "hint" }, HINT);
  detail.hidden = true;
  host.append(tools, panels, hint, legend, said, about, lines, spread, detail);
  const parts = { host, data, state, tools, legend, lines, said, about, detail, hard, selected: new Uint8Array(data.n) };
  const picture = drawing(parts);
  parts.spreads = data.metrics.map((name) => makeSpread(spread, name, data.units.get(name)));
  parts.panels = [0, 1].map((number) => makePanel(panels, number, hooksOf(parts, picture)));
  controls(parts, picture);
  new ResizeObserver(() => picture.all()).observe(panels);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => picture.all());
  for (const [name, on] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(name, () => {
      host.classList.toggle("printing", on);
      picture.all();
    });
  }
  picture.all();
}

// Puts the points of both panels in their places; where the networks share axes, the panels share scales.
function arrange({ data, state, panels }) {
  const places = [0, state.pruned].map((v) => data.places(state.view, v));
  const shared = data.views.find((view) => view.name === state.view).shared === true, wanted = scaled(data, state);
  panels.forEach((panel, k) => {
    const together = shared ? places : [places[k]];
    const ends = [0, 1].map((axis) => extent(together.map((pair) => pair[axis]), state.zoom ?? wanted));
    project(panel, places[k], ends);
  });
}

// What is drawn anew when something changes: all of it, the selection, or only the mark of the current sample.
function drawing(parts) {
  const { host, data, state, selected } = parts;
  let common = null, waiting = false;
  const networks = () => [0, state.pruned];
  const colour = (name) => getComputedStyle(host).getPropertyValue(name).trim();
  const selection = () => {
    waiting = false;
    inside(parts.panels[state.from ?? 0], state.box, common.shown, selected);
    parts.panels.forEach((panel, k) => panel.draw({ ...common, selected, of: common.of[k] }));
    const names = networks().map((v) => data.networks[v]);
    for (const one of parts.spreads) one.update(selected, names);
  };
  const all = () => {
    const ratio = host.classList.contains("printing") ? 3 : devicePixelRatio, { of, legend } = colouring(data, state);
    parts.panels.forEach((panel) => panel.measure());
    parts.spreads.forEach((one, k) => one.take(networks().map((v) => data.row(data.metrics[k], v)), scaled(data, state)));
    const side = data.n > 4000 ? SIDE - 1 : SIDE;
    const sprites = legend.map((entry) => sprite(colour(entry.colour), entry.shape, side, ratio));
    common = { shown: filtered(data, state, parts.hard), of, sprites, faint: sprite(colour("--faint"), 0, side, ratio), ratio };
    arrange(parts);
    selection();
    drawLegend(parts.legend, legend, colour);
    drawLines(parts.lines, networks().map((v) => data.networks[v]));
    tell(parts, common.shown);
    mark();
  };
  const mark = () => parts.panels.forEach((panel) => panel.ring(state.current));
  const soon = () => {
    if (!waiting) requestAnimationFrame(selection);
    waiting = true;
  };
  return { all, soon, mark, shown: () => common.shown };
}

// The sentences below the panels: how many are shown and selected, what the view is, and what has no place in it.
function tell(parts, shown) {
  const { data, state, selected } = parts, view = data.views.find((one) => one.name === state.view);
  const count = (marks) => amount(marks.reduce((sum, one) => sum + one, 0));
  parts.said.textContent = `${count(selected)} of ${count(ofKind(data, state.kind))} samples selected, ${count(shown)} shown.`;
  const lost = [0, state.pruned].map((v) => data.places(state.view, v)[0].filter((x, i) => shown[i] && Number.isNaN(x)).length);
  const none = Math.max(...lost) ? ` ${amount(Math.max(...lost))} samples have no place in this view.` : "";
  parts.about.textContent = view.says + none;
  parts.panels.forEach((panel, k) => panel.name(data.networks[[0, state.pruned][k]], parts.said.textContent));
}

function hooksOf(parts, picture) {
  const { data, state } = parts;
  const walked = (i) => {
    if (i < 0) return;
    state.current = i;
    picture.mark();
    const answers = [0, state.pruned].map((v) => `${data.networks[v]} ${data.className(data.row("predictions", v)[i])}`);
    parts.said.textContent = `Test example ${data.index[i]}${spoiling(data, i)}, label ${data.className(data.targets[i])}: ${answers.join(", ")}.`;
  };
  return {
    walked,
    shown: picture.shown,
    current: () => state.current,
    brushed(panel, box, ended) {
      if (state.from !== null && state.from !== panel.number) parts.panels[state.from].clear();
      Object.assign(state, { box, from: box ? panel.number : null });
      picture.soon();
      if (ended) requestAnimationFrame(() => tell(parts, picture.shown()));
    },
    clicked(panel, i) {
      if (i < 0) return;
      walked(i);
      showSample(parts.detail, data, i, [0, state.pruned]);
    },
    cleared() {
      for (const panel of parts.panels) panel.clear();
      Object.assign(state, { box: null, from: null, current: -1 });
      parts.detail.hidden = true;
      picture.all();
    },
  };
}

function controls(parts, picture) {
  const { data, state, tools } = parts, hooks = hooksOf(parts, picture);
  const set = (key, read = (value) => value) => (value) => {
    for (const panel of parts.panels) panel.clear();
    Object.assign(state, { box: null, from: null, zoom: key === "zoom" || key === "colour" ? state.zoom : null, [key]: read(value) });
    picture.all();
    if (!parts.detail.hidden && state.current >= 0) showSample(parts.detail, data, state.current, [0, state.pruned]);
  };
  const pruned = data.networks.slice(1).map((name, k) => [String(k + 1), name]);
  choice(tools, "Pruned network", pruned, "1", set("pruned", Number));
  choice(tools, "Places", data.views.map((view) => [view.name, view.title]), state.view, set("view"));
  const colours = [["class", "class"], ["right", "right or wrong"], ["change", "change"], ...data.metrics.map((name) => [name, name])];
  choice(tools, "Colour", colours, "class", set("colour"));
  const classes = () => classCounts(data, state.kind).sort((a, b) => a[0] - b[0])
    .map(([k, count]) => [String(k), `${data.className(k)} (${amount(count)})`]);
  const only = choice(tools, "Class", [["", "all"], ...classes()], "", set("only", (value) => (value === "" ? null : Number(value))));
  if (data.kinds.length > 1) {
    const kinds = [...data.kinds.map((name, kind) => [String(kind), name]), ["-1", "all of them"]];
    const change = set("kind", Number);
    choice(tools, "Inputs", kinds, "0", (value) => {
      change(value);
      classes().forEach(([, text], k) => (only.options[k + 1].textContent = shorten(text, 60)));
    });
  }
  tick(tools, "changed answers only", set("flipped"));
  const copies = data.kinds.length > 1 ? ", and the copies of those" : "";
  const hard = tick(tools, `hard only: lowest tenth by margin of the dense network${copies}`, set("hard"));
  hard.disabled = parts.hard === null;
  press(tools, "Zoom to selection", () => {
    const zoom = parts.selected.slice();
    if (zoom.includes(1)) set("zoom")(zoom);
  });
  press(tools, "Whole view", () => set("zoom")(null));
  press(tools, "Clear selection", () => hooks.cleared());
}

const reports = document.getElementById("report"), explorers = [...document.querySelectorAll("main > section .explore")];
const begin = () => {
  const { sections } = JSON.parse(reports.textContent), all = [...document.querySelectorAll("main > section")];
  for (const host of explorers) start(host, sections[all.indexOf(host.closest("section"))].explorer);
};
// The page is there before the points are.
if (typeof requestIdleCallback === "function") requestIdleCallback(begin, { timeout: 500 });
else setTimeout(begin, 0);
