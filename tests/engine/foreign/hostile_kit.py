"""Files that lie: each is made by a function of a folder, and the words that its refusal must have."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

CASES = {}
HUGE = 10**15


def case(words):
    """Register a maker by its name; ``words`` is a pattern of the message."""

    def register(make):
        CASES[make.__name__] = (make, words)
        return make

    return register


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


# safetensors


def tensors(folder, header, data=b"", name="a.safetensors"):
    """A file with this header, as a table or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return put(folder, name, struct.pack("<Q", len(text)) + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@case("is empty")
def no_bytes(folder):
    return put(folder, "a.safetensors", b"")


@case("truncated: 7 bytes are too few")
def seven_bytes(folder):
    return put(folder, "a.safetensors", b"\x10\0\0\0\0\0\0")


@case("its header should have 1,000,000 bytes")
def header_longer_than_the_file(folder):
    return put(folder, "a.safetensors", struct.pack("<Q", 1000000) + b"{}")


@case("its header should have 18,446,744,073,709,551,615 bytes")
def header_of_all_bytes_there_are(folder):
    return put(folder, "a.safetensors", b"\xff" * 8 + b"{}")


@case("not UTF-8")
def header_in_latin_1(folder):
    return tensors(folder, b'{"\xe9": 3}')


@case("its header is not JSON")
def header_cut(folder):
    return tensors(folder, b'{"a": {"dtype": "F32", ')


@case("its header is not a table")
def header_a_list(folder):
    return tensors(folder, b"[1, 2]")


@case("two entries called 'a'")
def name_twice(folder):
    return tensors(folder, b'{"a": %b, "a": %b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4))


@case("control characters")
def name_of_control_characters(folder):
    return tensors(folder, {"a\x1b[2J": entry([1], 0, 4)}, bytes(4))


@case("control characters")
def name_without_end(folder):
    return tensors(folder, {"a" * 5000: entry([1], 0, 4)}, bytes(4))


@case("needs 4,000,000,000,000,000 bytes and has 4")
def shape_huge(folder):
    return tensors(folder, {"a": entry([HUGE], 0, 4)}, bytes(4))


@case("needs 4,835,703,278,458,516,698,824,704 bytes")
def shape_beyond_64_bits(folder):
    return tensors(folder, {"a": entry([2**40, 2**40], 0, 4)}, bytes(4))


@case("impossible shape")
def shape_negative(folder):
    return tensors(folder, {"a": entry([-1, -1], 0, 4)}, bytes(4))


@case("holds NaN")
def shape_nan(folder):
    return tensors(folder, b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4))


@case("impossible shape")
def shape_of_truths(folder):
    return tensors(folder, {"a": entry([True], 0, 4)}, bytes(4))


@case("impossible shape")
def shape_of_a_thousand_sizes(folder):
    return tensors(folder, {"a": entry([1] * 1000, 0, 4)}, bytes(4))


@case("overlaps")
def data_overlap(folder):
    return tensors(folder, {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))


@case("leaves a hole")
def data_with_a_hole(folder):
    return tensors(folder, {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12))


@case("truncated: `b` ends at byte 12 of 8")
def data_cut(folder):
    return tensors(folder, {"a": entry([1], 0, 4), "b": entry([2], 4, 12)}, bytes(8))


@case("needs 4 bytes and has -4")
def data_backwards(folder):
    return tensors(folder, {"a": entry([1], 4, 0)}, bytes(4))


@case("does not say where")
def data_nowhere(folder):
    return tensors(folder, {"a": {"dtype": "F32", "shape": [1]}}, bytes(4))


@case("4 bytes at its end belong to no tensor")
def data_left_over(folder):
    return tensors(folder, {"a": entry([1], 0, 4)}, bytes(8))


@case("nested too deeply")
def header_nested(folder):
    return tensors(folder, b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}")


@case("metadata are not texts")
def metadata_of_numbers(folder):
    return tensors(folder, {"__metadata__": {"a": 1}})


@case("not JSON")
def number_of_a_million_digits(folder):
    return tensors(folder, b'{"a": ' + b"9" * 1000000 + b"}")


# torch.save


def archive(folder, members, name="a.pt", kind=zipfile.ZIP_STORED):
    """A zip file with these members in order."""
    with zipfile.ZipFile(folder / name, "w", kind) as made:
        for member, content in members:
            made.writestr(member, content)
    return folder / name


def torch_zip(folder, pickled, members=(), name="a.pt"):
    """A file of torch.save around a pickle."""
    head = [("a/data.pkl", pickled), ("a/byteorder", "little")]
    return archive(folder, [*head, *members, ("a/version", "3\n")], name)


def old_torch(folder, pickled, keys=(), data=b"", parts=None):
    """A file as torch wrote them before 1.6."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return put(folder, "a.pt", b"".join(parts or start) + pickled + pickle.dumps(list(keys), 2) + data)


class Runs:
    """Something that runs when it is loaded."""

    def __init__(self, function, *given):
        self.how = function, given

    def __reduce__(self):
        return self.how


class Saved:
    """Memory that a file says it holds."""

    def __init__(self, kind, key, size):
        self.id = ("storage", kind, key, "cpu", size)


def pickled(thing, protocol=2):
    """A pickle in which :class:`Saved` stands for memory."""
    made = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, given):
            return given.id if isinstance(given, Saved) else None

    Pickler(made, protocol).dump(thing)
    return made.getvalue()


def rebuilt(size, stride, offset=0, entries=4, key="0"):
    """A tensor of a file, as torch writes it."""
    memory = Saved(torch.FloatStorage, key, entries)
    return Runs(torch._utils._rebuild_tensor_v2, memory, offset, size, stride, False, collections.OrderedDict())


def mark(folder):
    """Code that leaves a file behind."""
    return f"touch {folder / 'it-ran'}"


FOUR = [("a/data/0", bytes(16))]


@case("would run '(posix|nt|os).system'.*torch.save")
def code_in_a_zip(folder):
    return torch_zip(folder, pickle.dumps({"w": Runs(os.system, mark(folder))}, 2))


@case("would run '(builtins|__builtin__).eval'")
def code_deep_within(folder):
    inner = {"state_dict": {"a": [({"b": Runs(eval, f"__import__('os').system({mark(folder)!r})")},)]}}
    return torch_zip(folder, pickle.dumps(inner, 2))


@case("would run '(posix|nt|os).system'")
def code_in_protocol_4(folder):
    return torch_zip(folder, pickle.dumps([Runs(os.system, mark(folder))], 4))


@case("would run '(posix|nt|os).system'")
def code_in_the_old_format(folder):
    return old_torch(folder, pickle.dumps({"w": Runs(os.system, mark(folder))}, 2))


@case("would run '(posix|nt|os).system'")
def code_where_the_old_format_has_its_number(folder):
    return put(folder, "a.pt", b"\x80\x02" + pickle.dumps(Runs(os.system, mark(folder)), 2)[2:])


@case("would run '(posix|nt|os).system'")
def code_where_the_old_format_has_its_system(folder):
    parts = [pickle.dumps(p, 2) for p in (0x1950A86A20F9469CFC6C, 1001)] + [
        pickle.dumps(Runs(os.system, mark(folder)), 2)
    ]
    return old_torch(folder, pickle.dumps({}, 2), parts=parts)


@case("would run '(posix|nt|os).system'")
def code_in_the_name_of_memory(folder):
    memory = Saved(Runs(os.system, mark(folder)), "0", 4)
    thing = Runs(torch._utils._rebuild_tensor_v2, memory, 0, (4,), (1,), False, collections.OrderedDict())
    return torch_zip(folder, pickled({"w": thing}), FOUR)


@case("would run '(builtins|__builtin__).getattr'")
def code_by_getattr(folder):
    return torch_zip(folder, pickle.dumps(Runs(getattr, os, "system") if False else Runs(getattr, "a", "upper"), 2))


@case("instruction INST")
def code_by_instance(folder):
    return torch_zip(folder, b"(S'touch x'\nios\nsystem\n.")


@case("instruction EXT1")
def code_by_extension(folder):
    return torch_zip(folder, b"\x80\x02\x82\x01.")


@case("would run 'torch.nn.modules.linear.Linear'.*state_dict")
def whole_model(folder):
    torch.save(torch.nn.Linear(2, 3), folder / "a.pt")
    return folder / "a.pt"


@case("would run 'numpy.*scalar'")
def numpy_number(folder):
    torch.save({"w": torch.ones(2), "best": np.float64(3)}, folder / "a.pt")
    return folder / "a.pt"


@case("quantised")
def quantised_tensor(folder):
    return torch_zip(folder, pickled({"w": Runs(torch._utils._rebuild_qtensor, 1)}), FOUR)


@case("should have 4,000,000,000,000,000 bytes and has 16")
def memory_huge(folder):
    return torch_zip(folder, pickled({"w": rebuilt((4,), (1,), entries=HUGE)}), FOUR)


@case("should have 32 bytes and has 16")
def memory_short(folder):
    return torch_zip(folder, pickled({"w": rebuilt((8,), (1,), entries=8)}), FOUR)


@case("truncated: the memory '7' is not in its archive")
def memory_missing(folder):
    return torch_zip(folder, pickled({"w": rebuilt((4,), (1,), key="7")}), FOUR)


@case("two sizes")
def memory_of_two_sizes(folder):
    return torch_zip(folder, pickled([rebuilt((4,), (1,)), rebuilt((2,), (1,), entries=2)]), FOUR)


@case("unfold to more than")
def tensor_unfolded(folder):
    return torch_zip(folder, pickled({"w": rebuilt((HUGE,), (0,))}), FOUR)


@case("unfold to more than")
def tensors_unfolded_together(folder):
    return torch_zip(folder, pickled({i: rebuilt((1000, 100), (0, 0)) for i in range(500)}), FOUR)


@case("reaches beyond its memory of 16 bytes")
def tensor_beyond_its_memory(folder):
    return torch_zip(folder, pickled({"w": rebuilt((4,), (2,))}), FOUR)


@case("reaches beyond its memory")
def tensor_behind_its_memory(folder):
    return torch_zip(folder, pickled({"w": rebuilt((1,), (1,), offset=10**12)}), FOUR)


@case("no place in its memory")
def tensor_before_its_memory(folder):
    return torch_zip(folder, pickled({"w": rebuilt((1,), (1,), offset=-1)}), FOUR)


@case("impossible shape")
def tensor_of_negative_stride(folder):
    return torch_zip(folder, pickled({"w": rebuilt((4,), (-1,))}), FOUR)


@case("makes memory of any size")
def bytes_of_any_number(folder):
    return torch_zip(folder, pickle.dumps({"w": Runs(bytearray, 10**12)}, 2))


@case("calls .*FloatStorage")
def memory_by_a_call(folder):
    return torch_zip(folder, b"\x80\x02ctorch\nFloatStorage\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R.")


@case("changes a tensor after making it")
def tensor_changed_later(folder):
    made = pickled([rebuilt((4,), (1,))])
    return torch_zip(folder, made[:-2] + b"Nb" + made[-2:], FOUR)


def built(target, state):
    """The pickle of a table with one entry: an object that gets a state after it was made."""
    parts = [pickled(part)[2:-1] for part in (target, state)]
    return b"\x80\x02}X\x01\x00\x00\x00w" + parts[0] + parts[1] + b"bs."


def unfolding():
    """What sets a tensor anew, to a view without end."""
    return Saved(torch.FloatStorage, "0", 4), 0, (3 * 10**8,), (0,)


@case("changes a tensor after making it")
def parameter_changed_later(folder):
    target = Runs(torch._utils._rebuild_parameter, rebuilt((4,), (1,)), False, collections.OrderedDict())
    return torch_zip(folder, built(target, unfolding()), FOUR)


@case("changes a tensor after making it")
def typed_tensor_changed_later(folder):
    given = (Saved(torch.FloatStorage, "0", 4), 0, (4,), (1,), False, collections.OrderedDict())
    target = Runs(torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, torch.Tensor, given, {})
    return torch_zip(folder, built(target, unfolding()), FOUR)


@case("would replace 'shape' of a Tensor")
def tensor_with_a_shape_of_its_own(folder):
    given = (Saved(torch.FloatStorage, "0", 4), 0, (4,), (1,), False, collections.OrderedDict())
    typed = torch._tensor._rebuild_from_type_v2
    thing = Runs(typed, torch._utils._rebuild_tensor_v2, torch.Tensor, given, {"shape": (HUGE,)})
    return torch_zip(folder, pickled({"w": thing}), FOUR)


@case("would replace 'data' of a Tensor")
def parameter_with_data_of_its_own(folder):
    state = {"data": rebuilt((2,), (1,))}
    again = torch._utils._rebuild_parameter_with_state
    thing = Runs(again, rebuilt((4,), (1,)), False, collections.OrderedDict(), state)
    return torch_zip(folder, pickled({"w": thing}), FOUR)


@case("would replace 'items' of a dict")
def table_with_a_method_of_its_own(folder):
    return torch_zip(folder, built(Runs(collections.OrderedDict), {"items": 1}), FOUR)


@case("tables of .* entries unfold to more than")
def tables_shared_without_end(folder):
    table = {f"k{i}": torch.zeros(1) if i == 0 else 0 for i in range(40)}
    for _ in range(6):
        table = {**{f"k{i}": table for i in range(40)}, "t": torch.zeros(1)}
    torch.save({"state_dict": table}, folder / "a.pt")
    return folder / "a.pt"


@case("tables of .* entries unfold to more than")
def averages_shared_without_end(folder):
    table = {"ema": {"w": torch.zeros(1)}}
    for _ in range(6):
        table = {"ema": {"w": torch.zeros(1)}, **{f"k{i}": table for i in range(40)}}
    torch.save({"state_dict": {"w": torch.ones(1)}, "ema": table}, folder / "a.pt")
    return folder / "a.pt"


@case("`.*` and others unfold to more than")
def tensor_named_over_and_over(folder):
    tensor = torch.zeros(100_000)
    torch.save({f"k{i}": tensor for i in range(500)}, folder / "a.pt")
    return folder / "a.pt"


@case("has a key that is a tuple")
def key_nested_without_end(folder):
    deep = b"\x80\x02}" + b")" + b"\x85" * 100000 + b"Ns."
    return torch_zip(folder, deep)


@case("damaged|holds a int")
def memo_at_the_end_of_memory(folder):
    return torch_zip(folder, b"\x80\x02K\x01r\xff\xff\xff\x7f.")


@case("pickle is truncated")
def pickle_cut(folder):
    return torch_zip(folder, pickled({"w": rebuilt((4,), (1,))})[:-20], FOUR)


@case("pickle is truncated")
def pickle_empty(folder):
    return torch_zip(folder, b"")


@case("archive is truncated")
def zip_cut(folder):
    torch.save({"w": torch.ones(100)}, folder / "b.pt")
    return put(folder, "a.pt", (folder / "b.pt").read_bytes()[:-100])


@case("says it unfolds to")
def zip_bomb(folder):
    members = [("a/data.pkl", pickled({"w": rebuilt((4,), (1,))})), ("a/data/0", bytes(200 << 20))]
    return archive(folder, members, kind=zipfile.ZIP_DEFLATED)


@case("leads out of it")
def zip_with_a_way_out(folder):
    return torch_zip(folder, pickled({}), [("../../etc/passwd", b"")])


@case("leads out of it")
def zip_with_a_whole_path(folder):
    return torch_zip(folder, pickled({}), [("/etc/passwd", b"")])


@case("two files called 'a/data/0'")
def zip_with_a_name_twice(folder):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_zip(folder, pickled({}), [*FOUR, *FOUR])


@case("two files called 'a/DATA.PKL'")
def zip_with_a_name_in_two_cases(folder):
    return torch_zip(folder, pickled({}), [("a/DATA.PKL", pickle.dumps({}))])


@case("does not begin where the file does")
def zip_behind_something(folder):
    path = torch_zip(folder, pickled({}))
    return put(folder, "b.pt", b"PK" + path.read_bytes())


@case("something stands behind its end")
def zip_with_a_second_end(folder):
    path = torch_zip(folder, pickled({"w": rebuilt((4,), (1,))}), FOUR)
    other = torch_zip(folder, pickled({}), name="other.pt").read_bytes()
    content = path.read_bytes()
    return put(folder, "b.pt", content[:-2] + struct.pack("<H", len(other)) + other[:-1] + b"x")


@case("overlaps another file")
def zip_of_files_in_one_place(folder):
    path = torch_zip(folder, pickled({}), [("a/data/0", bytes(16)), ("a/data/1", bytes(16))])
    content = bytearray(path.read_bytes())
    first, second = (content.rfind(name) for name in (b"a/data/0", b"a/data/1"))
    content[second - 4 : second] = content[first - 4 : first]  # the place of the header, before the name
    return put(folder, "a.pt", bytes(content))


@case("TorchScript, which is code")
def torchscript(folder):
    return archive(folder, [("a/data.pkl", b"N."), ("a/constants.pkl", b"N."), ("a/code/net.py", b"pass")])


@case("control characters")
def state_of_control_characters(folder):
    torch.save({"a\nb": torch.ones(1)}, folder / "a.pt")
    return folder / "a.pt"


@case("no tensors by name")
def state_without_tensors(folder):
    torch.save({"epoch": 3}, folder / "a.pt")
    return folder / "a.pt"


@case("holds a list")
def list_of_tensors(folder):
    torch.save([torch.ones(2)], folder / "a.pt")
    return folder / "a.pt"


@case("truncated")
def old_format_cut(folder):
    torch.save({"w": torch.ones(100)}, folder / "b.pt", _use_new_zipfile_serialization=False)
    return put(folder, "a.pt", (folder / "b.pt").read_bytes()[:-100])


@case("has 9 entries, not what its tensors need")
def old_format_of_another_size(folder):
    data = struct.pack("<q", 9) + bytes(36)
    return old_torch(folder, pickled({"w": rebuilt((4,), (1,))}), ["0"], data)


@case("not the memory it holds")
def old_format_of_other_memory(folder):
    return old_torch(folder, pickled({"w": rebuilt((4,), (1,))}), ["3"], bytes(24))


@case("not one of torch.save")
def some_pickle(folder):
    return put(folder, "a.pkl", pickle.dumps({"w": [1.0, 2.0]}, 2))


# ONNX


def graph(folder, initializers, nodes=(), sparse=(), name="a.onnx"):
    """An ONNX file, unchecked."""
    made = helper.make_graph(list(nodes), "g", [], [], list(initializers), sparse_initializer=list(sparse))
    return put(folder, name, helper.make_model(made).SerializeToString())


def external(location, size=16, offset=None, length=None):
    """A tensor whose data lie in another file."""
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[size // 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            made.external_data.add(key=key, value=str(value))
    return made


@case("not in its own folder")
def external_above(folder):
    return graph(folder, [external("../../../../../../etc/passwd")])


@case("not in its own folder")
def external_with_a_whole_path(folder):
    return graph(folder, [external("/etc/passwd")])


@case("leads out of its own folder")
def external_by_a_link(folder):
    (folder / "inner").mkdir()
    put(folder, "secret", bytes(64))
    (folder / "inner" / "data").symlink_to(folder / "secret")
    return graph(folder / "inner", [external("data")])


@case("truncated: `w` ends at byte 16 of 8")
def external_cut(folder):
    put(folder, "data", bytes(8))
    return graph(folder, [external("data")])


@case("does not say where")
def external_at_no_number(folder):
    put(folder, "data", bytes(64))
    return graph(folder, [external("data", offset=-8)])


@case("needs 16 bytes and has 64")
def external_of_another_size(folder):
    put(folder, "data", bytes(64))
    return graph(folder, [external("data", length=64)])


@case("ends at byte 4,000,000,000,000,000")
def external_huge(folder):
    put(folder, "data", bytes(64))
    return graph(folder, [external("data", size=4 * HUGE)])


@case("not an ordinary file")
def external_a_pipe(folder):
    os.mkfifo(folder / "data")
    return graph(folder, [external("data")])


@case("names the file 'None'|names the file None")
def external_without_a_name(folder):
    return graph(folder, [external(None)])


@case("damaged|no ONNX file")
def onnx_of_noise(folder):
    return put(folder, "a.onnx", bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)))


@case("damaged|no ONNX file")
def onnx_of_text(folder):
    return put(folder, "a.onnx", b"version https://git-lfs.github.com/spec/v1\n")


@case("damaged.*beyond its message")
def onnx_cut(folder):
    path = graph(folder, [numpy_helper.from_array(np.ones((30, 30), np.float32), "w")])
    return put(folder, "b.onnx", path.read_bytes()[:-500])


@case("needs 4,000,000,000,000,000 bytes and has 0")
def onnx_shape_huge(folder):
    return graph(folder, [TensorProto(name="w", data_type=1, dims=[HUGE])])


@case("impossible shape")
def onnx_shape_negative(folder):
    return graph(folder, [TensorProto(name="w", data_type=1, dims=[-4], raw_data=bytes(16))])


@case("no known type")
def onnx_type_unknown(folder):
    return graph(folder, [TensorProto(name="w", data_type=77, dims=[4], raw_data=bytes(16))])


@case("control characters")
def onnx_name_of_control_characters(folder):
    return graph(folder, [numpy_helper.from_array(np.ones(4, np.float32), "w\x07")])


@case("not UTF-8")
def onnx_name_in_latin_1(folder):
    path = graph(folder, [numpy_helper.from_array(np.ones(4, np.float32), "wxyz")])
    return put(folder, "a.onnx", path.read_bytes().replace(b"wxyz", b"wx\xff\xfe"))


@case("two of its tensors are called `w`")
def onnx_name_twice(folder):
    return graph(folder, [numpy_helper.from_array(np.ones(4, np.float32), "w")] * 2)


@case("nested too deeply")
def onnx_nested(folder):
    inner = b""
    for field in [6, 5, 1] * 40:  # a graph in a node in an attribute, and so on
        size = len(inner)
        inner = bytes([field << 3 | 2, size & 127 | 128, size >> 7]) + inner
    return put(folder, "a.onnx", bytes([7 << 3 | 2, len(inner) & 127 | 128, len(inner) >> 7]) + inner)


def sparse(places, dims):
    """A sparse initializer with one value for each place."""
    values = helper.make_tensor("w", TensorProto.FLOAT, [len(places)], [1.0] * len(places))
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places, np.int64), "i"), dims)


@case("unfold to more than")
def onnx_sparse_huge(folder):
    return graph(folder, [], sparse=[sparse([0, 1], [HUGE])])


@case("lies outside of it")
def onnx_sparse_outside(folder):
    return graph(folder, [], sparse=[sparse([0, 99], [4])])


@case("lies outside of it")
def onnx_sparse_before(folder):
    return graph(folder, [], sparse=[sparse([[0, 0], [1, -1]], [2, 2])])


@case("number in it does not end|damaged")
def onnx_number_without_end(folder):
    return put(folder, "a.onnx", b"\x08" + b"\xff" * 50)


# .pt2


def program(folder, config, members=()):
    """A file of torch.export with a table of weights."""
    table = config if isinstance(config, bytes) else json.dumps({"config": config}).encode()
    head = [("a/archive_format", b"pt2"), ("a/data/weights/model_weights_config.json", table)]
    return archive(folder, [*head, *members], "a.pt2")


def weight(sizes, strides, offset=0, place="weight_0", **more):
    """An entry of the table."""
    numbers = {key: [{"as_int": n} for n in row] for key, row in (("sizes", sizes), ("strides", strides))}
    meta = {"dtype": 7, **numbers, "storage_offset": {"as_int": offset}}
    return {"path_name": place, "is_param": True, "use_pickle": False, "tensor_meta": meta, **more}


RAW = [("a/data/weights/weight_0", bytes(16))]


@case("reaches beyond its 16 bytes")
def program_weight_huge(folder):
    return program(folder, {"w": weight([HUGE], [1])}, RAW)


@case("unfold to more than")
def program_weight_unfolded(folder):
    return program(folder, {"w": weight([HUGE], [0])}, RAW)


@case("does not say where|impossible shape")
def program_weight_before(folder):
    return program(folder, {"w": weight([1], [1], offset=-3)}, RAW)


@case("not in its archive")
def program_weight_elsewhere(folder):
    return program(folder, {"w": weight([4], [1], place="../../secret")}, RAW)


@case("would run '(posix|nt|os).system'")
def program_weight_of_code(folder):
    code = torch_zip(folder, pickle.dumps(Runs(os.system, mark(folder)), 2), name="inner.pt").read_bytes()
    return program(folder, {"w": weight([4], [1], use_pickle=True)}, [("a/data/weights/weight_0", code)])


def pickles(folder, tensor, names):
    """A program that lists one file of torch.save under many names."""
    torch.save(tensor, folder / "blob.pt")
    entry = {"path_name": "w0", "use_pickle": True, "is_param": True, "tensor_meta": None}
    return program(folder, dict.fromkeys(names, entry), [("a/data/weights/w0", (folder / "blob.pt").read_bytes())])


@case("and others unfold to more than")
def program_of_one_pickle_listed_often(folder):
    return pickles(folder, torch.zeros(100_000), [f"w{i}" for i in range(200)])


@case("says it unfolds to 4,")
def program_with_an_archive_in_its_archive(folder):
    torch.save(torch.zeros(1 << 20), folder / "flat.pt")
    with zipfile.ZipFile(folder / "flat.pt") as flat, zipfile.ZipFile(folder / "w0", "w") as inner:
        for member in flat.namelist():
            inner.writestr(member, flat.read(member), zipfile.ZIP_DEFLATED)
        inner.writestr("flat/pad", bytes(100_000))  # so large that it may unfold, but for the archive around it
    entry = {"w": {"path_name": "w0", "use_pickle": True, "is_param": True, "tensor_meta": None}}
    members = [("a/archive_format", b"pt2"), ("a/data/weights/w0", (folder / "w0").read_bytes()),
               ("a/data/weights/model_weights_config.json", json.dumps({"config": entry}).encode())]  # fmt: skip
    return archive(folder, members, "a.pt2", zipfile.ZIP_DEFLATED)


@case("would run '(posix|nt|os).system'")
def program_of_older_torch_with_code(folder):
    code = torch_zip(folder, pickle.dumps(Runs(os.system, mark(folder)), 2), name="inner.pt").read_bytes()
    members = [("serialized_exported_program.json", b"{}"), ("serialized_state_dict.pt", code)]
    return archive(folder, members, "a.pt2")


@case("is not JSON")
def program_without_a_table(folder):
    return program(folder, b"{,}", RAW)


@case("no list of tensors")
def program_with_another_table(folder):
    return program(folder, b"[]", RAW)


@case("no known type")
def program_weight_of_no_type(folder):
    table = weight([4], [1])
    table["tensor_meta"]["dtype"] = 99
    return program(folder, {"w": table}, RAW)


# folders, shards and compressed-tensors


def hub(folder, parts, config=None, index=None):
    """A folder of Hugging Face."""
    place = folder / "hub"
    place.mkdir()
    kind = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    (place / "config.json").write_text(json.dumps({"quantization_config": kind} if config is None else config))
    save_file(parts, place / "model.safetensors")
    if index is not None:
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def bits(shape, packed, values, offsets):
    """The parts of a compressed weight."""
    return {
        "a.shape": torch.tensor(shape), "a.bitmask": torch.tensor(packed, dtype=torch.uint8),
        "a.compressed": torch.ones(values), "a.row_offsets": torch.tensor(offsets),
    }  # fmt: skip


@case("do not fit its shape")
def compressed_shape_huge(folder):
    return hub(folder, bits([10**9, 10**6], [[3], [1]], 3, [0, 2]))


@case("impossible shape")
def compressed_shape_negative(folder):
    return hub(folder, bits([-2, -8], [[3], [1]], 3, [0, 2]))


@case("4 values for 3 bits")
def compressed_values_too_many(folder):
    return hub(folder, bits([2, 8], [[3], [1]], 4, [0, 2]))


@case("row_offsets. do not agree")
def compressed_rows_elsewhere(folder):
    return hub(folder, bits([2, 8], [[3], [1]], 3, [0, 9]))


@case("two of every four")
def compressed_not_2_of_4(folder):
    parts = bits([2, 8], [[3], [1]], 3, [0, 2])
    del parts["a.row_offsets"]
    return hub(folder, parts)


@case("lacks the other parts")
def compressed_in_part(folder):
    parts = bits([2, 8], [[3], [1]], 3, [0, 2])
    del parts["a.shape"]
    return hub(folder, parts)


@case("two of its tensors are called `a.weight`")
def compressed_and_dense(folder):
    return hub(folder, {**bits([2, 8], [[3], [1]], 3, [0, 2]), "a.weight": torch.ones(2, 8)})


@case("no tensor is packed so")
def compressed_by_its_settings_only(folder):
    return hub(folder, {"a.weight": torch.ones(2, 8)})


@case("packed as 'sparse-99'")
def compressed_in_an_unknown_way(folder):
    return hub(folder, bits([2, 8], [[3], [1]], 3, [0, 2]), {"sparsity_config": {"format": "sparse-99"}})


@case("no table of settings")
def settings_a_list(folder):
    return hub(folder, {"a": torch.ones(1)}, [])


@case("not in its own folder")
def shard_above(folder):
    return hub(folder, {"a": torch.ones(1)}, {}, {"weight_map": {"a": "../../secret.safetensors"}})


@case("does not exist")
def shard_missing(folder):
    return hub(folder, {"a": torch.ones(1)}, {}, {"weight_map": {"a": "model-2.safetensors"}})


@case("`b` and 0 more are in no shard")
def shard_without_its_tensor(folder):
    return hub(folder, {"a": torch.ones(1)}, {}, {"weight_map": dict.fromkeys("ab", "model.safetensors")})


@case("no `weight_map`")
def shards_without_a_map(folder):
    return hub(folder, {"a": torch.ones(1)}, {}, {"metadata": {}}) / "model.safetensors.index.json"


# what is no file


@case("folder without config.json")
def folder_of_nothing(folder):
    return folder


@case("not an ordinary file")
def pipe(folder):
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


@case("not an ordinary file")
def pipe_for_torch(folder):
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


@case("not an ordinary file")
def device(folder):
    (folder / "a.pt").symlink_to("/dev/zero")
    return folder / "a.pt"


@case("cannot be read")
def link_to_itself(folder):
    (folder / "a.pt").symlink_to(folder / "a.pt")
    return folder / "a.pt"


@case("does not exist; did you mean .*weights.safetensors")
def name_with_a_slip(folder):
    put(folder, "weights.safetensors", b"x")
    return folder / "wieghts.safetensors"


@case("x1b.2J.* does not exist")
def name_that_clears_the_screen(folder):
    return folder / "a\x1b[2Jb"


@case("does not exist: there is no folder")
def folder_missing(folder):
    return folder / "no" / "a.pt"


@case("no kind that is read here")
def some_text(folder):
    return put(folder, "a.txt", b"hello")


@case("holds no weights")
def settings_alone(folder):
    return put(folder, "config.json", b"{}")
