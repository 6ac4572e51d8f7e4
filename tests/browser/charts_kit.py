"""What a report's pictures and sentences must show, computed from the run folder."""

import base64

from tests.browser.printed_kit import COUNT, PERCENT, POINTS, Style, Want, Word, close, fits
from tests.browser.tables_kit import SIDES, TABLES, figure, judged

SPOKEN = Style("×", places=2)
"""A speed inside a sentence."""


def charts(folder):
    """What each chart must hold, by section and title."""
    every = {
        ("Baselines", "Accuracy beside baselines"): bars(folder, "Baselines", "Accuracy"),
        ("Layers", "Density by tensor"): bars(folder, "Layers", "Density"),
        ("Where the time goes", "Compiled"): bars(folder, "Where the time goes", "Share"),
        ("Where the time goes", "Dense in torch"): torch_bars(folder),
        ("Damage", "Change by class"): bars(folder, "Damage", "Change"),
        ("Forecast and truth by layer", "Forecast against measured rise of the loss"): {
            row["name"]: (row["rise"], row["forecast"])
            for row in folder.cut["layers"]
            if judged(folder, row) and row["rise"] > 0 and row["forecast"] > 0
        },
        ("Curvature and flatness", "Rise of the loss under noise"): {side: noise(folder, side) for side in SIDES},
        **curves(folder), **reliability(folder), **spoilt(folder), **histograms(folder),
    }  # fmt: skip
    return {key: wanted for key, wanted in every.items() if key[0] != "Damage" or any(w.value for w in wanted.values())}


def bars(folder, title, head):
    """A bar a row of the section's table, but for its total."""
    return {name[0]: row[head] for name, row in TABLES[title](folder).items() if name[0] != "all" and head in row}


def torch_bars(folder):
    parts, whole = folder.torch(), folder.verdict["time"]["dense_ms"]
    parts["everything else"] = max(0.0, whole - sum(parts.values()))
    whole = max(whole, sum(parts.values()))
    return {name: Want(100 * ms / whole, PERCENT) for name, ms in parts.items()}


def noise(folder, side):
    readings = [one for key, one in folder.verdict["flatness"][side].items() if key.startswith("noise ")]
    found = [(100 * one["parts"]["size"], figure(one, COUNT)) for one in readings]
    return sorted((size, want.value, want.low, want.high) for size, want in found)


def curves(folder):
    """Loss, accuracy and sparsity against the optimizer steps of all train steps in a row."""
    drawn = {"train/loss": [], "test/loss": [], "test/accuracy": [], "sparsity": []}
    cuts, before = [], 0
    for step in folder.of("train", "prune"):
        card = folder.cards[step["number"]]
        if step["do"] == "prune":
            drawn["sparsity"].append((before, 100 * (1 - card["kept"] / card["total"])))
            cuts.append(drawn["sparsity"][-1])
            continue
        for line in folder.lines(step["number"]):
            for key in drawn.keys() & line.keys():
                drawn[key].append((before + line["step"], line[key] * (100 if key == "sparsity" else 1)))
        before += card["steps"]
    assert max(map(len, drawn.values())) <= 200  # none is thinned
    steps = drawn["sparsity"]
    corners = [p for i, p in enumerate(steps) if i in (0, len(steps) - 1) or abs(p[1] - steps[i - 1][1]) > 1e-9]
    made = {
        ("Training", "Loss"): {"train loss": drawn["train/loss"], "test loss": drawn["test/loss"]},
        ("Training", "Accuracy"): {"test accuracy": drawn["test/accuracy"]},
        ("Training", "Sparsity"): {"sparsity": corners, "pruning": cuts},
    }
    return {key: {**series, "marks": [at for at, _ in cuts]} for key, series in made.items()}


def reliability(folder):
    tables, shapes = folder.damage["calibration"], folder.damage["geometry"]
    return {
        ("Calibration", "Reliability"): {
            side: sorted((100 * b["confidence"], 100 * b["accuracy"]) for b in tables[side]["bins"] if b["count"])
            for side in SIDES
        },
        ("Calibration", "Confidence"): {side: stepped(tables[side]["confidences"]) for side in SIDES},
        ("Calibration", "Margin"): {side: stepped(shapes[side]["margins"]) for side in SIDES},
    }


def stepped(table):
    """Right and wrong answers together, the last bin held until its end."""
    counts = [right + wrong for right, wrong in zip(table["right"], table["wrong"], strict=True)]
    return list(zip(table["edges"], [*counts, counts[-1]], strict=True))


def spoilt(folder):
    table, made = folder.damage["corruptions"], {}
    for kind in dict.fromkeys(row["corruption"] for row in table["rows"]):
        rows = [{"severity": 0, **table["clean"]}, *(row for row in table["rows"] if row["corruption"] == kind)]
        title = "JPEG" if kind == "jpeg" else kind[0].upper() + kind[1:]
        made["Corruptions", title] = {
            side: [(row["severity"], row["accuracy"][side]["value"]) for row in rows] for side in SIDES
        }
    return made


def histograms(folder):
    table, made = folder.cut["scores"], {}
    for name, row in {"All tensors": table["all"], **table["tensors"]}.items():
        lowest, highest = row["lowest_kept"], row["highest_pruned"]
        marks = [lowest] if lowest is not None and highest is not None and lowest >= highest else [lowest, highest]
        made["Scores", name] = {
            "edges": table["edges"], "kept": row["kept"], "pruned": row["pruned"],
        }  # fmt: skip
        if None not in (lowest, highest):
            made["Scores", name]["marks"] = marks
    return made


def chart_faults(chart, wanted):
    """What a chart shows that is not so."""
    kind = chart["kind"]
    if kind == "bars":
        named = dict(zip(chart["names"], zip(chart["values"], chart["texts"], strict=True), strict=True))
        faults = [name for name in named.keys() ^ wanted.keys()]
        for name in named.keys() & wanted.keys():
            value, text = named[name]
            style = Style(places=2, signed=True) if wanted[name].style is POINTS else wanted[name].style
            faults += [] if close(value, wanted[name].value) and fits(text, wanted[name].value, style) else [name]
        return faults
    if kind == "dots":
        found = dict(zip(chart["names"], chart["points"], strict=True))
    elif kind == "histogram":
        found = {key: chart[key] for key in ("edges", "kept", "pruned")}
    else:
        found = {series["name"]: series["points"] for series in chart["series"]}
    if "marks" in chart:
        found["marks"] = [at for at, _ in chart["marks"]]
    return [name for name in found.keys() | wanted.keys() if not alike(found.get(name), wanted.get(name))]


def alike(found, wanted):
    """Whether two nests of lists hold the same numbers."""
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    return not isinstance(found, list | tuple) and not isinstance(wanted, list | tuple) and close(found, wanted)


def cells_of(heat):
    """Counts of a heat map, along the rows."""
    raw, size = base64.b64decode(heat["data"]), heat["size"]
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def counted(mask, heat):
    """The same counts from a mask: the sum of each part of so many rows and columns."""
    rows = mask.reshape(heat["height"], heat["width"], heat["depth"]).sum(2).split(heat["tall"])
    return [int(part.sum()) for row in rows for part in row.split(heat["wide"], 1)]


def tiles(folder):
    """The figures to be seen first, and those beside them."""
    rows, spoken = TABLES["Verdict"](folder), {}
    for label in ("Accuracy", "Time, compiled (from the plan file)", "File, compressed"):
        row = rows[label,]
        spoken[label] = (row["Pruned"], [_said(row["Change"]), row["Dense"]])
    kept, total = rows["Weights kept",]["Pruned"], rows["Weights kept",]["Dense"]
    spoken["Weights kept"] = (Want(100 * kept.value / total.value, PERCENT), [kept, total])
    counts = folder.changes["flips"]
    labels = {"Right, now wrong": "right_wrong", "Wrong, now right": "wrong_right",
              "Wrong in another way": "wrong_other"}  # fmt: skip
    same = Want(100 * counts["agree"] / counts["count"], PERCENT)
    beside = [Want(counts["agree"], COUNT), Want(counts["count"], COUNT)]
    told = {label: (Want(counts[key], COUNT), []) for label, key in labels.items()}
    return {"Verdict": spoken, "Damage": {"Same answer": (same, beside), **told}}


def _said(want):
    """A figure as sentences write it."""
    return Want(want.value, SPOKEN, want.low, want.high) if want.style.unit == "× as fast" else want


def _with_ends(want):
    return [_said(want), *(_said(want).ends() if want.low is not None else [])]


def sentences(folder):
    """The figures that each sentence of a section may tell, in their order."""
    return {"Verdict": _of_verdict(folder), "Damage": _of_damage(folder), "Changed answers": [_of_flips(folder)],
            "Corruptions": _of_corruptions(folder), "Features": _of_features(folder)}  # fmt: skip


def _of_verdict(folder):
    rows = {name: row for (name,), row in TABLES["Verdict"](folder).items()}
    right, slow, fast, packed = (
        rows[name] for name in ("Accuracy", "Time for one example", "Time, compiled (from the plan file)",
                                "File, compressed")
    )  # fmt: skip
    gone = Want(100 - 100 * folder.last["kept"] / folder.last["total"], PERCENT)
    threads = Want(folder.verdict["pruned"]["compiled"]["parts"]["threads"], COUNT)
    sizes = [packed["Pruned"], packed["Dense"]]
    return [
        [gone, right["Change"], _said(fast["Change"]), *sizes],
        [right["Dense"], right["Pruned"], *_with_ends(right["Change"]), Word("0")],
        [threads, fast["Dense"], fast["Pruned"], *_with_ends(fast["Change"])],
        [slow["Dense"], slow["Pruned"], *_with_ends(slow["Change"])],
        sizes,
    ]


def _of_damage(folder):
    counts, rows = folder.changes["flips"], TABLES["Damage"](folder)
    numbers = {key: Want(count, COUNT) for key, count in counts.items() if isinstance(count, int)}
    agree = figure(counts["agreement"], Style(" %", places=2), 100)
    hurt = folder.changes["most_hurt"]
    name = (
        hurt["name"]
        if hurt["sentence"]
        else min((row for row in rows if row != ("all",)), key=lambda row: rows[row]["Change"].value)[0]
    )
    row = rows[name,]
    says = [agree, *agree.ends(), *(numbers[key] for key in ("count", "right_wrong", "wrong_right")), Word(name)]
    says += [row[head] for head in ("Examples", "Right before", "Right after")]
    return [[*says, *_with_ends(row["Change"])], [numbers["count"], numbers["both_right"], numbers["same_wrong"]]]


def _of_flips(folder):
    counts = folder.changes["flips"]
    first = counts["pairs"][0]
    differ = Want(counts["count"] - counts["agree"], COUNT)
    return [differ, Word(first["label_name"]), Word(first["answer_name"]), Want(first["count"], COUNT)]


def _of_corruptions(folder):
    """One list for each pair of a largest loss and a largest gain, of which there may be several alike."""
    rows = [row for name, row in TABLES["Corruptions"](folder).items() if name[0] != "none"]
    changes = [row["Change"] for row in rows]
    spans = [[end.value for end in change.ends()] for change in changes]
    below, above = sum(high < 0 for _, high in spans), sum(low > 0 for low, _ in spans)
    counts = [Want(below, COUNT), Want(len(rows), COUNT), Word("0"), Want(above, COUNT)]
    ends = [
        [[*_with_ends(row["Change"]), row["Severity"]] for row in rows if row["Change"].value == end(changes)]
        for end in (lambda c: min(one.value for one in c), lambda c: max(one.value for one in c))
    ]
    return [[*counts, *worst, *best] for worst in ends[0] for best in ends[1]]


def _of_features(folder):
    rows, before = TABLES["Features"](folder), folder.damage["geometry"]["pruned"]["margin_before"]
    style = rows["margin", "dense"]["Median"].style
    counts = [Want(before[key]["count"], COUNT) for key in ("flipped", "stable")]
    middles = [Want(before[key]["quartiles"][1], style) for key in ("flipped", "stable")]
    return [
        [rows["margin", side]["Median"] for side in SIDES],
        [counts[0], middles[0], counts[1], middles[1]],
    ]
