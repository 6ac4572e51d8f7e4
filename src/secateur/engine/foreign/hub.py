"""Networks of transformers, built from settings alone: nothing is fetched and no code of others is run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.core.errors import ModelError, UsageError

USE = "secateur.engine.foreign.hub:network"
"""How ``structure.json`` names such a network."""


def network(kind: str, config: dict) -> nn.Module:
    """A network with fresh weights.

    Args:
        kind: a class of transformers, such as ``AutoModelForMaskedLM`` or ``BertModel``.
        config: what its ``config.json`` holds.

    Raises:
        UsageError: when transformers is not installed, has no such class, or the settings ask for code of their own.
        ModelError: when the settings make no network.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "transformers is not installed; run `pip install transformers`, or leave `--net` out to keep plain weights "
            "and masks."
        ) from error
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if "auto_map" in plain:
        raise UsageError("its config.json asks for code of its own (`auto_map`), which is not run; name the class.")
    if not kind.isidentifier() or not hasattr(library, kind):
        raise UsageError(f"transformers has no class {kind!r}; see `architectures` in its config.json.")
    if not isinstance(plain.get("model_type"), str):
        raise UsageError("its config.json names no `model_type`, so transformers cannot build it.")
    return _built(library, getattr(library, kind), plain)


def _built(library: Any, kind: Any, config: Mapping[str, Any]) -> nn.Module:
    try:
        settings = library.AutoConfig.for_model(**config)
        settings.dtype = None  # the type of the weights is theirs to say
        made = kind.from_config(settings) if hasattr(kind, "from_config") else kind(settings)
    except Exception as error:  # transformers promises no kind of error
        words = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"transformers cannot build {kind.__name__} ({type(error).__name__}: {words}).") from error
    return made.eval()
