"""Corrupted images: five ways to spoil a picture, at five severities each."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.reading import Reading
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Dataset, Split
from secateur.data.images import require
from secateur.engine.damage.outputs import BATCH, loader_of
from secateur.probes._logits import IGNORED, rows
from secateur.probes._statistics import paired_difference, wilson
from secateur.probes._still import unchanged

SEVERITIES = 5
TABLE: dict[str, tuple[float, ...]] = {
    "gaussian noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "jpeg": (25.0, 18.0, 15.0, 10.0, 7.0),
}
"""Parameter of each corruption at severities 1 to 5.

- gaussian noise: standard deviation of what is added to every value, of images in [0, 1].
- gaussian blur: standard deviation of the kernel in pixels of an image whose shorter side has 32; in proportion for
  other sizes. Beyond its edge an image goes on as at the edge.
- contrast: factor of each value's distance from the mean of its channel in that image.
- brightness: what is added to every value.
- jpeg: quality of the compression, by Pillow.

Noise, contrast, brightness and quality are those of Hendrycks and Dietterich's ImageNet-C (arXiv:1903.12261), whose
brightness is added to the V of HSV and so differs for coloured images; the widths of the blur are our own. Every result
is clamped to [0, 1]. The pictures are not those of CIFAR-10-C or MNIST-C, so neither are the accuracies.
"""
MEANING = {
    "gaussian noise": "standard deviation", "gaussian blur": "width in pixels at 32 pixels",
    "contrast": "factor", "brightness": "shift", "jpeg": "quality",
}  # fmt: skip
_CHUNK = 128
"""Images whose noise is drawn at once; part of what a seed means."""


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    The noise of an image follows from the seed and its place in the batch; all severities share one draw, larger by
    their factor. The result is on the device of the images, and the same on every device up to rounding.

    Args:
        images: floating ``(n, C, H, W)`` in [0, 1].
        name: a key of :data:`TABLE`.
        severity: 1 to 5.
        seed: of the noise.

    Raises:
        UsageError: for an unknown name or severity, or JPEG without Pillow.
    """
    if name not in TABLE or not 1 <= severity <= SEVERITIES:
        raise UsageError(f"corruption {name!r} at severity {severity}; known: {', '.join(TABLE)}, at 1 to 5.")
    return _WAYS[name](images, TABLE[name][severity - 1], seed).clamp_(0.0, 1.0)


def pixels(data: Dataset | Split) -> tuple[Tensor | None, str]:
    """Images ``(n, C, H, W)`` of the test part as they are stored, or why it has none."""
    x = (data.test if isinstance(data, Dataset) else data).x
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return None, f"an example has shape {tuple(x.shape[1:])}; an image has 1 or 3 channels and two sides"
    if x.dtype != torch.uint8 and not x.is_floating_point():
        return None, f"the inputs are {x.dtype}; images are uint8, or floating in [0, 1]"
    if x.is_floating_point() and not (bool((x >= 0).all()) and bool((x <= 1).all())):
        low, high = (float(v) for v in torch.aminmax(x))
        return None, f"the inputs run from {low:.3g} to {high:.3g}; floating images must be in [0, 1]"
    return x, ""


def corruptions(
    nets: Sequence[tuple[str, nn.Module]], data: Dataset | Split, *, examples: int = 1000, seed: int = 0,
    batch: int = BATCH, skip: Callable[[str, str], None] = lambda what, why: None,
) -> dict[str, Any] | None:  # fmt: skip
    """Accuracy of several networks on corrupted test images; all see the same pictures.

    Args:
        nets: names and networks, the dense one first.
        data: a data set of images, or a split of them that needs no further scaling.
        examples: at most so many test images, drawn by the seed.
        seed: of the choice and of the noise.
        batch: images in a batch.
        skip: hears what was left out, and why.

    Returns:
        ``examples``; ``clean``: a row without corruption; ``rows``: one for each corruption and severity with
        ``corruption``, ``severity``, ``parameter``, ``accuracy`` (a reading for each network, with ``right`` as an
        exact number) and ``change`` (points against the first network, paired, 95 % interval); ``parameters``: what
        the parameters are. None when the data are no images.

    Raises:
        DataError: when a network gives NaN for clean images.

    Cost: 26 forward passes of each network over the examples; of JPEG about 0.1 ms a picture of 32 pixels.
    """
    whole, why = pixels(data)
    if whole is None:
        skip("corruptions", why)
        return None
    split = data.test if isinstance(data, Dataset) else data
    counted = (split.y != IGNORED).nonzero().flatten().cpu()
    order = torch.randperm(len(counted), generator=stream(seed, "damage", "corrupted"))
    chosen = split.take(counted[order[:examples].sort().values])
    clean = chosen.x.float() / 255 if chosen.x.dtype == torch.uint8 else chosen.x

    def measured(x: Tensor) -> dict[str, Any]:
        found = {name: _right(net, scaled(data, Split(x, chosen.y)), batch, name) for name, net in nets}
        first = found[nets[0][0]]
        return {
            "accuracy": {name: _accuracy(right) for name, right in found.items()},
            "change": {name: paired_difference(right, first) for name, right in list(found.items())[1:]},
        }

    table: dict[str, Any] = {"examples": len(chosen), "parameters": MEANING, "clean": measured(clean), "rows": []}
    for kind, parameters in TABLE.items():
        try:
            table["rows"] += [
                {
                    "corruption": kind, "severity": level, "parameter": parameter,
                    **measured(corrupt(clean, kind, level, seed)),
                }
                for level, parameter in enumerate(parameters, 1)
            ]  # fmt: skip
        except (UsageError, DataError) as error:  # no Pillow, or a network that gives NaN for such pictures
            skip(f"corruptions: {kind}", str(error))
    return table


def scaled(data: Dataset | Split, split: Split) -> Dataset | Split:
    """The split with the scale of the data set: floating images in [0, 1] are normalised as uint8 ones are."""
    if not isinstance(data, Dataset):
        return split
    return Dataset(data.name, split, split, data.classes, data.kind, data.mean, data.std)


def _right(net: nn.Module, data: Dataset | Split, batch: int, name: str) -> Tensor:
    task = Task(net, CrossEntropy(), loader_of(data, net, batch))
    try:
        with unchanged():
            return torch.cat([(found.logits.argmax(1) == found.labels).cpu() for found in rows(task)])
    except DataError as error:
        raise DataError(f"network {name!r}: {error}") from error


def _accuracy(right: Tensor) -> Reading:
    hits, n = int(right.sum()), len(right)
    low, high = wilson(hits, n)
    return Reading(100 * hits / n, "%", None, 100 * low, 100 * high, n, {"right": float(hits)})


def _noise(images: Tensor, parameter: float, seed: int) -> Tensor:
    out = torch.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        random = stream(seed, "damage", "gaussian noise", start)
        drawn = torch.randn(_CHUNK, *part.shape[1:], generator=random)[: len(part)]
        out[start : start + _CHUNK] = part + parameter * drawn.to(part)
    return out


def _blur(images: Tensor, parameter: float, seed: int) -> Tensor:
    width = parameter * min(images.shape[2:]) / 32
    reach = max(1, math.ceil(4 * width))
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / width) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    channels = images.shape[1]
    out = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    out = functional.conv2d(out, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(out, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _contrast(images: Tensor, parameter: float, seed: int) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * parameter + mean


def _brightness(images: Tensor, parameter: float, seed: int) -> Tensor:
    return images + parameter


def _jpeg(images: Tensor, parameter: float, seed: int) -> Tensor:
    pillow = require("PIL.Image", "the corruption 'jpeg'")
    whole = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    out = torch.empty(whole.shape, dtype=torch.uint8)
    for i, picture in enumerate(whole):
        gray = picture.shape[2] == 1
        packed = io.BytesIO()
        pillow.fromarray((picture[:, :, 0] if gray else picture).contiguous().numpy()).save(
            packed, "JPEG", quality=int(parameter)
        )
        with pillow.open(io.BytesIO(packed.getvalue())) as back:
            out[i] = torch.frombuffer(bytearray(back.tobytes()), dtype=torch.uint8).view(whole.shape[1:])
    return out.permute(0, 3, 1, 2).to(images) / 255


_WAYS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "gaussian noise": _noise, "gaussian blur": _blur, "contrast": _contrast, "brightness": _brightness, "jpeg": _jpeg,
}  # fmt: skip
