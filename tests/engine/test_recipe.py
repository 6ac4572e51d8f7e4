"""Recipes: what is written is what is read, keys change exactly when something asked for does."""

import dataclasses
import importlib
import json
import pathlib
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.cli.main import main
from secateur.core.allocations import ALLOCATIONS
from secateur.core.errors import FileError, UsageError
from secateur.core.patterns import PATTERNS
from secateur.core.schedules import SCHEDULES
from secateur.core.sockets import find, names
from secateur.engine.binding import bind, parse_value, set_option, table_of
from secateur.engine.recipe import DataSpec, PruneStep, Recipe, TrainStep, read_recipe
from secateur.engine.toml import dump

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

OTHER: dict[str, dict] = {
    "nm": {"n": 1, "m": 4}, "block": {"rows": 2, "cols": 3}, "levels": {"count": 3, "final": 0.8},
    "erk": {"kernel": False}, "random": {"seed": 7}, "snip": {"statistics": "fresh"}, "distill": {"alpha": 0.5},
    "gradual": {"sparsity": 0.75, "start": 0.1, "regrow": True}, "topkast": {"every": 3, "penalty": 1e-5},
    "acdc": {"sparsity": 0.8, "phases": [0.5, 0.5]},
}  # fmt: skip


def table(*steps, **more):
    """A recipe table around some steps."""
    return {"seed": 3, "model": {"use": "mlp", "widths": [16, 8]}, "data": {"use": "digits", "batch": 32},
            "step": [*steps, {"do": "measure", "probes": ["calibration"]}], **more}  # fmt: skip


def chosen(name):
    """A choice as a bare name, and as a table with options where it has any."""
    return [name, {"use": name, **OTHER[name]}] if name in OTHER else [name]


STEPS = [{"do": "prune", part: one}
         for part, every in (("criterion", names("criteria")), ("allocation", ALLOCATIONS), ("pattern", PATTERNS))
         for name in every for one in chosen(name)]  # fmt: skip
STEPS += [{"do": "train", "rules": [one]} for name in names("rules") for one in chosen(name)]
AIM = {True: {"sparsity": 0.8}, False: {}}
STEPS += [{"do": "train", "rules": [{"use": "gradual", "schedule": one, **AIM["final" in one]}]}
          for name in SCHEDULES for one in chosen(name)]  # fmt: skip
STEPS += [{"do": "train", "rules": [{"use": "gradual", "allocation": one, "sparsity": 0.5}, "distill"]}
          for name in ALLOCATIONS if name != "by-cost" for one in chosen(name)]  # fmt: skip
STEPS += [{"do": "measure", "probes": [name], "baselines": []} for name in names("probes")]
STEPS += [
    {"do": "train", "epochs": 2, "lr": 1, "warmup": 1, "only": ["fc*"], "skip": ["*.bias"], "teacher": "runs/a\\b"}
]


@pytest.mark.parametrize("step", STEPS, ids=json.dumps)
def test_every_choice_goes_to_a_table_and_back(step):
    """Through plain values and through TOML text, with defaults spelt out and without."""
    recipe = Recipe.from_table(table(step))

    for defaults in (False, True):
        assert Recipe.from_table(recipe.to_table(defaults)) == recipe
        assert tomllib.loads(recipe.to_toml(defaults)) == recipe.to_table(defaults)
        assert Recipe.from_table(tomllib.loads(recipe.to_toml(defaults))).keys("o") == recipe.keys("o")


def test_options_of_networks_and_data_stand_beside_the_others():
    """``widths`` is written once, as the user wrote it."""
    given = table({"do": "train"})

    recipe = Recipe.from_table(given)

    assert recipe.model.options == {"widths": [16, 8]}
    assert recipe.to_table()["model"] == given["model"] and recipe.to_table()["data"] == given["data"]
    assert Recipe.from_table({**given, "model": {"use": "mlp", "options": {"widths": [16, 8]}}}) == recipe


def test_defaults_written_out_leave_keys_unchanged():
    """A default that is spelt, a whole number for a real one, and the order of entries mean nothing."""
    plain = Recipe.from_table(table({"do": "train", "lr": 1.0}, {"do": "prune"})).keys("o")
    spelt = table({"momentum": 0.9, "lr": 1, "do": "train", "rules": [], "ema": 0},
                  {"do": "prune", "criterion": "magnitude", "allocation": {"use": "global"},
                   "examples": 1024})  # fmt: skip
    spelt["data"] = {"batch": 32, "augment": "none", "use": "digits"}

    assert Recipe.from_table(spelt).keys("o") == plain


METHOD = """
from dataclasses import dataclass
from secateur.core.reading import Paper
from secateur.core.sockets import Rule

@dataclass(frozen=True)
class Calm(Rule):
    '''Does nothing.'''

    paper = Paper("Calm", "Nobody", 2020, "nowhere", differs="")
    strength: float = 1.0
"""


def test_a_new_option_with_a_default_leaves_old_results_valid(tmp_path, monkeypatch):
    """The key of a step is the same after its method has gained an option."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    given = table({"do": "train", "rules": [{"use": "calm_rule:Calm", "strength": 2.0}]})
    keys = []
    for text in (METHOD, METHOD + "    newer: int = 5\n"):
        (tmp_path / "calm_rule.py").write_text(text)
        sys.modules.pop("calm_rule", None)
        importlib.invalidate_caches()
        (tmp_path / "__pycache__").exists() and [p.unlink() for p in (tmp_path / "__pycache__").iterdir()]
        keys.append(Recipe.from_table(given).keys("o"))
    monkeypatch.delitem(sys.modules, "calm_rule")

    assert keys[0] == keys[1]


def test_a_changed_step_changes_the_keys_from_there_on():
    """Keys before it stay; of model, data, seed and origin every key depends."""
    steps = [{"do": "train", "lr": 0.1}, {"do": "train", "rules": ["gradual"]}, {"do": "prune"}]
    base = Recipe.from_table(table(*steps)).keys("o")
    assert len(set(base)) == 4

    for place in range(3):
        changed = [{**s, "skip": ["head*"]} if i == place else s for i, s in enumerate(steps)]
        keys = Recipe.from_table(table(*changed)).keys("o")
        assert [a == b for a, b in zip(keys, base, strict=True)] == [i < place for i in range(4)]
    deep = [
        steps[0],
        {"do": "train", "rules": [{"use": "gradual", "criterion": {"use": "random", "seed": 1}}]},
        steps[2],
    ]
    assert [a == b for a, b in zip(Recipe.from_table(table(*deep)).keys("o"), base, strict=True)] == [True] + 3 * [
        False
    ]
    for other in (
        Recipe.from_table(table(*steps, seed=4)).keys("o"),
        Recipe.from_table(table(*steps)).keys("p"),
        Recipe.from_table(table(*steps, model={"use": "mlp", "widths": [16, 9]})).keys("o"),
        Recipe.from_table(table(*steps, data={"use": "digits", "batch": 32, "train": 100})).keys("o"),
    ):
        assert not set(other) & set(base)


WRONG = [
    (table({"do": "train", "epoch": 3}), "step 1 has no option 'epoch'.*epochs"),
    (table({"do": "train"}, {"do": "prune", "critrion": "snip"}), "step 2 has no option 'critrion'.*criterion"),
    (table({"do": "prune", "criterion": "snp"}), "snip"),
    (table({"do": "prune", "allocation": "unifrm"}), r"step 1\.allocation: no allocation is called 'unifrm'.*uniform"),
    (table({"do": "prune", "pattern": "blck"}), "no pattern is called 'blck'.*block"),
    (
        table({"do": "train", "rules": [{"use": "gradual", "schedule": "cubik"}]}),
        "no schedule is called 'cubik'.*cubic",
    ),
    (
        table({"do": "train", "rules": [{"use": "gradual", "sparsty": 0.5}]}),
        r"rules\[0\] has no option 'sparsty'.*sparsity",
    ),
    (table({"do": "train", "rules": [{"sparsity": 0.5}]}), r"step 1\.rules\[0\].*use"),
    (table({"do": "train", "epochs": 1.5}), r"step 1\.epochs is 1\.5; it must be a whole number"),
    (table({"do": "train", "epochs": True}), "whole number"),
    (table({"do": "train", "lr": float("nan")}), "NaN"),
    (table({"do": "train", "lr": "fast"}), r"step 1\.lr is 'fast'; it must be a number"),
    (table({"do": "train", "nesterov": 1}), "true or false"),
    (table({"do": "train", "optimizer": "sgdd"}), "'sgd', 'adam'"),
    (table({"do": "measure", "baselines": ["luck"]}), "'random'"),
    (table({"do": "prun"}), "no step 'prun'.*prune"),
    (table({"do": "train"}, sed=1), "no entry 'sed'.*seed"),
    (table({"do": "train"}, seed=1.0), "whole number"),
    (table({"do": "train"}, model="mlp"), "must be a table"),
    (table({"do": "train"}, secateur="7"), "format '7'"),
    ({"step": {"do": "train"}}, "no steps"),
]


@pytest.mark.parametrize(("given", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_not_known_is_named_with_the_nearest(given, says):
    with pytest.raises(UsageError, match=says):
        Recipe.from_table(given)


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"seed = '\xff'")

    for path in (tmp_path / "r.toml", tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(FileError, match=path.name):
            read_recipe(path)


def test_settings_reach_every_depth():
    """Tables are made where there are none; a bare name becomes a table; list places count from 1."""
    made = {"step": [{"do": "train", "rules": ["gradual", {"use": "distill"}]}, {"do": "prune", "criterion": "random"}]}

    set_option(made, "seed", "5")
    set_option(made, "data.use", "digits")
    set_option(made, "model.widths", "[4, 2]")
    set_option(made, "step.1.lr", "1e-3")
    set_option(made, "step.1.rules.1.sparsity", "0.5")
    set_option(made, "step.1.rules.2.alpha", "1")
    set_option(made, "step.2.criterion.seed", "3")
    set_option(made, "step.2.to", "params 5%")

    assert made == {
        "seed": 5, "data": {"use": "digits"}, "model": {"widths": [4, 2]},
        "step": [
            {"do": "train", "lr": 1e-3, "rules": [{"use": "gradual", "sparsity": 0.5}, {"use": "distill", "alpha": 1}]},
            {"do": "prune", "criterion": {"use": "random", "seed": 3}, "to": "params 5%"},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("step.3.lr", "1 to 2"),
        ("step.0.lr", "1 to 2"),
        ("step.x.lr", "'x'"),
        ("step.lr", r"step\.1\.lr"),
        ("seed.a", "not a table"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(path, says):
    with pytest.raises(UsageError, match=says):
        set_option({"seed": 3, "step": [{}, {}]}, path, "1")


@pytest.mark.parametrize(
    ("text", "value"),
    [("", ""), ("3", 3), ("3.0", 3.0), ("-1e-4", -1e-4), ("true", True), ("True", "True"), ("snip", "snip"),
     ("2:4", "2:4"), ("params 5%", "params 5%"), ('"7"', "7"), ("[1, 'a']", [1, "a"]), ("{a = 1}", {"a": 1}),
     ("[1", "[1"), ("runs/a", "runs/a")],
)  # fmt: skip
def test_values_are_toml_or_text(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


KEYS = st.text(min_size=0, max_size=8)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_dumped_toml_reads_back_as_it_was(made):
    """Any text (control characters too), any nesting; floats and whole numbers keep their type."""
    assert repr(_sorted(tomllib.loads(dump(made)))) == repr(_sorted(made))


def _sorted(thing):
    """Dictionaries in one order: TOML writes scalars before tables."""
    if isinstance(thing, dict):
        return {key: _sorted(thing[key]) for key in sorted(thing)}
    return [_sorted(entry) for entry in thing] if isinstance(thing, list) else thing


def test_dump_leaves_out_what_is_none():
    """TOML has no null; at any depth the entry is left out."""
    assert tomllib.loads(dump({"a": None, "b": {"c": None, "d": {"e": None, "f": 1}}})) == {"b": {"d": {"f": 1}}}


def test_binding_is_undone_by_table_of():
    """For steps and specs alone; instances are taken as they are."""
    gradual = find("rules", "gradual")(sparsity=0.5)
    step = bind(TrainStep, {"rules": (gradual,), "only": "fc*"}, "train")

    assert step.rules == (gradual,) and step.only == ("fc*",)
    assert table_of(step) == {"rules": [{"use": "gradual", "sparsity": 0.5}], "only": ["fc*"]}
    assert bind(TrainStep, table_of(step), "train") == step
    assert set(table_of(DataSpec(), defaults=True)) == {f.name for f in dataclasses.fields(DataSpec)}
    assert table_of(PruneStep()) == {}


FILES = sorted((ROOT / "recipes").glob("*.toml"))
COMPARISONS = [path for path in FILES if "compare" in tomllib.loads(path.read_text())]
RECIPES = [path for path in FILES if path not in COMPARISONS]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_can_be_run(path, tmp_path, request, capsys):
    """Each parses, survives the round trip, and plans its steps on its data set where that is there."""
    recipe = Recipe.from_table(read_recipe(path))
    assert Recipe.from_table(tomllib.loads(recipe.to_toml(defaults=True))) == recipe
    words = ["run", str(path), "--dry-run", "--json", "-o", str(tmp_path / "out")]
    if recipe.data.use != "digits":
        words += ["--data-dir", str(request.getfixturevalue("data_dir"))]

    assert main(words) == 0

    planned = json.loads(capsys.readouterr().out)["steps"]
    assert [row["do"] for row in planned] == [step.do for step in recipe.steps]
    assert {row["state"] for row in planned} == {"to do"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_the_comparisons_of_the_repository_can_be_planned(path, tmp_path, request, capsys):
    table = tomllib.loads(path.read_text())
    words = ["compare", str(path), "--dry-run", "--json", "-o", str(tmp_path / "out")]
    if table["data"]["use"] != "digits":
        words += ["--data-dir", str(request.getfixturevalue("data_dir"))]

    assert main(words) == 0

    planned = json.loads(capsys.readouterr().out)["runs"]
    asked, seeds = table["compare"], table["compare"]["seeds"]
    always = {"dense", "magnitude", "random", "small-dense"}
    assert {run["method"] for run in planned} >= always | set(asked["methods"])
    assert sum(run["method"] == "random" for run in planned) == len(asked["sparsity"]) * len(seeds)
    assert {run["state"] for run in planned} == {"to do"}
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_not_run_as_a_recipe(capsys):
    assert main(["run", str(COMPARISONS[0])]) == 2
    assert "secateur compare" in capsys.readouterr().err
