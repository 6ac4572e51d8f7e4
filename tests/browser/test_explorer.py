"""The feature view, mask pictures and links of made-up runs: what is brushed, filtered, printed and reached by keys."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.report.conftest import full_run
from tests.report.damage_kit import add_damage, made_up, resample, rewrite
from tests.report.many_kit import many_runs
from tests.report.test_page import HOSTILE, contrast

from secateur import report
from secateur.core.masks import Masks
from secateur.report.maskfile import NAME
from secateur.report.page import to_html
from secateur.report.sections import Section

KINDS = ("contrast", "jpeg")
PIXELS = "c => [...new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)]"
EDGES = """() => [...document.querySelectorAll("select, button, input:not([type=checkbox], [type=radio])")]
    .map((one) => [one, getComputedStyle(one)]).filter(([one, style]) => parseFloat(style.borderTopWidth) > 0)
    .map(([one, style]) => [one.outerHTML.slice(0, 80), style.borderTopColor])"""


@pytest.fixture
def sampled(tmp_path):
    """A run of three networks with 300 made-up samples, and its arrays."""

    def make(names=None, copies=False, others=("wanda",)):
        run = add_damage(full_run(tmp_path / "run"), names=names, others=others)
        arrays = made_up(n=300, networks=2 + len(others), classes=3, side=8)
        more = spoilt(arrays) if copies else {}
        resample(run, lambda _: arrays | {f"copies.{name}": array for name, array in more.items()})
        if copies:
            rewrite(run, lambda table: {**table, "samples": {**table["samples"], "kinds": KINDS, "severity": 3}})
        return run, arrays, more

    return make


def spoilt(arrays):
    """Copies of two kinds, every third sample first; all of their margins are below those of the samples."""
    rows = np.concatenate([np.arange(0, 300, 3), np.arange(1, 300, 4)])
    one = ("index", "targets", "images")
    copies = {name: array[rows] if name in one else array[:, rows] for name, array in arrays.items()}
    copies["margin"] = copies["margin"] * 0.01 - 1
    return {**copies, "kind": np.repeat([0, 1], [100, 75])}


@pytest.fixture
def feature(visit):
    """Opens a page and waits until its points can be brushed."""

    def open_page(run, **options):
        page = visit(report.write(run), **options)
        page.locator(".said").filter(has_text="samples selected").first.wait_for()
        return page

    return open_page


def said(page):
    return page.locator(".said").first


def selected(page):
    return int(re.match(r"([\d,]+) of", said(page).inner_text())[1].replace(",", ""))


def test_samples_are_brushed_walked_filtered_and_shown(feature, sampled):
    run, arrays, _ = sampled(names=(HOSTILE[1], HOSTILE[0], "z" * 500))
    page = feature(run)
    stage, expect = page.locator(".stage").first, pytest.importorskip("playwright.sync_api").expect
    expect(said(page)).to_contain_text("300 of 300 samples selected")
    stage.scroll_into_view_if_needed()
    box, middle = stage.bounding_box(), stage.evaluate("one => one.clientWidth / 2")
    page.mouse.move(box["x"] + 2, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(box["x"] + middle + 1, box["y"] + box["height"] - 3)
    page.mouse.up()
    expect(said(page)).not_to_contain_text("300 of 300")
    x, answers = arrays["pca"][:2, :, 0], arrays["predictions"]
    left = int((x[0] <= (x.min() + x.max()) / 2).sum())
    assert abs(selected(page) - left) <= 2 and 20 < left < 280  # a pixel holds some points
    page.keyboard.press("Escape")  # the mouse gave no focus to the panel
    stage.focus()
    for key in ("Escape", "PageDown", "PageDown"):
        page.keyboard.press(key)
    expect(said(page)).to_contain_text("Test example 3, label")
    page.keyboard.press("Enter")
    cells = page.locator(".detail tbody td").all_inner_texts()
    for row, name in zip((2, 3, 4), ("angle", "length", "margin"), strict=True):
        assert [float(text) for text in cells[2 * row : 2 * row + 2]] == [
            float(f"{value:.4g}") for value in arrays[name][:2, 1]
        ]
    flipped = int((answers[0] != answers[1]).sum())
    hard = int((arrays["margin"][0] <= np.sort(arrays["margin"][0])[30]).sum())
    for name, count in (("changed answers only", flipped), ("hard only", hard)):
        page.get_by_label(name).check()
        expect(said(page)).to_have_text(f"{count} of 300 samples selected, {count} shown.")
        page.get_by_label(name).uncheck()
    key = page.locator(".explore .key").first
    for value, text in (("right", "^rightwrong$"), ("change", "^right in bothright, now wrong"), ("margin", "^below ")):
        page.get_by_label("Colour").select_option(value)
        expect(key).to_have_text(re.compile(text))
    explorer = page.locator(".explore")
    assert HOSTILE[0] in explorer.inner_text() and explorer.locator("img, script").count() == 0


def test_a_copy_is_hard_when_its_original_is_and_classes_are_counted_anew(feature, sampled):
    run, arrays, copies = sampled(copies=True)
    page = feature(run)
    margins = arrays["margin"][0]
    hard = arrays["index"][margins <= np.sort(margins)[30]]
    box = page.get_by_label("hard only")
    assert "and the copies of those" in page.locator("label", has=box).inner_text()
    wanted = {"0": (arrays["index"], arrays["targets"])}
    for kind in (0, 1):
        own = copies["kind"] == kind
        wanted[f"{kind + 1}"] = (copies["index"][own], copies["targets"][own])
    wanted["-1"] = tuple(np.concatenate([arrays[name], copies[name]]) for name in ("index", "targets"))
    for choice, (index, targets) in wanted.items():
        page.get_by_label("Inputs").select_option(choice)
        counts = [int(re.search(r"\((\d+)\)$", text)[1]) for text in classes(page)]
        assert counts == [int((targets == k).sum()) for k in range(3)]
        box.check()
        count = int(np.isin(index, hard).sum())
        assert said(page).inner_text() == f"{count} of {len(index)} samples selected, {count} shown."
        assert 0 < count < len(index) // 4
        box.uncheck()


def classes(page):
    label = page.locator(".knobs label").filter(has_text=re.compile("^Class"))
    return label.locator("option").all_inner_texts()[1:]


def rectangle(page):
    """The rectangle that is drawn in the first panel: left, top, width and height, or None."""
    return page.locator(".stage").first.evaluate(
        """one => {
            const drawn = one.querySelector(".selection");
            if (drawn.style.display === "none") return null;
            return ["x", "y", "width", "height"].map((name) => Number(drawn.getAttribute(name)));
        }"""
    )


def enclosed(page, arrays):
    """How many points of the dense network lie in the rectangle, by the scales of the panel."""
    width, height = page.locator(".stage").first.evaluate("one => [one.clientWidth, one.clientHeight]")
    left, top, wide, high = rectangle(page)
    low, most = (end(arrays["pca"][:2], (0, 1)) for end in (np.min, np.max))
    low, most = low - 0.04 * (most - low), most + 0.04 * (most - low)
    x, y = ((arrays["pca"][0] - low) / (most - low) * [width, height]).T
    y = height - y
    return int(((x >= left) & (x <= left + wide) & (y >= top) & (y <= top + high)).sum())


def test_a_rectangle_is_drawn_with_the_keyboard(feature, sampled, shot):
    run, arrays, _ = sampled()
    page = feature(run)
    stage, expect = page.locator(".stage").first, pytest.importorskip("playwright.sync_api").expect
    assert "Shift with the arrow keys" in stage.get_attribute("aria-label")
    assert "Shift with the arrow keys" in page.locator(".explore .hint").inner_text()
    stage.focus()
    assert rectangle(page) is None
    page.keyboard.press("Shift+ArrowDown")
    width, height = stage.evaluate("one => [one.clientWidth, one.clientHeight]")
    left, top, wide, high = rectangle(page)
    assert left + wide / 2 == pytest.approx(width / 2, abs=1) and top < height / 2 < top + high
    page.keyboard.press("Escape")
    page.keyboard.press("PageDown")
    sizes = []
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowUp")
        sizes.append(rectangle(page)[2:])
    assert sizes == sorted(sizes) and sizes[0] != sizes[-1]
    expect(said(page)).to_have_text(re.compile(r"^\d+ of 300 samples selected, 300 shown\.$"))
    assert abs(selected(page) - enclosed(page, arrays)) <= 1 and 1 <= selected(page) < 300
    assert said(page).inner_text() in stage.get_attribute("aria-label")
    shot(page, "explorer-keyboard")
    before = rectangle(page)
    page.keyboard.press("Shift+ArrowLeft")
    assert rectangle(page)[2] < before[2]
    page.keyboard.press("Escape")
    expect(said(page)).to_have_text("300 of 300 samples selected, 300 shown.")
    assert rectangle(page) is None


@pytest.fixture
def masked(tmp_path):
    """The page of a run with one mask of 40 by 30 weights, a third of them kept."""
    run = full_run(tmp_path / "run")
    kept = torch.arange(1200).reshape(40, 30) % 3 == 0
    Masks({"conv1.weight": kept}).save(next(run.glob("3-*")) / NAME)
    return report.write(run)


def test_mask_pictures_are_printed_in_the_colours_of_their_legend(visit, masked):
    light, dark = (visit(masked, color_scheme=scheme) for scheme in ("light", "dark"))
    drawn = []
    for page in (light, dark):
        page.locator("figure.heat").scroll_into_view_if_needed()
        canvas = page.locator("figure.heat canvas")
        canvas.wait_for()
        drawn.append(canvas.evaluate(PIXELS))
    assert drawn[0] != drawn[1]
    dark.evaluate(f"""() => addEventListener("beforeprint", () => {{
        window.printed = ({PIXELS})(document.querySelector("figure.heat canvas"));
    }})""")
    dark.pdf()
    assert dark.evaluate("window.printed") == drawn[0]
    assert dark.locator("figure.heat canvas").evaluate(PIXELS) == drawn[1]
    dark.emulate_media(media="print", color_scheme="dark")
    ground = dark.locator(".heat-key i").first.evaluate("one => getComputedStyle(one).backgroundColor")
    pruned = drawn[0][1].to_bytes(4, "little")[:3]
    assert ground == f"rgb({', '.join(map(str, pruned))})"


def test_a_cell_that_is_pointed_at_stays_so_while_the_page_is_printed(visit, masked):
    page = visit(masked)
    page.locator("figure.heat").scroll_into_view_if_needed()
    page.locator("figure.heat .picture").click()
    for key in ("ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    told = page.locator(".heat-large .told").inner_text()
    page.evaluate("() => ['beforeprint', 'afterprint'].forEach((name) => dispatchEvent(new Event(name)))")
    assert page.locator(".heat-large .told").inner_text() == told and told.startswith("row 1, column 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_edges_of_controls_are_seen(visit, sampled, tmp_path, scheme):
    run, _, _ = sampled(copies=True)
    Masks({"conv1.weight": torch.ones(4, 4, dtype=torch.bool)}).save(next(run.glob("3-*")) / NAME)
    many = report.write_many(many_runs(tmp_path / "runs"), tmp_path / "many.html")
    seen = 0
    for address in (report.write(run), many):
        page = visit(address, color_scheme=scheme)
        page.locator(".explore select, .overlay select").first.wait_for()
        if address is not many:
            page.locator("figure.heat").scroll_into_view_if_needed()
            page.locator("figure.heat .picture").click()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for control, edge in page.evaluate(EDGES):
            assert contrast(hexed(edge), hexed(ground)) >= 3, control
            seen += 1
    assert seen >= 15


def hexed(colour):
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


def test_links_to_sections_of_like_names_lead_to_each(visit, sampled):
    long = ["x" * 50 + middle + "x" * 50 for middle in "12"]
    run, _, _ = sampled(others=("a/b", "a-b", *long))
    made = report.build(run)
    odd = [Section(title, title, None) for title in ("???", "!!!", "", "Report", "Notes", "Masks title", "Masks")]
    path = report.write(run)
    path.write_text(to_html(replace(made, sections=(*made.sections, *odd))), encoding="utf-8")
    page = visit(path)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids)) and all(ids)
    links = page.locator("nav a")
    assert links.all_inner_texts() == page.locator("main > section:not(#notes) h2").all_inner_texts()
    for place, link in enumerate(links.all()):
        target = page.locator(f"[id='{link.get_attribute('href')[1:]}']")
        assert page.locator("main > section").nth(place).get_attribute("id") == target.get_attribute("id")
        assert target.locator("h2").inner_text() == link.inner_text()
    assert sum(text.startswith("Changed answers: ") for text in links.all_inner_texts()) == 5
