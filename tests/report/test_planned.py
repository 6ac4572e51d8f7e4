"""A plan beside what came of it: every number of the two tables is one of the card, whatever the card holds."""

import json

import pytest
from rich.console import Console

from secateur import report

FIGURES = {
    "ms": {"before": 2.5, "forecast": 1.25, "low": 1.125, "high": 1.375, "measured": 1.3125},
    "bytes": {"before": 90000.0, "forecast": 20000.0, "low": None, "high": None, "measured": 20104.0},
    "params": {"before": 1000.0, "forecast": 130.0, "low": None, "high": None, "measured": 130.0},
    "loss": {"before": 0.5, "forecast": 0.625, "low": 0.53125, "high": 0.875, "measured": 0.6875},
}
LAYERS = [
    {"name": "a.weight", "pattern": "unstructured", "kept": 30, "total": 500, "loss_forecast": 0.0625, "loss": 0.09375,
     "ms_before": 1.5, "ms_forecast": 0.375, "ms": 0.4375},
    {"name": "b.weight", "pattern": "4x1", "kept": 60, "total": 400, "loss_forecast": 0.03125, "loss": 0.046875,
     "ms_before": 0.75, "ms_forecast": 0.625, "ms": 0.5625},
    {"name": "c.weight", "pattern": "", "kept": 40, "total": 40, "loss_forecast": 0.0, "loss": 0.0,
     "ms_before": 0.25, "ms_forecast": 0.25, "ms": 0.28125},
]  # fmt: skip
VERDICT = "target latency 0.5x: missed, 0.525x of the time before, both called in turn"
PLANNED = {
    "target": "latency 0.5x", "layers": LAYERS, "figures": FIGURES, "notes": ["a note of the clock"], "met": False,
    "verdict": VERDICT,
}  # fmt: skip
TITLES = ("Plan and truth", "Plan and truth by layer")


@pytest.fixture
def made(make_run, edit):
    """The sections on the plan of a run whose pruning step has this entry."""

    def make(planned):
        run = make_run(kinds=("train", "prune", "measure"))
        for path in run.glob("*-prune-*"):
            edit(path / "card.json", planned=planned)
        return run, [s for s in report.build(run).sections if s.title in TITLES]

    return make


def test_every_number_is_that_of_the_card(made):
    _, (whole, layers) = made(PLANNED)

    for row, figure in zip(whole.table.rows, FIGURES.values(), strict=True):
        assert [cell.value for cell in row[1:]] == [
            figure[k] for k in ("before", "forecast", "low", "high", "measured")
        ]
    for row, layer in zip(layers.table.rows, LAYERS, strict=True):
        wanted = [layer[k] for k in ("ms_before", "ms_forecast", "ms", "loss_forecast", "loss")]
        assert [cell.value for cell in row[3:]] == wanted
        assert row[2].value == 100 * layer["kept"] / layer["total"] and row[1].text == (layer["pattern"] or "as it is")


def test_what_is_said_and_drawn(made):
    _, (whole, layers) = made(PLANNED)

    assert "a plan for latency 0.5x: 1.250 ms were forecast and 1.312 measured" in whole.says
    assert "20,000 bytes were forecast and 20,104 measured" in whole.says and whole.more == ("a note of the clock",)
    assert whole.says.endswith(f". T{VERDICT[1:]}.")
    assert layers.says == "2 tensors of 3 lost weights, as 4x1, unstructured."
    forecast, measured, rises = layers.chart
    assert forecast.names == measured.names == ("b.weight", "a.weight", "c.weight")
    assert forecast.values == (0.625, 0.375, 0.25) and measured.values == (0.5625, 0.4375, 0.28125)
    assert rises.points == ((0.09375, 0.0625), (0.046875, 0.03125)) and forecast.high == measured.high == 0.625


def test_what_the_two_ends_are_is_said_of_each_figure(made):
    caption = made(PLANNED)[1][0].table.caption

    assert "of milliseconds, the range that nine of ten" in caption and "of the loss, that of 95 in 100" in caption
    assert "nine of ten times are expected" not in caption and "units that were removed" in caption


def test_terminal_page_and_json_show_them(made):
    run, _ = made(PLANNED)
    page = report.write(run)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(run, console)
    console.file.close()

    text, stored = console.export_text(), json.loads(page.with_suffix(".json").read_text())
    assert "0.525x of the time before" in page.read_text() and "0.525x of the time before" in text
    for title in TITLES:
        assert title in text and title in page.read_text() and title in {s["title"] for s in stored["sections"]}


@pytest.mark.parametrize(
    "planned",
    [None, 3, [], {}, {"layers": 3}, {"layers": [3, {}, {"name": "x"}]}, {"layers": [{"name": "x", "kept": "y"}]},
     {"figures": FIGURES}],
)  # fmt: skip
def test_cards_without_a_plan_or_with_nonsense_have_no_section(made, planned):
    assert made(planned)[1] == []


@pytest.mark.parametrize("change", [{"figures": 7}, {"figures": {"ms": 3}}, {"notes": 3}, {"target": 9}, {"verdict": 3},
                                    {"figures": {"ms": {"forecast": "x", "measured": 1.0}}}])  # fmt: skip
def test_what_is_damaged_is_left_out(made, change):
    whole, layers = made({**PLANNED, **change})[1]

    assert len(layers.table.rows) == 3 and whole.says
