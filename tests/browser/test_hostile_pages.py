"""Pages about hostile names, numbers that are none and folders that are not whole: shown safely, or told of."""

import json
import math

import pytest
from tests.report.conftest import full_run, layer_table, write_json
from tests.report.damage_kit import add_damage, made_up, measured, resample
from tests.report.many_kit import many_runs
from tests.report.test_page import HOSTILE

from secateur import report

SPELL = "<img src=x onerror=\"window.ran='{0}'\"><script>window.ran='{0}'</script>"
NAMES = [*HOSTILE[:7], '"><svg onload=window.ran=1>', "javascript:window.ran=1", "{{7*7}}${7*7}", "a" * 500]


@pytest.fixture
def quiet(visit):
    """Opens a page on which nothing of what was given to it has run."""
    opened = []

    def open_page(address, **options):
        page = visit(address, **options)
        page.on("dialog", lambda dialog: visit.faults.append(f"dialog: {dialog.message}"))
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        assert page.evaluate("window.ran ?? null") is None
        assert page.locator("main img[src='x'], main svg[onload], main b, main script").count() == 0


def test_hostile_layers_classes_and_networks_do_not_run(quiet, tmp_path, shot):
    layers = [{**row, "name": name} for row, name in zip(layer_table(), NAMES, strict=False)]
    run = add_damage(full_run(tmp_path / "run", layers=layers), names=tuple(NAMES[:3]), others=(NAMES[5], SPELL))
    arrays = made_up(200, 4, 3, 8)
    resample(run, lambda _: arrays)
    about = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**about, "title": SPELL.format("title")})
    page = quiet(report.write(run))
    page.locator(".stage").first.wait_for()
    assert page.locator("h1").inner_text() == SPELL.format("title")
    shown = page.locator("section#layers tbody th").all_inner_texts()
    assert any("<script>alert(1)</script>" in name for name in shown) and any("</script><img" in name for name in shown)
    for index in range(4):
        page.get_by_label("Colour").select_option(index=index)
    page.get_by_label("Pruned network").select_option("3")
    stage = page.locator(".stage").first
    stage.focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    page.locator(".detail").wait_for()
    page.locator("section#layers").get_by_role("searchbox").fill("<script>")
    assert page.locator("section#layers tbody tr:visible").count() == sum("<script>" in name for name in NAMES)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, "report-hostile")


def row_of(page, part, name):
    """The texts of the cells of a row."""
    head = page.locator(f"section#{part} tbody th").get_by_text(name, exact=True)
    return head.locator("xpath=ancestor::tr").locator("th, td").all_inner_texts()


def test_numbers_that_are_none_are_shown_as_words(quiet, tmp_path):
    layers = layer_table()
    layers[1] |= {"macs": math.nan, "macs_effective": math.inf}
    run = full_run(tmp_path / "run", layers=layers)
    folder = next(run.glob("1-train-*"))
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    rows[3] = '{"step": 40, "epoch": 1, "train/loss": NaN, "lr": Infinity}'
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    verdict = json.loads((measured(run) / "verdict.json").read_text())
    verdict["pruned"]["latency"] |= {"value": math.nan, "low": -math.inf}
    write_json(measured(run) / "verdict.json", verdict)
    page = quiet(report.write(run))
    text = page.locator("main").inner_text()
    assert "NaN" not in text and "undefined" not in text and "Infinity" not in text
    cells = {name: row_of(page, "verdict", name) for name in ("Time for one example", "Accuracy")}
    assert cells["Time for one example"][1].startswith("1.93 ms")
    assert cells["Time for one example"][2] == "not a number ms"  # without its interval, which is none either
    assert cells["Accuracy"][2].startswith("91.05 %")
    heads = page.locator("section#layers thead th").all_inner_texts()
    places = [next(i for i, text in enumerate(heads) if text.startswith(head)) for head in ("MACs", "Effective MACs")]
    assert [row_of(page, "layers", layers[1]["name"])[place] for place in places] == ["–", "–"]
    assert [row_of(page, "layers", layers[2]["name"])[place] for place in places] == ["2.359 M", "607.2 k"]


def test_a_truncated_log_and_missing_parts_are_told(quiet, tmp_path):
    run = full_run(tmp_path / "run")
    log = next(run.glob("1-train-*")) / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-37])
    (measured(run) / "verdict.json").write_text('{"dense": {"accuracy"')
    page = quiet(report.write(run))
    notes = page.locator("section#notes").inner_text()
    assert "1 line of 1-train-1c1f00aa/metrics.jsonl could not be read" in notes and "verdict.json" in notes
    assert page.get_by_role("heading", name="Training", exact=True).is_visible()


@pytest.mark.parametrize("kinds", [(), ("train",)])
def test_runs_without_a_measurement_have_a_page(quiet, tmp_path, kinds):
    run = full_run(tmp_path / "run", kinds=kinds)
    page = quiet(report.write(run))
    assert page.locator("h1").is_visible() and page.locator("main").inner_text().strip()


def test_an_empty_run_that_has_just_begun_has_a_page(quiet, tmp_path):
    write_json(tmp_path / "run" / "run.json", {"format": "secateur.run/1", "title": "begun", "seed": 0, "steps": []})
    page = quiet(report.write(tmp_path / "run"))
    assert "no step has begun" in page.locator("header").inner_text()


def test_the_compare_page_keeps_hostile_names_as_text(quiet, tmp_path):
    runs = many_runs(tmp_path / "runs")
    spelt = runs[0].rename(runs[0].parent / "<img src=x onerror=window.ran=1>")
    recipe = (runs[1] / "recipe.toml").read_text()
    (runs[1] / "recipe.toml").write_text(recipe.replace('"cifar10"', '"<script>window.ran=1<|script>"'))
    page = quiet(report.write_many([spelt, *runs[1:]], tmp_path / "page.html"))
    assert page.get_by_text("<img src=x onerror=window.ran=1>").count() >= 1
    area = page.locator(".overlay")
    area.get_by_label("First run").select_option(index=0)
    assert "<img" in area.inner_text() or area.locator("option", has_text="<img").count()
