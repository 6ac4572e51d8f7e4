"""The dense network with the removed units zeroed where they are consumed: what the shrunken one must compute."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from secateur.surgery.labels import Value
from secateur.surgery.propagate import Pass, op_name

_HARMLESS = ("_assert_tensor_metadata",)
_SUMS = (
    "linear", "mm", "bmm", "matmul", "dot", "mv", "addmm", "baddbmm", "addmv", "einsum", "outer", "conv1d", "conv2d",
    "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "sum", "lstm", "gru", "rnn_tanh", "rnn_relu",
)  # fmt: skip


def casts(run: Pass) -> bool:
    """Whether a graph names a floating type, so that it computes in that one whatever its weights are."""
    for node in run.program.graph.nodes:
        named = [*node.args, *node.kwargs.values()] if node.op == "call_function" else []
        if any(isinstance(a, torch.dtype) and a.is_floating_point for a in named) and op_name(node) not in _HARMLESS:
            return True
    return False


class Zeroed:
    """Runs a graph on the dense weights, with zeros in the place of removed units wherever a sum is taken over them.

    Statistics that are taken over units (layer norms, means) are taken over those that stay, as the shrunken network
    takes them.

    Args:
        run: the labelled graph.
        gone: labels of the units that go.
        dtype: type of the computation; by default that of the weights.
        state: other numbers for parameters and buffers, by name.
    """

    def __init__(
        self, run: Pass, gone: Tensor, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        self.run, self.dtype, self.state = run, dtype, state or {}
        self.gone = torch.zeros(run.units.size + 1, dtype=torch.bool)
        self.gone[run.units.find(gone)] = True

    @torch.no_grad()
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The outputs, flat."""
        program = self.run.program
        held = {**program.state_dict, **program.constants, **self.state}
        given = iter(pytree.tree_leaves((args, kwargs)))
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        env: dict[Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    env[node] = self._wide(next(given))
                else:
                    env[node] = self._wide(held[str(spec.target)])
            elif node.op == "get_attr":
                env[node] = self._wide(getattr(program.graph_module, str(node.target)))
            elif node.op == "call_function":
                env[node] = self._node(node, env)
            else:
                found = map_arg(node.args[0], lambda n: env[n])
                return pytree.tree_leaves(found)
        return []

    def _wide(self, thing: Any) -> Any:
        floating = isinstance(thing, Tensor) and thing.is_floating_point() and self.dtype is not None
        return thing.detach().to(self.dtype) if floating else thing

    def kept(self, value: Value | None) -> Tensor | None:
        """True where an element stays, as a tensor that broadcasts; None where all do."""
        mask = None
        for layer in value.layers if value else ():
            stays = ~self.gone[self.run.units.find(layer)]
            if not bool(stays.all()):
                mask = stays if mask is None else mask & stays
        return mask

    def _node(self, node: Node, env: dict[Node, Any]) -> Any:
        name = op_name(node)
        target: Any = node.target
        if target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if name in _HARMLESS:
            return None
        special = _SPECIAL.get(name)
        first = node.args[0] if node.args else None
        if special is not None and self.kept(self.run.value(first)) is not None:
            return special(self, node, env)
        if name in _SUMS:

            def zeroed(n: Node) -> Any:
                mask, found = self.kept(self.run.value(n)), env[n]
                return (
                    found if mask is None else found.masked_fill(~mask.to(found.device), 0)
                )  # 0 times infinity is not 0

            args, kwargs = map_arg(node.args, zeroed), map_arg(node.kwargs, zeroed)
        else:
            args, kwargs = map_arg(node.args, lambda n: env[n]), map_arg(node.kwargs, lambda n: env[n])
        if name in ("view", "_unsafe_view"):  # what was zeroed may lie otherwise in memory
            seen: Any = args
            return seen[0].reshape(seen[1])
        return target(*args, **kwargs)


def _mean(run: Zeroed, node: Node, env: dict[Node, Any]) -> Any:
    x, mask = env[node.args[0]], run.kept(run.run.value(node.args[0]))  # type: ignore[index]
    stays = mask.to(x).expand_as(x)  # type: ignore[union-attr]
    x = x.masked_fill(stays == 0, 0)
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    dims = list(range(x.dim())) if dims is None else dims
    return x.sum(dims, keepdim=keep) / stays.sum(dims, keepdim=keep)


def _normalised(x: Tensor, stays: Tensor, dims: list[int], eps: float, centred: bool) -> Tensor:
    x, count = x.masked_fill(stays == 0, 0), stays.sum(dims, keepdim=True)
    mean = (x * stays).sum(dims, keepdim=True) / count if centred else 0.0
    spread = (((x - mean) * stays) ** 2).sum(dims, keepdim=True) / count
    return (x - mean) / (spread + eps).sqrt()


def _layer_norm(run: Zeroed, node: Node, env: dict[Node, Any]) -> Any:
    x, mask = env[node.args[0]], run.kept(run.run.value(node.args[0]))  # type: ignore[index]
    centred = op_name(node) != "rms_norm"
    args: list[Any] = [env[a] if isinstance(a, Node) else a for a in node.args] + [None] * 5
    eps = args[4] if args[4] is not None else (1e-5 if centred else torch.finfo(x.dtype).eps)
    dims = list(range(-len(args[1]), 0))
    made = _normalised(x, mask.to(x).expand_as(x), dims, eps, centred)  # type: ignore[union-attr]
    made = made if args[2] is None else made * args[2]
    return made if args[3] is None or not centred else made + args[3]


def _group_norm(run: Zeroed, node: Node, env: dict[Node, Any]) -> Any:
    x, mask = env[node.args[0]], run.kept(run.run.value(node.args[0]))  # type: ignore[index]
    args: list[Any] = [env[a] if isinstance(a, Node) else a for a in node.args] + [None] * 5
    groups, eps = int(args[1]), 1e-5 if args[4] is None else args[4]
    shaped = x.reshape(x.shape[0], groups, -1)
    stays = mask.to(x).expand_as(x).reshape(shaped.shape)  # type: ignore[union-attr]
    made = _normalised(shaped, stays, [2], eps, True).nan_to_num(0.0).reshape(x.shape)
    one = (1, -1) + (1,) * (x.dim() - 2)
    made = made if args[2] is None else made * args[2].reshape(one)
    return made if args[3] is None else made + args[3].reshape(one)


_SPECIAL: dict[str, Callable[[Zeroed, Node, dict[Node, Any]], Any]] = {
    "mean": _mean, "layer_norm": _layer_norm, "rms_norm": _layer_norm, "group_norm": _group_norm,
}  # fmt: skip
