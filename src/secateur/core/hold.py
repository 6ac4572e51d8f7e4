"""Hold: pruned weights stay zero through every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.compact import CompactState
from secateur.core.errors import MaskError
from secateur.core.masks import Masks, local


class Hold:
    """Keeps the zeros of ``masks`` in ``model`` while something trains it; a context manager.

    Two things happen: the gradient of a pruned weight becomes zero before anything reads it (clipping
    included), and pruned weights become zero after every optimizer step. Optimizer state of pruned
    weights is cleared at the start and at every :meth:`swap`, for any optimizer whose state has the
    shape of the parameter. Averaged copies in ``also`` are masked too.

    Known limits: sharded parameters (FSDP2) fire no gradient hooks, so gradients are masked just before
    the step; call :meth:`mask_gradients_` before clipping there. An optimizer that steps inside the
    backward pass needs one hold per optimizer. NaN gradients stay NaN. L-BFGS is untested.

    Args:
        masks: which weights are kept; they must belong to ``model``.
        model: the network, also inside DDP, FSDP2 or ``torch.compile``.
        optimizer: its optimizer; None when only gradients and checks are wanted.
        also: averaged copies (EMA, SWA) of the network.
        hooks: False for a loop that calls :meth:`mask_gradients_` and :meth:`mask_weights_` itself.

    Raises:
        MaskError: when the masks belong to another network, the optimizer does not train it, or the
            processes of a distributed run hold different masks.
    """

    def __init__(
        self,
        masks: Masks,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        also: Sequence[nn.Module] = (),
        hooks: bool = True,
    ) -> None:
        self.model, self.optimizer, self.also = model, optimizer, tuple(also)
        _same_everywhere(masks)  # first, so that every process gets here
        self._parameters = masks.match(model)
        self._handles: list[Any] = []
        self.masks = masks
        self._check_optimizer()
        self._install(masks, None)
        if hooks:
            self._hook()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove the hooks; the zeros stay until something writes to them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def swap(self, masks: Masks) -> None:
        """The only way masks change in training: new zeros, and state cleared where anything changed.

        Raises:
            MaskError: when the new masks name other tensors, or differ between processes.
        """
        _same_everywhere(masks)
        if set(masks) != set(self.masks):
            odd = sorted(set(masks) ^ set(self.masks))
            raise MaskError(f"the new masks name other tensors than the held ones: {', '.join(odd[:4])}.")
        masks.match(self.model)
        old, self.masks = self.masks, Masks({name: masks[name] for name in self.masks})
        self._install(self.masks, old)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the gradients of pruned weights. Cost: one multiplication over them."""
        pairs = [(g, m) for p, m in zip(self._tensors, self._floats, strict=True) if (g := _grad(p)) is not None]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def mask_weights_(self) -> None:
        """Zero the pruned weights. Cost: one multiplication over them."""
        if self._floats:
            torch._foreach_mul_([_mine(p) for p in self._tensors], self._floats)

    def check(self) -> None:
        """Every pruned weight must be zero, in the network and in its averaged copies.

        Raises:
            MaskError: naming tensor, count and cure.
        """
        self.masks.check(self.model)
        for copy in self.also:
            self.masks.check(copy)

    @torch.no_grad()
    def _install(self, masks: Masks, old: Masks | None) -> None:
        self._tensors = list(self._parameters.values())
        self._floats = []
        if isinstance(self.optimizer, CompactState):
            self.optimizer.remask({p: masks[name].to(p.device) for name, p in self._parameters.items()})
        for name, p in self._parameters.items():
            data, mask = local(p, masks[name])
            self._floats.append(mask.to(data.dtype))
            before = None if old is None else local(p, old[name])[1]
            self._clear_state(p, mask, before)
        masks.apply_(self.model)
        for copy in self.also:
            masks.apply_(copy)
        self.mask_gradients_()

    def _clear_state(self, p: Tensor, mask: Tensor, before: Tensor | None) -> None:
        """Zero the state of pruned and of regrown weights: whatever has the parameter's own shape."""
        state = self.optimizer.state.get(p, {}) if self.optimizer is not None else {}
        gone = ~mask if before is None else ~mask | (mask & ~before)
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                _mine(value).masked_fill_(gone, 0)

    def _hook(self) -> None:
        for index, p in enumerate(self._tensors):
            if p.requires_grad and not hasattr(p, "to_local"):
                self._handles.append(p.register_hook(self._gradient_hook(index)))
        if self.optimizer is not None:
            if any(hasattr(p, "to_local") for p in self._tensors):
                self._handles.append(self.optimizer.register_step_pre_hook(lambda *_: self.mask_gradients_()))
            self._handles.append(self.optimizer.register_step_post_hook(lambda *_: self.mask_weights_()))

    def _gradient_hook(self, index: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            mask = self._floats[index]
            return gradient if gradient.shape != mask.shape else gradient * mask

        return hook

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            return
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in self._parameters.items():
            if p.requires_grad and id(p) not in trained:
                raise MaskError(
                    f"the optimizer does not train `{name}`: it was made for another network, or before the parameters "
                    "were replaced. Make the optimizer from `model.parameters()` and hold again."
                )


def _grad(p: Tensor) -> Tensor | None:
    return None if p.grad is None else _mine(p.grad)


def _mine(tensor: Tensor) -> Tensor:
    """The memory of a tensor on this process: the shard of a sharded one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _same_everywhere(masks: Masks) -> None:
    """All processes must hold the same masks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, masks.digest)
    if len(set(digests)) > 1:
        raise MaskError(
            f"the {len(digests)} processes hold different masks ({', '.join(d[:8] for d in digests)}). "
            "Score on all ranks, decide on rank 0 and share it: `masks = secateur.broadcast(masks)`."
        )
