"use strict";
// Draws the heat maps of masks from the counts in the page's JSON: small when they come into view, large on a click.
{
  const figures = [...document.querySelectorAll("figure.heat")];
  const report = JSON.parse(document.getElementById("report").textContent);
  const every = report.sections.flatMap((part) => part.chart ?? []).filter((chart) => chart.kind === "heat");
  const SMALL = 224;
  const STEPS = 255;
  const FAINTEST = 0.12; // of the ramp: one kept weight must be told from none

  const make = (tag, text = "", kind = "") => {
    const node = document.createElement(tag);
    if (text) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const button = (text, act) => {
    const node = make("button", text);
    node.type = "button";
    node.addEventListener("click", act);
    return node;
  };

  const read = (heat) => {
    const rows = Math.ceil(heat.height / heat.tall);
    const columns = Math.ceil(heat.width / heat.wide);
    const raw = Uint8Array.from(atob(heat.data), (letter) => letter.charCodeAt(0));
    const count = (cell) => {
      let value = 0;
      for (let i = heat.size - 1; i >= 0; i -= 1) value = value * 256 + raw[cell * heat.size + i];
      return value;
    };
    const size = (row, column) => {
      const high = Math.min(heat.tall, heat.height - row * heat.tall);
      const broad = Math.min(heat.wide, heat.width - column * heat.wide);
      return high * broad * heat.depth;
    };
    const shares = new Float64Array(rows * columns);
    let most = 0;
    for (let i = 0; i < shares.length; i += 1) {
      shares[i] = count(i) / size(Math.floor(i / columns), i % columns);
      most = Math.max(most, shares[i]);
    }
    return { heat, rows, columns, count, size, shares, most };
  };

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const stops = [0, 1, 2, 3].map((i) => {
      const hex = style.getPropertyValue(`--h${i}`).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    });
    const ramp = (place) => {
      const part = Math.min(1, Math.floor(place * 2));
      const within = place * 2 - part;
      return stops[part + 1].map((from, i) => Math.round(from + within * (stops[part + 2][i] - from)));
    };
    return { none: stops[0], table: Array.from({ length: STEPS + 1 }, (_, i) => ramp(i / STEPS)) };
  };

  const alike = make("input");
  alike.type = "checkbox";
  const top = (cells) => (alike.checked ? 1 : cells.most || 1);

  const paint = (canvas, cells) => {
    canvas.width = cells.columns;
    canvas.height = cells.rows;
    const brush = canvas.getContext("2d");
    const image = brush.createImageData(cells.columns, cells.rows);
    const { none, table } = colours();
    cells.shares.forEach((share, i) => {
      const place = FAINTEST + (1 - FAINTEST) * (share / top(cells));
      image.data.set(share ? table[Math.round(place * STEPS)] : none, 4 * i);
      image.data[4 * i + 3] = 255;
    });
    brush.putImageData(image, 0, 0);
  };

  // As broad and high as the matrix, but never a mere line.
  const fit = (canvas, cells, broad, high) => {
    const aspect = Math.min(5, Math.max(0.2, cells.heat.width / cells.heat.height));
    const width = Math.min(broad, high * aspect);
    canvas.style.width = `${Math.round(width)}px`;
    canvas.style.height = `${Math.round(width / aspect)}px`;
  };

  const key = (cells) => {
    const { heat } = cells;
    const line = make("p", "", "heat-key");
    const single = heat.tall * heat.wide * heat.depth === 1; // a weight is kept or not: no shades between
    if (single) line.style.setProperty("--ramp", "var(--h3)");
    const words = single ? ["pruned", "kept"] : ["none", `to ${percent(100 * top(cells))} of a cell kept`];
    line.append(make("i"), make("span", words[0]), make("i"), make("span", words[1]));
    return line;
  };

  const span = (name, index, step, end) => {
    const first = index * step;
    const last = Math.min(first + step, end) - 1;
    return last > first ? `${name}s ${amount(first)}–${amount(last)}` : `${name} ${amount(first)}`;
  };
  const tell = (cells, row, column) => {
    const { heat } = cells;
    const kept = cells.count(row * cells.columns + column);
    const all = cells.size(row, column);
    const where = `${span("row", row, heat.tall, heat.height)}, ${span("column", column, heat.wide, heat.width)}`;
    return `${where}: ${amount(kept)} of ${amount(all)} kept (${percent((100 * kept) / all)})`;
  };

  const dialog = make("dialog", "", "heat-large");
  const large = { canvas: make("canvas"), mark: make("b"), row: 0, column: 0, at: 0, cells: null };
  const title = make("h2");
  const says = make("p");
  const told = make("p", "", "told");
  const scale = make("div");
  const field = make("div", "", "heat-field");

  const point = (row, column) => {
    const { cells } = large;
    large.row = Math.min(cells.rows - 1, Math.max(0, row));
    large.column = Math.min(cells.columns - 1, Math.max(0, column));
    large.mark.style.left = `${(100 * large.column) / cells.columns}%`;
    large.mark.style.top = `${(100 * large.row) / cells.rows}%`;
    large.mark.style.width = `${100 / cells.columns}%`;
    large.mark.style.height = `${100 / cells.rows}%`;
    told.textContent = tell(cells, large.row, large.column);
  };
  const open = (at) => {
    large.at = (at + every.length) % every.length;
    large.cells = read(every[large.at]);
    title.textContent = every[large.at].title;
    says.textContent = every[large.at].says;
    paint(large.canvas, large.cells);
    fit(large.canvas, large.cells, Math.min(0.88 * innerWidth, 900), 0.58 * innerHeight);
    scale.replaceChildren(key(large.cells));
    if (!dialog.open) dialog.showModal();
    point(0, 0);
    field.focus();
  };
  const moves = {
    ArrowUp: () => point(large.row - 1, large.column),
    ArrowDown: () => point(large.row + 1, large.column),
    ArrowLeft: () => point(large.row, large.column - 1),
    ArrowRight: () => point(large.row, large.column + 1),
    Home: () => point(large.row, 0),
    End: () => point(large.row, Infinity),
    PageUp: () => open(large.at - 1),
    PageDown: () => open(large.at + 1),
  };
  field.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move();
  });
  field.addEventListener("pointermove", (event) => {
    const box = large.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * large.cells.rows);
    point(row, Math.floor(((event.clientX - box.left) / box.width) * large.cells.columns));
  });

  const build = () => {
    title.id = "heat-large-title";
    dialog.setAttribute("aria-labelledby", title.id);
    told.setAttribute("aria-live", "polite");
    field.tabIndex = 0;
    field.setAttribute("role", "application");
    field.setAttribute("aria-label", "Cells of the picture; the arrow keys go from cell to cell");
    field.append(large.canvas, large.mark);
    const menu = make("menu");
    menu.append(button("Previous", () => open(large.at - 1)), button("Next", () => open(large.at + 1)));
    menu.append(button("Close", () => dialog.close()));
    const how = make("p", "Point at a cell or use the arrow keys; Page Up and Page Down change the tensor. Counted from 0.");
    dialog.append(title, says, told, field, scale, how, menu);
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    document.body.append(dialog);
  };

  const draw = (figure, at) => {
    const cells = read(every[at]);
    const old = figure.querySelector(".picture");
    const opener = old ?? button("", () => open(at));
    const canvas = old ? old.firstChild : make("canvas");
    paint(canvas, cells);
    fit(canvas, cells, SMALL, SMALL);
    if (!old) {
      opener.className = "picture";
      opener.setAttribute("aria-label", `Open the picture of ${every[at].title}`);
      opener.append(canvas);
      figure.append(opener);
    }
    figure.querySelector(".heat-key")?.remove();
    figure.append(key(cells));
  };
  const redraw = (all) => {
    figures.forEach((figure, at) => (all || figure.querySelector(".picture")) && draw(figure, at));
    if (!dialog.open) return;
    paint(large.canvas, large.cells);
    scale.replaceChildren(key(large.cells));
  };

  const choice = make("label", "", "heat-alike");
  choice.append(alike, "The same colours for all tensors, up to 100 %");
  alike.addEventListener("change", () => redraw(false));
  figures[0].parentNode.before(choice);
  build();
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((one) => one.isIntersecting)) {
        seen.unobserve(entry.target);
        draw(entry.target, figures.indexOf(entry.target));
      }
    },
    { rootMargin: "400px" },
  );
  figures.forEach((figure) => seen.observe(figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(false));
  for (const [name, on] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(name, () => {
      document.documentElement.classList.toggle("printing", on);
      redraw(on);
    });
  }
}
