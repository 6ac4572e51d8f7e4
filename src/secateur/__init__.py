"""secateur: from a trained network to its smallest and really fastest version, with proof.

Names are imported when first used, so that ``import secateur`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "Task": "core.task",
    "Masks": "core.masks",
    "Hold": "core.hold",
    "Reading": "core.reading",
    "Paper": "core.reading",
    "Criterion": "core.sockets",
    "Rule": "core.sockets",
    "Probe": "core.sockets",
    "Solver": "core.sockets",
    "Init": "core.sockets",
    "SecateurError": "core.errors",
    "CrossEntropy": "core.losses",
    "broadcast": "core.choose",
    "choose": "core.choose",
    "coverage": "core.prunable",
    "Plan": "engine",
    "LayerPlan": "engine",
    "Cut": "engine",
    "plan": "engine",
    "prune": "engine",
    "shrink": "engine.shrinking",
    "Thinned": "engine.shrinking",
    "train": "engine",
    "TrainStep": "engine",
    "Recipe": "engine",
    "Runner": "engine",
    "save": "engine",
    "load": "engine",
    "compile": "engine",
    "export": "engine.exporting",
    "compare": "report.comparing",  # not below: the engine reads this file's version, and stands under reports
}

__all__ = [*_PLACES, "__version__"]

if TYPE_CHECKING:
    from secateur.core.choose import broadcast as broadcast
    from secateur.core.choose import choose as choose
    from secateur.core.errors import SecateurError as SecateurError
    from secateur.core.hold import Hold as Hold
    from secateur.core.losses import CrossEntropy as CrossEntropy
    from secateur.core.masks import Masks as Masks
    from secateur.core.prunable import coverage as coverage
    from secateur.core.reading import Paper as Paper
    from secateur.core.reading import Reading as Reading
    from secateur.core.sockets import Criterion as Criterion
    from secateur.core.sockets import Init as Init
    from secateur.core.sockets import Probe as Probe
    from secateur.core.sockets import Rule as Rule
    from secateur.core.sockets import Solver as Solver
    from secateur.core.task import Task as Task
    from secateur.engine import Cut as Cut
    from secateur.engine import LayerPlan as LayerPlan
    from secateur.engine import Plan as Plan
    from secateur.engine import Recipe as Recipe
    from secateur.engine import Runner as Runner
    from secateur.engine import TrainStep as TrainStep
    from secateur.engine import compile as compile
    from secateur.engine import load as load
    from secateur.engine import plan as plan
    from secateur.engine import prune as prune
    from secateur.engine import save as save
    from secateur.engine import train as train
    from secateur.engine.exporting import export as export
    from secateur.engine.shrinking import Thinned as Thinned
    from secateur.engine.shrinking import shrink as shrink


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return importlib.import_module("secateur.runtime")
    if name in _PLACES:
        return getattr(importlib.import_module(f"secateur.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
