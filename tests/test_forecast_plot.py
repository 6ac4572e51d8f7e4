"""``scripts/forecast_plot.py``: sums of saliencies, rises of single layers, and a page that tells them by its rule."""

import copy
import json

import pytest
import torch
from scripts import forecast_plot as page
from torch import nn

from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.obd import Obd


@pytest.fixture
def task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Task(net, CrossEntropy(), [(torch.randn(n, 6).double(), torch.arange(n) % 3) for n in (9, 6)])


@pytest.fixture
def masks(task):
    return Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in task.params().items() if p.ndim == 2})


def alone(task, name, new):
    """The loss with one weight in place of another."""
    net = copy.deepcopy(task.model)
    net.get_parameter(name).data.copy_(new)
    return Task(net, task.loss, task.data).mean_loss()


def test_obd_forecasts_the_least_saliencies_and_measures_each_layer_alone(task, masks):
    before, dense = task.mean_loss(), {name: p.detach().clone() for name, p in task.params().items()}
    scores = Obd("outputs")(task, masks)
    rows = list(page.by_obd(task, masks, page.losses(task)))
    assert [(row["layer"], row["share"]) for row in rows] == [(n, s) for n in masks for s in (0.1, 0.3, 0.5)]
    for row in rows:
        score = scores[row["layer"]].flatten()
        least = score.argsort()[: round(row["share"] * len(score))]
        assert row["forecast"] == pytest.approx(score[least].sum().item(), rel=1e-12)
        new = dense[row["layer"]].clone()
        new.view(-1)[least] = 0.0
        assert row["rise"] == pytest.approx(alone(task, row["layer"], new) - before, rel=1e-9, abs=1e-14)
    assert all(torch.equal(p, dense[name]) for name, p in task.params().items())


def test_obs_forecasts_by_the_whole_second_order_series(task, masks):
    """OBS takes slope and curvature; what these miss of the rise falls with the third power of the change."""
    dense = page.losses(task)
    for row in page.by_obs(task, masks, dense):
        assert row["forecast"] == row["slope"] + row["bend"]
    old = task.params()["0.weight"].detach().clone()
    step = torch.randn(old.shape, dtype=old.dtype)
    far, by_a_tenth = (page.judged(task, "0.weight", old + size * step, dense) for size in (1e-2, 1e-3))
    gaps = [abs(row["quadratic"] - row["rise"]) for row in (far, by_a_tenth)]
    assert 500 < gaps[0] / gaps[1] < 2000
    each = page.losses(task) - dense
    assert torch.equal(each, torch.zeros_like(each))


def row(method="obd", forecast=1.0, rise=1.0, slope=0.0, bend=1.0, diagonal=1.0, share=0.1):
    made = {"method": method, "layer": "a", "share": share, "total": 10, "forecast": forecast, "rise": rise}
    made |= {"slope": slope, "bend": bend, "quadratic": slope + bend, "error": 0.1}
    return made | ({"diagonal": diagonal} if method == "obd" else {})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (row(rise=9.0), "higher orders"),
        (row("obs", rise=-9.0), "higher orders"),
        (row(rise=9.0, slope=8.0), "slope"),
        (row(rise=9.0, bend=9.0), "off the diagonal"),
        (row(rise=9.0, bend=9.0, diagonal=9.0), "error of the estimate"),
        (row(rise=9.0, forecast=90.0, slope=8.0), "error of the estimate, slope"),
        (row(rise=8.0, bend=2.0, slope=2.0, diagonal=1.0), "several steps, none by itself"),
    ],
)
def test_a_ratio_outside_is_put_down_to_the_steps_that_are_too_long(given, why):
    assert page.cause(given) == why


def test_the_page_counts_by_its_rule_and_keeps_its_other_words(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    words = "# Title\n\nBefore.\n\n<!-- figures -->\nold\n<!-- end of figures -->\n\nAfter.\n"
    (tmp_path / "docs" / "forecast.md").write_text(words)
    rows = [row(forecast=f, share=s) for f, s in ((0.3, 0.1), (3.0, 0.3), (3.1, 0.5))]
    rows += [row("obs", rise=r, share=s) for r, s in ((0.99e-4, 0.1), (-1.0, 0.3), (1.0, 0.5))]
    accuracy = {"value": 90.0, "low": 89.0, "high": 91.0, "n": 100}
    net = {"name": "net on data", "dtype": "float64", "examples": 7, "loss": 1.0, "norm": 0.1, "accuracy": accuracy}
    page.write([json.loads(json.dumps({**net, "rows": rows}))])
    text = (tmp_path / "docs" / "forecast.md").read_text()
    assert text.startswith("# Title\n\nBefore.") and text.endswith("After.\n") and "old" not in text
    assert "| `a` | 10 | 0.30 | 3.00 | **3.10** | small | **-1.00** | 1.00 |" in text
    assert "| net on data | obs | 10% | 0 of 1 | 0 | – | – | – |" in text
    assert "| net on data | obd | 30% | 1 of 1 | 1 | 3.00 | 3.00 | 3.00 |" in text
    assert "- net on data, obd: 1 by: error of the estimate" in text
    assert "- net on data, obs: 1 by: higher orders" in text
    picture = (tmp_path / "docs" / "forecast.svg").read_text()
    assert picture.count("<circle") == 4 and "1 rises, 1 in the band; 1 below zero not drawn" in picture
