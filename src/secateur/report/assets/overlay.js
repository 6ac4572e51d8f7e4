"use strict";
// Draws the densities of two chosen runs beside one another, tensor by tensor.
{
  const WIDTH = 960, LEFT = 230, RIGHT = 60, TOP = 8, PITCH = 24, MANY = 40, HEIGHT = 260;
  const space = "http://www.w3.org/2000/svg";

  const draw = (kind, attributes, text = "", parts = []) => {
    const node = document.createElementNS(space, kind);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    node.append(...parts);
    return node;
  };

  // Tensors of the first run, then those that only the second has; unknown where a run lacks one.
  const joined = (one, two) => {
    const found = new Map(one.names.map((name, i) => [name, [one.kept[i], undefined]]));
    two.names.forEach((name, i) => found.set(name, [found.get(name)?.[0], two.kept[i]]));
    return [...found].map(([name, values]) => ({ name, values }));
  };

  const bar = (kind, box, told) => draw("rect", { class: kind, ...box }, "", [draw("title", {}, told)]);

  const lying = (rows, told) => {
    const parts = [], across = (value) => LEFT + (value / 100) * (WIDTH - LEFT - RIGHT);
    const bottom = TOP + PITCH * rows.length;
    for (const value of [0, 25, 50, 75, 100]) {
      parts.push(draw("line", { class: value ? "grid" : "axis", x1: across(value), x2: across(value), y1: TOP, y2: bottom }));
      parts.push(draw("text", { class: "mid", x: across(value), y: bottom + 15 }, `${value}`));
    }
    rows.forEach(({ name, values }, i) => {
      const y = TOP + PITCH * i;
      const label = draw("text", { class: "end mono", x: LEFT - 8, y: y + 15 }, shorten(name, 36));
      label.append(draw("title", {}, name));
      parts.push(label);
      values.forEach((value, k) => {
        if (value === undefined) return;
        const box = { x: LEFT, y: y + 2 + 10 * k, height: 8, width: Math.max(1, across(value) - LEFT) };
        parts.push(bar(`pair p${k}`, box, told(name, k, value)));
        parts.push(draw("text", { class: "small", x: across(value) + 5, y: y + 10 + 10 * k }, percent(value)));
      });
    });
    parts.push(draw("text", { class: "mid", x: (LEFT + WIDTH - RIGHT) / 2, y: bottom + 32 }, "weights kept (%)"));
    return [parts, bottom + 38];
  };

  const upright = (rows, told) => {
    const parts = [], left = 52, foot = HEIGHT - 40, step = (WIDTH - left - 22) / rows.length;
    for (const value of [0, 25, 50, 75, 100]) {
      const y = foot - (value / 100) * (foot - TOP);
      parts.push(draw("line", { class: value ? "grid" : "axis", x1: left, x2: WIDTH - 22, y1: y, y2: y }));
      parts.push(draw("text", { class: "end", x: left - 6, y: y + 4 }, `${value}`));
    }
    rows.forEach(({ name, values }, i) =>
      values.forEach((value, k) => {
        if (value === undefined) return;
        const height = Math.max(0.5, (value / 100) * (foot - TOP));
        const box = { x: left + step * (i + 0.1 + 0.4 * k), y: foot - height, width: 0.4 * step, height };
        parts.push(bar(`pair p${k}`, box, told(name, k, value)));
      }),
    );
    const words = "tensor, in the order of the network; weights kept (%) up the side";
    parts.push(draw("text", { class: "mid", x: (left + WIDTH) / 2, y: HEIGHT - 12 }, words));
    return [parts, HEIGHT];
  };

  const sentence = (rows, names) => {
    const both = rows.filter(({ values }) => values[0] !== undefined && values[1] !== undefined);
    if (!both.length) return "The two runs share no tensor by name.";
    const gap = ({ values }) => Math.abs(values[0] - values[1]);
    const most = both.reduce((a, b) => (gap(b) > gap(a) ? b : a));
    const denser = both.filter(({ values }) => values[0] > values[1]).length;
    const alone = rows.length - both.length;
    return (
      `${denser} of ${both.length} tensors keep more of their weights in ${names[0]} than in ${names[1]}; they are furthest ` +
      `apart in ${most.name}: ${percent(most.values[0])} and ${percent(most.values[1])}.` +
      (alone ? ` ${alone} more belong to one run alone.` : "")
    );
  };

  const selector = (word, kind, runs, chosen, changed) => {
    const label = document.createElement("label");
    const swatch = document.createElement("span");
    const select = document.createElement("select");
    swatch.className = `swatch ${kind}`;
    runs.forEach((run, i) => select.append(new Option(run.name, `${i}`, false, i === chosen)));
    select.addEventListener("change", changed);
    label.append(swatch, ` ${word} `, select);
    return [label, select];
  };

  const mount = (area, overlay) => {
    const runs = overlay.runs.map((run) => ({ name: run.name, kept: run.kept, names: overlay.tensors[run.tensors ?? 0] }));
    const says = document.createElement("p"), picture = document.createElement("div");
    says.setAttribute("aria-live", "polite");
    const redraw = () => {
      const pair = [runs[one.value], runs[two.value]];
      const rows = joined(...pair);
      const names = pair.map((run) => run.name);
      const told = (name, k, value) => `${name}, ${names[k]}: ${percent(value)}`;
      const [parts, height] = rows.length > MANY ? upright(rows, told) : lying(rows, told);
      says.textContent = sentence(rows, names);
      const label = `Densities of ${names[0]} and ${names[1]}. ${says.textContent}`;
      picture.replaceChildren(draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, "", parts));
    };
    const [first, one] = selector("First run", "p0", runs, 0, redraw);
    const [second, two] = selector("Second run", "p1", runs, 1, redraw);
    const row = document.createElement("div");
    row.className = "choose";
    row.append(first, second);
    area.append(row, says, picture);
    redraw();
  };

  const areas = [...document.querySelectorAll(".overlay")];
  const { sections } = JSON.parse(document.getElementById("report").textContent);
  sections.filter((section) => section.overlay).forEach((section, i) => mount(areas[i], section.overlay));
}
