"""Every format is read to the bit against the library that wrote it, and written back the same."""

import collections
import json
import pathlib
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.engine.foreign.hostile_kit import pickles
from torch import nn

from secateur.core.errors import FileError
from secateur.engine.foreign import read
from secateur.nets import build


def random(*shape, seed=0, keep=1.0):
    """Numbers of which a share is not zero."""
    draw = np.random.default_rng(seed)
    made = draw.normal(size=shape) * (draw.random(shape) < keep)
    return torch.from_numpy(made.astype(np.float32))


def net_state(batch_norm=True):
    """Weights, running statistics and a counter of a small network."""
    torch.manual_seed(5)
    return build("mlp", (1, 4, 4), 3, widths=(6, 5), batch_norm=batch_norm).state_dict()


def same(one, other):
    """Equal names, types, shapes and bits."""
    assert list(one) == list(other) or set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


def changed(tensors):
    """Other numbers in the same shapes."""
    return {n: t * 2 + 1 if t.is_floating_point() else t for n, t in tensors.items()}


class Tied(nn.Module):
    """A network with tied weights, statistics, a transposed parameter and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(4, 3), nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.b.weight = self.a.weight
        self.register_buffer("c", torch.arange(3.0), persistent=False)
        self.v = nn.Parameter(torch.arange(12.0).view(3, 4).t())

    def forward(self, x):
        return self.bn(self.a(x) + self.b(x)) + self.c + x @ self.v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                                   torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64])  # fmt: skip
def test_safetensors_of_every_type(tmp_path, dtype):
    """The bits are those that the format's own library wrote, empty tensors and single numbers among them."""
    source = {"w": random(3, 5).to(dtype), "one": random(1)[0].to(dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    save_file(source, tmp_path / "a.safetensors", {"format": "pt", "made": "by hand"})

    found = read(tmp_path / "a.safetensors")

    assert found.kind == "safetensors" and found.facts["metadata"] == {"format": "pt", "made": "by hand"}
    assert found.stored == dict.fromkeys(source, "plain") and not found.ties and not found.left
    assert {n: t.view(torch.uint8).tolist() if t.dim() else t for n, t in found.tensors.items() if t.numel() > 1} == {
        n: t.view(torch.uint8).tolist() for n, t in source.items() if t.numel() > 1
    }
    assert found.tensors["none"].shape == (0, 4)


def test_safetensors_are_written_as_the_library_does(tmp_path):
    """With the same tensors the file is the same to the byte; with others the library reads them."""
    source = {**net_state(), "half": random(3, 3).half()}
    save_file(source, tmp_path / "a.safetensors", {"format": "pt"})
    found = read(tmp_path / "a.safetensors")

    found.write(tmp_path / "same.safetensors", found.tensors)
    new = {**changed(found.tensors), "more": torch.ones(2)}
    del new["half"]
    found.write(tmp_path / "new.safetensors", new)

    ours, theirs = (load_file(tmp_path / f"{n}.safetensors") for n in ("same", "a"))
    same(ours, theirs)
    same(load_file(tmp_path / "new.safetensors"), new)
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    same(read(tmp_path / "a.safetensors").tensors, source)


def folder_of(place, shards, config=None):
    """A folder as Hugging Face writes it: shards with an index, or one file."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config or {"model_type": "own"}))
    (place / "tokenizer.json").write_text("{}")
    if len(shards) == 1:
        save_file(shards[0], place / "model.safetensors", {"format": "pt"})
        return place
    where = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, place / name, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    )
    return place


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_shards_and_the_folder_that_holds_them(tmp_path, given):
    """All shards together are the network; a copy has the same files, with other numbers in them."""
    shards = [{"a.weight": random(3, 4), "a.bias": random(3)}, {"b.weight": random(2, 3, seed=1)}]
    place = folder_of(tmp_path / "hub", shards)

    found = read(place / given)

    whole = {**shards[0], **shards[1]}
    same(found.tensors, whole)
    assert found.facts["files"]["b.weight"] == "model-00002-of-00002.safetensors"
    found.write(tmp_path / "copy", changed(whole))
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(p.name for p in place.iterdir())
    same(load_file(tmp_path / "copy" / "model-00002-of-00002.safetensors"), changed(shards[1]))
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    with pytest.raises(FileError, match="there already"):
        found.write(tmp_path / "copy", whole)


def test_a_folder_with_one_file(tmp_path):
    """The folder gives the file and its settings."""
    place = folder_of(tmp_path / "hub", [{"a.weight": random(3, 4)}])

    found = read(place)

    assert found.kind == "safetensors" and found.facts["config"] == {"model_type": "own"}
    same(found.tensors, {"a.weight": random(3, 4)})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_state_dicts_of_torch(tmp_path, zipped):
    """What torch saved, ties included, in both of its formats; and written back for torch to load."""
    net = Tied()
    torch.save(net.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)

    found = read(tmp_path / "a.pt")

    same(found.tensors, net.state_dict())
    assert found.kind == "torch" and found.ties == (("a.weight", "b.weight"),)
    new = changed(found.tensors)
    found.write(tmp_path / "b.pt", new)
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    same(back, new)
    assert isinstance(back, collections.OrderedDict) and zipfile.is_zipfile(tmp_path / "b.pt") == zipped
    assert back["a.weight"].data_ptr() == back["b.weight"].data_ptr()
    Tied().load_state_dict(back)


@pytest.mark.parametrize("under", ["state_dict", "model", "model_state_dict", "generator"])
@pytest.mark.parametrize("average", ["ema", "state_dict_ema"])
def test_checkpoints_with_an_average_and_an_optimizer(tmp_path, under, average):
    """The network is found, the average stays available, and the rest is told and written back unchanged."""
    net = Tied()
    optimizer = torch.optim.Adam(net.parameters())
    net(random(5, 4)).sum().backward()
    optimizer.step()
    copy = changed({n: t.clone() for n, t in net.state_dict().items()})
    whole = {"epoch": 7, under: net.state_dict(), average: copy, "optimizer": optimizer.state_dict()}
    torch.save(whole, tmp_path / "a.pt")

    found = read(tmp_path / "a.pt")

    same(found.tensors, net.state_dict())
    assert found.facts["under"] == under and found.facts["numbers"] == {"epoch": 7}
    same(found.facts["others"][average], copy)
    assert set(found.facts["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    found.write(tmp_path / "b.pt", changed(found.tensors))
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    same(back[under], changed(found.tensors))
    same(back[average], copy)
    assert back["epoch"] == 7 and list(back) == list(whole)
    assert back["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def test_averages_that_are_lists_wrapped_ones_and_views(tmp_path):
    """Parameters, views with strides, expanded tensors and lists of averages are plain tensors in the end."""
    wide = random(4, 6)
    whole = {"state_dict": {"w": nn.Parameter(wide), "view": wide.t()[1:3], "e": torch.ones(1).expand(5)},
             "shadow_params": [wide + 1, wide + 2]}  # fmt: skip
    torch.save(whole, tmp_path / "a.pt")

    found = read(tmp_path / "a.pt")

    same(found.tensors, {"w": wide, "view": wide.t()[1:3], "e": torch.ones(5)})
    assert not found.ties  # they share memory and are not the same tensor
    same(found.facts["others"]["shadow_params"], {"0": wide + 1, "1": wide + 2})


def onnx_model(nodes, tensors, sparse=(), opset=17):
    """A checked ONNX model."""
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", *ends, tensors, sparse_initializer=list(sparse))
    versions = {"opset_imports": [helper.make_opsetid("", opset)], "ir_version": 10}
    return helper.make_model(graph, producer_name="by hand", **versions)


def gemm(weight="w"):
    """y = x w + b."""
    return helper.make_node("Gemm", ["x", weight, "b"], ["y"], name="/fc1/Gemm")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int16, np.uint16, np.int32,
                                   np.uint32, np.int64, np.uint64, np.bool_, np.complex64])  # fmt: skip
@pytest.mark.parametrize("raw", [True, False])
def test_onnx_tensors_of_every_type(tmp_path, dtype, raw):
    """Raw bytes and rows of numbers give what onnx's own decoder gives."""
    source = (np.random.default_rng(2).normal(size=(4, 3)) * 9).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(source, "w")
    else:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        tensor = helper.make_tensor("w", kind, source.shape, source.reshape(-1))
    onnx.save(
        onnx_model([gemm()], [tensor, numpy_helper.from_array(np.zeros(3, np.float32), "b")]), tmp_path / "a.onnx"
    )

    found = read(tmp_path / "a.onnx")

    np.testing.assert_array_equal(found.tensors["w"].numpy(), numpy_helper.to_array(tensor))
    np.testing.assert_array_equal(found.tensors["w"].numpy(), source)
    assert found.facts["opset"] == 17 and found.facts["producer"] == "by hand"
    assert found.facts["used"]["w"] == {"op": "Gemm", "node": "/fc1/Gemm", "slot": 1, "scopes": [], "turned": True}
    assert found.facts["inputs"] == {"x": [None, 4]}


def test_onnx_constants_sparse_tensors_and_bfloat16(tmp_path):
    """Constant nodes and sparse initializers are weights too."""
    half = random(3).bfloat16()
    dense = random(4, 3, keep=0.3)
    flat = dense.reshape(-1)
    where = flat.nonzero()[:, 0]
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [len(where)], flat[where].numpy()),
        numpy_helper.from_array(where.numpy(), "i"), [4, 3])  # fmt: skip
    constant = helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(random(3).numpy(), "inner"))
    raw = TensorProto(
        name="h", data_type=TensorProto.BFLOAT16, dims=[3], raw_data=half.view(torch.uint8).numpy().tobytes()
    )
    onnx.save(onnx_model([constant, gemm()], [raw], [sparse]), tmp_path / "a.onnx")

    found = read(tmp_path / "a.onnx")

    same(found.tensors, {"w": dense, "b": random(3), "h": half})
    assert found.stored == {"w": "sparse", "b": "constant node", "h": "plain"}
    new = {"w": random(4, 3, keep=0.6, seed=9), "b": random(3, seed=3), "h": half * 2}
    found.write(tmp_path / "b.onnx", new)
    same(read(tmp_path / "b.onnx").tensors, new)
    back = onnx.load(tmp_path / "b.onnx")
    assert back.graph.sparse_initializer[0].values.dims[0] < 12
    np.testing.assert_array_equal(numpy_helper.to_array(back.graph.node[0].attribute[0].t), new["b"].numpy())


def test_onnx_with_its_data_in_another_file(tmp_path):
    """External data are found in the folder; a copy holds them inside, and ONNX Runtime runs it."""
    import onnxruntime

    weight, bias = random(4, 3), random(3, seed=4)
    tensors = [numpy_helper.from_array(weight.numpy(), "w"), numpy_helper.from_array(bias.numpy(), "b")]
    onnx.save(onnx_model([gemm()], tensors), tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0,
              location="a.onnx.data")  # fmt: skip

    found = read(tmp_path / "a.onnx")

    same(found.tensors, {"w": weight, "b": bias})
    assert set(found.stored.values()) == {"external data"}
    found.write(tmp_path / "else" / "b.onnx", {"w": weight * 2, "b": bias})
    session = onnxruntime.InferenceSession(str(tmp_path / "else" / "b.onnx"), providers=["CPUExecutionProvider"])
    x = random(2, 4, seed=8)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], (x @ (weight * 2) + bias).numpy(), atol=1e-5)


def test_onnx_written_with_the_same_tensors_keeps_its_graph(tmp_path):
    """Nodes, inputs, metadata: everything but the weights is as it was, by onnx's own reading."""
    tensors = [numpy_helper.from_array(random(4, 3).numpy(), "w"), numpy_helper.from_array(random(3).numpy(), "b")]
    model = onnx_model([gemm()], tensors)
    helper.set_model_props(model, {"key": "value"})
    onnx.save(model, tmp_path / "a.onnx")
    found = read(tmp_path / "a.onnx")

    found.write(tmp_path / "b.onnx", found.tensors)
    back = onnx.load(tmp_path / "b.onnx")

    assert back == onnx.load(tmp_path / "a.onnx")
    with pytest.raises(FileError, match="`b` differs"):
        found.write(tmp_path / "c.onnx", {"w": random(4, 3), "b": random(4)})
    assert not (tmp_path / "c.onnx").exists()


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger"])
def test_quantised_onnx_is_refused_by_the_operator(tmp_path, op):
    """Its weights are integers with scales: no zeros that count."""
    node = helper.make_node(op, ["x", "w"], ["y"])
    onnx.save(onnx_model([node], [numpy_helper.from_array(random(4, 3).numpy(), "w")]), tmp_path / "a.onnx")

    with pytest.raises(FileError, match=f"quantised.*{op}.*before it was quantised"):
        read(tmp_path / "a.onnx")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program of torch.export and the network it is of."""
    torch.manual_seed(1)
    net = Tied().eval()
    path = tmp_path_factory.mktemp("pt2") / "a.pt2"
    torch.export.save(torch.export.export(net, (random(2, 4),)), path)
    return path, net


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_programs_of_torch_export(program, tmp_path):
    """Weights come from the archive as torch.export.load gives them; a copy is a program with other weights."""
    path, net = program

    found = read(path)

    assert found.kind == "pt2" and found.ties == (("a.weight", "b.weight"),)
    same(found.tensors, {**net.state_dict(), "c": net.c})
    assert found.stored["c"] == "constant" and found.stored["v"] == "plain"
    new = changed(found.tensors)
    found.write(tmp_path / "b.pt2", new)
    same(read(tmp_path / "b.pt2").tensors, new)
    loaded = torch.export.load(tmp_path / "b.pt2").module()
    other = Tied().eval()
    other.load_state_dict({n: new[n] for n in net.state_dict()})
    other.c = new["c"]
    x = random(2, 4, seed=6)
    torch.testing.assert_close(loaded(x), other(x))
    with pytest.raises(FileError, match="`d` differs"):
        found.write(tmp_path / "c.pt2", {**new, "d": random(1)})


def test_programs_of_older_torch(tmp_path):
    """Before 2.9 the weights were a file of torch.save inside of the archive."""
    torch.save(Tied().state_dict(), tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.write(tmp_path / "state.pt", "serialized_state_dict.pt")

    found = read(tmp_path / "a.pt2")

    same(found.tensors, torch.load(tmp_path / "state.pt"))
    assert set(found.stored.values()) == {"pickled"} and found.facts["old format"]
    with pytest.raises(FileError, match="save the program again"):
        found.write(tmp_path / "b.pt2", found.tensors)


def test_programs_that_list_one_pickle_twice(tmp_path):
    """It is read once, so both names have the same memory."""
    path = pickles(tmp_path, random(2, 3), ["a", "b"])

    found = read(path)

    same(found.tensors, {"a": random(2, 3), "b": random(2, 3)})
    assert found.ties == (("a", "b"),)


def by_hand(weight, structure):
    """The parts of a compressed weight, entry by entry as the format is written down."""
    rows, columns = weight.shape
    bits = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    values, offsets = [], []
    for i in range(rows):
        offsets.append(len(values))
        for j in range(columns):
            group = weight[i, j - j % 4 : j - j % 4 + 4].abs()
            chosen = j % 4 in group.topk(2).indices.tolist() if structure == "2:4" else bool(weight[i, j] != 0)
            if chosen:
                values.append(weight[i, j])
                bits[i, j // 8] += 1 << (j % 8)
    kept = torch.stack(values)
    if structure == "2:4":
        sizes = torch.tensor([[rows], [columns]])
        return {"compressed": kept.reshape(rows, columns // 2), "bitmask": bits, "shape": sizes}
    return {
        "compressed": kept,
        "bitmask": bits,
        "shape": torch.tensor([rows, columns]),
        "row_offsets": torch.tensor(offsets),
    }


def two_four(weight):
    """The two smallest of every four set to zero."""
    groups = weight.reshape(-1, 4).clone()
    groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    return groups.reshape(weight.shape)


def settings(kind, structure):
    """A config.json of compressed-tensors."""
    sparsity = {"format": kind, "global_sparsity": 0.5, "sparsity_structure": structure, "targets": ["Linear"]}
    return {"model_type": "own", "quantization_config": {"quant_method": "compressed-tensors", "version": "0.9",
            "config_groups": {}, "sparsity_config": sparsity}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "structure", "stored"), [("sparse-bitmask", "unstructured", "bitmask"),
                                                           ("sparse-24-bitmask", "2:4", "2:4 packed")])  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_compressed_tensors(tmp_path, kind, structure, stored, dtype, split):
    """Bits and values give the dense weights back, in one file or in shards, and can be packed again."""
    weight = random(6, 20, keep=0.4).to(dtype)
    weight = two_four(weight) if structure == "2:4" else weight
    other = two_four(random(4, 12, seed=2).to(dtype))
    rest = {"a.bias": random(6).to(dtype), "e.weight": random(7, 3).to(dtype)}
    parts = {f"{n}.{part}": t for n, w in (("a", weight), ("b", other)) for part, t in by_hand(w, structure).items()}
    first = {n: t for n, t in parts.items() if n[0] == "a"}
    shards = [{**first, **rest}, {n: t for n, t in parts.items() if n[0] == "b"}] if split else [{**parts, **rest}]
    place = folder_of(tmp_path / "hub", shards, settings(kind, structure))

    found = read(place)

    same(found.tensors, {"a.weight": weight, "b.weight": other, **rest})
    assert found.kind == "compressed-tensors" and found.stored["a.weight"] == stored
    assert found.stored["e.weight"] == "plain" and found.facts["sparsity"]["format"] == kind
    new = {**found.tensors, "a.weight": weight * 3, "b.weight": torch.zeros_like(other)}
    found.write(tmp_path / "copy", new)
    same(read(tmp_path / "copy").tensors, new)
    files = {n: t for p in (tmp_path / "copy").glob("*.safetensors") for n, t in load_file(p).items()}
    assert set(files) == {*parts, *rest}
    if structure != "2:4":  # which zeros are kept there beside fewer than two others is free
        same({n: files[f"a.{n}"] for n in by_hand(weight, structure)}, by_hand(weight * 3, structure))


def test_compressed_tensors_that_are_no_longer_2_of_4_are_not_written(tmp_path):
    """A weight that the format cannot hold is named, and nothing is left behind."""
    weight = two_four(random(4, 8))
    parts = {f"a.{part}": t for part, t in by_hand(weight, "2:4").items()}
    found = read(folder_of(tmp_path / "hub", [parts], settings("sparse-24-bitmask", "2:4")))

    with pytest.raises(FileError, match="`a.weight` has more than two of four.*as safetensors"):
        found.write(tmp_path / "copy", {"a.weight": random(4, 8)})
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("section", [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
    {"quant_method": "compressed-tensors", "format": "marlin-24"}, {"quant_method": "bitsandbytes"},
])  # fmt: skip
def test_quantised_checkpoints_are_refused_by_name(tmp_path, section):
    """Weights in 4 or 8 bits are no plain numbers."""
    place = folder_of(tmp_path / "hub", [{"a.weight": random(4, 4)}], {"quantization_config": section})

    with pytest.raises(FileError, match="quantised.*before quantisation"):
        read(place)


def test_other_kinds_are_named(tmp_path):
    """A file of another program is told by its name, and what is read is listed."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    for name, words in (("a.gguf", "GGUF"), ("a.h5", "HDF5"), ("a.npz", "not one of torch.save")):
        with pytest.raises(FileError, match=words):
            read(pathlib.Path(tmp_path / name))


def test_the_cache_of_hugging_face_consists_of_links(tmp_path):
    """Shards are links to files elsewhere; what they lead to must be safetensors."""
    shards = [{"a.weight": random(3, 4)}, {"b.weight": random(2, 3, seed=1)}]
    real = folder_of(tmp_path / "blobs", shards)
    cache = tmp_path / "snapshots" / "main"
    cache.mkdir(parents=True)
    for file in real.iterdir():
        (cache / file.name).symlink_to(file)

    found = read(cache)

    same(found.tensors, {**shards[0], **shards[1]})
    found.write(tmp_path / "copy", changed(found.tensors))
    assert not any(p.is_symlink() for p in (tmp_path / "copy").iterdir())
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"model_type": "own"}
    same(load_file(real / "model-00001-of-00002.safetensors"), shards[0])


def test_a_state_dict_with_other_things_beside_its_tensors(tmp_path):
    """What is no tensor is told, and written back as it was."""
    whole = {"w": random(2, 2), "settings": {"depth": 3, "names": ["a", "b"]}, "epoch": 4}
    torch.save(whole, tmp_path / "a.pt")

    found = read(tmp_path / "a.pt")
    found.write(tmp_path / "b.pt", {"w": random(2, 2, seed=1)})

    assert set(found.left) == {"settings.depth", "settings.names", "epoch"}
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    same({"w": back.pop("w")}, {"w": random(2, 2, seed=1)})
    assert back == {"settings": {"depth": 3, "names": ["a", "b"]}, "epoch": 4}


@pytest.mark.parametrize(("name", "usual"), [("b.safetensors", "b.pt"), ("b.onnx", "b.pt"), ("b.PT2", "b.pt")])
def test_a_name_of_another_format_is_refused_before_writing(tmp_path, name, usual):
    """It would be refused when it is read; the message says how to call it."""
    torch.save({"w": random(2, 2)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")

    with pytest.raises(FileError, match=f"would hold torch.*belongs to another format. Name it .*{usual}"):
        found.write(tmp_path / name, found.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    for suffix in (".pth", ".ckpt", ".bin", ""):
        same(read(found.write(tmp_path / f"b{suffix}", found.tensors)).tensors, found.tensors)
    save_file({"w": random(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="would hold safetensors"):
        read(tmp_path / "a.safetensors").write(tmp_path / "c.pt", found.tensors)


def test_shards_without_settings(tmp_path):
    """An index of shards is enough for a folder, so that a copy of one can be read."""
    place = folder_of(tmp_path / "hub", [{"a.weight": random(3, 4)}, {"b.weight": random(2, 3)}])
    (place / "config.json").unlink()
    found = read(place / "model.safetensors.index.json")

    found.write(tmp_path / "copy", found.tensors)

    same(read(tmp_path / "copy").tensors, found.tensors)
    (place / "config.json").mkdir()
    with pytest.raises(FileError, match="config.json: it is not an ordinary file but a folder"):
        read(place)


def test_a_copy_of_a_folder_has_everything_but_older_weights(tmp_path):
    """Subfolders and links into the cache come along; the same network in other files does not, and that is told."""
    cache = tmp_path / "cache" / "snapshots" / "main"
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    weights = {"a.weight": random(3, 4), "b.weight": random(2, 3)}
    folder_of(cache, [weights])
    (blobs / "1").write_text("template")
    (cache / "chat_template.jinja").symlink_to(blobs / "1")
    (tmp_path / "secret").write_text("mine")
    (cache / "odd.key").symlink_to(tmp_path / "secret")
    (cache / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("extra/deep/vocab.txt", "dense/config.json", "dense/pytorch_model.bin", "onnx/model.onnx",
                 "pytorch_model.bin", "training_args.bin", ".git/objects"):  # fmt: skip
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    save_file({**weights, "c": random(1)}, cache / "model.fp32.safetensors")
    save_file({"lora": random(2)}, cache / "adapter_model.safetensors")
    found = read(cache)

    with pytest.warns(UserWarning) as told:
        found.write(tmp_path / "copy", changed(weights))

    there = {p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert there == {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "training_args.bin",
                     "extra/deep/vocab.txt", "dense/config.json", "dense/pytorch_model.bin",
                     "adapter_model.safetensors"}  # fmt: skip
    assert not any(p.is_symlink() for p in (tmp_path / "copy").rglob("*"))
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "template"
    same(load_file(tmp_path / "copy" / "model.safetensors"), changed(weights))
    (text,) = {str(warning.message) for warning in told}
    for name in ("odd.key", "gone", "onnx/model.onnx", "pytorch_model.bin", "model.fp32.safetensors", ".git"):
        assert f"{name} (it " in text
    read(tmp_path / "copy")
