"""Runs recipes: the only place that changes networks and writes folders."""

from secateur.engine.api import load, prune, save, train
from secateur.engine.compiling import compile
from secateur.engine.cutting import Cut, Forecast, Plan
from secateur.engine.folder import Artefact
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.verbs import plan
from secateur.engine.recipe import Recipe, TrainStep
from secateur.engine.runner import Runner
from secateur.engine.start import Listener

__all__ = [
    "Artefact", "Cut", "Forecast", "LayerPlan", "Listener", "Plan", "Recipe", "Runner", "TrainStep",
    "compile", "load", "plan", "prune", "save", "train",
]  # fmt: skip
