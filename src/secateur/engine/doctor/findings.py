"""What the doctor says: a finding, and how a check is made."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.engine.doctor.subject import Subject

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a file, or worth knowing of it.

    Args:
        kind: a short word for what it is, the same for all findings of a check.
        tensors: the tensors it is about.
        what: what was found, with numbers.
        count: how many values, units, groups or tensors are concerned.
        cure: a command or a line of code that mends it.
        fixable: whether a repaired copy can be written.
        severity: ``"error"`` (the file gives other results than it should), ``"warning"`` (it works, but not as it
            should) or ``"note"`` (nothing is wrong; something could be gained).
    """

    kind: str
    tensors: tuple[str, ...]
    what: str
    count: int
    cure: str
    fixable: bool = False
    severity: Severity = "error"

    def to_table(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "tensors": list(self.tensors)}


@dataclass(frozen=True)
class Check:
    """A search for one kind of fault.

    Args:
        find: the findings of a file.
        mend: the file without one of its findings; None where nothing can be done.
    """

    find: Callable[[Subject], list[Finding]]
    mend: Callable[[Subject, Finding], Subject] | None = None


def listed(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    """Names in a sentence: the first few, and how many more.

    >>> listed(["a", "b", "c"], 2)
    '`a`, `b` and 1 more'
    """
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def typed(path: Path) -> str:
    """A path as a shell takes it, whatever its name holds.

    >>> typed(Path("my net$(ls).pt"))
    "'my net$(ls).pt'"
    """
    return shlex.quote(str(path)) if str(path).isprintable() else "FILE"
