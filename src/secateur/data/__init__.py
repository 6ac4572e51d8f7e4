"""Data sets as tensors, and loaders whose order is a function of seed and epoch."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError, SecateurError, UsageError, nearest
from secateur.core.sockets import load_object
from secateur.data import sources
from secateur.data.cache import Where
from secateur.data.dataset import Dataset, Split
from secateur.data.images import assemble, load_folder
from secateur.data.loader import Loader
from secateur.data.tables import find_parts, load_hub_set, load_parquet

__all__ = ["Dataset", "Loader", "Split", "load", "names"]


def _hub_set(name: str, hub: str) -> Callable[..., Dataset]:
    def build(where: Where, *, size: int | None = None) -> Dataset:
        return load_hub_set(name, hub, where, size)

    return build


_BUILT_IN: dict[str, Callable[..., Dataset]] = {
    "digits": sources.digits,
    "mnist": _hub_set("mnist", "ylecun/mnist"),
    "cifar10": _hub_set("cifar10", "uoft-cs/cifar10"),
    **{f"monks{i}": functools.partial(sources.monks, f"monks{i}") for i in (1, 2, 3)},
    "nettalk": sources.nettalk,
    "tinyshakespeare": sources.tinyshakespeare,
    "mnist1d": sources.mnist1d,
    "blobs": sources.blobs,
}


def names() -> list[str]:
    """Names of the built-in data sets.

    >>> "digits" in names()
    True
    """
    return sorted(_BUILT_IN)


def load(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, *, cache: bool = True, **options: Any
) -> Dataset:
    """A data set by name, by folder or from the user's own code.

    Args:
        name: one of :func:`names`; ``"folder:PATH"`` or any existing path (parquet files in the layout of
            the Hugging Face hub, or pictures in ``train/<class>/``); or ``"module:function"``, which returns
            a :class:`Dataset` or the pair ``(train, test)`` of pairs ``(x, y)`` of tensors.
        data_dir: folder of data sets, in which ``mnist`` lies in ``mnist/`` and so on (all of MONK's
            problems in ``monks/``); None for the environment variable ``SECATEUR_DATA``.
        cache: keep decoded pictures in ``$SECATEUR_CACHE`` or ``~/.cache/secateur``.
        **options: options of the data set, for example ``size=32`` (pictures), ``block=64``
            (tinyshakespeare) or ``train=200`` (blobs, mnist1d); a function gets them as keywords.

    Raises:
        UsageError: an unknown name or option (the nearest is suggested), or a missing package.
        DataError: data that is missing, damaged or of the wrong shape.
    """
    name, where = os.fspath(name), Where(data_dir, cache)
    if name in _BUILT_IN:
        build: Callable[..., Dataset] = functools.partial(_BUILT_IN[name], where)
    elif name.startswith("folder:") or os.path.exists(name):
        build = functools.partial(_from_folder, name, where)
    elif re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _from_code(name, options)
    elif os.sep in name:
        raise DataError(f"{name!r}: no such folder.")
    else:
        hint = "A folder is named by its path, your own code by 'module:function'."
        raise UsageError(f"no data set is called {name!r}. {nearest(name, _BUILT_IN)} {hint}")
    known = {
        p.name: str(p.annotation) for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    _check_options(name, options, known)
    for option, value in options.items():
        _check_value(name, option, value, known[option])
    return build(**options)


def _from_folder(name: str, where: Where, *, size: int | None = None) -> Dataset:
    path = Path(name.removeprefix("folder:")).expanduser()
    if not path.exists():
        raise DataError(f"{name!r}: {path} does not exist; give the path of a folder.")
    if path.is_file() and path.suffix != ".parquet":
        raise DataError(f"{name!r}: {path.name} is no parquet file; give a folder, or convert it to parquet.")
    if find_parts(path):
        return load_parquet(name, path, where, size)
    return load_folder(name, path, where, size)


def _from_code(name: str, options: dict[str, Any]) -> Dataset:
    function = load_object(name)
    if not callable(function):
        raise UsageError(f"{name!r} is {type(function).__name__}; it must be a function that returns the data.")
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        _check_options(name, options, [p.name for p in parameters if p.kind in by_name])
    missing = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if set(missing) - set(options):
        raise UsageError(f"{name!r} needs the options {', '.join(m for m in missing if m not in options)}.")
    try:
        made = function(**options)
    except SecateurError:
        raise
    except Exception as error:
        raise DataError(f"{name!r} failed: {type(error).__name__}: {error}") from error
    return made if isinstance(made, Dataset) else _from_pairs(name, made)


def _from_pairs(name: str, made: Any) -> Dataset:
    try:
        splits = [part if isinstance(part, Split) else Split(*part) for part in made]
        train, test = splits
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name!r} returned {type(made).__name__}; it must return a secateur Dataset, or ((x, y), (x, y)) "
            "for training and testing."
        ) from error
    kind = _kind(name, train.x)
    numbers = [t for s in splits for t in ((s.x, s.y) if kind == "text" else (s.y,)) if t.dtype == torch.int64]
    highest = max((int(t.max()) for t in numbers if t.numel()), default=0)
    return assemble(name, {"train": train, "test": test}, tuple(map(str, range(highest + 1))), kind)


def _kind(name: str, x: Tensor) -> Any:
    if x.dtype == torch.uint8 and x.dim() == 4:
        return "image"
    if x.dtype == torch.int64 and x.dim() == 2:
        return "text"
    if x.is_floating_point() and x.dim() >= 2:
        return "image" if x.dim() == 4 else "features"
    raise DataError(
        f"{name!r}: inputs are {x.dtype} {tuple(x.shape)}; give uint8 or floating images (N, C, H, W), floating "
        "features (N, D) or int64 tokens (N, T)."
    )


def _check_options(name: str, options: dict[str, Any], known: Iterable[str]) -> None:
    for option in options:
        if option not in known:
            raise UsageError(f"the data set {name!r} has no option {option!r}. {nearest(option, known)}")


def _check_value(name: str, option: str, value: Any, annotation: str) -> None:
    """Refuse a value that is not of the option's type: ``int``, ``float``, ``bool`` or ``int | None``."""
    if annotation == "bool":
        if isinstance(value, bool):
            return
        raise UsageError(f"the option {option}={value!r} of the data set {name!r} must be true or false.")
    allowed = (int, float) if "float" in annotation else int
    if isinstance(value, allowed) and not isinstance(value, bool) or value is None and "None" in annotation:
        return
    wanted = "a number" if "float" in annotation else "a whole number"
    raise UsageError(f"the option {option}={value!r} of the data set {name!r} must be {wanted}.")
