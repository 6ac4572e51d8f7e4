"""Writes docs/results/plan.md and its picture from the rows of bench_plan.py and bench_plan_loss.py.

Run: ``python benchmarks/plan_page.py [docs/results/plan.jsonl [docs/results/plan.md]]``.
What stands outside of the two markers of the page stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_plan import SHARE, WITHIN
from bench_plan_loss import CASES, FACTOR, HIGHEST, hit

from secateur.report.sections import Dots
from secateur.report.svg import figure

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEAD = f"""# Forecasts of plans beside the truth

Random plans: every layer gets a pattern (single weights, 4x1, 2:4) and a density of its own, and some stay as they
are. The networks of the first table have random weights and zeros, those of the second are trained, briefly.

`python benchmarks/bench_plan.py --write docs/results/plan.jsonl`, then
`python benchmarks/bench_plan_loss.py --data-dir FOLDER --write docs/results/plan.jsonl`, then
`python benchmarks/bench_plan_accuracy.py runs/plan-dense-? --ratio 0.4 --write docs/results/plan.jsonl` (and 0.25;
the folders are `secateur run recipes/dense-resnet20-cifar10.toml -s seed=N -o runs/plan-dense-N`), then
`python benchmarks/bench_planning.py --write docs/results/plan.jsonl`, then `python benchmarks/plan_page.py`; or
`make bench-plan`, which does all of it. What can be stopped goes on where it was.

{BEGIN}
{END}
"""
WIDE, HIGH = 490, 292
STYLE = (
    "svg{font:11px sans-serif}rect.ground{fill:#fff}text{fill:#51606e}.title{fill:#16202a;font-size:13px}"
    ".end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#d5dce3}.axis{stroke:#51606e}"
    ".mark{stroke:#16202a;stroke-dasharray:4 2}.band{fill:#0072b2;fill-opacity:.13}"
    ".s0{fill:#0072b2}.s1{fill:#c04a00}"
)
Row = dict[str, Any]


def times(rows: Sequence[Row]) -> list[str]:
    """Milliseconds: one row a network, threads and batch."""
    lines = [
        f"| network | threads | batch | plans | within {WITHIN:.0%}, as the clock said | at one pace | median error | "
        "5 to 95 % | stated |",
        "|" + "---|" * 9,
    ]
    for key in dict.fromkeys((row["net"], row["threads"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["net"], row["threads"], row["batch"]) == key]
        raw = np.array([row["forecast"] / row["measured"] - 1 for row in mine])
        paced = np.array([row["forecast"] / row["measured"] * row["reference"] / row["now"] - 1 for row in mine])
        low, middle, high = np.percentile(paced, (5, 50, 95))
        cells = [*key, len(mine), _share(raw), _share(paced), f"{middle:+.1%}", f"{low:+.1%} to {high:+.1%}"]
        lines.append(f"| {' | '.join(map(str, cells))} | ± {mine[0]['error']:.0%} |")
    return lines


def _share(errors: np.ndarray) -> str:
    share = float(np.mean(np.abs(errors) <= WITHIN))
    return f"{share:.0%}" if share >= SHARE else f"**{share:.0%}, missed**"


def rises(rows: Sequence[Row]) -> list[str]:
    """Rises of the loss: two rows a network."""
    lines = [
        f"| network | loss | measured on | judged: rise below {HIGHEST:g} | within a factor {FACTOR:g} | clear ones "
        "| of these within | inside the 95 % interval | median ratio | forecast, s |",
        "|" + "---|" * 10,
    ]
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        for part, what, loss in (("same", "its own examples", "loss"), ("held_out", "test examples", "loss_held_out")):
            judged = [row for row in mine if hit(row, part) is not None]
            clear = [row for row in judged if row[part] > 2 * row[f"{part}_error"]]
            good, sure = (sum(bool(hit(row, part)) for row in some) for some in (judged, clear))
            inside = sum(row["low"] <= row[part] <= row["high"] for row in clear)
            ratio = float(np.median([row["forecast"] / row[part] for row in clear])) if clear else float("nan")
            told, told_sure = verdict(good, len(judged)), verdict(sure, len(clear))
            cells = [net, f"{mine[0][loss]:.3f}", what, f"{len(judged)} of {len(mine)}", told, len(clear), told_sure]
            cells += [inside]
            lines.append(f"| {' | '.join(map(str, cells))} | {ratio:.2f} | {mine[0]['seconds']:.1f} |")
    return lines


def verdict(good: int, count: int) -> str:
    """How many of all, and whether these are enough."""
    if not count:
        return "none"
    share = good / count
    return f"{good} ({share:.0%})" if share >= SHARE else f"**{good} ({share:.0%}), missed**"


def accuracies(rows: Sequence[Row]) -> list[str]:
    """Accuracy at equal time: a row a candidate, over the dense networks it began from."""
    head = (
        "time asked for",
        "candidate",
        "weights kept",
        "of the dense time",
        "accuracy % by seed",
        "mean",
        "points lost",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * 7]
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        for name in dict.fromkeys(row["name"] for row in rows if row["ratio"] == ratio):
            mine = sorted((r for r in rows if r["ratio"] == ratio and r["name"] == name), key=lambda r: r["seed"])
            kept = "/".join(f"{row['kept'] / row['total']:.1%}" for row in mine)
            done = [row for row in mine if "accuracy" in row]
            if not done:
                slower = "/".join(f"{row['slower']:.2f}" for row in mine)
                lines.append(f"| {ratio:g}x | {name} | {kept} | {slower} times the plan's | cannot meet it | | |")
                continue
            values, shares = [row["accuracy"]["value"] for row in done], [f"{row['share']:.3f}x" for row in done]
            apart = float(np.mean([row["accuracy"]["value"] - row["dense"] for row in done]))
            told = " / ".join(f"{value:.2f}" for value in values)
            cells = [f"{ratio:g}x", name, kept, " / ".join(shares), told, f"{np.mean(values):.2f}", f"{-apart:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def planned(rows: Sequence[Row]) -> list[str]:
    """How long planning takes once the layers are in the table."""
    lines = [
        "| network | target | patterns | threads | seconds | of the processors | costs | rises | choosing | measuring "
        "| in a new process, s | the first in its process, s |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        parts = [f"{row[f'{name}_wall_s']:.1f}" for name in ("costs", "rises", "choosing", "measuring")]
        parts += [f"{row['fresh_wall_s']:.1f}" if "fresh_wall_s" in row else "", f"{row['first_wall_s']:.1f}"]
        about = [row["net"], row["to"], ", ".join(row["patterns"]), str(row["threads"])]
        cells = [*about, f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", *parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def panels(rows: Sequence[Row]) -> list[Dots]:
    """Forecast against truth: milliseconds of each network, then rises on test examples."""
    found = []
    for net in dict.fromkeys(row["net"] for row in rows if row["part"] == "ms"):
        mine = [row for row in rows if row["part"] == "ms" and row["net"] == net]
        points = tuple((row["measured"] * row["now"] / row["reference"], row["forecast"]) for row in mine)
        names = tuple(f"plan {row['plan']}" for row in mine)
        title = f"{net}: milliseconds of {len(mine)} plans at one pace"
        found.append(Dots(title, "measured ms", "forecast ms", names, points, title, 1 - WITHIN, 1 + WITHIN))
    for net in dict.fromkeys(row["net"] for row in rows if row["part"] == "loss"):
        mine = [row for row in rows if row["part"] == "loss" and row["net"] == net]
        drawn = [row for row in mine if row["held_out"] > 2 * row["held_out_error"] and row["forecast"] > 0]
        points = tuple((row["held_out"], row["forecast"]) for row in drawn)
        names = tuple(f"plan {row['plan']}" for row in drawn)
        title = f"{net}: rise of the test loss, {len(drawn)} clear ones of {len(mine)} plans"
        found.append(Dots(title, "measured rise", "forecast rise", names, points, title, 1 / FACTOR, FACTOR))
    return [dots for dots in found if dots.points]


def picture(rows: Sequence[Row]) -> str:
    """All panels as one SVG file that needs no style sheet."""
    parts, every = [], panels(rows)
    for place, dots in enumerate(every):
        x, y = WIDE * (place % 2), HIGH * (place // 2)
        parts.append(f'<text x="{x + 52}" y="{y + 24}" class="title">{dots.title}</text>')
        made = figure(dots)
        body = made[made.index("<svg") : made.index("</figure>")]
        parts.append(body.replace("<svg ", f'<svg x="{x}" y="{y + 30}" width="480" height="250" ', 1))
    tall = HIGH * -(-len(every) // 2)
    size = f'viewBox="0 0 {2 * WIDE} {tall}" width="{2 * WIDE}" height="{tall}"'
    ground = f'<rect class="ground" width="{2 * WIDE}" height="{tall}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{ground}{"".join(parts)}</svg>\n'


def figures(rows: Sequence[Row], image: str) -> str:
    """Everything between the markers."""
    clocked = [row for row in rows if row["part"] == "ms"]
    lost = [row for row in rows if row["part"] == "loss"]
    equal = [row for row in rows if row["part"] == "accuracy"]
    quick = [row for row in rows if row["part"] == "planning"]
    parts = []
    if clocked:
        machines = ", ".join(sorted({str(row.get("machine", "?")) for row in clocked}))
        parts += ["## Milliseconds", "", f"On {machines}.", "", *times(clocked), ""]
    if lost:
        steps = ", ".join(f"{net} {CASES[net].steps} steps" for net in dict.fromkeys(row["net"] for row in lost))
        parts += [
            "## Rise of the loss", "", f"Trained for: {steps}. A clear rise is above twice its standard error; of one "
            f"that is not, the forecast must be below {FACTOR:g} times what it may be.", "", *rises(lost), "",
        ]  # fmt: skip
    if equal:
        epochs = equal[0]["epochs"]
        parts += [
            "## Accuracy at equal time", "", f"ResNet-20 on CIFAR-10, batch {equal[0]['batch']}, one thread; "
            f"{epochs} epochs of the same fine-tuning.", "", *accuracies(equal), "",
        ]  # fmt: skip
    if quick:
        parts += ["## Time of planning", "", *planned(quick), ""]
    return "\n".join([*parts, f"![forecast against truth]({image})"])


def main() -> None:
    """Page and picture."""
    given = [Path(word) for word in sys.argv[1:3]]
    source = given[0] if given else Path("docs/results/plan.jsonl")
    page = given[1] if len(given) > 1 else source.with_suffix(".md")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    image = page.with_suffix(".svg")
    image.write_text(picture(rows), encoding="utf-8")
    text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{figures(rows, image.name)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
