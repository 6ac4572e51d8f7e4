"""What the contract suites are made of: networks in awkward states, and promises that a method keeps or breaks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from secateur.core import allocations, patterns, schedules
from secateur.core.errors import SecateurError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import Named, parameters
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Method
from secateur.core.streams import global_state, set_global_state
from secateur.core.task import Task
from secateur.testing.cases import CASES
from secateur.testing.snapshot import changes, snapshot

_T = TypeVar("_T")


class ContractError(AssertionError):
    """A method breaks a promise that all methods of its kind make."""


def expect(holds: bool, method: Any, promise: str, where: str, found: str) -> None:
    """Nothing when the promise holds; ``found`` says what was seen instead.

    Raises:
        ContractError: when it does not.
    """
    if not holds:
        raise broken(method, promise, where, found)


def expecting(method: Any, where: str) -> Callable[[bool, str, str], None]:
    """:func:`expect` for one method in one place: ``must(holds, promise, found)``."""

    def must(holds: bool, promise: str, found: str) -> None:
        expect(holds, method, promise, where, found)

    return must


def broken(method: Any, promise: str, where: str, found: str) -> ContractError:
    """The error for a broken promise, to be raised by the caller."""
    return ContractError(f"{method!r} breaks the promise: {promise} ({where}): {found}.")


def call(method: Callable[..., _T], name: str, *arguments: Any) -> _T:
    """The method's result; whatever it raises becomes a broken promise.

    Raises:
        ContractError: from the method's own exception.
    """
    try:
        return method(*arguments)
    except Exception as error:
        raise broken(method, "works", name, f"it raised {type(error).__name__}: {error}") from error


def untouched(method: Callable[..., _T], name: str, task: Task, masks: Masks | None) -> _T:
    """The result of a call that must leave everything as it was, to the bit.

    Raises:
        ContractError: naming what changed.
    """
    before = snapshot(task, masks)
    result = call(method, name, task, masks)
    changed = changes(before, snapshot(task, masks))
    expect(not changed, method, "leaves everything as it was", name, f"changed: {', '.join(changed[:4])}")
    return result


def check_form(method: Method, base: type[Method]) -> None:
    """The form of every method: frozen dataclass, *Cost* in its docstring, paper, needs, a repr that rebuilds it.

    Raises:
        ContractError: at the first that is missing.
    """
    kind = type(method)
    must = expecting(method, "class")
    must(isinstance(method, base), f"is a {base.__name__}", f"its type is {kind.__name__}")
    params = vars(kind).get("__dataclass_params__")
    must(params is not None and params.frozen, "is a frozen dataclass", "put @dataclass(frozen=True) above it")
    must("Cost" in (kind.__doc__ or ""), "says its cost", "its docstring has no line that begins with `Cost:`")
    paper = getattr(kind, "paper", None)
    must(isinstance(paper, Paper), "names its paper", f"paper is {paper!r}; write `paper = Paper(...)`")
    differs = isinstance(paper, Paper) and bool(paper.differs.strip())
    must(differs, "says how it departs from its paper", "differs is empty")
    strings = isinstance(kind.needs, frozenset) and all(isinstance(need, str) for need in kind.needs)
    must(strings, "declares its needs", f"needs is {kind.needs!r}; a frozenset of strings")
    known = {**vars(allocations), **vars(patterns), **vars(schedules), **vars(sys.modules[kind.__module__])}
    for f in dataclasses.fields(method):  # type: ignore[arg-type]
        part = type(getattr(method, f.name))
        known.setdefault(part.__name__, part)
    text = repr(method).replace(kind.__qualname__, kind.__name__, 1)
    try:
        again = eval(text, {**known, kind.__name__: kind})
    except Exception as error:
        raise broken(method, "has a repr that rebuilds it", "class", f"{text}: {error}") from error
    must(again == method, "has a repr that rebuilds it", f"{text} gives {again!r}")


def compare(method: Method, promise: str, name: str, expected: Named, found: Named, tolerance: float) -> None:
    """Two sets of scores must differ by at most ``tolerance`` times the largest expected score.

    Raises:
        ContractError: naming the tensor and the difference.
    """
    scale = max((float(s.double().abs().max()) for s in expected.values()), default=0.0)
    for key, score in expected.items():
        worst = float((score.double() - found[key].double()).abs().max())
        if not worst <= tolerance * scale:
            raise broken(method, promise, f"{name}, `{key}`", f"scores of up to {scale:.3g} differ by {worst:.3g}")


def check_refusals(method: Any, device: torch.device | str) -> None:
    """Empty data and an iterator must raise a SecateurError; a data-free method must work with either.

    Raises:
        ContractError: otherwise.
    """
    whole = case("tanh_mlp", device)
    masks = Masks.dense(whole.model)
    for what, data in (("empty data", []), ("an iterator that can be read only once", iter(list(whole.data)))):
        task = Task(whole.model, whole.loss, data)
        try:
            method(task, masks)
        except SecateurError as error:
            if "data-free" in method.needs:
                raise broken(method, "works without data", "tanh_mlp", f"given {what}: {error}") from error
        except Exception as error:
            raise broken(method, f"refuses {what}", "tanh_mlp", f"with {type(error).__name__}: {error}") from error
        else:
            expect("data-free" in method.needs, method, f"refuses {what}", "tanh_mlp", "it gave a result instead")


def case(name: str, device: torch.device | str, dtype: torch.dtype = torch.float64) -> Task:
    """One of :data:`CASES` on a device."""
    task = CASES[name](dtype)
    task.model.to(device)
    return task


def disturbed(task: Task) -> Task:
    """The same network as training leaves it: gradients here and there, some modules in training mode."""
    task.model.train()
    for child in list(task.model.children())[::2]:
        child.eval()
    for p in list(task.model.parameters())[::2]:
        p.grad = torch.full_like(p, 0.5)
    return task


def half_pruned(task: Task) -> Masks:
    """Prune the smaller half of every tensor, in place; the masks."""
    weights = {name: parameters(task.model)[name].detach().abs() for name in Masks.dense(task.model)}
    masks = Masks({name: top_mask(w, w.numel() // 2) for name, w in weights.items()})
    masks.apply_(task.model)
    return masks


def chosen(networks: Iterable[str] | None) -> list[str]:
    """Names of networks, all when None.

    Raises:
        UsageError: for an unknown one.
    """
    names = list(CASES) if networks is None else list(networks)
    for name in names:
        if name not in CASES:
            raise UsageError(f"no network is called {name!r}. {nearest(name, CASES)}")
    return names


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put torch's global random state back at the end."""
    state = global_state()
    try:
        yield
    finally:
        set_global_state(state)
