"""Networks drawn at random lose units drawn at random: the result is proved on fresh inputs, or nothing has changed."""

import copy
import random

import pytest
import torch
from tests.surgery.proofs import apart, draw, outputs, snapshot, unchanged
from tests.surgery.random_nets import random_network

from secateur.core.errors import SecateurError
from secateur.surgery import analyse, shrink
from secateur.surgery.reference import Zeroed

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

BLOCK = 20


def fresh(example, batch, seed):
    """Another input of the same kind."""
    made = torch.Generator().manual_seed(seed)
    if example.is_floating_point():
        return torch.randn(batch, *example.shape[1:], generator=made)
    return torch.randint(0, int(example.max()) + 1, (batch, *example.shape[1:]), generator=made)


def check(seed, removals):
    """One network and a few removals, each from a copy of its own; returns what became of them."""
    dice = random.Random(seed)
    model, (x,) = random_network(dice)
    model.eval()
    granularity = dice.choice(("heads", "dims"))
    analysis = analyse(model, x, granularity)
    outcomes = []
    for _ in range(removals):
        picked = draw(dice, analysis, "all", dice.choice((0.1, 0.3, 0.3, 0.7)))
        if not picked:
            break
        some = dice.sample(list(picked), max(1, int(0.3 * len(picked))))
        outcomes.append(attempt(copy.deepcopy(model), x, analysis, {name: picked[name] for name in some}, seed))
    return outcomes


def attempt(model, x, analysis, picked, seed):
    before = snapshot(model)
    labels = torch.cat([analysis.group(name).labels[torch.tensor(units)] for name, units in picked.items()])
    y = fresh(x, x.shape[0] if analysis.note else 3, seed)
    expected = Zeroed(analysis.run, labels, torch.float64)((y,), {})
    try:
        done = shrink(model, x, picked, analysis=analysis)
    except SecateurError as error:
        assert unchanged(before, model), f"seed {seed}: refused, and yet something changed"
        return f"refused: {error}"
    assert done.params[1] < done.params[0]
    assert apart(outputs(done.model, (y,), torch.float64), expected) < 1e-8, f"seed {seed}: wrong on fresh inputs"
    if done.rewritten:
        assert unchanged(before, model), f"seed {seed}: rewritten, and yet the network changed"
        return "rewritten"
    assert done.model is model
    return "own"


@pytest.mark.parametrize("first", range(0, 200, BLOCK))
def test_removals_are_exact_or_refused(first):
    """200 networks and 267 removals: a trace takes longer than a removal."""
    outcomes = [outcome for seed in range(first, first + BLOCK) for outcome in check(seed, 1 + (seed % 3 == 0))]

    assert len(outcomes) >= BLOCK
    assert sum(not outcome.startswith("refused") for outcome in outcomes) >= 0.95 * len(outcomes), outcomes


@pytest.mark.long
@pytest.mark.parametrize("first", range(200, 2200, 100))
def test_many_removals_are_exact_or_refused(first):
    for seed in range(first, first + 100):
        check(seed, 3)
