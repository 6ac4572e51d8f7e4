"""Forecast against truth by layer: ratios, the count of those near 1, and a picture whose places are the logarithms."""

import json
import math
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from secateur import report
from secateur.report.sections import Dots
from secateur.report.svg import HEIGHT, WIDTH, figure

TITLE = "Forecast and truth by layer"
LOSS = 0.0421
RECORDS = [
    # name, forecast, rise: the ratio decides, 0.3 and 3 themselves included
    ("a.weight", 0.02, 0.01),
    ("b.weight", 0.3, 1.0),
    ("c.weight", 0.29, 1.0),
    ("d.weight", 3.0, 1.0),
    ("e.weight", 0.031, 0.01),
    ("f.weight", 0.5, 0.99e-4 * LOSS),
    ("g.weight", 0.0, 0.0),
    ("h.weight", -0.01, -0.02),
    ("i.weight", 0.01, -0.02),
]
NEAR, JUDGED = {"a.weight", "b.weight", "d.weight", "h.weight"}, 7


def rows(records=RECORDS):
    return [
        {"name": name, "kept": 30, "total": 100, "error": None, "zeroed": None, "forecast": forecast, "rise": rise}
        for name, forecast, rise in records
    ]


@pytest.fixture
def made(make_run, edit):
    """The run with layer records in its pruning steps, and the report's section on them."""

    def make(entries, kinds=("train", "prune", "train", "measure")):
        run = make_run(kinds=kinds)
        for path in run.glob("*-prune-*"):
            edit(path / "card.json", layers=entries)
        found = [s for s in report.build(run).sections if s.title == TITLE]
        return run, found[0] if found else None

    return make


def test_ratios_and_how_many_are_near_one(made):
    _, section = made(rows())
    assert f"0.3 to 3 times the measured rise for {len(NEAR)} of {JUDGED} tensors" in section.says
    assert "2 rises more were too small" in section.says
    names = [column.name for column in section.table.columns]
    assert names == ["Tensor", "Kept", "Rise forecast", "Rise measured", "Forecast / measured"]
    for cells, (name, forecast, rise) in zip(section.table.rows, RECORDS, strict=True):
        assert [cell.value for cell in cells[:4]] == [name, 30.0, forecast, rise]
        judged = abs(rise) >= 1e-4 * LOSS
        assert cells[4].value == (pytest.approx(forecast / rise) if judged else None)
        assert cells[1].text == "30.00 %"


def test_only_rises_with_a_logarithm_are_drawn(made):
    _, section = made(rows())
    (chart,) = section.chart
    assert dict(zip(chart.names, chart.points, strict=True)) == {
        name: (rise, forecast) for name, forecast, rise in RECORDS[:5]
    }
    assert "4 tensors" in chart.says
    drawn = xml.fromstring(figure(chart)).find("svg")
    kinds = {c.find("title").text[0]: c.attrib["class"] for c in drawn.findall("circle")}
    assert kinds == {name[0]: "dot s0" if name in NEAR else "dot s1" for name, _, _ in RECORDS[:5]}


def test_every_pruning_step_is_told(made):
    _, section = made(rows(), kinds=("train", "prune", "train", "prune", "measure"))
    assert [chart.title.rpartition(", ")[2] for chart in section.chart] == ["step 2", "step 4"]
    assert section.says.startswith("At step 4") and section.more[0].startswith("At step 2")
    assert [row[1].value for row in section.table.rows] == [2] * 9 + [4] * 9
    assert len(section.source) == 2


def test_without_records_there_is_no_section_and_no_note(made):
    run, section = made([])
    assert section is None and report.build(run).notes == ()


@pytest.mark.parametrize(
    "entries",
    [
        "layers",
        [3, None, {"name": "x"}, {"name": 5, "kept": 1, "total": 2, "forecast": 1.0, "rise": 1.0}],
        [{"name": "x", "kept": 1, "total": 0, "forecast": 1.0, "rise": 1.0}],
        [{"name": "x", "kept": 1, "total": 2, "forecast": "nan", "rise": 1.0}],
        [{"name": "x", "kept": 1, "total": 2, "forecast": 1.0, "rise": None}],
    ],
)
def test_damaged_records_are_left_out(made, entries):
    assert made(entries)[1] is None


def test_one_layer_needs_no_picture_and_nothing_judged_is_said(made):
    _, section = made(rows([("only.weight", 0.1, 0.1)]))
    assert section.chart == () and "for 1 of 1 tensor." in section.says
    _, section = made(rows([("only.weight", 0.1, 1e-9)]))
    assert "no rise of the loss was large enough" in section.says


def test_page_terminal_and_json_tell_the_same(made):
    run, section = made(rows())
    page = report.write(run)
    text = page.read_text(encoding="utf-8")
    assert f"<h2>{TITLE}" in text or TITLE in text
    table = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    chart = next(s for s in table["sections"] if s["title"] == TITLE)["chart"][0]
    assert chart["kind"] == "dots" and len(chart["points"]) == 5
    console = Console(record=True, width=120)
    report.show(run, console)
    shown = console.export_text()
    assert TITLE in shown and section.table.rows[2][4].text in shown


def test_places_are_logarithms_on_axes_of_one_range():
    chart = Dots("t", "x", "y", ("a", "b", "c"), ((1e-4, 1e-4), (1e-2, 1e-3), (1.0, 1e-2)), "s", 0.3, 3.0)
    drawn = xml.fromstring(figure(chart)).find("svg")
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.findall("circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    line = next(entry for entry in drawn.findall("line") if entry.attrib["class"] == "mark").attrib
    ends = [tuple(float(line[key]) for key in pair) for pair in (("x1", "y1"), ("x2", "y2"))]
    assert ends[0] == pytest.approx((x0, y0), abs=0.11) and ends[1][0] == pytest.approx(x2, abs=0.11)
    # halfway up the band is 3 / 0.3, a whole power of ten, high
    path = drawn.find("path").attrib["d"].strip("MZ").split("L")
    places = [tuple(map(float, place.split())) for place in path]
    decade = (y0 - ends[1][1]) / 4
    assert places[0][1] - places[-1][1] == pytest.approx(math.log10(3) * decade, abs=0.11)
    assert places[2][1] - places[3][1] == pytest.approx(-math.log10(0.3) * decade, abs=0.11)


SIZES = st.floats(5e-324, 1.7e308, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=50))
def test_any_positive_points_give_a_well_formed_chart_inside_its_frame(points):
    names = tuple(f"<{i}>" for i in range(len(points)))
    drawn = xml.fromstring(figure(Dots("t", "x", "y", names, tuple(points), "s", 0.3, 3.0))).find("svg")
    for circle in drawn.findall("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH and 0 <= float(circle.attrib["cy"]) <= HEIGHT
