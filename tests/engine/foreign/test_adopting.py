"""Orphaned formats become folders: zero for zero, with the outputs of the library they come from."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tests.engine.foreign.test_reading import by_hand, folder_of, random, settings, two_four
from torch import nn
from torch.nn.utils import parametrize, prune

import secateur
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.engine.folder import Artefact
from secateur.engine.foreign.adopting import Network, adopt
from secateur.nets import build


class Small(nn.Module):
    """A convolutional network with BatchNorm and two linear layers."""

    def __init__(self, width: int = 6, hidden: int = 10, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, groups=width)
        self.fc1 = nn.Linear(width * 16, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.depth(x)).flatten(1)
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


class Plain(nn.Module):
    """Two layers behind a Sequential."""

    def __init__(self, hidden: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, x):
        return self.body(x)


SMALL = Network(f"{__name__}:Small", shape=(1, 6, 6))
PLAIN = Network(f"{__name__}:Plain", shape=(4,))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The classes are found under the name that the folder writes down."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__, fromlist=["x"]))


def made(kind=Small, seed=0, **options):
    torch.manual_seed(seed)
    net = kind(**options)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return net.eval()


def pruned(net, share=0.6):
    """The smallest weights of every layer set to zero by torch itself."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", amount=share)
    return net


def same_outputs(folder, net, shape, **found):
    """The folder's network computes what the original does."""
    x = random(3, *shape, seed=4)
    loaded, masks = secateur.load(folder, **found)
    torch.testing.assert_close(loaded.eval()(x), net(x))
    return loaded, masks


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_pairs_of_torch_prune(tmp_path, prefix):
    """``weight_orig * weight_mask`` is the weight, and the mask is kept though a kept weight is zero."""
    net = pruned(made())
    with torch.no_grad():
        net.fc2.weight_orig[0, net.fc2.weight_mask[0].argmax()] = 0.0
    net(random(1, 1, 6, 6))  # torch multiplies when the network is called
    torch.save({prefix + n: t for n, t in net.state_dict().items()}, tmp_path / "a.pt")

    done = adopt(tmp_path / "a.pt", tmp_path / "out", SMALL)

    _, masks = same_outputs(tmp_path / "out", net, (1, 6, 6))
    for name, module in net.named_modules():
        if hasattr(module, "weight_mask"):
            assert torch.equal(masks[f"{name}.weight"], module.weight_mask.bool())
    assert not masks["fc2.weight"].logical_and(net.fc2.weight == 0).sum() == 0
    assert done.kept == sum(int(b.sum()) for n, b in net.named_buffers() if n.endswith("_mask"))
    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == set(made().state_dict())


class Times(nn.Module):
    """A mask as a parametrization."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_parametrizations_by_a_mask(tmp_path):
    """``parametrizations.weight.original`` and the mask beside it are multiplied out."""
    net = made(Plain)
    mask = random(8, 4, keep=0.5, seed=2) != 0
    parametrize.register_parametrization(net.body[0], "weight", Times(mask))
    torch.save(net.state_dict(), tmp_path / "a.pt")

    done = adopt(tmp_path / "a.pt", tmp_path / "out", PLAIN)

    _, masks = same_outputs(tmp_path / "out", net, (4,))
    assert torch.equal(masks["body.0.weight"], mask)
    assert any("parametrizations" in note for note in done.notes)


def test_other_parametrizations_are_refused(tmp_path):
    """What weight norm computes is not in the file."""
    net = made(Plain)
    parametrizations = nn.utils.parametrizations
    parametrizations.weight_norm(net.body[0])
    torch.save(net.state_dict(), tmp_path / "a.pt")

    with pytest.raises(FileError, match="`body.0.weight` is computed from .*original0.*remove_parametrizations"):
        adopt(tmp_path / "a.pt", tmp_path / "out", PLAIN)


def test_masks_that_are_none(tmp_path):
    """A mask with halves is a gate, and one of another shape belongs elsewhere."""
    torch.save({"w_orig": torch.ones(2, 2), "w_mask": torch.tensor([[0.5, 1], [0, 1]])}, tmp_path / "a.pt")
    torch.save({"w_orig": torch.ones(2, 2), "w_mask": torch.ones(3)}, tmp_path / "b.pt")

    for name, words in (("a.pt", "1 of 4 entries are neither"), ("b.pt", "has shape \\[3\\]")):
        with pytest.raises(FileError, match=words):
            adopt(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def export(net, path, shape, **options):
    torch.onnx.export(net, (random(1, *shape),), str(path), dynamo=False, input_names=["x"], **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("fold", [False, True])
def test_onnx_with_zeros(tmp_path, fold):
    """Names and shapes of the class, zeros as masks, outputs as ONNX Runtime gives them for the file itself."""
    net = made()
    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.data.mul_(random(*p.shape, keep=0.4, seed=len(name)).ne(0))
    training = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    export(net, tmp_path / "a.onnx", (1, 6, 6), do_constant_folding=fold, training=training)

    if fold:  # BatchNorm went into the convolution before it
        with pytest.raises(
            FileError, match="BatchNorm is folded.*`bn` the first.*`bn.weight` is not in the file.*leave"
        ):
            adopt(tmp_path / "a.onnx", tmp_path / "out", SMALL)
        unfolded = adopt(tmp_path / "a.onnx", tmp_path / "unfolded", replace(SMALL, unfold=True))
        assert unfolded.error is not None and unfolded.error < 1e-5
        _, masks = same_outputs(tmp_path / "unfolded", net, (1, 6, 6))
        assert all(torch.equal(masks[n], p != 0) for n, p in net.named_parameters() if n in masks)
        done = adopt(tmp_path / "a.onnx", tmp_path / "out")
        assert done.lacks and not (tmp_path / "out" / "structure.json").exists()
        masks = Masks.load(tmp_path / "out" / "masks.safetensors")
        assert torch.equal(masks["fc2.weight"], net.fc2.weight != 0)
        return
    done = adopt(tmp_path / "a.onnx", tmp_path / "out", SMALL)
    assert done.error is not None and done.error < 1e-5 and "ONNX Runtime" in done.compared
    _, masks = same_outputs(tmp_path / "out", net, (1, 6, 6))
    assert all(torch.equal(masks[n], p != 0) for n, p in net.named_parameters() if n in masks)


class Nested(nn.Module):
    """Rows within rows of layers, as many networks of others are built."""

    def __init__(self):
        super().__init__()
        row = [nn.Sequential(nn.Conv2d(n, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for n in (1, 4)]
        self.body = nn.Sequential(nn.Sequential(*row), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_of_rows_within_rows(tmp_path):
    """Folding loses the names of the layers; those of the nodes have the path, written in the exporter's own way."""
    net = made(Nested)
    export(net, tmp_path / "a.onnx", (1, 6, 6))

    done = adopt(tmp_path / "a.onnx", tmp_path / "out", Network(f"{__name__}:Nested", unfold=True))

    assert any("2 BatchNorm layers" in note for note in done.notes) and done.error is not None
    same_outputs(tmp_path / "out", net, (1, 6, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_whose_matrices_are_turned_and_have_no_names(tmp_path):
    """Exporters turn matrices and lose their names; the node's own name tells, and the outputs prove it."""
    net = made(Plain, hidden=4)  # square matrices: the shape alone could not tell
    turned = {"onnx::MatMul_7": net.body[0].weight, "onnx::MatMul_8": net.body[2].weight}
    nodes = []
    last = "x"
    for index, weight in zip((0, 2), turned, strict=True):
        nodes.append(onnx.helper.make_node("MatMul", [last, weight], [f"m{index}"], name=f"/body/body.{index}/MatMul"))
        out = "y" if index else "a"
        nodes.append(
            onnx.helper.make_node("Add", [f"body.{index}.bias", f"m{index}"], [out], name=f"/body/{index}/Add")
        )
        if not index:
            nodes.append(onnx.helper.make_node("Relu", ["a"], ["r"], name="/body/body.1/Relu"))
            last = "r"
    tensors = [numpy_helper.from_array(w.detach().numpy().T.copy(), n) for n, w in turned.items()]
    tensors += [numpy_helper.from_array(net.body[i].bias.detach().numpy(), f"body.{i}.bias") for i in (0, 2)]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, ["n", 4])], [value("y", 1, ["n", 4])], tensors)
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset]), tmp_path / "a.onnx")

    done = adopt(tmp_path / "a.onnx", tmp_path / "out", Network(PLAIN.use, {"hidden": 4}))

    assert done.error is not None and done.error < 1e-5
    same_outputs(tmp_path / "out", net, (4,))


def test_unfolding_needs_a_shape(tmp_path):
    """Which layer stands before a BatchNorm is found by running the class once."""
    torch.save(made().state_dict(), tmp_path / "a.pt")

    with pytest.raises(UsageError, match="pass --shape"):
        adopt(tmp_path / "a.pt", None, Network(SMALL.use, unfold=True))
    with pytest.raises(ModelError, match="does not run on inputs of shape"):
        adopt(tmp_path / "a.pt", None, Network(SMALL.use, shape=(3, 6, 6), unfold=True))


def test_onnx_that_computes_something_else(tmp_path):
    """Weights that fit and outputs that differ are refused."""
    weights = {
        "body.0.weight": random(8, 4),
        "body.0.bias": random(8),
        "body.2.weight": random(8, 8),
        "body.2.bias": random(8),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "body.0.weight", "body.0.bias"], ["a"], transB=1),
        onnx.helper.make_node("Tanh", ["a"], ["r"]),
        onnx.helper.make_node("Gemm", ["r", "body.2.weight", "body.2.bias"], ["y"], transB=1),
    ]
    tensors = [numpy_helper.from_array(t.numpy(), n) for n, t in weights.items()]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, ["n", 4])], [value("y", 1, ["n", 8])], tensors)
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset]), tmp_path / "a.onnx")

    with pytest.raises(FileError, match="outputs differ by .* computes something else"):
        adopt(tmp_path / "a.onnx", tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "structure"), [("sparse-bitmask", "unstructured"), ("sparse-24-bitmask", "2:4")])
def test_compressed_tensors(tmp_path, kind, structure):
    """Bits become zeros, and zeros masks."""
    net = made(Plain)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    for name in ("body.0.weight", "body.2.weight"):
        state[name] = (
            two_four(state[name]) if structure == "2:4" else state[name] * random(*state[name].shape, keep=0.3).ne(0)
        )
    parts = {n: t for n, t in state.items() if n.endswith("bias")}
    for base in ("body.0", "body.2"):
        parts |= {f"{base}.{part}": t for part, t in by_hand(state[f"{base}.weight"], structure).items()}
    place = folder_of(tmp_path / "hub", [parts], settings(kind, structure))

    adopt(place, tmp_path / "out", PLAIN)

    net.load_state_dict(state)
    _, masks = same_outputs(tmp_path / "out", net, (4,))
    assert torch.equal(masks["body.2.weight"], state["body.2.weight"] != 0)


def test_smaller_shapes_give_the_class_its_widths(tmp_path):
    """A network with fewer channels than its class, as removal of units leaves it, computes the same when adopted."""
    net = made(width=4, hidden=7)
    torch.save(net.state_dict(), tmp_path / "a.pt")

    done = adopt(tmp_path / "a.pt", tmp_path / "out", SMALL)

    loaded, _ = same_outputs(tmp_path / "out", net, (1, 6, 6))
    assert (loaded.conv.out_channels, loaded.depth.groups, loaded.bn.num_features) == (4, 4, 4)
    assert (loaded.fc1.in_features, loaded.fc1.out_features, loaded.norm.normalized_shape) == (64, 7, (7,))
    assert any("took their widths" in note for note in done.notes)
    same_outputs(tmp_path / "out", net, (1, 6, 6), model=Small)


class Heads(nn.Module):
    """Attention, whose shapes do not tell how many heads there are."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_shapes_that_do_not_tell_are_named(tmp_path):
    """Attention with fewer rows could have lost heads or dimensions of each."""
    torch.save(made(Heads, size=4).state_dict(), tmp_path / "a.pt")

    with pytest.raises(FileError, match="`attention.in_proj_weight` is \\[12, 4\\].*MultiheadAttention do not tell"):
        adopt(tmp_path / "a.pt", tmp_path / "out", Network(f"{__name__}:Heads"))
    adopt(tmp_path / "a.pt", tmp_path / "out", Network(f"{__name__}:Heads", {"size": 4}))


def test_widths_that_do_not_run_are_told(tmp_path):
    """Shapes that fit module by module, of a network that cannot compute with them."""
    state = made().state_dict()
    state["fc1.weight"] = state["fc1.weight"][:, :50]
    torch.save(state, tmp_path / "a.pt")

    with pytest.raises(ModelError, match="does not run on inputs of shape"):
        adopt(tmp_path / "a.pt", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_names_that_do_not_fit_are_listed(tmp_path):
    """The first ten are told, and how many there are."""
    torch.save({f"x{i}": torch.ones(2, 2) for i in range(30)}, tmp_path / "a.pt")

    with pytest.raises(FileError) as caught:
        adopt(tmp_path / "a.pt", tmp_path / "out", SMALL)

    words = str(caught.value)
    own = [name for name in made().state_dict() if "num_batches" not in name]
    assert all(f"`{name}` is not in the file" in words for name in own[:10])
    assert f"and {len(own) + 20} more ({len(own)} missing, 30 unknown, 0 of other dimensions)" in words


def test_plain_weights_without_a_class(tmp_path):
    """Weights and masks are there, the card says what is not, and the class can come later."""
    net = made()
    net.fc1.weight.data.mul_(random(10, 96, keep=0.2).ne(0))
    net.fc2.weight.data.zero_()
    save_file(net.state_dict(), tmp_path / "a.safetensors")

    done = adopt(tmp_path / "a.safetensors", tmp_path / "out")

    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "card.json",
        "masks.safetensors",
        "weights.safetensors",
    ]
    assert card["lacks"] == done.lacks and "structure.json" in done.lacks[0]
    assert card["left_alone"]["fc2.weight"] == "it has nothing but zeros"
    masks = Masks.load(tmp_path / "out" / "masks.safetensors")
    assert list(masks) == ["fc1.weight"] and torch.equal(masks["fc1.weight"], net.fc1.weight != 0)
    assert done.zeros == sum(int((t == 0).sum()) for t in net.state_dict().values())
    again = adopt(tmp_path / "out", tmp_path / "whole", SMALL)
    assert any("masks.safetensors" in note for note in again.notes)
    same_outputs(tmp_path / "whole", net, (1, 6, 6))


def test_what_is_written_is_an_artefact(tmp_path):
    """A network of secateur.nets, adopted, opens by every digest and can be pruned further."""
    torch.manual_seed(0)
    net = build("mlp", (1, 8, 8), 10, widths=(12, 9))
    net.fc1.weight.data.mul_(random(12, 64, keep=0.5).ne(0))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    network = Network("mlp", {"widths": [12, 9]}, (1, 8, 8), 10)

    dry = adopt(tmp_path / "a.pt", None, network)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and dry.folder == ""
    done = adopt(tmp_path / "a.pt", tmp_path / "out", network)

    assert {**dry.to_json(), "folder": str(tmp_path / "out")} == done.to_json()
    artefact = Artefact.open(tmp_path / "out")
    assert artefact.card["from"]["kind"] == "torch" and artefact.card["kept"] == done.kept
    assert torch.equal(artefact.masks()["fc1.weight"], net.fc1.weight != 0)
    with pytest.raises(FileError, match="a folder of this library already"):
        adopt(tmp_path / "out", tmp_path / "again", network)
    with pytest.raises(FileError, match="is there already"):
        adopt(tmp_path / "a.pt", tmp_path / "out", network)


def test_the_averaged_copy_can_be_adopted_instead(tmp_path):
    """By the name of its entry; a wrong one is told with those there are."""
    net, average = made(Plain), made(Plain, seed=1)
    torch.save({"model": net.state_dict(), "ema": average.state_dict()}, tmp_path / "a.pt")

    adopt(tmp_path / "a.pt", tmp_path / "out", PLAIN, entry="ema")

    same_outputs(tmp_path / "out", average, (4,))
    with pytest.raises(FileError, match="no further state dict called 'emma'; there are: ema"):
        adopt(tmp_path / "a.pt", tmp_path / "b", PLAIN, entry="emma")


def test_nothing_is_adopted_that_is_not_finite(tmp_path):
    """NaN would be counted as kept."""
    save_file({"w": torch.tensor([[1.0, float("nan")]])}, tmp_path / "a.safetensors")

    with pytest.raises(ModelError, match="1 of 2 weights of `w` are NaN"):
        adopt(tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "AutoModel"])
def test_folders_of_hugging_face(tmp_path, kind):
    """A pruned transformer, its head tied, or its base alone; built offline from its settings."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    net = (transformers.BertModel if kind == "AutoModel" else transformers.BertForMaskedLM)(config).eval()
    for name, p in net.named_parameters():
        if name.endswith("dense.weight"):
            p.data.mul_(random(*p.shape, keep=0.3, seed=3).ne(0))
    net.save_pretrained(tmp_path / "hub")

    done = adopt(tmp_path / "hub", tmp_path / "out", Network(f"transformers:{kind}"))

    loaded, masks = secateur.load(tmp_path / "out")
    x = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], net(x)[0])
    name = next(n for n in masks if n.endswith("intermediate.dense.weight"))
    assert torch.equal(masks[name], dict(net.named_parameters())[name] != 0)
    assert done.compared.startswith("of the folder")


def test_hugging_face_is_told_what_it_lacks(tmp_path):
    """No settings, no such class, code of their own."""
    place = folder_of(tmp_path / "hub", [{"a.weight": random(3, 4)}])
    save_file({"a.weight": random(3, 4)}, tmp_path / "a.safetensors")

    with pytest.raises(UsageError, match="needs the config.json"):
        adopt(tmp_path / "a.safetensors", None, Network("transformers:AutoModel"))
    with pytest.raises((UsageError, ModelError), match="no class 'NoModel'"):
        adopt(place, None, Network("transformers:NoModel"))
    with pytest.raises(ModelError, match="cannot build AutoModel"):
        adopt(place, None, Network("transformers:AutoModel"))
    (place / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UsageError, match="code of its own"):
        adopt(place, None, Network("transformers:AutoModel"))


def test_programs_of_torch_export(tmp_path):
    """Weights of a .pt2 file in the class it was made from."""
    net = made(Plain)
    net.body[0].weight.data.mul_(random(8, 4, keep=0.5).ne(0))
    torch.export.save(torch.export.export(net, (random(2, 4),)), tmp_path / "a.pt2")

    adopt(tmp_path / "a.pt2", tmp_path / "out", PLAIN)

    _, masks = same_outputs(tmp_path / "out", net, (4,))
    assert torch.equal(masks["body.0.weight"], net.body[0].weight != 0)
    assert np.isclose(masks.sparsity, float((net.body[0].weight == 0).sum()) / (32 + 64))
