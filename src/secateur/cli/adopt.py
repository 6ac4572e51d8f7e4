"""``secateur adopt``."""

import argparse
from pathlib import Path
from typing import Any

from secateur.cli.request import dump
from secateur.core.errors import UsageError
from secateur.engine.binding import parse_value
from secateur.engine.foreign.adopting import Adopted, Network, adopt


def run(request: argparse.Namespace) -> int:
    """Turn a file of another program into a folder of this library, and say what was found."""
    if request.out is None and not request.dry_run:
        raise UsageError("name the folder to write with `-o`, or see what would be done with `--dry-run`.")
    if request.net is None and any((request.settings, request.shape, request.outputs, request.tokens, request.unfold)):
        raise UsageError("-s, --shape, --outputs, --tokens and --unfold are for the class; name it with `--net`.")
    network = None
    if request.net is not None:
        options, shape = _options(request.settings), _shape(request.shape)
        network = Network(request.net, options, shape, request.outputs, request.tokens, request.unfold)
    out = None if request.dry_run else Path(str(request.out))
    done = adopt(Path(request.file), out, network, request.entry or "")
    if request.json:
        dump(done.to_json())
    else:
        _show(done)
    return 0


def _options(settings: list[str]) -> dict[str, Any]:
    """Options of the class from ``-s name=value``."""
    options = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"`-s {setting}` has no value; write `-s name=value`, for example `-s widths=[300,100]`.")
        options[name.strip().removeprefix("model.")] = parse_value(value.strip())
    return options


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape {text!r} is not whole numbers above 0 such as 3,32,32.")
    return tuple(int(part) for part in parts)


def _show(done: Adopted) -> None:
    print(f"{done.file}  {done.kind}, {done.tensors:,} tensors, {done.zeros:,} zeros")
    share = f" ({1 - done.kept / done.total:.2%} are pruned)" if done.total else ""
    print(f"  masks     {done.kept:,} of {done.total:,} weights are kept{share}")
    if done.network:
        error = "" if done.error is None else f", largest difference {done.error:.1e}"
        print(f"  network   {done.network}; outputs {done.compared}{error}")
    for note in done.notes:
        print(f"  note      {note}")
    for lack in done.lacks:
        print(f"  lacks     {lack}")
    print(f"  folder    {done.folder or 'none: a dry run writes nothing'}")
