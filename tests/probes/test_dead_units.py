# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Dead units: networks whose units are killed by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur import nets
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes.dead_units import DeadUnits


def task(model, *shape, n=6, batches=2):
    inputs = torch.randn(n, *shape, generator=stream(0, "test", "dead"))
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs.chunk(batches)]
    return Task(model, functional.cross_entropy, data)


def kill(layer, *channels):
    """No input and a negative bias: zero behind any rectifier that has a zero."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0
        layer.bias[list(channels)] = -1
    return layer


def alive(layer):
    with torch.no_grad():
        layer.bias.fill_(5.0)
        layer.weight.mul_(0.01)
    return layer


def test_units_that_are_zero_for_every_example_are_counted_per_layer():
    net = nn.Sequential(
        kill(alive(nn.Linear(4, 8)), 1, 5), nn.ReLU(), kill(alive(nn.Linear(8, 12)), 0), nn.ReLU6(), nn.Linear(12, 3)
    )
    reading = DeadUnits()(task(net, 4))
    assert (reading.value, reading.unit, reading.n) == (100 * 3 / 20, "%", 6)
    assert {k: v for k, v in reading.parts.items() if k[0] in "du" and "disc" not in k} == {
        "dead:1": 2, "units:1": 8, "dead:3": 1, "units:3": 12,
    }  # fmt: skip
    assert (reading.parts["disconnected:0.weight"], reading.parts["disconnected:2.weight"]) == (2, 1)
    assert "disconnected:4.weight" not in reading.parts


def test_a_unit_that_lives_for_one_example_is_not_dead():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    inputs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [3.0, -1.0]])
    data = [(inputs[:2], torch.zeros(2)), (inputs[2:], torch.zeros(1))]
    reading = DeadUnits()(Task(net, functional.cross_entropy, data))
    assert reading.value == 50.0 and "disconnected:0.weight" not in reading.parts


def test_channels_of_convolutions_are_units_wherever_they_are_zero():
    net = nn.Sequential(kill(alive(nn.Conv2d(2, 5, 3)), 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(45, 2))
    reading = DeadUnits()(task(net, 2, 5, 5))
    assert (reading.parts["dead:1"], reading.parts["units:1"]) == (1, 5)


def test_tokens_have_their_channels_last_and_images_second():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = kill(alive(nn.Conv1d(2, 6, 1)), 0, 1), kill(alive(nn.Linear(6, 9)), 4)

        def forward(self, x):
            x = functional.relu(self.stem(x))
            return functional.relu(self.mix(x.transpose(1, 2)))

    parts = DeadUnits()(task(Both(), 2, 7)).parts
    assert (parts["dead:relu"], parts["units:relu"]) == (2, 6)
    assert (parts["dead:relu#2"], parts["units:relu#2"]) == (1, 9)


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU(),
     nn.Mish(), nn.Hardswish(), nn.Threshold(0.0, 0.0)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_every_rectifier_is_seen_as_a_module(module):
    net = nn.Sequential(alive(nn.Linear(4, 6)), module, nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0  # zero in, zero out
    reading = DeadUnits()(task(net, 4))
    assert reading.note == "1 of 6 units"


def test_functions_are_named_by_the_module_that_calls_them_and_reuse_by_number():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return torch.relu_(self.two(self.act(self.one(x)))) + self.act(x)

    parts = DeadUnits()(task(nn.Sequential(Block(), Block()), 4)).parts
    assert [k for k in parts if k.startswith("units:")] == [
        f"units:{b}.{name}" for b in (0, 1) for name in ("act", "relu", "act#2")
    ]


def test_eps_says_what_counts_as_zero():
    net = nn.Sequential(alive(nn.Linear(4, 6)), nn.GELU())
    with torch.no_grad():
        net[0].weight[:2], net[0].bias[:2] = 0, -4.5  # gelu(-4.5) is about -1.5e-5
    assert DeadUnits()(task(net, 4)).value == 0
    assert DeadUnits(eps=1e-4)(task(net, 4)).value == 100 * 2 / 6


def test_masks_disconnect_channels_whose_weights_are_not_yet_zero():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[[0, 3]] = False
    assert DeadUnits()(task(net, 4), Masks({"0.weight": mask})).parts["disconnected:0.weight"] == 2


def test_a_network_without_rectifier_is_judged_by_its_weights():
    net = nn.Sequential(kill(nn.Linear(4, 6), 0, 1, 2), nn.Tanh(), nn.Linear(6, 2))
    reading = DeadUnits()(task(net, 4))
    assert reading.value == 100 * 3 / 8 and "3 of 8" in reading.note


def test_disconnected_channels_of_transposed_and_grouped_convolutions():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 8, 2, groups=2), nn.Flatten())
    with torch.no_grad():
        net[0].weight[:2, 1] = 0  # channel 1 of the first group; 4 = 1 of the second stays
        net[1].weight[7] = 0
    parts = DeadUnits()(task(net, 4, 3, 3)).parts
    assert (parts["disconnected:0.weight"], parts["disconnected:1.weight"]) == (1, 1)


def test_recurrent_steps_are_no_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.RNN(4, 5, nonlinearity="relu", batch_first=True), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    assert "no rectifier" in DeadUnits()(task(Net(), 3, 4)).note


def test_a_transformer_layer_is_seen_through_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert DeadUnits()(task(layer, 5, 8)).parts["units:relu"] == 16


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "wide_resnet"])
def test_units_of_real_networks_are_their_channels(name):
    options = {"depth": 10, "widen": 1} if name == "wide_resnet" else {"width": 0.05} if name == "mobilenet_v2" else {}
    net = nets.build(name, outputs=4, **options)
    inputs = torch.randn(2, 3, 32, 32, generator=stream(0, "test"))
    reading = DeadUnits()(Task(net, functional.cross_entropy, [(inputs, torch.zeros(2, dtype=torch.long))]))
    widths = {b.weight.numel() for b in net.modules() if isinstance(b, nn.BatchNorm2d)}
    assert {v for k, v in reading.parts.items() if k.startswith("units:")} <= widths
    assert not any("[" in k for k in reading.parts)


def test_hooks_are_gone_afterwards_also_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    net = nn.Sequential(nn.Linear(4, 4), Fails())
    with pytest.raises(KeyError):
        DeadUnits()(task(net, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf")])
def test_eps_below_zero_or_not_finite_is_refused(eps):
    with pytest.raises(UsageError, match="eps=.*at least 0"):
        DeadUnits(eps)


def test_dead_units_are_static_or_dynamic_and_some_come_back():
    """Two of five units are dead in the end; one was at the start, and another has come back."""

    def net(*dead):
        return nn.Sequential(kill(alive(nn.Linear(4, 5)), *dead), nn.ReLU(), nn.Linear(5, 2))

    start, now = net(1, 3), net(1, 4)
    reading = DeadUnits(start=start)(task(now, 4))
    assert reading.value == 40.0
    assert {k: v for k, v in reading.parts.items() if k.split(":")[0] in ("static", "dynamic", "revived")} == {
        "static": 20.0, "dynamic": 20.0, "revived": 20.0, "static:1": 1, "dynamic:1": 1, "revived:1": 1,
    }  # fmt: skip
    assert "static" not in DeadUnits()(task(now, 4)).parts
    same = DeadUnits(start=now)(task(now, 4)).parts
    assert (same["static"], same["dynamic"], same["revived"]) == (40.0, 0.0, 0.0)


def test_masks_are_applied_to_the_start_so_that_units_without_weights_are_static():
    start, now = (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))
    for net in (start, now):
        alive(net[0])
        with torch.no_grad():
            net[0].bias.fill_(-1e-3)
            net[0].weight.copy_(torch.randn(5, 4, generator=stream(0, "w")))
    masks = Masks({"0.weight": torch.ones(5, 4, dtype=torch.bool), "2.weight": torch.ones(2, 5, dtype=torch.bool)})
    masks["0.weight"][2] = False
    masks.apply_(now)
    parts = DeadUnits(start=start)(task(now, 4), masks).parts
    assert (parts["dead:1"], parts["static:1"], parts["dynamic:1"]) == (1, 1, 0)
    assert DeadUnits(start=start)(task(now, 4)).parts["dynamic:1"] == 1


def test_with_inputs_of_one_sign_removing_negative_weights_turns_no_unit_off():
    random = stream(0, "test", "positive")
    layer = nn.Linear(12, 40)
    x = torch.rand(30, 12, generator=random)
    with torch.no_grad():
        before = layer(x) > 0
        layer.weight[torch.rand(40, 12, generator=random) < 0.5] = 0
        fewer = nn.Linear(12, 40)
        fewer.load_state_dict(layer.state_dict())
        fewer.weight[fewer.weight < 0] = 0
        assert not bool(((layer(x) > 0) & ~(fewer(x) > 0)).any())
        assert bool((before != (layer(x) > 0)).any())
    data = [(x, torch.zeros(30, dtype=torch.long))]
    rates = [
        DeadUnits()(Task(nn.Sequential(n, nn.ReLU()), functional.cross_entropy, data)).value for n in (layer, fewer)
    ]
    assert rates[1] <= rates[0]
