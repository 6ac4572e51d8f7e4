"""The errors that a user can mend. Everything else that escapes is a bug."""

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Something the user can put right: the message says what, where and what to type.

    The command line ends with exit code 2 for these and with 1 for any other exception.
    """


class UsageError(SecateurError):
    """A name, option, recipe key or target that is not understood."""


class DataError(SecateurError):
    """Data that is missing, empty, spent, of the wrong shape or not finite."""


class ModelError(SecateurError):
    """A network that cannot be worked on: wrong shapes, NaN weights, nothing prunable."""


class MaskError(SecateurError):
    """Masks that do not belong to the network, or zeros that did not stay zero."""


class BudgetError(SecateurError):
    """A number of weights to keep that cannot be met."""


class FileError(SecateurError):
    """A file or folder that is missing, damaged or cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name most like ``name``, or lists what there is.

    >>> nearest("magnitud", ["magnitude", "random"])
    "Did you mean 'magnitude'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."
