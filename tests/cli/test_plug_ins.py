"""Faulty classes of the user's own: one error with exit code 2 that names the class and repeats its own words."""

import importlib
import sys
import traceback

import pytest

MODULE = '''
"""Methods that each have one fault."""

from dataclasses import dataclass, field

import torch

from secateur import Criterion, Paper, Probe, Reading, Rule
from secateur.core.allocations import Allocation
from secateur.core.patterns import Pattern

PAPER = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")


def magnitudes(task, masks):
    return {n: w.detach().abs() for n, w in masks.match(task.model).items()}


class Plain(Criterion):
    def __call__(self, task, masks):
        return magnitudes(task, masks)


@dataclass(frozen=True)
class Abstract(Criterion):
    paper = PAPER


@dataclass(frozen=True)
class Fussy(Criterion):
    power: float = 1.0

    def __post_init__(self):
        raise ValueError("power must be even, not " + str(self.power))

    def __call__(self, task, masks):
        return magnitudes(task, masks)


@dataclass(frozen=True)
class Unknown(Criterion):
    base: "Fraction" = None

    def __call__(self, task, masks):
        return magnitudes(task, masks)


@dataclass(frozen=True)
class Raises(Criterion):
    def __call__(self, task, masks):
        return {}["no such key"]


@dataclass(frozen=True)
class Empty(Criterion):
    def __call__(self, task, masks):
        return {}


@dataclass(frozen=True)
class List(Criterion):
    def __call__(self, task, masks):
        return list(magnitudes(task, masks).values())


@dataclass(frozen=True)
class Extra(Criterion):
    def __call__(self, task, masks):
        return {n: w.detach().abs() for n, w in task.params().items()}


@dataclass(frozen=True)
class Misshapen(Criterion):
    def __call__(self, task, masks):
        return {n: s[:, :1] for n, s in magnitudes(task, masks).items()}


@dataclass(frozen=True)
class Whole(Criterion):
    def __call__(self, task, masks):
        return {n: s.long() for n, s in magnitudes(task, masks).items()}


@dataclass(frozen=True)
class NaN(Criterion):
    def __call__(self, task, masks):
        return {n: s / 0 * 0 for n, s in magnitudes(task, masks).items()}


@dataclass(frozen=True)
class Spendthrift(Allocation):
    def share(self, scores, keep, sizes, shapes, cost):
        return {n: s.numel() for n, s in scores.items()}


@dataclass(frozen=True)
class Forgetful(Allocation):
    def share(self, scores, keep, sizes, shapes, cost):
        return {}


@dataclass(frozen=True)
class Breaks(Allocation):
    def share(self, scores, keep, sizes, shapes, cost):
        raise ZeroDivisionError("shared out among nobody")


class Half(Pattern):
    """Not a dataclass, and not all of it is there."""

    def unit_size(self, shape):
        return 1


@dataclass(frozen=True)
class Crooked(Pattern):
    def unit_size(self, shape):
        return 1

    def unit_scores(self, score):
        return score

    def mask(self, score, keep):
        return score > 0.5 if score.shape[0] > 12 else torch.ones(3)


@dataclass(frozen=True)
class Number(Probe):
    def __call__(self, task, masks=None):
        return 1.5


@dataclass(frozen=True)
class Tensor(Probe):
    def __call__(self, task, masks=None):
        reading = Reading(1.5)
        object.__setattr__(reading, "value", torch.tensor(1.5))
        return reading


@dataclass(frozen=True)
class Stumbles(Probe):
    def __call__(self, task, masks=None):
        raise RuntimeError("no batch will do")


@dataclass(frozen=True)
class Lazy(Rule):
    stuff: list = field(default_factory=lambda: 1 / 0)


@dataclass(frozen=True)
class Unsourced(Rule):
    paper = "somewhere"


def function():
    pass
'''


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """The module above in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("faulty", None)


CASES = [
    (
        ["--criterion", "faulty:Plain"],
        "'faulty:Plain' is not a dataclass; put `@dataclass(frozen=True)` above `class P",
    ),
    (["--criterion", "faulty:Abstract"], "'faulty:Abstract' is abstract: it does not define `__call__`"),
    (
        ["--criterion", "faulty:Fussy", "-s", "criterion.power=3.0"],
        "'faulty:Fussy' failed: ValueError: power must be even",
    ),
    (["--criterion", "faulty:Unknown"], "'faulty:Unknown' failed: NameError: name 'Fraction' is not defined"),
    (["--criterion", "faulty:Raises"], "'faulty:Raises' failed: KeyError: 'no such key' (faulty.py, line 51)"),
    (["--criterion", "faulty:Raises", "--epochs", "1"], "'faulty:Raises' failed: KeyError: 'no such key'"),
    (
        ["--criterion", "faulty:Empty"],
        "Empty() gave keys []; it must give a dict of scores with the keys ['fc1.weight',",
    ),
    (["--criterion", "faulty:List"], "List() gave list; it must give a dict"),
    (["--criterion", "faulty:Extra"], "Extra() gave keys ['fc1.bias', "),
    (
        ["--criterion", "faulty:Misshapen"],
        "Misshapen() gave torch.float32 (16, 1) for `fc1.weight`; scores are floating",
    ),
    (["--criterion", "faulty:Misshapen", "--epochs", "1"], "Misshapen() gave torch.float32 (16, 1) for `fc1.weight`"),
    (["--criterion", "faulty:Whole"], "Whole() gave torch.int64 (16, 64) for `fc1.weight`"),
    (["--criterion", "faulty:NaN"], "1,024 of 1,024 scores of `fc1.weight` are NaN"),
    (["--criterion", "faulty:Number"], "'faulty:Number' is not a Criterion"),
    (["--criterion", "faulty:function"], "'faulty:function' is not a Criterion"),
    (["--allocation", "faulty:Plain"], "'faulty:Plain' is not of kind Allocation"),
    (["--allocation", "faulty:function"], "'faulty:function' is not of kind Allocation"),
    (["--allocation", "faulty:Spendthrift"], "Spendthrift() gave {'fc1.weight': 1024, "),
    (["--allocation", "faulty:Forgetful"], "Forgetful() gave {} for a budget of 134 weights"),
    (["--allocation", "faulty:Breaks"], "'faulty:Breaks' failed: ZeroDivisionError: shared out among nobody"),
    (["--pattern", "faulty:Raises"], "'faulty:Raises' is not of kind Pattern"),
    (["--pattern", "faulty:Half"], "'faulty:Half' is abstract: it does not define `mask`, `unit_scores`"),
    (["--pattern", "faulty:Crooked"], "Crooked() gave no boolean mask of shape (12, 16) for `fc2.weight`"),
]


def told(code, err):
    """The one line of an error that is the user's to mend."""
    assert code == 2, err
    assert "Traceback" not in err and err.count("secateur: error:") == 1
    return err


@pytest.mark.parametrize(("words", "says"), CASES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_faulty_choices_of_pruning(call, dense, faulty, tmp_path, words, says):
    code, _, err = call("prune", dense, *words, "-o", tmp_path / "out")

    assert says in told(code, err)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        ("Number", "Number() gave float; it must give a secateur.Reading"),
        ("Tensor", "Tensor() gave a reading with value = tensor(1.5000); it must be a number"),
        ("Stumbles", "'faulty:Stumbles' failed: RuntimeError: no batch will do"),
        ("Plain", "'faulty:Plain' is not a Probe"),
    ],
)
def test_faulty_probes(call, dense, faulty, tmp_path, probe, says):
    code, _, err = call("measure", dense, "--probe", f"faulty:{probe}", "-o", tmp_path / "out")

    assert says in told(code, err)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Plain", "'faulty:Plain' is not a dataclass"),
        ("Abstract", "'faulty:Abstract' is abstract"),
        ("Lazy", "'faulty:Lazy' failed: ZeroDivisionError"),
        ("Unsourced", "'faulty:Unsourced': its paper is 'somewhere'; write `paper = Paper(...)`"),
        ("function", "'faulty:function' is not a method"),
        ("PAPER", "'faulty:PAPER' is not a method"),
    ],
)
def test_faulty_cards(call, faulty, name, says):
    assert says in told(*call("methods", f"faulty:{name}")[::2])


def test_debug_shows_where_a_plug_in_failed(call, dense, faulty, tmp_path):
    """With ``--debug`` the original error is the cause of the clear one."""
    with pytest.raises(Exception, match="'faulty:Raises' failed") as caught:
        call("--debug", "prune", dense, "--criterion", "faulty:Raises", "-o", tmp_path / "out")

    assert isinstance(caught.value.__cause__, KeyError)
    assert "faulty.py" in "".join(traceback.format_exception(caught.value))
