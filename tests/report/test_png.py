import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.report.png import data_uri, encode, sheet, shrink


def decoded(png):
    """Pixels of a PNG with 8 bits a channel, by the rules of the format."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + content)
        chunks[kind], at = content, at + 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3}[colour]
    raw, out = zlib.decompress(chunks[b"IDAT"]), np.zeros((height, width * channels), int)
    assert depth == 8 and len(raw) == height * (1 + width * channels) and list(chunks)[-1] == b"IEND"
    for y in range(height):
        way, *line = raw[y * (1 + width * channels) : (y + 1) * (1 + width * channels)]
        for x, value in enumerate(line):
            a = out[y, x - channels] if x >= channels else 0
            b = out[y - 1, x] if y else 0
            c = out[y - 1, x - channels] if y and x >= channels else 0
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            out[y, x] = (value + (0, a, b, (a + b) // 2, paeth)[way]) % 256
    return out.reshape(height, width, channels)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 2**31), st.sampled_from([2, 40, 256])
)
def test_a_picture_reads_back_to_the_bit(height, width, channels, seed, values):
    picture = np.random.default_rng(seed).integers(values, size=(height, width, channels)).astype(np.uint8)
    for filtered in (None, False, True):
        assert np.array_equal(decoded(encode(picture, filtered)), picture)


def test_another_reader_sees_the_same_picture_and_filters_make_photographs_smaller():
    pillow = pytest.importorskip("PIL.Image")
    rows, columns = np.mgrid[:64, :48]
    smooth = np.stack([(rows * 3 + columns + k * 30) % 256 for k in range(3)], 2).astype(np.uint8)
    with pillow.open(io.BytesIO(encode(smooth))) as image:
        assert np.array_equal(np.asarray(image), smooth)
    assert len(encode(smooth, True)) < len(encode(smooth, False)) and len(encode(smooth)) == len(encode(smooth, True))
    assert base64.b64decode(data_uri(encode(smooth)).partition(",")[2]) == encode(smooth)


@pytest.mark.parametrize("shape", [(0, 3, 1), (3, 3, 2), (3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        encode(np.zeros(shape, np.uint8))


def test_a_sheet_has_picture_k_at_its_place():
    pictures = np.random.default_rng(0).integers(256, size=(7, 3, 4, 1)).astype(np.uint8)
    made = sheet(pictures, 3)
    assert made.shape == (9, 12, 1)
    for k in range(7):
        y, x = k // 3 * 3, k % 3 * 4
        assert np.array_equal(made[y : y + 3, x : x + 4], pictures[k])
    assert not made[6:, 4:].any()


def test_shrinking_takes_means_of_blocks_and_leaves_small_pictures_alone():
    pictures = np.random.default_rng(0).integers(256, size=(2, 10, 8, 3)).astype(np.uint8)
    assert shrink(pictures, 10) is pictures
    small = shrink(pictures, 5)
    assert small.shape == (2, 5, 4, 3)
    wanted = [
        [pictures[1, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, 0].astype(float).mean() for x in range(4)] for y in range(5)
    ]
    assert np.array_equal(small[1, :, :, 0], np.rint(wanted))
    assert shrink(np.zeros((1, 1, 300, 1), np.uint8), 64).shape == (1, 1, 60, 1)
