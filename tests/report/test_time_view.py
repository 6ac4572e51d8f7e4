"""Where the time goes: the engine's record against the plan, the view against the record."""

import copy
import json

import pytest
import torch
from torch import nn

import secateur
from secateur import report
from secateur.core.masks import Masks
from secateur.engine.layer_times import layer_times
from secateur.nets import build
from secateur.runtime import Session

TIME = {
    "isa": "avx2", "threads": 2, "batch": 1, "rounds": 15, "dense_ms": 2.0,
    "compiled": [
        {"node": "stem", "op": "conv", "path": "pack", "reason": "", "nonzeros": 0, "weights": 0, "ms": 0.05,
         "tensors": ["stem.weight"]},
        {"node": "stem", "op": "conv", "path": "lists", "reason": "zeros are skipped one by one", "nonzeros": 5,
         "weights": 432, "ms": 0.15, "tensors": ["stem.weight"]},
        {"node": "pool", "op": "max_pool", "path": "lanes", "reason": "", "nonzeros": 0, "weights": 0, "ms": 0.1,
         "tensors": []},
        {"node": "head", "op": "linear", "path": "dense", "reason": "few zeros", "nonzeros": 5, "weights": 640,
         "ms": 0.5, "tensors": ["head.weight"]},
    ],
    "dense": [{"tensors": ["stem.weight"], "ms": 0.8}, {"tensors": ["head.weight"], "ms": 0.4}],
}  # fmt: skip


@pytest.fixture
def timed(make_run, edit):
    """A run whose verdict tells of the time of its layers."""

    def make(table, **options):
        run = make_run(**options)
        edit(next(run.glob("4-*")) / "verdict.json", time=table)
        return run

    return make


def section(made, title="Where the time goes"):
    return next((s for s in made.sections if s.title == title), None)


def cells(made, title, name):
    table = section(made, title).table
    row = next(row for row in table.rows if row[0].text == name)
    return {column.name: cell for column, cell in zip(table.columns, row, strict=True)}


def test_the_steps_of_a_layer_are_summed_and_its_path_is_that_of_its_weights(timed):
    made = report.build(timed(TIME))
    stem = cells(made, "Where the time goes", "stem.weight")
    assert stem["Compiled, ms"].value == pytest.approx(0.2) and stem["Share"].value == pytest.approx(25.0)
    assert (stem["Path"].text, stem["Why"].text) == ("lists", "zeros are skipped one by one")
    assert stem["Times as fast"].value == pytest.approx(4.0)
    assert [row[0].text for row in section(made).table.rows] == ["head.weight", "stem.weight", "pool"]
    assert section(made).table.total[1].value == pytest.approx(0.8)
    layer = cells(made, "Layers", "stem.weight")
    assert layer["ms"].value == pytest.approx(0.2)
    assert layer["Path and why"].text == "lists: zeros are skipped one by one"


def test_the_bars_are_shares_of_the_whole(timed):
    compiled, dense = section(report.build(timed(TIME))).chart
    assert dict(zip(compiled.names, compiled.values, strict=True)) == pytest.approx(
        {"head.weight": 62.5, "stem.weight": 25.0, "pool": 12.5}
    )
    assert dict(zip(dense.names, dense.values, strict=True)) == pytest.approx(
        {"stem.weight": 40.0, "head.weight": 20.0, "everything else": 40.0}
    )


def test_many_layers_are_summed_up_in_the_chart_and_all_in_the_table(timed):
    rows = [{**TIME["compiled"][3], "node": f"n{i}", "tensors": [f"n{i}.weight"], "ms": 1.0} for i in range(200)]
    made = section(report.build(timed({"compiled": rows})))
    assert len(made.table.rows) == 200 and made.table.tools and len(made.chart) == 1
    assert sum(made.chart[0].values) == pytest.approx(100.0) and made.chart[0].names[-1] == "176 more"
    assert "Dense in torch, ms" not in [column.name for column in made.table.columns]


@pytest.mark.parametrize(
    "table",
    [None, [], {}, {"compiled": 3}, {"compiled": [1, None]}, {"compiled": [{"node": "a", "ms": None}]},
     {"compiled": [{"node": "a", "ms": "nan"}, {"node": 4, "ms": 1.0}]}, {"compiled": [{"node": "a", "ms": -1}]},
     {"compiled": [{"node": "a", "ms": 0.0}]}],
)  # fmt: skip
def test_what_is_no_time_gives_no_section(timed, table):
    made = report.build(timed(table))
    assert section(made) is None and section(made, "Layers") is not None


def test_hostile_names_and_reasons_stay_text(timed):
    bad = "</script><script>alert(1)</script>"
    row = {**TIME["compiled"][1], "node": bad, "tensors": [bad], "reason": bad, "path": bad}
    run = timed({"compiled": [row], "dense": [{"tensors": [bad], "ms": 0.1}], "dense_ms": 0.2, "isa": bad})
    text = report.write(run).read_text()
    assert "<script>alert" not in text and section(report.build(run)).table.rows[0][0].text == bad


class Twice(nn.Module):
    """A network that calls one layer twice and another, tied to it, once."""

    def __init__(self):
        super().__init__()
        self.body, self.tail = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tail.weight = self.body.weight
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.tail(self.body(self.body(x).relu()).relu())


def test_the_record_follows_the_plan_and_leaves_the_network_alone(tmp_path):
    torch.manual_seed(0)
    dense = build("lenet5")
    pruned = copy.deepcopy(dense)
    masks = Masks({n: torch.rand(p.shape) < 0.1 for n, p in pruned.named_parameters() if p.dim() > 1})
    masks.apply_(pruned)
    x = torch.randn(1, 1, 28, 28)
    path = secateur.compile(pruned.eval(), x, threads=1).save(tmp_path)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    found = layer_times(dense, path, masks, x, 1, rounds=3)
    assert dense.training and torch.get_num_threads() == threads
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    with Session(path, threads=1) as session:
        steps = session.explain(1)["steps"]
    assert [(row["node"], row["path"], row["reason"]) for row in found["compiled"]] == [
        (step["node"], step["path"], step["reason"]) for step in steps
    ]
    kept = {row["tensors"][0]: row["nonzeros"] for row in found["compiled"] if row["weights"]}
    assert kept == masks.counts()
    assert [row["tensors"] for row in found["dense"]] == [[name] for name in masks]
    assert all(0 < row["ms"] < found["dense_ms"] for row in found["dense"])
    json.dumps(found, allow_nan=False)


def test_a_tied_tensor_is_clocked_in_each_of_its_layers(tmp_path):
    net = Twice()
    path = secateur.compile(net, torch.randn(2, 6), threads=1).save(tmp_path)
    net.calls = 0
    found = layer_times(net, path, {"body.weight": None}, torch.randn(2, 6), 1, rounds=2)
    assert net.calls == 5
    assert [row["tensors"] for row in found["dense"]] == [["body.weight"], ["body.weight"]]
    assert (found["batch"], found["rounds"]) == (2, 2)
