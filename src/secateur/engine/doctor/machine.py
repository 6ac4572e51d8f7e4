"""What this machine has: versions, the compiled core, extras, data sets."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from secateur import _native
from secateur.core.errors import SecateurError
from secateur.data import load as load_data
from secateur.engine.folder import origin


def environment(data_dir: str | None = None) -> dict[str, Any]:
    """Versions, machine, extras that are installed and data sets that are found."""
    facts: dict[str, Any] = dict(origin())
    core = _native.library()
    facts["compiled core"] = (
        core.sec_isas().decode() if core else f"none: {_native.why_not()}; plans run on NumPy, slowly"
    )
    for extra in ("sklearn", "pyarrow", "PIL", "datasets", "onnxruntime", "tensorboard", "mlflow", "trackio"):
        facts[extra] = "installed" if importlib.util.find_spec(extra) else "not installed"
    facts["data folder"] = data_dir or os.environ.get("SECATEUR_DATA") or "none ($SECATEUR_DATA is not set)"
    for name in ("digits", "mnist", "cifar10", "monks1", "nettalk", "tinyshakespeare"):
        try:
            data = load_data(name, data_dir)
            facts[f"data {name}"] = f"{len(data.train):,} for training, {len(data.test):,} for tests"
        except SecateurError as error:
            facts[f"data {name}"] = f"not found: {str(error).splitlines()[0][:100]}"
    return facts
