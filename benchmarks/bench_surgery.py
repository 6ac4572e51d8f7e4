"""How long the analysis of a network takes, and how many of a list are handled, beside torch-pruning.

Run: ``python benchmarks/bench_surgery.py [--write docs/results/surgery-bench.md]`` from the project's root;
torch-pruning comes with the extra ``bench``. Times are seconds of processor time, one thread; every network of the
list runs in a process of its own with a limit of two minutes, since an analysis may not end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
LIMIT = 120.0
SHARE = 0.3


class Block(nn.Module):
    """A transformer block as most are written."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each beside a shortcut."""
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(self.one(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(nn.functional.gelu(self.up(self.two(x))))


def transformer(depth: int, width: int = 512) -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(*[Block(width, 8) for _ in range(depth)], nn.LayerNorm(width), nn.Linear(width, 100))
    return net.eval(), (torch.randn(2, 64, width),)


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from secateur.nets import build

    return build("resnet50", (3, 224, 224), 1000).eval(), (torch.randn(2, 3, 224, 224),)


def ours(model: nn.Module, example: Any) -> None:
    from secateur.surgery import analyse

    analyse(model, example)


def theirs(model: nn.Module, example: Any) -> None:
    import torch_pruning

    torch_pruning.DependencyGraph().build_dependency(model, example_inputs=_theirs(example))


def _theirs(example: Any) -> Any:
    return dict(example) if isinstance(example, dict) else example if len(example) > 1 else example[0]


def best(run: Callable[[nn.Module, Any], None], model: nn.Module, example: Any, rounds: int = 3) -> float:
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        run(model, example)
        taken.append(time.process_time() - begun)
    return min(taken)


def times() -> list[str]:
    """The table of analysis times."""
    lines = ["| network | parameters | secateur s | goal | torch-pruning s |", "|---|---|---|---|---|"]
    cases: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
        "ResNet-50, 224 px": (resnet50, "under 5"),
        **{
            f"transformer, {d} layers": (lambda d=d: transformer(d), "under 20" if d == 24 else "-")
            for d in (12, 24, 48)
        },
    }
    for name, (made, goal) in cases.items():
        model, example = made()
        count = sum(p.numel() for p in model.parameters())
        found = best(ours, model, example)
        try:
            other = f"{best(theirs, model, example, 1):.1f}"
        except Exception as error:  # whatever it raises is its result
            other = f"{type(error).__name__}"
        lines.append(f"| {name} | {count / 1e6:.1f} M | {found:.2f} | {goal} | {other} |")
        print(lines[-1], flush=True)
    return lines


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def pruned_by_torch_pruning(name: str) -> str:
    """Its own pruner with random importance; layers whose outputs are those of the network are named to it."""
    import torch_pruning
    from surgery_table import networks

    from secateur.core.calls import split_inputs
    from secateur.surgery import analyse

    torch.manual_seed(0)
    model, example = next(made for _, n, made in networks() if n == name)()
    model.eval()
    args, kwargs = split_inputs(example)
    wanted = shapes(model(*args, **kwargs))
    ends = {r.tensor.rpartition(".")[0] for r in analyse(model, example).rows if "output of the network" in r.why}
    kept = [m for path, m in model.named_modules() if path in ends]
    heads = {m: int(m.num_heads) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    before, begun = sum(p.numel() for p in model.parameters()), time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model, _theirs(example), importance=torch_pruning.importance.RandomImportance(), pruning_ratio=SHARE,
        ignored_layers=kept, num_heads=heads,
    )  # fmt: skip
    pruner.step()
    seconds = time.process_time() - begun
    found = model(*args, **kwargs)
    if shapes(found) != wanted:
        return f"other shapes|{seconds:.1f}"
    sum(x.float().square().mean() for x in pytree.tree_leaves(found)
        if isinstance(x, Tensor) and x.is_floating_point()).backward()  # type: ignore[union-attr] # fmt: skip
    after = sum(p.numel() for p in model.parameters())
    return (
        f"runs, {after / before:.0%} left|{seconds:.1f}"
        if after < 0.95 * before
        else f"hardly anything removed|{seconds:.1f}"
    )


def pruned_by_us(name: str) -> str:
    """All groups, whole heads, as docs/results/surgery.md does it."""
    from surgery_table import networks, trial

    row = trial(next(made for _, n, made in networks() if n == name), "heads", True)
    if row["result"] == "as without":
        row = trial(next(made for _, n, made in networks() if n == name), "heads", False)
    before, after = row.get("params", (1, 1))
    told = f"proved, {after / before:.0%} left" if row["result"] == "passed" else row["result"].partition(":")[0]
    return f"{told}{', graph' if row.get('rewritten') else ''}|{row.get('seconds', 0.0):.1f}"


def _child(run: Callable[[str], str], name: str, answer: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = run(name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found = f"{type(error).__name__}: {lines[0][:70]}|".replace("\n", " ")
    answer.put(found)


def apart(run: Callable[[str], str], name: str) -> tuple[str, str]:
    """What a run gives, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_child, args=(run, name, answer))
    child.start()
    child.join(LIMIT)
    if child.is_alive():
        child.kill()
        return f"no end after {LIMIT:.0f} s", ""
    text = answer.get() if not answer.empty() else "died|"
    told, _, seconds = text.rpartition("|")
    return told.replace("|", "/"), seconds


def yardstick() -> list[str]:
    """The table of networks."""
    from surgery_table import networks

    lines, good = [], [0, 0]
    names = [name for _, name, _ in networks()]
    for name in names:
        mine, seconds = apart(pruned_by_us, name)
        other, more = apart(pruned_by_torch_pruning, name)
        good[0] += mine.startswith("proved")
        good[1] += other.startswith("runs")
        lines.append(f"| `{name}` | {mine} | {seconds} | {other} | {more} |")
        print(lines[-1], flush=True)
    head = [
        f"**{good[0]} of {len(names)}** by secateur, each proved against the zeroed dense network; **{good[1]} of",
        f"{len(names)}** by torch-pruning, of which it is only known that they run and keep the shapes of outputs.",
        "", "| network | secateur | analysis s | torch-pruning | analysis and cut s |", "|---|---|---|---|---|",
    ]  # fmt: skip
    return head + lines


def main() -> None:
    """Measure, and write the page if asked."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--write", type=Path)
    options.add_argument("--times", action="store_true", help="only the analysis times")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import torch_pruning

    on, parts = machine(), ["## Analysis", "", *times()]
    if not chosen.times:
        parts += ["", "## The same networks", "", *yardstick()]
    if chosen.write:
        text = (__doc__ or "").partition("\n\n")[2].strip()
        about = f"{on['cpu']}, torch {on['torch']}, torch-pruning {torch_pruning.__version__}."
        page = ["# Surgery: time and coverage", "", text, "", about, "", *parts]
        chosen.write.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
