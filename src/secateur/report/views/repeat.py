"""How the result came about and how to get it again."""

from __future__ import annotations

from secateur.report.numbers import fixed
from secateur.report.sections import Cell, Column, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, names

_LABELS = {
    "secateur": "secateur", "torch": "PyTorch", "python": "Python", "system": "System", "cpu": "Processor",
    "cores": "Processor cores", "threads": "Threads", "gpu": "GPU",
}  # fmt: skip
_SAYS = (
    "Save the recipe and run it to get this result again; "
    "with the same seed, versions and machine the masks should come out the same."
)


def section(run: RunRecord) -> Section | str:
    """Recipe, command, seed, versions and machine."""
    done = [step for step in run.steps if step.done]
    rows = [("Seed", str(run.seed))] if run.seed is not None else []
    rows += [(f"{step.number} {step.do}", _about(step)) for step in run.steps]
    made = [(step, by) for step in done if (by := as_table(step.card.get("made_by")))]
    if made:
        by = made[-1][1]
        rows += [(label, _word(by[key])) for key, label in _LABELS.items() if key in by]
    net = run.last_net()
    digest = as_table(net.card.get("files")).get("weights.safetensors") if net else None
    if isinstance(digest, str):
        rows.append(("SHA-256 of the weights", digest))
    if not rows and not run.recipe:
        return "No recipe and no versions were recorded."
    cells = tuple((Cell(a, a), Cell(b, b)) for a, b in rows)
    table = Table("", (Column("What"), Column("Value")), cells) if rows else None
    texts = (("Save as recipe.toml", run.recipe), ("Then run", "secateur run recipe.toml")) if run.recipe else ()
    says = _SAYS if run.recipe else "The recipe is missing, so this run cannot be repeated from here."
    return Section("Repeat", says, table, source=names(done), more=_more(made), texts=texts)


def _word(entry: object) -> str:
    return "none" if entry is None else str(entry)


def _about(step: StepRecord) -> str:
    key, seconds = step.card.get("key"), as_finite(step.card.get("seconds"))
    words = [
        f"key {key}" if isinstance(key, str) else "",
        f"{fixed(seconds, 1)} s" if seconds is not None else "",
        "" if step.done else "unfinished",
    ]
    return ", ".join(word for word in words if word) or "finished"


def _more(made: list[tuple[StepRecord, dict]]) -> tuple[str, ...]:
    """A warning when the steps do not come from one machine and one set of versions."""
    odd = [key for key in _LABELS if len({str(by.get(key)) for _, by in made}) > 1]
    if not odd:
        return ()
    listed = ", ".join(_LABELS[key] for key in odd)
    return (f"The steps differ in: {listed}. The table is of the last step; the card of each step has its own.",)
