"""Which numbers of a network can depend on its inputs, and which are the same whatever it is given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from secateur.surgery import rules_along, rules_shape
from secateur.surgery.propagate import RULES, Pass, op_name, shape_of
from secateur.surgery.reference import Zeroed

CONVS = ("conv1d", "conv2d", "conv3d")
_MOVED = (rules_shape.move, rules_shape.cut, rules_shape.cat, rules_shape.stack, rules_shape.pad)
_POOLS = frozenset((
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "_adaptive_avg_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "max_pool2d_with_indices",
))  # fmt: skip


_RANDOM = frozenset(("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal", "rrelu"))


def factors(node: Node) -> tuple[int, int, int | None] | None:
    """Places of the two factors of a product among its arguments, and of its bias; None for other operators."""
    name = op_name(node)
    if name == "linear" or name.startswith("conv"):
        return 0, 1, 2
    if name in ("mm", "bmm", "matmul", "mv", "dot"):
        return 0, 1, None
    return (1, 2, 0) if name in ("addmm", "baddbmm", "addmv") else None


def bilinear(node: Node, env: dict[Node, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The product that an operator takes, without its bias."""
    target: Any = node.target
    if op_name(node).startswith("conv"):
        args = map_arg(node.args[3:], lambda n: env[n])
        kwargs = map_arg({k: v for k, v in node.kwargs.items() if k != "bias"}, lambda n: env[n])
        return lambda a, b: target(a, b, None, *args, **kwargs)
    return (lambda a, b: target(a, b)) if op_name(node) in ("linear", "mv", "dot") else torch.matmul


def weight_of(node: Node) -> Node:
    """The second factor of a product; the node itself where it is none."""
    places = factors(node)
    found: Any = node.args[places[1]] if places else node
    return found


def summed(run: Pass, node: Node) -> list[list[tuple[Node, int]]]:
    """For each index that an operator sums over, the tensors that have it and the dimension."""
    name, args = op_name(node), node.args
    places: Any = factors(node)
    if name.startswith("conv"):
        space = len(shape_of(weight_of(node))) - 2
        inputs = 0 if "transpose" in name or (name == "convolution" and args[6]) else 1
        x: Any = args[0]
        grouped = node in run.groups  # then inputs and outputs are one unit, and nothing is summed over
        return [] if grouped else [[(x, len(shape_of(x)) - space - 1), (weight_of(node), inputs)]]
    if places:
        one, other = args[places[0]], args[places[1]]
        last = -1 if name == "linear" or len(shape_of(other)) == 1 else -2  # type: ignore[arg-type]
        return [[(one, -1), (other, last)]]  # type: ignore[list-item]
    if name == "einsum":
        given, _, out = str(args[0]).replace(" ", "").replace("...", "").partition("->")
        terms: Any = list(zip(given.split(","), args[1], strict=True))  # type: ignore[arg-type]
        letters = dict.fromkeys(c for c in given if c not in out + ",")
        # an ellipsis may stand before the letters, so they count from the end
        return [[(n, part.index(c) - len(part)) for part, n in terms if c in part] for c in letters]
    if "scaled_dot_product" in name:
        return [[(args[0], -1), (args[1], -1)]]  # type: ignore[list-item]
    if name == "sum":
        x = args[0]
        dims, _ = rules_along._reduced(node, len(shape_of(x)))
        return [[(x, d)] for d in dims]
    return []


def by_input(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight with one row for each input channel."""
    return (
        weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2).flatten(0, 1).flatten(1)
    )


class Depends(Zeroed):
    """Runs a graph, and beside every number whether it can depend on the inputs.

    The answer errs on one side: "no" is a proof (a product with a weight that is 0, a scale of 0, a constant), "yes"
    may only mean that no rule says otherwise.

    Args:
        run: the labelled graph.
        dtype: type of the computation; by default that of the weights.
    """

    def __init__(self, run: Pass, dtype: torch.dtype | None = None) -> None:
        super().__init__(run, torch.empty(0, dtype=torch.int64), dtype)
        specs = run.program.graph_signature.input_specs
        self._inputs = {spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT}
        self._free: dict[Node, Any] = {}

    def of(self, node: Node, env: dict[Node, Any]) -> Any:
        """True where a number can depend on an input, shape of the value; a value that is no tensor as it is."""
        if node in self._free:
            return self._free[node]
        thing = env[node]
        if not isinstance(thing, Tensor):
            return thing
        return torch.full((), node.name in self._inputs, device=thing.device).expand(thing.shape)

    def seen(self, node: Node, env: dict[Node, Any], made: Any) -> None:
        """Called with every operator, once it has run."""

    def _node(self, node: Node, env: dict[Node, Any]) -> Any:
        made = super()._node(node, env)
        if isinstance(made, Tensor | list | tuple):
            self._free[node] = self._depends(node, env, made)
            self.seen(node, env, made)
        return made

    def _depends(self, node: Node, env: dict[Node, Any], made: Any) -> Any:
        name = op_name(node)
        if node.target is operator.getitem:
            whole: Any = node.args
            return self.of(whole[0], env)[whole[1]]
        if name in _RANDOM:
            return torch.ones_like(made, dtype=torch.bool)
        known = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if known in _MOVED or name in _POOLS:
            return _moved(self, node, env)
        if known is rules_shape.filled:
            return torch.zeros_like(made, dtype=torch.bool)
        found = _BY_NAME.get(name, _BY_RULE.get(known)) if known else None  # type: ignore[arg-type]
        if found is None and factors(node) is not None:
            found = _product
        free = found(self, node, env, made) if found else None
        if free is not None and isinstance(made, list | tuple):
            return [free if i == 0 else _whole(self, node, env, one) for i, one in enumerate(made)]
        return _whole(self, node, env, made) if free is None else free


def _whole(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Any:
    """Everything depends on the inputs once anything that comes in does."""
    free = False
    for source in node.all_input_nodes:
        found = run.of(source, env)
        for one in found if isinstance(found, list | tuple) else [found]:
            free = free or (isinstance(one, Tensor) and one.dtype == torch.bool and bool(one.any()))
    if isinstance(made, list | tuple):
        return [_whole(run, node, env, one) for one in made]
    return torch.full((), free, device=made.device).expand(made.shape) if isinstance(made, Tensor) else made


def _moved(run: Depends, node: Node, env: dict[Node, Any]) -> Any:
    """Torch moves the answers as it moves the numbers; what a window covers counts together."""

    def numbers(n: Node) -> Any:
        found = run.of(n, env)
        one = found.float() if isinstance(found, Tensor) and found.dtype == torch.bool else found
        return [x.float() for x in one] if isinstance(one, list) else one

    target: Any = node.target
    args: Any = map_arg(node.args, numbers)
    kwargs = map_arg(node.kwargs, numbers)
    if op_name(node) in ("pad", "constant_pad_nd"):  # what it pads with is a constant
        args, kwargs = args[: 3 if op_name(node) == "pad" else 2], {}
    if op_name(node) in ("view", "_unsafe_view"):
        return args[0].reshape(args[1]) > 0
    made = target(*args, **kwargs)
    return [one > 0 for one in made] if isinstance(made, list | tuple) else made > 0


def _together(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor:
    """Number by number."""
    first = made[0] if isinstance(made, list | tuple) else made
    free = torch.zeros((), dtype=torch.bool, device=first.device)
    for source in node.all_input_nodes:
        found = run.of(source, env)
        if isinstance(found, Tensor) and isinstance(env[source], Tensor):
            free = free | found
    return free.expand(first.shape)


def _times(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor | None:
    """Number by number, where the other factor is not a constant 0."""
    one, other = node.args[:2]
    if not isinstance(one, Node) or not isinstance(other, Node):
        return _together(run, node, env, made)
    if not isinstance(env[one], Tensor) or not isinstance(env[other], Tensor):
        return _together(run, node, env, made)
    a, b = run.of(one, env), run.of(other, env)
    return (a & (b | (env[other] != 0))) | (b & (a | (env[one] != 0)))


def _product(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor | None:
    """A sum depends on its terms, but for those with a factor that is a constant 0."""
    places = factors(node)
    if places is None:
        return None
    one, other = node.args[places[0]], node.args[places[1]]
    if not isinstance(one, Node) or not isinstance(other, Node):
        return None
    a, b, times = run.of(one, env), run.of(other, env), bilinear(node, env)
    free = times(a.float(), (b | (env[other] != 0)).float()) > 0.5
    if bool(b.any()):
        free = free | (times((a | (env[one] != 0)).float(), b.float()) > 0.5)
    last = places[2]
    bias = None if last is None else node.args[last] if len(node.args) > last else node.kwargs.get("bias")
    moving = isinstance(bias, Node) and bool(run.of(bias, env).any())
    return _whole(run, node, env, made) if moving else free


def _channel_norm(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor | None:
    """A scale of 0 leaves the shift."""
    x, scale = node.args[0], node.args[1]
    training = op_name(node) == "batch_norm" and bool(node.args[5])
    if training or not isinstance(x, Node) or any(isinstance(a, Node) and run.of(a, env).any() for a in node.args[1:5]):
        return None
    free = run.of(x, env)
    if isinstance(scale, Node):
        free = free & (env[scale] != 0).reshape(-1, *[1] * (free.dim() - 2))
    return free


def _reduced(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor | None:
    x = node.args[0]
    if not isinstance(made, Tensor) or len(node.all_input_nodes) != 1 or not isinstance(x, Node):
        return None
    free = run.of(x, env)
    dims, keep = rules_along._reduced(node, free.dim())
    counts = free.float().sum(sorted(dims), keepdim=keep) if dims else free.float()
    return (counts > 0).reshape(made.shape)


def _attended(run: Depends, node: Node, env: dict[Node, Any], made: Any) -> Tensor | None:
    """Weights that sum up to 1 give a constant that is the same at all keys; with a mask they may not."""
    first, v = (made[0] if isinstance(made, list | tuple) else made), node.args[2]
    if not isinstance(v, Node) or env[v].dim() < 3:
        return None
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    value = env[v]
    same = (value == 0) if isinstance(mask, Node) else (value == value[..., :1, :])
    fixed = same.all(-2) & ~run.of(v, env).any(-2)
    if value.shape[-3] != first.shape[-3]:  # several queries share one value
        fixed = fixed.repeat_interleave(first.shape[-3] // value.shape[-3], -2)
    return ~fixed.unsqueeze(-2).expand(first.shape)


_Answer = Callable[[Depends, Node, dict[Node, Any], Any], "Tensor | None"]
_BY_NAME: dict[str, _Answer] = {
    "mul": _times, "multiply": _times, "batch_norm": _channel_norm,
    "_native_batch_norm_legit_no_training": _channel_norm,
    "scaled_dot_product_attention": _attended, "_scaled_dot_product_flash_attention_for_cpu": _attended,
}  # fmt: skip
_BY_RULE: dict[Any, _Answer] = {
    rules_shape.passed: _together, rules_shape.met: _together, rules_along.reduced: _reduced,
}  # fmt: skip
