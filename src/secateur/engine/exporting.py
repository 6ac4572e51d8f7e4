"""Exports with proof: the file is read back, run beside the network, searched for its zeros and timed, then named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur import __version__
from secateur.core.errors import FileError, ModelError, UsageError, nearest
from secateur.core.files import file_digest, writing
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.task import frozen
from secateur.engine import racing
from secateur.engine.exporting_files import (
    FORMATS,
    Opened,
    check_zeros,
    flat,
    open_onnx,
    open_pt2,
    require,
    write_onnx,
    write_pt2,
)
from secateur.engine.machine import torch_threads
from secateur.runtime import lower_export
from secateur.runtime.lower_export import Exported as Traced

__all__ = ["LIMIT", "Exported", "export", "format_of"]

LIMIT = 1e-4
"""Largest difference of a file from its network, relative to the largest number of an output."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Refused(ModelError):
    """What no other batch size would mend."""


@dataclass(frozen=True)
class Exported:
    """A file and what was found when it was read back; the same is in the JSON file beside it.

    Attributes:
        path: The file.
        format: ``"onnx"`` or ``"pt2"``.
        sha256: Digest of the file.
        bytes: Bytes of the ``file``, of the ``parameters`` in memory, and of what the caller named beside them.
        batch: None where the batch is free, else the only one the file takes.
        parity: For each batch size that was run the largest difference from the network in torch, relative to the
            largest number of an output.
        zeros: A row for each prunable weight that holds zeros: ``name``, ``weights``, ``zeros``, ``in_file`` (None
            where the exporter cut it in pieces, which are counted together) and ``tensor``, its name in the file.
        latency: ``ms`` of a call by candidate, ``ratio`` (torch over file: of the medians, and the lowest and highest
            of one round), ``batch``, ``threads`` and what else the race says of the machine.
        about: Opset, inputs and outputs of the file, and the engine that ran it.
        notes: What a user should know, such as why the batch is fixed.
    """

    path: Path
    format: str
    sha256: str
    bytes: dict[str, int]
    batch: int | None
    parity: dict[int, float]
    zeros: list[dict[str, Any]]
    latency: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, the file by its name alone."""
        table = {"kind": "secateur.export/1", "secateur": __version__, **asdict(self), "file": self.path.name}
        table["parity"] = {"limit": LIMIT, **{str(size): error for size, error in self.parity.items()}}
        return {key: value for key, value in table.items() if key != "path"}


def export(
    model: nn.Module,
    example: Any,
    path: str | PathLike[str],
    format: str | None = None,  # noqa: A002 - the word of the command line
    dynamic_batch: bool = True,
    *,
    opset: int | None = None,
    masks: Masks | None = None,
    beside: Mapping[str, int] | None = None,
    about: Mapping[str, Any] | None = None,
    threads: int | None = None,
    rounds: int = 5,
    seconds: float = 0.1,
) -> Exported:
    """Write a network, as it acts in evaluation mode, for ONNX or ``torch.export``, and prove the file.

    The file is read back and run on the example and, where the batch is free, on a batch of another size; it is
    timed beside the network in torch; the zeros of its weights are counted. Only then does it get its name, and
    ``FILE.json`` with the figures beside it. The network stays as it is; weights of half or double precision become
    float32 in the file.

    Args:
        model: The network.
        example: One batch as the network takes it: a tensor, a tuple of arguments, or a mapping of keywords. It is not
            kept in the file.
        path: The file.
        format: ``"onnx"`` or ``"pt2"``; from the suffix of ``path`` by default.
        dynamic_batch: Leave the first dimension free where torch can trace that; a note says where it cannot.
        opset: Of ONNX; the exporter's own choice by default.
        masks: Which weights are kept; the network is checked against them first.
        beside: Bytes to record beside those of the file, by name.
        about: Plain values to add to the JSON file, such as how inputs are normalised.
        threads: Threads of both candidates of the race; torch's own number by default.
        rounds: Rounds of the race.
        seconds: Time of a candidate in a round.

    Returns:
        The figures.

    Raises:
        UsageError: an unknown format, an opset where there is none, or a missing package, which is named.
        ModelError: the network cannot be traced or said in that format, or the file gives something else (more than
            `LIMIT` apart) or lost zeros. No file is left, and one of that name stays as it was.
        MaskError: a pruned weight is not zero.
        DataError: the example holds no tensor.
        FileError: the file cannot be written.

    Cost: tracing takes seconds; then some forward passes and ``2 * rounds * seconds``.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export(torch.nn.Linear(3, 2), torch.ones(1, 3), folder + "/net.pt2", rounds=1, seconds=0.001)
        >>> made.batch is None and max(made.parity.values()) < 1e-6
        True
    """
    path = Path(path)
    kind = format_of(path, format, opset)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads is {threads}; give at least 1.")
    require(kind)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file in it, such as {path / f'network{FORMATS[kind]}'}.")
    if masks is not None:
        masks.check(model)
    call = lower_export.plain_call(example)
    proof = path.with_name(f"{path.name}.json")
    with writing(path) as temporary, writing(proof) as figures:  # the proof gets its name first
        traced, opened, parity = _written(model, call, kind, dynamic_batch, opset, temporary, threads)
        zeros = check_zeros(traced, opened.tensors, tuple(masks or ()))
        with frozen(_eager(model, traced)):
            latency = _race(_eager(model, traced), opened, call, threads, rounds, seconds)
        sizes = {"file": temporary.stat().st_size, "parameters": _bytes(model), **(beside or {})}
        made = Exported(
            path, kind, file_digest(temporary), sizes, None if _free(traced) else _size(call), parity, zeros, latency,
            {"engine": opened.engine, **opened.about, **(about or {})}, tuple(traced.notes),
        )  # fmt: skip
        figures.write_bytes((json.dumps(made.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return made


def format_of(path: Path, format: str | None = None, opset: int | None = None) -> str:  # noqa: A002
    """The format of a file, by name or by suffix.

    Raises:
        UsageError: when it is unknown, contradicts the suffix, or takes no opset.
    """
    suffixes = {suffix: name for name, suffix in FORMATS.items()}
    kind = format or suffixes.get(path.suffix)
    if kind is None:
        raise UsageError(f"{path.name!r} does not say its format; end it in .onnx or .pt2, or pass the format.")
    if kind not in FORMATS:
        raise UsageError(f"there is no format {kind!r}. {nearest(kind, FORMATS)}")
    if suffixes.get(path.suffix, kind) != kind:
        raise UsageError(f"{path.name!r} ends like a file of {suffixes[path.suffix]} and is to be {kind}; say one.")
    if opset is not None and kind != "onnx":
        raise UsageError(f"opset {opset} is for ONNX; a file of {kind} has none. Leave it out.")
    if opset is not None and opset < 1:
        raise UsageError(f"opset is {opset}; give a version such as 20.")
    return kind


def _written(
    model: nn.Module, call: Call, kind: str, dynamic: bool, opset: int | None, path: Path, threads: int
) -> tuple[Traced, Opened, dict[int, float]]:
    """The file, written and compared; with a fixed batch where a free one cannot be had."""
    args, kwargs = call
    traced = lower_export.export(model, kwargs or args)
    if not dynamic and _free(traced):
        traced = _fixed(traced, call, "as asked")
    try:
        return traced, *_attempt(model, traced, call, kind, opset, path, threads)
    except _Refused:
        raise
    except ModelError as error:
        if not _free(traced):
            raise
        first = error
    # An operator may be sayable, or runnable, for one batch size only.
    traced = _fixed(traced, call, str(first))
    return traced, *_attempt(model, traced, call, kind, opset, path, threads)


def _attempt(
    model: nn.Module, traced: Traced, call: Call, kind: str, opset: int | None, path: Path, threads: int
) -> tuple[Opened, dict[int, float]]:
    if kind == "onnx":
        write_onnx(traced.program, path, opset)
        opened = open_onnx(path, threads)
    else:
        write_pt2(traced.program, path)
        opened = open_pt2(path, threads)
    sizes = {_size(call): call}
    if _free(traced):
        other = _other(call)
        sizes[_size(other)] = other
    eager = _eager(model, traced)
    with frozen(eager), torch.no_grad(), torch_threads(threads):
        return opened, {size: _apart(eager, opened, given) for size, given in sizes.items()}


def _fixed(traced: Traced, call: Call, why: str) -> Traced:
    """The same network for the batch of the call alone."""
    args, kwargs = call
    try:
        with lower_export.quiet():
            program = torch.export.export(traced.model, args, kwargs, strict=False)
            program = lower_export.functional(program)
    except Exception as error:  # torch promises no kind of error for what it cannot trace
        raise ModelError(f"torch.export cannot trace this network ({lower_export.first_line(error)}).") from error
    return Traced(program, traced.model, [*traced.notes, f"the batch is fixed to {_size(call)}: {why}"])


def _free(traced: Traced) -> bool:
    """Whether a size of an input was left open."""
    wanted = set(traced.program.graph_signature.user_inputs)
    shapes = (getattr(node.meta.get("val"), "shape", ()) for node in traced.program.graph.nodes if node.name in wanted)
    return any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def _eager(model: nn.Module, traced: Traced) -> nn.Module:
    """The user's own network where it can be compared as it is, else the copy on the CPU in float32."""
    own = unwrap(model)
    odd = [t for t in (*own.parameters(), *own.buffers()) if t.device.type != "cpu" or t.dtype in lower_export.HALVES]
    return traced.model if odd else own


def _size(call: Call) -> int:
    """Examples in a batch: the first dimension of the first tensor that has one."""
    return next((x.shape[0] for x in flat(call) if x.dim()), 1)


def _other(call: Call) -> Call:
    """A batch of two more examples, each row scaled by a factor of its own so that no two are alike."""
    size = _size(call)
    rows = torch.arange(size + 2)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        taken = leaf[rows % size]
        if not leaf.is_floating_point():
            return taken
        return taken * (1 - rows / (2 * len(rows))).to(leaf.dtype).view(-1, *[1] * (leaf.dim() - 1))

    return pytree.tree_map(widen, call)


def _apart(model: nn.Module, opened: Opened, call: Call) -> float:
    """How far a file is from the network on one batch.

    Raises:
        ModelError: it does not run, or gives something else.
    """
    size, (args, kwargs) = _size(call), call
    expected = [x.numpy() for x in flat(model(*args, **kwargs))]
    if not all(np.isfinite(x).all() for x in expected):
        raise _Refused(
            "the network's own result holds NaN or infinity, so no file can be compared with it. Look at its weights "
            "(`secateur doctor FILE`) and at the example."
        )
    try:
        found = opened.prepare(args, kwargs)()
    except ModelError:
        raise
    except Exception as error:  # ONNX Runtime has its own, and does not export them
        raise ModelError(f"the file does not run on a batch of {size} ({lower_export.first_line(error)}).") from error
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ModelError(f"on a batch of {size} the file gives results of other shapes than the network.")
    worst = max((_relative(one, other) for one, other in zip(found, expected, strict=True)), default=0.0)
    if not worst <= LIMIT:
        raise _Refused(
            f"the file is {worst:.2g} from the network on a batch of {size} (relative to the largest number of an "
            f"output; allowed is {LIMIT:g}). Nothing was written; export to the other format."
        )
    return worst


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()) / scale


def _race(model: nn.Module, opened: Opened, call: Call, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of the network in torch and of the file, taken in turn."""
    args, kwargs = call
    with torch.no_grad():
        kinds = [x.is_floating_point() for x in flat(model(*args, **kwargs))]
    if True not in kinds:
        return {"note": "not timed: no result is a floating-point tensor"}
    at, run = kinds.index(True), opened.prepare(args, kwargs)

    def eager() -> np.ndarray:
        with torch.inference_mode():
            return flat(model(*args, **kwargs))[at].numpy()

    def file() -> np.ndarray:
        return run()[at]

    made = racing.race({"torch": eager, opened.engine: file}, rounds=rounds, seconds=seconds, threads=threads)
    ratio = dict(zip(("value", "low", "high"), made.ratio("torch", opened.engine), strict=True))
    ms = {name: made.median(name) for name in made.rounds}
    return {"ms": ms, "ratio": ratio, "batch": _size(call), **made.about}


def _bytes(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, a tied one once."""
    own = unwrap(model)
    return sum(t.numel() * t.element_size() for t in (*own.parameters(), *own.buffers()))
