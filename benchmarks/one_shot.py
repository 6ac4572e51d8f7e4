"""One-shot pruning without fine-tuning: every method on five networks, five sparsities and three seeds.

``python benchmarks/one_shot.py --data-dir FOLDER`` trains the dense networks of ``recipes/dense-*.toml`` (an hour and
a half on one core), prunes each once with every method, takes the statistics of BatchNorm anew, and appends a row for
each result to ``docs/results/one-shot.jsonl``; then it writes ``docs/results/one-shot.md``. What is done is not done
again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from one_shot_page import write_page
from torch import nn

from secateur.core.allocations import Allocation, Global, Uniform
from secateur.core.errors import SecateurError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Pattern, Unit, Unstructured
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion, Solver, find
from secateur.core.task import Task
from secateur.data import Dataset, Loader
from secateur.engine.compensating import compensate, plan_layers
from secateur.engine.cutting import plan
from secateur.engine.folder import Artefact
from secateur.engine.recipe import Recipe, read_recipe
from secateur.engine.recovering import reestimate
from secateur.engine.runner import Runner

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SHARE = 0.03
FEW = 8
TEXT = ("Bert", "BERT", "GPT", "RecurrentNet")


@dataclass(frozen=True)
class Case:
    """A network with its recipe: how many examples methods see, how many test examples count."""

    name: str
    recipe: str
    examples: int
    test: int


CASES = (
    Case("LeNet-5, MNIST", "lenet5-mnist", 512, 2000),
    Case("ResNet-20, CIFAR-10 (JPEG copy)", "resnet20-cifar10", 256, 1000),
    Case("bert_tiny, NETtalk", "bert-nettalk", 512, 2000),
    Case("gpt_tiny, tinyshakespeare", "gpt-shakespeare", 64, 100),
    Case("lstm, tinyshakespeare", "lstm-shakespeare", 64, 100),
)


@dataclass(frozen=True)
class Known(Criterion):
    """Scores that are there already: they do not depend on the sparsity."""

    scores: Any = None

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """The scores handed in."""
        return self.scores


@dataclass(frozen=True)
class Way:
    """A way of pruning: a criterion with its pattern and allocation, or a solver at the counts of global magnitude."""

    name: str
    pattern: Pattern = Unstructured()
    allocation: Allocation = Global()
    solver: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def kind(self) -> str:
        """In which table it stands."""
        return "units" if isinstance(self.pattern, Unit) else "weights"


WEIGHTS = ("magnitude", "random", "obd", "fisher_diagonal", "woodfisher", "snip", "taylor", "grasp", "earlycrop",
           "movement", "snr")  # fmt: skip
SOLVERS = ("sparsegpt", "alps", "exact_obs", "chita")
UNITS = ("magnitude", "random", "taylor_filter", "bn_scale", "sosp_h", "sosp_i")
WAYS = (
    *(Way(name) for name in WEIGHTS),
    Way("synflow", label="synflow, in rounds of 3 %"),
    Way("wanda", allocation=Uniform(), options=(("rows", True),), label="wanda, within rows"),
    Way("wanda", label="wanda, global"),
    *(Way(name, solver=True) for name in SOLVERS),
    *(Way(name, pattern=Unit()) for name in UNITS),
    Way("fpgm", pattern=Unit(), allocation=Uniform()),
)


def main() -> int:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "one-shot")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "results" / "one-shot.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[case.recipe for case in CASES], help="recipes to run")
    parser.add_argument("--ways", nargs="+", default=[], help="methods to run (default: all)")
    parser.add_argument("--skip", nargs="+", default=[], help="methods to leave out")
    parser.add_argument("--page", action="store_true", help="only write the page from the rows that are there")
    asked = parser.parse_args()
    for seed in () if asked.page else asked.seeds:
        for case in CASES:
            if case.recipe in asked.only:
                _case(case, seed, asked)
    write_page(asked.rows, asked.rows.with_suffix(".md"), [case.name for case in CASES])
    return 0


def _case(case: Case, seed: int, asked: argparse.Namespace) -> None:
    recipe = replace(Recipe.from_table(read_recipe(ROOT / "recipes" / f"dense-{case.recipe}.toml")), seed=seed)
    runner = Runner(recipe, asked.work / f"{case.recipe}-{seed}", asked.data_dir)
    folder = runner.run()
    data = runner.data()
    net = Artefact.open(folder).build()
    judge = _judge(case, data)
    done = {tuple(row[key] for key in ("network", "seed", "method", "kind", "sparsity")) for row in _rows(asked.rows)}
    write = _writer(asked.rows, {"network": case.name, "seed": seed})
    if (case.name, seed, "dense", "dense", 0.0) not in done:
        write({"method": "dense", "kind": "dense", "sparsity": 0.0, **judge(net)})
    for way in WAYS:
        name = way.label or way.name
        if (asked.ways and way.name not in asked.ways) or way.name in asked.skip:
            continue
        missing = [s for s in SPARSITIES if (case.name, seed, name, way.kind, s) not in done]
        if not missing:
            continue
        task = runner.sample(data, case.examples, copy.deepcopy(net))
        for sparsity, result in _results(way, task, missing, seed, judge):
            write({"method": name, "kind": way.kind, "solver": way.solver, "sparsity": sparsity, **result})


def _results(way: Way, task: Task, sparsities: list[float], seed: int, judge: Callable) -> Iterator[tuple[float, dict]]:
    """The network pruned to each sparsity, judged, and put back."""
    dense = {name: value.clone() for name, value in task.model.state_dict().items()}
    method, masks, began = None, None, time.process_time()
    for sparsity in sparsities:
        task.model.load_state_dict(dense)
        try:
            method = method or _method(way, task, seed)
            masks = _cut(way, method, task, sparsity, masks)
            reestimate(task)
            result = {"kept": masks.kept, "total": masks.total, **judge(task.model)}
        except SecateurError as error:
            result = {"error": str(error)}
        yield sparsity, {**result, "seconds": round(time.process_time() - began, 2)}
        began = time.process_time()


def _method(way: Way, task: Task, seed: int) -> Criterion | Solver:
    options = {**dict(way.options), **({"seed": seed} if way.name == "random" else {})}
    if way.name == "synflow" and type(task.model).__name__ == "RecurrentNet":
        options["shape"] = (3,)  # the flow of an LSTM has an infinite value from 5 steps on
    method = find("solvers" if way.solver else "criteria", way.name)(**options)
    if way.solver or way.name == "synflow":
        return method
    if way.name == "sosp_i" and type(task.model).__name__ in TEXT:  # two passes for each unit of a piece of a batch
        task = replace(task, data=[(x[:FEW], y[:FEW]) for x, y in list(task.data)[:1]])
    return Known(method(task, Masks.dense(task.model)))


def _cut(way: Way, method: Any, task: Task, sparsity: float, before: Masks | None) -> Masks:
    to = f"sparsity {sparsity}"
    if way.solver:
        made = plan_layers(task, method, to)
        return compensate(task, made, method, Unstructured(), forecast=False)[0].masks
    if way.name == "synflow":
        masks = _in_rounds(method, task, sparsity, before)
    else:
        masks = plan(task, to, method, way.allocation, way.pattern, forecast=False).masks
    masks.apply_(task.model)
    return masks


def _in_rounds(method: Criterion, task: Task, sparsity: float, masks: Masks | None) -> Masks:
    """Scored anew each time 3 % of what is left have gone, on from the masks of a lower sparsity."""
    if masks is not None:
        masks.apply_(task.model)
    while masks is None or masks.sparsity < sparsity - 1e-9:
        share = min(sparsity, 1 - (1 - (0.0 if masks is None else masks.sparsity)) * (1 - SHARE))
        masks = plan(task, f"sparsity {share:.9f}", method, forecast=False, masks=masks).masks
        masks.apply_(task.model)  # the next scores are those of what is left
        if share == sparsity:
            break
    return masks


def _judge(case: Case, data: Dataset) -> Callable[[nn.Module], dict[str, float]]:
    """Accuracy and mean loss on the first test examples; of text every position counts alike."""
    x, y = data.test.x[: case.test], data.test.y[: case.test]
    loader = Loader(replace(data.test, x=x, y=y), 500 if y.dim() == 1 else 50, mean=data.mean, std=data.std)

    def judge(net: nn.Module) -> dict[str, float]:
        right, loss, count, examples = 0, 0.0, 0, 0
        for output, target, n in Task(net, CrossEntropy(), loader).outputs():
            right += int((output.argmax(-1) == target).sum())
            count += target.numel()
            loss += float(nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())) * n
            examples += n
        mean = loss / examples
        words = {"perplexity": math.exp(min(mean, 50.0))} if y.dim() > 1 else {}
        return {"accuracy": 100 * right / count, "loss": mean, "examples": examples, **words}

    return judge


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _writer(file: Path, about: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def write(row: dict[str, Any]) -> None:
        line = json.dumps({**about, **row})
        print(line, file=sys.stderr, flush=True)
        with file.open("a") as opened:
            opened.write(line + "\n")

    return write


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
