"""Fully connected networks, among them LeNet-300-100."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from secateur.core.errors import UsageError, nearest
from secateur.nets.common import check_counts

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""Activation functions by the name that :func:`mlp` takes."""


def mlp(
    inputs: int = 784,
    outputs: int = 10,
    widths: tuple[int, ...] = (300, 100),
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Sequential:
    """Multilayer perceptron: (N, ...) with ``inputs`` numbers an example, flattened → (N, ``outputs``) logits.

    Layers are called ``fc1``, ``fc2``, ..., ``head``.

    Args:
        inputs: numbers in one example.
        outputs: numbers the network gives, for instance one logit a class.
        widths: neurons of each hidden layer; empty for a linear model.
        activation: a name of :data:`ACTIVATIONS`.
        batch_norm: put BatchNorm before each activation; the hidden layers then have no bias of their own.

    Raises:
        UsageError: for a size below 1 or an unknown activation.
    """
    check_counts("mlp", inputs=inputs, outputs=outputs, **{f"widths[{i}]": width for i, width in enumerate(widths)})
    if activation not in ACTIVATIONS:
        raise UsageError(f"mlp: no activation is called {activation!r}. {nearest(str(activation), ACTIVATIONS)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, width in enumerate(widths, start=1):
        layers[f"fc{i}"] = nn.Linear(inputs, width, bias=not batch_norm)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm1d(width)
        layers[f"act{i}"] = ACTIVATIONS[activation]()
        inputs = width
    layers["head"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)


def lenet_300_100(inputs: int = 784, outputs: int = 10) -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998): two hidden layers of 300 and 100 ReLUs; 266,610 parameters on MNIST.

    Raises:
        UsageError: for a size below 1.
    """
    check_counts("lenet_300_100", inputs=inputs, outputs=outputs)
    return mlp(inputs, outputs, (300, 100))
