"""The same faults in every format that is read: found, and mended in the same format."""

import json

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from tests.engine.doctor import clinic
from torch import nn

import secateur
from secateur.core.errors import SecateurError, UsageError
from secateur.core.files import file_digest
from secateur.core.masks import Masks
from secateur.engine.doctor import Beside, examine, mend
from secateur.engine.folder import Artefact, card_digest
from secateur.engine.foreign import read


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def planted():
    """A network with decayed zeros in one tensor and subnormals in another; what they should be."""
    torch.manual_seed(0)
    net = Net()
    gone = net.fc1.weight.detach().abs() < 0.1
    good = clinic.state_of(net)
    with torch.no_grad():
        net.fc1.weight[gone] *= 1e-10
        net.fc2.bias[:3] = 1e-40
    good["fc1.weight"][gone] = 0
    good["fc2.bias"][:3] = 0
    return net, good, int(gone.sum())


def as_safetensors(net, folder):
    return clinic.write(clinic.state_of(net), folder / "w.safetensors")


def as_torch(net, folder):
    return clinic.write({"model": net.state_dict(), "epoch": 2}, folder / "w.pt")


def as_old_torch(net, folder):
    torch.save(net.state_dict(), folder / "w.pth", _use_new_zipfile_serialization=False)
    return folder / "w.pth"


def as_shards(net, folder):
    state, where = clinic.state_of(net), {}
    (folder / "hub").mkdir()
    for number in (1, 2):
        some = {n: t for n, t in state.items() if n.startswith(f"fc{number}")}
        where |= dict.fromkeys(some, f"model-{number}.safetensors")
        save_file(some, folder / "hub" / f"model-{number}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "hub" / "config.json").write_text("{}")
    return folder / "hub"


def as_onnx(net, folder):
    tensors = [numpy_helper.from_array(t.numpy(), n) for n, t in clinic.state_of(net).items()]
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "fc2.weight", "fc2.bias"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [None, 16]), ("y", [None, 8]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph), folder / "w.onnx")
    return folder / "w.onnx"


def as_program(net, folder):
    torch.export.save(torch.export.export(net, (torch.zeros(2, 16),)), folder / "w.pt2")
    return folder / "w.pt2"


FORMATS = [as_safetensors, as_torch, as_old_torch, as_shards, as_onnx, as_program]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_found_and_mended(tmp_path, form):
    net, good, count = planted()
    path = form(net, tmp_path)

    report = examine(path)
    done = mend(path, tmp_path / "out" / path.name)

    assert sorted(clinic.kinds(report)) == [("near zero", ("fc1.weight",), count), ("subnormal", ("fc2.bias",), 3)]
    assert [f.kind for f in done.fixed] == ["near zero", "subnormal"] and not done.report.findings
    assert clinic.same(read(tmp_path / "out" / path.name).tensors, good)
    assert read(tmp_path / "out" / path.name).kind == report.kind
    assert sorted(clinic.kinds(examine(path))) == sorted(clinic.kinds(report))  # the original is as it was


def seal(folder):
    """Write the card anew over the files as they are now."""
    card = json.loads((folder / "card.json").read_text())
    card["files"] = {name: file_digest(folder / name) for name in card["files"]}
    (folder / "card.json").write_text(json.dumps({**card, "digest": card_digest(card)}))


def test_a_folder(tmp_path):
    """The copy is a folder that loads, with a note in its card; everything else is copied."""
    net, good, count = planted()
    keep = Masks({"fc1.weight": good["fc1.weight"] != 0, "fc2.weight": torch.ones(8, 24, dtype=torch.bool)})
    with torch.no_grad():
        net.load_state_dict(good)
    secateur.save(tmp_path / "a", net, keep, notes={"seconds": 5})
    leaking = clinic.state_of(net)
    leaking["fc1.weight"][good["fc1.weight"] == 0] = 0.25
    save_file(leaking, tmp_path / "a" / "weights.safetensors")
    seal(tmp_path / "a")

    report = examine(tmp_path / "a")
    done = mend(tmp_path / "a", tmp_path / "b")

    assert clinic.kinds(report) == [("mask not applied", ("fc1.weight",), count)] and not done.report.findings
    loaded, masks = secateur.load(tmp_path / "b", Net())
    assert clinic.same(clinic.state_of(loaded), good) and masks == keep
    card = Artefact.open(tmp_path / "b").card
    assert card["seconds"] == 5 and len(card["mended"]["what"]) == 1
    for name in ("structure.json", "recipe.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_ties_that_a_folder_tells(tmp_path):
    """Its two names of one tensor differ in a few values: known to be tied, whatever they hold."""
    net = clinic.fresh("gpt_tiny")
    secateur.save(tmp_path / "a", net)
    state = clinic.state_of(net)
    one, other = (name for name in state if state[name].shape == (40, 32))
    state[other] = torch.where(state[other].abs() < state[other].abs().median(), 0.0, state[other])
    save_file(state, tmp_path / "a" / "weights.safetensors")
    seal(tmp_path / "a")

    report = examine(tmp_path / "a")
    done = mend(tmp_path / "a", tmp_path / "b")

    assert clinic.kinds(report) == [("ties apart", (one, other), 40 * 32 // 2 - 1)]
    assert report.findings[0].what.startswith("the network ties") and not done.report.findings
    assert torch.equal(Artefact.open(tmp_path / "b").state()[one], state[other])


def test_a_file_with_masks_beside_it(tmp_path):
    """A copy called weights.safetensors in a folder of its own gets its masks too."""
    net, good, _ = planted()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    clinic.write(clinic.state_of(net), tmp_path / "one" / "weights.safetensors")
    keep = Masks({"fc1.weight": good["fc1.weight"] != 0})
    keep.save(tmp_path / "one" / "masks.safetensors")

    done = mend(tmp_path / "one" / "weights.safetensors", tmp_path / "two" / "weights.safetensors")

    assert {f.kind for f in done.fixed} == {"mask not applied", "subnormal"} and done.report.masked
    assert Masks.load(tmp_path / "two" / "masks.safetensors") == keep


def test_the_original_is_never_the_copy(tmp_path):
    """Not by its own name, a link, another spelling, nor a file that is there."""
    path = as_safetensors(planted()[0], tmp_path)
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    clinic.write(planted()[1], tmp_path / "ema.safetensors")
    before = path.read_bytes()
    for out in ("w.safetensors", "link.safetensors", "x/../w.safetensors", "there.safetensors", "ema.safetensors"):
        with pytest.raises(UsageError, match="--fix"):
            mend(path, tmp_path / out, Beside(ema=tmp_path / "ema.safetensors"))
    with pytest.raises(UsageError, match="lies inside"):
        mend(as_shards(planted()[0], tmp_path), tmp_path / "hub" / "out")

    assert path.read_bytes() == before and (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_nothing_is_left_behind_when_the_copy_cannot_be_written(tmp_path):
    path = as_safetensors(planted()[0], tmp_path)
    (tmp_path / "file").write_text("")

    with pytest.raises(SecateurError):
        mend(path, tmp_path / "file" / "out.safetensors")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "w.safetensors"]


def test_names_in_a_graph_are_its_own(tmp_path):
    """A prefix in ONNX harms nobody."""
    net = Net()
    path = as_onnx(net, tmp_path)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.name = f"module.{tensor.name}"
    onnx.save(model, path)

    assert clinic.kinds(examine(path)) == []


def test_a_matrix_that_lies_the_other_way_round(tmp_path):
    """MatMul of ONNX has inputs along the first dimension; its 2:4 groups run along it."""
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    groups = weight.t().reshape(-1, 4)
    groups[torch.arange(len(groups))[:, None], groups.abs().argsort(1)[:, :2]] = 0
    good = groups.reshape(16, 32).t().contiguous()
    bad = good.clone()
    bad[:4, 5] = torch.where(good[:4, 5] == 0, 1e-4, good[:4, 5])

    report = clinic.look({"proj.weight": bad}, tmp_path / "w.safetensors")
    tensors, _ = clinic.treat(tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("broken N:M", ("proj.weight",), 1)]
    assert torch.equal(tensors["proj.weight"], good)


def test_what_a_graph_does_not_multiply_by_is_no_weight(tmp_path):
    """Scales, shifts, masks and untrained norms of ONNX have any shape and may be constant; matrices may not."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        "mask": torch.ones(1, 1, 4, 4), "layer_scale": torch.full((16, 1, 1), 1e-6),
        "norm.weight": torch.ones(16, 1, 1),
        "conv": torch.randn(16, 16, 1, 1, generator=random), "linear": torch.full((4, 8), 0.5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"]), helper.make_node("Mul", ["a", "layer_scale"], ["b"]),
        helper.make_node("Mul", ["b", "norm.weight"], ["c"]), helper.make_node("Mul", ["c", "mask"], ["d"]),
        helper.make_node("MatMul", ["d", "linear"], ["y"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16, 4, k]) for n, k in (("x", 4), ("y", 8))]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(t.numpy(), n) for n, t in tensors.items()]
    )
    onnx.save(helper.make_model(graph), tmp_path / "w.onnx")

    assert clinic.kinds(examine(tmp_path / "w.onnx")) == [("constant", ("linear",), 32)]
