"""Writes claims/results.json, all claims with what became of them, and docs/claims.md, the same to be read."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from claims.kit import RESULTS, Claim, interval  # noqa: E402

import claims  # noqa: E402

PAGE, TABLE = ROOT / "docs" / "claims.md", ROOT / "claims" / "results.json"
HELD, FAILED, NOT_RUN = "held", "failed", "not run"
HEAD = """# The papers' claims

Every claim is a command; it prints its figures and whether each inequality holds. The inequalities were set before the
figures were seen. What fails stays here as failed. Sizes are what two processor cores can check, so a claim that holds
here supports the paper and one that fails does not refute it. Figures are means over the seeds with Student's 95 %
interval. Minutes are those of one processor core.

This page is made by `python scripts/claims_page.py` from `claims/results.json`, which it makes from the recorded
figures in `claims/results`. A claim has held when all of its inequalities have.
"""


def known() -> list[Claim]:
    """All claims, in the order of their names."""
    files = sorted(m.name for m in pkgutil.iter_modules(claims.__path__) if m.name != "kit" and m.name[0] != "_")
    return [importlib.import_module(f"claims.{name}").CLAIM for name in files]


def results() -> dict[str, dict]:
    """Every claim: ``held``, ``failed`` or ``not run``; its inequalities, seeds and measured minutes."""
    found = {}
    for claim in known():
        record = _record(claim)
        checks = [] if record is None else record["checks"]
        state = NOT_RUN if record is None else HELD if all(check["held"] for check in checks) else FAILED
        found[claim.name] = {
            "state": state, "title": claim.title, "paper": claim.paper,
            "seeds": [] if record is None else record["seeds"],
            "minutes": None if record is None else record["minutes"],
            "torch": None if record is None else record["torch"],
            "checks": checks or [{"says": check.says, "held": None} for check in claim.checks],
        }  # fmt: skip
    return found


def page(table: dict[str, dict]) -> str:
    """The whole page."""
    states = [entry["state"] for entry in table.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (HELD, FAILED, NOT_RUN) if state in states)
    rows = [f"{len(table)} claims: {counts}.", "", "| claim | state | inequalities held | seeds | minutes |"]
    rows.append("|---|---|---|---|---|")
    for entry in table.values():
        checks = entry["checks"]
        anchor = entry["title"].lower().replace(" ", "-")
        anchor = "".join(c for c in anchor if c.isalnum() or c in "-_")
        held = "" if entry["state"] == NOT_RUN else f"{sum(c['held'] for c in checks)} of {len(checks)}"
        minutes = "" if entry["minutes"] is None else f"{entry['minutes']:.2g}"
        seeds = len(entry["seeds"]) or ""
        rows.append(f"| [{entry['title']}](#{anchor}) | {entry['state']} | {held} | {seeds} | {minutes} |")
    return "\n".join([HEAD, *rows, "", *(_part(claim) for claim in known())]).rstrip() + "\n"


def _record(claim: Claim) -> dict | None:
    file = RESULTS / f"{claim.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _part(claim: Claim) -> str:
    lines = [f"## {claim.title}", "", f"{claim.paper}. The paper: {claim.states}", ""]
    options = " --data-dir FOLDER" if claim.data else ""
    found = _record(claim)
    lines += [f"`python -m claims.{claim.name}{options}`"]
    if found is None:
        return "\n".join([*lines, "", "Not run.", ""])
    seeds = ", ".join(map(str, found["seeds"]))
    lines[-1] += f", seeds {seeds}; about {claim.minutes:g} minutes. Recorded with torch {found['torch']}."
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {'held' if check['held'] else '**failed**'} | {check['says']} |" for check in found["checks"]]
    lines += ["", "| figure | mean | ± |", "|---|---|---|"]
    rows = found["figures"]
    for name in [n for n, v in rows[0].items() if isinstance(v, int | float)]:
        values = [float(row[name]) for row in rows]
        lines.append(f"| {name} | {sum(values) / len(values):.4g} | {interval(values):.2g} |")
    return "\n".join([*lines, "", *([claim.analysis, ""] if claim.analysis else [])])


def main() -> int:
    """Write both files, or with ``--check`` say whether they are up to date."""
    table = results()
    texts = {TABLE: json.dumps(table, indent=2, ensure_ascii=False) + "\n", PAGE: page(table)}
    for file, text in texts.items():
        if "--check" not in sys.argv[1:]:
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            name = file.relative_to(ROOT)
            print(f"{name} is not up to date; run `python scripts/claims_page.py`.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
