"""``secateur``: parse the words, call one verb, turn errors into exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from secateur import __version__
from secateur.cli import verbs
from secateur.core.errors import SecateurError, UsageError, nearest

_ABOUT = "Prune neural networks, prove what it did, and carry the result away in files that load anywhere."


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest verb suggested."""

    def error(self, message: str) -> None:  # type: ignore[override]
        if message.startswith("argument VERB: invalid choice") and len(message.split("'")) > 1:
            message = (
                f"there is no verb {message.split(chr(39))[1]!r}. {nearest(message.split(chr(39))[1], verbs.VERBS)}"
            )
        raise UsageError(f"{message}{'' if message[-1:] in '.?' else '.'} See `{self.prog} --help`.")


def parser() -> argparse.ArgumentParser:
    """The whole command line. Imports no torch, so help and mistakes answer at once."""
    main = _Parser(prog="secateur", description=_ABOUT)
    main.add_argument("--version", action="version", version=f"secateur {__version__}")
    main.add_argument("--debug", action="store_true", help="show the traceback of any error")
    subs = main.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in verbs.VERBS.items():
        sub = subs.add_parser(name, help=verb.about, description=verb.about, epilog=verb.example,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        verb.flags(sub)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when done, 2 for what the user can mend, 1 for a bug of this library, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        request = parser().parse_args(words)
        _refuse_empty(request)
        return verbs.VERBS[request.verb].call(request)
    except SecateurError as error:
        if debug:
            raise
        print(f"secateur: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("secateur: interrupted. What was done is kept; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception:
        import traceback

        traceback.print_exc()
        print("secateur: this is a bug of secateur; please report it with the lines above.", file=sys.stderr)
        return 1


def _refuse_empty(request: argparse.Namespace) -> None:
    """An empty word is a slip, such as a variable of the shell that is not set."""
    for name, value in vars(request).items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UsageError(f"{name} is given as an empty text; give it a value, or leave it out.")


if __name__ == "__main__":
    sys.exit(main())
