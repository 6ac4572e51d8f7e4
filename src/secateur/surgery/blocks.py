"""Removing whole blocks: which can go, how much each changes what passes through it, and the shorter network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from secateur.core.calls import split_inputs
from secateur.core.errors import ModelError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.core.streams import stream
from secateur.core.task import Task, call, frozen
from secateur.surgery.proof import CLOSE, difference, run

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Block:
    """A part of a network that might be left out.

    Args:
        path: its name among the modules.
        why_not: why it has to stay; empty where it can go.
        params: its parameters.
        macs: its multiply-adds for one example; 0 where it has to stay.
        residual: with its parameters at 0 it gives its input, but for a ReLU; so removing it is the limit of making
            them smaller. False for blocks that end in a normalisation.
    """

    path: str
    why_not: str
    params: int
    macs: int = 0
    residual: bool = False


@dataclass(frozen=True)
class Shortened:
    """A network without some of its blocks.

    Args:
        model: the user's own network, shorter.
        removed: the names that the blocks had.
        names: for each parameter, by its name now, the name it had.
        error: largest difference from the network with the blocks bypassed, relative to the largest output.
        params: parameters before and after.
        notes: anything else, such as blocks whose place is kept by something that passes its input on.
    """

    model: nn.Module
    removed: tuple[str, ...]
    names: Mapping[str, str]
    error: float
    params: tuple[int, int]
    notes: tuple[str, ...] = ()

    def masks(self, masks: Masks) -> Masks:
        """Masks of the network as it was, as masks of this one."""
        return Masks({new: masks[old] for new, old in self.names.items() if old in masks})


class Skip(nn.Module):
    """Gives its first tensor back, in the place of a block with more arguments or results than one.

    Args:
        results: how many results it gives, in a tuple, of which the others are None; 0 for the tensor alone.
    """

    def __init__(self, results: int = 0) -> None:
        super().__init__()
        self.results = results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor, any shape."""
        x = _first(args, kwargs)
        return (x, *[None] * (self.results - 1)) if self.results else x


# ---- which can go ---------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """The first call of a module: copies of what it is given, and what comes out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    why_not: str = ""


def blocks(model: nn.Module, example: Any) -> list[Block]:
    """What might be left out: entries of ``nn.Sequential`` and ``nn.ModuleList``, and other modules that can go.

    A block can go when it gives one tensor (or a tuple that begins with one) of the shape of its first argument, and a
    path leads around its weights: with all of them at 0, its output still depends on its input.

    Args:
        model: the network; it stays as it is.
        example: one batch as it takes it.

    Returns:
        In the order of the modules; entries without parameters are left out, as are modules that are not entries and
        have to stay.

    Cost: one forward pass, which copies the inputs of all modules, and up to four of each block.
    """
    own = unwrap(model)
    entries = {path: _listed(parent) for path, parent, _ in _children(own)}
    calls = _calls(own, example, list(entries))
    found = [_block(own, path, calls.get(path)) for path in entries]
    return [block for block in found if entries[block.path] or not block.why_not]


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules with parameters that might be blocks, with their parents."""
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            stage = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not _listed(parent)
            if child is not None and not stage and next(child.parameters(), None) is not None:
                yield f"{path}.{key}".lstrip("."), parent, child


def _listed(parent: nn.Module) -> bool:
    return isinstance(parent, nn.Sequential | nn.ModuleList)


def _calls(model: nn.Module, example: Any, paths: Sequence[str]) -> dict[str, _Call]:
    """One pass; of each module its first call, and what speaks against removing it."""
    calls: dict[str, _Call] = {}
    waiting: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}

    def before(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:  # a block may write into its input
            waiting[path].append(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs = waiting[path].pop()
            why = _mismatch(args, kwargs, output)
            if path not in calls:
                calls[path] = _Call((), {}, None, why) if why else _Call(args, kwargs, output)
            calls[path].why_not = calls[path].why_not or why

        return hook

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    args, kwargs = split_inputs(example)
    try:
        with torch.no_grad(), frozen(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The first tensor that a module is given."""
    return next((x for x in (*args[:1], *kwargs.values()) if isinstance(x, Tensor)), None)


def _result(output: Any) -> Any:
    return output[0] if type(output) in (tuple, list) and output else output


def _mismatch(args: Any, kwargs: Any, output: Any) -> str:
    x, y = _first(args, kwargs), _result(output)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return "its first argument is not a tensor of floating point"
    if not isinstance(y, Tensor):
        return f"it gives {type(y).__name__}, not a tensor or a tuple that begins with one"
    if x.shape != y.shape:
        return f"it makes {tuple(y.shape)} of {tuple(x.shape)}"
    return "" if x.dtype == y.dtype else f"it makes {y.dtype} of {x.dtype}"


@torch.no_grad()
def _block(model: nn.Module, path: str, made: _Call | None) -> Block:
    module = model.get_submodule(path)
    params = sum(p.numel() for p in module.parameters())
    if made is None or made.why_not:
        return Block(path, made.why_not if made else "it is not called on this example", params)
    weights = [name for name, p in module.named_parameters() if p.dim() > 1]
    if not weights:
        return Block(path, "it has no weights that a path could lead around", params)
    x = _first(made.args, made.kwargs)
    noise = torch.randn(x.shape, generator=stream(0, "blocks"), dtype=torch.float64).to(x)
    try:
        with frozen(model):
            one, other = (_at_zero(module, weights, made, x), _at_zero(module, weights, made, x + noise))
            empty = _at_zero(module, [name for name, _ in module.named_parameters()], made, x)
            with FlopCounterMode(display=False) as counter:
                module(*_copied(made.args), **_copied(made.kwargs))
    except Exception as error:  # any forward may fail in any way
        return Block(path, f"it cannot be run by itself ({type(error).__name__})", params)
    if bool((one == other).all()):
        return Block(path, "no path leads around its weights: without them its output is a constant", params)
    residual = any(torch.allclose(empty, y, 1e-5, 1e-6) for y in (x, x.relu()))
    return Block(path, "", params, counter.get_total_flops() // 2 // max(1, x.shape[0]), residual)


def _at_zero(module: nn.Module, names: Sequence[str], made: _Call, x: Tensor) -> Tensor:
    """The output for one input, with some parameters at 0."""
    own = dict(module.named_parameters())
    old = _first(made.args, made.kwargs)
    args, kwargs = tree_map(lambda v: x.clone() if v is old else v, (made.args, made.kwargs))
    zeros = {name: torch.zeros_like(own[name]) for name in names}
    return _result(functional_call(module, zeros, args, kwargs))


def _copied(thing: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, thing)


# ---- how much each does ---------------------------------------------------------------------------------------------


def block_influence(task: Task, paths: Sequence[str]) -> dict[str, float]:
    """Block influence ``BI = 1 - mean cos(input, output)`` over tokens or pixels, from 0 (a scaled copy) to 2.

    A row is the vector of channels at one place: dimension 1 where the block has convolutions over all others, else
    the last. Rows of padding, where the batch is a mapping with ``attention_mask``, do not count.

    Args:
        task: the network and its data.
        paths: names of blocks, as :func:`blocks` gives them.

    Returns:
        BI by name, no unit; NaN for a block that is never called.

    Raises:
        UsageError: for a name that is no module.
        ModelError: for a block whose input and output have different shapes.

    Cost: one forward pass over the data. Source: Men et al. 2024, ShortGPT, arXiv:2403.03853, eq. 1.
    """
    model = unwrap(task.model)
    _known(model, paths)
    sums = {path: [0.0, 0] for path in paths}
    mask: list[Tensor | None] = [None]

    def listen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            why = _mismatch(args, kwargs, output)
            if why:
                raise ModelError(f"block `{path}` has no influence to measure: {why}. Choose blocks by `blocks`.")
            cosines = _cosines(module, inputs[path].pop(), _result(output), mask[0])
            sums[path][0] += cosines.sum()
            sums[path][1] += cosines.numel()

        return hook

    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def enter(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            x = _first(args, kwargs)
            inputs[path].append(x.clone() if isinstance(x, Tensor) else x)

        handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.get_submodule(path).register_forward_hook(listen(path), with_kwargs=True))
    try:
        with torch.no_grad(), frozen(model):
            for batch, _, _ in task.batches():
                mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: 1.0 - float(total) / count if count else float("nan") for path, (total, count) in sums.items()}


def _cosines(module: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The cosine between input and output at each place, float64; 1 where both are 0."""
    over = _CONVS.get(x.dim() - 2, nn.Conv2d)
    channel = 1 if any(isinstance(m, over) for m in module.modules()) else x.dim() - 1
    one, other = (t.movedim(channel, -1).double() for t in (x, y))
    scale = one.norm(dim=-1) * other.norm(dim=-1)
    same = (one == other).all(-1)
    found = torch.where(same, torch.ones_like(scale), (one * other).sum(-1) / scale.clamp_min(1e-300))
    if mask is not None and mask.shape == found.shape:
        return found[mask != 0]
    return found.reshape(-1)


def _known(model: nn.Module, paths: Sequence[str]) -> None:
    names = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    for path in paths:
        if path not in names:
            raise UsageError(f"the network has no module {path!r}. {nearest(path, names)}")


# ---- taking them out ------------------------------------------------------------------------------------------------


def remove_blocks(
    model: nn.Module, example: Any, paths: Sequence[str], *, optimizer: Optimizer | None = None
) -> Shortened:
    """Take blocks out of a network in place, once a copy without them has been proved to compute the same.

    "The same" is what the network computes, in evaluation mode, when each of these blocks gives back its input.

    Entries of ``nn.Sequential`` and ``nn.ModuleList`` are deleted and the others numbered anew, so that the names are
    those of a network built with fewer; a Hugging Face configuration and ``layer_idx`` follow. Where the network calls
    its blocks by name or number, an ``nn.Identity`` or :class:`Skip` takes the place.

    Args:
        model: the network. Its class, its modules and their hooks stay.
        example: one batch as it takes it.
        paths: names of blocks, as :func:`blocks` gives them; of one inside another, the outer goes.
        optimizer: the one that trains it; it forgets the parameters that are gone.

    Raises:
        UsageError: for a name that is no module, or none at all.
        ModelError: for a block that has to stay, or when the result does not compute the same; nothing was changed.

    Cost: two copies of the network, and about four forward passes over the example.
    """
    own = unwrap(model)
    _known(own, paths)
    if not paths:
        raise UsageError("no block is to be removed; name at least one, as `blocks(model, example)` lists them.")
    outer = tuple(dict.fromkeys(p for p in paths if not any(p.startswith(f"{q}.") for q in paths)))
    calls = _calls(own, example, outer)
    for path in outer:
        block = _block(own, path, calls.get(path))
        if block.why_not:
            raise ModelError(f"block `{path}` has to stay: {block.why_not}. Nothing was changed; leave it out.")
    before, count = {id(p): name for name, p in parameters(own).items()}, sum(p.numel() for p in own.parameters())
    deleting, error, notes = _proved(own, example, outer, calls)
    _cut(own, outer, calls, deleting)
    names = {name: before[id(p)] for name, p in parameters(own).items()}
    if optimizer is not None:
        _forget(optimizer, own, before)
    return Shortened(model, outer, names, error, (count, sum(p.numel() for p in own.parameters())), notes)


def _proved(
    own: nn.Module, example: Any, paths: Sequence[str], calls: Mapping[str, _Call]
) -> tuple[bool, float, tuple[str, ...]]:
    """Whether to delete entries or put something in their place, the error that is left, and a note."""
    expected, wide = _bypassed(own, example, paths)
    bound = CLOSE[wide] if wide is not None else 1e-5
    deletable = any(_listed(own.get_submodule(path.rpartition(".")[0])) for path in paths)
    why = ""
    for deleting in (True, False) if deletable else (False,):
        trial = copy.deepcopy(own).eval()
        _cut(trial, paths, calls, deleting)
        try:
            error = difference(run(trial, example, wide), expected)
        except Exception as problem:  # any forward may fail in any way
            why = (
                why or f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160] if str(problem) else ''}"
            )
            continue
        if error <= bound:
            return deleting, error, (f"blocks keep their places, since without them: {why}",) if why else ()
        why = why or f"its outputs would differ by {error:.2g}"
    raise ModelError(
        f"without {', '.join(paths)} the network does not compute what it does with them bypassed ({why}); "
        "nothing was changed. Leave them out."
    )


def _bypassed(own: nn.Module, example: Any, paths: Sequence[str]) -> tuple[list[Any], torch.dtype | None]:
    """Outputs with blocks that give back their inputs, in float64 where the network can."""
    trial = copy.deepcopy(own).eval()
    for path in paths:
        held: list[Tensor] = []

        def enter(_: nn.Module, args: Any, kwargs: Any, held: list[Tensor] = held) -> None:
            held.append(_first(args, kwargs).clone())

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any, held: list[Tensor] = held) -> Any:
            x = held.pop()
            return x if isinstance(output, Tensor) else type(output)((x, *output[1:]))

        trial.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True)
        trial.get_submodule(path).register_forward_hook(leave, with_kwargs=True)
    try:
        return run(trial, example, torch.float64), torch.float64
    except Exception:  # an operator that does not take float64
        return run(trial, example, None), None


def _cut(model: nn.Module, paths: Sequence[str], calls: Mapping[str, _Call], deleting: bool) -> None:
    lists: dict[str, list[str]] = {}
    for path in paths:
        parent, _, key = path.rpartition(".")
        if deleting and _listed(model.get_submodule(parent)):
            lists.setdefault(parent, []).append(key)
        else:
            model.get_submodule(parent)._modules[key] = _place(calls[path])
    # inner lists first, while their own names still hold
    for parent in sorted(lists, key=lambda name: -name.count(".")):
        _shorten(model, parent, lists[parent])


def _place(made: _Call) -> nn.Module:
    alone = len(made.args) == 1 and not made.kwargs
    if isinstance(made.output, Tensor):
        return nn.Identity() if alone else Skip()
    return Skip(len(made.output))


def _shorten(model: nn.Module, path: str, keys: Sequence[str]) -> None:
    """Delete entries of a list of modules; what is counted elsewhere follows."""
    parent = model.get_submodule(path)
    kept = [(key, child) for key, child in parent._modules.items() if key not in keys]
    gone = [i for i, key in enumerate(parent._modules) if key in keys]
    count = len(parent._modules)
    numbered = all(key.isdigit() for key in parent._modules)
    for i, (key, child) in enumerate(kept):
        for module in child.modules() if child is not None and numbered else ():
            if vars(module).get("layer_idx") == int(key) and type(vars(module)["layer_idx"]) is int:
                module.layer_idx = i  # type: ignore[assignment]
    parent._modules.clear()
    for i, (key, child) in enumerate(kept):
        parent._modules[str(i) if numbered else key] = child
    for config in _configs(model, path):
        _count(config, path, count, gone)


def _configs(model: nn.Module, path: str) -> list[Any]:
    """Configurations of the modules around a list, each once."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    found = [vars(module).get("config") for module in around]
    return list({id(config): config for config in found if config is not None and hasattr(config, "__dict__")}.values())


def _count(config: Any, path: str, count: int, gone: Sequence[int]) -> None:
    """Numbers and lists of a configuration that say how many layers there are."""
    side = next((s for s in ("decoder", "encoder") if s in path.split(".")), "")
    own = [name for name in (f"{side}_layers", f"num_{side}_layers") if side and vars(config).get(name) == count]
    for name in (*own, *(() if own and side == "decoder" else _DEPTHS)):
        if vars(config).get(name) == count:
            setattr(config, name, count - len(gone))
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [one for i, one in enumerate(value) if i not in gone])


def _forget(optimizer: Optimizer, model: nn.Module, before: Mapping[int, str]) -> None:
    """Drop the parameters that are gone, and their state; groups stay, as schedulers count them."""
    still = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        gone = [p for p in group["params"] if id(p) in before and id(p) not in still]
        group["params"] = [p for p in group["params"] if id(p) in still or id(p) not in before]
        for p in gone:
            optimizer.state.pop(p, None)
