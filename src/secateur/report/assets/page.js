"use strict";
// Turns the headings of sortable tables into buttons; without scripts the tables stay as they are.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!heads[column].classList.contains("number")) return cell.textContent;
    return cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
    return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : a - b;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numeric;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      const unknown = (value) => Number.isNaN(value);
      rows.sort((a, b) => (down && !unknown(a[0]) && !unknown(b[0]) ? compare(b[0], a[0]) : compare(a[0], b[0])));
      body.append(...rows.map((pair) => pair[1]));
    });
  });
}
// Above long tables: a box that filters their rows, and a button that writes the rows shown as CSV.
{
  const number = (cell) => (cell.dataset.value === undefined ? NaN : Number(cell.dataset.value));
  const tests = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "=": (a, b) => a === b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
  };
  const bare = (text) => text.toLowerCase().replace(/[\s,]/g, "");
  // "conv kept<100": every word is in the row, and a column whose heading begins so fulfils the comparison.
  const condition = (word, heads) => {
    const parts = /^([^<>=]+)(<=|>=|<|>|=)(-?[\d.,]+(?:e[+-]?\d+)?)$/.exec(word);
    const column = parts ? heads.findIndex((head) => bare(head).startsWith(bare(parts[1]))) : -1;
    if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
    return (row) => tests[parts[2]](number(row.cells[column]), Number(bare(parts[3])));
  };
  const text = (cell) => {
    if (cell.dataset.value !== undefined) return cell.dataset.value;
    if (cell.classList.contains("number")) return "";
    const folded = cell.querySelector("details"); // its summary only repeats how the text begins
    const words = (folded ? folded.lastChild : cell.firstChild)?.textContent ?? "";
    return /^[=+\-@\t\r]/.test(words) ? `'${words}` : words; // a spreadsheet would take it for a formula
  };
  const quoted = (words) => `"${words.replaceAll('"', '""')}"`;
  const csv = (heads, rows) => {
    const spans = heads.map((_, column) => rows.some((row) => row.cells[column].querySelector("small")));
    const line = (texts) => texts.map(quoted).join(",");
    const top = heads.flatMap((head, column) => (spans[column] ? [head, `${head}, 95 % interval`] : [head]));
    const body = rows.map((row) =>
      [...row.cells].flatMap((cell, column) =>
        spans[column] ? [text(cell), cell.querySelector("small")?.textContent ?? ""] : [text(cell)],
      ),
    );
    return [top, ...body].map((texts) => `${line(texts)}\r\n`).join("");
  };
  for (const table of document.querySelectorAll("table[data-tools]")) {
    const rows = () => [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
    const [tools, label, box, told, save] = ["div", "label", "input", "span", "button"].map((tag) =>
      document.createElement(tag),
    );
    const show = () => {
      const words = box.value.trim().toLowerCase().replace(/\s*([<>]=?|=)\s*/g, "$1");
      const conditions = words.split(/\s+/).map((word) => condition(word, heads));
      for (const row of rows()) row.hidden = !conditions.every((holds) => holds(row));
      told.textContent = `${rows().filter((row) => !row.hidden).length} of ${rows().length} rows`;
    };
    tools.className = "tools";
    box.type = "search";
    box.placeholder = `name, or ${(table.tHead.querySelector("th.number") ?? table.tHead).textContent} < 10`;
    box.addEventListener("input", show);
    label.append("Filter rows", box);
    told.setAttribute("role", "status");
    save.type = "button";
    save.className = "save";
    save.textContent = "Download as CSV";
    save.addEventListener("click", () => {
      const link = document.createElement("a");
      const shown = csv(heads, rows().filter((row) => !row.hidden));
      link.href = URL.createObjectURL(new Blob(["\ufeff", shown], { type: "text/csv" }));
      link.download = `${table.closest("section")?.id ?? "table"}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    });
    tools.append(label, told, save);
    table.closest(".scroll").before(tools);
    show();
  }
}
