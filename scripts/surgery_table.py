"""What surgery does to many architectures: docs/results/surgery.md.

Run ``python scripts/surgery_table.py [--only NAME ...] [--write docs/results/surgery.md]`` from the project's root.
Of every network of ``secateur.nets``, of ``tests/surgery/zoo.py`` and, where transformers is installed, of
``tests/surgery/hf.py``, 30 % of the units of every group go, chosen at random (seed 0), in four ways: whole heads or
the same index in every head, and without or with units whose removal changes a normalisation. A network has *passed*
when the smaller one agrees with the dense one with the units zeroed, on the example and on inputs it has not seen,
runs backward, trains a step with the optimizer handed back, exports again, is saved, and gives the same after loading;
it is *refused* when surgery says so and has changed nothing; anything else is *wrong*.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateur
import secateur.nets
from secateur.core.calls import split_inputs
from secateur.core.errors import SecateurError
from secateur.nets import build
from secateur.surgery import analyse, shrink
from secateur.surgery.reference import Zeroed
from secateur.surgery.shrink import Shrunk
from secateur.surgery.tracing import trace

ROOT = Path(__file__).resolve().parent.parent
WAYS = (("heads", False), ("heads", True), ("dims", False), ("dims", True))
SHARE = 0.3
Made = Callable[[], tuple[nn.Module, Any]]


def ours() -> dict[str, Made]:
    """The networks of ``secateur.nets``."""
    words = {"bert_tiny": {"vocab": 20, "length": 16}, "gpt_tiny": {"vocab": 20, "length": 16}, "lstm": {"vocab": 20}}
    found: dict[str, Made] = {}
    for name in secateur.nets.names():
        shape = (1, 28, 28) if name in ("mlp", "lenet_300_100", "lenet5") else (3, 32, 32)
        if name in words:
            found[name] = lambda n=name: (build(n, **words[n]), (torch.randint(0, 20, (2, 16)),))
        else:
            found[name] = lambda n=name, s=shape: (build(n, s, 10), (torch.randn(2, *s),))
    return found


def networks() -> Iterator[tuple[str, str, Made]]:
    """All networks, by where they are from."""
    from tests.surgery.zoo import ARCHITECTURES

    yield from (("secateur.nets", name, made) for name, made in ours().items())
    yield from (("public definitions", name, made) for name, made in ARCHITECTURES.items())
    try:
        import transformers
    except ImportError:
        return
    from tests.surgery.hf import HF

    yield from ((f"transformers {transformers.__version__}", name, made) for name, made in HF.items())


def apart(found: Any, expected: Any) -> float:
    """The largest difference relative to the largest number of each output."""
    worst = 0.0
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            worst = max(worst, float((one - other).abs().max()) / (float(other.abs().max()) or 1.0))
    return worst


def call(model: nn.Module, example: Any) -> Any:
    """The outputs."""
    args, kwargs = split_inputs(example)
    return model(*args, **kwargs)


def other(example: Any) -> Any:
    """Inputs of the same form that nobody has seen."""

    def anew(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.randn_like(x)
        return x.flip(0).roll(1, -1) if isinstance(x, Tensor) and x.dim() > 1 and x.dtype == torch.int64 else x

    return pytree.tree_map(anew, example)


def checks(cut: Shrunk, analysis: Any, labels: Tensor, example: Any, fresh: nn.Module, optimizer: Any) -> list[str]:
    """What is wrong with the result; empty where nothing is."""
    wrong, model = [], cut.model
    unseen = other(example)
    with torch.no_grad():
        wanted = Zeroed(analysis.run, labels)(*split_inputs(unseen))
        if apart(call(model, unseen), wanted) > 1e-4:  # float32, where the surgery itself compares in float64
            wrong.append("differs on unseen inputs")
        before = call(model, example)
        with tempfile.TemporaryDirectory() as folder:
            secateur.save(folder, model, example=example if cut.rewritten else None)
            loaded, _ = secateur.load(folder, None if cut.rewritten else fresh)
            if apart(call(loaded.eval(), example), before) > 1e-6:
                wrong.append("differs after loading")
    trace(model, example)
    loss = sum(x.float().square().mean() for x in pytree.tree_leaves(call(model, example))
               if isinstance(x, Tensor) and x.is_floating_point())  # fmt: skip
    loss.backward()  # type: ignore[union-attr]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        wrong.append(f"the optimizer does not hold {lost[0]}")
    optimizer.step()
    with torch.no_grad():
        if apart(call(model, example), before) == 0.0:
            wrong.append("a step of training changes nothing")
    return wrong


def trial(made: Made, granularity: str, inexact: bool) -> dict[str, Any]:
    """One network in one way."""
    torch.manual_seed(0)
    model, example = made()
    model.eval()
    fresh, dense = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begun = time.perf_counter()
    try:
        analysis = analyse(model, example, granularity)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begun
        draw = random.Random(0)
        groups = [g for g in analysis.groups if (inexact or not g.inexact) and len(g) > 1]
        remove = {g.name: draw.sample(range(len(g)), max(1, round(SHARE * len(g)))) for g in groups}
        row: dict[str, Any] = {"groups": len(groups), "units": sum(map(len, remove.values())), "seconds": seconds,
                               "unknown": dict(analysis.operators)}  # fmt: skip
        if not groups:
            return {**row, "result": "nothing to remove"}
        if not inexact or any(g.inexact for g in groups):
            labels = torch.cat([analysis.group(name).labels[torch.tensor(units)] for name, units in remove.items()])
            cut = shrink(model, example, remove, analysis=analysis, optimizer=optimizer)
            row |= {"params": cut.params, "error": cut.error, "rewritten": cut.rewritten}
            wrong = checks(cut, analysis, labels, example, fresh, optimizer)
            return {**row, "result": "wrong: " + "; ".join(wrong) if wrong else "passed"}
        return {**row, "result": "as without"}
    except SecateurError as error:
        changed = any(not torch.equal(v, dense[k]) for k, v in model.state_dict().items())
        return {"result": f"wrong: refused, but changed ({error})" if changed else f"refused: {error}"}
    except Exception as error:
        return {"result": f"wrong: {type(error).__name__}: {str(error)[:200]}"}


def cell(row: dict[str, Any]) -> str:
    """One result in a few words."""
    result = row["result"]
    if result != "passed":
        return result.partition(":")[0]
    before, after = row["params"]
    return f"{after / before:.0%} left{', graph' if row['rewritten'] else ''}"


def page(rows: list[dict[str, Any]]) -> str:
    """The page from the rows."""
    names = list(dict.fromkeys((r["from"], r["network"]) for r in rows))
    ways = [f"{g}{', all' if i else ''}" for g, i in WAYS]
    lines = [f"| from | network | {' | '.join(ways)} | analysis s |", "|" + "---|" * (3 + len(ways))]
    for origin, name in names:
        own = {(r["granularity"], r["inexact"]): r for r in rows if r["network"] == name and r["from"] == origin}
        cells = [cell(own[way]) if way in own else "" for way in WAYS]
        took = max((r.get("seconds", 0.0) for r in own.values()), default=0.0)
        lines.append(f"| {origin} | `{name}` | {' | '.join(cells)} | {took:.1f} |")
    counts = {kind: sum(r["result"].startswith(kind) for r in rows) for kind in ("passed", "refused", "wrong")}
    graphs = sum(bool(r.get("rewritten")) for r in rows)
    refused = [f"- `{r['network']}` ({r['granularity']}{', all' if r['inexact'] else ''}): {r['result']}"
               for r in rows if r["result"].startswith(("refused", "wrong"))]  # fmt: skip
    why = list(dict.fromkeys(f"- `{r['network']}`: {r['rewritten']}" for r in rows if r.get("rewritten")))
    unknown: dict[str, set[str]] = {}
    for r in rows:
        for op in r.get("unknown", {}):
            unknown.setdefault(op, set()).add(r["network"])
    left = [f"- {op}: {', '.join(f'`{n}`' for n in sorted(nets))}" for op, nets in sorted(unknown.items())]
    return f"""# Surgery on {len(names)} architectures

`python scripts/surgery_table.py --write docs/results/surgery.md` makes this page (torch {torch.__version__}). {_how()}

**{counts["passed"]} passed, {counts["refused"]} refused, {counts["wrong"]} wrong.** In {graphs} of
those that passed the network's own forward writes sizes down where nobody can change them, and the result is a
`GraphModule` ("graph" below) instead of the user's class.

"heads": whole attention heads are units; "dims": the same index in every head. "all": also units whose removal changes
what a normalisation sees (the residual stream of a transformer); "as without": there are none such, so nothing is new.

{chr(10).join(lines)}

## Refused or wrong

{chr(10).join(refused) or "None."}

## Why a graph

{chr(10).join(why) or "None."}

## Operators without a rule

What flows into them stays; they are listed by the coverage table of each network.

{chr(10).join(left) or "None."}
"""


def _how() -> str:
    text = (__doc__ or "").partition("from the project's root.\n")[2]
    return " ".join(text.split())


def main() -> int:
    """Run all and write the page."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--only", nargs="*", default=[])
    options.add_argument("--write", type=Path)
    options.add_argument("--page", type=Path, help="write this page anew from the rows beside it")
    chosen = options.parse_args()
    if chosen.page:
        chosen.page.write_text(page(json.loads(chosen.page.with_suffix(".json").read_text("utf-8"))), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for origin, name, made in networks():
        if chosen.only and name not in chosen.only:
            continue
        for granularity, inexact in WAYS:
            row = {"from": origin, "network": name, "granularity": granularity, "inexact": inexact}
            rows.append(row | trial(made, granularity, inexact))
            print(name, granularity, inexact, rows[-1]["result"][:200], flush=True)
    if chosen.write:
        chosen.write.write_text(page(rows), encoding="utf-8")
        chosen.write.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["result"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
