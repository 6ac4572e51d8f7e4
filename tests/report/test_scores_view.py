"""Histograms of scores: the record against plain counting, the view against the record."""

import json
import math

import pytest
import torch
from torch import nn

from secateur import report
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.engine.cutting import plan
from secateur.engine.score_records import BINS, count_scores
from secateur.report.page import to_html
from secateur.report.sections import Histogram


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plainly(score, mask, edges):
    """Counts by comparing each score with each end, in Python."""
    kept, pruned, below = [0] * BINS, [0] * BINS, [0, 0]
    for value, stays in zip(score.double().abs().flatten().tolist(), mask.flatten().tolist(), strict=True):
        place = sum(value >= edge for edge in edges) - 1
        if place < 0:
            below[0 if stays else 1] += 1
        else:
            (kept if stays else pruned)[place] += 1
    return kept, pruned, below


def test_every_weight_is_counted_in_its_bin():
    scores = {"a": drawn(40, 30), "b": drawn(7, 5, 3, seed=1) * 1e-4}
    scores["a"][0, :5] = 0.0
    masks = {"a": scores["a"] > 0.3, "b": scores["b"] > 2}
    found = json.loads(json.dumps(count_scores(scores, masks), allow_nan=False))
    edges = found["edges"]
    assert len(edges) == BINS + 1 and edges == sorted(set(edges))
    gaps = [math.log10(b / a) for a, b in zip(edges, edges[1:], strict=False)]
    assert max(gaps) - min(gaps) < 2e-3
    for name, score in scores.items():
        row = found["tensors"][name]
        assert (row["kept"], row["pruned"], row["below"]) == plainly(score, masks[name], edges)
        assert row["negative"] == [int((score[masks[name]] < 0).sum()), int((score[~masks[name]] < 0).sum())]
        assert sum(row["kept"]) + sum(row["pruned"]) + sum(row["below"]) == score.numel()
    assert found["all"]["kept"] == [a + b for a, b in zip(*(found["tensors"][n]["kept"] for n in "ab"), strict=True)]
    assert found["tensors"]["a"]["lowest_kept"] == float(scores["a"][masks["a"]].min())
    assert found["tensors"]["a"]["highest_pruned"] == float(scores["a"][~masks["a"]].max())
    assert found["tensors"]["b"]["lowest_kept"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_no_type_and_no_extreme_loses_a_weight(dtype):
    values = [0.0, -0.0, 1e-30, 6e-8, 1.0, -1.0, 3e4, float("inf"), float("-inf")]
    score = torch.tensor(values, dtype=dtype)
    mask = torch.tensor([i % 2 == 0 for i in range(len(values))])
    row = count_scores({"w": score}, {"w": mask})["all"]
    assert sum(row["kept"]) + row["below"][0] + row["infinite"][0] == 5
    assert sum(row["pruned"]) + row["below"][1] + row["infinite"][1] == 4
    assert row["infinite"] == [1, 1]
    assert row["negative"] == [1, 1]


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("inf"), 0.0], [2.0, 2.0], [1e-44, 3e38], [3.4028234e38, 1.0]])
def test_scores_that_fill_no_range_are_counted_too(values):
    found = count_scores({"w": torch.tensor(values)}, {"w": torch.tensor([True, False])})
    json.dumps(found, allow_nan=False)
    row = found["all"]
    assert sum(row["kept"]) + row["below"][0] + row["infinite"][0] == 1
    assert sum(row["pruned"]) + row["below"][1] + row["infinite"][1] == 1
    assert bool(found["edges"]) == any(0 < value < math.inf for value in values)


def test_weights_that_were_gone_before_are_left_out():
    score, old = drawn(20, 20).abs(), Masks({"w": drawn(20, 20, seed=3) > 0})
    mask = old["w"] & (score > 1)
    row = count_scores({"w": score}, {"w": mask}, old)["all"]
    assert sum(row["kept"]) + row["below"][0] == int(mask.sum())
    assert sum(row["pruned"]) + row["below"][1] == int((old["w"] & ~mask).sum())


def test_of_very_many_tensors_only_the_sum_is_written():
    scores = {f"w{i}": drawn(2, 2, seed=i) for i in range(201)}
    found = count_scores(scores, {name: score > 0 for name, score in scores.items()})
    assert found["tensors"] == {}
    assert sum(found["all"]["kept"] + found["all"]["pruned"]) + sum(found["all"]["below"]) == 804


def test_a_plan_counts_the_scores_that_its_masks_come_from():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    task = Task(net, CrossEntropy(), [(torch.randn(6, 12), torch.randint(0, 3, (6,)))])
    assert plan(task, "sparsity 0.75").scores is None
    made = plan(task, "sparsity 0.75", record=True)
    row = made.scores["all"]
    assert sum(row["kept"]) + row["below"][0] == made.masks.kept == 30
    score = Magnitude()(task, made.masks)
    every = torch.cat([s.flatten() for s in score.values()]).sort(descending=True).values
    assert row["lowest_kept"] == float(every[29]) and row["highest_pruned"] == float(every[30])


@pytest.fixture
def scored(make_run, edit):
    """A run whose pruning step counted scores."""

    def make(table):
        run = make_run()
        edit(next(run.glob("2-*")) / "card.json", scores=table)
        return run

    return make


def table_of(scores, masks):
    return json.loads(json.dumps(count_scores(scores, masks)))


def section(made):
    return next((s for s in made.sections if s.title == "Scores"), None)


def test_the_charts_hold_the_counts_and_the_threshold(scored):
    scores = {f"layer{i}.weight": drawn(30, 30, seed=i).abs() for i in range(15)}
    table = table_of(scores, {name: score > 1.5 for name, score in scores.items()})
    made = section(report.build(scored(table)))
    assert all(isinstance(chart, Histogram) for chart in made.chart) and len(made.chart) == 13
    assert (list(made.chart[0].kept), list(made.chart[0].pruned)) == (table["all"]["kept"], table["all"]["pruned"])
    assert made.chart[0].marks[0][0] == table["all"]["lowest_kept"]
    assert "One threshold for all" in made.says and len(made.table.rows) == 15
    row = made.table.rows[4]
    assert [cell.value for cell in row[1:3]] == [900, int((scores["layer4.weight"] > 1.5).sum())]
    assert row[4].value == table["tensors"]["layer4.weight"]["lowest_kept"]


def test_thresholds_of_each_tensor_and_overlaps_are_told(scored):
    scores = {"a": drawn(30, 30).abs(), "b": drawn(30, 30, seed=1).abs()}
    own = section(report.build(scored(table_of(scores, {"a": scores["a"] > 0.2, "b": scores["b"] > 1.7}))))
    assert own.says.startswith("Each tensor has a threshold of its own")
    groups = {name: drawn(30, 30, seed=7) > 0 for name in scores}
    assert "overlap" in section(report.build(scored(table_of(scores, groups)))).says


@pytest.mark.parametrize(
    "spoil",
    [{"edges": [1.0]}, {"edges": [2.0, 1.0]}, {"edges": ["x"] * 41}, {"edges": [0.0, 1.0]}, {"all": None},
     {"all": {"kept": [1], "pruned": [-1]}}, {"edges": None, "all": 3}],
)  # fmt: skip
def test_a_damaged_record_gives_no_section(scored, spoil):
    scores = {"w": drawn(9, 9)}
    table = {**table_of(scores, {"w": scores["w"] > 0}), **spoil}
    assert section(report.build(scored(table))) is None


def test_hostile_names_stay_text(scored):
    bad = "</title><script>alert(1)</script>"
    scores = {bad: drawn(9, 9).abs(), "x" * 500: drawn(9, 9, seed=1).abs()}
    made = report.build(scored(table_of(scores, {name: score > 1 for name, score in scores.items()})))
    assert section(made).chart[1].title == bad
    assert "<script>alert" not in to_html(made)
