"""Steps of recipes: what each does, as data that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from secateur.core.allocations import Allocation, Global
from secateur.core.errors import UsageError
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.sockets import Criterion, Probe, Rule, Solver, name_of
from secateur.criteria.magnitude import Magnitude
from secateur.engine.compensating import Inputs
from secateur.engine.cutting import aim
from secateur.engine.recovering import Recover
from secateur.engine.shrinking import check_rounds
from secateur.engine.surgeon import Curvature
from secateur.surgery.analysis import Granularity
from secateur.surgery.choosing import Scope, parse_goal
from secateur.surgery.scoring import Normalize


@dataclass(frozen=True)
class TrainStep:
    """Train, with rules if any.

    Args:
        epochs: passes over the training data.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"`` or ``"rmsprop"``.
        lr: highest learning rate.
        momentum: momentum of SGD and RMSprop.
        nesterov: Nesterov momentum (SGD).
        weight_decay: weight decay (decoupled for AdamW).
        schedule: how the rate falls: ``"constant"``, ``"cosine"``, ``"step"`` (a tenth at 50 and 75 %)
            or ``"one-cycle"``.
        warmup: epochs in which the rate rises from near 0.
        smoothing: label smoothing.
        clip: largest gradient norm (0: no clipping).
        accumulate: batches whose gradients are added up before a step.
        ema: decay of an averaged copy, which becomes the result (0: none).
        amp: compute in bfloat16 where that is safe.
        channels_last: keep images in channels-last memory order (often faster for convolutions).
        compact_state: give the optimizer state for kept weights only: the same weights, less memory.
        rules: what happens during training, such as gradual pruning.
        teacher: folder of the network that distillation imitates; the last dense one before this step by default.
        only: globs of tensors that rules may prune.
        skip: globs of tensors that rules leave alone.
        save_every: write a checkpoint at least every so many steps (0: once an epoch).
    """

    do: ClassVar[str] = "train"
    epochs: int = 10
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "step", "one-cycle"] = "cosine"
    warmup: float = 0.0
    smoothing: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    amp: bool = False
    channels_last: bool = False
    compact_state: bool = False
    rules: tuple[Rule, ...] = ()
    teacher: str = ""
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    save_every: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("lr", self.lr, 0 < self.lr < float("inf"), "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)"),
            ("nesterov", self.nesterov, self._may_look_ahead(), 'false without `optimizer = "sgd"` and momentum > 0'),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "at least 0, and finite"),
            ("warmup", self.warmup, 0 <= self.warmup <= self.epochs, "between 0 and the number of epochs"),
            ("smoothing", self.smoothing, 0 <= self.smoothing < 1, "in [0, 1)"),
            ("clip", self.clip, self.clip >= 0, "at least 0"),
            ("accumulate", self.accumulate, self.accumulate >= 1, "at least 1"),
            ("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)"),
            ("save_every", self.save_every, self.save_every >= 0, "at least 0"),
        ]
        for name, value, fine, wanted in rules:
            if not fine:
                raise UsageError(f"train: {name} is {value!r}; it must be {wanted}.")

    def _may_look_ahead(self) -> bool:
        return not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0)


@dataclass(frozen=True)
class PruneStep:
    """Prune once.

    Args:
        to: the target, such as ``"params 5%"``, ``"sparsity 0.9"``, ``"macs 0.5x"`` or ``"2:4"``; by default the
            density of an N:M pattern, else ``"sparsity 0.9"``.
        criterion: which weights matter.
        allocation: how the budget is shared out over tensors.
        pattern: which shapes zeros may take.
        only: globs of tensors to prune.
        skip: globs of tensors to leave alone.
        examples: training examples that scores, layers and forecast are computed on; with a plan those of recovery, as
            the plan names its own.
        solver: chooses the weights of each linear and convolution layer and moves the others to make up for those that
            go; ``criterion`` and ``allocation`` then decide only how many weights each layer keeps. None: no weight
            moves.
        inputs: what a solver's layers are given: their inputs once the layers before are pruned (``"sequential"``), or
            those of the ``"dense"`` network.
        curvature: what a solver goes by: the outputs of each layer by itself (``"layers"``), or the loss over all
            weights of the network as one vector: Gauss-Newton (``"ggn"``), empirical ``"fisher"`` or ``"hessian"``.
        rounds: how often the curvature of the whole network is taken anew; each round takes away the same share.
        recover: ``"batchnorm"`` takes the statistics of BatchNorm anew from the same examples, where there are any;
            ``"survivors"`` moves all kept weights of the network at once before that, ``"last-layer"`` fits the last
            linear layer to its outputs in the dense network after it; ``"nothing"`` leaves all as it is.
        last_layer: the linear layer that ``"last-layer"`` fits; by default the one whose output is the network's.
        plan: a file of ``secateur plan``, which says pattern and density of every tensor; it takes the place of all
            that decides what goes. Where it uses a criterion or solver of your own (``module:Class``), name that too:
            nothing is imported because a file says so.
    """

    do: ClassVar[str] = "prune"
    to: str | None = field(default=None, metadata={"default": lambda step: str(aim(None, step.pattern)[0])})
    criterion: Criterion = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Global)
    pattern: Pattern = field(default_factory=Unstructured)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    examples: int = 1024
    solver: Solver | None = None
    inputs: Inputs = "sequential"
    curvature: Curvature = "layers"
    rounds: int = 1
    recover: Recover = "batchnorm"
    last_layer: str = ""
    plan: str = ""

    def __post_init__(self) -> None:
        if self.plan:
            self._check_planned()
        target, _ = aim(self.to, self.pattern)
        if self.to is None:
            object.__setattr__(self, "to", str(target))
        if self.examples < 1:
            raise UsageError(f"prune: examples is {self.examples}; it must be at least 1.")
        if self.last_layer and self.recover != "last-layer":
            raise UsageError(f'prune: last_layer = "{self.last_layer}" has no effect without recover = "last-layer".')
        if self.rounds < 1:
            raise UsageError(f"prune: rounds is {self.rounds}; it must be at least 1.")
        if self.solver is None and (self.curvature != "layers" or self.rounds != 1):
            raise UsageError("prune: curvature and rounds are for solvers; name one, for example exact_obs.")
        if self.solver is not None:
            self._check_solver()

    def _check_planned(self) -> None:
        usual = PruneStep()
        what = ("to", "criterion", "allocation", "pattern", "only", "skip")
        for name in (*what, "solver", "inputs", "curvature", "rounds"):
            given = getattr(self, name)
            named = name in ("criterion", "solver") and given is not None and ":" in name_of(given)
            if given not in (getattr(usual, name), None) and not named:  # the user's own class, which a plan may use
                raise UsageError(f"prune: {name} has no effect with a plan, which says it all; leave one of them out.")

    def _check_solver(self) -> None:
        pattern = aim(self.to, self.pattern)[1]
        if not isinstance(pattern, Unstructured | NM):
            raise UsageError(f"prune: solvers take single weights or N:M, not {pattern}; leave the pattern out.")
        if self.curvature == "layers":
            if self.rounds != 1:
                raise UsageError(
                    f"prune: rounds is {self.rounds}, but layers are solved once; set `curvature`, such as fisher."
                )
            return
        if not isinstance(pattern, Unstructured):
            raise UsageError(
                'prune: the curvature of the whole network takes single weights; use curvature = "layers".'
            )
        if self.inputs != "sequential":
            raise UsageError(
                "prune: inputs are for layers, and curvature for the whole network; leave one of them out."
            )


@dataclass(frozen=True)
class ShrinkStep:
    """Remove units until the network costs what it may; train steps after it train the smaller network.

    Args:
        to: what it may cost, such as ``"macs 0.5x"``, ``"params 100k"``, ``"bytes 5MB"`` or ``"ms 3.5"``. Shares are of
            the dense network, also where steps before have removed units already; those of units (``"units 0.7x"``) are
            of what the step is given.
        criterion: which weights matter.
        granularity: units of attention: whole ``"heads"``, or ``"dims"``, the same index in every head.
        inexact: let also those groups lose units whose removal changes the statistics of a normalisation.
        scope: compare scores over all groups, or take the same share of each ``"group"``.
        minimum: units that each group keeps: a whole number, or (in one round) a share below 1.
        multiple: let groups that lose units keep a multiple of so many slices.
        normalize: what the scores of a group are divided by; by default what the criterion asks for.
        only: globs of groups that may lose units.
        skip: globs of groups that stay whole.
        equal: globs; groups that match the same one keep equally many units.
        rounds: removals on the way, each by scores taken anew.
        examples: training examples for scores and statistics.
        recover: ``"batchnorm"`` takes the statistics of BatchNorm anew after every round; or ``"nothing"``.
        rewriting: go on with a graph, in which dropout and BatchNorm act as in evaluation mode, where the network's own
            forward cannot take the new sizes; without, the step is refused then.
    """

    do: ClassVar[str] = "shrink"
    to: str = "macs 0.5x"
    criterion: Criterion = field(default_factory=Magnitude)
    granularity: Granularity = "heads"
    inexact: bool = False
    scope: Scope = "global"
    minimum: int | float = 1
    multiple: int = 1
    normalize: Normalize | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    rounds: int = 1
    examples: int = 1024
    recover: Literal["batchnorm", "nothing"] = "batchnorm"
    rewriting: bool = True

    def __post_init__(self) -> None:
        parse_goal(self.to)
        check_rounds(self.rounds, self.minimum)
        if self.examples < 1 or self.minimum < 0 or self.multiple < 1:
            raise UsageError(
                f"shrink: examples is {self.examples}, minimum {self.minimum} and multiple {self.multiple}; examples "
                "and multiple must be at least 1, minimum at least 0."
            )


@dataclass(frozen=True)
class RewindStep:
    """Set the weights back to what they were, under the masks of now: a lottery ticket, or a control for one.

    Biases, statistics of BatchNorm and all other state go back too; a train step after it begins with a fresh
    optimizer.

    Args:
        to: number of the step whose result they are set back to; 0 is the network that the recipe began with.
        weights: those of that step, or ``"fresh"`` ones of the same distribution, drawn by the recipe's seed.
        masks: as they are, or ``"shuffled"``: as many kept weights in each tensor, elsewhere.
    """

    do: ClassVar[str] = "rewind"
    to: int = 0
    weights: Literal["same", "fresh"] = "same"
    masks: Literal["same", "shuffled"] = "same"

    def __post_init__(self) -> None:
        if self.to < 0 or (self.to and self.weights == "fresh"):
            raise UsageError(
                f"rewind: to is {self.to}; it must be the number of a step before this one, or 0 for the network that "
                "the recipe began with, and 0 with fresh weights."
            )


@dataclass(frozen=True)
class MeasureStep:
    """Measure the result against the dense network it came from.

    Args:
        probes: what to measure.
        baselines: ``"random"`` adds a one-shot random pruning of the dense network at the same counts.
        damage: per-class changes, flipped examples, calibration, corruptions and features, for the report.
        flatness: curvature of the loss and its rise under noise, of both networks on a sample of the training data.
        samples: single test examples that are kept to look at, with damage.
        beside: folders of further pruned networks, which damage compares with the dense one as well.
    """

    do: ClassVar[str] = "measure"
    probes: tuple[Probe, ...] = ()
    baselines: tuple[Literal["random"], ...] = ("random",)
    damage: bool = False
    flatness: bool = False
    samples: int = 2000
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"measure: samples is {self.samples}; it must be at least 1.")
        if self.beside and not self.damage:
            raise UsageError("measure: further networks (`beside`) are compared with damage; set `damage = true` too.")


@dataclass(frozen=True)
class ExportStep:
    """Write the network for other programs; every file is read back and compared before the step counts as done.

    Args:
        formats: ``"onnx"``, ``"pt2"`` (of ``torch.export``), ``"plan"`` (for the compiled core, runs without torch) and
            ``"safetensors"`` (weights alone, which load in plain torch).
        batch: examples in the batch that is traced and compared; other sizes run too where that can be traced.
        opset: version of the ONNX operators (0: the exporter's own).
    """

    do: ClassVar[str] = "export"
    formats: tuple[Literal["onnx", "pt2", "plan", "safetensors"], ...] = ("onnx",)
    batch: int = 1
    opset: int = 0

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise UsageError(f"export: formats is {list(self.formats)}; name one or more, each once.")
        if self.batch < 1 or self.opset < 0:
            raise UsageError(f"export: batch is {self.batch} and opset {self.opset}; give at least 1, and at least 0.")
        if self.opset and "onnx" not in self.formats:
            raise UsageError(f'export: opset {self.opset} is for ONNX; add "onnx" to formats, or leave it out.')
