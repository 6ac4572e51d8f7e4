"""Writes the tables of docs/results/runtime.md from the figures that bench_runtime.py has written.

Run: ``python benchmarks/runtime_page.py docs/results/runtime.jsonl docs/results/runtime.md``.
What stands outside of the two markers stays as it is.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
RIVALS = {"onnxruntime": "ONNX Runtime", "deepsparse": "DeepSparse"}


def against(line: dict, rival: str) -> str:
    """Milliseconds, ratio with the lowest and highest round, and whether the floor holds."""
    if rival not in line["ms"]:
        return "-"
    ratio, low, high = line["ratio"][rival]
    floor = line["floor"].get(rival)
    verdict = "" if floor is None else f", floor {floor:.2g}x {'held' if ratio >= floor else '**missed**'}"
    return f"{line['ms'][rival]:.3g} ms: {ratio:.2f}x ({low:.2f} to {high:.2f}){verdict}"


def table(lines: list[dict]) -> list[str]:
    """One row for each network and batch."""
    rows = ["| network | batch | ours, ms | dense ONNX Runtime | DeepSparse on the same network | apart, ns |"]
    rows.append("|---|---|---|---|---|---|")
    for line in lines:
        far = statistics.median(line["about"]["round trip ns"])
        cells = [line["network"], line["batch"], f"{line['ms']['secateur']:.3g}", *(against(line, r) for r in RIVALS)]
        rows.append(f"| {' | '.join(map(str, cells))} | {far:.0f} |")
    return rows


def about(lines: list[dict]) -> list[str]:
    """The machine, the versions and the load."""
    one = lines[0]["about"]
    loads = [line["about"][when][0] for line in lines for when in ("load before", "load after")]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return [
        f"{one['cpu']}, {one['cores']} cores, {one['threads']} threads, {one['rounds']} rounds of {one['seconds']} s;",
        f"{versions}. Load average of the machine between {min(loads):.2f} and {max(loads):.2f}.",
    ]


def main() -> None:
    """Puts the tables between the markers."""
    figures, page = map(Path, sys.argv[1:3])
    lines = [json.loads(line) for line in figures.read_text().splitlines()]
    text = page.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    zeros = [line for line in lines if "dense" not in line["network"]]
    full = [line for line in lines if "dense" in line["network"]]
    parts = [about(lines), table(zeros)]
    if full:
        parts += [["Without zeros (floor: at most 1.5x slower):"], table(full)]
    page.write_text(head + "\n\n" + "\n\n".join("\n".join(part) for part in parts) + "\n\n" + tail)


if __name__ == "__main__":
    main()
