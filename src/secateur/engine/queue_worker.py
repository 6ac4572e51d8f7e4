"""A process that works on a queue: what to do as one line on standard input, what happened as lines on standard output.

It gives its stage back and ends when it is interrupted or told to end, or when its standard input ends, as it does when
the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.engine.queue_stopping import stoppable


def main() -> int:
    """Work until nothing is left to do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell had it ignored
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a plug-in prints must not be taken for an answer

    def tell(**told: Any) -> None:
        print(json.dumps(told), file=answers, flush=True)

    try:
        with stoppable():
            asked = json.loads(sys.stdin.readline())
            threading.Thread(target=_follow, daemon=True).start()
            _work(asked, tell)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 130
    return 0


def _follow() -> None:
    """Wait for the end of standard input, past its buffer: a thread in there would not let the process end."""
    while os.read(0, 1):
        continue
    os.kill(os.getpid(), signal.SIGTERM)  # as if told by whoever started it


def _work(asked: Mapping[str, Any], tell: Any) -> None:
    from secateur.core.errors import SecateurError
    from secateur.engine.queue_leases import Leases
    from secateur.engine.queue_store import Stage, Store
    from secateur.engine.queue_work import Worker, plan
    from secateur.engine.recipe import Recipe

    def heard(event: str, stage: Stage, told: Mapping[str, Any]) -> None:
        tell(event=event, stage=[stage.number, stage.do, stage.key, stage.needs], told=dict(told))

    try:
        store = Store.open(Path(asked["folder"]))
        recipes = {name: Recipe.from_table(table) for name, table in asked["recipes"].items()}
        planned = [plan(name, recipe, store, asked["data_dir"]) for name, recipe in recipes.items()]
        Worker(store, Leases(store.leases, asked["lease"]), planned, asked["data_dir"], heard).run()
    except SecateurError as error:
        tell(refused=str(error))
    except BrokenPipeError:
        raise
    except Exception:
        tell(bug=traceback.format_exc())


if __name__ == "__main__":
    sys.exit(main())
