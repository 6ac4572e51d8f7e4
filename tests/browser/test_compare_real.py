"""The page of eighteen real runs: its figures are those of the runs' own files, and it is used as a reader would."""

import csv
import json
import math
import re

import pytest
from tests.browser.printed_kit import BYTES, COUNT, MS, PERCENT, SCALED, Style, Want, cell_faults, close

TITLE = "mlp on digits"
SECTIONS = ["Verdict", TITLE, f"{TITLE}: figures", "Layer densities", "Runs", "How to read it"]
COSTS = {"Parameters kept": COUNT, "Effective MACs": SCALED, "File on disk": BYTES, "File, compressed": BYTES,
         "Time": MS, "Time, compiled": MS}  # fmt: skip
CHANGE = Style(places=2, signed=True)
STUDENT = {2: 12.706204736432095, 4: 3.182446305284263}
"""Half widths of 95 % intervals of a mean of so many, in standard errors."""


@pytest.fixture
def page(visit, runs):
    return visit(runs / "page.html")


@pytest.fixture(scope="module")
def made(runs):
    return json.loads((runs / "page.json").read_text())


@pytest.fixture(scope="module")
def files(runs):
    """What the files of each run tell of it, by the name of the run."""
    found = {}
    for path in sorted(runs.glob("tiny/*/result.json")):
        found[f"tiny/{path.parent.name}"] = of_result(json.loads(path.read_text()))
    for seed in (0, 1):
        verdict = json.loads(next(runs.glob(f"run-{seed}/*-measure-*/verdict.json")).read_text())
        found[f"run-{seed}"] = of_verdict(verdict, seed)
    return found


def of_result(result):
    costs = {
        "Parameters kept": result["params_kept"],
        "Effective MACs": result["macs"],
        "File on disk": result["bytes"],
    }
    return {"setting": (result["method"], result["sparsity"]), "seed": result["seed"], "accuracy": result["accuracy"],
            "span": (result["low"], result["high"]), "costs": costs}  # fmt: skip


def of_verdict(verdict, seed):
    dense, pruned = verdict["dense"], verdict["pruned"]
    right = pruned["accuracy"]
    return {"setting": ("magnitude", 0.8), "seed": seed, "accuracy": right["value"],
            "span": (right["low"], right["high"]), "change": verdict["change"]["accuracy"]["value"],
            "dense": dense["accuracy"]["value"], "costs": costs_of(pruned), "before": costs_of(dense)}  # fmt: skip


def costs_of(side):
    return {
        "Parameters kept": side["cost"]["parts"]["params_kept"],
        "Effective MACs": side["cost"]["parts"]["macs_effective"],
        "File on disk": side["disk"]["value"],
        "File, compressed": side["disk"]["parts"]["weights compressed"],
        "Time": side["latency"]["value"],
        "Time, compiled": side["compiled"]["value"],
    }


def section(table, title):
    return next(part for part in table["sections"] if part["title"] == title)


def area(page, title):
    return page.locator("main > section", has=page.get_by_role("heading", name=title, exact=True, level=2))


def grid(made, title):
    """Rows by heading, the total among them."""
    found = section(made, title)["table"]
    heads = [column["name"] for column in found["columns"]]
    rows = [*found["rows"], *([found["total"]] if found.get("total") else [])]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def faults(row, wanted):
    """What is not so in a row; a number without a rule is a fault."""
    found = [(head, cell_faults(row[head], want)) for head, want in wanted.items() if cell_faults(row[head], want)]
    return found + [
        head for head, cell in row.items() if isinstance(cell.get("value"), int | float) and head not in wanted
    ]


def pruned(files):
    return {name: one for name, one in files.items() if one["setting"][0] != "dense"}


def change_of(one, files):
    """The change from the dense network of the same run or seed."""
    return one["change"] if "change" in one else one["accuracy"] - files[f"tiny/dense-0-{one['seed']}"]["accuracy"]


def test_each_run_has_the_figures_of_its_files(made, files):
    rows = {row["Run"]["text"]: row for row in grid(made, "Runs")}
    assert rows.keys() == pruned(files).keys() and len(rows) == 18
    for name, one in pruned(files).items():
        wanted = {"Seed": Want(one["seed"], COUNT), "Accuracy": Want(one["accuracy"], PERCENT, *one["span"]),
                  "Change": Want(change_of(one, files), CHANGE)}  # fmt: skip
        wanted |= {head: Want(value, COSTS[head]) for head, value in one["costs"].items()}
        assert faults(rows[name], wanted) == [], name
        method, sparsity = one["setting"]
        assert rows[name]["Method"]["text"].startswith(method)
        assert rows[name]["Method"]["text"].endswith(f"at sparsity {sparsity:g}")


def mean(values):
    return math.fsum(values) / len(values)


def half(values):
    """Half of Student's interval of the mean."""
    spread = math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))
    return STUDENT[len(values)] * spread / math.sqrt(len(values))


def settings(files):
    """The runs of each setting, by method and what was asked for."""
    found = {}
    for one in pruned(files).values():
        found.setdefault(one["setting"], []).append(one)
    return found


def cut(values, least):
    """A mean with its interval, which ends where no value can be."""
    return (mean(values), max(least, mean(values) - half(values)), min(100.0, mean(values) + half(values)))


def test_each_setting_has_the_means_of_its_runs(made, files):
    rows = {(row["Method"]["text"].split(" (")[0], row["Target"]["text"]): row for row in grid(made, SECTIONS[2])}
    total = rows.pop(("dense network", "–"))
    assert rows.keys() == {(method, f"sparsity {sparsity:g}") for method, sparsity in settings(files)}
    for (method, sparsity), mine in settings(files).items():
        row = rows[method, f"sparsity {sparsity:g}"]
        right, low, high = cut([one["accuracy"] for one in mine], 0.0)
        changes = [change_of(one, files) for one in mine]
        wanted = {"Accuracy": Want(right, PERCENT, low, high), "Runs": Want(len(mine), COUNT)}
        wanted["Change"] = Want(mean(changes), CHANGE, mean(changes) - half(changes), mean(changes) + half(changes))
        wanted |= {head: Want(mean([one["costs"][head] for one in mine]), COSTS[head]) for head in mine[0]["costs"]}
        assert faults(row, wanted) == [], (method, sparsity)
    dense = [one["accuracy"] for one in files.values() if one["setting"][0] == "dense"]
    dense += [one["dense"] for one in files.values() if "dense" in one]
    right, low, high = cut(dense, 0.0)
    assert faults({head: total[head] for head in ("Accuracy", "Runs")},
                  {"Accuracy": Want(right, PERCENT, low, high), "Runs": Want(4, COUNT)}) == []  # fmt: skip


def unbeaten(files, head):
    """Settings that nothing beats: what costs at most as much is at most as accurate, and one of both is less."""
    places = {s: (mean([o["costs"][head] for o in mine]), mean([o["accuracy"] for o in mine]))
              for s, mine in settings(files).items() if head in mine[0]["costs"]}  # fmt: skip
    dense = [(one["costs"], one["accuracy"]) for one in files.values() if one["setting"][0] == "dense"]
    dense += [(one["before"], one["dense"]) for one in files.values() if "before" in one]
    rivals = [*places.values(), (mean([c[head] for c, _ in dense if head in c]), mean([right for _, right in dense]))]
    return {
        (method, sparsity, *place)
        for (method, sparsity), place in places.items()
        if not any(cost <= place[0] and right >= place[1] and (cost, right) != place for cost, right in rivals)
    }


def test_charts_draw_the_means_and_ring_what_nothing_beats(made, files):
    charts = {chart["choice"]: chart for chart in section(made, TITLE)["chart"]}
    assert len(charts) == len(section(made, TITLE)["chart"]) >= 4
    for head, chart in charts.items():
        wanted = sorted(
            (mean([one["costs"][head] for one in mine]), *cut([one["accuracy"] for one in mine], 0.0))
            for mine in settings(files).values()
            if head in mine[0]["costs"]
        )
        drawn = sorted(tuple(point) for series in chart["series"] for point in series["points"])
        assert len(drawn) == len(wanted)
        assert all(close(a, b) for one, two in zip(drawn, wanted, strict=True) for a, b in zip(one, two, strict=True))
        ringed = {(round(x, 6), round(y, 6)) for x, y, _ in chart.get("front", [])}
        assert ringed == {(round(x, 6), round(y, 6)) for _, _, x, y in unbeaten(files, head)}


def test_layer_densities_are_those_of_the_masks(made, runs):
    overlay = section(made, "Layer densities")["overlay"]
    for run in overlay["runs"]:
        mine, names = counts(runs / run["name"]), overlay["tensors"][run["tensors"]]
        assert names == list(mine)
        wanted = [100 * mine[name][0] / mine[name][1] for name in names]
        assert all(abs(a - b) <= 5.1e-5 for a, b in zip(run["kept"], wanted, strict=True))
    assert len(overlay["runs"]) == 18


def counts(run):
    """Kept and all weights by tensor, from the card of the network that a run ended with."""
    last = [step for step in json.loads((run / "run.json").read_text())["steps"] if step["do"] != "measure"][-1]
    return json.loads((run / last["folder"] / "card.json").read_text())["counts"]


def test_every_section_is_there_and_its_table_is_that_of_the_json(page, made, shot):
    assert [part["title"] for part in made["sections"]] == SECTIONS and not made.get("notes")
    parts = page.locator("main > section")
    assert parts.locator("h2").all_inner_texts() == SECTIONS
    assert page.locator("nav a").all_inner_texts() == SECTIONS
    for place, part in enumerate(made["sections"]):
        shot(parts.nth(place), f"many-{place:02d}-{parts.nth(place).get_attribute('id')}")
        if "table" in part:
            lines = parts.nth(place).locator("table tbody tr, table tfoot tr")
            read = lines.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
            rows = [*part["table"]["rows"], *filter(None, [part["table"].get("total")])]
            assert [[text.replace("\u00a0", " ") for text in line] for line in read] == [
                [cell["text"] + cell.get("span", "") for cell in row] for row in rows
            ]


def test_one_axis_is_shown_at_a_time(page, made):
    charts = section(made, TITLE)["chart"]
    names = list(dict.fromkeys(chart["choice"] for chart in charts))
    part = area(page, TITLE)
    choose = part.locator("fieldset.choose")
    assert [text.strip() for text in choose.locator("label").all_inner_texts()] == names
    for name in reversed(names):
        choose.get_by_label(name, exact=True).check()
        shown = part.locator("figure[data-choice]:visible")
        assert shown.count() == sum(chart["choice"] == name for chart in charts)
        assert {shown.nth(i).get_attribute("data-choice") for i in range(shown.count())} == {name}
        chart = next(chart for chart in charts if chart["choice"] == name)
        rings = shown.locator("circle.ring title").all_text_contents()
        assert rings == [f"on the Pareto front: {called}" for _, _, called in chart.get("front", [])]


def test_runs_are_sorted_filtered_and_saved(page, files, tmp_path):
    part, mine = area(page, "Runs"), pruned(files)
    heads = [text.strip() for text in part.locator("thead th").all_inner_texts()]
    place = next(i for i, text in enumerate(heads) if text.startswith("Effective MACs"))
    part.get_by_role("button", name="Effective MACs").click()
    cells = part.locator(f"tbody tr > :nth-child({place + 1})").all()
    shown = [float(cell.get_attribute("data-value")) for cell in cells]
    assert shown == sorted((one["costs"]["Effective MACs"] for one in mine.values()), reverse=True)
    gradual = {name: one for name, one in mine.items() if one["setting"][0] == "gradual"}
    middle = round(mean([one["accuracy"] for one in gradual.values()]), 2)
    few = {name: one for name, one in gradual.items() if one["accuracy"] < middle}
    part.get_by_role("searchbox").fill(f"gradual accuracy<{middle}")
    assert 0 < len(few) < 4 and part.locator("tbody tr:visible").count() == len(few)
    with page.expect_download() as loading:
        part.get_by_role("button", name="Download as CSV").click()
    loading.value.save_as(tmp_path / "runs.csv")
    lines = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert {line["Run"]: float(line["Accuracy"]) for line in lines} == {n: one["accuracy"] for n, one in few.items()}
    assert {line["Run"]: float(line["Parameters kept"]) for line in lines} == {
        name: one["costs"]["Parameters kept"] for name, one in few.items()
    }


def test_a_measured_run_is_laid_over_one_of_the_comparison(page, made, shot):
    overlay = section(made, "Layer densities")["overlay"]
    part = page.locator(".overlay")
    chosen = [next(run for run in overlay["runs"] if run["name"] == name) for name in ("run-1", "tiny/random-0.9-0")]
    for label, run in zip(("First run", "Second run"), chosen, strict=True):
        part.get_by_label(label).select_option(label=run["name"])
    for place, run in enumerate(chosen):
        titles = [text.rsplit(": ", 1) for text in part.locator(f"rect.p{place} title").all_text_contents()]
        assert [name for name, _ in titles] == [f"{t}, {run['name']}" for t in overlay["tensors"][run["tensors"]]]
        assert all(Want(kept, PERCENT).shown(text) for (_, text), kept in zip(titles, run["kept"], strict=True))
        assert run["name"] in part.locator("p").inner_text()
    shot(part, "many-overlay")


def test_dark_narrow_and_printed(visit, runs, shot):
    page = visit(runs / "page.html", color_scheme="dark", viewport={"width": 400, "height": 800})
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, "many-dark-narrow")
    page.set_viewport_size({"width": 1000, "height": 900})
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert not page.get_by_role("button", name="Download as CSV").first.is_visible()
    shot(page, "many-print")
    assert page.pdf().startswith(b"%PDF")
