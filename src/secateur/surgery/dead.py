"""Removing units that change nothing: what they give, whatever the input, moves into the biases behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.core.calls import split_inputs
from secateur.core.errors import ModelError, UsageError
from secateur.core.names import unwrap
from secateur.surgery import rules_compute
from secateur.surgery.analysis import Analysis, analyse
from secateur.surgery.attributes import groups_of
from secateur.surgery.dependence import CONVS, Depends, bilinear, by_input, factors, summed, weight_of
from secateur.surgery.labels import vector
from secateur.surgery.proof import CLOSE, difference, expected_outputs
from secateur.surgery.propagate import RULES, Pass, op_name, shape_of
from secateur.surgery.shrink import Removal, Shrunk, shrink

_EVEN = 1e-12  # relative, of constants that are the same but for rounding
_TAKING = ("linear", "addmm", *CONVS)
_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


@dataclass(frozen=True)
class Cleared:
    """A network without units that never made a difference.

    Args:
        shrunk: the smaller network, as :func:`secateur.surgery.shrink` gives it.
        units: the units that went, by group.
        into: parameters and buffers that took their constants.
        left: why other units whose values are constants stay, by group.
        error: largest difference from the outputs before, relative to the largest of each.
        inexact: for each convolution whose zero padding hides a constant, the largest difference at its border,
            relative to its largest output; empty where nothing changed.
    """

    shrunk: Shrunk
    units: Mapping[str, tuple[int, ...]]
    into: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    error: float = 0.0
    inexact: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The smaller network."""
        return self.shrunk.model


def dead_units(
    analysis: Analysis, model: nn.Module, example: Any, data: Iterable[Any] | None = None, *, borders: bool = False
) -> dict[str, list[int]]:
    """Units that add a constant to everything that reads them, in evaluation mode and whatever the input.

    That they do is read off the graph: beside every number runs whether it can depend on an input, and a product with
    a weight that is exactly 0 does not. So all-zero filters, scales of 0 and columns that nobody reads are found, and
    activations that merely never fire on the data are not. The constant itself is taken from the example.

    Args:
        analysis: that of the network.
        model: the network.
        example: one batch as it takes it.
        data: more batches; a constant must be the same on them.
        borders: also units whose constant does not reach the border of a convolution with zero padding.

    Returns:
        The units by group. Of a dimension of which all could go, one stays; units over which a normalisation takes
        its statistics stay.

    Cost: two forward passes over the example and one over each batch, each with as many products again.
    """
    return _look(analysis, unwrap(model), [example, *(data or ())]).dead(borders)


def absorb(
    analysis: Analysis, model: nn.Module, example: Any, remove: Removal, *, borders: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Add what dead units give to the biases behind them, in place; the units themselves stay as they are.

    Exact for linear layers and convolutions without zero padding, and where the constant is 0. A layer without bias
    hands it to the running mean of the BatchNorm behind it, or gets a bias.

    Args:
        analysis: that of the network.
        model: the network.
        example: one batch as it takes it.
        remove: dead units by group.
        borders: allow the constants that zero padding hides at borders.

    Returns:
        What the changed tensors were, by name (zeros for a bias that is new), and the differences at borders.

    Raises:
        UsageError: when one of the units is not dead.

    Cost: that of :func:`dead_units`.
    """
    own = unwrap(model)
    watch = _look(analysis, own, [example])
    known = watch.dead(borders, spare=False)
    for name, units in remove.items():
        for unit in units:
            if unit not in known.get(name, ()):
                raise UsageError(f"unit {unit} of group {name!r} is not dead; leave it out, or remove it by `shrink`.")
    return _absorb(watch, _labels_of(analysis, remove))


def shrink_dead(
    model: nn.Module,
    example: Any,
    *,
    data: Iterable[Any] | None = None,
    optimizer: Optimizer | None = None,
    borders: bool = False,
    rewriting: bool = True,
) -> Cleared:
    """Remove dead units in place; the network computes in evaluation mode what it did before.

    Args:
        model: the network.
        example: one batch as it takes it.
        data: more batches on which constants and outputs are compared.
        optimizer: the one that trains it; its state is sliced, and a new bias joins the group of its weight.
        borders: also remove units whose constant is hidden by zero padding at borders; the result then differs
            there and says by how much.
        rewriting: as :func:`secateur.surgery.shrink` takes it.

    Raises:
        ModelError: when the outputs are not what they were (and ``borders`` is not the reason); nothing was changed.

    Cost: one or two traces, a few forward passes over each batch, and what ``shrink`` costs.
    """
    own, batches = unwrap(model), [example, *(data or ())]
    found = analyse(own, example)
    watch = _look(found, own, batches)
    dead, left = watch.dead(borders), watch.left(borders)
    if not dead:
        count = sum(p.numel() for p in own.parameters())
        return Cleared(Shrunk(model, {}, (), 0.0, (count, count)), {}, left=left)
    fresh = _new_biases(watch, _labels_of(found, dead), optimizer)
    old: dict[str, Tensor] = {}
    try:
        if fresh:  # a bias of 0 changes nothing but the graph
            found = analyse(own, example)
            dead = _look(found, own, batches).dead(borders)
        nothing, labels = torch.empty(0, dtype=torch.int64), _labels_of(found, dead)
        before = [expected_outputs(found, nothing, batch) for batch in batches]
        old, inexact = absorb(found, own, example, dead, borders=borders)
        error = max(
            difference(expected_outputs(found, labels, x)[0], y) for x, (y, _) in zip(batches, before, strict=True)
        )
        if not inexact and error > _bound(own, old, before[0][1]):
            raise ModelError(f"without its dead units the network would differ by {error:.2g}; nothing was changed.")
        shrunk = shrink(model, example, dead, analysis=found, optimizer=optimizer, rewriting=rewriting)
    except BaseException:
        _restore(own, old, fresh, optimizer)
        raise
    return Cleared(shrunk, {n: tuple(u) for n, u in dead.items()}, tuple(old), left, error, inexact)


@dataclass
class _Use:
    """A sum over units that a bias can take the constants of; ``value`` is 0 for units that add none."""

    node: Node
    labels: Tensor
    value: Tensor
    border: float = 0.0

    @property
    def weight(self) -> Node:
        return weight_of(self.node)


class _Watch(Depends):
    """Notes, wherever units are summed over, which of them add something that varies and which a constant."""

    def __init__(self, analysis: Analysis, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__(analysis.run, dtype)
        self.analysis, self.model = analysis, model
        self.alive = torch.zeros(self.run.units.size + 1, dtype=torch.bool)
        self.stuck: list[tuple[Tensor, str]] = []
        self.bordered: list[tuple[Tensor, str]] = []
        self.passes: list[list[_Use]] = []

    def batch(self, example: Any) -> None:
        """Look at one batch."""
        self._free = {}
        self.passes.append([])
        self(*split_inputs(example))

    def seen(self, node: Node, env: dict[Node, Any], made: Any) -> None:
        """Look at one operator."""
        if RULES.get(op_name(node)) is rules_compute.recurrent:
            for value in self.run.of([*node.all_input_nodes, node]):
                for layer in value.layers:
                    self.alive[self.run.units.find(layer)] = True
            return
        for places in summed(self.run, node):
            self._index(node, places, env, made)

    def _index(self, node: Node, places: list[tuple[Node, int]], env: dict[Node, Any], made: Any) -> None:
        """One index that is summed over: which of its units add something."""
        labels = next((x for x in (_labels(self.run, one, d) for one, d in places) if x is not None), None)
        if labels is None:
            return
        nothing, varies = torch.zeros(2, len(labels), dtype=torch.bool)
        values: list[Tensor] = []
        for one, d in places:
            x, free = env[one], self.of(one, env)
            if op_name(node) in CONVS and one is node.args[1]:
                x, free, d = by_input(x, groups_of(node)), by_input(free, groups_of(node)), 0
            values.append(x.movedim(d, -1).reshape(-1, len(labels)))
            free = free.movedim(d, -1).reshape(-1, len(labels)).any(0).cpu()
            nothing, varies = nothing | ((values[-1] == 0).all(0).cpu() & ~free), varies | free
        self.alive[labels[varies & ~nothing]] = True
        there, name = ~varies & ~nothing, self.run.names.get(weight_of(node), node.name)
        takes = op_name(node) in _TAKING and bool(_home(self.run, self.model, node))
        if not takes:
            self.stick(labels[there], f"`{name}` sums over them and takes no bias")
            return
        one = values[0]
        bound = _EVEN * one.abs().amax(0) if one.dtype == torch.float64 else torch.zeros_like(one[0])
        uneven = there & (one.amax(0) - one.amin(0) > bound).cpu()
        self.stick(labels[uneven], f"their constants differ from place to place where `{name}` reads them")
        use = _Use(node, labels, one[0].cpu().masked_fill(~there | uneven, 0))
        self.passes[-1].append(use)
        if op_name(node) in CONVS and bool(use.value.any()):
            self._border(use, env, made)

    def stick(self, labels: Tensor, why: str) -> None:
        """Units that stay although they do not vary."""
        if labels.numel():
            self.stuck.append((labels, why))

    def _border(self, use: _Use, env: dict[Node, Any], made: Tensor) -> None:
        """What zero padding hides of constants."""
        x, weight = env[use.node.args[0]], env[use.weight]  # type: ignore[index]
        places = [1] * (weight.dim() - 2)
        inside = use.value.to(x).reshape(-1, *places).expand(x.shape)
        apart = bilinear(use.node, env)(inside, weight) - self.constant(use).reshape(-1, *places)
        worst = float(apart.abs().max()) / (float(made.abs().max()) or 1.0)
        if worst > (1e-9 if x.dtype == torch.float64 else 1e-5):
            use.border = worst
            why = (f"zero padding of `{self.run.names[use.weight]}` hides their constant at its border, which would "
                   f"differ by up to {worst:.2g} of its largest output")  # fmt: skip
            self.bordered.append((use.labels[use.value != 0], why))

    def constant(self, use: _Use) -> Tensor:
        """What units with constants add to each output, away from borders."""
        weight = self._wide(self.run.constants[use.weight])
        value = use.value.to(weight)
        if op_name(use.node) not in CONVS:
            return weight @ value if op_name(use.node) == "linear" else value @ weight
        kernel = weight.shape[2:]
        x = value.reshape(1, -1, *[1] * len(kernel)).expand(1, -1, *kernel)
        return (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1](x, weight, groups=groups_of(use.node)).reshape(-1)

    def dead(self, borders: bool, spare: bool = True) -> dict[str, list[int]]:
        """Units by group that add nothing but constants that can move; one of each dimension is spared."""
        stay = self.alive.clone()
        for labels, _ in (*self.stuck, *([] if borders else self.bordered)):
            stay[labels] = True
        groups = [group for group in self.analysis.groups if not group.inexact]
        found = {group.name: (~stay[group.labels]).nonzero()[:, 0].tolist() for group in groups}
        lost: dict[tuple[str, int], int] = {}
        for group in groups:
            for place, index in zip(group.tensors, group.index, strict=True):
                lost[place] = lost.get(place, 0) + len(found[group.name]) * index.shape[1]
        for group in groups if spare else ():
            for name, d in group.tensors:
                while found[group.name] and lost[name, d] >= self.run.parameters[name].shape[d]:
                    found[group.name].pop()
                    for place, index in zip(group.tensors, group.index, strict=True):
                        lost[place] -= index.shape[1]
        return {name: units for name, units in found.items() if units}

    def left(self, borders: bool) -> dict[str, str]:
        """Why units that do not vary stay, by group; the first reason of each."""
        why: dict[int, str] = {}
        for labels, reason in (*self.stuck, *([] if borders else self.bordered)):
            for root in labels.tolist():
                why.setdefault(root, reason)
        found: dict[str, str] = {}
        for group in self.analysis.groups:
            still = group.labels[~self.alive[group.labels]].tolist()
            reasons = [group.inexact[0]] if still and group.inexact else [why[root] for root in still if root in why]
            if reasons:
                found[group.name] = reasons[0]
        return found


def _look(analysis: Analysis, model: nn.Module, batches: list[Any]) -> _Watch:
    """What units add on some batches."""
    _, dtype = expected_outputs(analysis, torch.empty(0, dtype=torch.int64), batches[0])
    watch = _Watch(analysis, model, dtype)
    for batch in batches:
        watch.batch(batch)
    seen: dict[Node, list[_Use]] = {}
    for use in (use for uses in watch.passes for use in uses):
        seen.setdefault(use.weight, []).append(use)
    for weight, uses in seen.items():
        first = uses[0].value
        bound = _EVEN * first.abs() if first.dtype == torch.float64 else torch.zeros_like(first)
        every = len(uses) == len(weight.users) * len(batches)
        for use in uses:
            apart = (use.value - first).abs() > bound if every else use.value != 0
            watch.stick(use.labels[apart], f"`{watch.run.names[weight]}` reads other values elsewhere")
    return watch


def _labels(run: Pass, node: Node, d: int) -> Tensor | None:
    value = run.value(node)
    found = vector(value, d % value.dim) if value is not None and value.dim else None
    return None if found is None else run.units.find(found)


def _home(run: Pass, model: nn.Module, node: Node) -> tuple[str, str] | None:
    """Where a sum takes a constant: its bias, the mean of the normalisation behind it, or a bias it may get."""
    weight, last = weight_of(node), (factors(node) or (0, 0, 2))[2]
    name, kinds = run.names.get(weight), {op_name(user) for user in weight.users}
    bias: Any = node.args[last] if last is not None and len(node.args) > last else node.kwargs.get("bias")
    if name is None or len(kinds) > 1 or any(key in node.kwargs for key in ("alpha", "beta")):
        return None
    if isinstance(bias, Node):
        return ("bias", run.names[bias]) if bias in run.names and set(bias.users) <= set(weight.users) else None
    norms = {user for twin in weight.users for user in twin.users}
    if all(op_name(n) in _NORMS for n in norms) and (op_name(node) in CONVS or len(shape_of(node)) == 2):
        means: list[Any] = list(dict.fromkeys(n.args[3] for n in norms))  # type: ignore[misc]
        mean = means[0] if len(means) == 1 else None
        if mean in run.names and set(mean.users) <= norms:
            return "mean", run.names[mean]
    path, _, key = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and key == "weight"
    return ("new", f"{path}.bias".lstrip(".")) if plain and module.bias is None else None  # type: ignore[union-attr]


def _labels_of(analysis: Analysis, remove: Removal) -> Tensor:
    found = [analysis.group(name).labels[torch.tensor(list(u), dtype=torch.int64)] for name, u in remove.items()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _moves(watch: _Watch, labels: Tensor) -> dict[tuple[str, str], _Use]:
    """The constants of some units by where they go."""
    gone = torch.zeros(watch.run.units.size + 1, dtype=torch.bool)
    gone[labels] = True
    found: dict[tuple[str, str], _Use] = {}
    for use in watch.passes[0]:
        value, home = use.value * gone[use.labels], _home(watch.run, watch.model, use.node)
        if home is not None and bool(value.any()):
            found[home] = _Use(use.node, use.labels, value, use.border)
    return found


@torch.no_grad()
def _absorb(watch: _Watch, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    old, inexact = {}, {}
    for (kind, name), use in _moves(watch, labels).items():
        if kind == "new":
            _give_bias(watch.model, name)
        tensor, constant = _tensor(watch.model, name), watch.constant(use)
        old[name] = tensor.detach().clone()
        tensor.copy_(tensor.to(constant.dtype) + (-constant if kind == "mean" else constant))
        if use.border:
            inexact[watch.run.names[use.weight]] = use.border
    return old, inexact


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    found = module._parameters.get(key)
    return found if found is not None else module.get_buffer(key)


def _give_bias(model: nn.Module, name: str) -> nn.Parameter:
    module: Any = model.get_submodule(name.rpartition(".")[0])
    module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), module.weight.requires_grad)
    return module.bias


def _new_biases(watch: _Watch, labels: Tensor, optimizer: Optimizer | None) -> list[str]:
    """Biases of 0 for layers that are to take constants and have none."""
    names = [name for kind, name in _moves(watch, labels) if kind == "new"]
    for name in names:
        bias = _give_bias(watch.model, name)
        weight = _tensor(watch.model, f"{name.removesuffix('bias')}weight")
        for group in optimizer.param_groups if optimizer is not None else ():
            if any(p is weight for p in group["params"]):
                group["params"].append(bias)
    return names


@torch.no_grad()
def _restore(model: nn.Module, old: Mapping[str, Tensor], fresh: list[str], optimizer: Optimizer | None) -> None:
    for name, tensor in old.items():
        _tensor(model, name).copy_(tensor)
    for name in fresh:
        bias = _tensor(model, name)
        for group in optimizer.param_groups if optimizer is not None else ():
            group["params"] = [p for p in group["params"] if p is not bias]
        module: Any = model.get_submodule(name.rpartition(".")[0])
        module.bias = None


def _bound(model: nn.Module, old: Mapping[str, Tensor], dtype: torch.dtype | None) -> float:
    """How far outputs may be apart, by the types that constants were rounded to."""
    kinds = {tensor.dtype for tensor in old.values()}
    kinds |= {p.dtype for p in model.parameters() if p.is_floating_point()} if dtype is None else {dtype}
    return max(CLOSE.get(kind, 1e-5) for kind in kinds)
