import pytest
from tests.report.conftest import full_run, layer_table
from tests.report.test_page import HOSTILE

from secateur import report


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report whose layers have hostile names."""
    layers = [{**row, "name": name} for row, name in zip(layer_table(), HOSTILE, strict=False)]
    rest = layer_table()[len(HOSTILE) :]
    return report.write(full_run(tmp_path_factory.mktemp("report") / "run", layers=[*layers, *rest]))


def test_hostile_names_do_not_run_and_headings_sort(visit, shot, page_file):
    page = visit(page_file)
    table = page.locator("section#layers table[data-sortable]")
    kept = [column.inner_text() for column in table.locator("thead th").all()].index("Kept")
    before = [row.locator("td,th").nth(kept).get_attribute("data-value") for row in table.locator("tbody tr").all()]
    table.locator("thead th").nth(kept).get_by_role("button").click()
    cells = table.locator(f"tbody tr > :nth-child({kept + 1})")
    after = [cell.get_attribute("data-value") for cell in cells.all()]
    assert after == sorted(before, key=float, reverse=True) != before
    assert table.locator("thead th").nth(kept).get_attribute("aria-sort") == "descending"
    assert page.locator("img[src='x']").count() == 0
    shot(page, "report-light")


def test_the_policy_of_the_page_lets_no_other_script_run(visit, page_file):
    page = visit(page_file)
    ran = page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = 1";
            document.body.append(script);
            return window.ran ?? 0;
        }"""
    )
    assert ran == 0
    assert len(visit.faults) == 1 and "Content Security Policy" in visit.faults[0]
    visit.faults.clear()


@pytest.mark.parametrize("elsewhere", ["http://127.0.0.1:9/x.png", "other.png"])
def test_a_page_that_asks_for_anything_else_is_found(visit, tmp_path, elsewhere):
    """The check that all tests of this folder rely on."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><link rel=icon href='data:,'><img src='{elsewhere}'>", encoding="utf-8")
    visit(page)
    asked = elsewhere if elsewhere.startswith("http") else (tmp_path / elsewhere).as_uri()
    assert f"request: {asked}" in visit.faults
    visit.faults.clear()


def test_dark_and_print_have_papers_of_their_own(visit, shot, page_file):
    page = visit(page_file, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(18, 23, 28)"
    shot(page, "report-dark")
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and page.locator("h1").is_visible()


def test_the_keyboard_reaches_the_table_and_focus_is_seen(visit, page_file):
    page = visit(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('nav') !== null")
    button = page.locator("section#layers thead button").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("section#layers thead th").first.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_long_tables_are_filtered(visit, page_file):
    page = visit(page_file)
    area = page.locator("section#layers")
    box = area.get_by_role("searchbox")
    assert box.count() == 1
    rows = area.locator("table[data-sortable] tbody tr")
    every = rows.count()
    box.fill("stage3")
    shown = [row.inner_text() for row in rows.all() if row.is_visible()]
    assert 0 < len(shown) < every and all("stage3" in text for text in shown)
    box.fill("")
    assert sum(row.is_visible() for row in rows.all()) == every


def test_a_narrow_screen_does_not_scroll_sideways(visit, page_file):
    page = visit(page_file, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
