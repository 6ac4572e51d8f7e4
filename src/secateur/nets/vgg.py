"""VGG networks in the form used for CIFAR: BatchNorm after every convolution, one linear layer at the end."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.nets.common import check_counts, check_ratio, he_normal

BLOCKS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions in each of the five blocks."""


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions, each ended by max pooling: (N, C, H, W) → (N, outputs) logits."""

    def __init__(self, blocks: tuple[int, ...], width: float, channels: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count, full in zip(blocks, (64, 128, 256, 512, 512), strict=True):
            wide = max(1, round(full * width))
            for _ in range(count):
                # BatchNorm takes the mean away, so the convolution needs no bias.
                layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
                channels = wide
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, outputs)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, H, W), both sides at least 32."""
        return self.head(self.features(x).mean((2, 3)))


def _vgg(name: str, width: float, channels: int, size: int, outputs: int) -> VGG:
    check_ratio(name, width=width)
    check_counts(name, channels=channels, size=size, outputs=outputs)
    if size < 32:
        raise UsageError(
            f"{name}: size={size} is too small for its five poolings; images must be at least 32×32. "
            "Resize or pad the images, or use lenet5 or resnet20."
        )
    return VGG(BLOCKS[name], width, channels, outputs)


def vgg11(width: float = 1.0, channels: int = 3, size: int = 32, outputs: int = 10) -> VGG:
    """VGG-11 with BatchNorm, 9.2 M parameters; arguments and errors as :func:`vgg16`."""
    return _vgg("vgg11", width, channels, size, outputs)


def vgg13(width: float = 1.0, channels: int = 3, size: int = 32, outputs: int = 10) -> VGG:
    """VGG-13 with BatchNorm, 9.4 M parameters; arguments and errors as :func:`vgg16`."""
    return _vgg("vgg13", width, channels, size, outputs)


def vgg16(width: float = 1.0, channels: int = 3, size: int = 32, outputs: int = 10) -> VGG:
    """VGG-16 (Simonyan and Zisserman 2014) with BatchNorm, 14.7 M parameters and 313 M multiply-adds at 32×32.

    Args:
        width: factor on the number of channels of every layer.
        channels: channels of the images.
        size: side of the images in pixels, at least 32; larger images are averaged before the last layer.
        outputs: logits.

    Raises:
        UsageError: for a size below 1, a width that is not above 0, or images below 32×32.
    """
    return _vgg("vgg16", width, channels, size, outputs)


def vgg19(width: float = 1.0, channels: int = 3, size: int = 32, outputs: int = 10) -> VGG:
    """VGG-19 with BatchNorm, 20.0 M parameters; arguments and errors as :func:`vgg16`."""
    return _vgg("vgg19", width, channels, size, outputs)
