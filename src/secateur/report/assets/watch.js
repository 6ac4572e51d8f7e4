import { chart, written } from "/watch_charts.js";

const EVERY = 2000;
const at = (id) => document.getElementById(id);
const seen = { runs: [], chosen: location.hash.slice(1), drawn: "" };

const ago = (seconds) => {
  const sizes = [[86400, "d"], [3600, "h"], [60, "min"]];
  const [size, unit] = sizes.find(([length]) => seconds >= length) ?? [1, "s"];
  return `${Math.floor(seconds / size)} ${unit} ago`;
};

const figure = (last, ends) => {
  const found = Object.keys(last).filter((key) => key === ends || key.endsWith(`/${ends}`));
  return last[found.find((key) => key.startsWith("test/")) ?? found[0]];
};

const percent = (value, factor = 1) => (value === undefined ? "–" : `${(factor * value).toFixed(2)} %`);

const cell = (text, kind = "number") => {
  const made = document.createElement("td");
  made.className = kind;
  made.textContent = text;
  return made;
};

const epochs = ({ now, last }) => {
  if (last.epoch === undefined) return "–";
  return now && now[1] === "train" && now[2] ? `${last.epoch} of ${now[2]}` : `${last.epoch}`;
};

const choose = (id) => {
  seen.chosen = id;
  seen.drawn = "";
  history.replaceState(null, "", `#${id}`);
  list();
  follow();
};

const line = (run) => {
  const row = document.createElement("tr"), head = document.createElement("th");
  const button = document.createElement("button"), title = document.createElement("small");
  head.scope = "row";
  button.type = "button";
  button.dataset.run = run.id;
  button.textContent = run.name;
  button.addEventListener("click", () => choose(run.id));
  title.textContent = run.title;
  head.append(button, title);
  const step = run.now ? `${run.now[0]} ${run.now[1]}, of ${run.steps.length}` : `${run.steps.length} done`;
  const state = document.createElement("td"), word = document.createElement("span");
  word.className = `state ${run.state}`;
  word.textContent = run.state;
  state.append(word);
  row.append(head, state, cell(step, ""), cell(epochs(run)), cell(percent(figure(run.last, "accuracy"))));
  row.append(cell(written(figure(run.last, "loss"))), cell(percent(figure(run.last, "sparsity"), 100)), cell(ago(run.quiet)));
  if (run.id === seen.chosen) row.setAttribute("aria-current", "true");
  return row;
};

const list = () => {
  const wanted = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const told = (run) => `${run.name} ${run.title} ${run.state}`.toLowerCase();
  const rows = seen.runs.filter((run) => wanted.every((word) => told(run).includes(word)));
  const before = document.activeElement?.dataset?.run;
  at("runs").replaceChildren(...rows.map(line));
  // A row that is written anew keeps the focus.
  if (before) document.querySelector(`button[data-run="${CSS.escape(before)}"]`)?.focus({ preventScroll: true });
};

const charts = (run) => {
  const found = new Map(), marks = [];
  let offset = 0;
  for (const stretch of run.stretches) {
    if (stretch.do !== "train") {
      marks.push([offset, `step ${stretch.number}: ${stretch.do}`]);
      continue;
    }
    for (const [key, points] of Object.entries(stretch.series)) {
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(...points.map(([x, y]) => [offset + x, y]));
    }
    offset += stretch.length;
  }
  const of = (kind, factor = 1) => [...found]
    .filter(([key, points]) => points.length && (key === kind || key.endsWith(`/${kind}`)))
    .map(([name, points]) => ({ name: name.replace("/", " "), points: points.map(([x, y]) => [x, factor * y]) }));
  const kinds = [
    { title: "Loss", y: "loss", series: of("loss") },
    { title: "Accuracy", y: "accuracy (%)", series: of("accuracy") },
    { title: "Sparsity", y: "weights pruned (%)", series: of("sparsity", 100), low: 0, high: 100 },
  ];
  return kinds.filter((kind) => kind.series.length).map((kind) => chart({ x: "optimizer step", marks, ...kind }));
};

const notes = (run) => {
  const odd = run.stretches.reduce((sum, stretch) => sum + (stretch.odd ?? 0), 0);
  const told = [];
  if (odd) told.push(`${odd} figures are not finite and are left out.`);
  if (run.stretches.some((stretch) => stretch.behind)) told.push("A long file is still being read.");
  return told.join(" ");
};

const show = (run) => {
  at("run").hidden = false;
  at("run-title").textContent = run.name;
  const step = run.now ? `step ${run.now[0]} of ${run.steps.length} (${run.now[1]})` : `all ${run.steps.length} steps are done`;
  at("run-says").textContent = `${run.title}: ${run.state}, ${step}; last written ${ago(run.quiet)}.`;
  at("run-notes").textContent = notes(run);
  const drawn = JSON.stringify(run.stretches);
  if (drawn === seen.drawn) return;
  seen.drawn = drawn;
  const made = charts(run);
  if (!made.length) at("run-notes").textContent = "No figures have been written yet.";
  at("charts").replaceChildren(...made);
};

const get = async (address) => {
  const answer = await fetch(address, { cache: "no-store", credentials: "omit" });
  return answer.ok ? answer.json() : null;
};

const follow = async () => {
  const id = seen.chosen;
  if (!id) return;
  try {
    const run = await get(`/curves.json?run=${encodeURIComponent(id)}`);
    if (id !== seen.chosen) return;
    if (run) show(run);
    else if (!at("run").hidden) at("run-says").textContent = "This run's folder is gone; what was read last is shown.";
  } catch {
    // The list tells that the server is away.
  }
};

const poll = async () => {
  const about = at("about");
  try {
    const found = await get("/runs.json");
    if (found) {
      seen.runs = found.runs;
      if (!seen.chosen && found.runs.length) seen.chosen = found.runs[0].id;
      const count = (state) => found.runs.filter((run) => run.state === state).length;
      const told = ["running", "unfinished", "finished", "damaged"].filter(count).map((state) => `${count(state)} ${state}`);
      about.textContent = told.length ? `${told.join(", ")}.` : "There is no run in these folders yet.";
      about.classList.remove("away");
      at("more").textContent = found.left_out ? `${found.left_out} older runs are not listed.` : "";
      list();
      await follow();
    }
  } catch {
    about.textContent = "The server does not answer; what was read last is shown. Trying again every two seconds.";
    about.classList.add("away");
  }
  setTimeout(poll, EVERY);
};

at("filter").addEventListener("input", list);
poll();
