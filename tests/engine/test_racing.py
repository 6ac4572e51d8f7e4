"""Races between ways to compute the same."""

import math

import numpy as np
import pytest

from secateur.core.errors import ModelError, UsageError
from secateur.engine.racing import Race, race


class Scripted:
    """A candidate whose times are written down."""

    def __init__(self, times: list[list[float]], value: float = 1.0) -> None:
        self.times, self.value, self.turns = times, value, 0

    def result(self) -> np.ndarray:
        return np.full(3, self.value)

    def round(self, seconds: float, least: int) -> list[float]:
        self.turns += 1
        return self.times[self.turns - 1]


def test_medians_and_ratios_are_those_of_the_rounds() -> None:
    slow, fast = Scripted([[4.0, 6.0, 5.0], [8.0], [6.0]]), Scripted([[1.0], [2.0, 4.0, 3.0], [2.0]])
    made = race({"slow": slow, "fast": fast}, rounds=3)
    assert made.rounds == {"slow": [5.0, 8.0, 6.0], "fast": [1.0, 3.0, 2.0]}
    assert made.best == {"slow": 4.0, "fast": 1.0}
    assert made.ratio("slow", "fast") == (3.0, 8 / 3, 5.0)


def test_every_candidate_has_every_turn() -> None:
    pair = {name: Scripted([[1.0]] * 4) for name in ("a", "b", "c")}
    race(pair, rounds=4)
    assert {c.turns for c in pair.values()} == {4}


@pytest.mark.parametrize("value", [1.01, math.nan])
def test_a_wrong_result_voids_the_race(value: float) -> None:
    with pytest.raises(ModelError, match="fast computes something else"):
        race({"slow": Scripted([[1.0]]), "fast": Scripted([[1.0]], value)}, rounds=1)


def test_functions_are_timed_in_milliseconds() -> None:
    made = race({"a": lambda: np.zeros(2)}, rounds=2, seconds=1e-6, least=3)
    assert isinstance(made, Race) and all(t > 0 for t in made.rounds["a"])
    assert made.best["a"] <= made.median("a")


def test_no_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="rounds is 0"):
        race({"a": lambda: np.zeros(2)}, rounds=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_whose_own_result_is_not_finite_is_not_raced(value: float) -> None:
    """The cure is at the network, not at the rival that computes the same."""
    with pytest.raises(ModelError, match=r"own result \(torch\) holds NaN or infinity.*doctor"):
        race({"torch": Scripted([], value), "secateur": Scripted([], value)}, rounds=1)
