"""Wide residual networks (Zagoruyko and Komodakis 2016): few, wide blocks with BatchNorm and ReLU in front."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.nets.common import check_counts, check_dropout, he_normal


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice: (N, inputs, H, W) → (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, with nothing after it."""
        y = self.relu(self.bn1(x))
        # Where the size changes, both paths start behind the first ReLU, as in the authors' code.
        around = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(self.relu(self.bn2(self.conv1(y))))
        return self.conv2(y) + around


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 times ``widen`` channels: (N, C, H, W) → (N, outputs) logits."""

    def __init__(self, blocks: int, widen: int, dropout: float, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(blocks, 16, 16 * widen, 1, dropout)
        self.layer2 = _stage(blocks, 16 * widen, 32 * widen, 2, dropout)
        self.layer3 = _stage(blocks, 32 * widen, 64 * widen, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * widen, outputs)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, H, W) of any size."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.relu(self.bn(x)).mean((2, 3)))


def _stage(blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> nn.Sequential:
    first = WideBlock(inputs, outputs, stride, dropout)
    return nn.Sequential(first, *(WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)))


def wide_resnet(
    depth: int = 16, widen: int = 8, dropout: float = 0.0, channels: int = 3, outputs: int = 10
) -> WideResNet:
    """WRN-``depth``-``widen``; WRN-16-8 has 11.0 M parameters and 1.55 G multiply-adds at 32×32.

    Args:
        depth: layers with weights, 6n + 4: 10, 16, 22, 28, 40, ...
        widen: factor on the channels of ResNet's stages.
        dropout: probability of dropping an entry between a block's two convolutions.
        channels: channels of the images.
        outputs: logits.

    Raises:
        UsageError: for a size below 1, another depth, or a dropout outside ``[0, 1)``.
    """
    check_counts("wide_resnet", depth=depth, widen=widen, channels=channels, outputs=outputs)
    check_dropout("wide_resnet", dropout)
    if depth < 10 or (depth - 4) % 6:
        raise UsageError(f"wide_resnet: depth={depth} is not of the form 6n + 4. Use 10, 16, 22, 28 or 40.")
    return WideResNet((depth - 4) // 6, widen, dropout, channels, outputs)
