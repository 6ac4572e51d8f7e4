"""Optimizer state for kept weights alone: the same weights as with dense state, in a share of its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from secateur.core.errors import MaskError, UsageError

KINDS = (SGD, Adam, AdamW, RMSprop)
"""Optimizers that treat every weight by itself, and whose state at a pruned weight stays zero."""


class CompactState(Optimizer):
    """An optimizer whose moments exist for kept weights only.

    Under :class:`secateur.core.hold.Hold` gradients and state of pruned weights are zero all the time, so leaving them
    out changes nothing: every weight moves as with the optimizer itself. The hold tells it where the zeros are, at its
    start and at every swap; state of weights that stay is carried along, and weights that grow begin with none. Make
    it before the hold, and hand it to the hold, to schedulers of the learning rate and to the loop instead of the
    optimizer::

        optimizer = CompactState(torch.optim.AdamW(model.parameters(), 1e-3))
        with masks.hold(model, optimizer):
            ...

    State dictionaries hold the compact state; load one after the hold was made with the masks it was saved with.
    Tensors that no mask covers have the state of the optimizer itself, and so have those that keep more than half of
    their weights, since to remember which would take more memory than is saved.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop of torch, over parameters of the network.

    Raises:
        UsageError: for another optimizer: its state may couple weights, or not vanish where weights are pruned.

    Cost: four bytes for each kept weight beside its state (its place); in each step one copy of the kept weights and
    of their gradients, freed after it; at a swap the state of one tensor at a time in dense form.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in KINDS:
            named = ", ".join(kind.__name__ for kind in KINDS)
            raise UsageError(
                f"{type(optimizer).__name__} cannot have compact state: that is known to change nothing for {named} "
                "only. Use one of them, or the optimizer as it is."
            )
        self.inner = optimizer
        self._compact: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
        self._made = False
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.state = optimizer.state
        self._made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made.

        Raises:
            UsageError: always, but while it is made.
        """
        if self._made:
            raise UsageError(
                "parameters cannot be added to an optimizer with compact state; add them to the optimizer "
                "before it is wrapped."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def remask(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Where the zeros are from now on; a hold calls it.

        Args:
            masks: boolean masks on the parameters' devices, by parameter. State is carried for weights that were kept
                before too, is zero for the others that are kept, and is gone for pruned ones.

        Raises:
            UsageError: for sharded parameters.
        """
        for group in self.inner.param_groups:
            for place, leaf in enumerate(group["params"]):
                p = self._owner(leaf)
                if p not in masks:
                    continue
                if hasattr(p, "to_local"):
                    raise UsageError("compact state is not for sharded parameters (FSDP2); use the optimizer itself.")
                group["params"][place] = self._remasked(p, masks[p])

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the places of kept weights."""
        places = [places for _, places in self._compact.values()]
        tensors = [v for state in self.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*places, *tensors))

    def _owner(self, leaf: nn.Parameter) -> nn.Parameter:
        """The network's parameter that a parameter of the inner optimizer stands for."""
        return next((p for p, (own, _) in self._compact.items() if own is leaf), leaf)

    def _remasked(self, p: nn.Parameter, mask: Tensor) -> nn.Parameter:
        """State moved from the old form of a tensor to the new one; returns what the inner optimizer is to train."""
        leaf, old = self._compact.pop(p, (p, None))
        state = self.inner.state.pop(leaf, {})
        new = p
        if 2 * int(mask.sum()) <= mask.numel():
            new = nn.Parameter(p.detach().new_empty(0))
            places = mask.reshape(-1).nonzero().reshape(-1)
            self._compact[p] = (new, places.int() if mask.numel() <= torch.iinfo(torch.int32).max else places)
        moved = {key: _moved(value, p, old, mask, new is not p) for key, value in state.items()}
        if moved:
            self.inner.state[new] = moved
        return new

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the optimizer on the kept weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in mine.items() if key != "params"})
        for p, (leaf, places) in self._compact.items():
            if p.grad is not None:
                leaf.data = p.detach().reshape(-1).index_select(0, places)
                leaf.grad = p.grad.reshape(-1).index_select(0, places)
        self.inner.step()
        for p, (leaf, places) in self._compact.items():
            if leaf.grad is not None:
                flat = p.detach().reshape(-1).index_copy_(0, places.long(), leaf.detach())
                if not p.is_contiguous():  # the flat one is a copy then
                    p.copy_(flat.view(p.shape))
                leaf.grad = None
                leaf.data = flat.new_empty(0)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, with one entry for each kept weight."""
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in mine.items() if key != "params"})
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the state that :meth:`state_dict` gave, under the same masks.

        Raises:
            MaskError: when it was made with masks of other counts, or with dense state.
        """
        leaves = [leaf for group in self.inner.param_groups for leaf in group["params"]]
        counts = {leaf: len(places) for leaf, places in self._compact.values()}
        for place, leaf in enumerate(leaves):
            wanted = (counts[leaf],) if leaf in counts else tuple(leaf.shape)
            for key, value in state_dict["state"].get(place, {}).items():
                if isinstance(value, Tensor) and key != "step" and tuple(value.shape) != wanted:
                    raise MaskError(
                        f"the saved state `{key}` of parameter {place} has shape {tuple(value.shape)}, the masks ask "
                        f"for {wanted}. Hold the masks it was saved with before you load it; dense state does not fit."
                    )
        self.inner.load_state_dict(state_dict)
        self.state = self.inner.state
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({key: value for key, value in inner.items() if key != "params"})


def _moved(value: Any, p: nn.Parameter, old: Tensor | None, mask: Tensor, compact: bool) -> Any:
    """One entry of the state in its new form; numbers and counters stay as they are."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    dense = value
    if old is not None:
        dense = value.new_zeros(p.numel()).index_copy_(0, old.long(), value).view(p.shape)
    dense = dense.masked_fill(~mask, 0)
    return dense.masked_select(mask) if compact else dense
