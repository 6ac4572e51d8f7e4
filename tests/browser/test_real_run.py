"""A page about a real run, used as a reader would: sections, tables, pictures, points, dark, print, keyboard."""

import csv
import re

import pytest

from secateur.core.masks import Masks

SECTIONS = [
    "Verdict", "Baselines", "Layers", "Masks", "Where the time goes", "Forecast and truth",
    "Forecast and truth by layer", "Training", "Training cost", "Scores", "Curvature and flatness", "Probes", "Damage",
    "Changed answers", "Calibration", "Corruptions", "Features", "Left alone", "Repeat",
]  # fmt: skip


@pytest.fixture
def page(visit, run):
    return visit(run / "report.html")


def section(table, title):
    return next(s for s in table["sections"] if s["title"] == title)


def area(page, title):
    return page.locator("main > section", has=page.get_by_role("heading", name=title, exact=True, level=2))


def said(page):
    return area(page, "Features").locator(".said").first


def selected(page):
    """How many samples the page says are selected, of how many."""
    found = re.match(r"([\d,]+) of ([\d,]+) samples selected", said(page).inner_text())
    return tuple(int(number.replace(",", "")) for number in found.groups())


def drag(page, stage, share):
    """Draws a rectangle over the left part of a panel."""
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] - 4)
    page.mouse.up()


def test_every_section_is_there_and_its_picture_is_kept(page, shot, run, table):
    parts = page.locator("main > section")
    assert [s["title"] for s in table["sections"]] == SECTIONS
    assert parts.locator("h2").all_inner_texts() == SECTIONS + (["What is missing"] if table.get("notes") else [])
    assert page.locator("nav a").all_inner_texts() == SECTIONS
    page.locator(".stage").first.wait_for()
    for place in range(parts.count()):
        part = parts.nth(place)
        part.scroll_into_view_if_needed()
        shot(part, f"report-{place:02d}-{part.get_attribute('id')}")
    assert (run / "report.html").stat().st_size < 3_000_000


def test_the_layers_are_sorted_filtered_and_saved(page, table, tmp_path):
    layers = area(page, "Layers")
    rows = section(table, "Layers")["table"]["rows"]
    heads = [column["name"] for column in section(table, "Layers")["table"]["columns"]]
    for _ in range(2):
        layers.get_by_role("button", name=re.compile("^Weights")).click()
    column = heads.index("Weights")
    shown = [
        int(cell.get_attribute("data-value")) for cell in layers.locator(f"tbody tr > :nth-child({column + 1})").all()
    ]
    assert shown == sorted(row[column]["value"] for row in rows)
    few = sorted(row[column]["value"] for row in rows)[1]
    layers.get_by_role("searchbox").fill(f"weights<={few}")
    assert layers.locator("tbody tr:visible").count() == 2
    with page.expect_download() as loading:
        layers.get_by_role("button", name="Download as CSV").click()
    assert loading.value.suggested_filename == "layers.csv"
    loading.value.save_as(tmp_path / "layers.csv")
    lines = list(csv.DictReader((tmp_path / "layers.csv").read_text(encoding="utf-8-sig").splitlines()))
    wanted = {row[0]["text"]: row[column]["value"] for row in rows if row[column]["value"] <= few}
    assert {line["Tensor"]: int(line["Weights"]) for line in lines} == wanted


def test_a_mask_opens_large_and_tells_its_cells(page, run, table, shot):
    masks = Masks.load(next(run.glob("3-train-*")) / "masks.safetensors")
    charts = section(table, "Masks")["chart"]
    name = charts[-1]["title"]
    part = area(page, "Masks")
    part.scroll_into_view_if_needed()
    part.locator("figure.heat").last.locator("canvas").first.click()
    dialog = page.locator("dialog[open]")
    dialog.wait_for()
    assert name in dialog.inner_text()
    kept, size = int(masks[name].sum()), masks[name].numel()
    assert f"{kept:,} of {size:,} weights kept" in dialog.inner_text()
    shot(page, "report-mask-large", full_page=False)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


def test_points_are_brushed_in_both_panels_and_clicked(page, table, shot):
    explorer = section(table, "Features")["explorer"]
    stages = area(page, "Features").locator(".stage")
    stages.last.wait_for()
    clean = selected(page)[1]
    assert clean <= explorer["count"] and selected(page) == (clean, clean)
    drag(page, stages.first, 0.5)
    page.wait_for_function("n => !document.querySelector('.said').textContent.startsWith(n)", arg=f"{clean:,} ")
    half = selected(page)[0]
    assert 0 < half < clean
    means = area(page, "Features").locator(".spread p").all_inner_texts()
    shot(area(page, "Features"), "report-brushed")
    page.get_by_label("changed answers only").check()
    answers = explorer_rows(page, "predictions")
    kind = explorer_rows(page, "kind") if explorer.get("kinds") else [0] * explorer["count"]
    count = explorer["count"]
    changed = sum(a != b and k == 0 for a, b, k in zip(answers[:count], answers[count : 2 * count], kind, strict=True))
    assert selected(page) == (changed, clean)
    page.get_by_label("changed answers only").uncheck()
    assert area(page, "Features").locator(".spread p").all_inner_texts() != means
    stages.first.focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    detail = area(page, "Features").locator(".detail")
    detail.wait_for()
    assert f"test example {explorer_rows(page, 'index')[0]}" in detail.inner_text()
    box = stages.first.bounding_box()
    for step in range(1, 40):
        stages.first.click(position={"x": box["width"] * step / 40, "y": box["height"] * 0.8})
    assert detail.locator("tbody th").all_inner_texts()[:2] == ["answer", "confidence"]


def explorer_rows(page, name):
    """An array of the explorer, unpacked from the page itself."""
    return page.evaluate(
        """(name) => {
            const table = JSON.parse(document.getElementById("report").textContent);
            const { explorer } = table.sections.find((part) => part.explorer);
            const packed = explorer.arrays.find((array) => array.name === name);
            return [...new Int32Array(Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0)).buffer)];
        }""",
        name,
    )


def test_classes_hard_and_corrupted_samples_are_filtered(page, table):
    explorer = section(table, "Features")["explorer"]
    area(page, "Features").locator(".stage").last.wait_for()
    targets, clean = explorer_rows(page, "targets"), selected(page)[1]
    chosen = page.locator(".knobs label").filter(has_text=re.compile("^Class")).locator("select")
    label = chosen.locator("option").nth(3).inner_text()
    chosen.select_option(index=3)
    number = int(chosen.input_value())
    assert selected(page) == (targets[:clean].count(number), clean)
    assert label.endswith(f"({targets[:clean].count(number)})")
    chosen.select_option(index=0)
    page.get_by_label("hard only", exact=False).check()
    assert 0 < selected(page)[0] <= clean // 8
    page.get_by_label("hard only", exact=False).uncheck()
    if not explorer.get("kinds"):
        pytest.skip("digits of 8 by 8 pixels have no corrupted copies here")
    kinds = explorer_rows(page, "kind")
    for number in range(1, len(explorer["kinds"])):
        page.get_by_label("Inputs").select_option(str(number))
        assert selected(page) == (kinds.count(number), kinds.count(number))
    page.get_by_label("Inputs").select_option("-1")
    assert selected(page) == (len(kinds), len(kinds))


@pytest.mark.parametrize("colour", ["right", "change", "angle", "length", "margin"])
def test_points_are_coloured_by_answers_and_metrics(page, colour):
    part = area(page, "Features")
    part.locator(".stage").last.wait_for()
    before = part.locator("ul.key").first.inner_text()
    part.get_by_label("Colour").select_option(colour)
    assert part.locator("ul.key").first.inner_text() != before
    assert part.locator("canvas").first.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 2"
    )


def test_dark_narrow_and_printed(visit, run, shot):
    page = visit(run / "report.html", color_scheme="dark", viewport={"width": 400, "height": 800})
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(18, 23, 28)"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.locator(".stage").first.wait_for()
    shot(page, "report-dark-narrow")
    page.set_viewport_size({"width": 1000, "height": 900})
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert (
        not page.locator("nav").is_visible()
        and not page.get_by_role("button", name="Download as CSV").first.is_visible()
    )
    shot(page, "report-print")
    assert page.pdf().startswith(b"%PDF")


def test_the_keyboard_reaches_everything_that_can_be_used(page):
    page.locator(".stage").last.wait_for()
    reached, last = set(), None
    for _ in range(400):
        page.keyboard.press("Tab")
        now = page.evaluate(
            """() => {
                const at = document.activeElement;
                if (at === document.body) return null;
                const style = getComputedStyle(at);
                at.dataset.seen = at.dataset.seen ?? String(document.querySelectorAll("[data-seen]").length);
                const seen = style.outlineStyle !== "none" || style.boxShadow !== "none";
                return [at.dataset.seen, at.tagName, at.className, seen];
            }"""
        )
        if now is None or (now[0] == "0" and last not in (None, "0")):
            break
        last = now[0]
        reached.add((now[1], now[2].split(" ")[0]))
        assert now[3], f"no focus is seen on {now}"
    wanted = {
        ("A", ""),
        ("BUTTON", ""),
        ("INPUT", ""),
        ("SELECT", ""),
        ("DIV", "stage"),
        ("DIV", "scroll"),
        ("PRE", ""),
    }
    assert wanted <= reached


def test_pictures_for_the_documentation(page, shot):
    """The first screen, the masks and the features; ``make pictures`` keeps them in docs/images."""
    page.set_viewport_size({"width": 1060, "height": 525})
    shot(page, "verdict", full_page=False)
    shot(area(page, "Masks"), "masks")
    drag(page, page.locator(".stage").first, 0.45)
    shot(area(page, "Features"), "features")
