"""Contract suites and small networks for authors of methods.

>>> from secateur.testing import check_criterion
>>> from secateur.criteria.magnitude import Magnitude
>>> check_criterion(Magnitude(), networks=["tanh_mlp"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.testing.cases import CASES, HIDDEN, Hidden
    from secateur.testing.contracts import check_criterion, check_probe
    from secateur.testing.promises import ContractError
    from secateur.testing.rules_contract import check_rule
    from secateur.testing.snapshot import changes, snapshot
    from secateur.testing.solvers_contract import check_solver

__all__ = [
    "CASES",
    "HIDDEN",
    "ContractError",
    "Hidden",
    "changes",
    "check_criterion",
    "check_probe",
    "check_rule",
    "check_solver",
    "snapshot",
]

_HOMES = {
    "cases": ("CASES", "HIDDEN", "Hidden"),
    "contracts": ("check_criterion", "check_probe"),
    "promises": ("ContractError",),
    "rules_contract": ("check_rule",),
    "snapshot": ("changes", "snapshot"),
    "solvers_contract": ("check_solver",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'secateur.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.testing.{_HOME_OF[name]}"), name)
