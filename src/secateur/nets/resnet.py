"""Residual networks in ImageNet form; parameters are named as in torchvision, so its weights load."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.nets.common import check_counts, he_normal


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: (N, inputs, H, W) → (N, planes, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, after its ReLU."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions: (N, inputs, H, W) → (N, 4·planes, H / stride, W / stride).

    The stride is in the 3×3 convolution ("version 1.5"), as in torchvision.
    """

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU()
        self.downsample = _downsample(inputs, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, after its ReLU."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A 7×7 stem and four stages: (N, C, H, W) → (N, outputs) logits."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        width: int,
        channels: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for i, count in enumerate(blocks):
            planes = width * 2**i
            stage = [block(inputs, planes, 1 if i == 0 else 2)]
            inputs = planes * block.expansion
            stage += [block(inputs, planes, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, outputs)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, H, W) of any size."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18(width: int = 64, channels: int = 3, outputs: int = 1000) -> ResNet:
    """ResNet-18 (He et al. 2015): 11,689,512 parameters and 1.8 G multiply-adds at 224×224.

    Args:
        width: channels of the first stage; each further stage doubles them.
        channels: channels of the images.
        outputs: logits.

    Raises:
        UsageError: for a size below 1.
    """
    check_counts("resnet18", width=width, channels=channels, outputs=outputs)
    return ResNet(BasicBlock, (2, 2, 2, 2), width, channels, outputs)


def resnet34(width: int = 64, channels: int = 3, outputs: int = 1000) -> ResNet:
    """ResNet-34: 21,797,672 parameters, 3.7 G multiply-adds at 224×224; arguments and errors as :func:`resnet18`."""
    check_counts("resnet34", width=width, channels=channels, outputs=outputs)
    return ResNet(BasicBlock, (3, 4, 6, 3), width, channels, outputs)


def resnet50(width: int = 64, channels: int = 3, outputs: int = 1000) -> ResNet:
    """ResNet-50: 25,557,032 parameters, 4.1 G multiply-adds at 224×224; arguments and errors as :func:`resnet18`."""
    check_counts("resnet50", width=width, channels=channels, outputs=outputs)
    return ResNet(Bottleneck, (3, 4, 6, 3), width, channels, outputs)
