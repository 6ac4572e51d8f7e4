"""Residual networks for small images: He et al. 2015, section 4.2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import UsageError
from secateur.nets.common import check_counts, he_normal


class PadShortcut(nn.Module):
    """Shortcut A: every ``stride``-th pixel, and zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H / stride, W / stride), rounded up."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (N, inputs, H, W) → (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            if shortcut == "A":
                self.shortcut = PadShortcut(inputs, outputs, stride)
            else:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, after its ReLU."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of basic blocks of ``width``, 2·``width``, 4·``width`` channels: (N, C, H, W) → (N, outputs)."""

    def __init__(self, blocks: int, width: int, channels: int, outputs: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.fc = nn.Linear(4 * width, outputs)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, H, W) of any size."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))


def _resnet(name: str, depth: int, width: int, channels: int, outputs: int, shortcut: str) -> CifarResNet:
    check_counts(name, depth=depth, width=width, channels=channels, outputs=outputs)
    if depth < 8 or (depth - 2) % 6:
        raise UsageError(f"{name}: depth={depth} is not of the form 6n + 2. Use 8, 14, 20, 32, 44, 56 or 110.")
    if shortcut not in ("A", "B"):
        raise UsageError(f"{name}: shortcut={shortcut!r} must be 'A' (zero padding) or 'B' (1×1 convolution).")
    return CifarResNet((depth - 2) // 6, width, channels, outputs, shortcut)


def resnet_cifar(
    depth: int = 20, width: int = 16, channels: int = 3, outputs: int = 10, shortcut: str = "A"
) -> CifarResNet:
    """ResNet for CIFAR of ``depth`` = 6n + 2 layers.

    Args:
        depth: layers with weights, shortcuts not counted: 8, 14, 20, 26, ...
        width: channels of the first stage.
        channels: channels of the images.
        outputs: logits.
        shortcut: what bridges a change of size: ``"A"``, every second pixel and zero channels, without parameters
            (the paper's choice); ``"B"``, a 1×1 convolution.

    Raises:
        UsageError: for a size below 1, another depth or another shortcut.
    """
    return _resnet("resnet_cifar", depth, width, channels, outputs, shortcut)


def resnet20(width: int = 16, channels: int = 3, outputs: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-20: 0.27 M parameters and 41 M multiply-adds at 32×32; arguments and errors as :func:`resnet_cifar`."""
    return _resnet("resnet20", 20, width, channels, outputs, shortcut)


def resnet32(width: int = 16, channels: int = 3, outputs: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-32: 0.46 M parameters and 69 M multiply-adds at 32×32; arguments and errors as :func:`resnet_cifar`."""
    return _resnet("resnet32", 32, width, channels, outputs, shortcut)


def resnet56(width: int = 16, channels: int = 3, outputs: int = 10, shortcut: str = "A") -> CifarResNet:
    """ResNet-56: 0.85 M parameters and 125 M multiply-adds at 32×32; arguments and errors as :func:`resnet_cifar`."""
    return _resnet("resnet56", 56, width, channels, outputs, shortcut)
