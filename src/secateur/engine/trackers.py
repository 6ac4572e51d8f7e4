"""Mirrors of a run's figures in a tracker; the run folder stays the record."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import UsageError
from secateur.engine import distributed
from secateur.engine.start import Listener

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "trackio": "trackio"}


class Tracker(Listener):
    """Sends every figure to TensorBoard, MLflow or Trackio.

    The first figure opens it, so that plans and runs that were finished before leave nothing in it. Of several
    processes only the first one writes.

    Args:
        name: which one.
        out: the run folder; TensorBoard writes in ``out/tensorboard``.

    Raises:
        UsageError: when there is none of this name, or its package is not installed.
    """

    def __init__(self, name: str, out: Path) -> None:
        if name not in _PACKAGES:
            known = ", ".join(sorted(_PACKAGES))
            raise UsageError(f"there is no tracker {name!r} (known: {known}). Pass one of them to `--log`.")
        self.name, self.out, self._offset, self._last = name, out, 0, 0
        self._writer: Any = None
        try:
            self._module: Any = importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            raise UsageError(
                f"{name} is not installed ({error}); run `pip install 'secateur[{name}]'`, or leave `--log` out."
            ) from error

    def begin(self, number: int, step: Any, folder: Path, steps: int) -> None:
        """Steps of later training steps go on counting."""
        self._offset = self._last

    def figures(self, figures: Mapping[str, int | float]) -> None:
        """Send one row.

        Raises:
            UsageError: when the tracker cannot be opened.
        """
        self._last = self._offset + int(figures.get("step", 0))
        if distributed.rank() != 0:
            return
        if self._writer is None:
            self._writer = self._open()
        row = {name: float(value) for name, value in figures.items() if name != "step"}
        if self.name == "tensorboard":
            for name, value in row.items():
                self._writer.add_scalar(name, value, self._last)
        elif self.name == "mlflow":
            self._writer.log_metrics(row, step=self._last)
        else:
            self._writer.log(row, step=self._last)

    def end(self, number: int, step: Any, card: Mapping[str, Any], skipped: bool) -> None:
        """Steps that an earlier run trained count too."""
        if skipped:
            self._last += int(card.get("steps", 0))

    def close(self) -> None:
        """Flush and end; nothing when no figure came."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        with contextlib.redirect_stdout(sys.stderr):  # Trackio prints, and standard output is for results
            if self.name == "tensorboard":
                writer.close()
            elif self.name == "mlflow":
                writer.end_run()
            else:
                writer.finish()

    def _open(self) -> Any:
        """TensorBoard's writer, or the module with a run begun in it."""
        title = self.out.resolve().name
        try:
            with contextlib.redirect_stdout(sys.stderr):
                if self.name == "tensorboard":
                    # Points after a checkpoint come again when a run goes on; readers drop the older ones
                    return self._module.SummaryWriter(str(self.out / "tensorboard"), purge_step=self._last)
                if self.name == "mlflow":
                    self._module.set_experiment("secateur")
                    self._module.start_run(run_name=title)
                else:
                    self._module.init(project="secateur", name=title)
        except Exception as error:  # each package has errors of its own
            why = str(error).rstrip(".")
            raise UsageError(
                f"{self.name} cannot be opened for {self.out}: {why}. Put that right, or leave `--log` out."
            ) from error
        return self._module


def tracker(name: str, out: Path) -> Tracker:
    """The tracker of a name."""
    return Tracker(name, out)
