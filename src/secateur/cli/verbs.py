"""The verbs and their flags; the work of each is in the file of its name."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Args:
        about: one line of help.
        flags: adds its flags to a parser.
        module: the module whose ``run(request)`` does the work.
        example: shown below the help.
    """

    about: str
    flags: Callable[[argparse.ArgumentParser], None]
    module: str
    example: str = ""

    def call(self, request: argparse.Namespace) -> int:
        """Import the work and do it."""
        return int(importlib.import_module(f"secateur.cli.{self.module}").run(request))


def _shared(p: argparse.ArgumentParser, kept: str = "", dry: str = "say what would be done, and do nothing") -> None:
    p.add_argument("-o", "--out", metavar="FILE" if kept else "FOLDER",
                   help=kept or "the run folder (default: a name under runs/)")  # fmt: skip
    p.add_argument("--data", metavar="NAME", help="digits, mnist, cifar10, ..., a folder, or module:function")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("--seed", type=int, metavar="N", help="seed of everything random (default 0)")
    _settings(p, dry)


def _settings(p: argparse.ArgumentParser, dry: str = "say what would be done, and do nothing") -> None:
    p.add_argument("-s", "--set", action="append", default=[], metavar="A.B=VALUE", dest="settings",
                   help="set any recipe key, for example -s criterion.seed=3 or -s data.batch=64")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help=dry)
    p.add_argument("--print-config", action="store_true", help="print the whole recipe, defaults included, and stop")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _train(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", nargs="?", metavar="FOLDER", help="a run folder or .safetensors file to begin with")
    p.add_argument("--net", metavar="NAME", help="a network of secateur.nets, module:function, or a .pt2 file")
    p.add_argument("--epochs", type=int, metavar="N", help="passes over the training data (default 10)")
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default 0.1)")
    p.add_argument(
        "--rule", action="append", default=[], metavar="NAME", help="a rule such as distill; may be repeated"
    )
    _shared(p)


def _prune(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", metavar="FOLDER", help="a run folder or .safetensors file (then with --net)")
    p.add_argument(
        "--to", default=None, metavar="TARGET", help='such as "params 5%%", "sparsity 0.9", "macs 0.5x", "2:4"'
    )
    p.add_argument(
        "--criterion", "--score", default=None, metavar="NAME", help="which weights matter (default magnitude)"
    )
    p.add_argument("--allocation", default=None, metavar="NAME", help="global (default), uniform, erk, lamp or by-cost")
    p.add_argument("--pattern", default=None, metavar="NAME", help="unstructured (default), nm, block or unit")
    p.add_argument("--solver", default=None, metavar="NAME",
                   help="choose layer by layer and move the weights that stay: sparsegpt, exact_obs, ...")  # fmt: skip
    p.add_argument("--inputs", choices=("sequential", "dense"), default=None,
                   help="a solver's layers see the network pruned so far (default), or the dense one")  # fmt: skip
    p.add_argument("--curvature", choices=("layers", "ggn", "fisher", "hessian"), default=None,
                   help="a solver goes by each layer's outputs (default), or by the loss over all weights")  # fmt: skip
    p.add_argument(
        "--epochs", type=int, default=0, metavar="N", help="prune step by step while training (default: once)"
    )
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate, with --epochs (default 0.1)")
    p.add_argument("--plan", metavar="FILE", help="carry out what `secateur plan` has decided, layer by layer")
    p.add_argument("--net", metavar="NAME", help="the network of a .safetensors file")
    p.add_argument("--only", action="append", default=[], metavar="GLOB", help="prune only these tensors")
    p.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave these tensors alone")
    _shared(p)


def _plan(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", metavar="FOLDER", help="a run folder or .safetensors file (then with --net)")
    p.add_argument("--to", required=True, metavar="TARGET",
                   help='"ms 3.5", "latency 0.5x", "bytes 200kB", "macs 0.5x", "params 10%%", "loss +0.05" or '
                        '"accuracy -0.5" (points)')  # fmt: skip
    p.add_argument("--patterns", action="append", metavar="A,B",
                   help="what tensors may take: unstructured (default), 4x1, 2:4, ...; may be repeated")  # fmt: skip
    p.add_argument("--criterion", "--score", metavar="NAME", help="which weights matter (default magnitude)")
    p.add_argument("--solver", metavar="NAME", help="choose the weights of a layer and move the others: sparsegpt, ...")
    p.add_argument("--inputs", choices=("sequential", "dense"), default=None,
                   help="a solver's layers see the network pruned so far (default), or the dense one")  # fmt: skip
    p.add_argument("--batch", type=int, metavar="N", help="examples in a call that is timed (default 1)")
    p.add_argument("--threads", type=int, metavar="N", help="threads of the compiled core (default: all cores)")
    p.add_argument("--examples", type=int, metavar="N", help="training examples for scores and losses (default 1024)")
    p.add_argument("--least", choices=("ms", "bytes", "macs", "params"), default=None,
                   help="for targets of loss and accuracy: what is to be least (default ms)")  # fmt: skip
    p.add_argument("--no-measure", action="store_true",
                   help="forecast only: layers that are not known are not timed, nothing is tried on a copy; a few "
                        "calls still tell the machine's pace")  # fmt: skip
    p.add_argument("--net", metavar="NAME", help="the network of a .safetensors file")
    p.add_argument("--only", action="append", default=[], metavar="GLOB", help="prune only these tensors")
    p.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave these tensors alone")
    _shared(p, "where the plan is kept (default: it is only shown)", "make the plan and show it, but write no file")


def _shrink(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", metavar="FOLDER", help="a run folder or .safetensors file (then with --net)")
    p.add_argument(
        "--to",
        metavar="TARGET",
        help='such as "macs 0.5x" (default), "params 100k", "bytes 5MB", "units 0.7x", "ms 3.5"',
    )
    p.add_argument(
        "--criterion", "--score", metavar="NAME", help="which weights matter: taylor_filter, ... (default magnitude)"
    )
    p.add_argument("--granularity", choices=("heads", "dims"), help="units of attention: heads (default), or dims")
    p.add_argument("--scope", choices=("global", "group"),
                   help="compare all units (default), or take the same share of each group")  # fmt: skip
    p.add_argument("--inexact", action="store_true", help="also remove what changes the statistics of a normalisation")
    p.add_argument("--minimum", type=float, metavar="N", help="units that each group keeps, or a share (default 1)")
    p.add_argument("--multiple", type=int, metavar="N", help="let groups keep a multiple of so many slices (default 1)")
    p.add_argument("--rounds", type=int, metavar="N", help="removals on the way, by scores taken anew (default 1)")
    p.add_argument("--epochs", type=int, default=0, metavar="N", help="then train the smaller network (default: no)")
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate, with --epochs (default 0.1)")
    p.add_argument("--net", metavar="NAME", help="the network of a .safetensors file")
    p.add_argument("--only", action="append", default=[], metavar="GLOB", help="only these groups may lose units")
    p.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave these groups whole")
    p.add_argument("--equal", action="append", default=[], metavar="GLOB", help="these groups keep equally many units")
    _shared(p)


def _run(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", nargs="*", metavar="RECIPE", help="a TOML file; several with --queue (none: all in it)")
    p.add_argument("-o", "--out", metavar="FOLDER", help="the run folder (default: runs/ and the recipe's name)")
    p.add_argument("--queue", metavar="FOLDER",
                   help="share the stages of recipes out among all processes that name this folder")  # fmt: skip
    p.add_argument("--workers", type=int, default=1, metavar="N", help="with --queue: processes to start (default 1)")
    p.add_argument("--lease", type=float, default=60.0, metavar="SECONDS",
                   help="with --queue: a stage is free so long after its worker was last heard of (60)")  # fmt: skip
    p.add_argument("--status", action="store_true", help="with --queue: tell the state of every stage, and do nothing")
    p.add_argument("--retry", action="store_true", help="with --queue: try stages again that failed")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("--log", choices=("tensorboard", "mlflow", "trackio"), help="mirror the figures to a tracker")
    _settings(p)


def _compare(p: argparse.ArgumentParser) -> None:
    p.add_argument("comparison", metavar="COMPARISON", help="a TOML file with [model], [data], [compare] and [train]")
    p.add_argument("-o", "--out", metavar="FOLDER", help="the folder of all runs (default: runs/ and the file's name)")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes, of one thread each (default 1)")
    p.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS",
                   help="spread the runs with Ray: over a running cluster, or over N workers here")  # fmt: skip
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("-s", "--set", action="append", default=[], metavar="A.B=VALUE", dest="settings",
                   help="set any key of the file, for example -s compare.epochs=5 or -s train.lr=0.05")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="list the runs and what has become of them, and do nothing")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _measure(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", metavar="FOLDER", help="a run folder")
    p.add_argument("--dense", metavar="FOLDER", help="the dense network (default: the one it came from)")
    p.add_argument("--probe", action="append", default=[], metavar="NAME", help="a further probe; may be repeated")
    p.add_argument("--damage", action="store_true",
                   help="per-class changes, flips, calibration, corruptions and features, for the report")  # fmt: skip
    p.add_argument("--beside", action="append", default=[], metavar="FOLDER",
                   help="with --damage: a further pruned network to compare; may be repeated")  # fmt: skip
    p.add_argument("--flatness", action="store_true",
                   help="curvature of the loss and its rise under noise, before and after, for the report")  # fmt: skip
    _shared(p)


def _report(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="FOLDER", help="a run folder")
    p.add_argument("-o", "--out", metavar="FILE", help="where the page goes (default: report.html in the folder)")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _compare_report(p: argparse.ArgumentParser) -> None:
    p.add_argument("folders", nargs="+", metavar="RUNS",
                   help="run folders, folders of `secateur compare`, or folders that hold such")  # fmt: skip
    p.add_argument("-o", "--out", metavar="FILE", help="where the page goes (default: compare-report.html here)")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def _watch(p: argparse.ArgumentParser) -> None:
    p.add_argument("folders", nargs="+", metavar="RUNS", help="run folders, or folders that hold some")
    p.add_argument("--port", type=int, default=8765, metavar="N", help="the port (default 8765; 0: any free one)")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                   help="the address to listen on (default 127.0.0.1: this machine alone)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print the list of runs once as JSON, and serve nothing")


def _methods(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", metavar="NAME", help="show the card of one method")
    p.add_argument("--json", action="store_true", help="print as JSON")


def _doctor(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", nargs="?", metavar="FILE",
                   help="a run folder, or weights of any format that is read (default: the machine)")  # fmt: skip
    p.add_argument("--net", metavar="NAME", help="the network of the weights: tells what it ties and, with data, more")
    p.add_argument("--data", metavar="NAME", help="data to compare BatchNorm's statistics with")
    p.add_argument("--masks", metavar="FILE", help="the masks of the weights (default: those beside them)")
    p.add_argument("--ema", metavar="FILE", help="an averaged copy, which should have the same zeros")
    p.add_argument("--dense", metavar="FILE", help="the network before pruning")
    p.add_argument("--fix", metavar="OUT", help="write a copy without the faults that can be mended")
    p.add_argument("--all", action="store_true", help="show every tensor, also of a large network")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("-s", "--set", action="append", default=[], metavar="A.B=VALUE", dest="settings",
                   help="options of network or data, for example -s model.widths=[64,32]")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print as JSON")


def _adopt(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="safetensors, torch.save, ONNX, .pt2, or a folder of Hugging Face")
    p.add_argument("--net", "--class", dest="net", metavar="NAME",
                   help="the class: of secateur.nets, module:Class, or transformers:Class (default: none)")  # fmt: skip
    p.add_argument("-s", "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
                   help="what the class is built with, for example -s widths=[300,100]")  # fmt: skip
    p.add_argument("--shape", metavar="A,B,C", help="the input's shape without the batch; outputs are compared on it")
    p.add_argument("--outputs", type=int, metavar="N", help="classes of the data, for networks that ask for them")
    p.add_argument("--tokens", type=int, metavar="N", help="the input is token ids below N")
    p.add_argument("--unfold", action="store_true",
                   help="BatchNorm folded into the layer before it becomes an identity (default: refused)")  # fmt: skip
    p.add_argument("--entry", metavar="NAME", help="another state dict in the file, such as its averaged copy: ema")
    p.add_argument("-o", "--out", metavar="FOLDER", help="the folder to write")
    p.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _bench(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", nargs="?", metavar="FOLDER", help="a run folder")
    p.add_argument("--net", metavar="NAME", help="a network instead: of secateur.nets, module:function, or a .pt2 file")
    p.add_argument("--shape", metavar="A,B,C", help="the input's shape without the batch (default: the folder's data)")
    p.add_argument("--tokens", type=int, metavar="N", help="the input is token ids below N")
    p.add_argument("--zeros", type=float, metavar="X", help="first set this share of each weight to zero, at random")
    p.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes (default 1)")
    p.add_argument("--threads", type=int, metavar="N", help="threads of every candidate (default: torch's)")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds in which each has its turn (default 5)")
    p.add_argument("--seconds", type=float, default=1.0, metavar="X", help="time of a turn (default 1)")
    p.add_argument("--against", action="append", default=[], metavar="NAME",
                   help="beside dense torch: onnxruntime, or deepsparse=PYTHON of its environment")  # fmt: skip
    p.add_argument("--isa", default="auto", metavar="NAME", help="an instruction set (default: the best here)")
    p.add_argument("--measure-paths", action="store_true",
                   help="choose lists or blocks for each layer by the clock, not by rule; remembered")  # fmt: skip
    p.add_argument("--explain", action="store_true", help="one line a layer: path, zeros, time, reason")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _calibrate(p: argparse.ArgumentParser) -> None:
    p.add_argument("nets", nargs="*", metavar="NET",
                   help="run folders, or networks by name with --shape (default: a base set of eight)")  # fmt: skip
    p.add_argument("--shape", metavar="A,B,C", help="the input's shape without the batch, for networks by name")
    p.add_argument("--tokens", type=int, metavar="N", help="the input is token ids below N")
    p.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes (default 1)")
    p.add_argument("--threads", type=int, metavar="N", help="threads of the compiled core (default: all cores)")
    p.add_argument("--pattern", action="append", default=[], metavar="P",
                   help="unstructured, 4x1, 2:4, ...; may be repeated (default: these three)")  # fmt: skip
    p.add_argument("--engine", action="append", default=[], metavar="E",
                   help="also time the networks as they are in torch (and on CUDA where there is a device), "
                        "onnxruntime, or all")  # fmt: skip
    p.add_argument("--again", action="store_true", help="measure anew what is known of these networks")
    p.add_argument("--status", action="store_true", help="say what is known, and measure nothing")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _export(p: argparse.ArgumentParser) -> None:
    p.add_argument("start", metavar="FOLDER", help="a run folder, or the folder of a step")
    p.add_argument("--format", metavar="NAME", help="onnx or pt2 (default: from the name of the file, else onnx)")
    p.add_argument("-o", "--out", metavar="FILE", help="the file (default: network.onnx or network.pt2 in the folder)")
    p.add_argument("--batch", type=int, metavar="N", help="examples in the batch that is traced and timed (default 1)")
    p.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operators (default: the exporter's own)")
    p.add_argument("--data-dir", metavar="FOLDER", help="where data sets lie (default: $SECATEUR_DATA)")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


VERBS: dict[str, Verb] = {
    "train": Verb("train a network, holding the zeros it has", _train, "train",
                  "example:\n  secateur train --net lenet_300_100 --data digits --epochs 10 -o runs/dense"),
    "prune": Verb("prune a network, once or step by step while training, and measure it", _prune, "prune",
                  'example:\n  secateur prune runs/dense --to "params 5%" --epochs 10'),
    "plan": Verb("say what to prune layer by layer for a target, in which pattern, and what it should do", _plan,
                 "plan", "example:\n"
                 '  secateur plan runs/dense --to "latency 0.5x" --patterns unstructured,4x1 -o plan.json\n'
                 "  secateur prune runs/dense --plan plan.json"),
    "shrink": Verb("remove units, so that the network itself is smaller, and measure it", _shrink, "shrink",
                   'example:\n  secateur shrink runs/dense --to "macs 0.5x" --criterion taylor_filter --epochs 5'),
    "run": Verb("run a recipe; finished steps are skipped, unfinished ones go on", _run, "run",
                "example:\n  secateur run recipes/digits-demo.toml"),
    "compare": Verb("compare methods at several sparsities: same budget, several seeds, controls, one curve", _compare,
                    "compare", "example:\n  secateur compare recipes/compare-digits.toml --workers 2"),
    "measure": Verb("measure a network against the dense one it came from", _measure, "measure",
                    "example:\n  secateur measure runs/dense-prune-params-5pct --probe calibration"),
    "bench": Verb("time a network, compiled, against dense torch and other engines", _bench, "bench",
                  "example:\n  secateur bench --net resnet20 --shape 3,32,32 --zeros 0.9 --batch 1 16 --explain"),
    "calibrate": Verb("measure what layers cost on this machine, for the forecasts of plans; remembered", _calibrate,
                      "calibrate", "example:\n  secateur calibrate\n  secateur calibrate runs/dense --batch 1 16"),
    "export": Verb("write a network as ONNX or .pt2; the file is read back, compared, searched for zeros and timed",
                   _export, "export", "example:\n  secateur export runs/dense-prune-params-5pct -o small.onnx"),
    "report": Verb("write report.html and report.json for a run folder", _report, "report"),
    "compare-report": Verb("write one page for many runs: accuracy against size, MACs and time, and the Pareto front",
                           _compare_report, "compare_report",
                           "example:\n  secateur compare-report runs/mnist-* runs/compare-mnist -o mnist.html"),
    "watch": Verb("follow runs on a local page while they train; reads only", _watch, "watch",
                  "example:\n  secateur watch runs"),
    "adopt": Verb("turn weights that other libraries pruned into a folder of this one", _adopt, "adopt",
                  "example:\n  secateur adopt old.pt --net my_nets:Small --shape 1,28,28 -o runs/old"),
    "methods": Verb("list the methods, or show the card of one", _methods, "methods"),
    "doctor": Verb("look for what is wrong with this machine or a file of weights, and mend a copy", _doctor, "doctor",
                   "example:\n  secateur doctor checkpoint.pt --fix mended.pt"),
}  # fmt: skip
