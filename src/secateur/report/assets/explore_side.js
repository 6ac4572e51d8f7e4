// What stands around the panels: legend, histograms, and the sample that was chosen.
const BINS = 32, WIDE = 260, TALL = 110, FOOT = 18;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawLegend(list, legend, colour) {
  list.replaceChildren(...legend.map((entry) => {
    const svg = d3.create("svg").attr("viewBox", "-6 -6 12 12").attr("aria-hidden", "true");
    svg.append("path").attr("d", shapePath(entry.shape, 60)).attr("fill", colour(entry.colour));
    const line = element("li", {}, svg.node());
    line.append(shorten(entry.name));
    return line;
  }));
}

// Which line of the histograms is whose.
function drawLines(list, names) {
  list.replaceChildren(...names.map((name, v) => {
    const svg = d3.create("svg").attr("viewBox", "0 0 28 10").attr("aria-hidden", "true");
    svg.append("path").attr("class", `line${v}`).attr("d", "M1 5H27");
    const line = element("li", {}, svg.node());
    line.append(shorten(name));
    return line;
  }));
}

// What was done to a sample, as words that follow its number.
function spoiling(data, i) {
  const kind = data.kind?.[i] ?? 0;
  return kind > 0 ? ` (${data.kinds[kind]})` : "";
}

// The histogram of one metric for both networks; `update` follows the selection.
function makeSpread(host, name, unit) {
  const svg = d3.create("svg").attr("viewBox", `0 0 ${WIDE} ${TALL + FOOT}`).attr("role", "img"), told = element("p");
  const axis = svg.append("g").attr("transform", `translate(0 ${TALL})`);
  const lines = [0, 1].map((v) => svg.append("path").attr("class", `line${v}`));
  const most = svg.append("text").attr("x", 2).attr("y", 10);
  host.append(element("div", {}, element("h3", {}, unit ? `${name} (${unit})` : name), svg.node(), told));
  let ends = [0, 1], rows = [];
  const across = d3.scaleLinear().range([4, WIDE - 4]);
  return {
    take(arrays, wanted) {
      [rows, ends] = [arrays, extent(arrays, wanted) ?? [0, 1]];
      if (ends[0] === ends[1]) ends = [ends[0] - 0.5, ends[1] + 0.5];
      across.domain(ends);
      axis.selectAll("*").remove();
      for (const tick of across.ticks(5)) {
        axis.append("line").attr("class", "axis").attr("x1", across(tick)).attr("x2", across(tick)).attr("y2", 4);
        axis.append("text").attr("class", "mid").attr("x", across(tick)).attr("y", 16).text(across.tickFormat(5)(tick));
      }
      axis.append("line").attr("class", "axis").attr("x1", 4).attr("x2", WIDE - 4);
    },
    update(selected, names) {
      const found = rows.map((row) => countBins(row, ends, selected)), high = Math.max(1, ...found.flatMap((f) => [...f.bins]));
      lines.forEach((line, v) => line.attr("d", outline(found[v].bins, high, across, ends)));
      most.text(amount(high));
      const means = found.map((f, v) => `${shorten(names[v])} ${f.n ? shown(f.sum / f.n) : "–"}`).join(", ");
      told.textContent = `mean: ${means}`;
      svg.attr("aria-label", `Histogram of the ${name} of the selected samples; ${told.textContent}`);
    },
  };
}

function countBins(row, [low, high], selected) {
  const bins = new Uint32Array(BINS), factor = BINS / (high - low);
  let sum = 0, n = 0;
  for (let i = 0; i < row.length; i++) {
    const value = row[i];
    if (!selected[i] || !Number.isFinite(value)) continue;
    bins[Math.min(BINS - 1, ((value - low) * factor) | 0)]++;
    sum += value;
    n++;
  }
  return { bins, sum, n };
}

function outline(bins, most, across, [low, high]) {
  const up = (count) => TALL - (count / most) * (TALL - 14), width = (high - low) / BINS;
  let path = `M${across(low).toFixed(1)} ${TALL}`;
  bins.forEach((count, k) => {
    path += `V${up(count).toFixed(1)}H${across(low + (k + 1) * width).toFixed(1)}`;
  });
  return `${path}V${TALL}`;
}

// The chosen sample: its picture, its label, and what both networks make of it.
function showSample(host, data, i, networks) {
  const [label, where] = [data.className(data.targets[i]), `test example ${data.index[i]}${spoiling(data, i)}`];
  const names = networks.map((v) => data.networks[v]);
  const rows = [["answer", ...networks.map((v) => {
    const answer = data.row("predictions", v)[i];
    return `${data.className(answer)} (${answer === data.targets[i] ? "right" : "wrong"})`;
  })]];
  const sure = networks.map((v) => data.row("confidence", v));
  if (sure[0]) rows.push(["confidence", ...sure.map((row) => percent(100 * row[i]))]);
  for (const metric of data.metrics) {
    const unit = data.units.get(metric);
    rows.push([unit ? `${metric} (${unit})` : metric, ...networks.map((v) => shown(data.row(metric, v)[i]))]);
  }
  const head = element("tr", {}, element("td"), ...names.map((name) => element("th", { scope: "col" }, name)));
  const body = rows.map(([name, ...cells]) => {
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((text) => element("td", {}, text)));
  });
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
  const text = element("div", {}, element("h3", {}, `${where}, label ${label}`), table);
  host.replaceChildren(...[samplePicture(data, i), text].filter(Boolean));
  host.hidden = false;
}

// The sample's part of the sheet, which the browser decodes when it is first wanted.
function samplePicture(data, i) {
  const { sheet } = data, place = data.place[i];
  if (!sheet || place < 0) return null;
  const { width, height, across } = sheet, factor = 140 / Math.max(width, height);
  const canvas = element("canvas", { width, height, role: "img", "aria-label": "picture of the sample" });
  canvas.style.width = `${Math.round(width * factor)}px`;
  canvas.style.height = `${Math.round(height * factor)}px`;
  const from = [(place % across) * width, Math.floor(place / across) * height];
  sheet.image ??= Object.assign(new Image(), { src: sheet.data });
  sheet.image.decode().then(
    () => canvas.getContext("2d").drawImage(sheet.image, ...from, width, height, 0, 0, width, height),
    () => canvas.replaceWith(element("p", {}, "The picture cannot be shown.")),
  );
  return canvas;
}
