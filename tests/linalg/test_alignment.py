"""Matching of units: permutations that are known, and a definition written out for one hidden layer."""

import itertools

import pytest
import torch

from secateur.core.errors import ModelError, UsageError
from secateur.core.streams import stream
from secateur.linalg.alignment import Exchange, Place, match, permute

UNITS = 6
HIDDEN = Exchange(
    "hidden",
    (
        Place("w1", 0, torch.arange(UNITS)[:, None]),
        Place("b1", 0, torch.arange(UNITS)[:, None]),
        Place("w2", 1, torch.arange(UNITS)[:, None]),
    ),
)
WEIGHTS = ("w1", "b1", "w2")


def layer(seed):
    random = stream(seed, "test", "alignment")
    shapes = {"w1": (UNITS, 4), "b1": (UNITS,), "w2": (3, UNITS)}
    return {n: torch.randn(shape, generator=random, dtype=torch.float64) for n, shape in shapes.items()}


def written_out(state, order):
    """P W1, P b1, W2 Pᵀ with matrices."""
    p = torch.eye(UNITS, dtype=torch.float64)[order]
    return {"w1": p @ state["w1"], "b1": p @ state["b1"], "w2": state["w2"] @ p.T}


def product(a, b):
    return float(sum((a[n] * b[n]).sum() for n in WEIGHTS))


def test_permuting_is_multiplication_with_permutation_matrices():
    state, order = layer(0), torch.tensor([3, 0, 5, 1, 2, 4])
    moved = permute(state, [HIDDEN], {"hidden": order})
    expected = written_out(state, order)
    assert all(torch.equal(moved[n], expected[n]) for n in WEIGHTS)
    assert torch.equal(state["w1"], layer(0)["w1"])


def test_masks_and_counts_move_along_and_absent_tensors_are_passed_over():
    order = torch.tensor([1, 0, 2, 3, 5, 4])
    mask = layer(0)["w1"] > 0
    assert torch.equal(permute({"w1": mask}, [HIDDEN], {"hidden": order})["w1"], mask[order])


def test_units_of_several_slices_keep_the_order_inside_each():
    flat = Exchange("flat", (Place("w", 1, torch.tensor([[0, 1], [2, 3], [4, 5]])),))
    moved = permute({"w": torch.arange(6)[None]}, [flat], {"flat": torch.tensor([2, 0, 1])})
    assert moved["w"].tolist() == [[4, 5, 0, 1, 2, 3]]


def test_the_best_of_all_permutations_is_found():
    small = Exchange("hidden", tuple(Place(p.tensor, p.dim, p.index[:5]) for p in HIDDEN.places))
    one, two = layer(0), layer(1)
    found = match(one, two, [small], WEIGHTS)
    best = max(product(one, written_out(two, torch.tensor([*order, 5]))) for order in itertools.permutations(range(5)))
    assert product(one, found.state) == pytest.approx(best, rel=1e-12)
    assert found.objective[-1] == pytest.approx(best, rel=1e-12)
    assert found.objective[0] == pytest.approx(product(one, two), rel=1e-12)
    assert product(one, two) < best


def test_a_permuted_copy_is_brought_back_to_the_bit_and_a_second_sweep_gains_nothing():
    one, order = layer(0), torch.tensor([3, 0, 5, 1, 2, 4])
    two = permute(one, [HIDDEN], {"hidden": order})
    found = match(one, two, [HIDDEN], WEIGHTS)
    assert all(torch.equal(found.state[n], one[n]) for n in WEIGHTS)
    assert torch.equal(order[found.orders["hidden"]], torch.arange(UNITS))
    assert (found.sweeps, len(found.objective)) == (2, 2)


def test_the_two_networks_swapped_give_the_inverse():
    one, two = layer(0), layer(1)
    there = match(one, two, [HIDDEN], WEIGHTS).orders["hidden"]
    back = match(two, one, [HIDDEN], WEIGHTS).orders["hidden"]
    assert torch.equal(there[back], torch.arange(UNITS)) and not torch.equal(there, torch.arange(UNITS))


def test_only_weights_count_and_other_tensors_move_along():
    one, order = layer(0), torch.tensor([3, 0, 5, 1, 2, 4])
    carried = Exchange("hidden", (*HIDDEN.places, Place("mean", 0, torch.arange(UNITS)[:, None])))
    two = permute(one, [HIDDEN], {"hidden": order})
    mean = 100 * torch.arange(UNITS, dtype=torch.float64)
    found = match({**one, "mean": mean.flip(0)}, {**two, "mean": mean}, [carried], WEIGHTS)
    assert torch.equal(found.state["mean"], mean[found.orders["hidden"]])
    assert torch.equal(order[found.orders["hidden"]], torch.arange(UNITS))


@pytest.mark.parametrize("seed", range(3))
def test_the_product_never_falls_with_a_tensor_that_carries_units_twice_and_two_groups(seed):
    random = stream(seed, "test", "square")

    def drawn():
        return {n: torch.randn(9, 9, generator=random, dtype=torch.float64) for n in ("square", "out")}

    each = torch.arange(9)[:, None]
    groups = [
        Exchange("stream", (Place("square", 0, each), Place("square", 1, each), Place("out", 1, each))),
        Exchange("free", (Place("out", 0, each),)),
    ]
    one, two = drawn(), drawn()
    found = match(one, two, groups, ("square", "out"), stream(seed, "order"))
    steps = [b - a for a, b in itertools.pairwise(found.objective)]
    assert steps and all(step > 0 for step in steps)
    again = permute(two, groups, found.orders)
    assert all(torch.equal(again[n], found.state[n]) for n in two)
    last = sum(float((one[n] * again[n]).sum()) for n in two)
    assert found.objective[-1] == pytest.approx(last, rel=1e-9)


def test_other_architectures_and_wrong_orders_are_refused():
    one = layer(0)
    with pytest.raises(ModelError, match="only one has `b1`"):
        match(one, {n: one[n] for n in ("w1", "w2")}, [HIDDEN], WEIGHTS)
    with pytest.raises(ModelError, match=r"`w1` has shapes \(6, 4\) and \(6, 3\)"):
        match(one, {**one, "w1": one["w1"][:, :3]}, [HIDDEN], WEIGHTS)
    with pytest.raises(UsageError, match="no permutation of 0 to 5"):
        permute(one, [HIDDEN], {"hidden": torch.tensor([0, 0, 1, 2, 3, 4])})
    with pytest.raises(UsageError, match="Did you mean 'hidden'"):
        permute(one, [HIDDEN], {"hiden": torch.arange(6)})
