"""The contract of solvers: exact counts, exact zeros, and never worse than zeroing the same weights.

For authors of solvers: one line in a test file, ``check_solver(MySolver())``. The first broken promise raises
:class:`ContractError` with the solver, the promise, the layer and what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.patterns import NM, Block, Pattern, Unit, Unstructured
from secateur.core.sockets import Solver
from secateur.core.streams import seed_global, stream
from secateur.testing.promises import ContractError, broken, check_form, expect, expecting, same_random_state

__all__ = ["ContractError", "check_solver"]

_SHAPES = ((1, 8), (6, 16), (12, 24))
_EXACT = 1e-7  # matrices are factored anew after a change of order
_ROUNDED = 1e-3


@dataclass(frozen=True)
class _Case:
    """A layer with its pattern and the number of weights to keep."""

    weight: Tensor
    gram: Tensor
    pattern: Pattern
    keep: int

    @property
    def where(self) -> str:
        """What to call it in a message."""
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"{tuple(self.weight.shape)} in {kind}, {self.pattern}, keep {self.keep}"


def check_solver(solver: Solver, device: torch.device | str = "cpu") -> None:
    """Check a solver against the contract of all solvers; returns when it holds.

    Its form (a frozen dataclass, docstring with a *Cost*, paper, repr that rebuilds it). On layers of several shapes,
    with single weights and N:M: exactly ``keep`` weights kept, the others +0.0, type, shape and device those of the
    weight, no memory shared, nothing attached, inputs and global random state untouched to the bit; an error never
    above that of zeroing the same weights; the same twice; close in float32 and float64; bfloat16 comes back as
    bfloat16. With an identity for a Gram matrix the largest weights stay, unmoved. To keep all changes no bit. The
    order of the rows does not matter, nor that of the columns (not asked of a solver that needs their ``"order"``),
    nor a factor on the Gram matrix. Dead inputs go first, and while they do no other weight moves. A singular Gram
    matrix is solved, or refused with a word on the damping. What is not finite, does not fit or is another pattern
    is refused with a :class:`SecateurError`.

    Args:
        solver: the instance to check.
        device: where the layers live.

    Raises:
        ContractError: at the first promise broken.

    Cost: about two hundred calls on tiny layers, a few seconds.
    """
    check_form(solver, Solver)
    with same_random_state():
        for case in _cases(device):
            for check in (_check_result, _check_repeats, _check_types, _check_orders, _check_factor):
                check(solver, case)
        for check in (_check_identity, _check_ends, _check_dead, _check_singular, _check_refusals):
            check(solver, device)


def _layer(shape: tuple[int, int], device: torch.device | str, examples: int = 0) -> tuple[Tensor, Tensor]:
    """Random weights and the Gram matrix of correlated inputs, three examples an input unless told."""
    random = stream(0, "contracts", f"{shape}")
    n = examples or 3 * shape[1]
    inputs = torch.randn(n, shape[1], generator=random, dtype=torch.float64)
    inputs = inputs + torch.randn(n, 1, generator=random, dtype=torch.float64)
    weight = torch.randn(shape, generator=random, dtype=torch.float64)
    return weight.to(device), (inputs.T @ inputs / n).to(device)


def _cases(device: torch.device | str) -> Iterator[_Case]:
    for shape in _SHAPES:
        weight, gram = _layer(shape, device)
        count = weight.numel()
        for keep in sorted({1, count // 10 + 1, count // 2, count - 1}):
            yield _Case(weight, gram, Unstructured(), keep)
        for pattern in (NM(2, 4), NM(1, 4)):
            yield _Case(weight, gram, pattern, count // pattern.m * pattern.n)


def _solved(solver: Solver, case: _Case) -> tuple[Tensor, Tensor]:
    try:
        new, mask = solver(case.weight, case.gram, case.pattern, case.keep)
    except Exception as error:
        raise broken(solver, "works", case.where, f"it raised {type(error).__name__}: {error}") from error
    must = expecting(solver, case.where)
    must(mask.dtype == torch.bool, "gives a boolean mask", f"its type is {mask.dtype}")
    for what, tensor in (("weight", new), ("mask", mask)):
        same = tensor.shape == case.weight.shape and tensor.device == case.weight.device
        must(same, "keeps shape and device", f"the {what} has {tuple(tensor.shape)} on {tensor.device}")
    must(new.dtype == case.weight.dtype, "keeps the type of the weight", f"it became {new.dtype}")
    must(not new.requires_grad, "gives weights detached from any graph", "they require gradients")
    must(int(mask.sum()) == case.keep, "keeps exactly the count", f"it kept {int(mask.sum())}")
    zeros = new[~mask]
    must(not bool((zeros.ne(0) | zeros.signbit()).any()), "leaves exact zeros", f"pruned weights are {zeros.tolist()}")
    must(bool(new.isfinite().all()), "gives finite weights", f"{int((~new.isfinite()).sum())} are not")
    if isinstance(case.pattern, NM):
        most = int(mask.reshape(-1, case.pattern.m).sum(1).max())
        must(most <= case.pattern.n, "keeps N of every M", f"a group keeps {most}")
    zeroed = _error(case, case.weight.detach().masked_fill(~mask, 0.0))
    found = _error(case, new)
    must(
        found <= zeroed * (1 + 1e-9) + 1e-300, "is no worse than zeroing", f"its error is {found}, of zeroing {zeroed}"
    )
    return new, mask


def _error(case: _Case, new: Tensor) -> float:
    """How much the outputs of the layer change, squared, mean over the examples."""
    change = new.double() - case.weight.detach().double()
    return float(torch.einsum("oi,ij,oj->", change, case.gram.double(), change))


def _check_result(solver: Solver, case: _Case) -> None:
    weight, gram = case.weight.clone().requires_grad_(), case.gram.clone()
    before = torch.get_rng_state()
    new, mask = _solved(solver, _Case(weight, gram, case.pattern, case.keep))
    must = expecting(solver, case.where)
    unchanged = torch.equal(weight, case.weight) and torch.equal(gram, case.gram) and weight.grad is None
    must(unchanged, "leaves its inputs as they were", "weight or Gram matrix changed")
    must(torch.equal(before, torch.get_rng_state()), "draws no global random numbers", "the state moved")
    shared = new.data_ptr() in (weight.data_ptr(), gram.data_ptr()) or mask.data_ptr() == weight.data_ptr()
    must(not shared, "shares no memory with its inputs", "the result is a view")


def _check_repeats(solver: Solver, case: _Case) -> None:
    tolerance = 0.0 if case.weight.device.type == "cpu" else _EXACT  # other devices add up in any order
    first = _solved(solver, case)
    seed_global(1)
    _compare(solver, "gives the same twice", case, first, _solved(solver, case), tolerance)
    apart = _Case(case.weight.T.contiguous().T, case.gram.T.contiguous().T, case.pattern, case.keep)
    _compare(solver, "does not depend on the layout in memory", case, first, _solved(solver, apart), _EXACT)


def _check_types(solver: Solver, case: _Case) -> None:
    single = _Case(case.weight.float(), case.gram.float(), case.pattern, case.keep)
    exact = _solved(solver, case)
    _compare(solver, "agrees in float32 and float64", case, exact, _solved(solver, single), _ROUNDED)
    half = _Case(case.weight.bfloat16(), case.gram.float(), case.pattern, case.keep)
    new, mask = _solved(solver, half)
    expect(bool(new.any()), solver, "works in bfloat16", half.where, "all weights are zero")
    rounded = _Case(half.weight.double(), half.gram.double(), case.pattern, case.keep)
    same = torch.equal(_solved(solver, rounded)[1], mask)
    expect(same, solver, "works in float32 or wider", half.where, "the rounded layer in float64 has another mask")


def _check_orders(solver: Solver, case: _Case) -> None:
    random = stream(1, "contracts", case.where)
    first = _solved(solver, case)
    rows = torch.randperm(len(case.weight), generator=random).to(case.weight.device)
    turned = _solved(solver, _Case(case.weight[rows], case.gram, case.pattern, case.keep))
    wanted = first[0][rows], first[1][rows]
    _compare(solver, "does not depend on the order of the rows", case, wanted, turned, _EXACT)
    if "order" in solver.needs:
        return
    m = case.pattern.m if isinstance(case.pattern, NM) else 1
    groups = torch.randperm(case.weight.shape[1] // m, generator=random)
    columns = (groups[:, None] * m + torch.randperm(m, generator=random)).flatten().to(case.weight.device)
    moved = _Case(case.weight[:, columns], case.gram[columns][:, columns], case.pattern, case.keep)
    wanted = first[0][:, columns], first[1][:, columns]
    _compare(solver, "does not depend on the order of the columns", case, wanted, _solved(solver, moved), _EXACT)


def _check_factor(solver: Solver, case: _Case) -> None:
    scaled = _Case(case.weight, 1024 * case.gram, case.pattern, case.keep)
    _compare(solver, "does not depend on a factor", case, _solved(solver, case), _solved(solver, scaled), _EXACT)


def _compare(
    solver: Solver, promise: str, case: _Case, expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], at: float
) -> None:
    other = int((expected[1] != found[1]).sum())
    expect(other == 0, solver, promise, case.where, f"{other} entries of the mask differ")
    worst = float((expected[0].double() - found[0].double()).abs().max())
    scale = float(expected[0].double().abs().max())
    expect(worst <= at * scale, solver, promise, case.where, f"weights of up to {scale:.3g} differ by {worst:.3g}")


def _check_identity(solver: Solver, device: torch.device | str) -> None:
    for case in _cases(device):
        eye = torch.eye(len(case.gram), dtype=torch.float64, device=device)
        case = _Case(case.weight, eye, case.pattern, case.keep)
        new, mask = _solved(solver, case)
        same = torch.equal(mask, case.pattern.mask(case.weight.abs(), case.keep))
        expect(same, solver, "keeps the largest weights when inputs are alike", case.where, "it kept others")
        moved = float((new - case.weight)[mask].abs().max())
        expect(moved <= 1e-12, solver, "moves no weight when inputs are unrelated", case.where, f"by {moved:.3g}")


def _check_ends(solver: Solver, device: torch.device | str) -> None:
    weight, gram = _layer((5, 12), device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = _Case(weight.to(dtype), gram.float(), Unstructured(), weight.numel())
        new, _ = _solved(solver, case)
        expect(torch.equal(new, case.weight), solver, "keeps all as they are", case.where, "weights changed")
        shared = new.data_ptr() == case.weight.data_ptr()
        expect(not shared, solver, "shares no memory with its inputs", case.where, "it gave the weight itself")
        _solved(solver, _Case(weight.to(dtype), gram.float(), Unstructured(), 0))


def _check_dead(solver: Solver, device: torch.device | str) -> None:
    weight, gram = _layer((6, 16), device)
    alive = torch.ones(16, dtype=torch.bool, device=device)
    alive[[1, 2, 7, 12, 15]] = False
    weight = torch.where(alive, weight, 100 * weight)
    gram = gram * alive * alive[:, None]
    for gone in (12, 30, 50):
        case = _Case(weight, gram, Unstructured(), weight.numel() - gone)
        new, mask = _solved(solver, case)
        first = int((~mask[:, ~alive]).sum())
        expect(first == min(gone, 30), solver, "prunes dead inputs first", case.where, f"{first} of {gone}")
        still = gone > 30 or torch.equal(new[mask], weight[mask])
        expect(still, solver, "moves no weight for a dead input", case.where, "others moved")
    for pattern, least in ((NM(1, 4), 0), (NM(2, 4), 0), (NM(3, 4), 12)):  # two groups have two dead inputs
        case = _Case(weight, gram, pattern, weight.numel() // pattern.m * pattern.n)
        new, mask = _solved(solver, case)
        stay = mask & ~alive
        kept = int(stay.sum())
        expect(kept == least, solver, "prunes dead inputs first", case.where, f"it kept {kept} of them, not {least}")
        still = torch.equal(new[stay], weight[stay])
        expect(still, solver, "moves no weight of a dead input", case.where, "it moved some")
    _solved(solver, _Case(weight, torch.zeros_like(gram), Unstructured(), 40))


def _check_singular(solver: Solver, device: torch.device | str) -> None:
    for examples in (1, 3, 11):
        weight, gram = _layer((5, 12), device, examples)
        for dtype in (torch.float64, torch.float32):
            case = _Case(weight.to(dtype), gram.to(dtype), Unstructured(), 30)
            try:
                solver(case.weight, case.gram, case.pattern, case.keep)
            except SecateurError as error:
                says = "damping" in str(error)
                expect(says, solver, "names the cure of a singular Gram matrix", case.where, str(error))
            else:
                _solved(solver, case)


def _check_refusals(solver: Solver, device: torch.device | str) -> None:
    weight, gram = _layer((4, 8), device)
    holed, bent = weight.clone(), gram.clone()
    holed[1, 1], bent[2, 3] = torch.nan, torch.inf
    single = Unstructured()
    awkward: dict[str, tuple[Any, ...]] = {
        "a weight that is NaN": (holed, gram, single, 16),
        "a Gram matrix that is infinite": (weight, bent, single, 16),
        "a Gram matrix that is infinite even to keep all": (weight, bent, single, 32),
        "a matrix that is not symmetric": (weight, gram.triu(), single, 16),
        "a negative diagonal": (weight, -gram, single, 16),
        "a Gram matrix of another width": (weight, gram[:4, :4], single, 16),
        "a weight of three dimensions": (weight[None], gram, single, 16),
        "more than there is": (weight, gram, single, 33),
        "less than nothing": (weight, gram, single, -1),
        "blocks": (weight, gram, Block(2, 2), 16),
        "whole units": (weight, gram, Unit(), 16),
        "a count that N:M does not give": (weight, gram, NM(2, 4), 15),
        "groups that do not fit": (weight, gram, NM(2, 3), 16),
    }
    for what, arguments in awkward.items():
        try:
            solver(*arguments)
        except SecateurError:
            continue
        except Exception as error:
            raise broken(solver, f"refuses {what}", "(4, 8)", f"with {type(error).__name__}: {error}") from error
        raise broken(solver, f"refuses {what}", "(4, 8)", "it gave a result instead")
