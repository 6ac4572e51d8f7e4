"""Exports: the file computes what the network does, keeps its zeros, and nothing is left of one that does not."""

import copy
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import DataError, FileError, MaskError, ModelError, UsageError
from secateur.core.files import file_digest
from secateur.core.masks import Masks
from secateur.engine.exporting_files import check_zeros
from secateur.nets import build
from secateur.runtime import lower_export
from secateur.surgery import analyse, shrink

QUICK = {"rounds": 1, "seconds": 0.001, "threads": 1}
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see secateur[export]")
KINDS = [pytest.param("onnx", marks=needs_onnx), "pt2"]


def sparse(net):
    """The network with about two thirds of its weights at zero."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=drawn))
                p.mul_(torch.rand(p.shape, generator=drawn) < 1 / 3)
    return net


def small():
    return sparse(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))


def examples(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def run_file(path, *inputs):
    """What another program gets from the file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs).detach().numpy()
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]


def in_doubles(net, x):
    """The network's definition, computed in float64."""
    with torch.no_grad():
        return copy.deepcopy(net).double().eval()(x.double()).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_what_the_network_does(kind, tmp_path):
    """On a batch of a size that was never traced, against float64; and the network is left as it was."""
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    made = secateur.export(net, examples(1, 5), tmp_path / f"net.{kind}", **QUICK)

    x = examples(6, 5)
    expected = in_doubles(net, x)
    assert np.abs(run_file(made.path, x) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert made.batch is None and list(made.parity) == [1, 3] and max(made.parity.values()) <= 1e-6
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_beside_the_file_are_those_of_the_file(kind, tmp_path):
    net = small()
    path = tmp_path / f"net.{kind}"

    made = secateur.export(net, examples(2, 5), path, beside={"dense": 9}, about={"data": "mine"}, **QUICK)

    figures = json.loads((tmp_path / f"net.{kind}.json").read_text())
    assert figures["sha256"] == file_digest(path) and figures["file"] == path.name
    assert figures["bytes"] == {"file": path.stat().st_size, "parameters": 4 * (5 * 7 + 7 + 7 * 3 + 3), "dense": 9}
    assert figures["about"]["data"] == "mine" and figures["latency"]["threads"] == 1
    assert figures["latency"]["ratio"]["value"] > 0 and figures["parity"]["2"] == made.parity[2]
    assert str(tmp_path) not in json.dumps(figures)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]


@needs_onnx
def test_every_zero_is_in_the_onnx_file_at_its_place(tmp_path):
    import onnx

    net = small()
    made = secateur.export(net, examples(2, 5), tmp_path / "net.onnx", masks=Masks.from_zeros(net), **QUICK)

    graph = onnx.load(str(made.path)).graph
    found = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    for name in ("0.weight", "2.weight"):
        assert np.array_equal(found[name] == 0, net.get_parameter(name).detach().numpy() == 0)
    zeros = {name: int((net.get_parameter(name) == 0).sum()) for name in ("0.weight", "2.weight")}
    assert {row["name"]: row["zeros"] for row in made.zeros} == zeros
    assert {row["name"]: row["in_file"] for row in made.zeros} == zeros


class Normed(nn.Module):
    """Convolutions whose normalisation an exporter folds into them, and a tied, transposed linear weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_folded_tied_and_transposed_weights_keep_their_zeros(kind, tmp_path):
    net = sparse(Normed())
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.5, 3.0]))
        net.norm.running_mean.fill_(0.25)

    made = secateur.export(net, examples(2, 2, 4, 4), tmp_path / f"net.{kind}", **QUICK)

    rows = {row["name"]: row for row in made.zeros}
    assert set(rows) == {"conv.weight", "one.weight"}
    assert all(row["in_file"] >= row["zeros"] > 0 for row in rows.values())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0])


@needs_onnx
def test_weights_that_the_exporter_joins_are_counted_together(tmp_path):
    net = sparse(Recurrent())
    made = secateur.export(net, examples(2, 5, 3), tmp_path / "net.onnx", **QUICK)
    joined = {row["name"] for row in made.zeros if row["in_file"] is None}
    assert joined == {name for name, _ in net.named_parameters() if "weight" in name and name.startswith("cells")}


@pytest.mark.parametrize("lose", ["by name", "transposed", "in pieces"])
def test_a_lost_zero_is_found_wherever_the_weight_went(lose):
    """One zero less than the network has refuses the file; the same tensors with all zeros are taken."""
    net = sparse(nn.Sequential(nn.Linear(6, 4)))
    traced = lower_export.export(net, examples(2, 6))
    weight = net[0].weight.detach().numpy().copy()

    def stored(numbers):
        if lose == "by name":
            return {"0.weight": numbers}
        return {"val": numbers.T} if lose == "transposed" else {"a": numbers[:2] * 2, "b": numbers[2:] * 2}

    check_zeros(traced, stored(weight))
    weight[tuple(np.argwhere(weight == 0)[0])] = 1e-30
    with pytest.raises(ModelError, match=r"0\.weight"):
        check_zeros(traced, stored(weight))


class Other(nn.Module):
    """Traced, it computes something else: what a wrong exporter would do."""

    def __init__(self, shift=0.0, scale=0.0):
        super().__init__()
        self.linear, self.shift, self.scale = nn.Linear(4, 4), shift, scale

    def forward(self, x):
        weight = self.linear.weight
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, weight + self.scale, self.linear.bias + self.shift)
        return nn.functional.linear(x, weight, self.linear.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_differs_is_not_kept(kind, tmp_path):
    """A difference above the limit is refused, one below is not; what lay there stays."""
    path = tmp_path / f"net.{kind}"
    path.write_bytes(b"the file of yesterday")

    with pytest.raises(ModelError, match="from the network on a batch of 2"):
        secateur.export(sparse(Other(shift=0.1)), examples(2, 4), path, **QUICK)

    assert path.read_bytes() == b"the file of yesterday" and list(tmp_path.iterdir()) == [path]
    made = secateur.export(sparse(Other(shift=1e-5)), examples(2, 4), path, **QUICK)
    assert 1e-7 < made.parity[2] < 1e-4


@needs_onnx
def test_an_exporter_that_moves_pruned_weights_is_refused(tmp_path):
    """Weights a little away from zero pass every comparison of outputs, and are no zeros."""
    with pytest.raises(ModelError, match="zeros"):
        secateur.export(sparse(Other(scale=1e-9)), examples(2, 4), tmp_path / "net.onnx", **QUICK)
    assert not list(tmp_path.iterdir())


class Interrupted(nn.Module):
    """Ctrl-C while the finished file is compared."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if not torch.compiler.is_exporting():
            raise KeyboardInterrupt
        return self.linear(x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_export_leaves_nothing(kind, tmp_path):
    net = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        secateur.export(net, examples(2, 4), tmp_path / f"net.{kind}", **QUICK)
    assert not list(tmp_path.iterdir()) and net.training


class Reshaped(nn.Module):
    """Its forward writes the batch down."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).reshape(2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_cannot_be_free_is_fixed_and_said(kind, tmp_path):
    made = secateur.export(Reshaped(), examples(4, 4), tmp_path / f"net.{kind}", **QUICK)
    assert made.batch == 4 and list(made.parity) == [4]
    assert "the batch is fixed to 4" in made.notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_batch_on_request(kind, tmp_path):
    net = small()
    made = secateur.export(net, examples(1, 5), tmp_path / f"net.{kind}", dynamic_batch=False, **QUICK)
    assert made.batch == 1 and list(made.parity) == [1] and "as asked" in made.notes[0]
    if kind == "onnx":
        assert made.about["inputs"][0]["shape"] == [1, 5] and made.about["outputs"][0]["shape"] == [1, 3]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x, scale):
        return {"one": self.one(x) * scale, "two": [self.two(x), x.argmax(1)]}


@pytest.mark.parametrize("kind", KINDS)
def test_keywords_and_nested_results(kind, tmp_path):
    example = {"scale": examples(2, 1), "x": examples(2, 4)}
    made = secateur.export(sparse(Two()), example, tmp_path / f"net.{kind}", **QUICK)
    assert made.batch is None and max(made.parity.values()) < 1e-6
    if kind == "onnx":
        assert [entry["name"] for entry in made.about["outputs"]] == ["output0", "output1", "output2"]


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_tied_embeddings(kind, tmp_path):
    net = sparse(build("gpt_tiny", (6,), 11))
    masks = Masks.from_zeros(net)
    made = secateur.export(net, torch.arange(12).view(2, 6) % 11, tmp_path / f"net.{kind}", masks=masks, **QUICK)
    assert made.batch is None and max(made.parity.values()) < 1e-5
    assert {row["name"] for row in made.zeros} == set(masks)


class Written(nn.Module):
    """A forward with a size written down, which no slice of weights can change."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(96, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).reshape(x.shape[0], 96))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_networks_from_surgery(kind, written, tmp_path):
    """Fresh smaller modules, and a graph where the network had to be rewritten."""
    net = Written() if written else nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 3))
    net = sparse(net).eval()
    x = examples(2, 1, 4, 4)
    group = analyse(net, x).groups[0].name
    done = shrink(net, x, {group: [0, 4]})
    assert bool(done.rewritten) == written

    made = secateur.export(done.model, x, tmp_path / f"net.{kind}", masks=Masks.from_zeros(done.model), **QUICK)

    more = examples(5, 1, 4, 4)
    expected = done.model(more).detach().numpy()
    assert np.abs(run_file(made.path, more) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert made.bytes["parameters"] == 4 * (4 * 9 + 4 + 64 * 3 + 3)
    assert sum(row["weights"] for row in made.zeros) == 4 * 9 + 64 * 3


def test_a_pt2_file_is_a_network_of_this_library(tmp_path):
    net = small()
    secateur.export(net, examples(2, 5), tmp_path / "net.pt2", **QUICK)
    back, x = build(str(tmp_path / "net.pt2")), examples(4, 5)
    assert torch.equal(back(x), net(x))
    made = secateur.export(back, x, tmp_path / "again.pt2", **QUICK)
    assert made.batch is None and sum(row["zeros"] for row in made.zeros) == sum(
        int((p == 0).sum()) for p in net.parameters() if p.ndim > 1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_types_become_float32_and_it_is_said(dtype, tmp_path):
    made = secateur.export(small().to(dtype), examples(2, 5).to(dtype), tmp_path / "net.pt2", **QUICK)
    assert "become float32" in made.notes[0]
    assert torch.export.load(made.path).state_dict["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_neither_source_nor_example_is_in_the_file(kind, tmp_path):
    """Exporters write the lines of the source that made each operator, and torch the example."""
    x = examples(2, 5)
    content = secateur.export(small(), x, tmp_path / f"net.{kind}", **QUICK).path.read_bytes()
    for word in (__file__, pathlib.Path(torch.__file__).parent.as_posix(), "in forward"):
        assert word.encode() not in content
    assert x.numpy().tobytes() not in content


@needs_onnx
def test_the_opset_is_the_one_asked_for_or_none(tmp_path):
    import onnx

    secateur.export(small(), examples(2, 5), tmp_path / "net.onnx", opset=18, **QUICK)
    assert {e.domain: e.version for e in onnx.load(str(tmp_path / "net.onnx")).opset_import}[""] == 18
    with pytest.raises(ModelError, match="opset 7"):
        secateur.export(small(), examples(2, 5), tmp_path / "old.onnx", opset=7, **QUICK)
    assert not (tmp_path / "old.onnx").exists()


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@needs_onnx
def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Roots(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ModelError, match=r"cannot be said in ONNX.*linalg_eig.*pt2"):
        secateur.export(Roots(), examples(2, 3, 3), tmp_path / "net.onnx", **QUICK)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(tmp_path):
    def refused(error, says, *words, **options):
        with pytest.raises(error, match=says):
            secateur.export(*words, **{**QUICK, **options})
        assert not list(tmp_path.iterdir())

    net, x, path = small(), examples(2, 5), tmp_path / "net.pt2"
    refused(UsageError, "does not say its format", net, x, tmp_path / "net")
    refused(UsageError, "Did you mean 'onnx'", net, x, tmp_path / "net", "onx")
    refused(UsageError, "ends like a file of pt2", net, x, path, "onnx")
    refused(UsageError, "opset 20 is for ONNX", net, x, path, opset=20)
    refused(UsageError, "opset is 0", net, x, tmp_path / "net.onnx", opset=0)
    refused(UsageError, "threads is 0", net, x, path, threads=0)
    refused(FileError, "is a folder", net, x, tmp_path, "pt2")
    refused(DataError, "no tensor", net, [], path)
    refused(ModelError, "cannot trace", net, examples(2, 4), path)
    refused(ModelError, "control flow", Branching(), x, path)
    refused(ModelError, "NaN or infinity", net, x / 0, path)
    masks = Masks.from_zeros(net)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    refused(MaskError, "are not zero", net, x, path, masks=masks)


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        secateur.export(small(), examples(2, 5), tmp_path / "file" / "net.pt2", **QUICK)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(package, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if name == package or name in MISSING:
            monkeypatch.setitem(sys.modules, name, None)
            break
    with pytest.raises(UsageError, match=r"pip install (onnx|onnxscript|onnxruntime)`"):
        secateur.export(small(), examples(2, 5), tmp_path / "net.onnx", **QUICK)
    assert not list(tmp_path.iterdir())
