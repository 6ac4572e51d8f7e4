"""MobileNet versions 1 and 2: depthwise convolutions between 1×1 ones."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.nets.common import check_counts, check_dropout, check_ratio, he_normal, multiple_of_8

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Version 1: channels and stride of each depthwise-separable convolution."""

V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Version 2: expansion, channels, number of blocks and first stride of each stage."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int, active: nn.Module | None) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, active) if active else nn.Sequential(*layers)


class MobileNet(nn.Module):
    """Convolutions, the mean over pixels, one linear layer: (N, C, H, W) → (N, outputs) logits."""

    def __init__(self, features: list[nn.Module], last: int, dropout: float, outputs: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, outputs)
        he_normal(self)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, H, W) of any size."""
        return self.head(self.dropout(self.features(x).mean((2, 3))))


class InvertedResidual(nn.Module):
    """1×1 up, depthwise 3×3, 1×1 down: (N, inputs, H, W) → (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        layers = [_conv(inputs, inner, 1, 1, 1, nn.ReLU6())] if expand != 1 else []
        layers += [_conv(inner, inner, 3, stride, inner, nn.ReLU6()), _conv(inner, outputs, 1, 1, 1, None)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, plus its input where the shapes agree."""
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v1(width: float = 1.0, dropout: float = 0.0, channels: int = 3, outputs: int = 1000) -> MobileNet:
    """MobileNet (Howard et al. 2017): 4,231,976 parameters and 0.57 G multiply-adds at 224×224.

    Args:
        width: factor on the channels of every layer, which are then rounded to a multiple of 8.
        dropout: probability of dropping a feature before the last layer.
        channels: channels of the images.
        outputs: logits.

    Raises:
        UsageError: for a size below 1, a width that is not above 0, or a dropout outside ``[0, 1)``.
    """
    check_counts("mobilenet_v1", channels=channels, outputs=outputs)
    check_ratio("mobilenet_v1", width=width)
    check_dropout("mobilenet_v1", dropout)
    inputs = multiple_of_8(32 * width)
    features: list[nn.Module] = [_conv(channels, inputs, 3, 2, 1, nn.ReLU())]
    for full, stride in V1:
        wide = multiple_of_8(full * width)
        features += [_conv(inputs, inputs, 3, stride, inputs, nn.ReLU()), _conv(inputs, wide, 1, 1, 1, nn.ReLU())]
        inputs = wide
    return MobileNet(features, inputs, dropout, outputs)


def mobilenet_v2(width: float = 1.0, dropout: float = 0.2, channels: int = 3, outputs: int = 1000) -> MobileNet:
    """MobileNetV2 (Sandler et al. 2018): 3,504,872 parameters and 0.30 G multiply-adds at 224×224.

    Args:
        width: factor on the channels of every layer (of the last one only above 1), rounded to a multiple of 8.
        dropout: probability of dropping a feature before the last layer.
        channels: channels of the images.
        outputs: logits.

    Raises:
        UsageError: for a size below 1, a width that is not above 0, or a dropout outside ``[0, 1)``.
    """
    check_counts("mobilenet_v2", channels=channels, outputs=outputs)
    check_ratio("mobilenet_v2", width=width)
    check_dropout("mobilenet_v2", dropout)
    inputs = multiple_of_8(32 * width)
    features: list[nn.Module] = [_conv(channels, inputs, 3, 2, 1, nn.ReLU6())]
    for expand, full, count, first in V2:
        wide = multiple_of_8(full * width)
        for i in range(count):
            features.append(InvertedResidual(inputs, wide, first if i == 0 else 1, expand))
            inputs = wide
    last = multiple_of_8(1280 * max(1.0, width))
    features.append(_conv(inputs, last, 1, 1, 1, nn.ReLU6()))
    return MobileNet(features, last, dropout, outputs)
