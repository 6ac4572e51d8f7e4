"""The knapsack against every choice there is, and its proofs."""

import itertools
import math
import random

import pytest

from secateur.core.errors import UsageError
from secateur.engine.planning.knapsack import Option, least_cost, least_loss


def brute(options, limit, loss_limited):
    """The least figure among all choices within the limit of the other; None when there is none."""
    found = []
    for choice in itertools.product(*options):
        cost, loss = sum(o.cost for o in choice), math.fsum(o.loss for o in choice)
        limited, wanted = (loss, cost) if loss_limited else (cost, loss)
        if limited <= limit:
            found.append(wanted)
    return min(found) if found else None


KINDS = {
    "whole": lambda r: Option(r.randint(0, 20), r.randint(0, 10) / 8),
    "floats": lambda r: Option(r.randint(0, 10**6), r.random()),
    "huge": lambda r: Option(r.randint(0, 10**30), r.uniform(-1, 1) * 10 ** r.randint(-20, 3)),
    "ties": lambda r: Option(r.choice([0, 0, 5]), r.choice([0.0, 0.1, 0.2, 0.3])),
    "negative": lambda r: Option(r.randint(-10, 10), r.gauss(0, 1)),
    "line": lambda r: (lambda c: Option(c, 1 - c / 64))(r.randint(0, 64)),
}


def instance(kind, seed):
    """Up to five layers of up to six options; the limit is met to the unit, or is any number."""
    r = random.Random(f"{kind} {seed}")
    options = [[KINDS[kind](r) for _ in range(r.randint(1, 6))] for _ in range(r.randint(0, 5))]
    chosen = [r.choice(every) for every in options]
    exactly = seed % 3 > 0
    cost = sum(o.cost for o in chosen) if exactly else r.randint(-5, 60)
    loss = math.fsum(o.loss for o in chosen) if exactly else r.uniform(-1, 3)
    return options, cost, loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(90))
def test_equals_every_choice(kind, seed):
    """540 instances, both ways: limit kept, value the least (but for rounding), bound true, cost and loss as told."""
    options, cost, loss = instance(kind, seed)
    for limit, loss_limited in ((cost, False), (loss, True)):
        best = brute(options, limit, loss_limited)
        found = (least_cost if loss_limited else least_loss)(options, limit)
        assert (found is None) == (best is None)
        if found is None:
            continue
        choice = [every[i] for every, i in zip(options, found.chosen, strict=True)]
        assert found.cost == sum(o.cost for o in choice)
        assert found.loss == math.fsum(o.loss for o in choice)
        assert (found.loss if loss_limited else found.cost) <= limit
        value = found.cost if loss_limited else found.loss
        assert found.bound <= best <= value
        assert found.exact
        assert value == best or abs(value - best) < 1e-15


@pytest.mark.parametrize("kind", ["line", "floats", "huge"])
@pytest.mark.parametrize("seed", range(20))
def test_bound_holds_with_few_states(kind, seed):
    """Three partial choices are not enough for a proof, but what is told stays true."""
    options, cost, loss = instance(kind, seed)
    for limit, loss_limited in ((cost, False), (loss, True)):
        best = brute(options, limit, loss_limited)
        found = (least_cost if loss_limited else least_loss)(options, limit, states=3)
        assert (found is None) == (best is None)
        if found is not None:
            value = found.cost if loss_limited else found.loss
            assert found.bound <= best <= value
            assert not found.exact or abs(value - best) < 1e-15


def layers(count=54, rungs=30, seed=0):
    """Layers of a network: costs fall with the density, losses rise, both with noise."""
    r = random.Random(seed)
    for _ in range(count):
        base, harm = r.lognormvariate(13, 1), r.lognormvariate(-4, 1.5)
        densities = [0.02 ** (i / (rungs - 1)) for i in range(rungs)]
        yield [
            Option(int(base * (0.1 + 0.9 * d) * r.uniform(0.9, 1.1)), harm * (1 - d) ** 2 * r.uniform(0.8, 1.2))
            for d in densities
        ]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_network_of_54_layers_is_solved_with_proof(share):
    options = list(layers())
    limit = int(share * sum(every[0].cost for every in options))
    found = least_loss(options, limit)
    assert found.exact and found.cost <= limit
    assert found.bound <= found.loss <= found.bound * (1 + 1e-12)
    back = least_cost(options, found.loss)
    assert back.exact and back.cost <= found.cost and back.loss <= found.loss


def test_a_line_is_not_proven_but_bounded():
    """Every unit of cost saves the same: nothing tells the choices apart, and the gap says how much is open."""
    r = random.Random(0)
    costs = [[r.randint(1, 10**9) for _ in range(20)] for _ in range(60)]
    options = [[Option(c, 1 - c / 1e9) for c in every] for every in costs]
    found = least_loss(options, 3 * 10**10, states=50)
    assert not found.exact
    assert 0 < found.loss - found.bound < 1e-4


def test_limits_without_end():
    options = [[Option(7, 0.5), Option(3, 1.0)]]
    assert least_cost(options, math.inf).cost == 3
    assert least_cost(options, -math.inf) is None
    assert least_loss(options, 10**40).loss == 0.5
    assert least_loss(options, 2) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([[Option(1, 1.0)], []], "layer 1 has no option"),
        ([[Option(1, math.nan)]], "finite"),
        ([[Option(1, math.inf)]], "finite"),
    ],
)
def test_refused(options, match):
    with pytest.raises(UsageError, match=match):
        least_loss(options, 5)


def test_no_number_and_no_states():
    with pytest.raises(UsageError, match="not a number"):
        least_cost([[Option(1, 1.0)]], math.nan)
    with pytest.raises(UsageError, match="states is 0"):
        least_loss([[Option(1, 1.0)]], 5, states=0)
