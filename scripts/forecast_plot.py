"""Forecast against measured rise of the loss for single layers pruned alone, by OBD and by OBS: docs/forecast.*.

Run `python scripts/forecast_plot.py LENET5_FOLDER RESNET20_FOLDER --data-dir FOLDER` from the project's root; the
folders are of dense networks, as `secateur run` leaves them with recipes/dense-lenet5-mnist.toml and
recipes/dense-resnet20-cifar10.toml. With `--redraw` page and picture are made anew from the figures of the last run,
docs/forecast.json.

The rule, fixed before any figure was looked at: a ratio counts as near when forecast / measured rise lies in [0.3, 3];
rises of less than 1e-4 of the dense loss are not judged but listed apart.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.files import read_json
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import owners
from secateur.core.patterns import Unstructured
from secateur.core.prunable import coverage
from secateur.core.select import top_mask
from secateur.core.task import Task
from secateur.criteria.obd import Obd
from secateur.data import Loader, load
from secateur.engine.folder import Artefact, resolve
from secateur.linalg.grams import grams, layer_matrix, layer_weight
from secateur.report.sections import Dots
from secateur.report.svg import figure
from secateur.solvers.exact_obs import ExactObs

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARES = (0.1, 0.3, 0.5)
LOW, HIGH, SMALL = 0.3, 3.0, 1e-4
NORMAL = 1.960
Row = dict[str, Any]


# Measuring ---------------------------------------------------------------------------------------------------------


def network(folder: str, data_dir: str | None, examples: int, dtype: torch.dtype) -> tuple[Task, Row]:
    """A trained network with a random sample of its training data, and what the page says about both."""
    artefact = Artefact.open(resolve(pathlib.Path(folder)))
    data = load(artefact.card["data"], data_dir)
    order = torch.randperm(len(data.train), generator=streams.stream(int(artefact.card["seed"]), "sample"))[:examples]
    loader = Loader(data.train.take(order), 128, mean=data.mean, std=data.std)
    net = artefact.build().to(dtype)
    task = Task(net, CrossEntropy(), [(x.to(dtype), y) for x, y in loader])
    about = {
        "name": f"{artefact.structure['model']['use']} on {artefact.card['data']}",
        "accuracy": artefact.card["readings"]["accuracy"], "examples": len(order), "loss": task.mean_loss(),
        "dtype": str(dtype).removeprefix("torch."),
        "norm": math.sqrt(sum(float(g.square().sum()) for g in task.gradients().values())),
    }  # fmt: skip
    return task, about


def losses(task: Task) -> Tensor:
    """The loss of every example."""
    return torch.cat([nn.functional.cross_entropy(y.double(), t, reduction="none") for y, t, _ in task.outputs()])


def judged(task: Task, name: str, new: Tensor, dense: Tensor) -> Row:
    """Forecast and truth of one new weight: Taylor's series, the rise, its standard error over the examples."""
    weight = task.params()[name]
    old = weight.detach().clone()
    slope, bend = task.taylor({name: new - old})
    try:
        weight.data.copy_(new)
        rises = losses(task) - dense
    finally:
        weight.data.copy_(old)
    error = float(rises.std()) / math.sqrt(len(rises))
    return {"slope": slope, "bend": bend, "quadratic": slope + bend, "rise": float(rises.mean()), "error": error}


def by_obd(task: Task, masks: Masks, dense: Tensor) -> Iterator[Row]:
    """Each layer alone without its weights of least saliency; the forecast is the sum of their saliencies."""
    scores, again = (Obd("outputs", seed=seed)(task, masks) for seed in (0, 1))
    weights = task.params()
    for name, score in scores.items():
        for share in SHARES:
            gone = ~top_mask(score, score.numel() - round(share * score.numel()))
            row = judged(task, name, weights[name].detach() * ~gone, dense)
            sums = {"forecast": float(score[gone].sum()), "diagonal": float(again[name][gone].sum())}
            yield {"method": "obd", "layer": name, "share": share, "total": score.numel(), **sums, **row}


def by_obs(task: Task, masks: Masks, dense: Tensor) -> Iterator[Row]:
    """Each layer alone, solved on its inputs; the forecast is the series along the change of all its weights."""
    held = owners(task.model)
    for name in masks:
        layer, weight = held[name][0], task.params()[name].detach()
        matrix = grams(task, {name: layer}, torch.float64)[name].matrix
        for share in SHARES:
            keep = weight.numel() - round(share * weight.numel())
            rows = layer_matrix(layer)[0].detach()  # neither network has groups
            made, _ = ExactObs()(rows, matrix[0], Unstructured(), keep)
            row = judged(task, name, layer_weight(layer, made[None]), dense)
            yield {"method": "obs", "layer": name, "share": share, "total": weight.numel(), **row,
                   "forecast": row["quadratic"]}  # fmt: skip


def measure(folder: str, data_dir: str | None, examples: int, dtype: torch.dtype) -> Row:
    """All figures of one network."""
    task, about = network(folder, data_dir, examples, dtype)
    print(f"{about['name']}: {about['examples']} examples, loss {about['loss']:.6g}", file=sys.stderr, flush=True)
    found = coverage(task.model).prunable
    masks = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in found.items()})
    dense, rows = losses(task), []
    for way in (by_obd, by_obs):
        for row in way(task, masks, dense):
            rows.append(row)
            told = f"{row['method']} {row['layer']} {row['share']:.0%}"
            print(f"{told}: {row['forecast']:.4g} / {row['rise']:.4g}", file=sys.stderr, flush=True)
    return {**about, "rows": rows}


# Telling -----------------------------------------------------------------------------------------------------------


def ratio(row: Mapping[str, Any], loss: float, key: str = "forecast") -> float | None:
    """Forecast over measured rise; None where the rise is too small to judge by.

    >>> ratio({"forecast": 2.0, "rise": 1.0}, 0.1), ratio({"forecast": 2.0, "rise": 1e-6}, 0.1)
    (2.0, None)
    """
    return row[key] / row["rise"] if abs(row["rise"]) >= SMALL * loss else None


def near(value: float) -> bool:
    """Whether a ratio lies in the band."""
    return LOW <= value <= HIGH


def summary(nets: Sequence[Row]) -> list[str]:
    """One line for each network, method and share."""
    lines = ["| network | method | layer without | judged | ratio in [0.3, 3] | median | least | most |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for net in nets:
        for method in ("obd", "obs"):
            for share in SHARES:
                rows = [row for row in net["rows"] if (row["method"], row["share"]) == (method, share)]
                found = [r for row in rows if (r := ratio(row, net["loss"])) is not None]
                begin = f"| {net['name']} | {method} | {share:.0%} | {len(found)} of {len(rows)} |"
                lines.append(f"{begin} {sum(map(near, found))} | {_spread(found)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    found = (statistics.median(values), min(values), max(values)) if values else ()
    return " | ".join(f"{value:.2f}" for value in found) or "– | – | –"


def layers(net: Row) -> list[str]:
    """The ratios of one network: a line for each layer."""
    shares = [f"{method} {share:.0%}" for method in ("obd", "obs") for share in SHARES]
    lines = [f"| layer | weights | {' | '.join(shares)} |", "|" + "---|" * (2 + len(shares))]
    for name in dict.fromkeys(row["layer"] for row in net["rows"]):
        rows = [row for row in net["rows"] if row["layer"] == name]
        cells = [_cell(ratio(row, net["loss"])) for row in rows]
        lines.append(f"| `{name}` | {rows[0]['total']:,} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None) -> str:
    return "small" if value is None else f"{value:.2f}" if near(value) else f"**{value:.2f}**"


def cause(row: Mapping[str, Any]) -> str:
    """What a forecast outside the band is wrong by: every step from it to the truth that is outside the band itself.

    >>> cause({"rise": 9.0, "quadratic": 1.0, "slope": 0.0, "bend": 1.0, "forecast": 1.0})
    'higher orders'
    >>> cause({"rise": 9.0, "quadratic": 9.0, "slope": 8.0, "bend": 1.0, "forecast": 99.0, "diagonal": 1.0})
    'error of the estimate, slope'
    """
    steps = [("higher orders", row["quadratic"], row["rise"])]
    if "diagonal" in row:
        steps = [
            ("error of the estimate", row["forecast"], row["diagonal"]),
            ("off the diagonal", row["diagonal"], row["bend"]),
            ("slope", row["bend"], row["quadratic"]),
            *steps,
        ]
    found = [name for name, one, two in steps if not (two and near(one / two)) and one != two]
    return ", ".join(found) or "several steps, none by itself"


def outside(nets: Sequence[Row]) -> list[str]:
    """How often each cause is met, then every ratio outside the band with all terms."""
    found = [(net, row, r) for net in nets for row in net["rows"]
             if (r := ratio(row, net["loss"])) is not None and not near(r)]  # fmt: skip
    if not found:
        return ["None."]
    causes: dict[tuple[str, str, str], int] = {}
    for net, row, _ in found:
        key = net["name"], row["method"], cause(row)
        causes[key] = causes.get(key, 0) + 1
    lines = [f"- {name}, {method}: {count} by: {why}" for (name, method, why), count in sorted(causes.items())]
    heads = ("network", "method", "layer", "without", "forecast", "other signs", "slope", "curvature",
             "measured rise (95 %)", "ratio", "wrong by")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for net, row, value in found:
        terms = (row["forecast"], row.get("diagonal"), row["slope"], row["bend"])
        cells = " | ".join("–" if term is None else f"{term:.3g}" for term in terms)
        begin = f"| {net['name']} | {row['method']} | `{row['layer']}` | {row['share']:.0%} | {cells}"
        lines.append(f"{begin} | {_rise(row)} | {value:.2f} | {cause(row)} |")
    return lines


def _rise(row: Row) -> str:
    half = NORMAL * row["error"]
    return f"{row['rise']:.3g} ({row['rise'] - half:.2g} to {row['rise'] + half:.2g})"


def small(nets: Sequence[Row]) -> list[str]:
    """The rises that are too small to judge by."""
    lines = ["| network | method | layer | without | forecast | measured rise (95 %) |", "|" + "---|" * 6]
    for net in nets:
        for row in net["rows"]:
            if ratio(row, net["loss"]) is None:
                begin = f"| {net['name']} | {row['method']} | `{row['layer']}` | {row['share']:.0%} |"
                lines.append(f"{begin} {row['forecast']:.3g} | {_rise(row)} |")
    return lines if len(lines) > 2 else ["None."]


def series(nets: Sequence[Row]) -> list[str]:
    """How many rises the whole second-order series meets, where the diagonal alone is one more step away."""
    lines = ["| network | method | forecast | judged | in [0.3, 3] | median |", "|" + "---|" * 6]
    names = {"forecast": "saliencies", "diagonal": "diagonal, other signs", "quadratic": "slope and whole curvature"}
    for net in nets:
        for method in ("obd", "obs"):
            rows = [row for row in net["rows"] if row["method"] == method]
            for key in names if method == "obd" else ("quadratic",):
                found = [r for row in rows if (r := ratio(row, net["loss"], key)) is not None]
                told = f"| {net['name']} | {method} | {names[key]} | {len(found)} of {len(rows)} |"
                lines.append(f"{told} {sum(map(near, found))} | {statistics.median(found):.2f} |")
    return lines


def picture(nets: Sequence[Row]) -> str:
    """A panel for each network and method, as one SVG file that needs no style sheet."""
    parts, wide, high = [], 490, 292
    for i, net in enumerate(nets):
        for j, method in enumerate(("obd", "obs")):
            rows = [row for row in net["rows"] if row["method"] == method and ratio(row, net["loss"]) is not None]
            drawn = [row for row in rows if row["forecast"] > 0 and row["rise"] > 0]
            points = tuple((row["rise"], row["forecast"]) for row in drawn)
            names = tuple(f"{row['layer']} without {row['share']:.0%}" for row in drawn)
            title = f"{net['name']}, {method}: {len(drawn)} rises, {sum(near(y / x) for x, y in points)} in the band"
            title += f"; {len(rows) - len(drawn)} below zero not drawn" if len(rows) > len(drawn) else ""
            parts.append(f'<text x="{wide * j + 52}" y="{high * i + 24}" class="title">{title}</text>')
            if points:
                made = figure(Dots(title, "measured rise", "forecast rise", names, points, title, LOW, HIGH))
                body, place = made[made.index("<svg") : made.index("</figure>")], f'x="{wide * j}" y="{high * i + 30}"'
                parts.append(body.replace("<svg ", f'<svg {place} width="480" height="250" ', 1))
    size = f'viewBox="0 0 {2 * wide} {high * len(nets)}" width="{2 * wide}" height="{high * len(nets)}"'
    style = (
        "svg{font:11px sans-serif}rect.ground{fill:#fff}text{fill:#51606e}.title{fill:#16202a;font-size:13px}"
        ".end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#d5dce3}.axis{stroke:#51606e}"
        ".mark{stroke:#16202a;stroke-dasharray:4 2}.band{fill:#0072b2;fill-opacity:.13}"
        ".s0{fill:#0072b2}.s1{fill:#c04a00}"
    )
    ground = f'<rect class="ground" width="{2 * wide}" height="{high * len(nets)}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{ground}{"".join(parts)}</svg>\n'


def about(net: Row) -> str:
    """One network in a sentence."""
    read = net["accuracy"]
    return (
        f"- {net['name']}: {read['value']:.2f} % of {read['n']:,} test images ({read['low']:.2f} to "
        f"{read['high']:.2f}); {net['examples']:,} training images in {net['dtype']}, on which the loss is "
        f"{net['loss']:.4g} and its gradient has length {net['norm']:.3g}; rises "
        f"below {SMALL * net['loss']:.1e} are small."
    )


def figures(nets: Sequence[Row]) -> str:
    """The part of the page that holds figures."""
    parts = [
        *map(about, nets), "", "![forecast against measured rise](forecast.svg)", "", *summary(nets), "",
        "### What the forecast is made of", "", *series(nets), "",
    ]  # fmt: skip
    for net in nets:
        parts += [f"### {net['name']}: forecast / measured rise", "", *layers(net), ""]
    parts += ["### Outside the band", "", *outside(nets), "", "### Too small to judge", "", *small(nets)]
    return "\n".join(parts)


def write(nets: Sequence[Row]) -> None:
    """Picture, figures, and the page's part between its two marks; its other words are left alone."""
    page, begin, end = ROOT / "docs" / "forecast.md", "<!-- figures -->\n", "<!-- end of figures -->\n"
    (ROOT / "docs" / "forecast.svg").write_text(picture(nets), encoding="utf-8")
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Forecast and truth\n\n{begin}{end}"
    before, rest = text.split(begin)
    page.write_text(f"{before}{begin}{figures(nets)}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> int:
    """Measure what is asked for and write page and picture."""
    parser = argparse.ArgumentParser(description="Writes docs/forecast.md, .svg and .json.")
    parser.add_argument("folders", nargs="*", help="LeNet-5 on MNIST and ResNet-20 on CIFAR-10, dense")
    parser.add_argument("--data-dir")
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 128], help="training examples by network")
    parser.add_argument("--dtype", nargs="+", choices=("float64", "float32"), default=["float64", "float32"])
    parser.add_argument("--redraw", action="store_true", help="from docs/forecast.json")
    request = parser.parse_args()
    store = ROOT / "docs" / "forecast.json"
    if request.redraw:
        write(read_json(store)["networks"])
        return 0
    if not len(request.folders) == len(request.examples) == len(request.dtype):
        parser.error(f"{len(request.folders)} folders; give as many numbers of examples and types.")
    given = zip(request.folders, request.examples, request.dtype, strict=True)
    nets = [measure(folder, request.data_dir, count, getattr(torch, dtype)) for folder, count, dtype in given]
    store.write_text(json.dumps({"networks": nets}, indent=1) + "\n", encoding="utf-8")
    write(nets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
