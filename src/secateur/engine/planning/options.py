"""How a plan layer by layer is made: what is allowed, what is measured, and what is known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.patterns import parse_pattern
from secateur.core.sockets import Criterion, Solver
from secateur.criteria.magnitude import Magnitude
from secateur.engine.compensating import Inputs
from secateur.engine.planning.costs import NetworkCost
from secateur.engine.planning.rises import Rises
from secateur.engine.planning.targets import RESOURCES, Quantity

__all__ = ["Planning"]

UNITS = ("channels", "heads", "depth")
"""Words of patterns that mean units, which are removed and not set to zero."""


@dataclass(frozen=True)
class Planning:
    """How a plan is made.

    Args:
        patterns: what tensors may take, in words: ``"unstructured"``, ``"4x1"``, ``"2:4"``; and ``"channels"``,
            ``"heads"`` and ``"depth"`` (whole residual blocks), which may be removed first.
        criterion: which weights of a tensor go; magnitude by default.
        solver: chooses them instead, and moves the others.
        inputs: what a solver's layers are given.
        only: globs of tensors to prune.
        skip: globs of tensors to leave alone.
        example: one batch of inputs, on which milliseconds count; by default the first of the task's data.
        batch: examples in it, where it is taken from the data.
        threads: of the compiled core; None takes one for each core that this process may use.
        least: what is to be least for targets of loss and accuracy: ``"ms"``, ``"bytes"``, ``"macs"`` or ``"params"``.
        measure: measure what layers cost where that is not known, and what is planned, on a copy; choose again until
            the measured figure meets the target.
        timed: also forecast milliseconds where the target is something else.
        compare: also say what each pattern alone gives.
        examples: examples that the rise of the loss is forecast on.
        tested: examples that the loss is measured on before and after; None takes all, but of a large network no more
            than a pass of some seconds goes over. Targets of loss and accuracy are always measured on all.
        seed: of everything random.
        cost: milliseconds of the network, where they are known already.
        rises: forecast of the loss, where it is known already.
        units: the kinds of units that may be removed first; taken from the patterns.
    """

    patterns: Sequence[str] = ("unstructured",)
    criterion: Criterion = field(default_factory=Magnitude)
    solver: Solver | None = None
    inputs: Inputs = "sequential"
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    example: Any = None
    batch: int = 1
    threads: int | None = None
    least: Quantity = "ms"
    measure: bool = True
    timed: bool = True
    compare: bool = True
    examples: int = 128
    tested: int | None = None
    seed: int = 0
    cost: NetworkCost | None = None
    rises: Rises | None = None
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = dict.fromkeys(self.patterns)
        units = tuple(word for word in given if word in UNITS)
        words = tuple(dict.fromkeys(str(parse_pattern(word)) for word in given if word not in UNITS))
        object.__setattr__(self, "patterns", words)
        object.__setattr__(self, "units", tuple(dict.fromkeys((*self.units, *units))))
        if not words and not self.units:
            raise UsageError("no pattern is allowed; name at least one, such as `unstructured`.")
        if self.least not in RESOURCES:
            raise UsageError(f"least is {self.least!r}; it must be one of {', '.join(RESOURCES)}.")
        if self.batch < 1 or self.examples < 1 or (self.tested is not None and self.tested < 1):
            raise UsageError(
                f"batch is {self.batch}, examples {self.examples} and tested {self.tested}; all must be at least 1."
            )
        blocks = [word for word in words if "x" in word or word == "unit"]
        if self.solver is not None and blocks:
            raise UsageError(f"solvers take single weights or N:M, not {blocks[0]}; leave it out of the patterns.")
