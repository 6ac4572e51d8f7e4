"""The compiled networks against ONNX Runtime and DeepSparse: the table of docs/results/runtime.md.

Run: ``python benchmarks/bench_runtime.py [--rows r50-90 mlp-90 ...] [--deepsparse PYTHON] [--write FILE]``.
Zeros are random and unstructured, the same share in each layer; weights are random. Two threads. Every candidate's
result is checked before anything is timed; the candidates take turns. A virtual machine's processors may be moved
apart for minutes, which costs whoever shares one example between threads up to a factor of two. So the time of a word
from one to the other is recorded; ``--near N`` waits for them before a race and repeats it, N times at most, until they
stayed together.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.engine import racing
from secateur.nets import build
from secateur.runtime import Session
from secateur.runtime.compiled import compile_network


class Encoder(nn.Module):
    """One layer of BERT-base, without dropout."""

    def __init__(self, width: int = 768, heads: int = 12, hidden: int = 3072) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 at 224 px, width 1."""

    def pair(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        ]  # fmt: skip

    sizes = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    sizes += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
    body = [layer for size in sizes for layer in pair(*size)]
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    sizes = [784, 1024, 1024, 10]
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Row:
    """A network of the table: how to build it, its input, the share of zeros, batches, and the floors."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    zeros: float
    ort: dict[int, float]
    deepsparse: dict[int, float]
    keep: tuple[str, ...] = ()
    only_1x1: bool = False
    block: int = 1


def _resnet50() -> nn.Module:
    return build("resnet50")


def _encoder() -> nn.Module:
    return nn.Sequential(Encoder(), Encoder())


_STEM = ("conv1.weight", "fc.weight")
ROWS = {
    "ResNet-50 90 %": Row(_resnet50, (3, 224, 224), 0.9, {1: 3.3, 16: 3.8}, {1: 2.0, 16: 1.0}, _STEM),
    "ResNet-50 95 %": Row(_resnet50, (3, 224, 224), 0.95, {1: 5.0, 16: 4.5}, {1: 2.5, 16: 1.0}, _STEM),
    "ResNet-20 width 16 90 %": Row(lambda: build("resnet20"), (3, 32, 32), 0.9, {1: 1.8, 16: 3.5}, {1: 1.0, 16: 1.2}),
    "ResNet-20 width 64 90 %": Row(
        lambda: build("resnet_cifar", width=64), (3, 32, 32), 0.9, {1: 3.5, 16: 4.5}, {1: 2.0, 16: 1.0}
    ),
    "MLP 784-1024-1024-10 90 %": Row(mlp, (784,), 0.9, {1: 1.5, 16: 1.5}, {1: 2.0, 16: 2.0}),
    "two BERT-base layers, 128 tokens 90 %": Row(_encoder, (128, 768), 0.9, {1: 3.3, 16: 3.5}, {1: 1.0, 16: 1.0}),
    "MobileNetV1, 1x1 at 90 %": Row(mobilenet_v1, (3, 224, 224), 0.9, {1: 1.8}, {}, only_1x1=True),
    "ResNet-50 90 % in 4x1 blocks": Row(_resnet50, (3, 224, 224), 0.9, {1: 3.3, 16: 3.8}, {}, _STEM, block=4),
    "two BERT-base layers 90 % in 4x1 blocks": Row(_encoder, (128, 768), 0.9, {1: 3.3, 16: 3.5}, {}, block=4),
    "ResNet-50 dense": Row(_resnet50, (3, 224, 224), 0.0, {1: 1 / 1.5}, {}),
    "ResNet-20 width 16 dense": Row(lambda: build("resnet20"), (3, 32, 32), 0.0, {1: 1 / 1.5, 16: 1 / 1.5}, {}),
    "ResNet-20 width 64 dense": Row(
        lambda: build("resnet_cifar", width=64), (3, 32, 32), 0.0, {1: 1 / 1.5, 16: 1 / 1.5}, {}
    ),
    "MLP dense": Row(mlp, (784,), 0.0, {1: 1 / 1.5, 16: 1 / 1.5}, {}),
    "two BERT-base layers dense": Row(_encoder, (128, 768), 0.0, {1: 1 / 1.5, 16: 1 / 1.5}, {}),
    "MobileNetV1 dense": Row(mobilenet_v1, (3, 224, 224), 0.0, {1: 1 / 1.5}, {}),
}


def prepared(row: Row) -> nn.Module:
    """The network with batch statistics that are not trivial, and its zeros."""
    torch.manual_seed(0)
    net = row.make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.running_var, 0.5, 1.5)):
                tensor.data.uniform_(low, high)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
    for name, weight in net.named_parameters():
        wanted = weight.ndim > 1 and name not in row.keep
        if wanted and (not row.only_1x1 or tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] > 1):
            drawn = torch.rand(-(-len(weight) // row.block), *weight.shape[1:]) < row.zeros
            weight.data.masked_fill_(drawn.repeat_interleave(row.block, 0)[: len(weight)], 0.0)
    return net


def run_row(name: str, row: Row, args: argparse.Namespace) -> list[dict]:
    """One table line for each batch size."""
    net, lines = prepared(row), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        example = torch.randn(2, *row.shape)
        racing.to_onnx(copy.deepcopy(net), [example], folder / "net.onnx")
        plan = compile_network(net, example, threads=args.threads).save(folder / "plan.safetensors")
        for batch in args.batch or row.ort:
            x = torch.randn(batch, *row.shape)
            session, array = Session(plan, threads=args.threads, isa=args.isa), x.numpy()
            candidates = {
                "onnxruntime": racing.onnxruntime(folder / "net.onnx", [x], args.threads),
                "secateur": lambda session=session, array=array: session(array),
            }
            if args.torch:
                candidates["torch"] = racing.dense(net, [x])
            if args.deepsparse and row.deepsparse:
                candidates["deepsparse"] = racing.deepsparse(args.deepsparse, folder / "net.onnx", [x], args.threads)
            found = settled(candidates, args)
            for candidate in candidates.values():
                if hasattr(candidate, "close"):
                    candidate.close()
            lines.append(line := summary(name, row, batch, found))
            lines[-1]["bytes"] = [plan.stat().st_size, (folder / "net.onnx").stat().st_size]
            print(text(line), flush=True)
            session.close()
    return lines


FAR = 250.0  # nanoseconds: longer is not within one cache


def settled(candidates: dict, args: argparse.Namespace) -> racing.Race:
    """A race; with ``--near`` one of several, the first in which the processors stayed together, or the last."""
    for _ in range(args.near or 1):
        until = time.monotonic() + 60
        while args.near and racing.round_trip() > FAR and time.monotonic() < until:
            time.sleep(1)
        found = racing.race(candidates, rounds=args.rounds, seconds=args.seconds, threads=args.threads)
        if statistics.median(found.about["round trip ns"]) <= FAR:
            break
    return found


def summary(name: str, row: Row, batch: int, found: racing.Race) -> dict:
    """Figures of a race, and whether the floors hold."""
    line = {"network": name, "batch": batch, "ms": {n: found.median(n) for n in found.rounds}, "best": found.best}
    line["ratio"] = {n: found.ratio(n, "secateur") for n in found.rounds if n != "secateur"}
    line["best ratio"] = {n: found.best[n] / found.best["secateur"] for n in found.rounds if n != "secateur"}
    floors = {"onnxruntime": row.ort.get(batch), "deepsparse": row.deepsparse.get(batch)}
    line["floor"] = {n: f for n, f in floors.items() if f and n in line["ratio"]}
    line["about"] = found.about
    return line


def text(line: dict) -> str:
    """A line for the terminal."""
    parts = [f"{line['network']:38s} batch {line['batch']:2d}  ours {line['ms']['secateur']:9.3f} ms"]
    for rival, (ratio, low, high) in line["ratio"].items():
        floor = line["floor"].get(rival)
        verdict = "" if floor is None else f" floor {floor:.2f} {'held' if ratio >= floor else 'MISSED'}"
        parts.append(f"{rival} {line['ms'][rival]:9.3f} ms {ratio:5.2f}x ({low:.2f}-{high:.2f}){verdict}")
    parts.append(f"round trip {statistics.median(line['about']['round trip ns']):.0f} ns")
    return "  ".join(parts)


def main() -> None:
    """Run the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", help="words that a row's name must contain (any of them)")
    parser.add_argument("--batch", nargs="*", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--isa", default="auto")
    parser.add_argument(
        "--near", type=int, default=0, metavar="N", help="races at most, until the processors are together"
    )
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--deepsparse", metavar="PYTHON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="append the figures as JSON lines")
    args = parser.parse_args()
    for name, row in ROWS.items():
        if args.rows and not any(word in name for word in args.rows):
            continue
        for line in run_row(name, row, args):
            if args.write:
                with open(args.write, "a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
