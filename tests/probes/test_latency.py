# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Latency: what is called, how often, in which order, and how the times are summed up. No time is asserted."""

import gc
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError, UsageError
from secateur.core.reading import Reading
from secateur.core.task import Task
from secateur.probes._statistics import median_interval
from secateur.probes.latency import Latency, _ratio, _reading, compare, dense_and_pruned


class Recorder(nn.Module):
    """Notes how it is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 2), []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return self.layer(x)


def recorder_task(rows=3):
    return Task(Recorder().train(), functional.cross_entropy, [(torch.randn(rows, 4), torch.zeros(rows))])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_it_calls_warmup_plus_rounds_times_in_evaluation_mode_without_gradients(batch):
    task = recorder_task()
    threads = torch.get_num_threads()

    reading = Latency(batch, rounds=7, warmup=2, threads=2)(task)

    assert task.model.seen == [((batch, 4), False, False, 2)] * 9
    assert task.model.training and torch.get_num_threads() == threads and gc.isenabled()
    assert (reading.n, reading.unit, reading.parts["threads"], reading.parts["batch"]) == (7, "ms", 2, batch)
    assert 0 < reading.low <= reading.value <= reading.high
    assert reading.parts["p10"] <= reading.value <= reading.parts["p90"]
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading


def test_the_summary_is_the_median_its_order_statistics_and_percentiles():
    times = [float(i) for i in range(1, 12)]
    reading = _reading(times[::-1], 3)
    assert (reading.value, reading.parts["p10"], reading.parts["p90"]) == (6.0, 2.0, 10.0)
    assert (reading.low, reading.high) == median_interval(times) == (2.0, 10.0)
    assert reading.note == "" and "5 rounds are too few" in _reading(times[:5], 1).note


def test_candidates_take_turns_and_another_one_begins_each_round():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    readings = compare(calls, rounds=4, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert list(readings) == ["a", "b", "c"] and all(r.n == 4 for r in readings.values())


def test_the_ratio_is_that_of_the_medians_with_a_paired_interval():
    slow = [2.0, 4.0, 6.0, 8.0, 10.0]
    ratio = _ratio(slow, [x / 2 for x in slow])  # twice as fast in every round, so nothing is left to chance
    assert (ratio.value, ratio.low, ratio.high, ratio.stderr, ratio.unit) == (2.0, 2.0, 2.0, 0.0, "x")
    uneven = _ratio(slow, [3.0, 1.0, 2.0, 2.5, 4.0])
    assert math.isclose(uneven.value, 6.0 / 2.5) and uneven.low < uneven.value < uneven.high
    assert _ratio([2.0], [1.0]).low is None


def test_dense_and_pruned_are_called_equally_often_and_left_in_their_modes():
    dense, pruned = Recorder().train(), Recorder().eval()
    slow, fast, ratio = dense_and_pruned(dense, pruned, torch.randn(1, 4), rounds=6, warmup=1, threads=1)
    assert len(dense.seen) == len(pruned.seen) == 7
    assert not any(training or grad for _, training, grad, _ in dense.seen + pruned.seen)
    assert dense.training and not pruned.training
    assert math.isclose(ratio.value, slow.value / fast.value)
    assert ratio.low <= ratio.value <= ratio.high and ratio.n == 6


def test_inputs_by_keyword_are_called_by_keyword():
    class Keyword(nn.Module):
        def forward(self, *, ids):
            return ids

    task = Task(Keyword(), functional.cross_entropy, [({"ids": torch.ones(2, 3)}, torch.zeros(2))])
    assert Latency(rounds=1, warmup=0)(task).n == 1


def test_threads_and_garbage_collection_come_back_after_an_error():
    threads = torch.get_num_threads()

    def fail():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        compare({"a": fail}, warmup=0, threads=threads + 1)
    assert torch.get_num_threads() == threads and gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0.*at least 1"),
        ({"threads": 0}, "threads=0.*at least 1"),
        ({"batch": -1}, "batch=-1.*at least 1"),
        ({"warmup": -1}, "warmup=-1.*at least 0"),
    ],
)
def test_counts_below_the_least_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Latency(**options)


def test_nothing_to_compare_and_no_data_are_refused():
    with pytest.raises(UsageError, match="nothing to compare"):
        compare({})
    with pytest.raises(DataError, match="no example"):
        Latency()(Task(nn.Linear(4, 2), functional.cross_entropy, []))
