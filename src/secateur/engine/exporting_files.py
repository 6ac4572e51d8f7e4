"""The two kinds of file a network is exported to: written, opened again, run, and searched for their zeros."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.core.calls import first_line
from secateur.core.errors import ModelError, UsageError
from secateur.core.names import aliases, plain
from secateur.core.prunable import coverage
from secateur.runtime.lower_export import Exported as Traced
from secateur.runtime.lower_export import quiet

__all__ = ["FORMATS", "Opened", "check_zeros", "flat", "open_onnx", "open_pt2", "require", "write_onnx", "write_pt2"]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
_MOST = 2**31 - 2**24
"""Bytes of weights that still leave room for the graph in one ONNX file, whose format ends at 2 GiB."""


@dataclass(frozen=True)
class Opened:
    """A file read back.

    Attributes:
        prepare: Takes arguments and keywords of a call, and gives a function that runs the file on them and returns
            its results in order.
        tensors: The numbers in the file by name.
        engine: What runs it.
        about: What the file says of itself: opset, inputs and outputs.
    """

    prepare: Callable[[tuple[Any, ...], dict[str, Any]], Callable[[], list[np.ndarray]]]
    tensors: Mapping[str, np.ndarray]
    engine: str
    about: dict[str, Any] = field(default_factory=dict)


def require(kind: str) -> None:
    """Refuse a format whose packages are missing.

    Raises:
        UsageError: naming the package and how to get it.
    """
    for name in _PACKAGES[kind]:
        try:
            with _hushed():
                importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"exporting to {kind} needs the package {name}, which is not here. "
                f"Run `pip install {name}`, or `pip install 'secateur[export]'` for all that exporting needs."
            ) from error


def flat(tree: Any) -> list[Tensor]:
    """The tensors of a call or of its result, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporters say much on every channel; what matters is raised or checked on the file itself."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def write_onnx(program: ExportedProgram, path: Path, opset: int | None) -> None:
    """Write a traced network as one ONNX file, without paths or source lines of this machine.

    Raises:
        ModelError: an operator has no counterpart in ONNX, the opset cannot be had, or the file would be too large.
    """
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in program.state_dict.values()}.values())
    if size > _MOST:
        raise ModelError(f"the weights take {size:,} bytes and an ONNX file ends at 2 GiB. Export to pt2.")
    count = len(program.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output{i}" for i in range(count)]
    try:
        with _hushed():
            made = torch.onnx.export(
                program, dynamo=True, external_data=False, verbose=False, opset_version=opset, output_names=names
            )
            proto = made.model_proto if made is not None else None
    except Exception as error:  # the exporter promises no kind of error
        raise ModelError(
            f"this network cannot be said in ONNX ({type(error).__name__}: {_cause(error)}). Export to pt2, which "
            "holds every operator of torch."
        ) from error
    if proto is None:
        raise ModelError("the ONNX exporter gave nothing. Export to pt2.")
    found = next((int(entry.version) for entry in proto.opset_import if entry.domain == ""), 0)
    if opset is not None and found != opset:
        raise ModelError(f"this network cannot be written for opset {opset}: the exporter gave {found}. Ask for that.")
    _bare(proto, {str(symbol) for symbol in program.range_constraints})
    path.write_bytes(proto.SerializeToString())


def _cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


def _bare(proto: Any, symbols: set[str]) -> None:
    """Take out traces of the source, and call the free dimension batch."""
    del proto.graph.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if len(symbols) == 1 and dim.dim_param in symbols:
                dim.dim_param = "batch"
    for part in (proto.graph, *proto.functions):
        _bare_nodes(part)


def _bare_nodes(part: Any) -> None:
    for node in part.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():  # GRAPH, GRAPHS
                _bare_nodes(inner)


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Write a traced network for ``torch.export.load``, without the example and without source lines.

    Raises:
        ModelError: torch cannot save it.
    """
    program.example_inputs = None  # the file would carry the user's data
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    try:
        with _hushed(), open(path, "wb") as file:
            torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # torch promises no kind of error
        raise ModelError(
            f"torch.export cannot save this network ({type(error).__name__}: {_cause(error)}). Export to onnx."
        ) from error


def open_onnx(path: Path, threads: int) -> Opened:
    """Read an ONNX file back, and open it in ONNX Runtime on the CPU.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    import onnx
    import onnxruntime as ort

    proto = onnx.load(str(path))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has its own, and does not export them
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot open the file ({first_line(error)}).") from error
    names = [spec.name for spec in session.get_inputs()]

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], list[np.ndarray]]:
        given = [x.numpy() for x in flat((args, kwargs))]
        if len(given) != len(names):
            raise ModelError(f"the file has the inputs {', '.join(names)}; the call gives {len(given)} tensors.")
        feed = dict(zip(names, given, strict=True))
        return lambda: [np.asarray(found) for found in session.run(None, feed)]

    def spec(entry: Any) -> dict[str, Any]:
        return {"name": entry.name, "type": entry.type, "shape": list(entry.shape)}

    about = {
        "opset": next((int(entry.version) for entry in proto.opset_import if entry.domain == ""), 0),
        "inputs": [spec(entry) for entry in session.get_inputs()],
        "outputs": [spec(entry) for entry in session.get_outputs()],
    }
    tensors = {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    return Opened(prepare, tensors, "onnxruntime", about)


def open_pt2(path: Path, threads: int) -> Opened:
    """Read a file of ``torch.export.save`` back; torch runs it, on the threads torch has.

    Raises:
        ModelError: torch cannot read it.
    """
    try:
        with _hushed():
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:  # torch promises no kind of error
        raise ModelError(f"torch cannot read its own file back ({type(error).__name__}: {_cause(error)}).") from error

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], list[np.ndarray]]:
        def call() -> list[np.ndarray]:
            with torch.no_grad():
                return [found.numpy() for found in flat(module(*args, **kwargs))]

        return call

    tensors = {plain(name): value.detach().numpy() for name, value in program.state_dict.items()}
    return Opened(prepare, tensors, "torch.export", {})


def check_zeros(traced: Traced, found: Mapping[str, np.ndarray], also: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every zero of a prunable weight must be in the file.

    A weight is found by its name, or, where the exporter transposed it or gave it another, by its numbers. What was
    cut in pieces or multiplied into others is counted together.

    Args:
        traced: the traced network with the module it was traced from.
        found: the numbers in the file by name.
        also: further parameters to look for, such as those of masks.

    Returns:
        A row for each weight that holds zeros: ``name``, ``weights``, ``zeros``, ``in_file`` (None where counted with
        others) and ``tensor``, its name in the file.

    Raises:
        ModelError: when zeros are missing.
    """
    own = {plain(name): p.detach() for name, p in traced.model.named_parameters()}
    unused, rows = _unused(traced), []
    matched: set[str] = set()
    for name in dict.fromkeys((*_prunable(traced), *also)):
        if name not in own:
            continue
        weight = own[name].numpy()
        zeros = int((weight == 0).sum())
        if not zeros or name in unused:
            continue
        place = _find(name, weight, aliases(traced.model).get(name, [name]), found)
        matched |= {place} - {""}
        count = int((found[place] == 0).sum()) if place else None
        rows.append({"name": name, "weights": weight.size, "zeros": zeros, "in_file": count, "tensor": place})
    rest = [x for name, x in found.items() if name not in matched and x.dtype.kind == "f" and x.ndim > 1]
    _refuse_lost(rows, sum(int((x == 0).sum()) for x in rest))
    return rows


def _refuse_lost(rows: list[dict[str, Any]], elsewhere: int) -> None:
    for row in rows:
        if row["in_file"] is not None and row["in_file"] < row["zeros"]:
            raise ModelError(
                f"`{row['name']}` has {row['zeros']:,} zeros and its tensor in the file {row['in_file']:,}: the "
                "exporter changed pruned weights. Nothing was written; export to the other format."
            )
    spread = [row for row in rows if row["in_file"] is None]
    wanted = sum(row["zeros"] for row in spread)
    if wanted > elsewhere:
        raise ModelError(
            f"{wanted:,} zeros of {', '.join(row['name'] for row in spread[:4])} should be in the file under other "
            f"names, which hold {elsewhere:,}. Nothing was written; export to the other format."
        )


def _prunable(traced: Traced) -> list[str]:
    try:
        return list(coverage(traced.model).prunable)
    except ModelError:  # nothing that can be pruned, so no zeros of pruning
        return []


def _unused(traced: Traced) -> set[str]:
    """Parameters, by their first names, that the result does not depend on; an exporter leaves them out."""
    users = {node.name: len(node.users) for node in traced.program.graph.nodes if node.op == "placeholder"}
    places = traced.program.graph_signature.inputs_to_parameters.items()
    counts = {plain(parameter): users.get(place, 0) for place, parameter in places}
    # A tied weight has a place under each of its names, and only one of them is used.
    groups = {first: [counts[n] for n in names if n in counts] for first, names in aliases(traced.model).items()}
    return {first for first, found in groups.items() if found and not any(found)}


def _find(name: str, weight: np.ndarray, names: Sequence[str], found: Mapping[str, np.ndarray]) -> str:
    """The tensor in the file that holds a weight, or an empty name."""
    shape = sorted(weight.shape)
    for other in (name, *names):
        if other in found and sorted(found[other].shape) == shape:
            return other
    for other, numbers in found.items():
        if numbers.size == weight.size and numbers.dtype == weight.dtype and _same(numbers, weight):
            return other
    return ""


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers in any order."""
    if one.ndim == 2 and np.array_equal(one.T, other):
        return True
    return np.array_equal(np.sort(one, axis=None), np.sort(other, axis=None))
