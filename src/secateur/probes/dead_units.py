"""Dead units: hidden channels that are zero on all of the data."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import aliases, parameters, unwrap
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Task, call, frozen
from secateur.probes._still import in_single_operations, unchanged

_RECTIFIERS = frozenset(
    "relu hardtanh threshold leaky_relu elu selu celu gelu silu mish hardswish _prelu_kernel".split()
)
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear"))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class DeadUnits(Probe):
    """Per cent of hidden units that are dead: zero after their activation function for every example of the data.

    A unit is a channel of the output of a rectifier: ReLU, ReLU6 (and any hardtanh), threshold, leaky ReLU, PReLU,
    ELU (SELU, CELU), GELU, SiLU, Mish or Hardswish, as a module or as a function. It is dead when
    ``|output| <= eps`` for all examples and at all positions. A channel is dimension 1 after a convolution and the
    last dimension after a linear layer, whichever ran last. Not seen: clamps, and activations that are not 0 at 0
    or have no flat side (sigmoid, softplus, tanh). A unit that is dead here may live on other data.

    Beside that, from the weights alone: output channels of linear and convolution layers with no incoming weight
    (all pruned or zero), which give their bias whatever the input. Without any rectifier these are the value, as
    the note says.

    Parts: ``dead:PLACE`` and ``units:PLACE`` of each activation, named by its module or by the module that calls
    it (``block.relu#2``: the second use in a pass), and ``disconnected:NAME`` of each layer's weight that has such
    channels. ``n`` is the number of examples.

    Args:
        eps: largest magnitude that counts as zero; 0 suits ReLU; smooth functions are hardly ever exactly 0.

    Raises:
        UsageError: when ``eps`` is negative or not finite.
        MaskError: when ``masks`` belong to another network.
        DataError: when the data is empty or spent.

    Cost: one forward pass over the data.
    """

    eps: float = 0.0

    paper = Paper(
        "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures",
        "Hu, Peng, Tai, Tang",
        2016,
        "arXiv:1607.03250",
        differs="counts units whose average percentage of zeros is 100 %, where the paper ranks by that percentage",
    )

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not (isinstance(self.eps, int | float) and 0 <= self.eps < math.inf):
            raise UsageError(f"eps={self.eps!r} must be a finite number of at least 0; write `eps = 0.0`.")

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Per cent of hidden units that are dead."""
        if masks is not None:
            masks.match(task.model)
        alive, examples = _listen(task, self.eps)
        idle, rows = _disconnected(task, masks)
        parts: dict[str, float] = {}
        for place, lives in alive.items():
            parts |= {f"dead:{place}": float((~lives).sum()), f"units:{place}": float(lives.numel())}
        parts |= {f"disconnected:{name}": float(count) for name, count in idle.items() if count}
        units, dead = sum(x.numel() for x in alive.values()), sum(int((~x).sum()) for x in alive.values())
        if units:
            return Reading(100 * dead / units, "%", n=examples, parts=parts, note=f"{dead:,} of {units:,} units")
        note = f"no rectifier was seen; output channels without any incoming weight: {sum(idle.values()):,} of {rows:,}"
        return Reading(100 * sum(idle.values()) / max(1, rows), "%", n=examples, parts=parts, note=note)


def _listen(task: Task, eps: float) -> tuple[dict[str, Tensor], int]:
    """For each activation which of its channels ever left zero, and the number of examples."""
    alive: dict[str, Tensor] = {}
    examples = 0

    def take(place: str, lives: Tensor) -> None:
        if place in alive and alive[place].shape != lives.shape:  # the number of channels follows the input
            place = f"{place}[{lives.numel()}]"
        alive[place] = alive[place] | lives if place in alive else lives

    with unchanged(), frozen(task.model), in_single_operations(), _places(unwrap(task.model)) as path:
        for inputs, _, n in task.batches():
            with _Watch(path, eps, take):
                call(task.model, inputs)
            examples += n
    return alive, examples


class _Watch(TorchDispatchMode):
    """Sees every rectifier of one forward pass, called by a module or not."""

    def __init__(self, path: list[tuple[str, nn.Module]], eps: float, take: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.path, self.eps, self.take = path, eps, take
        self.uses: Counter[str] = Counter()
        self.last = False  # whether the last layer that ran has its channels in the last dimension

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.removesuffix("_") if hasattr(func, "_overloadpacket") else ""
        if name in _PRODUCTS or name == "convolution":
            self.last = name != "convolution"
        elif name in _RECTIFIERS and isinstance(out, Tensor) and out.dim() > 1:
            self._rectified(name.strip("_").removesuffix("_kernel"), out)
        return out

    def _rectified(self, name: str, out: Tensor) -> None:
        if any(isinstance(module, nn.RNNBase) for _, module in self.path):
            return  # inside a recurrent layer every time step would be a place of its own
        where, module = self.path[-1] if self.path else ("", None)
        leaf = module is not None and where and next(module.children(), None) is None and not list(module.parameters())
        place = where if leaf else f"{where}.{name}".lstrip(".")
        self.uses[place] += 1
        if self.uses[place] > 1:
            place = f"{place}#{self.uses[place]}"
        channel = out.dim() - 1 if self.last else 1
        flat = out.movedim(channel, -1).flatten(0, -2)
        self.take(place, ~(flat.abs() <= self.eps).all(dim=0))


@contextlib.contextmanager
def _places(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules that are running, from the outside in, with their names."""
    path: list[tuple[str, nn.Module]] = []
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, _: Any, name: str = name) -> None:
            path.append((name, module))

        def leave(*_: Any) -> None:
            path.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


def _disconnected(task: Task, masks: Masks | None) -> tuple[dict[str, int], int]:
    """Output channels without incoming weight in each linear or convolution layer, and channels in all."""
    model = unwrap(task.model)
    first = {alias: name for name, every in aliases(model).items() for alias in every}
    tensors, idle, rows = parameters(model), {}, 0
    for path, module in model.named_modules():
        name = first.get(f"{path}.weight".lstrip("."))
        if not isinstance(module, _LAYERS) or name is None or name in idle:
            continue
        there = tensors[name].detach() != 0
        if masks is not None and name in masks:
            there = there & masks[name].to(there.device)
        if isinstance(module, _TRANSPOSED):  # (in, out / groups, ...): channels of a group share its inputs
            there = there.unflatten(0, (module.groups, -1)).movedim(2, 1).flatten(0, 1)
        idle[name] = int((~there.flatten(1).any(1)).sum())
        rows += len(there)
    return idle, rows
