# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Multiply-adds, parameters and bytes against hand counts and torch's own counter."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from secateur import nets
from secateur.core.errors import DataError, MaskError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes.cost import Cost, weight_costs
from secateur.testing.cases import CASES

SMALL = {
    "mlp": ({"inputs": 12, "outputs": 4, "widths": (8, 6)}, (12,)),
    "lenet_300_100": ({"inputs": 784, "outputs": 10}, (784,)),
    "lenet5": ({"channels": 2, "size": 13, "outputs": 4}, (2, 13, 13)),
    **{f"vgg{n}": ({"width": 0.02, "outputs": 4}, (3, 32, 32)) for n in (11, 13, 16, 19)},
    "resnet_cifar": ({"depth": 8, "width": 3, "outputs": 4, "shortcut": "B"}, (3, 9, 9)),
    **{f"resnet{n}": ({"width": 2, "outputs": 4}, (3, 8, 8)) for n in (20, 32, 56)},
    "wide_resnet": ({"depth": 10, "widen": 1, "outputs": 4}, (3, 8, 8)),
    **{f"resnet{n}": ({"width": 4, "outputs": 4}, (3, 33, 33)) for n in (18, 34, 50)},
    "mobilenet_v1": ({"width": 0.05, "outputs": 4}, (3, 32, 32)),
    "mobilenet_v2": ({"width": 0.05, "outputs": 4}, (3, 32, 32)),
    "vit_tiny": ({"size": 8, "dim": 12, "depth": 2, "outputs": 4}, (3, 8, 8)),
    "bert_tiny": ({"vocab": 11, "length": 6, "dim": 8, "outputs": 4}, (6,)),
    "gpt_tiny": ({"vocab": 11, "length": 6, "dim": 8, "depth": 2}, (6,)),
    "lstm": ({"vocab": 11, "hidden": 8, "layers": 2}, (6,)),
}


def task(model, *shape, vocab=0):
    random = stream(0, "test", "cost")
    inputs = torch.randint(vocab, (2, *shape), generator=random) if vocab else torch.randn(2, *shape, generator=random)
    return Task(model, functional.cross_entropy, [(inputs, torch.zeros(2, dtype=torch.long))])


def random_masks(model, density=0.3):
    random = stream(0, "test", "masks")
    return Masks({name: torch.rand(m.shape, generator=random) < density for name, m in Masks.dense(model).items()})


def macs_of(reading):
    return {k.removeprefix("macs:"): v for k, v in reading.parts.items() if k.startswith("macs:")}


@pytest.mark.parametrize("name", nets.names())
def test_dense_macs_are_half_of_the_flops_torch_counts(name):
    options, shape = SMALL[name]
    one = task(nets.build(name, **options), *shape, vocab=options.get("vocab", 0))
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            one.model.eval()(one.data[0][0][:1])

    reading = Cost()(one)

    assert 2 * reading.parts["macs_dense"] == counter.get_total_flops()
    assert reading.note == ""
    assert sum(macs_of(reading).values()) + reading.parts["macs_activations"] == reading.parts["macs_dense"]
    assert reading.value == reading.parts["macs_effective"] == reading.parts["macs_dense"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_small_network_is_counted_as_torch_counts_it_in_any_type(name, dtype):
    reading = Cost()(CASES[name](dtype=dtype))
    assert reading.note == ""
    assert reading.value == Cost()(CASES[name]()).value


def test_lenet_300_100_has_266_610_parameters_and_266_200_macs():
    reading = Cost()(task(nets.build("lenet_300_100"), 784))
    assert (reading.parts["params"], reading.parts["params_prunable"], reading.value) == (266_610, 266_200, 266_200)
    assert reading.unit == "MAC" and reading.value.is_integer()


def test_a_tenth_of_every_layer_is_compression_9_863_and_speedup_10():
    net = nets.build("lenet_300_100")
    masks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in parameters(net).items() if p.dim() > 1}
    for mask in masks.values():
        mask[: mask.numel() // 10] = True

    shaped = Masks({n: m.view(parameters(net)[n].shape) for n, m in masks.items()})
    parts = Cost()(task(net, 784), shaped).parts

    assert parts["params_kept"] == 26_620 + 410
    assert math.isclose(parts["compression"], 266_610 / 27_030)
    assert parts["speedup_theoretical"] == 10.0
    assert parts["bytes_dense"] == 4 * 266_610
    assert parts["bytes_sparse"] == 4 * 26_620 + (784 * 300 + 300 * 100 + 100 * 10) // 8 + 4 * 410


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7), 5 * 7),
    "strided": (nn.Conv2d(4, 6, 3, stride=2), (4, 7, 9), 3 * 4),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 7), 3 * 5),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 7), 3 * 5),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (4, 6, 7), 2 * 3),
    "one dimension": (nn.Conv1d(4, 6, 3), (4, 8), 6),
    "three dimensions": (nn.Conv3d(2, 3, 2), (2, 3, 4, 5), 2 * 3 * 4),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 7), 5 * 7),
    "linear": (nn.Linear(4, 6), (4,), 1),
    "linear at places": (nn.Linear(4, 6), (5, 7, 4), 35),
    "linear without bias": (nn.Linear(4, 6, bias=False), (5, 4), 5),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_weight_costs_as_many_macs_as_there_are_positions(layer):
    net, shape, positions = LAYERS[layer]
    one = task(net, *shape)
    masks = random_masks(net)

    reading = Cost()(one, masks)

    assert weight_costs(one)["weight"] == positions
    assert reading.parts["macs:weight"] == positions * net.weight.numel()
    assert reading.parts["macs_effective:weight"] == positions * masks.kept == reading.value


def test_pruned_weights_save_what_their_position_count_says_in_every_case():
    for name, make in CASES.items():
        one = make()
        masks, costs = random_masks(one.model), weight_costs(one)
        dense, reading = Cost()(one), Cost()(one, masks)
        saved = sum(costs[n] * int((~m).sum()) for n, m in masks.items())
        assert dense.value - reading.value == saved, name


class Twice(nn.Module):
    """A weight used twice, once on five places and once on one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).sum(1))


def test_a_tied_weight_is_one_parameter_that_costs_every_use():
    reading = Cost()(task(Twice(), 5, 4))
    assert reading.parts["params"] == 16
    assert macs_of(reading) == {"one.weight": 16 * 6}


def test_attention_weights_are_counted_by_the_slice_that_is_used():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mix(x[:, :2], x, x)[0]

    one = task(Cross(), 5, 8)
    mask = torch.zeros(24, 8, dtype=torch.bool)
    mask[:8] = True  # the query's third is used on 2 places, the other two on 5

    reading = Cost()(one, Masks({"mix.in_proj_weight": mask}))

    assert reading.parts["macs:mix.in_proj_weight"] == 64 * (2 + 5 + 5)
    assert reading.parts["macs_effective:mix.in_proj_weight"] == 64 * 2
    assert reading.parts["macs:mix.out_proj.weight"] == 64 * 2
    assert reading.parts["macs_activations"] == 2 * (2 * 5 * 8)
    assert weight_costs(one)["mix.in_proj_weight"] == 4
    assert reading.note == ""


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_cost_one_mac_a_step(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0]

    one = task(Net(), 7, 4)
    costs = weight_costs(one)
    assert {name: cost for name, cost in costs.items() if "weight" in name} == dict.fromkeys(
        (n for n in costs if "weight" in n), 7
    )
    assert Cost()(one).note == ""


def test_a_transformer_layer_is_counted_through_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    reading = Cost()(task(layer, 5, 8))
    assert reading.value == 5 * (24 * 8 + 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def test_casts_and_parametrizations_of_a_weight_count_as_the_weight():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    class Half(nn.Module):
        def forward(self, w):
            return 0.5 * w

    halved = nn.Linear(4, 6)
    parametrize.register_parametrization(halved, "weight", Half())
    for net, name in ((Cast(), "layer.weight"), (halved, "weight")):
        masks = Masks({name: torch.arange(24).view(6, 4) < 7})
        parts = Cost()(task(net, 5, 4), masks).parts
        assert (parts[f"macs:{name}"], parts[f"macs_effective:{name}"]) == (120, 35)
        assert parts["macs_activations"] == 0

    normed = task(weight_norm(nn.Linear(4, 6)), 5, 4)
    assert [v for k, v in macs_of(Cost()(normed)).items() if k.endswith("original1")] == [120]


def test_a_learned_vector_added_to_activations_is_no_weight():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.layer = nn.Parameter(torch.zeros(1, 5, 4)), nn.Linear(4, 6)

        def forward(self, x):
            x = x + self.places
            return self.layer(x) @ self.layer(x).transpose(1, 2)

    parts = Cost()(task(Positions(), 5, 4)).parts
    assert "macs:places" not in parts
    assert (parts["macs:layer.weight"], parts["macs_activations"]) == (2 * 120, 5 * 5 * 6)


def test_a_disagreement_with_torch_is_noted_with_both_figures():
    class Vector(nn.Module):  # torch's counter has no formula for a matrix times a vector
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 4))

        def forward(self, x):
            return torch.mv(self.weight, x[0])[None]

    reading = Cost()(task(Vector(), 4))
    assert reading.value == 24
    assert "0 MACs" in reading.note and "24" in reading.note


def test_a_masked_tensor_that_no_product_uses_is_named():
    class Spare(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 6))
            self.spare = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return self[0](x)

    one = task(Spare(), 4)
    masks = Masks({"spare": torch.ones(3, 3, dtype=torch.bool), "0.weight": torch.ones(6, 4, dtype=torch.bool)})
    reading = Cost()(one, masks)
    assert "`spare`" in reading.note and "`0.weight`" not in reading.note
    assert weight_costs(one) == {"spare": 0, "0.weight": 1, "0.bias": 0}


def test_an_embedding_is_looked_up_and_costs_nothing():
    net = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 2))
    assert weight_costs(task(net, 3, vocab=11))["0.weight"] == 0


def test_keyword_inputs_and_inputs_shared_by_all_examples_are_taken_as_they_are():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x, scale):
            return self.layer(x * scale)

    inputs = {"x": torch.ones(3, 5, 4), "scale": torch.ones(4)}
    one = Task(Named(), functional.cross_entropy, [(inputs, torch.zeros(3))])
    assert Cost()(one).value == 120


def test_a_captured_network_counts_like_the_original():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    one = task(net, 2, 5, 5)
    captured = torch.export.export(net, (one.data[0][0][:1],)).module()
    captured.train = captured.eval = lambda *_: captured
    assert Cost()(Task(captured, one.loss, one.data)).value == Cost()(one).value


def test_bytes_follow_the_type_and_saved_buffers():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)).bfloat16()
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    masks = Masks({"0.weight": torch.arange(32).view(8, 4) < 5})
    random = task(net, 4)
    one = Task(net, random.loss, [(random.data[0][0].bfloat16(), random.data[0][1])])
    parts = Cost()(one, masks).parts
    others = 4 * 8 * 2 + 8  # scale, shift, mean, variance in two bytes; a counter in eight
    assert (parts["bytes_dense"], parts["bytes_sparse"]) == (64 + others, 5 * 2 + 4 + others)


def test_everything_pruned_leaves_no_macs():
    net = nn.Linear(4, 6)
    parts = Cost()(task(net, 4), Masks({"weight": torch.zeros(6, 4, dtype=torch.bool)})).parts
    assert parts["macs_effective"] == 0 and parts["params_kept"] == 6
    assert math.isinf(parts["speedup_theoretical"])


def test_a_network_with_nothing_to_prune_is_counted():
    reading = Cost()(task(nn.BatchNorm1d(4), 4))
    assert (reading.value, reading.parts["params"], reading.parts["params_prunable"]) == (0, 8, 0)


def test_masks_of_another_network_are_refused():
    with pytest.raises(MaskError, match="another network"):
        Cost()(task(nn.Linear(4, 6), 4), Masks({"weight": torch.ones(2, 2, dtype=torch.bool)}))


def test_empty_data_are_refused():
    with pytest.raises(DataError, match="no example"):
        weight_costs(Task(nn.Linear(4, 6), functional.cross_entropy, []))
