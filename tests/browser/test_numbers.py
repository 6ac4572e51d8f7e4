"""Walks every number of a real report: the page shows those of the JSON, and these are those of the run folder."""

import json
import math
import re

import pytest

from secateur.core.masks import Masks

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
NUMBER = re.compile(r"^([+−]?)([\d,]+)(\.\d+)?(?:e([+−]\d+))?(.*)$", re.DOTALL)


@pytest.fixture(scope="module")
def folder(run):
    return Folder(run)


class Folder:
    """What the run folder holds: every number in its JSON files, and some tables by name."""

    def __init__(self, run):
        self.run, self.found = run, set()
        self.tables = {path.name: json.loads(path.read_text()) for path in sorted(run.glob("*/*.json"))}
        self.cards = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/card.json")}
        self.lines = [
            json.loads(line) for path in run.glob("*/metrics.jsonl") for line in path.read_text().splitlines()
        ]
        for entry in (*self.tables.values(), *self.cards.values(), *self.lines):
            self.take(entry)
        verdict = self.tables["verdict.json"]
        self.layers = {row["name"]: row for row in verdict["layers"]}
        self.steps = verdict["time"]["compiled"]
        self.in_torch = verdict["time"]["dense"]
        self.spent = verdict["time"]["dense_ms"]
        self.flips = self.tables["damage.json"]["changes"]["pruned"]["flips"]

    def take(self, entry):
        if isinstance(entry, dict | list):
            for part in entry.values() if isinstance(entry, dict) else entry:
                self.take(part)
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            self.found.add(entry)

    def holds(self, value):
        return any(value * factor in self.found for factor in (1, -1)) or any(
            close(value, 100 * one) for one in self.found
        )

    def compiled(self, name):
        return sum(s["ms"] for s in self.steps if name in s["tensors"] or (not s["tensors"] and s["node"] == name))

    def whole(self):
        return sum(s["ms"] for s in self.steps)

    def torch(self, name):
        return sum(row["ms"] for row in self.in_torch if name in row["tensors"])


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=0.0)


def cells(table):
    """Every cell with a number: section, name of the row, heading, cell, and the whole row by heading."""
    for part in table["sections"]:
        grid = part.get("table")
        heads = [column.get("name", "") for column in grid["columns"]] if grid else []
        for row in [*(grid or {}).get("rows", []), *([grid["total"]] if grid and grid.get("total") else [])]:
            named = dict(zip(heads, row, strict=True))
            for head, cell in named.items():
                if isinstance(cell.get("value"), int | float):
                    yield part["title"], row[0]["text"], head, cell, named


def derived(title, name, head, row, folder):
    """What a number that the folder does not hold as it stands must be, computed from what it does hold."""
    layer = folder.layers.get(name)
    if title == "Verdict" and head == "Change":
        return 100 * (row["Pruned"]["value"] / row["Dense"]["value"] - 1)
    if (
        head in ("Density", "Kept", "Share")
        and layer is not None
        and title in ("Layers", "Scores", "Forecast and truth by layer")
    ):
        return 100 * layer["kept"] / layer["weights"]
    if head in ("ms", "Compiled, ms"):
        return (
            folder.whole()
            if name == "all" and title != "Layers"
            else (sum(map(folder.compiled, folder.layers)) if name == "all" else folder.compiled(name))
        )
    if title == "Where the time goes":
        return {
            "Share": 100 * folder.compiled(name) / folder.whole() if name != "all" else 100.0,
            "Times as fast": folder.torch(name) / (folder.compiled(name) or math.nan),
            "Dense in torch, ms": folder.torch(name) or folder.spent,
        }[head]
    if title == "Forecast and truth by layer" and head == "Forecast / measured":
        return row["Rise forecast"]["value"] / row["Rise measured"]["value"]
    if title == "Training cost" and head == "Share":
        return 100 * row["MACs, sparse"]["value"] / row["MACs, dense"]["value"]
    if title == "Changed answers" and head == "Share of the lost":
        return 100 * row["Examples"]["value"] / folder.flips["right_wrong"]
    if title == "Curvature and flatness" and head == "Ratio":
        return row["Pruned"]["value"] / row["Dense"]["value"]
    if title == "Left alone" and head == "Tensors":
        return len(row["Names"]["text"].split(", "))
    return None


def test_every_number_is_that_of_the_run_folder(table, folder):
    seen, strange = 0, []
    for title, name, head, cell, row in cells(table):
        seen += 1
        wanted = derived(title, name, head, row, folder)
        if not (close(cell["value"], wanted) if wanted is not None else False) and not folder.holds(cell["value"]):
            strange.append((title, name, head, cell["value"], wanted))
    assert strange == [] and seen > 250


def test_the_counts_are_those_of_the_masks_themselves(table, folder):
    masks = Masks.load(next(folder.run.glob("3-train-*")) / "masks.safetensors")
    wanted = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    rows = [named for title, _, head, _, named in cells(table) if title == "Layers" and head == "Weights"]
    assert {r["Tensor"]["text"]: (r["Kept"]["value"], r["Weights"]["value"]) for r in rows[:-1]} == wanted
    assert (rows[-1]["Kept"]["value"], rows[-1]["Weights"]["value"]) == (masks.kept, masks.total)
    scores = next(part for part in table["sections"] if part["title"] == "Scores")
    whole = scores["chart"][0]
    pruned = sum(whole["pruned"]) + sum(row[-1]["value"] for row in scores["table"]["rows"])
    assert sum(whole["kept"]) == masks.kept and pruned == masks.total - masks.kept


def test_curves_are_those_of_the_metrics(table, folder):
    training = next(part for part in table["sections"] if part["title"] == "Training")
    rows = {
        key: {row[key] for row in folder.lines if key in row} for key in ("train/loss", "test/loss", "test/accuracy")
    }
    drawn = {(c["title"], s["name"]): [y for _, y in s["points"]] for c in training["chart"] for s in c["series"]}
    for title, name, key in (("Loss", "train loss", "train/loss"), ("Loss", "test loss", "test/loss"),
                             ("Accuracy", "test accuracy", "test/accuracy")):  # fmt: skip
        assert set(drawn[title, name]) == rows[key]


def shown(text):
    """The number that a text begins with, and half of its last digit; None where there is none."""
    found = NUMBER.match(text)
    if found is None:
        return None
    sign, whole, places, power, rest = found.groups()
    scale = 10.0 ** int(power.replace("−", "-")) if power else 1.0
    prefix = re.match(r"^\s([kMGTP])", rest)
    scale *= PREFIXES[prefix[1]] if prefix else 1.0
    number = float(whole.replace(",", "") + (places or ""))
    return (-1 if sign == "−" else 1) * number * scale, 0.5 * scale * 10.0 ** -(len(places) - 1 if places else 0)


def test_every_text_is_its_number_to_the_printed_digit(table):
    seen = 0
    for title, name, head, cell, _ in cells(table):
        found = shown(cell["text"])
        assert found is not None, (title, name, head, cell)
        number, half = found
        assert abs(number - cell["value"]) <= half * (1 + 1e-6) + 1e-12 * abs(number), (title, name, head, cell)
        seen += 1
    assert seen > 250


def test_the_page_shows_what_the_json_says(visit, run, table):
    page = visit(run / "report.html")
    assert page.evaluate("JSON.parse(document.getElementById('report').textContent)") == table
    read = page.evaluate(
        """() => [...document.querySelectorAll("main > section")].map((part) => ({
            title: part.querySelector("h2").textContent,
            says: part.querySelector("p.says")?.textContent,
            tiles: [...part.querySelectorAll("dl.tiles > div")].map((tile) => tile.querySelector(".big").textContent),
            rows: [...part.querySelectorAll("div.scroll table tbody tr, div.scroll table tfoot tr")].map((row) =>
                [...row.cells].map((cell) => [
                    cell.firstChild.textContent, cell.querySelector("small")?.textContent ?? "",
                    cell.dataset.value ?? null,
                ])),
            bars: [...part.querySelectorAll("figure svg")].map((svg) => svg.textContent).join(" "),
        }))"""
    )
    for part, section in zip(read, table["sections"], strict=False):
        plain = lambda text: text.replace("\u00a0", " ")  # noqa: E731
        assert (part["title"], plain(part["says"])) == (section["title"], section["says"])
        assert part["tiles"] == [tile["text"] for tile in section.get("tiles", [])]
        grid = section.get("table", {"rows": []})
        rows = [*grid["rows"], *([grid["total"]] if grid.get("total") else [])]
        assert len(part["rows"]) == len(rows)
        for cells_shown, row in zip(part["rows"], rows, strict=True):
            for (text, span, value), cell, column in zip(cells_shown, row, grid["columns"], strict=True):
                assert plain(text) == cell["text"] and span == cell.get("span", "")
                if column.get("numeric") and cell.get("value") is not None:
                    assert float(value) == float(cell["value"])
        for chart in section.get("chart", []):
            if chart["kind"] == "bars":
                assert all(text in part["bars"] for text in chart["texts"])
