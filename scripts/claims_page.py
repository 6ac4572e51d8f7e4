"""Writes docs/claims.md: every claim with the paper's figures, ours, and what held or failed."""

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

PAGE = ROOT / "docs" / "claims.md"
HEAD = """# The papers' claims

Every claim is a command; it prints its figures and whether each inequality holds. The inequalities were set before the
figures were seen. What fails stays here as failed. Sizes are what two processor cores can check, so a claim that holds
here supports the paper and one that fails does not refute it. Figures are means over the seeds with Student's 95 %
interval. Minutes are those of one processor core.

This page is made by `python scripts/claims_page.py` from the recorded figures in `claims/results`.
"""


def known() -> list[Claim]:
    """All claims, in the order of their names."""
    files = sorted(m.name for m in pkgutil.iter_modules(claims.__path__) if m.name != "kit" and m.name[0] != "_")
    return [importlib.import_module(f"claims.{name}").CLAIM for name in files]


def page() -> str:
    """The whole page."""
    every = known()
    rows = ["| claim | held | minutes |", "|---|---|---|"]
    for claim in every:
        found = _record(claim)
        checks = [] if found is None else found["checks"]
        held = f"{sum(c['held'] for c in checks)} of {len(checks)}" if found else "not measured"
        anchor = claim.title.lower().replace(" ", "-")
        anchor = "".join(c for c in anchor if c.isalnum() or c in "-_")
        rows.append(f"| [{claim.title}](#{anchor}) | {held} | {claim.minutes:g} |")
    return "\n".join([HEAD, *rows, "", *(_part(claim) for claim in every)]).rstrip() + "\n"


def _record(claim: Claim) -> dict | None:
    file = RESULTS / f"{claim.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _part(claim: Claim) -> str:
    lines = [f"## {claim.title}", "", f"{claim.paper}. The paper: {claim.states}", ""]
    options = " --data-dir FOLDER" if claim.data else ""
    found = _record(claim)
    lines += [f"`python -m claims.{claim.name}{options}`"]
    if found is None:
        return "\n".join([*lines, "", "Not measured yet.", ""])
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
    """Write the page, or with ``--check`` say whether it is up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print("docs/claims.md is not up to date; run `python scripts/claims_page.py`.", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
