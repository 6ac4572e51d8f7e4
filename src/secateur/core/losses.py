"""Losses by name, each the mean over examples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from secateur.core.errors import DataError


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of logits; class dimension last for sequences ``(N, T, V)``, second otherwise.

    Args:
        smoothing: label smoothing in [0, 1).
        ignore: target value that does not count (padding).
    """

    smoothing: float = 0.0
    ignore: int = -100

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean over examples (and over tokens of sequences)."""
        classes = output.shape[-1]
        if output.dim() == target.dim() + 1:
            output, target = output.reshape(-1, classes), target.reshape(-1)
        if output.dim() != 2 or target.shape != output.shape[:1]:
            raise DataError(
                f"the network's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}; "
                "cross-entropy needs logits (N, classes) with targets (N,), or (N, T, classes) with (N, T)."
            )
        return functional.cross_entropy(
            output.float() if output.dtype.itemsize < 4 else output,
            target,
            label_smoothing=self.smoothing,
            ignore_index=self.ignore,
        )
