"""Writes the plan files of the native parser's tests: ``make_plans.py FOLDER``.

FOLDER/good holds sound plans with the shapes and weights that reading them must give, FOLDER/bad damaged ones with a
part of the message that refuses them.
"""

import sys
from pathlib import Path

from bad_plans import write_bad
from plan_kit import Plan

CONV = {"stride": [1, 1], "pad": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "act": "relu"}
POOL = {"kernel": [3, 2], "stride": [2, 2], "pad": [1, 0, 1, 1]}


def image():
    """Everything that works on [N, C, H, W]."""
    p = Plan(1)
    p.input("x", [0, 3, 32, 30])
    w = p.weight("w1", 8, 3, 3, 3, store="bitmask")
    p.node("conv", ["x"], {"c1": ["N", 8, 32, 30]}, {"weight": w, "bias": p.weight("b1", 8)}, **CONV)
    w = p.weight("w2", 8, 2, 3, 3, store="i8")
    p.node("conv", ["c1", "c1"], {"c2": ["N", 8, 32, 30]}, {"weight": w}, **CONV | {"groups": 4, "act": "none"})
    w = p.weight("w3", 6, 8, 3, 2, store="f16")
    odd = {"stride": [2, 3], "pad": [0, 1, 2, 3], "dilation": [2, 4], "groups": 1, "act": "silu"}
    p.node("conv", ["c2"], {"c3": ["N", 6, 15, 10]}, {"weight": w}, **odd)
    scale = {"scale": p.weight("scale", 6), "shift": p.weight("shift", 6)}
    p.node("affine", ["c3"], {"a1": ["N", 6, 15, 10]}, scale, act="gelu")
    p.node("max_pool", ["a1"], {"m1": ["N", 6, 7, 5]}, **POOL | {"dilation": [2, 1]})
    p.node("avg_pool", ["a1"], {"m2": ["N", 6, 8, 5]}, **POOL, count_pad=False)
    p.node("adaptive_avg_pool", ["m2"], {"m3": ["N", 6, 3, 9]}, size=[3, 9])
    norm = {"weight": p.weight("gw", 6), "bias": p.weight("gb", 6)}
    p.node("group_norm", ["m1"], {"g": ["N", 6, 7, 5]}, norm, groups=3, eps=1e-5)
    p.node("pad", ["m3"], {"p": ["N", 6, 4, 14]}, pad=[[0, 0], [0, 0], [1, 0], [2, 3]], value=-1.5)
    p.node("reduce", ["p"], {"r": ["N", 6]}, fn="mean", axes=[3, 2], keepdims=False)
    p.node("reduce", ["p"], {"rk": ["N", 1, 4, 1]}, fn="max", axes=[1, 3], keepdims=True)
    p.node("linear", ["r"], {"l": ["N", 10]}, {"weight": p.weight("wl", 10, 6, store="bf16")}, act="none")
    p.node("softmax", ["l"], {"s": ["N", 10]}, axis=1)
    p.graph["outputs"] = ["s", "g", "rk"]
    return p


def text():
    """Token ids, attention and everything that moves axes."""
    p = Plan(2)
    p.input("ids", [0, 6], "i64")
    p.node("embedding", ["ids"], {"e": ["N", 6, 8]}, {"weight": p.weight("table", 11, 8, store="bitmask:f16")})
    p.node("const", [], {"pos": [6, 8]}, {"value": p.weight("positions", 6, 8, store="bitmask:bf16")})
    p.node("binary", ["e", "pos"], {"h": ["N", 6, 8]}, fn="add", act="none")
    norm = {"weight": p.weight("lw", 8), "bias": p.weight("lb", 8)}
    p.node("layer_norm", ["h"], {"ln": ["N", 6, 8]}, norm, axes=1, eps=1e-5)
    p.node("rms_norm", ["ln"], {"rms": ["N", 6, 8]}, {"weight": p.weight("rw", 6, 8)}, axes=2, eps=0)
    p.node("const", [], {"mask": [1, 6]}, {"value": p.weight("mask", 1, 6)})
    p.node("linear", ["rms"], {"v": ["N", 6, 4]}, {"weight": p.weight("wv", 4, 8)}, act="tanh")
    heads = {"heads": 2, "scale": 0.5, "causal": True}
    p.node("attention", ["ln", "rms", "v", "mask"], {"at": ["N", 6, 4]}, **heads)
    p.node("reshape", ["h"], {"split": ["N", 6, 2, 4]}, shape=[0, -1, 2, 4])
    p.node("permute", ["split"], {"turn": ["N", 2, 6, 4]}, dims=[0, 2, 1, 3])
    p.node("permute", ["turn"], {"flip": ["N", 2, 4, 6]}, dims=[0, 1, 3, 2])
    p.node("matmul", ["turn", "flip"], {"qk": ["N", 2, 6, 6]})
    p.node("slice", ["qk"], {"part": ["N", 2, 6, 2]}, axis=3, start=1, stop=5, step=3)
    p.node("reshape", ["part"], {"flat": ["4N", 6]}, shape=[-1, 6])
    p.node("reshape", ["flat"], {"back": ["N", 24]}, shape=[0, 24])
    p.node("unary", ["back"], {"u": ["N", 24]}, fn="rsqrt")
    p.node("reshape", ["at"], {"row": ["N", 24]}, shape=[0, -1])
    p.node("concat", ["u", "row", "u"], {"all": ["N", 72]}, axis=1)
    p.node("reduce", ["pos"], {"few": [1, 8]}, fn="sum", axes=[0], keepdims=True)
    p.node("expand", ["few"], {"wide": ["N", 3, 8]}, shape=[0, 3, -1])
    p.node("reduce", ["pos"], {"one": []}, fn="max", axes=[0, 1], keepdims=False)
    p.node("binary", ["one", "all"], {"scaled": ["N", 72]}, fn="div", act="relu6")
    p.graph["outputs"] = ["scaled", "wide"]
    return p


def recurrent():
    """LSTM and GRU, both orders of time and batch, with and without first states."""
    p = Plan(3)
    p.input("x", [0, 5, 3])
    p.input("h", [0, 4, 6])
    two = {"hidden": 6, "layers": 2, "bidirectional": True, "batch_first": True}
    p.node("permute", ["h"], {"h0": [4, "N", 6]}, dims=[1, 0, 2])
    outs = {"y": ["N", 5, 12], "hn": [4, "N", 6], "cn": [4, "N", 6]}
    p.node("lstm", ["x", "h0", "h0"], outs, cells(p, "l", 4, 6, 3, 2, 2), **two)
    p.node("permute", ["y"], {"time": [5, "N", 12]}, dims=[1, 0, 2])
    one = {"hidden": 7, "layers": 1, "bidirectional": False, "batch_first": False}
    p.node("gru", ["time"], {"z": [5, "N", 7], "zn": [1, "N", 7]}, cells(p, "g", 3, 7, 12, 1, 1), **one)
    p.node("gru", ["time", "zn"], {"q": [5, "N", 7], "qn": [1, "N", 7]}, cells(p, "g2", 3, 7, 12, 1, 1), **one)
    p.node("lstm", ["x"], {"s": ["N", 5, 6], "sh": [1, "N", 6], "sc": [1, "N", 6]}, cells(p, "m", 4, 6, 3, 1, 1),
           hidden=6, layers=1, bidirectional=False, batch_first=True)  # fmt: skip
    p.graph["outputs"] = ["q", "cn", "s"]
    return p


def cells(p, stem, gates, hidden, features, layers, dirs):
    """The weights of a recurrent layer, as ``{role: name}``."""
    roles = {}
    for layer in range(layers):
        width = features if layer == 0 else dirs * hidden
        for d in range(dirs):
            shapes = {"w_ih": (gates * hidden, width), "w_hh": (gates * hidden, hidden)}
            shapes |= {"b_ih": (gates * hidden,), "b_hh": (gates * hidden,)}
            for role, shape in shapes.items():
                store = "bitmask" if role == "w_hh" else "f32"
                roles[f"{role}.{layer}.{d}"] = p.weight(f"{stem}.{role}.{layer}.{d}", *shape, store=store)
    return roles


def stores():
    """Every store at sizes around a byte of the bitmask, odd names and a graph without a batch."""
    p = Plan(4)
    p.input('é😀 "quoted"', [2, 3])
    p.input("scalar", [])
    for store in ("f32", "f16", "bf16", "i8", "bitmask", "bitmask:f16", "bitmask:bf16"):
        for size in (1, 7, 8, 9, 64, 65):
            name = f"{store}.{size}".replace(":", "_")
            p.node("const", [], {f"v.{name}": [size]}, {"value": p.weight(name, size, store=store)})
    p.node("const", [], {"empty": [3, 5]}, {"value": p.weight("zeros", store="bitmask", values=[[0] * 5] * 3)})
    p.node("const", [], {"full": [17]}, {"value": p.weight("ones", store="bitmask:bf16", values=[1] * 17)})
    p.node("const", [], {"single": []}, {"value": p.weight("single", store="bitmask", values=3)})
    p.node("const", [], {"plain": []}, {"value": p.weight("plain", store="f16", values=-2)})
    p.node("unary", ['é😀 "quoted"'], {"y": [2, 3]}, fn="neg")
    p.node("binary", ["y", "scalar"], {"z": [2, 3]}, fn="sub", act="none")
    p.graph["outputs"] = ["z"]
    return p


def main():
    """Writes both folders."""
    folder = Path(sys.argv[1])
    for part in ("good", "bad"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    plans = {"image": image(), "text": text(), "recurrent": recurrent(), "stores": stores()}
    for name, plan in plans.items():
        plan.save(folder / "good" / f"{name}.safetensors")
    write_bad(folder / "bad", image, text, recurrent, stores)


if __name__ == "__main__":
    main()
