# Parts of a section may be missing, which the type checker would have every test ask for.
# pyright: reportOptionalMemberAccess=false
"""Curvature and flatness: the view against the record, and the record that a measure step writes."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from secateur import report
from secateur.cli.main import main
from secateur.engine.recipe import Recipe
from secateur.report.page import to_html
from secateur.report.sections import EMPTY, Report, Tradeoff
from secateur.report.source import read_run
from secateur.report.svg import figure
from secateur.report.text import show
from secateur.report.views import flatness

TITLE, UNCLEAR = "Curvature and flatness", "no clear difference"


def reading(value, low=None, high=None, n=20, note="", **parts):
    return {"value": value, "unit": "", "stderr": None, "low": low, "high": high, "n": n, "parts": parts, "note": note}


def side(factor, weights, **noise):
    """Figures of one network; those of the dense one times a factor."""
    rises = {size: 100 * size**2 * factor for size in (0.05, 0.1, 0.2)}
    return {
        "loss": reading(0.05 * factor, n=512, weights=weights),
        "top_eigenvalue": reading(12.0 * factor, 11.9 * factor, 12.1 * factor, residual=0.1 * factor, weights=weights),
        "trace": {**reading(300.0 * factor, **{"per weight": 300 * factor / weights}), "stderr": 10.0 * factor},
        "sharpness": reading(0.02 / factor, n=512, rho=0.05),
        **{f"noise {size:g}": reading(rise, 0.9 * rise, 1.1 * rise, size=size) for size, rise in rises.items()},
        **noise,
    }


TABLE = {"dense": side(1.0, 10_000), "pruned": side(0.5, 1_000, **{"noise 0.05": reading(0.26, 0.2, 0.3, size=0.05)})}


@pytest.fixture
def flat(make_run, edit):
    """A run whose verdict tells of flatness."""

    def make(table):
        run = make_run()
        edit(next(run.glob("*-measure-*")) / "verdict.json", flatness=table)
        return run

    return make


def titles(made):
    return [s.title for s in made.sections]


def section(made):
    return next(s for s in made.sections if s.title == TITLE)


def drawn(made):
    (chart,) = section(made).chart
    assert isinstance(chart, Tradeoff)
    return chart


def cells(made, name):
    table = section(made).table
    row = next(row for row in table.rows if row[0].text == name)
    return {column.name: cell for column, cell in zip(table.columns, row, strict=True)}


def test_without_the_figures_there_is_no_section_and_no_note(flat):
    made = report.build(flat({}))
    assert TITLE not in titles(made) and made.notes == ()


def test_the_section_stands_between_training_and_what_follows(flat):
    found = titles(report.build(flat(TABLE)))
    assert found.index(TITLE) == found.index("Training") + 1
    assert found.index(TITLE) < found.index("Probes") < found.index("Repeat")


def test_the_table_holds_the_figures_their_intervals_and_ratios(flat):
    made = report.build(flat(TABLE))
    top = cells(made, "Largest eigenvalue of the Hessian")
    assert (top["Before"].value, top["After"].value, top["Flatter"].text) == (12.0, 6.0, "after")
    assert (top["Before"].low, top["Before"].high) == (11.9, 12.1)
    assert (top["Ratio"].value, top["Ratio"].text) == (0.5, "0.500×")
    assert (top["Ratio"].low, top["Ratio"].high) == pytest.approx((5.95 / 12.1, 6.05 / 11.9), rel=1e-12)
    trace = cells(made, "Trace of the Hessian")
    assert trace["After"].low == pytest.approx(150 - 1.96 * 5)
    spread = math.hypot(19.6 / 300, 9.8 / 150)
    assert trace["Ratio"].high == pytest.approx(0.5 * math.exp(spread), rel=1e-12)
    assert trace["Ratio"].low == pytest.approx(0.5 * math.exp(-spread), rel=1e-12)
    mean = cells(made, "Trace / free weights")
    assert mean["Ratio"].value == pytest.approx(5.0)  # a tenth of the directions, half of the trace
    sharp = cells(made, "Sharpness, rho 0.050")
    assert sharp["Ratio"].value == pytest.approx(4.0 / 2) and sharp["Ratio"].span == ""
    assert sharp["Flatter"].text == "before"
    assert cells(made, "Rise under noise of 5 %")["Flatter"].text == UNCLEAR
    assert cells(made, "Loss on the sample")["Flatter"] is EMPTY


def test_one_sentence_says_which_is_flatter_by_which_measure_and_what_rescaling_does(flat):
    found = section(report.build(flat(TABLE)))
    assert found.says == (
        "The pruned network is flatter by the largest eigenvalue, the trace and noise of 10 % and 20 %; the dense "
        "network is flatter by sharpness; neither is clearly flatter by noise of 5 %; the eigenvalue, the trace and "
        "sharpness are not scale-invariant: rescaling layers changes them although the network computes the same."
    )
    more = " ".join(found.more)
    assert "512 training examples" in more and "10,000 before, 1,000 after" in more and "kept weights" in more


@pytest.mark.parametrize(("after", "word"), [(12.05, UNCLEAR), (12.2, UNCLEAR), (12.6, "before")])
def test_eigenvalues_within_their_residuals_count_as_equal(flat, after, word):
    two = {"top_eigenvalue": reading(after, after - 0.15, after + 0.15)}
    made = report.build(flat({"dense": {"top_eigenvalue": reading(12.0, 11.9, 12.1)}, "pruned": two}))
    assert cells(made, "Largest eigenvalue of the Hessian")["Flatter"].text == word


def test_the_chart_has_both_curves_with_their_intervals(flat):
    chart = drawn(report.build(flat(TABLE)))
    assert [series.name for series in chart.series] == ["dense", "pruned"]
    expected = [(5.0, 0.25, 0.225, 0.275), (10.0, 1.0, 0.9, 1.1), (20.0, 4.0, 3.6, 4.4)]
    for point, one in zip(chart.series[0].points, expected, strict=True):
        assert point == pytest.approx(one, rel=1e-12)
    assert chart.low == 0.0 and chart.high > 4.4


def test_what_is_not_a_number_is_shown_with_its_reason_and_not_compared(flat):
    nothing = {"value": "nan", "stderr": None, "low": None, "high": None, "note": "the loss at the weights is nan"}
    broken = {name: {**entry, **nothing} for name, entry in side(1, 10).items()}
    made = report.build(flat({"dense": side(1, 10), "pruned": broken}))
    assert cells(made, "Trace of the Hessian")["After"].text == "not a number"
    assert cells(made, "Trace of the Hessian")["Ratio"] is EMPTY
    assert "the trace, sharpness and noise of every size cannot be compared" in section(made).says
    assert "Trace of the Hessian, pruned network: the loss at the weights is nan." in section(made).more
    assert [series.name for series in drawn(made).series] == ["dense"]
    assert "</html>" in to_html(made)


def test_values_below_zero_have_no_ratio_and_are_drawn(flat):
    low = {"trace": reading(-3.0, -4.0, -2.0), "noise 0.1": reading(-0.01, -0.02, 0.0, size=0.1)}
    made = report.build(flat({"dense": {"trace": reading(2.0, 1.0, 3.0)}, "pruned": low}))
    row = cells(made, "Trace of the Hessian")
    assert row["Ratio"] is EMPTY and row["Flatter"].text == "after"
    assert drawn(made).low < -0.02 and drawn(made).high > 0
    assert "</html>" in to_html(made)


def places(entry, path=()):
    yield path
    for key, value in entry.items() if isinstance(entry, dict) else ():
        yield from places(value, (*path, key))


def replaced(entry, path, odd):
    return {**entry, path[0]: replaced(entry[path[0]], path[1:], odd)} if path else odd


ODD = [None, "nan", "-inf", "text", -1, 0, 1e308, -1e308, 1e-320, True, [], {}, {"value": "inf"}, 10**400]


@pytest.mark.parametrize("odd", ODD, ids=[repr(odd)[:12] for odd in ODD])
def test_no_odd_value_crashes_the_section(make_run, edit, odd):
    run = make_run(kinds=("measure",))
    path = next(run.glob("*-measure-*")) / "verdict.json"
    names = ("loss", "top_eigenvalue", "trace", "sharpness", "noise 0.1")
    table = {key: {name: entry[name] for name in names} for key, entry in TABLE.items()}
    for place in (place for place in places(table) if place[:1] != ("dense",)):
        edit(path, flatness=replaced(table, place, odd))
        found = flatness.section(read_run(run))
        if isinstance(found, str):
            assert found == "" and place == ()
            continue
        for chart in found.chart:
            assert isinstance(chart, Tradeoff)
            assert "<svg" in figure(chart) and not re.search(r'="-?(nan|inf)', figure(chart))
        json.dumps(Report("t", "f", (found,)).to_json(), allow_nan=False)
    assert "</html>" in to_html(report.build(run))


def test_the_terminal_and_the_file_tell_it_too(flat):
    made = report.build(flat(TABLE))
    console = Console(width=100, record=True, file=io.StringIO())
    show(made, console)
    text = console.export_text()
    assert TITLE in text and "0.500×" in text.replace("0.500x", "0.500×")
    assert TITLE in [s["title"] for s in json.loads(json.dumps(made.to_json(), allow_nan=False))["sections"]]


def test_a_recipe_keeps_the_choice_and_leaves_it_out_when_it_is_the_default():
    table = {"model": {"use": "mlp"}, "data": {"use": "digits"}, "step": [{"do": "train"}, {"do": "measure"}]}
    plain = Recipe.from_table(table)
    asked = Recipe.from_table({**table, "step": [{"do": "train"}, {"do": "measure", "flatness": True}]})
    assert "flatness" not in plain.to_table()["step"][1] and asked.to_table()["step"][1]["flatness"] is True
    assert Recipe.from_table(asked.to_table()) == asked
    assert plain.keys("o")[0] == asked.keys("o")[0] and plain.keys("o")[1] != asked.keys("o")[1]


def test_a_measure_step_writes_what_the_section_reads(data_dir, tmp_path):
    """From the command line: train, prune, measure without and with the figures."""
    dense, small, plainly, asked = (str(tmp_path / name) for name in ("dense", "small", "plain", "asked"))
    common = ["--data-dir", str(data_dir), "--data", "digits", "-s", "data.train=64", "-s", "data.test=32"]
    assert main(["train", "--net", "mlp", *common, "--epochs", "1", "-o", dense]) == 0
    assert main(["prune", dense, "--to", "params 30%", "-o", small, *common]) == 0
    assert main(["measure", small, "-o", plainly, *common]) == 0
    assert main(["measure", small, "--flatness", "-o", asked, *common]) == 0
    without, with_it = (json.loads(next(tmp_path.glob(f"{n}/*-measure-*/verdict.json")).read_text())
                        for n in ("plain", "asked"))  # fmt: skip
    assert "flatness" not in without and TITLE not in titles(report.build(plainly))
    assert set(with_it["flatness"]) == {"dense", "pruned"}
    one, two = (with_it["flatness"][key] for key in ("dense", "pruned"))
    assert one.keys() == two.keys() >= {"loss", "top_eigenvalue", "trace", "sharpness", "noise 0.1"}
    assert one["loss"]["n"] == two["loss"]["n"] == 64
    card = json.loads(next(tmp_path.glob("small/*-prune-*/card.json")).read_text())
    assert one["loss"]["parts"]["weights"] - two["loss"]["parts"]["weights"] == card["total"] - card["kept"]
    made = report.build(asked)
    assert re.match(r"(The (pruned|dense) network is|Neither is clearly) flatter by", section(made).says)
    assert "</html>" in to_html(made)
