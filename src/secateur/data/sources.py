"""The data sets known by name that are small text files, come with a package or are made on the spot."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.core.streams import stream
from secateur.data.cache import Where, cached
from secateur.data.dataset import Dataset, Split, stratified
from secateur.data.images import channel_statistics, require

DIGITS_TEST = 360
MONK_VALUES = (3, 3, 2, 3, 4, 2)
"""Number of values of each of the six attributes; together 17 inputs."""
NOT_FETCHED = (
    "it is read from the original text files, which are not fetched: `secateur[hub]` fetches mnist and cifar10 only"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WINDOW = 7
SYMBOLS = len(LETTERS) + 3
"""Symbols of a window's place: 26 letters, the word boundary and two punctuation marks that no word has."""


def digits(where: Where) -> Dataset:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, as images ``(N, 1, 8, 8)``.

    A pixel v of 0..16 becomes the uint8 ``(v * 255 + 8) // 16``, the nearest of 0..255. 360 images, with
    the classes in proportion, are the test part; the choice is fixed (``stream(0, "split", "digits")``).
    """

    def build() -> Dataset:
        bunch = require("sklearn.datasets", "the data set 'digits'").load_digits()
        x = (
            (torch.from_numpy(bunch.images).long() * 255 + 8)
            .div(16, rounding_mode="floor")
            .to(torch.uint8)
            .unsqueeze(1)
        )
        whole = Split(x, torch.from_numpy(bunch.target).long())
        kept, held = stratified(whole.y, DIGITS_TEST, 0, "digits")
        train, names = whole.take(kept), tuple(map(str, range(10)))
        mean, std = channel_statistics(train.x)
        return Dataset("digits", train, whole.take(held), names, "image", mean, std)

    try:
        version = importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        version = require("sklearn", "the data set 'digits'").__version__
    return cached("digits", ["digits", version], build, where.cache)


def monks(name: str, where: Where) -> Dataset:
    """One of MONK's problems (Thrun et al. 1991): 17 one-hot inputs of six attributes, two classes.

    The original files: 124, 169 and 122 training rows, 432 test rows (all combinations). The training rows
    of MONK-3 carry their noise.

    Raises:
        DataError: when the files are missing or a row is not eight fields in range.
    """
    files = tuple(f"monks-{name[-1]}.{part}" for part in ("train", "test"))
    folder = where.folder("monks", *files)
    if folder is None:
        raise where.absent(name, "monks", files, f" (from UCI: MONK's Problems); {NOT_FETCHED}")
    train, test = (_monk_rows(next(folder.rglob(file))) for file in files)
    return Dataset(name, train, test, ("0", "1"), "features")


def _monk_rows(file: Path) -> Split:
    rows: list[list[int]] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        ranges = (range(2), *(range(1, n + 1) for n in MONK_VALUES))
        if len(fields) != 8 or not all(f.isdigit() and int(f) in r for f, r in zip(fields, ranges, strict=False)):
            raise DataError(f"{file} line {number}: {line!r} is not a class, six attributes in range and a name.")
        rows.append([int(f) for f in fields[:7]])
    if not rows:
        raise DataError(f"{file}: no rows; fetch the file again.")
    table = torch.tensor(rows)
    hot = [torch.nn.functional.one_hot(table[:, i + 1] - 1, n) for i, n in enumerate(MONK_VALUES)]
    return Split(torch.cat(hot, 1).float(), table[:, 0].clone())


def nettalk(where: Where, *, test_words: int | None = None, tokens: bool = False, seed: int = 0) -> Dataset:
    """Reading English aloud (Sejnowski and Rosenberg 1987): a letter among its neighbours to its sound.

    An example is one letter of a word in a window of 7 letters: 7 times 29 = 203 one-hot inputs (26
    letters, the word boundary, and the two punctuation marks of the paper, which are never on here). Words
    stand alone, with boundaries on both sides.

    The original's 26 outputs are articulatory features, whose code is not in the dictionary file; here the
    task is to classify the phoneme with its stress mark, as in ``"a1"`` or ``"-<"``. The classes are all
    pairs that occur in the dictionary, in sorted order.

    The training part is every entry of the dictionary whose word is in the list of common words, the test
    part all other entries. A letter takes 812 bytes, the whole about 120 MB.

    Args:
        where: where to look for ``nettalk/nettalk.data`` and ``nettalk/nettalk.list``.
        test_words: use that many random entries (``stream(seed, "nettalk")``) for the test instead of all.
        tokens: give the 7 letters as numbers 0..26 (26 is the boundary) instead of one-hot inputs.
        seed: seed of that choice.

    Raises:
        DataError: when the files are missing or damaged, or ``test_words`` is out of range.
    """
    needed = ("nettalk.data", "nettalk.list")
    folder = where.folder("nettalk", *needed)
    if folder is None:
        origin = " (from UCI: Connectionist Bench, Nettalk Corpus)"
        raise where.absent("nettalk", "nettalk", needed, f"{origin}; {NOT_FETCHED}")
    entries, listing = _nettalk_entries(next(folder.rglob(needed[0]))), next(folder.rglob(needed[1]))
    found = re.search(r"\*{5,}\s*\(([^)]*)\)", _text(listing))
    common = set(found[1].lower().split()) if found else set()
    train = [entry for entry in entries if entry[0] in common]
    test = [entry for entry in entries if entry[0] not in common]
    if not train or not test:
        raise DataError(f"{listing}: no list of words in parentheses that are in the dictionary; fetch the file again.")
    if test_words is not None:
        if not 1 <= test_words <= len(test):
            raise DataError(
                f"test_words={test_words}: the test part has {len(test)} words; give a number from 1 to {len(test)}."
            )
        test = [test[i] for i in torch.randperm(len(test), generator=stream(seed, "nettalk"))[:test_words]]
    classes = sorted({a + b for _, sounds, stress in entries for a, b in zip(sounds, stress, strict=True)})
    note = f"{len({e[0] for e in train})} of {len(common)} common words are in the dictionary."
    learn, judge = (_windows(part, classes, tokens) for part in (train, test))
    return Dataset("nettalk", learn, judge, tuple(classes), "tokens" if tokens else "features", note=note)


def _nettalk_entries(file: Path) -> list[tuple[str, str, str]]:
    entries = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        fields = line.split("\t")
        if (
            len(fields) != 4
            or not len(fields[0]) == len(fields[1]) == len(fields[2])
            or not set(fields[0]) <= set(LETTERS)
        ):
            raise DataError(
                f"{file} line {number}: {line!r} is not a word, as many phonemes, as many stress marks and a flag."
            )
        entries.append((fields[0], fields[1], fields[2]))
    return entries


def _windows(entries: Sequence[tuple[str, str, str]], classes: Sequence[str], tokens: bool) -> Split:
    gap = "_" * (WINDOW // 2)
    text = gap + gap.join(word for word, _, _ in entries) + gap
    codes = np.array([LETTERS.find(letter) for letter in text])
    codes[codes < 0] = len(LETTERS)
    places = np.lib.stride_tricks.sliding_window_view(codes, WINDOW)
    places = torch.from_numpy(places[places[:, WINDOW // 2] < len(LETTERS)])
    x = places if tokens else torch.zeros(*places.shape, SYMBOLS).scatter_(2, places[:, :, None], 1.0).flatten(1)
    number = {name: i for i, name in enumerate(classes)}
    return Split(
        x, torch.tensor([number[a + b] for _, sounds, stress in entries for a, b in zip(sounds, stress, strict=True)])
    )


def tinyshakespeare(where: Where, *, block: int = 128) -> Dataset:
    """1.1 MB of Shakespeare as characters: int64 tokens ``(N, block)``, targets the same shifted by one.

    The vocabulary is the sorted characters of the whole text. The first 90 % of the characters are the
    training part. Blocks do not overlap; an end that fills no block is left out.

    Args:
        where: where to look for ``tinyshakespeare/input.txt``.
        block: characters in an example.

    Raises:
        DataError: when the file is missing, or a part is shorter than a block.
    """
    folder = where.folder("tinyshakespeare", "input.txt")
    if folder is None:
        origin = " (from GitHub: karpathy/char-rnn)"
        raise where.absent("tinyshakespeare", "tinyshakespeare", ("input.txt",), f"{origin}; {NOT_FETCHED}")
    text = _text(next(folder.rglob("input.txt")))
    vocabulary = sorted(set(text))
    number = {letter: i for i, letter in enumerate(vocabulary)}
    tokens = torch.tensor([number[letter] for letter in text])
    cut = len(tokens) * 9 // 10
    train, test = _blocks(tokens[:cut], block), _blocks(tokens[cut:], block)
    return Dataset("tinyshakespeare", train, test, tuple(vocabulary), "text")


def _blocks(tokens: Tensor, block: int) -> Split:
    if not 1 <= block < len(tokens):
        raise DataError(f"block={block}: a part of the text has {len(tokens)} characters; give 1 to {len(tokens) - 1}.")
    count = (len(tokens) - 1) // block
    return Split(tokens[: count * block].view(count, block), tokens[1 : count * block + 1].view(count, block))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again.") from error


_STROKES = torch.tensor([
    [0, 2, 4, 5, 5.5, 6, 6, 5.5, 5, 4, 2, 0],
    [0, -1, -2, -3, -4, -2, 0, 2, 4, 6, 3, 0],
    [0, 3, 5, 5, 3, 0, -2, -4, -4, -3, -1, 0],
    [0, 4, 5, 4, 1, 0, 0, 1, 4, 5, 4, 0],
    [0, -2, -4, -6, -6, 0, 1, 1, 1, 1, 1, 0],
    [0, -5, -5, -5, -5, 0, 3, 5, 5, 3, 1, 0],
    [0, -3, -5, -6, -6, -5, -4, -4, -5, -4, -2, 0],
    [0, 6, 6, 5, 4, 2, 0, -2, -4, -5, -6, 0],
    [0, -3, -3, 0, 4, 4, 0, -3, -3, 0, 4, 0],
    [0, 4, 0, -4, 0, 5, 5, 2, 0, -1, -3, 0],
]) / 6  # fmt: skip


def mnist1d(where: Where, *, train: int = 4000, test: int = 1000, noise: float = 0.1, seed: int = 0) -> Dataset:
    """A one-dimensional task in the style of MNIST-1D (Greydanus and Kobak 2020): features ``(N, 40)``.

    Ten templates of 12 points are stretched to 16 to 28 points (linear interpolation), put at a random
    place among 40, scaled by 0.6 to 1.4 and sheared; smooth and white noise is added. The templates are
    this library's own, so figures are not comparable with the original's. Classes are as even as can be.

    Args:
        where: not used, the data is made on the spot.
        train: number of training examples.
        test: number of test examples.
        noise: standard deviation of the smooth noise; the white noise has a fifth of it.
        seed: seed of the examples.
    """
    first, second = (_signals(n, noise, seed, part) for part, n in (("train", train), ("test", test)))
    return Dataset("mnist1d", first, second, tuple(map(str, range(10))), "features")


def _signals(count: int, noise: float, seed: int, part: str) -> Split:
    if count < 1:
        raise DataError(f"{part}={count}: give 1 example or more.")
    random, points = stream(seed, "mnist1d", part), 40
    y = (torch.arange(count) % 10)[torch.randperm(count, generator=random)]
    length, place, scale, shear = torch.rand(4, count, 1, generator=random)
    length = 15 + 12 * length
    at = (torch.arange(points) - place * (points - 1 - length)) / length * 11
    low = at.clamp(0, 10.999).floor()
    template = _STROKES[y]
    left, right = template.gather(1, low.long()), template.gather(1, low.long() + 1)
    signal = torch.where((at >= 0) & (at <= 11), left + (right - left) * (at - low), 0.0)
    signal = signal * (0.6 + 0.8 * scale) + 0.4 * (shear - 0.5) * torch.linspace(-1, 1, points)
    # the mean of 5 neighbours, scaled back to unit variance
    smooth = torch.randn(count, points + 4, generator=random).unfold(1, 5, 1).sum(2) / 5**0.5
    return Split(signal + noise * smooth + noise / 5 * torch.randn(count, points, generator=random), y)


def blobs(
    where: Where,
    *,
    classes: int = 4,
    features: int = 16,
    train: int = 1000,
    test: int = 500,
    spread: float = 0.5,
    seed: int = 0,
) -> Dataset:
    """Gaussian clusters: features ``(N, D)`` around standard normal centres, one for each class.

    Args:
        where: not used, the data is made on the spot.
        classes: number of clusters.
        features: number of inputs.
        train: number of training examples.
        test: number of test examples.
        spread: standard deviation of a cluster in each direction; the centres have 1.
        seed: seed of centres and examples.

    Raises:
        UsageError: when a number is less than 1, or ``spread`` is negative.
    """
    for option, value in (("classes", classes), ("features", features), ("train", train), ("test", test)):
        if value < 1:
            raise UsageError(f"{option}={value}: give 1 or more.")
    if not spread >= 0:
        raise UsageError(f"spread={spread}: give 0 or more.")
    centres = torch.randn(classes, features, generator=stream(seed, "blobs", "centres"))

    def part(name: str, count: int) -> Split:
        random = stream(seed, "blobs", name)
        y = (torch.arange(count) % classes)[torch.randperm(count, generator=random)]
        return Split(centres[y] + spread * torch.randn(count, features, generator=random), y)

    return Dataset("blobs", part("train", train), part("test", test), tuple(map(str, range(classes))), "features")
