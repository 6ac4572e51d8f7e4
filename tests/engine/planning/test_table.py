"""The table comes back as it was saved; a damaged one counts for nothing; processes that add at once lose nothing."""

import json
import multiprocessing
import os

import pytest

from secateur.core.errors import FileError
from secateur.engine.planning.table import FORMAT, KEPT, CostTable, Machine, Point

HERE = Machine("a processor", "avx2", 2, "0123456789ab")
OTHER = Machine("a processor", "avx2", 1, "0123456789ab")


def filled(folder):
    table = CostTable.open(folder)
    table.add(HERE, "conv", "unstructured", "0.1", Point(0.1015625, 0.25, 0.07, (1.0, 2.0)))
    table.add(HERE, "conv", "dense", "1", Point(1.0, 1.5, 0.07, (1.0, 2.0)))
    table.add(OTHER, "conv", "dense", "1", Point(1.0, 3.0, 0.07))
    table.check(HERE, "a network", 1.0, 1.1)
    table.engine("torch 9 | a processor | 2 threads", "a network", 4.0)
    table.save()
    return table


def test_what_is_saved_comes_back(tmp_path):
    made = filled(tmp_path)

    found = CostTable.open(tmp_path)

    assert found.points == made.points and found.checks == made.checks and not found.note
    assert found.checks == {str(HERE): {"a network": [(1.0, 1.1)]}}
    assert found.engines == {"torch 9 | a processor | 2 threads": {"a network": 4.0}}
    assert found.lookup(HERE, "conv", "unstructured") == {"0.1": Point(0.1015625, 0.25, 0.07, (1.0, 2.0))}
    assert found.lookup(OTHER, "conv", "unstructured") == {}
    assert found.lookup(Machine("a processor", "avx2", 2, "another core"), "conv", "dense") == {}


def test_a_table_that_learned_nothing_writes_nothing(tmp_path):
    CostTable.open(tmp_path).save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "point", [Point(0.5, float("nan"), 1.0), Point(0.5, 1.0, 0.0), Point(1.5, 1.0, 1.0), Point(0.5, -1.0, 1.0)]
)
def test_figures_that_no_clock_gives_are_not_kept(tmp_path, point):
    table = CostTable.open(tmp_path)
    table.add(HERE, "conv", "dense", "1", point)
    assert not table.points


def test_checks_of_layers_that_were_measured_anew_no_longer_count(tmp_path):
    table = filled(tmp_path)
    table.check(HERE, "another", 2.0, 2.5)
    table.check(OTHER, "a network", 3.0, 3.5)
    table.outdate(HERE, "a network")
    table.check(HERE, "a network", 5.0, 5.5)

    table.save()

    wanted = {str(HERE): {"a network": [(5.0, 5.5)], "another": [(2.0, 2.5)]}, str(OTHER): {"a network": [(3.0, 3.5)]}}
    assert CostTable.open(tmp_path).checks == table.checks == wanted


@pytest.mark.parametrize("pair", [(1.0, 0.0), (0.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_checks_that_no_clock_gives_are_not_kept(tmp_path, pair):
    table = CostTable.open(tmp_path)
    table.check(HERE, "a network", *pair)
    assert not table.checks


def test_only_the_newest_checks_of_a_network_stay(tmp_path):
    table = CostTable.open(tmp_path)
    for number in range(KEPT + 5):
        table.check(HERE, "a network", 1.0, 1.0 + number)
    table.save()

    kept = CostTable.open(tmp_path).checks[str(HERE)]["a network"]

    assert [measured for _, measured in kept] == [1.0 + number for number in range(5, KEPT + 5)]


def test_the_layers_of_the_version_before_count_and_its_checks_do_not(tmp_path):
    """Its checks were timed together with the layers, so they told too small an error."""
    points = {"conv": {"dense": {"1": [1.0, 1.5, 0.07]}}}
    before = {"format": "secateur-costs 1", "machines": {str(HERE): {"points": points, "checks": [[1.0, 1.01]]}}}
    (tmp_path / "costs.json").write_text(json.dumps(before))

    table = CostTable.open(tmp_path)

    assert not table.note and not table.checks
    assert table.lookup(HERE, "conv", "dense") == {"1": Point(1.0, 1.5, 0.07)}
    table.check(HERE, "a network", 1.0, 1.1)
    table.save()
    found = CostTable.open(tmp_path)
    assert found.points == table.points and found.checks == {str(HERE): {"a network": [(1.0, 1.1)]}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["costs.json", "costs.lock"]


def entry(points, checks=(), engines=()):
    machines = {"m": {"points": points, "checks": {"n": list(checks)}}}
    return {"format": FORMAT, "machines": machines, "engines": dict(engines)}


HOSTILE = {
    "not JSON": b"{",
    "not text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": b"[]",
    "a number": b"17",
    "another format": json.dumps({"format": "secateur-costs 9", "machines": {}}).encode(),
    "no machines": json.dumps({"format": FORMAT}).encode(),
    "machines are a list": json.dumps({"format": FORMAT, "machines": []}).encode(),
    "a point is text": json.dumps(entry({"k": {"dense": {"1": "abc"}}})).encode(),
    "a point is short": json.dumps(entry({"k": {"dense": {"1": [1.0]}}})).encode(),
    "NaN": json.dumps(entry({"k": {"dense": {"1": [1.0, float("nan"), 1.0]}}})).encode(),
    "infinite": json.dumps(entry({"k": {"dense": {"1": [1.0, 7.5, 1.0]}}})).replace("7.5", "1e999").encode(),
    "negative": json.dumps(entry({"k": {"dense": {"1": [1.0, -1.0, 1.0]}}})).encode(),
    "density of 2": json.dumps(entry({"k": {"dense": {"1": [2.0, 1.0, 1.0]}}})).encode(),
    "checks are a list": json.dumps(entry({})).replace('{"n": []}', "[[1, 1]]").encode(),
    "no engines": json.dumps({"format": FORMAT, "machines": {}}).encode(),
    "an engine of 0": json.dumps(entry({}, [], {"torch": {"n": 0.0}})).encode(),
    "an engine of text": json.dumps(entry({}, [], {"torch": "n"})).encode(),
    "a check of 0": json.dumps(entry({}, [[1.0, 0.0]])).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_table_counts_for_nothing_and_is_moved_aside(tmp_path, content):
    place = tmp_path / "costs.json"
    place.write_bytes(content)

    table = CostTable.open(tmp_path)

    assert not table.points and not table.checks and not table.engines
    assert str(place) in table.note and "not used" in table.note and "costs.json.aside" in table.note
    assert place.read_bytes() == content
    table.add(HERE, "conv", "dense", "1", Point(1.0, 1.5, 0.07))
    table.save()
    assert CostTable.open(tmp_path).points == {str(HERE): {"conv": {"dense": {"1": Point(1.0, 1.5, 0.07)}}}}
    assert (tmp_path / "costs.json.aside").read_bytes() == content


def test_what_was_moved_aside_before_stays(tmp_path):
    for number, content in enumerate((b"one", b"two", b"three"), 1):
        (tmp_path / "costs.json").write_bytes(content)
        table = CostTable.open(tmp_path)
        table.add(HERE, "conv", "dense", "1", Point(1.0, float(number), 0.07))
        table.save()

    aside = {path.name: path.read_bytes() for path in tmp_path.glob("costs.json.*")}
    assert aside == {
        "costs.json.aside": b"one", "costs.json.aside-2": b"two", "costs.json.aside-3": b"three",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    table = CostTable.open(tmp_path / "file")
    table.add(HERE, "conv", "dense", "1", Point(1.0, 1.5, 0.07))

    with pytest.raises(FileError, match="SECATEUR_CACHE"):
        table.save()

    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    filled(tmp_path)
    before = (tmp_path / "costs.json").read_bytes()
    table = CostTable.open(tmp_path)
    table.add(HERE, "linear", "dense", "1", Point(1.0, 1.5, 0.07))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left"):
            table.save()

    assert (tmp_path / "costs.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["costs.json", "costs.lock"]
    table.save()  # what was not written is not lost either
    assert CostTable.open(tmp_path).lookup(HERE, "linear", "dense")


def _add(folder, who, count):
    for number in range(count):
        table = CostTable.open(folder)
        table.add(HERE, f"{who} {number}", "dense", "1", Point(1.0, 1.0 + number, 0.07))
        table.check(HERE, who, 1.0, 1.0 + number)
        table.save()


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_add_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, who, 15)) for who in ("one", "two", "three")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)

    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = CostTable.open(tmp_path)
    assert {f"{who} {n}" for who in ("one", "two", "three") for n in range(15)} == set(found.points[str(HERE)])
    assert {who: len(pairs) for who, pairs in found.checks[str(HERE)].items()} == {"one": 15, "two": 15, "three": 15}
