"""What every number of a report's tables must be, looked up in the run folder by the row's name and the heading."""

import json
import math

from tests.browser.printed_kit import (
    BYTES,
    COUNT,
    EXACT,
    FAST,
    FOUR,
    MS,
    PERCENT,
    POINTS,
    RISE,
    SCALED,
    SECONDS,
    THREE,
    TIMES,
    Style,
    Want,
    change,
)  # fmt: skip

NAMED = {"Corruptions": 2, "Features": 2, "Changed answers": 2}
"""How many cells at its beginning name a row; one in other tables."""
SIDES = ("dense", "pruned")
Rows = dict[tuple[str, ...], dict[str, Want]]
"""Figures by the name of the row and the heading."""


class Folder:
    """What a run folder holds."""

    def __init__(self, run):
        self.run = run
        self.steps = json.loads((run / "run.json").read_text())["steps"]
        self.cards = {step["number"]: read(run / step["folder"] / "card.json") for step in self.steps}
        self.places = {step["number"]: run / step["folder"] for step in self.steps}
        measured = run / self.of("measure")[-1]["folder"]
        self.verdict, self.damage = read(measured / "verdict.json"), read(measured / "damage.json")
        self.last = self.cards[self.of("train", "prune")[-1]["number"]]
        self.cut = self.cards[self.of("prune")[-1]["number"]]
        self.layers = {row["name"]: row for row in self.verdict["layers"]}
        self.changes = self.damage["changes"]["pruned"]

    def of(self, *kinds):
        """The steps of some kinds."""
        return [step for step in self.steps if step["do"] in kinds]

    def lines(self, number):
        """The figures that a step logged."""
        path = self.places[number] / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def compiled(self):
        """Milliseconds of each part of the compiled network: of a tensor, or of a step without one."""
        spent = {}
        for step in self.verdict["time"]["compiled"]:
            name = step["tensors"][0] if step["tensors"] else step["node"]
            spent[name] = spent.get(name, 0.0) + step["ms"]
        return spent

    def torch(self):
        """Milliseconds of each tensor's module in torch."""
        return {row["tensors"][0]: row["ms"] for row in self.verdict["time"]["dense"]}


def read(path):
    return json.loads(path.read_text())


def figure(reading, style: Style, factor: float = 1.0) -> Want:
    """A reading as a figure."""
    low, high = reading["low"], reading["high"]
    if low is None and reading["stderr"] is not None:
        low, high = (reading["value"] + k * 1.96 * reading["stderr"] for k in (-1, 1))
    return Want(factor * reading["value"], style, low and factor * low, high and factor * high)


def right(reading):
    """An accuracy in per cent."""
    assert reading["unit"] == "%"
    return figure(reading, PERCENT)


def gap(reading):
    """A difference of accuracies."""
    assert reading["unit"] == "points"
    return figure(reading, POINTS)


def share(part, whole):
    return Want(100 * part / whole, PERCENT)


def verdict(folder: Folder) -> Rows:
    dense, pruned, apart = (folder.verdict[key] for key in ("dense", "pruned", "change"))
    said = folder.cards[folder.of("prune")[0]["number"]]["forecast"]
    rows: dict[str, tuple[Want, Want, Want]] = {
        "Accuracy": (right(dense["accuracy"]), right(pruned["accuracy"]), gap(apart["accuracy"])),
        "Time for one example": _times(folder, "latency"),
        "Time, compiled (from the plan file)": _times(folder, "compiled"),
        "Accuracy, compiled (from the plan file)": (
            right(dense["accuracy"]), right(pruned["compiled accuracy"]), gap(apart["compiled accuracy"]),
        ),
        "File on disk": _sizes(dense["disk"]["value"], pruned["disk"]["value"], BYTES),
        "File, compressed": _sizes(
            dense["disk"]["parts"]["weights compressed"], pruned["disk"]["parts"]["weights compressed"], BYTES
        ),
        "Plan file": _sizes(dense["disk"]["value"], pruned["plan"]["value"], BYTES),
        "Weights kept": _sizes(folder.last["total"], folder.last["kept"], COUNT),
        "Loss right after pruning": (
            Want(said["loss_before"], FOUR), Want(said["loss_after"], FOUR), Want(said["rise_measured"], RISE),
        ),
    }  # fmt: skip
    for label, key, style in (("Parameters kept", "params_kept", COUNT), ("MACs", "macs_dense", SCALED),
                              ("Effective MACs", "macs_effective", SCALED)):  # fmt: skip
        rows[label] = _sizes(dense["cost"]["parts"][key], pruned["cost"]["parts"][key], style)
    made: Rows = {(label,): dict(zip(("Dense", "Pruned", "Change"), row, strict=True)) for label, row in rows.items()}
    made["Loss right after pruning",]["Forecast"] = Want(said["rise_forecast"], RISE)
    return made


def _times(folder: Folder, name: str) -> tuple[Want, Want, Want]:
    assert folder.verdict["dense"][name]["unit"] == "ms" and folder.verdict["change"][name]["unit"] == "x"
    one, two = (figure(folder.verdict[side][name], MS) for side in SIDES)
    return one, two, figure(folder.verdict["change"][name], FAST)


def _sizes(one, two, style: Style) -> tuple[Want, Want, Want]:
    return Want(one, style), Want(two, style), change(one, two)


def baselines(folder: Folder) -> Rows:
    own = {side: folder.verdict[side]["accuracy"] for side in SIDES}
    return {(name,): {"Accuracy": right(one)} for name, one in (own | folder.verdict["baselines"]).items()}


def layers(folder: Folder) -> Rows:
    spent, made = folder.compiled(), {}
    for name, row in [*folder.layers.items(), ("all", None)]:
        mine = [row] if row else list(folder.layers.values())
        weights, kept, macs, effective = (
            sum(r[key] for r in mine) for key in ("weights", "kept", "macs", "macs_effective")
        )
        made[name,] = {
            "Weights": Want(weights, COUNT), "Kept": Want(kept, COUNT), "Density": share(kept, weights),
            "MACs": Want(macs, SCALED), "Effective MACs": Want(effective, SCALED),
            "ms": Want(sum(spent[r["name"]] for r in mine), THREE),
        }  # fmt: skip
    return made


def where_time(folder: Folder) -> Rows:
    spent, torch = folder.compiled(), folder.torch()
    whole, made = sum(spent.values()), {}
    for name, ms in spent.items():
        made[name,] = {"Compiled, ms": Want(ms, THREE), "Share": share(ms, whole)}
        if name in torch:
            made[name,] |= {
                "Dense in torch, ms": Want(torch[name], THREE),
                "Times as fast": Want(torch[name] / ms, TIMES),
            }
    total = {"Compiled, ms": Want(whole, THREE), "Share": Want(100.0, PERCENT)}
    made["all",] = total | {"Dense in torch, ms": Want(folder.verdict["time"]["dense_ms"], THREE)}
    return made


def forecast(folder: Folder) -> Rows:
    heads = {"Loss before": "loss_before", "Loss after": "loss_after", "Rise measured": "rise_measured",
             "Rise forecast": "rise_forecast", "Slope part": "slope", "Curvature part": "curvature"}  # fmt: skip
    made: Rows = {}
    for step in folder.of("prune"):
        card = folder.cards[step["number"]]
        made[str(step["number"]),] = {
            "Step": Want(step["number"], COUNT), "Density": share(card["kept"], card["total"]),
            **{head: Want(card["forecast"][key], FOUR) for head, key in heads.items()},
        }  # fmt: skip
    return made


def judged(folder, row):
    """Whether a layer's rise is large enough to judge the forecast by."""
    return abs(row["rise"]) >= 1e-4 * abs(folder.cut["forecast"]["loss_before"]) > 0


def layer_forecast(folder: Folder) -> Rows:
    made: Rows = {}
    for row in folder.cut["layers"]:
        made[row["name"],] = {
            "Kept": share(row["kept"], row["total"]),
            "Rise forecast": Want(row["forecast"], FOUR), "Rise measured": Want(row["rise"], FOUR),
        }  # fmt: skip
        if judged(folder, row):
            made[row["name"],]["Forecast / measured"] = Want(row["forecast"] / row["rise"], THREE)
    return made


def training(folder: Folder) -> Rows:
    made: Rows = {}
    for step in folder.of("train"):
        card = folder.cards[step["number"]]
        macs = card["training_macs"]
        made[f"{step['number']} train",] = {
            "Examples": Want(macs["examples"], COUNT), "MACs, dense": Want(macs["dense"], SCALED),
            "MACs, sparse": Want(macs["sparse"], SCALED), "Share": share(macs["sparse"], macs["dense"]),
            "Optimizer state": Want(card["optimizer_bytes"], BYTES), "Seconds": Want(card["seconds"], SECONDS),
        }  # fmt: skip
    return made


def scores(folder: Folder) -> Rows:
    made: Rows = {}
    for name, row in folder.cut["scores"]["tensors"].items():
        kept, pruned = (
            sum(row[key]) + row["below"][i] + row["infinite"][i] for i, key in enumerate(("kept", "pruned"))
        )
        made[name,] = {
            "Weights": Want(kept + pruned, COUNT), "Kept": Want(kept, COUNT), "Share": share(kept, kept + pruned),
            "Smaller than drawn": Want(sum(row["below"]), COUNT),
        }  # fmt: skip
        ends = {"Lowest score kept": row["lowest_kept"], "Highest pruned": row["highest_pruned"]}
        made[name,] |= {head: Want(value, FOUR) for head, value in ends.items() if value is not None}
    return made


def flatness(folder: Folder) -> Rows:
    tables = [folder.verdict["flatness"][side] for side in SIDES]
    rho = f"{tables[0]['sharpness']['parts']['rho']:#.2g}".rstrip(".")
    names = {"loss": "Loss on the sample", "top_eigenvalue": "Largest eigenvalue of the Hessian",
             "trace": "Trace of the Hessian", "sharpness": f"Sharpness, rho {rho}"}  # fmt: skip
    made: Rows = {}
    for key in tables[0]:
        name = names.get(key) or f"Rise under noise of {100 * tables[0][key]['parts']['size']:.4g} %"
        pair = [figure(table[key], FOUR) for table in tables]
        made[name,] = {"Before": pair[0], "After": pair[1], **_ratio(pair[0], pair[1], bounds=key == "top_eigenvalue")}
    means = [Want(table["trace"]["parts"]["per weight"], FOUR) for table in tables]
    made["Trace / free weights",] = {"Before": means[0], "After": means[1], **_ratio(means[0], means[1])}
    return made


def _ratio(one: Want, two: Want, bounds: bool = False) -> dict[str, Want]:
    """After / before: with the extremes of bounds, or with independent errors of the logarithms."""
    if one.value <= 0 or two.value <= 0:
        return {}
    value = two.value / one.value
    if one.low is None or two.low is None:
        return {"Ratio": Want(value, TIMES)}
    halves = [(high.value - low.value) / 2 for low, high in (want.ends() for want in (one, two))]
    parts = [half / want.value for half, want in zip(halves, (one, two), strict=True)]
    if max(parts) >= 1:
        return {"Ratio": Want(value, TIMES)}
    if bounds:
        ends = [(two.value - k * halves[1]) / (one.value + k * halves[0]) for k in (1, -1)]
    else:
        ends = [math.exp(math.log(value) + k * math.sqrt(parts[0] ** 2 + parts[1] ** 2)) for k in (-1, 1)]
    return {"Ratio": Want(value, TIMES, *ends)}


def probes(folder: Folder) -> Rows:
    made: Rows = {}
    for name, one in folder.verdict["probes"].items():
        style = Style(f" {one['unit']}".rstrip(), digits=4)
        made[name,] = {"Value": figure(one, style), "Draws or examples": Want(one["n"], COUNT)}
    return made


def damage(folder: Folder) -> Rows:
    keys = {"Examples": "count", "Right before": "right_before", "Right after": "right_after", "Lost": "only_before",
            "Gained": "only_after"}  # fmt: skip
    rows = folder.changes["classes"]
    made: Rows = {}
    for row in rows:
        made[row["name"],] = {head: Want(row[key], COUNT) for head, key in keys.items()}
        made[row["name"],]["Change"] = gap(row["change"])
    made["all",] = {head: Want(sum(row[key] for row in rows), COUNT) for head, key in keys.items()}
    made["all",]["Change"] = gap(folder.changes["accuracy"])
    return made


def flips(folder: Folder) -> Rows:
    lost = folder.changes["flips"]["right_wrong"]
    return {
        (row["label_name"], row["answer_name"]): {
            "Examples": Want(row["count"], COUNT),
            "Share of the lost": share(row["count"], lost),
        }
        for row in folder.changes["flips"]["pairs"]
    }


def calibration(folder: Folder) -> Rows:
    made: Rows = {}
    for name, table in folder.damage["calibration"].items():
        made[name,] = {
            "ECE": figure(table["ece"], THREE), "Largest gap": Want(table["mce"], THREE),
            "Confidence": share(table["confidence"], 1), "Accuracy": share(table["accuracy"], 1),
            "NLL": Want(table["nll"], THREE), "Brier score": Want(table["brier"], THREE),
        }  # fmt: skip
    return made


def corruptions(folder: Folder) -> Rows:
    table = folder.damage["corruptions"]
    made: Rows = {}
    for row in [{"corruption": "none", "severity": 0, **table["clean"]}, *table["rows"]]:
        name = (row["corruption"], str(row["severity"]))
        made[name] = {side: right(row["accuracy"][side]) for side in SIDES}
        made[name] |= {"Severity": Want(row["severity"], COUNT), "Change": gap(row["change"]["pruned"])}
        if "parameter" in row:
            made[name]["Parameter"] = Want(row["parameter"], EXACT)
    return made


def features(folder: Folder) -> Rows:
    made: Rows = {}
    for metric in ("angle", "length", "margin"):
        for side in SIDES:
            one = folder.damage["geometry"][side][metric]
            named = {"Mean": one["mean"], "Deviation": one["std"]}
            named |= zip(("Lower quartile", "Median", "Upper quartile"), one["quartiles"], strict=True)
            made[metric, side] = {head: Want(value, FOUR) for head, value in named.items()}
            made[metric, side]["Undefined"] = Want(one["undefined"], COUNT)
    return made


def left_alone(folder: Folder) -> Rows:
    reasons = list(folder.cut["left_alone"].values())
    return {(why,): {"Tensors": Want(reasons.count(why), COUNT)} for why in set(reasons)}


TABLES = {
    "Verdict": verdict, "Baselines": baselines, "Layers": layers, "Where the time goes": where_time,
    "Forecast and truth": forecast, "Forecast and truth by layer": layer_forecast, "Training cost": training,
    "Scores": scores, "Curvature and flatness": flatness, "Probes": probes, "Damage": damage, "Changed answers": flips,
    "Calibration": calibration, "Corruptions": corruptions, "Features": features, "Left alone": left_alone,
}  # fmt: skip
