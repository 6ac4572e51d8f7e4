"""Pictures: decoding them, statistics of their channels, and folders with one subfolder for each class."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.data.cache import Where, cached, fingerprint
from secateur.data.dataset import Dataset, Split, stratified

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
VALIDATION = ("validation", "valid", "val", "dev")
CUT = "No test part was found: a fixed, class-stratified fifth of the training part was set aside as the test part."
HELD = "No test part was found: the validation part is the test part."
_THREADS = 2
_GRAY = ("1", "L", "LA")


class _Colour(Exception):
    """A coloured picture in a set that looked gray."""


def require(module: str, purpose: str) -> ModuleType:
    """An optional package, imported when it is first needed.

    Raises:
        UsageError: when it is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {module.partition('.')[0]!r}: `pip install secateur[data]` ({error})."
        ) from error


def load_folder(name: str, folder: Path, where: Where, size: int | None = None) -> Dataset:
    """Pictures in ``folder/train/<class>/``, with ``test/`` and ``val/`` beside ``train/``.

    Without a ``train`` folder the class folders are those of ``folder`` itself. Without a ``test`` part the
    ``val`` part is the test part; without either a fixed fifth is cut off. ``note`` says so.

    Args:
        name: name of the data set.
        folder: the folder.
        where: whether to use the cache.
        size: height and width to resize every picture to, in pixels.

    Raises:
        DataError: no pictures, pictures of several sizes, a damaged picture, or a test class that is not
            among the training classes.
    """
    parts = _find_parts(folder)
    classes = sorted({label for label, _ in parts["train"]})
    files = [file for part in parts.values() for _, file in part]

    def build() -> Dataset:
        for part, pictures in parts.items():
            for label, file in pictures:
                if label not in classes:
                    raise DataError(
                        f"{file}: the {part} class {label!r} has no folder in the training part ({', '.join(classes)})."
                    )
        x = decode(files, lambda i: str(files[i]), size)
        labels = {part: [classes.index(label) for label, _ in pictures] for part, pictures in parts.items()}
        sizes = [len(pictures) for pictures in parts.values()]
        pieces = zip(labels.items(), x.split(sizes), strict=True)
        return assemble(
            name, {part: Split(piece, torch.tensor(y)) for (part, y), piece in pieces}, tuple(classes), "image"
        )

    return cached(name, ["image folder", name, size, fingerprint(files)], build, where.cache)


def assemble(name: str, parts: dict[str, Split], classes: tuple[str, ...], kind: Any) -> Dataset:
    """A data set out of the parts ``train`` and, where present, ``test`` and ``validation``.

    A missing test part is replaced by the validation part or else cut off the training part (seed 0), and
    ``note`` says so. uint8 images get the mean and standard deviation of the training part's channels.

    Raises:
        DataError: when the training part is too small to be cut.
    """
    parts, note = dict(parts), ""
    if "test" not in parts and "validation" in parts:
        parts["test"], note = parts.pop("validation"), HELD
    elif "test" not in parts:
        whole = parts["train"]
        kept, held = stratified(whole.y, round(len(whole) / 5), 0, "test part")
        parts["train"], parts["test"], note = whole.take(kept), whole.take(held), CUT
    mean, std = channel_statistics(parts["train"].x) if parts["train"].x.dtype == torch.uint8 else (None, None)
    return Dataset(name, parts["train"], parts["test"], classes, kind, mean, std, parts.get("validation"), note)


def channel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (1 for a constant channel) of each channel of uint8 ``(N, C, H, W)``, in [0, 1].

    They are exact: computed in float64 from counts of the 256 values.
    """
    counts = torch.zeros(x.shape[1], 256, dtype=torch.float64)
    for piece in x.split(4096):
        for channel in range(x.shape[1]):
            counts[channel] += torch.bincount(piece[:, channel].flatten(), minlength=256).cpu()
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    spread = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(spread > 0, spread, 1.0).tolist())


def decode(pictures: Sequence[bytes | Path], label: Callable[[int], str], size: int | None = None) -> Tensor:
    """Pictures as one tensor; gray if all of them are, otherwise RGB (alpha is dropped).

    Args:
        pictures: encoded pictures, or their files.
        label: what to call picture i in an error.
        size: height and width to resize to (bilinear); None to require pictures of one size.

    Returns:
        uint8 ``(N, 1 or 3, H, W)``.

    Raises:
        DataError: a damaged picture, more than 8 bits a channel, or pictures of two sizes.
        UsageError: Pillow is missing, or ``size`` is less than 1.
    """
    image = require("PIL.Image", "reading pictures")
    if size is not None and size < 1:
        raise UsageError(f"size={size}: give the height and width in pixels, 1 or more.")
    if not pictures:
        raise DataError("there is no picture to decode.")

    def fill(mode: str) -> np.ndarray:
        first = _open(image, pictures[0], label(0), mode, size)
        out = np.empty((len(pictures), *first.shape), dtype=np.uint8)

        def work(numbers: np.ndarray) -> None:
            for i in numbers:
                one = _open(image, pictures[i], label(i), mode, size)
                if one.shape != first.shape:
                    raise _two_sizes(label(0), first, label(i), one)
                out[i] = one

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(work, np.array_split(np.arange(len(pictures)), _THREADS)))
        return out

    try:
        return torch.from_numpy(fill("L")).unsqueeze(1)
    except _Colour:
        return torch.from_numpy(fill("RGB")).permute(0, 3, 1, 2).contiguous()


def _open(image: ModuleType, picture: bytes | Path, label: str, mode: str, size: int | None) -> np.ndarray:
    try:
        with image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            if opened.mode in ("F", "I") or opened.mode.startswith("I;"):
                raise DataError(f"{label}: a picture of mode {opened.mode!r}; convert it to 8 bits a channel.")
            if mode == "L" and opened.mode not in _GRAY:
                raise _Colour
            pixels = opened.convert(mode)
            if size is not None and pixels.size != (size, size):
                pixels = pixels.resize((size, size), image.Resampling.BILINEAR)
            return np.asarray(pixels)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        brief = str(error).partition(" <")[0]  # without the address of a buffer
        raise DataError(f"{label}: cannot be read as a picture ({brief}); replace or remove it.") from error


def _two_sizes(first: str, one: np.ndarray, second: str, other: np.ndarray) -> DataError:
    return DataError(
        f"pictures have several sizes: {first} is {one.shape[1]}x{one.shape[0]} and {second} is "
        f"{other.shape[1]}x{other.shape[0]} (width x height). Resize all with the option size, for example size=32."
    )


def _find_parts(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """``(class, file)`` of each picture of each part, sorted."""
    inside = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    named = {"train": inside.get("train", folder), "test": inside.get("test")}
    named["validation"] = next((inside[word] for word in VALIDATION if word in inside), None)
    reserved = () if "train" in inside else ("test", *VALIDATION)
    parts = {part: _pictures(place, reserved if part == "train" else ()) for part, place in named.items() if place}
    if not parts["train"]:
        raise DataError(
            f"{folder}: no data found. Expected train*.parquet files, or pictures in train/<class>/ "
            f"(or in <class>/) with one of the endings {', '.join(sorted(SUFFIXES))}."
        )
    return {part: pictures for part, pictures in parts.items() if pictures}


def _pictures(place: Path, reserved: tuple[str, ...]) -> list[tuple[str, Path]]:
    kinds = sorted(d for d in place.iterdir() if d.is_dir() and d.name[0] != "." and d.name.lower() not in reserved)
    return [
        (kind.name, file)
        for kind in kinds
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
