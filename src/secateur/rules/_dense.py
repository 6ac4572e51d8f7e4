"""Dense weights that lie behind those the network computes with, in a rule's state under ``theta:``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.run import Run


def lay_aside(run: Run, state: dict[str, Any]) -> bool:
    """Lift the masks and keep a dense copy of every weight; after a resume, bring the state to its device.

    Returns:
        Whether the run is at its beginning.
    """
    weights = run.weights()
    if run.resumed:
        first = next(iter(weights.values()))
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.to(weights.get(key.partition(":")[2], first).device)
        return False
    if run.masks.kept < run.masks.total:
        run.masks = Masks({name: torch.ones_like(mask) for name, mask in run.masks.items()})
    state.update({f"theta:{name}": w.detach().clone() for name, w in weights.items()})
    return True


def clear(run: Run, w: Tensor, where: Tensor) -> None:
    """Zero the optimizer's state there: whatever has the parameter's own shape."""
    for value in run.optimizer.state.get(w, {}).values():
        if isinstance(value, Tensor) and value.shape == w.shape and value.dim():
            value.masked_fill_(where, 0)


def adam_(state: dict[str, Any], name: str, slope: Tensor, done: int) -> Tensor:
    """The direction in which Adam would move a tensor after ``done`` steps; its moments lie in ``state``."""
    keys = (f"first:{name}", f"second:{name}")
    state.update({key: torch.zeros_like(slope) for key in keys if key not in state})
    first, second = state[keys[0]].lerp_(slope, 0.1), state[keys[1]].mul_(0.999)
    second.addcmul_(slope, slope, value=0.001)
    return first / (1 - 0.9 ** (done + 1)) / (second / (1 - 0.999 ** (done + 1))).sqrt_().add_(1e-8)
