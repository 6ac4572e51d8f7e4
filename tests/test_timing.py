"""The benchmarks' stopwatch: what is timed, in which order, and what is written down."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import importlib.util
import json
import pathlib

import pytest
import torch

from secateur.engine.folder import origin

PATH = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "timing.py"
_spec = importlib.util.spec_from_file_location("benchmark_timing", PATH)
timing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(timing)


@pytest.mark.parametrize(("rounds", "warmup"), [(4, 0), (3, 2), (5, 1)])
def test_candidates_run_in_turn_and_only_rounds_after_the_warm_up_count(rounds, warmup):
    """On a clock that a candidate's call moves on by (10 or 100) + the number of calls so far."""
    calls, now = [], [0.0]

    def candidate(name, cost):
        def call():
            calls.append(name)
            now[0] += cost + len(calls)

        return call

    times = timing.measure({"a": candidate("a", 10), "b": candidate("b", 100)}, rounds, warmup, lambda: now[0])

    pairs = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(pairs) == rounds + warmup
    assert pairs[0::2] == [["b", "a"]] * len(pairs[0::2]) and pairs[1::2] == [["a", "b"]] * len(pairs[1::2])
    for name, cost in (("a", 10), ("b", 100)):
        places = [place for place, who in enumerate(calls, 1) if who == name][warmup:]
        assert times[name] == [cost + place for place in places]


def test_ratios_are_of_neighbours_and_medians_of_each():
    """A neighbour that slows a whole round down a hundredfold moves no ratio."""
    times = {"a": [1.0, 200.0, 3.0], "b": [2.0, 400.0, 12.0]}

    assert timing.ratio(times, "a", "b") == 0.5
    assert timing.ratio(times, "b", "a") == 2.0
    assert timing.medians(times) == {"a": 3.0, "b": 12.0}
    with pytest.raises(ValueError):
        timing.ratio({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


def test_every_result_is_one_line_with_the_machine_it_was_taken_on(tmp_path):
    """The machine is named as in the card of a run."""
    path = tmp_path / "results.jsonl"
    timing.record("one", {"seconds": 0.5}, path)
    timing.record("two", {"seconds": 1.5}, path)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["benchmark"], row["seconds"]) for row in rows] == [("one", 0.5), ("two", 1.5)]
    card = origin()
    for row in rows:
        assert {k: row[k] for k in ("cpu", "cores", "torch", "python")} == {
            k: card[k] for k in ("cpu", "cores", "torch", "python")
        }
        assert row["threads"] == torch.get_num_threads() and row["commit"] and row["date"]
