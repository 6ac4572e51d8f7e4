"""LAMP's counts found by histograms, against sorting all LAMP scores in one list."""

import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import tails
from secateur.core.allocations import Lamp
from secateur.core.tails import lamp_counts


def by_definition(scores, keep):
    """Exact fractions in one list; equal ones stand in the order of the tensors, and every tensor has its best one."""
    every = []
    for place, (name, score) in enumerate(scores.items()):
        squares = sorted((Fraction(v) ** 2 for v in score.double().reshape(-1).tolist()), reverse=True)
        tail = Fraction(0)
        for i, square in enumerate(squares):
            tail += square
            every.append((i > 0, -(square / tail if tail else Fraction(0)), place, name))
    plain = [name for _, _, _, name in sorted(every, key=lambda entry: entry[1:3])[:keep]]
    guarded = [name for *_, name in sorted(every, key=lambda entry: entry[:3])[:keep]]
    best = plain if set(plain) == set(scores) else guarded
    return {name: best.count(name) for name in scores}


@st.composite
def tensors(draw):
    """Scores whose squares and their sums are exact in float64: small whole numbers, many of them equal."""
    scores = {}
    for i in range(draw(st.integers(1, 4))):
        most = draw(st.sampled_from([0, 1, 3, 2**10]))
        values = draw(st.lists(st.integers(0, most), min_size=1, max_size=40))
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        scores[f"t{i}"] = torch.tensor(values, dtype=dtype) * 2.0 ** draw(st.integers(-30, 30))
    return scores


@settings(deadline=None, max_examples=150)
@given(tensors(), st.data())
def test_counts_are_those_of_one_sorted_list(scores, data):
    total = sum(s.numel() for s in scores.values())
    keep = data.draw(st.sampled_from([len(scores), total]) | st.integers(len(scores), total))

    assert lamp_counts(scores, keep) == by_definition(scores, keep)
    assert Lamp()(scores, keep) == by_definition(scores, keep)


def sorted_levels(scores, keep):
    """LAMP scores of the slow way in float64, one list, best first: the lowest kept and the highest that is not."""
    levels = []
    for score in scores.values():
        squares = score.double().reshape(-1).sort(descending=True).values.square()
        levels.append(squares / squares.cumsum(0))
    ordered = torch.cat(levels).sort(descending=True).values
    return levels, ordered[keep - 1].item(), ordered[min(keep, len(ordered) - 1)].item()


KINDS = {
    "normal": lambda r, n: torch.randn(n, generator=r).abs(),
    "one value": lambda r, n: torch.full((n,), 0.3),
    "narrow": lambda r, n: 1 + 1e-4 * torch.rand(n, generator=r),
    "narrower than float32": lambda r, n: 1 + 1e-9 * torch.rand(n, generator=r, dtype=torch.float64),
    "few values": lambda r, n: torch.randint(0, 5, (n,), generator=r).float(),
    "mostly zeros": lambda r, n: torch.rand(n, generator=r) * (torch.rand(n, generator=r) < 0.1),
    "bfloat16": lambda r, n: torch.rand(n, generator=r).bfloat16(),
    "far apart": lambda r, n: torch.exp(40 * torch.randn(n, generator=r, dtype=torch.float64)),
}


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.97])
@pytest.mark.parametrize("kind", KINDS)
def test_large_tensors_keep_those_above_one_threshold(kind, share, monkeypatch):
    """The total is exact; no tensor keeps a score that is worse than one left out, but for rounding."""
    monkeypatch.setattr(tails, "_READ", 1 << 14)  # cells are read in several rounds, as of a hundred million scores
    random = torch.Generator().manual_seed(1)
    scores = {"a": KINDS[kind](random, 60_000), "b": KINDS["normal"](random, 30_000), "c": KINDS[kind](random, 700)}
    total = sum(s.numel() for s in scores.values())
    keep = int(total * share)

    counts = lamp_counts(scores, keep)

    levels, last, _ = sorted_levels(scores, keep)
    assert sum(counts.values()) == keep
    for (name, count), level in zip(counts.items(), levels, strict=True):
        assert count >= 1
        assert level[count - 1] >= last * (1 - 1e-9), (name, count)
        assert count == len(level) or level[count] <= last * (1 + 1e-9), (name, count)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300])
def test_scores_at_the_ends_of_float64(scale):
    scores = {"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * scale, "b": torch.tensor([1.0, 5.0])}

    assert lamp_counts(scores, 3) == {"a": 2, "b": 1}  # 9/9 and 25/25, then 4/13 before 1/26 and 1/14


def test_memory_is_that_of_the_histograms_not_of_the_scores():
    """The peak of a process of its own: 16 million float64 copies of the scores alone would be 128 MB, a sort 500."""
    code = (
        "import resource, torch\n"
        "from secateur.core.allocations import Lamp\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000\n"
        "torch.set_num_threads(1)\n"
        "Lamp()({'a': torch.rand(1000)}, 100)\n"
        "scores = {name: torch.rand(8_000_000) for name in 'ab'}\n"
        "before = peak()\n"
        "counts = Lamp()(scores, 800_000)\n"
        "print(sum(counts.values()), peak() - before)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    kept, extra = map(int, done.stdout.split())
    assert kept == 800_000
    assert extra < 100
