"""LeNet-5 in the form that pruning papers use."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.nets.common import check_counts


class LeNet5(nn.Module):
    """Two 5×5 convolutions with max pooling, one hidden layer: (N, C, size, size) → (N, outputs) logits."""

    def __init__(self, channels: int, size: int, outputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, two, hidden = widths
        self.conv1 = nn.Conv2d(channels, one, 5)
        self.conv2 = nn.Conv2d(one, two, 5)
        # Caffe rounds up, which also keeps the last row and column of images of odd size.
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.fc1 = nn.Linear(two * _side(size) ** 2, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, size, size)."""
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


def _side(size: int) -> int:
    """Side of the last feature map: twice a 5×5 convolution without padding and a halving that rounds up."""
    for _ in range(2):
        size = (size - 4 + 1) // 2
    return size


def lenet5(channels: int = 1, size: int = 28, outputs: int = 10, widths: tuple[int, ...] = (20, 50, 500)) -> LeNet5:
    """LeNet-5 in Caffe's form (one non-linearity, after ``fc1``): 431,080 parameters on MNIST.

    Args:
        channels: channels of the images.
        size: side of the images in pixels, at least 13.
        outputs: logits.
        widths: channels of the two convolutions and neurons of the hidden layer.

    Raises:
        UsageError: for a size below 1, images too small for the two convolutions, or not three widths.
    """
    check_counts("lenet5", channels=channels, size=size, outputs=outputs)
    if len(widths) != 3:
        raise UsageError(
            f"lenet5: widths={tuple(widths)!r} must be three numbers: two convolutions and the hidden layer."
        )
    check_counts("lenet5", **{f"widths[{i}]": width for i, width in enumerate(widths)})
    if size < 13:
        raise UsageError(
            f"lenet5: size={size} leaves nothing after two 5×5 convolutions; images must be at least 13×13. "
            "Use mlp for smaller ones."
        )
    return LeNet5(channels, size, outputs, widths)
