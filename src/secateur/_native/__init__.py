"""The compiled core, loaded through its plain C interface; no torch, no Python ABI."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

__all__ = ["MAX_DIMS", "Options", "Tensor", "library", "library_path", "why_not"]

ABI = 1
MAX_DIMS = 8
_NAMES = {"darwin": "libsecateur.dylib", "win32": "secateur.dll"}


class Tensor(ctypes.Structure):
    """A row-major array of the caller's: address, type (0 = float32, 1 = int64) and shape."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_DIMS),
    ]


class Options(ctypes.Structure):
    """How a session runs; zeros and nulls mean the defaults."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("memory_limit", ctypes.c_int64),
        ("isa", ctypes.c_char_p),
        ("tuning", ctypes.c_char_p),
    ]


def library_path() -> Path:
    """Where the compiled library is looked for: beside this file, or ``SECATEUR_NATIVE``."""
    named = os.environ.get("SECATEUR_NATIVE")
    return Path(named) if named else Path(__file__).parent / _NAMES.get(sys.platform, "libsecateur.so")


def _declare(lib: ctypes.CDLL) -> None:
    text, size, handle = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
    i32, i64, tensors, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(Tensor), ctypes.POINTER
    signatures = {
        "sec_abi_version": (i32, []),
        "sec_isas": (text, []),
        "sec_round_trip": (ctypes.c_double, []),
        "sec_plan_open": (i32, [text, pointer(handle), text, size]),
        "sec_plan_parse": (i32, [handle, size, pointer(handle), text, size]),
        "sec_plan_free": (None, [handle]),
        "sec_plan_inputs": (i32, [handle]),
        "sec_plan_outputs": (i32, [handle]),
        "sec_plan_input": (i32, [handle, i32, pointer(text), tensors]),
        "sec_plan_output": (i32, [handle, i32, pointer(text)]),
        "sec_session_create": (i32, [handle, pointer(Options), pointer(handle), text, size]),
        "sec_session_free": (None, [handle]),
        "sec_session_prepare": (i32, [handle, i64, text, size]),
        "sec_session_output": (i32, [handle, i64, i32, tensors, text, size]),
        "sec_session_run": (i32, [handle, tensors, i32, tensors, i32, text, size]),
        "sec_session_explain": (size, [handle, i64, text, size]),
        "sec_session_profile": (None, [handle, i32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    path = library_path()
    if not path.is_file():
        return None, f"there is no compiled library at {path}"
    try:
        lib = ctypes.CDLL(str(path))
        _declare(lib)
    except (OSError, AttributeError) as error:
        return None, f"the compiled library {path} cannot be loaded: {error}"
    if lib.sec_abi_version() != ABI:
        return None, f"the compiled library {path} has interface {lib.sec_abi_version()}, this package needs {ABI}"
    return lib, ""


def library() -> ctypes.CDLL | None:
    """The compiled core, or None when this installation has none."""
    return _load()[0]


def why_not() -> str:
    """Why `library` gives None; empty when it does not."""
    return _load()[1]
