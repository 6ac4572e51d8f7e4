"""``secateur doctor``."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from secateur.cli.request import dump
from secateur.core.errors import UsageError
from secateur.engine.binding import set_option
from secateur.engine.doctor import Beside, Finding, Mended, Report, environment, examine, mend

_MANY = 40
_ALIKE = 5


def run(request: argparse.Namespace) -> int:
    """Look at the machine, or at a file of weights; findings make exit code 2."""
    beside = _beside(request)
    if request.path is None:
        if beside != Beside(data_dir=request.data_dir) or request.fix:
            raise UsageError("name the file to look at: `secateur doctor FILE`.")
        return _machine(request)
    path = Path(request.path)
    report = examine(path, beside, speed=True)
    mended = mend(path, Path(request.fix), beside) if request.fix else None
    if request.json:
        dump({**report.to_table(), **(mended.to_table() if mended else {})})
    else:
        _show(report, request.all)
        if mended:
            _show_mended(mended)
        elif report.fixable:
            print(f"\n{len(report.fixable)} of {len(report.findings)} can be mended in a copy: add `--fix OUT`")
    return 2 if (mended.report if mended else report).findings else 0


def _beside(request: argparse.Namespace) -> Beside:
    table: dict[str, Any] = {"model": {}, "data": {}}
    for setting in request.settings:
        key, sign, value = setting.partition("=")
        if not sign or key.split(".")[0] not in table or "." not in key:
            raise UsageError(f"`-s {setting}`: write `-s model.NAME=value` or `-s data.NAME=value`.")
        set_option(table, key.strip(), value.strip())
    files = {name: Path(value) if (value := getattr(request, name)) else None for name in ("masks", "ema", "dense")}
    return Beside(
        request.net, request.data, **files, data_dir=request.data_dir, options=table if request.settings else {}
    )


def _machine(request: argparse.Namespace) -> int:
    facts = environment(request.data_dir)
    if request.json:
        dump(facts)
    else:
        for name, value in facts.items():
            print(f"{name:<14} {value}")
    return 0


def _show(report: Report, every: bool) -> None:
    rows = list(report.tensors)
    told = {name for finding in report.findings if len(finding.tensors) <= _ALIKE for name in finding.tensors}
    odd = ("near_zeros", "subnormal", "not_finite")
    telling = [row for row in rows if row["name"] in told or any(row[key] for key in odd)]
    shown = rows if every or len(rows) <= _MANY else telling[:_MANY]
    width = max((len(row["name"]) for row in shown), default=0)
    for row in shown:
        print(_line(row, min(width, 60)))
    _totals(report, len(shown))
    told_of: Counter[str] = Counter()
    for finding in (*report.findings, *report.notes):
        told_of[finding.kind] += 1
        if every or told_of[finding.kind] <= _ALIKE:
            _tell(finding)
    for kind, count in told_of.items():
        if count > _ALIKE and not every:
            print(f"\n{count - _ALIKE:,} more of the kind {kind!r} (`--all` shows them)")
    if not report.findings:
        print("\nnothing is wrong with it")


def _line(row: dict[str, Any], width: int) -> str:
    zeros = f"zeros {row['zeros']:>10,} of {row['numel']:>10,} ({row['share']:.2%})"
    odd = [
        f"{row[key]:,} {word}"
        for key, word in (("near_zeros", "near zero"), ("subnormal", "subnormal"), ("not_finite", "not finite"))
        if row[key]
    ]
    shape, kind = "x".join(map(str, row["shape"])) or "1", row["dtype"].removeprefix("torch.")
    return f"{row['name']:<{width}}  {shape:<14} {kind:<8} {zeros}  {', '.join(odd)}".rstrip()


def _totals(report: Report, shown: int) -> None:
    rows = report.tensors
    zeros, numel = (sum(row[key] for row in rows if len(row["shape"]) > 1) for key in ("zeros", "numel"))
    names = {"safetensors": "safetensors", "torch": "torch.save", "onnx": "ONNX", "pt2": ".pt2", "folder": "run folder"}
    half = sum(row["subnormal_in_float16"] for row in rows)
    more = f", {len(rows) - shown:,} of them not shown (`--all` shows them)" if shown < len(rows) else ""
    print(
        f"{names.get(report.kind, report.kind)}: {len(rows):,} tensors{more}; "
        f"zeros in weights {zeros:,} of {numel:,} ({zeros / max(1, numel):.2%})"
    )
    if half:
        print(f"as float16, {half:,} values would be subnormal or zero")
    for name, why in report.left.items():
        print(f"not examined: {name}: {why}")
    if "ms" in report.speed:
        speed = report.speed
        print(f"compiled, here, one example, {speed['threads']} thread: about {speed['ms']:.3g} ms "
              f"(dense {speed['dense_ms']:.3g} ms; within {speed['error']:.0%})")  # fmt: skip
    elif report.speed.get("asked"):
        print(f"speed here: {report.speed['why']}")


def _tell(finding: Finding) -> None:
    before = "note: " if finding.severity == "note" else ""
    print(f"\n{before}{finding.what}\n  do: {finding.cure}")


def _show_mended(mended: Mended) -> None:
    print(f"\nwrote {mended.path}: {len(mended.fixed)} mended, {len(mended.report.findings)} remain")
    for finding in mended.report.findings:
        print(f"  {finding.what}")
