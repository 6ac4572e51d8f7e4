"""Losses by name, each the mean over examples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from secateur.core.errors import DataError


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of logits, ``(N, classes)`` or for sequences ``(N, T, classes)``: classes come last.

    Args:
        smoothing: label smoothing in [0, 1).
        ignore: target value that does not count (padding).
    """

    smoothing: float = 0.0
    ignore: int = -100

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean over examples (and over tokens of sequences).

        Raises:
            DataError: when the shapes do not belong together.
        """
        if output.dim() not in (2, 3) or target.shape != output.shape[:-1]:
            raise DataError(
                f"the network's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}; "
                "cross-entropy needs logits (N, classes) with targets (N,), or (N, T, classes) with (N, T)."
            )
        output = output.reshape(-1, output.shape[-1])
        return functional.cross_entropy(
            output.float() if output.dtype.itemsize < 4 else output,
            target.reshape(-1),
            label_smoothing=self.smoothing,
            ignore_index=self.ignore,
        )
