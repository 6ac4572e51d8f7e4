"""Plug-ins: the file name is the registry, and a dotted path works wherever a name does."""

# pyright: reportAbstractUsage=false

import subprocess
import sys

import pytest

from secateur.core.errors import UsageError
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import SOCKETS, Criterion, Method, Probe, find, load_object, name_of, names

METHOD = '''
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion

class {name}(Criterion):
    """A score."""

    paper = Paper("none", "nobody", 2020, "", "in nothing known")

    def __call__(self, task, masks):
        return {{}}
'''


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Writes a module into the working folder; the returned name is found nowhere else."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_names_are_the_files_and_importing_none_of_them():
    code = (
        "import sys\n"
        "from secateur.core.sockets import SOCKETS, names\n"
        "found = {socket: names(socket) for socket in SOCKETS}\n"
        "loaded = [m for m in sys.modules if m.count('.') == 2 and m.split('.')[1] in SOCKETS]\n"
        "print(found == {s: sorted(n) for s, n in found.items()}, loaded, 'torch' in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.split() == ["True", "[]", "False"], done.stderr


@pytest.mark.parametrize("socket", SOCKETS)
def test_every_name_is_found_and_leads_back_to_itself(socket):
    for name in names(socket):
        found = find(socket, name)
        assert issubclass(found, SOCKETS[socket])
        assert name_of(found) == name
        assert isinstance(found.paper, Paper) and found.paper.differs


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"no criterion is called 'magnitud'. Did you mean 'magnitude'\?"):
        find("criteria", "magnitud")
    with pytest.raises(UsageError, match="no criterion is called 'zzz'. Known: .*magnitude"):
        find("criteria", "zzz")
    with pytest.raises(UsageError, match=r"no socket is called 'criterions'. Did you mean 'criteria'\?"):
        find("criterions", "magnitude")
    with pytest.raises(UsageError, match="no socket is called 'zzz'. Known: criteria, probes, rules"):
        names("zzz")


def test_private_files_and_paths_are_no_names():
    for name in ("__init__", "../core/task", "_private", "", "magnitude.Magnitude"):
        with pytest.raises(UsageError, match="no criterion is called"):
            find("criteria", name)


def test_a_class_in_the_working_folder_is_accepted_where_a_name_is(plug_in):
    module = plug_in("my_scores_of_test", METHOD.format(name="Mine"))
    path = list(sys.path)

    found = find("criteria", f"{module}:Mine")

    assert issubclass(found, Criterion) and found.__name__ == "Mine"
    assert name_of(found) == name_of(found()) == "my_scores_of_test:Mine"
    assert sys.path == path, "the working folder stays on the path only while it is searched"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_module_of_test:Mine", r"cannot import 'no_such_module_of_test'.*Run from the folder that holds it"),
        ("collections:NoSuchThing", "'collections' has no 'NoSuchThing'. "),
        ("collections:OrderdDict", "Did you mean 'OrderedDict'"),
        ("collections:OrderedDict.nothing", "has no 'OrderedDict.nothing'"),
        ("collections:", "is not of the form 'package.module:name'"),
        (":Mine", "is not of the form"),
        ("os; print(1):x", "is not of the form"),
        ("collections:OrderedDict", "'collections:OrderedDict' is not a Criterion; it must be a class derived from"),
        ("math:pi", "is not a Criterion"),
        ("secateur.core.sockets:Probe", "is not a Criterion"),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path, says):
    with pytest.raises(UsageError, match=says):
        find("criteria", path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", "importing 'broken_of_test' for 'broken_of_test:Mine' failed: ZeroDivisionError"),
        ("def f(:", "failed: SyntaxError"),
        ("import no_such_dependency_of_test", "cannot import 'broken_of_test'.*no_such_dependency_of_test"),
    ],
)
def test_a_module_that_breaks_while_it_is_imported_is_one_clear_error(plug_in, text, says):
    with pytest.raises(UsageError, match=says):
        find("criteria", f"{plug_in('broken_of_test', text)}:Mine")


def test_an_object_inside_a_class_is_found():
    assert load_object("collections:OrderedDict.fromkeys")([1]) == {1: None}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Writes a file into the folder of criteria, for the length of a test."""
    import secateur.criteria

    monkeypatch.setattr(secateur.criteria, "__path__", secateur.criteria.__path__)
    secateur.criteria.__path__.append(str(tmp_path))
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    secateur.criteria.__path__.remove(str(tmp_path))
    for name in [m for m in sys.modules if m.startswith("secateur.criteria.of_test_")]:
        del sys.modules[name]
        monkeypatch.delattr(secateur.criteria, name.rpartition(".")[2], raising=False)


def test_a_file_is_a_method_without_registration(inside):
    inside("of_test_one", METHOD.format(name="One"))

    assert "of_test_one" in names("criteria")
    assert name_of(find("criteria", "of_test_one")) == "of_test_one"


@pytest.mark.parametrize(("kind", "text"), [(0, "x = 1"), (2, METHOD.format(name="One") + METHOD.format(name="Two"))])
def test_a_file_defines_exactly_one_method(inside, kind, text):
    inside(f"of_test_{kind}", text)

    with pytest.raises(UsageError, match=f"of_test_{kind}.py must define exactly one Criterion, it defines {kind}"):
        find("criteria", f"of_test_{kind}")


def test_imported_methods_do_not_count_as_defined(inside):
    inside("of_test_base", METHOD.format(name="Base"))
    inside("of_test_derived", "from secateur.criteria.of_test_base import Base\nclass Derived(Base): pass")

    assert find("criteria", "of_test_derived").__name__ == "Derived"


def test_abstract_methods_cannot_be_made():
    for kind in (Criterion, Probe):
        with pytest.raises(TypeError, match="abstract"):
            kind()
    assert issubclass(Criterion, Method) and Criterion.needs == {"gradients"}


@pytest.mark.parametrize("value", [1.5, float("inf"), float("-inf"), 0.0])
def test_a_reading_goes_to_json_and_back(value):
    import json

    reading = Reading(value, "%", stderr=0.1, low=float("-inf"), n=3, parts={"a": float("inf"), "b": 1.0}, note="why")

    assert Reading.from_json(json.loads(json.dumps(reading.to_json(), allow_nan=False))) == reading
