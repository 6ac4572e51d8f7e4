import csv
import json

import pytest
from tests.report.many_kit import many_runs

from secateur import report


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The page of fourteen runs of two networks, and its figures."""
    root = tmp_path_factory.mktemp("many")
    page = report.write_many(many_runs(root / "runs"), root / "page.html")
    return page, json.loads(page.with_suffix(".json").read_text())


def section(table, title):
    return next(s for s in table["sections"] if s["title"] == title)


def test_one_choice_shows_one_axis_in_every_section(visit, shot, many):
    page = visit(many[0])
    choices = page.locator("fieldset.choose").first.locator("label").all_inner_texts()
    names = [text.strip() for text in choices]
    assert names == ["Parameters kept", "Effective MACs", "File, compressed", "Time"]
    assert page.locator("figure[data-choice]:visible").count() == 4  # two small ones, and one a network
    for name in names:
        page.locator("fieldset.choose").last.get_by_label(name, exact=True).check()
        shown = page.locator("figure[data-choice]:visible")
        assert shown.count() == 4
        assert {shown.nth(i).get_attribute("data-choice") for i in range(4)} == {name}
        assert page.locator("fieldset.choose input:checked").count() == 3
    page.locator("fieldset.choose").first.get_by_label("Parameters kept").check()
    shot(page, "compare-light")


def test_every_section_has_its_picture(visit, shot, many):
    page = visit(many[0])
    parts = page.locator("main > section")
    assert parts.locator("h2").all_inner_texts() == [part["title"] for part in many[1]["sections"]]
    for place in range(parts.count()):
        shot(parts.nth(place), f"compare-{place:02d}-{parts.nth(place).get_attribute('id')}")


def test_the_pareto_front_is_ringed_with_its_names(visit, many):
    page = visit(many[0])
    chart = section(many[1], "resnet20 on cifar10")["chart"][0]
    rings = page.locator("section#resnet20-on-cifar10 figure:visible circle.ring title").all_text_contents()
    assert rings == [f"on the Pareto front: {name}" for _, _, name in chart["front"]]
    assert len(rings) == 3 and all("gradual" in ring for ring in rings)
    ranges = page.locator("section#resnet20-on-cifar10 figure:visible line.range")
    assert ranges.count() == 3 * 6  # an interval and its two ends for each of the six settings


def test_the_table_sorts_filters_and_is_saved_as_csv(visit, many, tmp_path):
    page = visit(many[0])
    area = page.locator("section#runs")
    area.get_by_role("button", name="Accuracy").click()
    shown = [float(cell.get_attribute("data-value")) for cell in area.locator("tbody tr td:nth-child(5)").all()]
    wanted = [row[4]["value"] for row in section(many[1], "Runs")["table"]["rows"]]
    assert shown == sorted(wanted, reverse=True)
    area.get_by_role("searchbox").fill("acdc accuracy<90")
    rows = area.locator("tbody tr:visible")
    every = section(many[1], "Runs")["table"]["rows"]
    fewer = [row for row in every if "acdc" in row[2]["text"] and row[4]["value"] < 90]
    assert rows.count() == len(fewer) == 4
    with page.expect_download() as loading:
        area.get_by_role("button", name="Download as CSV").click()
    loading.value.save_as(tmp_path / "runs.csv")
    lines = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert {line["Run"]: float(line["Accuracy"]) for line in lines} == {r[0]["text"]: r[4]["value"] for r in fewer}


def test_two_runs_are_laid_over_one_another(visit, shot, many):
    page = visit(many[0])
    overlay = section(many[1], "Layer densities")["overlay"]
    area = page.locator(".overlay")
    names = [run["name"] for run in overlay["runs"]]
    assert area.get_by_label("First run").locator("option").all_text_contents() == names
    area.get_by_label("Second run").select_option(label=names[5])
    bars = area.locator("rect.p1 title")
    tensors = overlay["tensors"][0]
    wanted = [f"{t}, {names[5]}: {kept:.2f} %" for t, kept in zip(tensors, overlay["runs"][5]["kept"], strict=True)]
    assert bars.all_text_contents() == wanted
    assert names[5] in area.locator("p").inner_text()
    assert area.locator("rect.p0").count() == len(tensors)
    shot(page, "compare-overlay")


def test_dark_mode_print_and_keyboard(visit, shot, many):
    page = visit(many[0], color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shot(page, "compare-dark")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark
    first = page.locator("fieldset.choose input").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("fieldset.choose input:checked").first.get_attribute("value") == "Effective MACs"
    assert page.locator("figure:visible").first.get_attribute("data-choice") == "Effective MACs"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()


def test_without_scripts_all_charts_are_shown(visit, many):
    page = visit(many[0], java_script_enabled=False)
    charts = [chart for part in many[1]["sections"] for chart in part.get("chart", [])]
    assert page.locator("figure:visible").count() == len(charts)
