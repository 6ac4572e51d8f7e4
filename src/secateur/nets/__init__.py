"""Small reference networks, without downloads, and :func:`build`, which also takes networks of your own.

Importing this package does not import torch; :func:`build` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from secateur.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build", "names"]

_FILES = {
    "mlp": ("mlp", "lenet_300_100"),
    "lenet": ("lenet5",),
    "vgg": ("vgg11", "vgg13", "vgg16", "vgg19"),
    "resnet_cifar": ("resnet_cifar", "resnet20", "resnet32", "resnet56"),
    "wide_resnet": ("wide_resnet",),
    "resnet": ("resnet18", "resnet34", "resnet50"),
    "mobilenet": ("mobilenet_v1", "mobilenet_v2"),
    "vit": ("vit_tiny",),
    "bert": ("bert_tiny",),
    "gpt": ("gpt_tiny",),
    "lstm": ("lstm",),
}
_FILE_OF = {function: file for file, functions in _FILES.items() for function in functions}


def names() -> list[str]:
    """Names of all networks that :func:`build` knows, in alphabetical order.

    >>> "resnet20" in names()
    True
    """
    return sorted(_FILE_OF)


def build(
    name: str, input_shape: Sequence[int] | None = None, data_outputs: int | None = None, /, **options: Any
) -> nn.Module:
    """A network by name, on the CPU; its weights are drawn from torch's global generator.

    The first three arguments go by position, so that an option can have any name.

    >>> build("mlp", (1, 28, 28), 10, widths=(64, 32)).head
    Linear(in_features=32, out_features=10, bias=True)

    Args:
        name: one of :func:`names`; or ``"package.module:function"``, a function or class of your own that gives
            an ``nn.Module``; or the path of a ``.pt2`` file from ``torch.export.save``.
        input_shape: shape of one example of the data: (channels, height, width) of images, (features,) or
            (tokens,). Sets ``channels``, ``size``, ``inputs`` or ``length`` where ``options`` do not.
        data_outputs: classes of the data, or different tokens of text. Sets ``outputs``, or the ``vocab`` of a
            language model, where ``options`` do not.
        options: arguments of the network's function. Your own function gets these and nothing else. A ``.pt2``
            file takes none.

    Raises:
        UsageError: for an unknown name or option, an option of the wrong type or out of range, or a network
            that does not fit the data.
        ModelError: when your own function fails or gives something else than a network.
        FileError: when a ``.pt2`` file is missing or cannot be read.
    """
    if name.endswith(".pt2"):
        if options:
            raise UsageError(f"{name!r} is a captured network and takes no options; leave out {', '.join(options)}.")
        return importlib.import_module("secateur.nets.captured").load(name)
    fitting = importlib.import_module("secateur.nets.fitting")
    if ":" in name:
        return fitting.call_own(name, options)
    if name not in _FILE_OF:
        raise UsageError(
            f"no network is called {name!r}. {nearest(name, names())} "
            "Your own goes by 'package.module:function' or by the path of a .pt2 file."
        )
    function = getattr(importlib.import_module(f"secateur.nets.{_FILE_OF[name]}"), name)
    return function(**fitting.arguments(name, function, input_shape, data_outputs, options))
