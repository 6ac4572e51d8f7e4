"""From a run folder or a network to its compiled form, and the clock on both."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import from_numpy, nn

from secateur.core.errors import SecateurError, UsageError
from secateur.core.reading import Reading
from secateur.engine.folder import Artefact
from secateur.probes.latency import in_turn
from secateur.runtime.compiled import Compiled, compile_network
from secateur.runtime.session import Session

__all__ = ["PLAN", "FromFile", "clock", "compile"]

PLAN = "plan.safetensors"


def compile(  # noqa: A001 - the verb of this package
    source: nn.Module | str | PathLike[str],
    example_inputs: Any = None,
    threads: int | None = None,
    **options: Any,
) -> Compiled | Session:
    """Make a network run fast on this CPU, its zeros skipped.

    Args:
        source: A network, or a folder that `save` or the command line wrote. A folder that holds a plan needs no
            example: the plan is opened.
        example_inputs: One batch as the network takes it; the batch size stays free.
        threads: Threads of the compiled core; None takes one for each core that this process may use.
        options: ``strict=True`` refuses operators that the core lacks instead of running them in torch; further ones
            go to `secateur.runtime.Session`.

    Returns:
        A callable on tensors or arrays, with ``save`` and ``explain``; for a plan a `secateur.runtime.Session`.

    Raises:
        UsageError: no example where one is needed.
        CaptureError: the network cannot be captured.
        ModelError: the compiled network does not compute what torch does.

    Example:
        >>> from torch import nn, ones
        >>> fast = compile(nn.Linear(3, 2), ones(1, 3), threads=1)
        >>> fast(ones(5, 3)).shape
        torch.Size([5, 2])
    """
    if isinstance(source, nn.Module):
        if example_inputs is None:
            raise UsageError("compiling a network needs one batch of its inputs: compile(model, torch.randn(1, ...)).")
        return compile_network(source, example_inputs, threads=threads, **options)
    folder = Path(source)
    if example_inputs is None:
        if not folder.is_dir() or (folder / PLAN).is_file():
            return Session(folder, threads=threads, **options)
        raise UsageError(f"{folder} holds no {PLAN}: pass example_inputs, one batch as the network takes it.")
    return compile_network(Artefact.open(folder).build(), example_inputs, threads=threads, **options)


class FromFile(nn.Module):
    """A plan on disk as a module without gradients, so that a probe can measure what will be run.

    Args:
        session: An open plan; inputs are given to it in the order of the call.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plan gives, as tensors on the CPU."""
        found = self.session(*(t.detach().cpu().numpy() for t in (*args, *kwargs.values())))
        return tuple(map(from_numpy, found)) if isinstance(found, tuple) else from_numpy(found)


def clock(dense: nn.Module, pruned: nn.Module, example: Any, folder: Path, threads: int) -> dict[str, Reading]:
    """Write the pruned network's plan, open it again from disk, and time it beside the dense network in torch.

    Args:
        dense: The network to compare with, on the CPU.
        pruned: The one to compile, on the CPU.
        example: Inputs of one batch.
        folder: Where the plan is written.
        threads: Threads of both.

    Returns:
        ``compiled``: milliseconds of a call; ``against``: those of dense torch, taken in turn; ``ratio``: their
        quotient with an interval; ``plan``: bytes of the file. A reading without a value says in its note why not.
    """
    try:
        made = compile_network(pruned, example, threads=threads)
        path = made.save(folder / PLAN)
        session = Session(path, threads=threads)
    except SecateurError as error:
        return {"compiled": Reading(float("nan"), "ms", note=f"not compiled: {error}")}
    arrays = [t.numpy() for t in (example.values() if isinstance(example, dict) else _tuple(example))]
    with session:
        slow, fast, ratio = in_turn(dense, lambda: session(*arrays), example, threads=threads)
        kind = session.isa
    note = f"from the file on disk; {kind}" + (" (no compiled core here)" if kind == "reference" else "")
    size = Reading(float(path.stat().st_size), "B", note="graph, zeros as bits, non-zero weights")
    return {"against": slow, "compiled": Reading(**{**vars_of(fast), "note": note}), "ratio": ratio, "plan": size}


def vars_of(reading: Reading) -> dict[str, Any]:
    """The fields of a reading."""
    return {name: getattr(reading, name) for name in reading.__dataclass_fields__}


def _tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, list | tuple) else (example,)
