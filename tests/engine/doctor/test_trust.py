"""Folders and files of strangers: no code that they name is run, no file elsewhere is read or written."""

import json
import os
import resource
import signal

import pytest
import torch
from tests.engine.doctor import clinic

import secateur
from secateur.core.errors import FileError, SecateurError, UsageError
from secateur.core.files import file_digest
from secateur.core.masks import Masks
from secateur.engine.doctor import Beside, examine, mend
from secateur.engine.folder import Artefact, card_digest
from secateur.engine.foreign.adopting import adopt
from secateur.nets import build


@pytest.fixture
def folder(tmp_path):
    """A network of this library as a step writes it, with one weight that its mask prunes."""
    torch.manual_seed(0)
    net = build("lenet_300_100", (1, 8, 8), 10)
    mask = torch.ones(100, 300, dtype=torch.bool)
    mask[0, 0] = False
    with torch.no_grad():
        net.fc2.weight[0, 0] = 0
    secateur.save(tmp_path / "run", net, Masks({"fc2.weight": mask}))
    return tmp_path / "run"


def seal(folder, **files):
    """The card as whoever made the folder can write it: any names, and digests that agree."""
    card = json.loads((folder / "card.json").read_text())
    card["files"] = {name: file_digest(folder / name) for name in card["files"]} | files
    (folder / "card.json").write_text(json.dumps({**card, "digest": card_digest(card)}))


def named(folder, use, **options):
    """Let ``structure.json`` name another network."""
    table = json.loads((folder / "structure.json").read_text())
    table["model"] = {**table["model"], "use": use, "options": options}
    (folder / "structure.json").write_text(json.dumps(table))
    seal(folder)


@pytest.mark.parametrize("use", ["os:system", "torch.fx:GraphModule", "../evil.pt2", "/tmp/evil.pt2"])
def test_code_that_a_folder_names_is_not_run(folder, tmp_path, use):
    """Only networks of this library are built without being asked for."""
    named(folder, use, command=f"touch {tmp_path / 'ran'}")

    for data in ("digits", None):
        if data:
            with pytest.raises(UsageError, match="name it yourself with `--net`"):
                examine(folder, Beside(data=data))
        else:
            assert clinic.kinds(examine(folder)) == []

    assert not (tmp_path / "ran").exists()


def test_a_network_of_the_library_is_built_by_its_name(folder):
    named(folder, "lenet_300_100", inputs=64, outputs=10)

    assert clinic.kinds(examine(folder, Beside(data="digits"))) == []


@pytest.mark.parametrize(
    "name", ["../secret", "/tmp/secret", "sub/secret", "..", ".", "", "card.json", "link", "pipe", "a\nb"]
)
def test_files_of_a_card_are_its_own(folder, tmp_path, monkeypatch, name):
    """Nothing outside the copy is written, though the digests agree; nothing waits for a pipe."""
    (tmp_path / "secret").write_text("theirs")
    (folder / "sub").mkdir()
    (folder / "sub" / "secret").write_text("theirs")
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    seal(folder, **{name: file_digest(tmp_path / "secret")})

    with pytest.raises(FileError, match="no plain file in its own folder"):
        mend(folder, tmp_path / "here" / "out")

    assert not list((tmp_path / "here").iterdir()) and (tmp_path / "secret").read_text() == "theirs"


@pytest.mark.parametrize("table", [[], {}, {"model": []}, {"model": {"use": 3}}, 5])
def test_a_structure_that_is_none(folder, table):
    (folder / "structure.json").write_text(json.dumps(table))
    seal(folder)

    with pytest.raises(FileError, match="does not say how to build"):
        examine(folder)


def test_a_folder_that_was_adopted_without_a_class(tmp_path):
    """Weights, masks and a card: examined, mended to a folder of the same kind."""
    state = clinic.state_of(clinic.fresh("lenet_300_100"))
    state["fc1.weight"][state["fc1.weight"].abs() < 0.05] = 0
    adopt(clinic.write(state, tmp_path / "w.pt"), tmp_path / "a")
    good = Masks.load(tmp_path / "a" / "masks.safetensors")
    state["fc1.weight"][~good["fc1.weight"]] = 0.5
    clinic.write(state, tmp_path / "a" / "weights.safetensors")
    seal(tmp_path / "a")

    report = examine(tmp_path / "a")
    done = mend(tmp_path / "a", tmp_path / "b")

    count = int((~good["fc1.weight"]).sum())
    assert clinic.kinds(report) == [("mask not applied", ("fc1.weight",), count)] and not done.report.findings
    again = Artefact.open(tmp_path / "b", bare=True)
    assert torch.equal(again.state()["fc1.weight"] == 0, ~good["fc1.weight"]) and again.masks() == good
    net = {"net": "lenet_300_100", "options": {"model": clinic.NETS["lenet_300_100"][0]}}
    assert clinic.kinds(examine(tmp_path / "b", Beside(**net))) == []
    with pytest.raises(SecateurError):
        Artefact.open(tmp_path / "b")


@pytest.mark.parametrize("beside", ["masks.safetensors", "config.json"])
def test_a_copy_that_cannot_be_examined_is_gone(tmp_path, beside):
    """What lies at its place makes it unreadable: nothing is left of the copy, and the other file is as it was."""
    path = clinic.write(clinic.state_of(clinic.fresh("lenet_300_100")), tmp_path / "weights.safetensors")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / beside).write_text("damaged")

    with pytest.raises(FileError, match=beside):
        mend(path, tmp_path / "new" / "weights.safetensors")

    assert [p.name for p in (tmp_path / "new").iterdir()] == [beside]
    assert (tmp_path / "new" / beside).read_text() == "damaged"


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path):
    """The disk takes the small files and not the large one: no half of a folder, under whatever name."""
    (tmp_path / "new").mkdir()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(FileError, match="cannot write"):
            mend(folder, tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("out", ["w.safetensors", "w.onnx", "w.pt2"])
def test_a_name_of_another_format_is_refused_before_anything_is_written(tmp_path, out):
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "c.pt")

    with pytest.raises(SecateurError, match="format"):
        mend(tmp_path / "c.pt", tmp_path / out)

    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_shards_without_settings(tmp_path):
    """An index in a folder that has no config.json: the copy is a folder, and is examined like one."""
    (tmp_path / "in").mkdir()
    bad = torch.randn(8, 8)
    bad[0, 0] = 1e-41
    clinic.write({"a.weight": bad}, tmp_path / "in" / "one.safetensors")
    clinic.write({"b.weight": torch.randn(8, 8)}, tmp_path / "in" / "two.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}))

    done = mend(index, tmp_path / "out")

    assert [f.kind for f in done.fixed] == ["subnormal"] and clinic.kinds(examine(tmp_path / "out")) == []
