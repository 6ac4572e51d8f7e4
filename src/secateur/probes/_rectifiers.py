"""Which channels of rectifiers ever leave zero, watched in forward passes, whether modules or functions call them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.names import Named, unwrap
from secateur.core.task import Task, call, frozen
from secateur.probes._still import in_single_operations, unchanged

_RECTIFIERS = frozenset(
    "relu hardtanh threshold leaky_relu elu selu celu gelu silu mish hardswish _prelu_kernel".split()
)
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear"))


def listen(task: Task, eps: float, at: Named | None = None) -> tuple[dict[str, Tensor], int]:
    """For each activation which of its channels ever left zero, and the number of examples; with other weights."""
    alive: dict[str, Tensor] = {}
    examples = 0

    def take(place: str, lives: Tensor) -> None:
        if place in alive and alive[place].shape != lives.shape:  # the number of channels follows the input
            place = f"{place}[{lives.numel()}]"
        alive[place] = alive[place] | lives if place in alive else lives

    with unchanged(), frozen(task.model), in_single_operations(), _places(unwrap(task.model)) as path:
        for inputs, _, n in task.batches():
            with _Watch(path, eps, take):
                call(task.model, inputs, at)
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
