"""Every solver found keeps the contract, and sloppy ones are caught breaking it."""

from dataclasses import dataclass

import pytest
import torch

from secateur.core.errors import DataError, SecateurError
from secateur.core.reading import Paper
from secateur.core.sockets import Solver, find, names
from secateur.solvers._layer import solve
from secateur.testing.solvers_contract import ContractError, check_solver


@pytest.mark.parametrize("name", names("solvers"))
def test_solver_keeps_the_contract(name):
    check_solver(find("solvers", name)())


@dataclass(frozen=True)
class Clean(Solver):
    """The largest weights times the root of their input's mean square, unmoved. Cost: one selection."""

    paper = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")

    def score(self, weight, gram):
        return weight.detach().double().square() * gram.diagonal().double()

    def __call__(self, weight, gram, pattern, keep):
        def zeroed(layer):
            mask = pattern.mask(self.score(layer.rows(), layer.matrix()), keep)
            return torch.where(mask, layer.rows(), 0.0), mask

        return solve(zeroed, weight, gram, pattern, keep, 0.01)


def test_a_clean_solver_passes_and_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    check_solver(Clean())
    assert torch.equal(torch.get_rng_state(), before)


def spoilt(name, spoil, **more):
    """A frozen solver whose call is ``spoil(clean, weight, gram, pattern, keep)``."""
    body = {"__doc__": "Cost: one selection.", "__call__": lambda self, *args: spoil(super(kind, self).__call__, *args)}
    kind = dataclass(frozen=True)(type(name, (Clean,), {**body, "__module__": __name__, **more}))
    globals()[name] = kind  # the form of a solver is checked where it was defined
    return kind()


def after(change):
    """A solver that spoils the clean result."""
    return lambda clean, weight, gram, pattern, keep: change(*clean(weight, gram, pattern, keep), weight, gram)


def one_more(new, mask, weight, gram):
    mask = mask.clone()
    mask.view(-1)[mask.flatten().logical_not().nonzero()[:1]] = True
    return new, mask


def draws(clean, weight, gram, pattern, keep):
    torch.rand(1)
    return clean(weight, gram, pattern, keep)


def in_place(clean, weight, gram, pattern, keep):
    new, mask = clean(weight, gram, pattern, keep)
    gram[0, 0] += 1
    return new, mask


def first_columns(clean, weight, gram, pattern, keep):
    bias = torch.linspace(1, 3, weight.shape[1], dtype=torch.float64)
    order = clean(weight.detach() * bias, gram, pattern, keep)[1]
    return torch.where(order, weight.detach(), 0.0), order


def unless(promise, clean, weight, gram, pattern, keep):
    """Without the checks and the care that :func:`solve` takes."""
    mask = pattern.mask(weight.detach().abs(), keep)
    if promise == "dead":
        return torch.where(mask, weight.detach(), 0.0), mask
    try:
        return clean(weight, gram, pattern, keep)
    except SecateurError:
        return torch.where(mask, weight.detach(), 0.0), mask


def refuses_singular(clean, weight, gram, pattern, keep):
    if torch.linalg.matrix_rank(gram.double()) < len(gram) and gram.any() and gram.diagonal().all():
        raise DataError("the Gram matrix is singular")
    return clean(weight, gram, pattern, keep)


def gives_itself(clean, weight, gram, pattern, keep):
    new, mask = clean(weight, gram, pattern, keep)
    return (weight.detach() if keep == weight.numel() else new), mask


SLOPPY = [
    (spoilt("OneMore", after(one_more)), "keeps exactly the count"),
    (spoilt("LeavesNoise", after(lambda n, m, w, g: (n + 1e-9 * ~m, m))), "leaves exact zeros"),
    (spoilt("NegativeZeros", after(lambda n, m, w, g: (torch.where(m, n, -0.0), m))), "leaves exact zeros"),
    (spoilt("Doubles", after(lambda n, m, w, g: (3 * n, m))), "no worse than zeroing"),
    (spoilt("Widens", after(lambda n, m, w, g: (n.double(), m))), "keeps the type of the weight"),
    (spoilt("FloatMask", after(lambda n, m, w, g: (n, m.float()))), "gives a boolean mask"),
    (spoilt("KeepsTheGraph", after(lambda n, m, w, g: (w * m, m))), "detached"),
    (spoilt("NotFinite", after(lambda n, m, w, g: (n.masked_fill(m, torch.nan), m))), "finite"),
    (spoilt("Draws", draws), "draws no global random numbers"),
    (spoilt("InPlace", in_place), "leaves its inputs as they were"),
    (spoilt("FirstColumns", first_columns), "order of the columns"),
    (spoilt("ByScale", after(lambda n, m, w, g: (n * (1 - 1e-6 * (g[0, 0] > 100)), m))), "does not depend on a factor"),
    (spoilt("Grows", after(lambda n, m, w, g: (n * (1 + 1e-10), m))), "no worse than zeroing|moves no weight"),
    (spoilt("RefusesSingular", refuses_singular), "names the cure"),
    (spoilt("IgnoresDeadInputs", lambda *args: unless("dead", *args)), "prunes dead inputs first"),
    (spoilt("NeverRefuses", lambda *args: unless("refusal", *args)), "refuses a weight that is NaN"),
    (spoilt("GivesItself", gives_itself), "shares no memory"),
    (spoilt("Fails", lambda *_: 1 / 0), "ZeroDivisionError"),
]  # fmt: skip


@pytest.mark.parametrize(("sloppy", "promise"), SLOPPY, ids=lambda value: type(value).__name__)
def test_a_sloppy_solver_is_caught(sloppy, promise):
    with pytest.raises(ContractError, match=promise):
        check_solver(sloppy)
