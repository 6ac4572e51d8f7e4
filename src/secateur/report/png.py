"""Pictures as PNG, without a library: the format needs no more than zlib."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR = {1: 0, 3: 2}


def encode(picture: NDArray[np.uint8], filtered: bool | None = None) -> bytes:
    """A picture ``(H, W, 1 or 3)`` as a PNG file.

    Args:
        picture: the pixels.
        filtered: whether rows are written as differences (filters of the format), which suits photographs, or as they
            are, which suits drawings; None tries both and takes the smaller.

    Raises:
        ValueError: for other shapes, or no pixels.
    """
    if picture.ndim != 3 or picture.shape[2] not in _COLOUR or not picture.size:
        raise ValueError(f"a picture has shape (H, W, 1) or (H, W, 3), not {picture.shape}")
    height, width, channels = picture.shape
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOUR[channels], 0, 0, 0)
    ways = (_plain, _filtered) if filtered is None else (_filtered,) if filtered else (_plain,)
    rows = min((zlib.compress(way(picture), 6) for way in ways), key=len)
    return _SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def data_uri(png: bytes) -> str:
    """The file as an address that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def shrink(pictures: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Pictures ``(n, H, W, C)`` made smaller by whole factors until no side exceeds ``side``: means of blocks."""
    factor = -(-max(pictures.shape[1:3]) // side)
    if factor <= 1:
        return pictures
    n, height, width, channels = pictures.shape
    rows, columns = max(1, height // factor), max(1, width // factor)
    whole = pictures[:, : rows * factor, : columns * factor]
    blocks = whole.reshape(n, rows, whole.shape[1] // rows, columns, whole.shape[2] // columns, channels)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)


def sheet(pictures: NDArray[np.uint8], across: int) -> NDArray[np.uint8]:
    """Pictures ``(n, H, W, C)`` on a grid with ``across`` in a row, as one picture; what is left over is black."""
    n, height, width, channels = pictures.shape
    down = -(-n // across)
    padded = np.zeros((down * across, height, width, channels), np.uint8)
    padded[:n] = pictures
    grid = padded.reshape(down, across, height, width, channels).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(down * height, across * width, channels)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _plain(picture: NDArray[np.uint8]) -> bytes:
    lines = picture.reshape(len(picture), -1)
    return np.concatenate([np.zeros((len(lines), 1), np.uint8), lines], 1).tobytes()


def _filtered(picture: NDArray[np.uint8]) -> bytes:
    """Each row by the filter that leaves the smallest numbers, as the format's authors advise."""
    height, width, channels = picture.shape
    here = picture.astype(np.int16)
    left = np.pad(here, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    above = np.pad(here, ((1, 0), (0, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0), (0, 0)))[:-1]
    guesses = (np.zeros_like(here), left, above, (left + above) // 2, _paeth(left, above, corner))
    made = np.stack([(here - guess).astype(np.uint8).reshape(height, -1) for guess in guesses])
    best = np.abs(made.view(np.int8).astype(np.int32)).sum(2).argmin(0)
    lines = made[best, np.arange(height)]
    return np.concatenate([best[:, None].astype(np.uint8), lines], 1).tobytes()


def _paeth(left: NDArray[np.int16], above: NDArray[np.int16], corner: NDArray[np.int16]) -> NDArray[np.int16]:
    first = left + above - corner
    by_left, by_above, by_corner = (np.abs(first - guess) for guess in (left, above, corner))
    pick = np.where(by_above <= by_corner, above, corner)
    return np.where((by_left <= by_above) & (by_left <= by_corner), left, pick)
