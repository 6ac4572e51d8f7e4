// Line charts as SVG. Every text goes in as text, whatever a run is called.
const WIDTH = 480, HEIGHT = 250, LEFT = 56, RIGHT = 22, TOP = 14, BOTTOM = 40, STYLES = 4;
const SPACE = "http://www.w3.org/2000/svg";

const draw = (kind, attributes, text = "", parts = []) => {
  const node = document.createElementNS(SPACE, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  node.append(...parts);
  return node;
};

export const written = (value, digits = 4) => {
  if (value === undefined || value === null) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e15)) return value.toExponential(digits - 1);
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
};

const ticks = (low, high, wanted = 5) => {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9 && found.length < 20; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
};

const label = (value) => {
  const prefix = [[1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([factor]) => Math.abs(value) >= factor);
  return prefix ? `${Number((value / prefix[0]).toPrecision(6))}${prefix[1]}` : `${Number(value.toPrecision(6))}`;
};

const frame = (across, up, xs, ys, x, y) => {
  const parts = [], foot = HEIGHT - BOTTOM, middle = (LEFT + WIDTH - RIGHT) / 2;
  for (const value of ys) {
    parts.push(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: up(value), y2: up(value) }));
    parts.push(draw("text", { class: "end", x: LEFT - 6, y: up(value) + 4 }, label(value)));
  }
  for (const value of xs) {
    parts.push(draw("line", { class: "axis", x1: across(value), x2: across(value), y1: foot, y2: foot + 4 }));
    parts.push(draw("text", { class: "mid", x: across(value), y: foot + 16 }, label(value)));
  }
  parts.push(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: foot, y2: foot }));
  parts.push(draw("text", { class: "mid", x: middle, y: HEIGHT - 5 }, x));
  parts.push(draw("text", { class: "mid", transform: `translate(11 ${(foot + TOP) / 2}) rotate(-90)` }, y));
  return parts;
};

const legend = (series, marks) => {
  const list = document.createElement("ul");
  const add = (line, name) => {
    const entry = document.createElement("li");
    entry.append(draw("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" }, "", [line]), name);
    list.append(entry);
  };
  list.className = "legend";
  series.forEach(({ name }, i) => add(draw("line", { class: `curve s${i % STYLES}`, x1: 1, y1: 5, x2: 27, y2: 5 }), name));
  if (marks.length) add(draw("line", { class: "mark", x1: 14, y1: 0, x2: 14, y2: 10 }), "pruning step");
  return list;
};

// A figure with its caption, legend and a text alternative; `marks` are [x, what] where the network was pruned.
export const chart = ({ title, x, y, series, marks, low, high }) => {
  const points = series.flatMap((one) => one.points);
  const xs = [...points.map((p) => p[0]), ...marks.map((m) => m[0])];
  const ends = [0, xs.reduce((a, b) => Math.max(a, b), 1)];
  let bottom = low ?? points.reduce((a, p) => Math.min(a, p[1]), Infinity);
  let top = high ?? points.reduce((a, p) => Math.max(a, p[1]), -Infinity);
  const room = 0.05 * (top - bottom || Math.abs(top) || 1);
  if (low === undefined) bottom = bottom >= 0 && bottom < 0.35 * top ? 0 : bottom - room;
  if (high === undefined) top += room;
  const across = (value) => LEFT + ((value - ends[0]) / (ends[1] - ends[0])) * (WIDTH - RIGHT - LEFT);
  const up = (value) => HEIGHT - BOTTOM - ((value - bottom) / (top - bottom)) * (HEIGHT - BOTTOM - TOP);
  const parts = frame(across, up, ticks(...ends), ticks(bottom, top), x, y);
  for (const [place, what] of marks) {
    const told = draw("title", {}, what);
    parts.push(draw("line", { class: "mark", x1: across(place), x2: across(place), y1: TOP, y2: HEIGHT - BOTTOM }, "", [told]));
  }
  series.forEach(({ name, points: own }, i) => {
    const style = `s${i % STYLES}`, places = own.map(([a, b]) => `${across(a).toFixed(1)} ${up(b).toFixed(1)}`);
    parts.push(draw("path", { class: `curve ${style}`, d: `M${places.join("L")}` }));
    const [a, b] = own[own.length - 1];
    const told = draw("title", {}, `${name}: ${written(b)} at ${x} ${written(a, 7)}`);
    parts.push(draw("circle", { class: `dot ${style}`, cx: across(a), cy: up(b), r: 3 }, "", [told]));
  });
  const says = `${series.map(({ name, points: own }) => `${name} ${written(own[own.length - 1][1])}`).join("; ")}.`;
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const head = document.createElement("h3"), words = document.createElement("p");
  head.textContent = title;
  words.textContent = says;
  caption.append(head, words);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. ${says}` }, "", parts);
  figure.append(caption, legend(series, marks), svg);
  return figure;
};
