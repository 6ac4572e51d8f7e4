"""Numbers as a page prints them, read back: which number a text shows, to which digit, in which unit."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
NUMBER = re.compile(r"([+−]?)(\d{1,3}(?:,\d{3})*|\d+)(?:\.(\d+))?(?:e([+−]\d+))?(.*)", re.DOTALL)
TOKEN = re.compile(
    r"(?<![\w.,/])[+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+−]\d+)?(?: points| %|×| ms\b| [kMGTP]?B\b| [kMGTP]\b)?(?![\w/])"
)
LEVEL = re.compile(r"95 % interval")
"""The level of every interval is no figure of the run."""


@dataclass(frozen=True)
class Style:
    """How a figure is written: its unit, and so many places after the point or so many significant digits.

    ``metric`` has a prefix before the unit from 1,000 on; ``signed`` a plus before what is above 0.
    """

    unit: str = ""
    places: int | None = None
    digits: int | None = None
    signed: bool = False
    metric: bool = False

    @property
    def bare(self):
        """As the ends of an interval are written."""
        return replace(self, unit="")


COUNT, EXACT, SECONDS = Style(places=0), Style(), Style(places=1)
PERCENT, POINTS = Style(" %", places=2), Style(" points", places=2, signed=True)
MS, TIMES, FAST = Style(" ms", digits=3), Style("×", digits=3), Style("× as fast", places=2)
THREE, FOUR, RISE = Style(digits=3), Style(digits=4), Style(digits=4, signed=True)
SCALED, BYTES = Style(metric=True), Style("B", metric=True)


@dataclass(frozen=True)
class Want:
    """A figure as the run folder has it: its value, how it is written, and its interval."""

    value: float
    style: Style
    low: float | None = None
    high: float | None = None

    def ends(self):
        """The ends of the interval as figures of their own."""
        assert self.low is not None and self.high is not None
        return [Want(self.low, self.style.bare), Want(self.high, self.style.bare)]

    def shown(self, text):
        """Whether a text is this number to its last digit, in its unit."""
        return fits(text, self.value, self.style)


@dataclass(frozen=True)
class Word:
    """A name that may look like a number."""

    text: str

    def shown(self, text):
        """Whether a text is this name."""
        return text == self.text


def change(one, two):
    """The change from one size to another in per cent."""
    value = 100 * (two / one - 1)
    return Want(value, Style(" %", places=2 if -100 < value < -99 else 1, signed=True))


def close(a, b):
    """Whether two figures are the same but for the order of sums."""
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def fits(text, value, style):
    """Whether a text shows a value to the printed digit, in the unit and with the digits of a style."""
    found = NUMBER.fullmatch(text)
    if found is None or not math.isfinite(value):
        return False
    sign, whole, places, power, rest = found.groups()
    scale = 10.0 ** int(power.replace("−", "-")) if power else 1.0
    if style.metric:
        known = re.fullmatch(rf" ?([kMGTP]?){style.unit}", rest)
        if known is None:
            return False
        scale *= PREFIXES[known[1]]
    elif rest != style.unit:
        return False
    number = float(whole.replace(",", "") + "." + (places or "0")) * (-1 if sign == "−" else 1) * scale
    half = 0.5 * scale * 10.0 ** -len(places or "")
    exact = abs(number - value) <= half * (1 + 1e-6) + 1e-12 * abs(value)
    return exact and _signed(sign, number, style) and _fine(whole, places or "", scale, value, style)


def _signed(sign, number, style):
    return sign == ("−" if number < 0 else "+" if number > 0 and style.signed else "")


def _fine(whole, places, scale, value, style):
    """Whether a text has neither more nor fewer digits than its style."""
    digits = len((whole.replace(",", "") + places).lstrip("0"))
    if style.metric:
        return (scale == 1.0 and float(value).is_integer() and not places) or digits == 4
    if style is EXACT:
        return float(whole + "." + (places or "0")) == abs(value)
    if style.unit == " %" and style.places == 2 and 0 < abs(value) < 0.01:
        return digits == 2
    if style.places is not None:
        return len(places) == style.places
    return digits == style.digits or value == 0 or (not places and digits > (style.digits or 0))


def cell_faults(cell, want):
    """What is wrong with a cell of a table, besides what it should be."""
    faults = [] if close(cell.get("value"), want.value) else ["value"]
    faults += [] if want.shown(cell["text"]) else ["text"]
    faults += [key for key, end in (("low", want.low), ("high", want.high)) if not close(cell.get(key), end)]
    ends = cell.get("span", "").split(" to ")
    wanted = [] if want.low is None else want.ends()
    right = len(ends) == 2 and all(end.shown(text) for end, text in zip(wanted, ends, strict=False))
    return faults if (right if wanted else ends == [""]) else [*faults, "span"]


def tokens(sentence):
    """The numbers in a sentence, each with its unit."""
    return TOKEN.findall(LEVEL.sub("the interval", sentence))


def in_order(found: Sequence[str], wanted: Sequence[Want | Word]):
    """Whether each text is one of the figures, in their order; figures may be left out."""
    rest = iter(wanted)
    return all(any(want.shown(text) for want in rest) for text in found)
