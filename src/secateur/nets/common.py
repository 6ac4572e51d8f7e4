"""What several networks share: checks of their arguments, and the initial weights of convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError


def check_counts(net: str, **values: int | None) -> None:
    """Refuse anything but whole numbers of at least 1 (``None``: not given, not checked).

    Raises:
        UsageError: names the network, the argument and its value.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{net}: {name}={value!r} must be a whole number of at least 1.")


def check_dropout(net: str, dropout: float) -> None:
    """Refuse a probability of dropping out outside ``[0, 1)``.

    Raises:
        UsageError: names the network and the value.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"{net}: dropout={dropout!r} must be at least 0 and less than 1; 0 switches it off.")


def check_ratio(net: str, **values: float) -> None:
    """Refuse a factor that is not finite and above 0.

    Raises:
        UsageError: names the network, the argument and its value.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{net}: {name}={value!r} must be a finite number above 0.")


def check_heads(net: str, dim: int, heads: int) -> None:
    """Refuse attention heads of unequal width.

    Raises:
        UsageError: when ``dim`` is not a multiple of ``heads``.
    """
    check_counts(net, dim=dim, heads=heads)
    if dim % heads:
        raise UsageError(f"{net}: dim={dim} is not divisible by heads={heads}. Set heads to a divisor of dim.")


def check_tokens(net: str, tokens: Tensor, length: int | None = None) -> None:
    """Refuse inputs that are not token numbers (N, T) or are longer than the network's positions.

    Raises:
        DataError: names the network, the type or shape, and the cure.
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(
            f"{net} takes token numbers of shape (N, T) and type torch.int64, "
            f"not {tuple(tokens.shape)} of type {tokens.dtype}."
        )
    if length is not None and tokens.shape[1] > length:
        raise DataError(f"{net}: texts of {tokens.shape[1]} tokens need length={tokens.shape[1]}, not length={length}.")


def he_normal(model: nn.Module) -> None:
    """Convolutions start from He et al.'s normal (fan out), as in the residual networks' reference code."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def small_normal(model: nn.Module, std: float = 0.02) -> None:
    """Transformers start from a normal of standard deviation ``std``, with biases of 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def multiple_of_8(channels: float) -> int:
    """The multiple of 8 nearest to ``channels``, at least 8 and never below nine tenths of it (MobileNet)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near
