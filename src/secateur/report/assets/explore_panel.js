// One panel: points on a canvas, a brush and a ring above it, and the keys that walk from point to point.
const SHAPES = ["symbolCircle", "symbolSquare", "symbolTriangle", "symbolDiamond", "symbolCross"];
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STRIDE = 0.05; // of the panel: how far a key moves the corner of a rectangle
const HINT = "Drag to select. In a panel that has the focus, arrow keys walk from point to point, Page Up and Page Down in order, "
  + "Enter shows a point; Shift with the arrow keys draws a rectangle from there, Escape clears.";

function shapePath(shape, size) {
  return d3.symbol(d3[SHAPES[shape]], size)();
}

// The pixels of a point: places around its middle and colours, so that drawing one is copying them.
function sprite(colour, shape, side, ratio) {
  const half = Math.ceil(side * ratio), size = 2 * half + 1, pen = new OffscreenCanvas(size, size).getContext("2d");
  pen.translate(half + 0.5, half + 0.5);
  pen.scale(ratio, ratio);
  pen.fillStyle = colour;
  pen.fill(new Path2D(shapePath(shape, side * side * 0.8)));
  const { data } = pen.getImageData(0, 0, size, size), pixels = [];
  for (let k = 0; k < size * size; k++) {
    if (data[4 * k + 3] > 40) pixels.push((k % size) - half, Math.floor(k / size) - half, ...data.subarray(4 * k, 4 * k + 4));
  }
  return { pixels: Int16Array.from(pixels) };
}

// Copies a point into an image; the pixels of its edge are mixed with what lies below.
function stamp(image, { pixels }, x, y) {
  const { width, height, data } = image;
  for (let k = 0; k < pixels.length; k += 6) {
    const px = x + pixels[k], py = y + pixels[k + 1];
    if (px < 0 || py < 0 || px >= width || py >= height) continue;
    const at = 4 * (py * width + px), alpha = pixels[k + 5], share = data[at + 3] === 0 ? 1 : alpha / 255;
    data[at] += (pixels[k + 2] - data[at]) * share;
    data[at + 1] += (pixels[k + 3] - data[at + 1]) * share;
    data[at + 2] += (pixels[k + 4] - data[at + 2]) * share;
    if (data[at + 3] < alpha) data[at + 3] = alpha;
  }
}

function makePanel(host, number, hooks) {
  const heading = element("h3"), canvas = element("canvas", { "aria-hidden": "true" });
  const svg = d3.create("svg").attr("aria-hidden", "true"), node = svg.node();
  const stage = element("div", { class: "stage", tabindex: "0", role: "group", "aria-roledescription": "point cloud" }, canvas, node);
  host.append(element("div", {}, heading, stage));
  const area = svg.append("g"), ring = svg.append("circle").attr("class", "ring").attr("r", 7).attr("visibility", "hidden");
  const panel = { number, stage, width: 0, height: 0, sx: null, sy: null, brush: d3.brush(), keyed: null };
  panel.brush.on("start brush end", (event) => {
    if (!event.sourceEvent) return;
    panel.keyed = null;
    hooks.brushed(panel, event.selection, event.type === "end");
  });
  panel.clear = () => panel.select(null);
  panel.select = (box) => {
    panel.keyed = null;
    area.call(panel.brush.move, box);
  };
  panel.name = (name, told) => {
    heading.textContent = shorten(name, 60);
    stage.setAttribute("aria-label", `${name}: ${told} ${HINT}`);
  };
  panel.ring = (i) => {
    const at = i >= 0 && Number.isFinite(panel.sx[i]);
    ring.attr("visibility", at ? "visible" : "hidden");
    if (at) ring.attr("cx", panel.sx[i]).attr("cy", panel.sy[i]);
  };
  panel.measure = () => {
    const { clientWidth: width, clientHeight: height } = stage;
    if (width === panel.width && height === panel.height) return;
    Object.assign(panel, { width, height, keyed: null });
    svg.attr("viewBox", `0 0 ${width} ${height}`);
    area.call(panel.brush.extent([[0, 0], [width, height]]));
  };
  panel.draw = (picture) => drawPoints(canvas, panel, picture);
  node.addEventListener("click", (event) => hooks.clicked(panel, nearest(panel, d3.pointer(event, node), 14, hooks.shown())));
  stage.addEventListener("keydown", (event) => pressed(event, panel, hooks));
  return panel;
}

// Where the points lie on the screen; lows and highs are those of the axes.
function project(panel, places, ends) {
  const scale = (pair, from, to) => {
    const [low, high] = pair ?? [0, 1], pad = (high - low || 1) * 0.04;
    return d3.scaleLinear([low - pad, high + pad], [from, to]);
  };
  const [x, y] = [scale(ends[0], 0, panel.width), scale(ends[1], panel.height, 0)];
  panel.sx = places[0].map((value) => x(value));
  panel.sy = places[1].map((value) => y(value));
}

// Unselected points are faint and behind; the selected ones have the colour of their category.
function drawPoints(canvas, panel, { shown, selected, of, sprites, faint, ratio }) {
  const { sx, sy } = panel, width = Math.max(1, Math.round(panel.width * ratio)), height = Math.max(1, Math.round(panel.height * ratio));
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const pen = canvas.getContext("2d"), image = pen.createImageData(width, height);
  for (const pass of [0, 1]) {
    for (let i = 0; i < sx.length; i++) {
      if (!shown[i] || selected[i] !== pass || Number.isNaN(sx[i])) continue;
      stamp(image, pass ? sprites[of[i]] : faint, Math.round(sx[i] * ratio), Math.round(sy[i] * ratio));
    }
  }
  pen.putImageData(image, 0, 0);
}

// The shown point nearest to a place, within a reach in pixels; -1 when there is none.
function nearest(panel, [x, y], reach, shown) {
  let best = -1, least = reach * reach;
  for (let i = 0; i < panel.sx.length; i++) {
    const far = (panel.sx[i] - x) ** 2 + (panel.sy[i] - y) ** 2;
    if (shown[i] && far <= least) [best, least] = [i, far];
  }
  return best;
}

// Marks the points inside a rectangle of the screen; all shown ones when there is no rectangle.
function inside(panel, box, shown, selected) {
  if (!box) return void selected.set(shown);
  const [[left, top], [right, foot]] = box, { sx, sy } = panel;
  for (let i = 0; i < sx.length; i++) {
    selected[i] = shown[i] && sx[i] >= left && sx[i] <= right && sy[i] >= top && sy[i] <= foot ? 1 : 0;
  }
}

// The next point in a direction: near, and rather straight ahead than aside.
function ahead(panel, from, [dx, dy], shown) {
  let best = -1, least = Infinity;
  for (let i = 0; i < panel.sx.length; i++) {
    const x = panel.sx[i] - panel.sx[from], y = panel.sy[i] - panel.sy[from];
    const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    const far = along + 2 * aside;
    if (i !== from && shown[i] && along > 0 && far < least) [best, least] = [i, far];
  }
  return best;
}

// The next shown point in the order of the samples, in steps of 1 or -1.
function following(panel, from, step, shown) {
  const n = panel.sx.length;
  for (let k = 1, i = from < 0 && step < 0 ? 0 : from; k <= n; k++) {
    i = (i + step + n) % n;
    if (shown[i] && Number.isFinite(panel.sx[i])) return i;
  }
  return -1;
}

// A rectangle that begins around the current point, or the middle of the panel: keys move the corner opposite to it.
function grow(panel, from, [dx, dy], hooks) {
  const { width, height } = panel, [wide, high] = [STRIDE * width, STRIDE * height], within = (value, most) => Math.max(0, Math.min(most, value));
  const begin = from >= 0 ? [panel.sx[from], panel.sy[from]] : [width / 2, height / 2];
  const keyed = panel.keyed?.from === from ? panel.keyed : { from, begin, end: begin };
  keyed.end = [within(keyed.end[0] + dx * wide, width), within(keyed.end[1] + dy * high, height)];
  const side = (axis, pad, most) => [keyed.begin[axis], keyed.end[axis]].sort((a, b) => a - b)
    .map((value, k) => within(value + (k ? pad : -pad), most));
  const [[left, right], [top, foot]] = [side(0, wide / 4, width), side(1, high / 4, height)], box = [[left, top], [right, foot]];
  panel.select(box);
  panel.keyed = keyed;
  hooks.brushed(panel, box, true);
}

function pressed(event, panel, hooks) {
  const shown = hooks.shown(), current = hooks.current(), { key } = event;
  const there = current >= 0 && shown[current] && Number.isFinite(panel.sx[current]);
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (key in KEYS && event.shiftKey) grow(panel, there ? current : -1, KEYS[key], hooks);
  else if (key in KEYS) hooks.walked(there ? ahead(panel, current, KEYS[key], shown) : following(panel, -1, 1, shown));
  else if (key === "PageDown" || key === "PageUp") hooks.walked(following(panel, current, key === "PageDown" ? 1 : -1, shown));
  else if (key === "Enter" || key === " ") hooks.clicked(panel, there ? current : following(panel, -1, 1, shown));
  else if (key === "Escape") hooks.cleared();
  else return;
  event.preventDefault();
}
