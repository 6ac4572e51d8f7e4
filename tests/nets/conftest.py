# Networks come by name, so the type checker cannot know their attributes.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false

import pytest
import torch
from torch import Tensor, nn

from secateur import nets

# Each network at its smallest, and the shape of an input: floats, or token numbers below `vocab`.
_SMALL = {
    "mlp": ({"inputs": 12, "outputs": 4, "widths": (8, 6), "batch_norm": True}, (3, 2, 2)),
    "lenet_300_100": ({"inputs": 12, "outputs": 4}, (12,)),
    "lenet5": ({"channels": 2, "size": 13, "outputs": 4, "widths": (3, 4, 5)}, (2, 13, 13)),
    "vgg11": ({"width": 0.02, "outputs": 4}, (3, 32, 32)),
    "vgg13": ({"width": 0.02, "outputs": 4}, (3, 32, 32)),
    "vgg16": ({"width": 0.02, "outputs": 4}, (3, 32, 32)),
    "vgg19": ({"width": 0.02, "outputs": 4}, (3, 32, 32)),
    "resnet_cifar": ({"depth": 8, "width": 3, "outputs": 4, "shortcut": "B"}, (3, 9, 9)),
    "resnet20": ({"width": 3, "outputs": 4}, (3, 9, 9)),
    "resnet32": ({"width": 2, "outputs": 4}, (3, 8, 8)),
    "resnet56": ({"width": 2, "outputs": 4}, (3, 8, 8)),
    "wide_resnet": ({"depth": 10, "widen": 1, "dropout": 0.1, "outputs": 4}, (3, 8, 8)),
    "resnet18": ({"width": 4, "outputs": 4}, (3, 33, 33)),
    "resnet34": ({"width": 4, "outputs": 4}, (3, 33, 33)),
    "resnet50": ({"width": 4, "outputs": 4}, (3, 33, 33)),
    "mobilenet_v1": ({"width": 0.05, "outputs": 4}, (3, 32, 32)),
    "mobilenet_v2": ({"width": 0.05, "outputs": 4}, (3, 32, 32)),
    "vit_tiny": ({"size": 8, "dim": 12, "depth": 2, "outputs": 4, "dropout": 0.1}, (3, 8, 8)),
    "bert_tiny": ({"vocab": 11, "length": 6, "dim": 8, "outputs": 4}, (6,)),
    "gpt_tiny": ({"vocab": 11, "length": 6, "dim": 8, "depth": 2, "dropout": 0.1}, (6,)),
    "lstm": ({"vocab": 11, "hidden": 8, "layers": 2, "dropout": 0.1}, (6,)),
}


def _small(name: str, count: int = 3, seed: int = 0) -> tuple[nn.Module, Tensor]:
    options, shape = _SMALL[name]
    torch.manual_seed(seed)
    model = nets.build(name, **options)
    random = torch.Generator().manual_seed(1)
    if "vocab" in options:
        return model, torch.randint(options["vocab"], (count, *shape), generator=random)
    return model, torch.randn(count, *shape, generator=random)


@pytest.fixture
def small():
    """``small(name, count=3, seed=0)``: a tiny version of a network, and an input of ``count`` examples."""
    return _small


@pytest.fixture
def meta():
    """``meta(name, shape, outputs, **options)``: a network that knows its shapes only, however large it is."""

    def make(name: str, *data, **options) -> nn.Module:
        with torch.device("meta"):
            return nets.build(name, *data, **options)

    return make
