"""Writes docs/results/sparse-training.md and its pictures from the figures of finished comparisons.

Run: ``python benchmarks/sparse_training_page.py`` after ``secateur compare`` of each recipe in ``RECIPES``, with
``-o runs/NAME`` (``runs/`` of another place: the first argument). The orders that are checked are those of the papers;
a difference is the mean over seeds in points, each seed with itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.engine.comparing_summary import statistics
from secateur.report.sections import Tradeoff
from secateur.report.svg import figure
from secateur.report.views.comparison import markdown, report

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "sparse-training.md"
RECIPES = ("compare-mnist", "compare-mnist-lenet5", "compare-cifar10")

ORDERS = (
    ("rigl", "set", "RigL at least SET (Evci et al. 2019)"),
    ("set", "static-erk", "SET at least the same zeros standing still (Mocanu et al. 2018)"),
    ("rigl", "static-erk", "RigL at least the same zeros standing still (Evci et al. 2019)"),
    ("lth", "lth-reinit", "tickets at least the same masks with fresh weights (Frankle & Carbin 2019)"),
    ("lth", "lth-shuffled", "tickets at least as many weights elsewhere (Frankle & Carbin 2019)"),
    ("gradual", "magnitude", "gradual at least one-shot magnitude pruning (Zhu & Gupta 2017)"),
    ("magnitude", "small-dense", "large and sparse at least small and dense (Zhu & Gupta 2017)"),
    ("snip", "random", "SNIP at least random zeros (Lee et al. 2019)"),
    ("magnitude", "snip", "pruning after training at least pruning before (Frankle et al. 2021)"),
)

HEAD = """# Sparse training and tickets, compared at equal budgets

Made by `secateur compare` from committed recipes; every run is a folder that resumes, and the whole can be stopped and
goes on where it was:

```sh
{commands}
python benchmarks/sparse_training_page.py
```

All methods of a seed see the same batches for the same number of epochs, few of them: what a method gains from long
training does not show here. Test data choose nothing. Training MACs are counted; seconds order methods only roughly.
{total}
"""


NOTES = """What the figures say, and what not:

- SET stays below the same zeros standing still up to 95 % on LeNet-300-100. It replaces 30 % of the weights after every
  epoch but the last, while the rate of these runs falls to zero as a cosine: probably what grows late has no time to
  learn. RigL stops moving zeros after three quarters of a run. In the claim `set_moving_zeros`, with 2 % left and eight
  epochs, SET is ahead of standing still.
- `lth` is one round: half of the epochs, pruning, back to the initial weights, the other half. From 90 % on tickets
  train better than fresh weights under the same masks, and at every sparsity better than as many weights elsewhere;
  yet going on from the trained weights (`magnitude`) is as good as going back, or better.
- At 98 % on LeNet-300-100 single seeds fail: all three of `random` (33 to 77 %), one of `topkast` (11 %), one of
  `variational_inference` (76 %). Means and intervals there say that a method may fail, not how good it is when it does
  not, and "not told apart" means little beside such an interval. `random` fails on LeNet-5 too: its zeros are uniform
  over all weights, so small layers are left with next to nothing, which `static-erk` does not do.
- `str`, `l0`, `variational_dropout` and `variational_bernoulli` choose their own sparsity, the last three with
  other optimizers or rates than the rest, as their papers have them; six epochs are few for them, and `l0` prunes
  hardly anything. `slimming` (channels with BatchNorm) and `sr_ste` (N:M) have no place on this axis.
- On LeNet-5 `topkast` diverges at the rate of the others and is run with clipped gradients. Methods that LeNet-5 and
  CIFAR-10 leave out were left out for time.
- Rules that compute with dense weights behind the sparse ones cost more training: `topkast` 35 to 47 %, `movement` 53
  to 61 % of the dense network's multiply-adds; `rigl`, `set` and methods that prune before training cost what the
  zeros say.
- CIFAR-10 has one seed and six epochs on a fifth of the images: differences of a point or two say nothing.
"""


def main() -> None:
    """Write the page from whatever comparisons there are."""
    runs = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs"
    files = {name: runs / name / "compare.json" for name in RECIPES}
    tables = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    commands = "\n".join(f"secateur compare recipes/{name}.toml --workers 2 -o runs/{name}" for name in tables)
    seconds = sum(run.get("seconds", 0) for table in tables.values() for run in table["runs"])
    count = sum(len(table["runs"]) for table in tables.values())
    total = f"{count} runs took {seconds / 3600:.1f} hours of one thread each, added up."
    parts = [HEAD.format(commands=commands, total=total), *_orders(tables), NOTES]
    for name, table in tables.items():
        pictures = _pictures(table, name)
        body = markdown(table).replace("\n## ", "\n### ").replace("# ", "## ", 1)
        parts += [body, *pictures, ""]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _orders(tables: Mapping[str, Any]) -> list[str]:
    lines = [
        "## The orders that papers report",
        "",
        "Differences of test accuracy in points, the mean over seeds with Student's 95 % interval (one seed has none). "
        "**Bold**: the order is reversed. A star: the interval leaves out 0, so the two are told apart.",
        "",
    ]
    columns = [(name, sparsity) for name, table in tables.items() for sparsity in table["asked"]["compare"]["sparsity"]]
    heads = [f"{_short(tables[name])}, {100 * sparsity:g} %" for name, sparsity in columns]
    lines += [f"| order | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    kept = reversed_ = 0
    for better, worse, says in ORDERS:
        cells = []
        for name, sparsity in columns:
            found = _difference(tables[name]["runs"], better, worse, sparsity)
            cells.append(_cell(found))
            kept += found is not None and found["mean"] >= 0
            reversed_ += found is not None and found["mean"] < 0
        lines.append(f"| {says} | {' | '.join(cells)} |")
    return [*lines, "", f"{kept} of {kept + reversed_} differences have the sign that the paper reports.", ""]


def _difference(runs: Sequence[Mapping[str, Any]], better: str, worse: str, sparsity: float) -> dict[str, Any] | None:
    of = {
        (run["method"], run["seed"]): run["accuracy"]
        for run in runs
        if run["sparsity"] == sparsity and "error" not in run
    }
    gaps = [value - of[worse, seed] for (method, seed), value in of.items() if method == better and (worse, seed) in of]
    return statistics(gaps) if gaps else None


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    text = f"{found['mean']:+.2f}".replace("-", "−")
    if found["half"] is not None:
        text += f" ± {found['half']:.2f}" + ("*" if abs(found["mean"]) > found["half"] else "")
    return f"**{text}**" if found["mean"] < 0 else text


def _short(table: Mapping[str, Any]) -> str:
    return {"lenet_300_100": "LeNet-300-100", "lenet5": "LeNet-5", "resnet_cifar": "ResNet-8"}[
        table["asked"]["model"]["use"]
    ]


def _pictures(table: Mapping[str, Any], name: str) -> list[str]:
    """A picture of each trade-off curve where there is more than one point."""
    if len(table["asked"]["compare"]["sparsity"]) < 2:
        return []
    charts = [chart for section in report(table, "").sections for chart in section.chart or ()]
    lines = []
    for number, chart in enumerate((chart for chart in charts if isinstance(chart, Tradeoff)), 1):
        file = PAGE.with_name(f"{PAGE.stem}-{name}-{number}.svg")
        file.write_text(_standalone(figure(chart)), encoding="utf-8")
        lines.append(f"![{chart.title}: {chart.says}]({file.name})\n")
    return lines


def _standalone(html: str) -> str:
    """The figure of a page, with its legend and style, as an SVG file of its own."""
    style = (ROOT / "src/secateur/report/assets/page.css").read_text(encoding="utf-8")
    width, height = 620, 420
    html = html.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    style += ".ground{background:#fff;color:#16202a;padding:4px 8px;font:14px sans-serif}"
    size = f'width="{width}" height="{height}"'
    page = f'<div xmlns="http://www.w3.org/1999/xhtml" class="ground"><style>{style}</style>{html}</div>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><foreignObject {size}>{page}</foreignObject></svg>\n'


if __name__ == "__main__":
    main()
