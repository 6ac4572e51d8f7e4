"""Mirrors of a run's figures in a tracker; the run folder stays the record."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import UsageError
from secateur.engine.start import Listener

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "trackio": "trackio"}


class Tracker(Listener):
    """Sends every figure to TensorBoard, MLflow or Trackio.

    Args:
        name: which one.
        out: the run folder; TensorBoard writes in ``out/tensorboard``.

    Raises:
        UsageError: when its package is not installed.
    """

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out, self._number, self._offset, self._last = name, out, 0, 0, 0
        try:
            self._module: Any = importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            raise UsageError(
                f"{name} is not installed; run `pip install 'secateur[{name}]'`, or leave `--log` out."
            ) from error
        if name == "tensorboard":
            self._writer = self._module.SummaryWriter(str(out / "tensorboard"))
        elif name == "mlflow":
            self._module.set_experiment("secateur")
            self._module.start_run(run_name=out.name)
        else:
            self._module.init(project="secateur", name=out.name)

    def begin(self, number: int, step: Any, folder: Path, steps: int) -> None:
        """Steps of later training steps go on counting."""
        self._offset = self._last

    def figures(self, figures: Mapping[str, int | float]) -> None:
        """Send one row."""
        self._last = self._offset + int(figures.get("step", 0))
        row = {name: float(value) for name, value in figures.items() if name != "step"}
        if self.name == "tensorboard":
            for name, value in row.items():
                self._writer.add_scalar(name, value, self._last)
        elif self.name == "mlflow":
            self._module.log_metrics(row, step=self._last)
        else:
            self._module.log(row, step=self._last)

    def close(self) -> None:
        """Flush and end."""
        if self.name == "tensorboard":
            self._writer.close()
        elif self.name == "mlflow":
            self._module.end_run()
        else:
            self._module.finish()


def tracker(name: str, out: Path) -> Tracker:
    """The tracker of a name."""
    return Tracker(name, out)
