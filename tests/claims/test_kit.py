"""The kit of the claims: seeds, checks, intervals and records; and what is recorded is what the claims say today."""

import dataclasses
import importlib
import importlib.util
import json
import math
import pkgutil

import pytest
import torch
from scipy import stats

import claims
from claims import kit
from secateur.core.errors import DataError

TOY = '''
"""A toy."""
from claims.kit import Check, Claim
FACTOR = 2  # no comment
CALLS = []


def one(seed, data_dir):
    """Figures."""
    CALLS.append((seed, data_dir))
    return {"twice": float(FACTOR * seed), "spread": [0.0, 1.0]}


CLAIM = Claim("toy", "A toy", "Nobody", "nothing", one, (Check("small", lambda rows: rows[-1]["twice"] < 5),))
'''
NAMES = sorted(m.name for m in pkgutil.iter_modules(claims.__path__) if m.name != "kit" and m.name[0] != "_")
RECORDS = sorted(file.stem for file in kit.RESULTS.glob("*.json"))


@pytest.fixture
def toy(tmp_path):
    """A function that imports the toy claim, its code changed if asked."""

    def load(old="", new=""):
        file = tmp_path / "toy.py"
        file.write_text(TOY.replace(old, new) if old else TOY)
        spec = importlib.util.spec_from_file_location(f"toy_{len(new)}_{abs(hash(new))}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def ended(claim, tmp_path, *words):
    """The exit code of the claim's command."""
    with pytest.raises(SystemExit) as end:
        kit.run(claim, ["--work", str(tmp_path / "work"), *words])
    return end.value.code


def test_figures_are_kept_and_read_again(toy, tmp_path, capsys):
    first, again = toy(), toy()

    assert ended(first.CLAIM, tmp_path, "--data-dir", "there") == 0
    before = capsys.readouterr().out
    assert first.CALLS == [(0, "there"), (1, "there"), (2, "there")]
    assert ended(again.CLAIM, tmp_path) == 0
    assert again.CALLS == []
    assert capsys.readouterr().out == before


def test_a_run_that_was_stopped_goes_on(toy, tmp_path):
    module = toy()
    ended(module.CLAIM, tmp_path, "--seeds", "1")

    ended(module.CLAIM, tmp_path)

    assert [seed for seed, _ in module.CALLS] == [1, 0, 2]


@pytest.mark.parametrize(
    ("old", "new", "anew"),
    [
        ("FACTOR = 2", "FACTOR = 1", True),
        ("[0.0, 1.0]", "[0.0, 2.0]", True),
        ('"nothing"', '"much"', False),
        ("< 5", "< 3", False),
        ("# no comment", "", False),
    ],
)
def test_changed_code_makes_the_figures_anew_and_changed_words_do_not(toy, tmp_path, old, new, anew):
    ended(toy().CLAIM, tmp_path)

    changed = toy(old, new)
    ended(changed.CLAIM, tmp_path)

    assert len(changed.CALLS) == (3 if anew else 0)


def test_a_failed_inequality_ends_with_3(toy, tmp_path, capsys):
    assert ended(toy("< 5", "< 4").CLAIM, tmp_path) == 3
    assert "FAILED  small" in capsys.readouterr().out


def test_a_users_error_ends_with_2_and_is_said(toy, tmp_path, capsys):
    def one(seed, data_dir):
        raise DataError("there is no data.")

    claim = dataclasses.replace(toy().CLAIM, one=one)

    assert ended(claim, tmp_path) == 2
    assert "there is no data." in capsys.readouterr().err


def test_figures_are_recorded_only_when_asked(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "toy.json"

    ended(toy().CLAIM, tmp_path)
    assert not file.exists()
    ended(toy().CLAIM, tmp_path, "--write")

    found = json.loads(file.read_text())
    assert found["name"] == "toy" and found["seeds"] == [0, 1, 2] and found["torch"] == torch.__version__
    assert found["figures"] == [{"twice": 2.0 * seed, "spread": [0.0, 1.0]} for seed in range(3)]
    assert found["checks"] == [{"says": "small", "held": True}]


def test_what_is_printed_holds_mean_and_interval_of_numbers_alone(toy, tmp_path, capsys):
    ended(toy().CLAIM, tmp_path)

    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("  twice")]
    assert line.split() == ["twice", "2", "±", "5"]  # 2 ± 4.303 · 2 / √3
    assert "spread" not in told


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 3.5, -1.0], [0.1, 0.2, 0.3, 0.4, 5.0]])
def test_the_interval_is_students(values):
    middle = sum(values) / len(values)
    low, high = stats.t.interval(0.95, len(values) - 1, middle, stats.sem(values))

    assert kit.interval(values) == pytest.approx((high - low) / 2, rel=1e-12)


def test_a_single_value_has_no_interval():
    assert math.isnan(kit.interval([1.0]))


def test_mean_is_over_seeds():
    assert kit.mean([{"a": 1}, {"a": 2.5}], "a") == 1.75


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_has_checks_and_seeds_and_its_files_name(name):
    claim = importlib.import_module(f"claims.{name}").CLAIM

    assert claim.name == name
    assert len(claim.checks) >= 1
    assert len(claim.seeds) == len(set(claim.seeds)) >= 3
    assert len({check.says for check in claim.checks}) == len(claim.checks)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_what_its_claim_says_of_the_figures(name):
    assert name in NAMES, f"claims/results/{name}.json belongs to no claim of today"
    claim, record = (
        importlib.import_module(f"claims.{name}").CLAIM,
        json.loads((kit.RESULTS / f"{name}.json").read_text()),
    )

    assert record["name"] == name
    assert tuple(record["seeds"]) == claim.seeds
    assert len(record["figures"]) == len(claim.seeds)
    assert len({frozenset(row) for row in record["figures"]}) == 1
    assert record["checks"] == kit.verdicts(claim, record["figures"])
