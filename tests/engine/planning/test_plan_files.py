"""Plan files: what is written is read back, and nothing in a file is believed."""

import copy
import importlib
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.planning.plan_kit import how, task_of

import secateur
from secateur.core.errors import FileError, SecateurError
from secateur.engine.planning.plan_files import plan_of_table, table_of_plan
from secateur.engine.planning.planner import plan_network
from secateur.engine.planning.plans import Removal
from secateur.solvers.sparsegpt import SparseGpt


@pytest.fixture(scope="module")
def made():
    return plan_network(task_of(), "ms 1.0", how())


def places(thing, path=()):
    """Paths to every value in a table."""
    yield path
    entries = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def put(thing, path, value):
    """The table with one value replaced."""
    if not path:
        return value
    thing = copy.deepcopy(thing)
    here = thing
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return thing


def test_what_is_written_is_read(made, tmp_path):
    made.save(tmp_path / "plan.json")

    assert secateur.LayerPlan.open(tmp_path / "plan.json") == made


def test_solver_and_removal_are_kept(made):
    from dataclasses import replace

    units = {"0.weight": (1, 2, 3, 23)}
    removal = Removal("macs 0.7x", ("channels",), made.criterion, {"0.weight": (20, 24)}, 0.01, units=units)
    full = replace(made, solver=SparseGpt(), inputs="dense", removal=removal, notes=("a note",))

    assert plan_of_table(json.loads(json.dumps(table_of_plan(full)))) == full


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "secateur.layer-plan/99"}, "layer-plan/99"),
        ({"layers": 3}, "no list"),
        ({"weights": 7}, "weights is no text"),
        ({"patterns": ["../x"]}, "not understood"),
        ({"criterion": "no_such"}, "no_such"),
        ({"figures": {}}, "figures"),
        ({"inputs": "both"}, "inputs"),
        ({"layers": []}, "names no layer"),
        ({"target": "ms of some kind"}, "not understood"),
        ({"machine": {"batch": "x"}}, "machine.batch is 'x'"),
        ({"machine": {"batch": None}}, "machine.batch is 'None'"),
        ({"machine": {"batch": -1}}, "machine.batch is '-1'"),
        ({"machine": {"threads": "a"}}, "machine.threads is 'a'"),
        ({"machine": {"threads": -3}}, "machine.threads is '-3'"),
        ({"machine": {"threads": 100_000}}, "machine.threads is 100,000"),
        ({"machine": {"engine": 3}}, "machine.engine"),
        ({"machine": {"isa": None}}, "machine.isa"),
        ({"data": {"examples": 0, "seed": 0, "digest": ""}}, "data.examples"),
        ({"data": {"examples": 1, "seed": "x", "digest": ""}}, "data.seed"),
        ({"masks": 3}, "masks is no text"),
    ],
)
def test_wrong_files_are_refused_by_name(made, tmp_path, change, word):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**table_of_plan(made), **change}))

    with pytest.raises(FileError, match=word):
        secateur.LayerPlan.open(path)


OWN = """
from dataclasses import dataclass

from secateur import Criterion, Paper

open("imported", "a").close()


@dataclass(frozen=True)
class Mine(Criterion):
    paper = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")
    needs = frozenset({"data-free"})

    def __call__(self, task, masks):
        return {name: weight.detach().abs() for name, weight in masks.match(task.model).items()}
"""


@pytest.mark.parametrize("where", ["criterion", "solver", "removal"])
def test_nothing_is_imported_because_a_file_says_so(made, tmp_path, monkeypatch, where):
    """A class from outside is taken once its module is imported by the user, and not before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_methods_of_a_plan.py").write_text(OWN)
    use = {"use": "own_methods_of_a_plan:Mine"}
    removal = {"to": "macs 0.7x", "kinds": [], "criterion": use, "groups": {}, "rise": 0.0, "blocks": []}
    table = {**table_of_plan(made), where: removal if where == "removal" else use}
    (tmp_path / "plan.json").write_text(json.dumps(table))

    with pytest.raises(FileError, match=r"own_methods_of_a_plan:Mine.*nothing is imported"):
        secateur.LayerPlan.open(tmp_path / "plan.json")
    assert not (tmp_path / "imported").exists() and "own_methods_of_a_plan" not in sys.modules

    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_methods_of_a_plan")
    try:
        if where == "solver":  # it is none
            with pytest.raises(FileError, match="Solver"):
                secateur.LayerPlan.open(tmp_path / "plan.json")
        else:
            plan = secateur.LayerPlan.open(tmp_path / "plan.json")
            assert (plan.criterion if where == "criterion" else plan.removal.criterion) == own.Mine()
    finally:
        del sys.modules["own_methods_of_a_plan"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"format": NaN}'])
def test_files_that_are_no_plans(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)

    with pytest.raises(FileError):
        secateur.LayerPlan.open(path)
    with pytest.raises(FileError):
        secateur.LayerPlan.open(tmp_path / "absent.json")
    with pytest.raises(FileError):
        secateur.LayerPlan.open(tmp_path)


VALUES = [None, True, -1, 0, 10**30, 1.5, float("inf"), "", "x", [], {}, [None], {"use": 3}]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(made, data):
    """Nothing but an error of ours comes of a changed value; what is read still counts right."""
    table = table_of_plan(made)
    path = data.draw(st.sampled_from(list(places(table))))
    try:
        plan = plan_of_table(put(table, path, data.draw(st.sampled_from(VALUES))))
    except (SecateurError, ValueError, KeyError, TypeError, OverflowError):
        return
    assert all(0 < layer.kept <= layer.total for layer in plan.layers)
    assert str(plan)


def test_nothing_is_written_where_it_cannot_be(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError):
        made.save(tmp_path / "file" / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
