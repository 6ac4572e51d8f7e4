"""Random small networks for the tests of the compiled core: maps, tokens and rows, and the ways between them."""

import math

ACTS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh")
SMOOTH = (*ACTS[1:], "neg", "abs", "square")
DENSITIES = (0.0, 0.05, 0.1, 0.1, 0.3, 0.5, 0.5, 0.9, 1.0, 1.0)


class Grower:
    """Adds random layers to a `Net`; ``shapes`` holds every value, with 0 for the batch."""

    def __init__(self, net, random):
        self.net, self.random, self.shapes = net, random, {}
        kind = self.pick(("image", "image", "tokens", "row"))
        width = self.pick((3, 5, 8, 12, 13))
        shape = {
            "image": (0, width, self.pick((1, 3, 7, 8, 13, 16)), self.pick((1, 2, 5, 8, 11, 16))),
            "tokens": (0, self.pick((1, 3, 7, 8, 9, 16, 19)), width),
            "row": (0, self.pick((5, 16, 24, 41))),
        }[kind]
        self.last = self.keep(net.input(*shape), shape)

    def pick(self, options):
        """One of some things."""
        return options[int(self.random.integers(len(options)))]

    def keep(self, name, shape):
        """Notes a value."""
        self.shapes[name], self.last = tuple(shape), name
        return name

    def like(self, shape):
        """Another value of this shape, or None."""
        same = [name for name, found in self.shapes.items() if found == tuple(shape)]
        return self.pick(same) if same and self.random.random() < 0.5 else None

    def dense(self):
        """Options of a layer with weights."""
        return {"density": self.pick(DENSITIES), "block": self.pick((1, 1, 1, 4)), "bias": self.random.random() < 0.7,
                "act": self.pick(ACTS)}  # fmt: skip

    def grow(self, count):
        """So many layers; the outputs."""
        for _ in range(count):
            rank = len(self.shapes[self.last])
            step = self.pick({4: IMAGE, 3: TOKENS, 2: ROW}[rank])
            step(self, self.last, self.shapes[self.last])
            if self.random.random() < 0.2:  # go on from an earlier value
                self.last = self.pick(list(self.shapes))
        outs = [self.last]
        for _ in range(int(self.random.integers(0, 3))):
            outs.append(self.pick(list(self.shapes)))
        return outs

    def conv(self, x, shape):
        _, ins, high, wide = shape
        kernel = [min(self.pick((1, 1, 2, 3, 3, 5)), size + 2) for size in (high, wide)]
        dilation = [self.pick((1, 1, 1, 2)) for _ in kernel]
        stride = [self.pick((1, 1, 1, 2, 3)) for _ in kernel]
        pad = [int(self.random.integers(0, 4)) for _ in range(4)]
        if self.random.random() < 0.5:  # keep the size
            stride, dilation, pad = [1, 1], [1, 1], [k // 2 for k in kernel] + [(k - 1) // 2 for k in kernel]
        sizes = [
            (size + pad[at] + pad[at + 2] - dilation[at] * (kernel[at] - 1) - 1) // stride[at] + 1
            for at, size in enumerate((high, wide))
        ]
        if min(sizes) < 1:
            return
        groups = self.pick((1, 1, 1, ins, *[g for g in (2, 3) if ins % g == 0]))
        outs = self.pick((ins, groups * self.pick((1, 2, 3)), groups * self.pick((1, 4, 5))))
        out = (0, outs, *sizes)
        made = self.net.conv(x, outs, ins // groups, *kernel, residual=self.like(out), groups=groups, stride=stride,
                             dilation=dilation, pad=pad, **self.dense())  # fmt: skip
        self.keep(made, out)

    def pool(self, x, shape):
        op = self.pick(("max_pool", "avg_pool"))
        kernel = [min(self.pick((1, 2, 3)), size) for size in shape[2:]]
        stride = [self.pick((1, 2)) for _ in kernel]
        pad = [int(self.random.integers(0, k // 2 + 1)) for k in (*kernel, *kernel)]
        given = {} if op == "max_pool" else {"count_pad": self.random.random() < 0.5}
        sizes = [(shape[2 + i] + pad[i] + pad[i + 2] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
        self.keep(self.net.add(op, x, kernel=kernel, stride=stride, pad=pad, **given), (*shape[:2], *sizes))

    def squeeze(self, x, shape):
        width, inner = shape[1], self.pick((1, 2, 5))
        mean = self.net.add("adaptive_avg_pool", x, size=(1, 1))
        down = self.net.conv(mean, inner, width, 1, 1, act="relu", density=self.pick((0.5, 1.0)))
        gate = self.net.conv(down, width, inner, 1, 1, act=self.pick(("sigmoid", "hardsigmoid")))
        pair = (x, gate) if self.random.random() < 0.7 else (gate, x)
        self.keep(self.net.add("binary", *pair, fn="mul", act=self.pick(("none", "relu"))), shape)

    def adapt(self, x, shape):
        size = (self.pick((1, shape[2], 3)), self.pick((1, shape[3], 2)))
        self.keep(self.net.add("adaptive_avg_pool", x, size=size), (*shape[:2], *size))

    def group(self, x, shape):
        groups = self.pick([g for g in range(1, shape[1] + 1) if shape[1] % g == 0])
        given = {"weight": self.net.numbers(shape[1]), "bias": self.net.numbers(shape[1])}
        self.keep(self.net.add("group_norm", x, groups=groups, eps=0.1, **given), shape)

    def affine(self, x, shape):
        given = {"scale": self.net.numbers(shape[1]), "shift": self.net.numbers(shape[1])}
        self.keep(self.net.add("affine", x, act=self.pick(ACTS), **given), shape)

    def border(self, x, shape):
        before, after = [int(n) for n in self.random.integers(0, 3, 2)]
        pads = [(0, 0)] * (len(shape) - 1) + [(before, after)]
        self.keep(self.net.add("pad", x, pad=pads, value=0.5), (*shape[:-1], shape[-1] + before + after))

    def binary(self, x, shape):
        tail = shape[1:]
        options = [tail, (1,), tail[-1:], tuple(1 for _ in tail[1:]) + tail[-1:]]
        options += [(tail[0], *(1 for _ in tail[1:])), (1, tail[0], *(1 for _ in tail[1:]))]
        other = self.like(shape) or self.net.const(*self.pick(options))
        pair = (x, other) if self.random.random() < 0.6 else (other, x)
        fn = self.pick(("add", "add", "sub", "mul", "max", "min"))
        self.keep(self.net.add("binary", *pair, fn=fn, act=self.pick(ACTS)), shape)

    def unary(self, x, shape):
        self.keep(self.net.add("unary", x, fn=self.pick(SMOOTH)), shape)

    def concat(self, x, shape):
        axis = int(self.random.integers(1, len(shape)))
        fits = [n for n, s in self.shapes.items() if s[:axis] + s[axis + 1 :] == shape[:axis] + shape[axis + 1 :]]
        fits = [n for n in fits if len(self.shapes[n]) == len(shape)]
        parts = [x, *(self.pick(fits) for _ in range(self.pick((1, 1, 2))))]
        size = sum(self.shapes[n][axis] for n in parts)
        if size < 64:
            self.keep(self.net.add("concat", *parts, axis=axis), (*shape[:axis], size, *shape[axis + 1 :]))

    def slice(self, x, shape):
        axis = self.pick((1, 1, len(shape) - 1, int(self.random.integers(1, len(shape)))))
        start = int(self.random.integers(0, shape[axis]))
        stop, step = int(self.random.integers(start + 1, shape[axis] + 1)), self.pick((1, 1, 1, 2))
        made = self.net.add("slice", x, axis=axis, start=start, stop=stop, step=step)
        self.keep(made, (*shape[:axis], -(-(stop - start) // step), *shape[axis + 1 :]))

    def to_tokens(self, x, shape):
        flat = self.net.add("reshape", x, shape=(0, shape[1], -1))
        self.keep(self.net.add("permute", flat, dims=(0, 2, 1)), (0, shape[2] * shape[3], shape[1]))

    def to_row(self, x, shape):
        if len(shape) == 4 and self.random.random() < 0.7:
            self.keep(self.net.add("reduce", x, fn="mean", axes=(2, 3), keepdims=False), shape[:2])
        elif len(shape) == 3 and self.random.random() < 0.5:
            self.keep(self.net.add("reduce", x, fn=self.pick(("mean", "max")), axes=(1,), keepdims=False),
                      (0, shape[2]))  # fmt: skip
        elif math.prod(shape[1:]) < 500:
            self.keep(self.net.add("reshape", x, shape=(0, -1)), (0, math.prod(shape[1:])))

    def linear(self, x, shape):
        outs = self.pick((shape[-1], 5, 12, 16))
        out = (*shape[:-1], outs)
        self.keep(self.net.linear(x, outs, shape[-1], residual=self.like(out), **self.dense()), out)

    def norm(self, x, shape):
        op, width = self.pick(("layer_norm", "rms_norm")), shape[-1:]
        axes = width if self.random.random() < 0.8 else shape[1:]
        bias = {"bias": self.net.numbers(*axes)} if op == "layer_norm" else {}
        self.keep(self.net.add(op, x, axes=len(axes), eps=0.1, weight=self.net.numbers(*axes), **bias), shape)

    def softmax(self, x, shape):
        self.keep(self.net.add("softmax", x, axis=self.pick((len(shape) - 1, 1))), shape)

    def attend(self, x, shape):
        _, length, width = shape
        heads = self.pick([h for h in (1, 2, 3, 4) if width % h == 0])
        mask = self.pick(((), (), (length,), (length, length), (1, heads, length, length)))
        reads = [self.net.linear(x, width, width, **self.dense() | {"act": "none"}) for _ in range(3)]
        reads += [self.net.const(*mask)] if mask else []
        causal = self.random.random() < 0.4
        made = self.net.add("attention", *reads, heads=heads, scale=width**-0.5, causal=causal)
        self.keep(made, shape)

    def recur(self, x, shape):
        op, hidden, directions = self.pick(("lstm", "gru")), self.pick((3, 8)), self.pick((1, 2))
        given = self.net.cell(op, shape[2], hidden, 1, directions)
        first = {"hidden": hidden, "layers": 1, "bidirectional": directions == 2, "batch_first": True}
        self.keep(self.net.add(op, x, **first, **given)[0], (*shape[:2], directions * hidden))

    def to_image(self, x, shape):
        if len(shape) == 3:
            turned = self.net.add("permute", x, dims=(0, 2, 1))
            self.keep(self.net.add("reshape", turned, shape=(0, shape[2], 1, -1)), (0, shape[2], 1, shape[1]))
        else:
            self.keep(self.net.add("reshape", x, shape=(0, -1, 1, 1)), (0, shape[1], 1, 1))

    def merge(self, x, shape):
        flat = self.net.add("reshape", x, shape=(-1, shape[2]))
        outs = self.pick((shape[2], 7))
        flat = self.net.linear(flat, outs, shape[2], **self.dense())
        self.keep(self.net.add("reshape", flat, shape=(0, shape[1], outs)), (*shape[:2], outs))

    def part(self, x, shape):
        size = self.pick([n for n in range(1, 20) if shape[1] % n == 0])
        self.keep(self.net.add("reshape", x, shape=(0, size, -1)), (0, size, shape[1] // size))


G = Grower
BOTH = (G.binary, G.binary, G.unary, G.concat, G.slice, G.to_row)
IMAGE = (*BOTH, *(G.conv,) * 8, *(G.pool,) * 2, G.squeeze, G.squeeze, G.adapt, G.group, G.affine, G.border, G.to_tokens)
TOKENS = (*BOTH, *(G.linear,) * 5, *(G.norm,) * 2, G.softmax, *(G.attend,) * 3, G.recur, G.to_image, G.merge, G.merge)
ROW = (*BOTH[:-1], *(G.linear,) * 6, G.norm, G.softmax, G.part, G.to_image, G.affine)
