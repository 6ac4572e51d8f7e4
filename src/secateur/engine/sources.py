"""Which of the user's own files a result depends on."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.files import file_digest
from secateur.core.sockets import load_object


def sources(thing: Any) -> str:
    """Digests of the files behind every ``use`` in nested tables that is ``module:object`` or a ``.pt2`` file.

    Of an object the file of the named module counts, and the file that defines it where that is another one; what
    these import does not. Empty when everything used comes with this library.

    Args:
        thing: plain values, as in a recipe.
    """
    files = {file for use in _uses(thing) for file in _files(use)}
    return "/".join(sorted({file_digest(file) for file in files}))


def _uses(thing: Any) -> Iterator[str]:
    if isinstance(thing, Mapping):
        if isinstance(thing.get("use"), str):
            yield thing["use"]
        for value in thing.values():
            yield from _uses(value)
    elif isinstance(thing, tuple | list):
        for value in thing:
            yield from _uses(value)


def _files(use: str) -> list[Path]:
    path = Path(use).expanduser()
    if path.exists():  # a folder is data, whose content has a digest of its own
        return [path] if path.suffix == ".pt2" and path.is_file() else []
    if not re.fullmatch(r"[\w.]+:[\w.]+", use) or use.startswith("folder:"):
        return []
    try:
        found = load_object(use)
    except UsageError:  # whoever needs it says so, in its own words
        return []
    modules = [sys.modules.get(use.partition(":")[0])]
    if inspect.isclass(found) or inspect.isroutine(found):
        modules.append(inspect.getmodule(found))
    files = [Path(name) for module in modules if (name := getattr(module, "__file__", None))]
    return [file for file in files if file.is_file()]
