"""From a user's network to a functional graph of torch operators, without touching the network."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import OutputKind
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from secateur.core.calls import first_line, shell, split_inputs
from secateur.core.errors import DataError, ModelError
from secateur.core.names import unwrap

# They print the traceback of every failed attempt, also where a second one succeeds.
LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils")
HALVES = (torch.float16, torch.bfloat16, torch.float64)

# Operators that are not lowered as they are, but whose parts are.
DECOMPOSED = (
    "aten.einsum.default", "aten.rnn_tanh.input", "aten.rnn_relu.input", "aten.cosine_similarity.default",
    "aten.tensordot.default", "aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.Scalar",
    "aten.addbmm.default", "aten.kron.default", "aten.inner.default",
    "aten.outer.default", "aten.lerp.Scalar", "aten.lerp.Tensor", "aten.meshgrid.indexing",
)  # fmt: skip


class CaptureError(ModelError):
    """A network that cannot be captured; the message names the place and the cure."""


@dataclass
class Exported:
    """A functional graph; ``model`` is the copy of the network that it was traced from."""

    program: ExportedProgram
    model: nn.Module
    notes: list[str] = field(default_factory=list)


def export(model: nn.Module, example_inputs: Any) -> Exported:
    """Trace a network in evaluation mode, with a free batch where that works.

    Raises:
        DataError: when the example holds no tensor.
        CaptureError: when torch.export cannot trace the network.
    """
    notes: list[str] = []
    args, kwargs = plain_call(example_inputs)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise DataError("example_inputs holds no tensor; pass one example batch as model(*example_inputs) takes it.")
    with quiet():
        made = _shell(unwrap(model), notes)
        program, cause = trace_export(made, args, kwargs)
        if cause is not None:
            notes.append(f"the batch is fixed to {_batch((args, kwargs))}, that of the example: {cause}")
        program = functional(program)
    _check_state(program)
    return Exported(program, made, notes)


def trace_export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ExportedProgram, str | None]:
    """The network for any batch; where torch cannot say it, for the batch of the example, and the reason."""
    cause = "the example has no batch as its first dimension"
    wide = _widen((args, kwargs))
    shapes = _free(wide)
    if shapes is not None:
        try:
            return torch.export.export(model, *wide, dynamic_shapes=shapes, strict=False), None
        except Exception as error:  # torch promises no kind of error for what it cannot trace
            cause = first_line(error)
    try:
        return torch.export.export(model, args, kwargs, strict=False), cause
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> CaptureError:
    kind = type(error).__name__
    cure = "Check that model(*example_inputs) runs."
    text = str(error).lower()
    if "datadependent" in kind.lower() or "data-dependent" in text or "data dependent" in text:
        cure = (
            "Its control flow depends on the values of a tensor: write that `if` or loop with torch.where or "
            "torch.cond, or capture the part of the network without it."
        )
    return CaptureError(f"torch.export cannot trace this network ({kind}: {first_line(error)}). {cure}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No gradients, nothing said by torch itself, and attention as plain operators instead of its fused fast path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    chatty = [logger for logger in map(logging.getLogger, LOGGERS) if not logger.disabled]
    for logger in chatty:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in chatty:
            logger.disabled = False
        torch.backends.mha.set_fastpath_enabled(fast)


def _shell(model: nn.Module, notes: list[str]) -> nn.Module:
    """A copy of the modules around the same numbers, in evaluation mode, on the CPU, in float32.

    Tracing may leave marks on modules (flattened weights of recurrent layers, tensors that hooks set), which must
    not be the user's.
    """
    cast: set[str] = set()
    try:
        made = shell(model, lambda tensor: _plain(tensor, cast))
    except CaptureError:
        raise
    except ModelError as error:
        raise CaptureError(str(error)) from error
    if cast:
        notes.append(f"weights of type {', '.join(sorted(cast))} become float32")
    for module in made.modules():
        _settle(module)
    return made


def _plain(tensor: Tensor, cast: set[str]) -> Tensor:
    try:
        bare = tensor.detach()
    except Exception as error:  # lazy parameters have no numbers yet
        raise CaptureError(f"a weight cannot be read ({first_line(error)}). Run the network once first.") from error
    if bare.dtype in HALVES:
        cast.add(str(bare.dtype).removeprefix("torch."))
        bare = bare.float()
    bare = bare.cpu()
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


def _settle(module: nn.Module) -> None:
    """Put the weight in use where hooks (pruning, old weight or spectral norm) would compute it at every call."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
        elif isinstance(hook, WeightNorm | SpectralNorm):
            name = hook.name
        else:
            continue
        with torch.no_grad():
            hook(module, None)
        weight = getattr(module, name).detach()
        module._forward_pre_hooks.pop(key)
        for part in ("_orig", "_mask", "_g", "_v", "_u"):
            module._parameters.pop(name + part, None)
            module._buffers.pop(name + part, None)
        vars(module).pop(name, None)
        module._buffers.pop(name, None)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def plain_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call, on the CPU and in float32."""

    def settle(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        return leaf.float() if leaf.dtype in HALVES else leaf

    return pytree.tree_map(settle, split_inputs(example))


def _batch(tree: Any) -> int | None:
    """The size of the first dimension of the first tensor that has one."""
    sizes = [x.shape[0] for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.dim()]
    return sizes[0] if sizes and sizes[0] else None


def _widen(tree: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two copies of a batch of one: torch takes a size of 1 for a constant."""
    if _batch(tree) != 1:
        return tree

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(twice, tree)


def _free(tree: tuple[Any, Any]) -> Any:
    """Which dimensions are free: the first of every tensor that is as long as the first tensor's."""
    batch = _batch(tree)
    if batch is None:
        return None
    shapes, dim = ShapesCollection(), Dim("batch")
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            shapes[leaf] = {0: dim}
    return shapes


def functional(program: ExportedProgram) -> ExportedProgram:
    """Without operators in place, and without those that stand for several known ones."""
    if any(_in_place(node.target) for node in program.graph.nodes if node.op == "call_function"):
        program = program.run_decompositions({})
    found = {node.target for node in program.graph.nodes if str(node.target) in DECOMPOSED}
    if found:
        full = torch.export.default_decompositions()
        program = program.run_decompositions({target: full[target] for target in found if target in full})
    return program


def _check_state(program: ExportedProgram) -> None:
    """Refuse results that depend on what an earlier call left behind.

    Raises:
        CaptureError: names the buffer.
    """
    signature = program.graph_signature
    kept = {str(spec.target) for spec in signature.output_specs if spec.kind == OutputKind.BUFFER_MUTATION}
    if not kept:
        return
    targets = {spec.arg.name: str(spec.target) for spec in signature.input_specs if spec.target in kept}
    results = {spec.arg.name for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT}
    wanted = {node for node in program.graph.nodes if node.name in results}
    for node in reversed(program.graph.nodes):
        if node in wanted and node.name in targets:
            raise CaptureError(
                f"the result depends on the buffer {targets[node.name]!r}, which the network changes at each call in "
                "evaluation mode; the runtime keeps nothing between calls. Make it an input and an output."
            )
        if node in wanted:
            wanted.update(node.all_input_nodes)


def _in_place(target: Any) -> bool:
    """Whether a node writes to what it reads, or holds a graph of its own that might."""
    schema = getattr(target, "_schema", None)
    return isinstance(target, torch._ops.HigherOrderOperator) or (schema is not None and schema.is_mutable)
