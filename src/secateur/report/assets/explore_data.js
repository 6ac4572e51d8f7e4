// Numbers of an explorer, unpacked from the report's JSON, and what follows from them.
const KINDS = { float32: Float32Array, int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array };
const NONE = 65535, TOP = 65534, STEPS = 8, COLOURS = 10;

function unpack(packed) {
  const raw = atob(packed.data);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new KINDS[packed.type](bytes.buffer);
}

// Coordinates of network v: two arrays, NaN for a sample without a place.
function placesOf(packed, whole, v, n) {
  return [0, 1].map((axis) => {
    const [low, high] = packed.ranges[2 * v + axis], out = new Float32Array(n);
    for (let i = 0; i < n; i++) {
      const step = whole[2 * (v * n + i) + axis];
      out[i] = step === NONE ? NaN : low + ((high - low) * step) / TOP;
    }
    return out;
  });
}

// The table of the JSON with its arrays as typed ones; places and rows of networks are unpacked when asked for.
function readExplorer(table) {
  const n = table.count, packed = new Map(table.arrays.map((array) => [array.name, array]));
  const cache = new Map();
  const whole = (name) => {
    if (!cache.has(name)) cache.set(name, packed.has(name) ? unpack(packed.get(name)) : null);
    return cache.get(name);
  };
  const row = (name, v) => whole(name)?.subarray(v * n, (v + 1) * n) ?? null;
  const places = (view, v) => {
    const key = `${view}/${v}`;
    if (!cache.has(key)) cache.set(key, placesOf(packed.get(view), whole(view), v, n));
    return cache.get(key);
  };
  const classes = table.classes ?? [];
  return {
    n, row, places, networks: table.networks, views: table.views, metrics: (table.metrics ?? []).map((pair) => pair[0]),
    units: new Map((table.metrics ?? []).map(([name, unit]) => [name, unit ?? ""])), sheet: table.sheet ?? null,
    index: whole("index"), targets: whole("targets"), place: whole("place"), kind: whole("kind"), kinds: table.kinds ?? [],
    className: (k) => classes[k] ?? String(k),
  };
}

// Lowest and highest finite number of some arrays, or null.
function extent(arrays, wanted) {
  let low = Infinity, high = -Infinity;
  for (const array of arrays) {
    for (let i = 0; i < array.length; i++) {
      const value = array[i];
      if (Number.isFinite(value) && (!wanted || wanted[i])) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  return low <= high ? [low, high] : null;
}

// Which samples are of a kind: 0 are those to which nothing was done, -1 stands for all.
function ofKind(data, kind) {
  return Uint8Array.from({ length: data.n }, (_, i) => (kind < 0 || (data.kind?.[i] ?? 0) === kind ? 1 : 0));
}

// Values below which a share of the finite numbers lies.
function quantiles(arrays, shares) {
  const every = Float32Array.from(arrays.flatMap((array) => [...array].filter(Number.isFinite))).sort();
  return every.length ? shares.map((share) => every[Math.min(every.length - 1, Math.floor(share * every.length))]) : null;
}

// Which samples are hard: the tenth of the clean ones that have the least margin, and every copy of those; null when
// margins are unknown. A copy has a margin of its own, but what was done to it would make all copies hard.
function hardOnes(data) {
  const margins = data.row("margin", 0), clean = ofKind(data, 0);
  const [most] = (margins && quantiles([margins.filter((_, i) => clean[i])], [0.1])) ?? [null];
  if (most === null) return null;
  const hard = clean.map((one, i) => one & (margins[i] <= most)), numbers = new Set(data.index.filter((_, i) => hard[i]));
  return hard.map((one, i) => (clean[i] ? one : Number(numbers.has(data.index[i]))));
}

// Classes by number of samples of a kind, the most frequent first: [number, count].
function classCounts(data, kind = 0) {
  const counts = new Map(), wanted = ofKind(data, kind);
  data.targets.forEach((k, i) => counts.set(k, (counts.get(k) ?? 0) + wanted[i]));
  return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

// Which samples pass the filters.
function filtered(data, state, hard) {
  const shown = ofKind(data, state.kind), one = data.row("predictions", 0), two = data.row("predictions", state.pruned);
  for (let i = 0; i < data.n; i++) {
    shown[i] &= (state.only === null || data.targets[i] === state.only) && (!state.flipped || one[i] !== two[i])
      && (!state.hard || hard?.[i] === 1) ? 1 : 0;
  }
  return shown;
}

// The samples that the scales hold: those of the kind that is shown, and those to which nothing was done.
function scaled(data, state) {
  const shown = ofKind(data, state.kind), clean = ofKind(data, 0);
  return shown.map((one, i) => one | clean[i]);
}

// A category a sample, and the legend's entries, for colouring by class.
function byClass(data) {
  const counts = classCounts(data), own = counts.length > COLOURS ? COLOURS - 1 : COLOURS;
  const chosen = counts.slice(0, own).map((pair) => pair[0]).sort((a, b) => a - b);
  const ranks = new Map(chosen.map((k, rank) => [k, rank]));
  const of = Uint8Array.from(data.targets, (k) => ranks.get(k) ?? COLOURS - 1);
  const legend = chosen.map((k, rank) => ({ colour: `--k${rank}`, shape: rank % 5, name: data.className(k) }));
  if (counts.length > COLOURS) legend.push({ colour: "--k9", shape: 0, name: `${counts.length - own} others` });
  return { of: [of, of], legend };
}

function byRight(data, networks) {
  const of = networks.map((v) => {
    const answers = data.row("predictions", v);
    return Uint8Array.from(data.targets, (k, i) => (answers[i] === k ? 0 : 1));
  });
  return { of, legend: [{ colour: "--k0", shape: 0, name: "right" }, { colour: "--k1", shape: 4, name: "wrong" }] };
}

function byChange(data, networks) {
  const [one, two] = networks.map((v) => data.row("predictions", v));
  const of = Uint8Array.from(data.targets, (k, i) => (one[i] === k ? (two[i] === k ? 0 : 1) : two[i] === k ? 2 : 3));
  const names = ["right in both", "right, now wrong", "wrong, now right", "wrong in both"];
  const legend = names.map((name, k) => ({ colour: `--k${[9, 1, 0, 7][k]}`, shape: [0, 4, 2, 1][k], name }));
  return { of: [of, of], legend };
}

// Eight steps between the 2nd and the 98th percentile of both networks; one more for what is undefined.
function byMetric(data, networks, name) {
  const arrays = networks.map((v) => data.row(name, v)), ends = quantiles(arrays, [0.02, 0.98]) ?? [0, 1];
  const [low, high] = ends, width = high - low || 1;
  const step = (value) => Math.max(0, Math.min(STEPS - 1, Math.floor(((value - low) / width) * STEPS)));
  const of = arrays.map((array) => Uint8Array.from(array, (value) => (Number.isNaN(value) ? STEPS : step(value))));
  const legend = d3.range(STEPS).map((k) => {
    const [from, to] = [k, k + 1].map((edge) => shown(low + (edge * width) / STEPS));
    return { colour: `--q${k}`, shape: 0, name: k === 0 ? `below ${to}` : k === STEPS - 1 ? `from ${from}` : `${from} to ${to}` };
  });
  if (of.some((array) => array.includes(STEPS))) legend.push({ colour: "--none", shape: 3, name: "undefined" });
  return { of, legend };
}

function colouring(data, state) {
  const networks = [0, state.pruned];
  if (state.colour === "class") return byClass(data);
  if (state.colour === "right") return byRight(data, networks);
  return state.colour === "change" ? byChange(data, networks) : byMetric(data, networks, state.colour);
}

// A number to four significant digits, as the report writes it.
function shown(value) {
  if (Number.isNaN(value)) return "undefined";
  if (!Number.isFinite(value)) return value < 0 ? "−infinite" : "infinite";
  if (value === 0) return "0";
  const size = Number(value.toExponential(3).split("e")[1]);
  if (size < -4 || size >= 15) {
    return value.toExponential(3).replace(/e([+-])(\d)$/, (_, sign, digit) => `e${sign}0${digit}`).replaceAll("-", "−");
  }
  const places = Math.max(0, 3 - size);
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
}
