"""A process that does runs of a comparison: one job a line on standard input, one answer a line on standard output."""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> int:
    """Work until there is nothing more to read; after Ctrl-C the run at hand has written its checkpoint."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a plug-in prints must not be taken for an answer
    try:
        import torch  # noqa: F401  # seconds, in which Ctrl-C may come

        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(_answer(asked)), file=answers, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _answer(asked: dict[str, object]) -> dict[str, object]:
    from secateur.core.errors import SecateurError
    from secateur.engine.comparing_jobs import carry_out

    try:
        return {"result": carry_out(**asked)}  # type: ignore[arg-type]
    except SecateurError as error:
        return {"refused": str(error)}
    except Exception:
        return {"bug": traceback.format_exc()}


if __name__ == "__main__":
    sys.exit(main())
