"""What a pickle would do, found out by reading its instructions and carrying out none of them."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from secateur.core.errors import FileError
from secateur.engine.foreign.guard import Open, check_shape, count, refusal

CURE = (
    "Nothing in it was run. Where it was made, save the state dict alone: "
    "`torch.save(model.state_dict(), path)`, or `safetensors.torch.save_file(model.state_dict(), path)`."
)

_WIDTHS = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "UntypedStorage": 1,
}  # fmt: skip
_DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
_REBUILD = "torch._utils._rebuild_tensor"
_TENSORS = {f"{_REBUILD}_v2", f"{_REBUILD}_v3", _REBUILD}
_PARAMETER = "torch._utils._rebuild_parameter"
_TYPED = "torch._tensor._rebuild_from_type_v2"
_DICTS = {"collections.OrderedDict", "builtins.dict", "__builtin__.dict"}
_CALLED = {
    "collections.Counter", "collections.defaultdict", "builtins.set", "__builtin__.set", "builtins.bytearray",
    "__builtin__.bytearray", "builtins.complex", "__builtin__.complex", "_codecs.encode", "torch.Size", "torch.device",
    "torch.serialization._get_layout", _PARAMETER, f"{_PARAMETER}_with_state", _TYPED, *_DICTS, *_TENSORS,
}  # fmt: skip
_ALLOWED = {
    *_CALLED, "torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage",
    *(f"torch.{name}" for name in (*_WIDTHS, *_DTYPES)),
}  # fmt: skip
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without data (of the device meta)",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors of another device, inside of NumPy arrays",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors of another device",
    "torch._utils._rebuild_wrapper_subclass": "tensors of a class of their own",
    "torch.distributed.tensor.DTensor": "tensors spread over processes",
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor": "tensors spread over processes",
}  # fmt: skip


class Named(NamedTuple):
    """A class or function that the pickle names."""

    name: str


class Call(NamedTuple):
    """What a call of it would have given."""

    name: str
    given: Any


class Storage(NamedTuple):
    """A piece of memory that the file holds beside the pickle."""

    key: str
    size: int
    width: int


@dataclass
class Survey:
    """What a pickle names.

    Args:
        path: the file, for messages.
        most: bytes that the tensors may take together.
        storages: the memory they lie in, by key.
    """

    path: Path
    most: int
    storages: dict[str, Storage] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    bytes: int = 0

    def named(self, module: Any, name: Any) -> Named:
        """A class or function, when it does nothing but hold data.

        Raises:
            FileError: for any other.
        """
        whole = f"{module}.{name}"
        if whole in _OTHER_TENSORS:
            raise refusal(self.path, f"it holds {_OTHER_TENSORS[whole]}, which are not read here", CURE)
        if whole not in _ALLOWED:
            raise refusal(self.path, f"it is a pickle that would run {ascii(whole)[:120]}", CURE)
        return Named(whole)

    def call(self, thing: Any, given: Any) -> Call:
        """A call; tensors are checked to lie within their memory."""
        if not isinstance(thing, Named) or thing.name not in _CALLED or not isinstance(given, tuple):
            raise refusal(self.path, f"its pickle calls {ascii(thing)[:80]}, which files of tensors do not need", CURE)
        if thing.name in _TENSORS:
            self.tensor(given)
        elif thing.name == _TYPED and len(given) > 3:
            self.call(given[0], given[2])
            _attributes(self, given[3], Tensor)
        elif thing.name == f"{_PARAMETER}_with_state" and len(given) > 3:
            _attributes(self, given[3], Tensor)
        elif thing.name.endswith("bytearray") and not all(isinstance(entry, bytes) for entry in given):
            raise refusal(self.path, "its pickle makes memory of any size", CURE)
        elif thing.name == "_codecs.encode" and given[1:] != ("latin1",):
            raise refusal(self.path, "its pickle encodes text in a way that files of tensors do not need", CURE)
        return Call(thing.name, given)

    def tensor(self, given: Any) -> None:
        """Check a view on a storage: offset, sizes and strides stay inside, and it does not unfold endlessly."""
        if not isinstance(given, tuple) or len(given) < 4 or not isinstance(given[0], Storage):
            raise refusal(self.path, "a tensor in it has no memory")
        storage, offset, size, stride = given[:4]
        width = storage.width
        if len(given) > 6 and isinstance(given[6], Named):
            width = _DTYPES.get(given[6].name.removeprefix("torch."), 1)
        size = check_shape(self.path, f"storage {storage.key}", _plain(size))
        steps = check_shape(self.path, f"storage {storage.key}", _plain(stride))
        if len(steps) != len(size) or type(offset) is not int or offset < 0:
            raise refusal(self.path, "a tensor in it has no place in its memory")
        last = offset + sum((n - 1) * step for n, step in zip(size, steps, strict=True))
        if count(size) and (last + 1) * width > storage.size:
            raise refusal(
                self.path, f"a tensor of shape {list(size)} in it reaches beyond its memory of {storage.size:,} bytes"
            )
        self.bytes += count(size) * width
        if self.bytes > self.most:
            raise refusal(
                self.path, f"tensors such as one of shape {list(size)} unfold to more than {self.most:,} bytes"
            )

    def storage(self, given: Any) -> Storage:
        """A piece of memory by what names it."""
        if not isinstance(given, tuple) or len(given) < 5 or given[0] != "storage" or not isinstance(given[1], Named):
            raise refusal(self.path, "its pickle asks for something that is no tensor", CURE)
        width = _WIDTHS.get(given[1].name.rpartition(".")[2])
        key, size = given[2], given[4]
        if len(given) > 5 and given[5] is not None:
            raise refusal(
                self.path, "its tensors share their memory in the manner of torch before 1.0", "Save it anew."
            )
        if width is None or not isinstance(key, str) or type(size) is not int or size < 0:
            raise refusal(self.path, "a tensor in it names no memory")
        found = Storage(key, size * width, width)
        if self.storages.setdefault(key, found).size != found.size:
            raise refusal(self.path, f"the memory {ascii(key)[:40]} has two sizes")
        return found

    def take(self) -> list[Any]:
        """Everything since the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found


def _plain(sizes: Any) -> Any:
    """A torch.Size is a call with a tuple."""
    return sizes.given[0] if isinstance(sizes, Call) and sizes.name == "torch.Size" and sizes.given else sizes


def survey(path: Path, file: Open, most: int) -> tuple[Any, Survey]:
    """Read one pickle; the file is left behind its end.

    Args:
        path: for messages.
        file: where the pickle begins.
        most: bytes that its tensors may take together.

    Returns:
        What it stands for, with calls and names in the place of objects, and what it names.

    Raises:
        FileError: when it names anything but tensors and plain containers, or is damaged.
    """
    found = Survey(path, most)
    try:
        for opcode, given, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return found.stack[-1], found
            _step(found, opcode.name, given)
    except FileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        words = (str(error).splitlines() or [""])[0][:120]
        raise refusal(path, f"its pickle is truncated or damaged ({words!r})") from error
    raise refusal(path, "its pickle is truncated")


def _step(s: Survey, name: str, given: Any) -> None:
    if name in _PUSH:
        s.stack.append(given)
    elif name in _FRESH:
        s.stack.append(_FRESH[name]())
    elif name in _MEMO_IN:
        s.memo[len(s.memo) if given is None else given] = s.stack[-1]
    elif name in _MEMO_OUT:
        s.stack.append(s.memo[given])
    elif name in _ACTIONS:
        _ACTIONS[name](s)
    elif name == "GLOBAL":
        s.stack.append(s.named(*given.split(" ", 1)))
    elif name not in ("PROTO", "FRAME"):
        raise refusal(s.path, f"its pickle has the instruction {name}, which files of tensors do not need", CURE)


def _append(s: Survey) -> None:
    entry = s.stack.pop()
    if isinstance(s.stack[-1], list):
        s.stack[-1].append(entry)


def _appends(s: Survey) -> None:
    entries = s.take()
    if isinstance(s.stack[-1], list):
        s.stack[-1].extend(entries)


def _set(s: Survey, entries: list[Any]) -> None:
    target = s.stack[-1]
    for key, value in zip(entries[::2], entries[1::2], strict=True):
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, str | int | float | bytes | Named | None):  # a key can be nested without end
                raise refusal(s.path, f"a table in it has a key that is a {type(part).__name__}", CURE)
        if isinstance(target, dict):
            target[key] = value


def _setitem(s: Survey) -> None:
    value, key = s.stack.pop(), s.stack.pop()
    _set(s, [key, value])


def _stack_global(s: Survey) -> None:
    name, module = s.stack.pop(), s.stack.pop()
    s.stack.append(s.named(module, name))


def _reduce(s: Survey) -> None:
    given, thing = s.stack.pop(), s.stack.pop()
    made = s.call(thing, given)
    s.stack.append({} if made.name in _DICTS and not made.given else made)


def _build(s: Survey) -> None:
    """The state of an object, which only tables may have; what a tensor is must not be said again after it was made."""
    state, target = s.stack.pop(), s.stack[-1]
    if not isinstance(target, dict) and not (isinstance(target, Call) and target.name in _DICTS):
        raise refusal(s.path, "its pickle changes a tensor after making it", CURE)
    _attributes(s, state, dict)


def _attributes(s: Survey, state: Any, owner: type) -> None:
    """What is hung on a table or tensor must have names of its own: no method or property may be replaced."""
    for part in state if isinstance(state, tuple) else (state,):
        if part is None:
            continue
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            raise refusal(s.path, f"its pickle gives an object a state that is a {type(part).__name__}", CURE)
        for key in part:
            if hasattr(owner, key):
                raise refusal(s.path, f"its pickle would replace {ascii(key)[:40]} of a {owner.__name__}", CURE)


def _tuple(size: int) -> Callable[[Survey], None]:
    def act(s: Survey) -> None:
        found = tuple(s.stack[-size:])
        if len(found) < size:
            raise ValueError("too few entries")
        del s.stack[-size:]
        s.stack.append(found)

    return act


def _pop(s: Survey) -> None:
    s.stack.pop()


def _pop_mark(s: Survey) -> None:
    s.take()


def _dict(s: Survey) -> None:
    entries = s.take()
    s.stack.append({})
    _set(s, entries)


_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": list,
}  # fmt: skip
_PUSH = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_MEMO_IN = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_MEMO_OUT = {"GET", "BINGET", "LONG_BINGET"}
_ACTIONS: dict[str, Callable[[Survey], None]] = {
    "MARK": lambda s: s.marks.append(len(s.stack)),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda s: s.stack.append(s.stack[-1]),
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": lambda s: _set(s, s.take()),
    "TUPLE": lambda s: s.stack.append(tuple(s.take())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda s: s.stack.append(s.take()),
    "DICT": _dict,
    "FROZENSET": lambda s: s.stack.append(s.take()),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": lambda s: s.stack.append(s.storage(s.stack.pop())),
}
