import math
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.report.scale import Scale
from secateur.report.sections import Bars, Lines, Series
from secateur.report.svg import HEIGHT, UPRIGHT, WIDTH, figure

FINITE = st.floats(-1e300, 1e300, allow_nan=False)


def svg(chart):
    root = xml.fromstring(figure(chart))
    return root.find("svg")


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_a_scale_has_room_for_all_values_and_a_few_round_ticks(values):
    scale = Scale.over(values, 200.0, 0.0)
    assert all(-0.01 <= scale(v) <= 200.01 for v in values)
    ticks = scale.ticks()
    assert len(ticks) <= 25
    assert all(math.isfinite(scale(t)) for t in ticks)
    assert ticks == sorted(set(ticks))


def test_places_are_proportional_to_values():
    scale = Scale(10.0, 20.0, 0.0, 100.0)
    assert [scale(v) for v in (10, 12.5, 20)] == pytest.approx([0, 25, 100])
    assert scale.ticks() == [10, 12, 14, 16, 18, 20]


def test_values_that_dwarf_the_rest_make_the_scale_logarithmic():
    scale = Scale.over([0.1, 0.2, 0.3, 100.0], 0.0, 3.0)
    assert scale.log
    assert [scale(v) for v in (0.1, 1, 10, 100)] == pytest.approx([0, 1, 2, 3])


def test_curves_pass_through_their_points():
    series = Series("loss", ((0.0, 0.0), (10.0, 5.0), (20.0, 10.0)))
    chart = Lines("Loss", "step", "loss", (series,), "Falls.", low=0.0, high=10.0)
    path = svg(chart).find(".//path").attrib["d"]
    places = [tuple(map(float, p.split())) for p in path[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert x2 > x0 and y2 < y0


def test_bars_are_as_long_as_their_values():
    chart = Bars("Density", "kept (%)", ("a", "b"), (20.0, 80.0), ("20 %", "80 %"), "Two.", 100.0)
    widths = [float(r.attrib["width"]) for r in svg(chart).findall("rect")]
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.01)


def test_many_bars_stand_upright_and_still_tell_their_names():
    count = UPRIGHT + 10
    names = tuple(f"layer{i}" for i in range(count))
    chart = Bars("Density", "kept (%)", names, tuple(map(float, range(count))), names, "Many.", 100.0)
    drawn = svg(chart)
    titles = [r.find("title").text for r in drawn.findall("rect")]
    assert titles[-1] == f"{count}. {names[-1]}: {names[-1]}"
    assert float(drawn.attrib["viewBox"].split()[3]) == HEIGHT


def test_every_chart_has_axes_a_legend_tooltips_and_a_text_alternative():
    chart = Lines(
        "Loss", "step", "loss", (Series("train", ((1.0, 2.0), (2.0, 1.0))),), "Fell.", ((1.5, "step 2: cut"),)
    )
    root = xml.fromstring(figure(chart))
    drawn = root.find("svg")
    assert drawn.attrib["role"] == "img" and drawn.attrib["aria-label"] == "Loss. Fell."
    assert root.find("figcaption/p").text == "Fell."
    assert [li.find("svg").tail for li in root.findall("ul/li")] == ["train", "pruning step"]
    tips = [r.find("title").text for r in drawn.findall("rect")]
    assert any("train 2.000" in tip for tip in tips) and any("step 2: cut" in tip for tip in tips)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 1e9), FINITE), min_size=1, max_size=80),
    st.booleans(),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=30),
)
def test_any_finite_points_give_a_well_formed_chart_inside_its_frame(points, stepped, name):
    chart = Lines(name, "step", name, (Series(name, tuple(sorted(points)), dots=True, stepped=stepped),), name)
    for circle in svg(chart).findall("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH and 0 <= float(circle.attrib["cy"]) <= HEIGHT
