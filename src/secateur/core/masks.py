"""Masks: which weights are kept. They stand beside the network; the network stays plain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.core.errors import FileError, MaskError, nearest
from secateur.core.files import pack_bits, read_tensors, unpack_bits, write_tensors
from secateur.core.names import parameters
from secateur.core.prunable import coverage

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from secateur.core.hold import Hold


class Masks(Mapping[str, Tensor]):
    """Boolean tensors (True = kept) by parameter name; immutable (the given tensors are copied).

    Set algebra works entry by entry: ``a & b``, ``a | b``, ``a - b``, ``~a``.

    Args:
        masks: boolean tensors by plain parameter name, in the shapes of the parameters.

    Raises:
        MaskError: when a tensor is not boolean.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise MaskError(
                    f"the mask of `{name}` has type {mask.dtype}; make it boolean (`mask.bool()`), True = kept."
                )
        self._masks = {name: mask.detach().clone(memory_format=torch.contiguous_format) for name, mask in masks.items()}
        self._digest = ""

    @classmethod
    def dense(cls, model: nn.Module, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Masks:
        """Everything that can be pruned, all kept; ``only`` and ``skip`` are globs of names.

        Raises:
            UsageError: when a glob matches nothing.
            ModelError: when nothing can be pruned.
        """
        found = coverage(model, only, skip).prunable
        return cls({name: torch.ones(p.shape, dtype=torch.bool, device=p.device) for name, p in found.items()})

    @classmethod
    def from_zeros(cls, model: nn.Module, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Masks:
        """Masks read off the zeros of a network that came without its masks.

        What this loses: a kept weight that happens to be exactly zero (one just regrown, say) counts as
        pruned, and a pruned weight that something has overwritten counts as kept.
        """
        found = coverage(model, only, skip).prunable
        return cls({name: _whole(p) != 0 for name, p in found.items()})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            raise KeyError(f"no mask for `{name}`. {nearest(name, self._masks)}")
        return self._masks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, kept {self.kept:,} of {self.total:,}, sparsity {self.sparsity:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(self.counts().values())

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def sparsity(self) -> float:
        """Pruned / prunable."""
        return 1 - self.kept / self.total if self.total else 0.0

    def counts(self) -> dict[str, int]:
        """Weights kept in each tensor."""
        return {name: int(mask.sum()) for name, mask in self._masks.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of names, shapes and bits: equal for equal masks, on any device."""
        if not self._digest:
            sha = hashlib.sha256()
            for name in sorted(self._masks):
                sha.update(f"{name}{tuple(self._masks[name].shape)}".encode())
                sha.update(pack_bits(self._masks[name]).cpu().numpy().tobytes())
            self._digest = sha.hexdigest()
        return self._digest

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on a device."""
        return Masks({name: mask.to(device) for name, mask in self._masks.items()})

    def _with(self, other: Masks, combine: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if not isinstance(other, Masks):
            raise TypeError(f"masks combine with masks, not with {type(other).__name__}")
        if list(self) != list(other) and set(self) != set(other):
            odd = sorted(set(self) ^ set(other))
            raise MaskError(
                f"the masks name different tensors; only one side has {', '.join(f'`{n}`' for n in odd[:4])}."
            )
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                raise MaskError(
                    f"the masks of `{name}` have shapes {tuple(mask.shape)} and {tuple(other[name].shape)}."
                )
        return Masks({name: combine(mask, other[name].to(mask.device)) for name, mask in self.items()})

    def __and__(self, other: Masks) -> Masks:
        return self._with(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._with(other, torch.logical_or)

    def __sub__(self, other: Masks) -> Masks:
        return self._with(other, lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        return Masks({name: ~mask for name, mask in self.items()})

    def match(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters the masks belong to.

        Raises:
            MaskError: when the network has no such tensor, or one of another shape.
        """
        every = parameters(model)
        for name, mask in self.items():
            if name not in every:
                raise MaskError(
                    f"the masks belong to another network: this one has no parameter `{name}`. {nearest(name, every)}"
                )
            if every[name].shape != mask.shape:
                raise MaskError(
                    f"the masks belong to another network: `{name}` has shape {tuple(every[name].shape)}, "
                    f"its mask {tuple(mask.shape)}. Build the network with the widths it was pruned with."
                )
        return {name: every[name] for name in self}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every pruned weight to exactly +0.0, whatever it holds (NaN too).

        Raises:
            MaskError: when the masks belong to another network.
        """
        for name, p in self.match(model).items():
            data, mask = local(p, self[name])
            data.masked_fill_(~mask, 0.0)

    def hold(self, model: nn.Module, optimizer: Optimizer | None = None, also: Sequence[nn.Module] = ()) -> Hold:
        """Keep pruned weights zero through training; see :class:`secateur.core.hold.Hold`."""
        from secateur.core.hold import Hold

        return Hold(self, model, optimizer, also)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Every pruned weight must be zero; of sharded ones each process checks its own part.

        Raises:
            MaskError: naming the tensor, the number of weights that are not zero, and the cure.
        """
        for name, p in self.match(model).items():
            data, mask = local(p, self[name])
            alive, pruned = int((data.ne(0) & ~mask).sum()), int((~mask).sum())
            if alive:
                raise MaskError(
                    f"{alive:,} of {pruned:,} pruned weights of `{name}` are not zero. Something wrote to the network "
                    "after it was pruned (a dense checkpoint, or an optimizer without `masks.hold`). "
                    "Call `masks.apply_(model)` to zero them again, or load the pruned checkpoint."
                )

    def save(self, path: str | Path, **metadata: str) -> str:
        """Write one bit a weight as safetensors; returns the file's digest.

        Args:
            path: the file.
            metadata: further text for the file's header.

        Raises:
            FileError: when the file cannot be written.
        """
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        about = {**metadata, "format": "secateur.masks/1", "shapes": json.dumps(shapes), "digest": self.digest}
        return write_tensors(Path(path), {name: pack_bits(mask) for name, mask in self.items()}, about)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: when the file is missing, truncated, changed or not a mask file.
        """
        packed, about = read_tensors(Path(path))
        try:
            shapes = json.loads(about["shapes"])
            if not all(packed[name].dtype == torch.uint8 for name in shapes):
                raise ValueError("packed masks are bytes")
            masks = cls({name: unpack_bits(packed[name], tuple(shape)) for name, shape in shapes.items()})
            whole = masks.digest == about["digest"]
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise FileError(f"{path} is not a mask file of this library ({type(error).__name__}: {error}).") from error
        if not whole:
            raise FileError(f"{path} is damaged: its bits do not match its digest. Make it again, or restore a copy.")
        return masks


def _whole(p: Tensor) -> Tensor:
    """All of a parameter; sharded ones are gathered (every process must take part)."""
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()  # type: ignore[operator]


def local(p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a parameter on this process and the part of the mask that belongs to it.

    Plain tensors give themselves; sharded ones (FSDP2) their shard.
    """
    mask = mask.to(p.device)
    shard = getattr(p, "to_local", None)
    if shard is None:
        return p.detach(), mask
    from torch.distributed.tensor import distribute_tensor

    sharded = distribute_tensor(mask, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return p.detach().to_local(), sharded.to_local()  # type: ignore[attr-defined]
