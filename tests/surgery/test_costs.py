"""Costs of a network without some of its units, against the network that is really without them."""

import contextlib

import pytest
import torch
from tests.surgery.zoo import ARCHITECTURES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from secateur import nets
from secateur.core.errors import ModelError, UsageError
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes.cost import Cost
from secateur.surgery import analyse, shrink
from secateur.surgery.costs import Costs
from secateur.surgery.times import LayerTimes

pytestmark = [
    # Exporting nn.GRU and nn.LSTM moves their list of flat weights about and says so.
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning"),
    # Copying a GraphModule makes torch warn of its own classes.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

OWN = {
    "resnet20": ({"width": 4}, (3, 16, 16)),
    "mobilenet_v2": ({"width": 0.25}, (3, 32, 32)),
    "gpt_tiny": ({"vocab": 11, "length": 6, "dim": 16, "depth": 2}, (6,)),
}

ZOO = [
    "densenet", "resnext", "shufflenet_v1", "unet", "vit_fused", "swin", "einsum_attention", "gqa_decoder", "tied_lm",
    "gru_tagger", "lstm_cell_loop",
]  # fmt: skip


def own(name):
    options, shape = OWN[name]
    model = nets.build(name, **options).eval()
    random = stream(0, "test", name)
    inputs = torch.randint(11, (1, *shape), generator=random) if len(shape) == 1 else torch.randn(1, *shape)
    return model, (inputs,)


def built(name):
    model, example = own(name) if name in OWN else ARCHITECTURES[name]()
    return model.eval(), example


def some(analysis, seed, share=0.5):
    """A random part of every group, never all of it."""
    random = stream(seed, "test", "units")
    counts = {g.name: int(torch.randint(int(share * len(g)) + 1, (), generator=random)) for g in analysis.groups}
    return {g.name: torch.randperm(len(g), generator=random)[: counts[g.name]].tolist()
            for g in analysis.groups if 0 < counts[g.name] < len(g)}  # fmt: skip


@contextlib.contextmanager
def plain_kernels():
    """Fused kernels off: torch's counter does not see into them."""
    before, fast = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mkldnn.enabled = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.enabled = before
        torch.backends.mha.set_fastpath_enabled(fast)


def flops(model, example):
    with plain_kernels(), FlopCounterMode(display=False) as counter:
        model(*example)
    return counter.get_total_flops()


def stored(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", [*OWN, *ZOO])
def test_costs_are_those_of_the_network_that_is_really_shrunk(name):
    model, example = built(name)
    analysis = analyse(model, example)
    costs, batch = Costs(analysis), tree_leaves(example)[0].shape[0]
    removal = some(analysis, 1) or {max(analysis.groups, key=len).name: [0]}
    kept = costs.kept(removal)
    assert 2 * batch * costs.macs() == flops(model, example)
    assert costs.bytes() == stored(model)
    small = shrink(model, example, removal, analysis=analysis).model
    assert costs.params(kept) == sum(p.numel() for p in small.parameters()) < costs.params()
    assert 2 * batch * costs.macs(kept) == flops(small, example)
    assert costs.bytes(kept) == stored(small)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_dense_costs_are_those_of_the_probe(name):
    model, example = own(name)
    reading = Cost()(Task(model, lambda output, target: output.sum(), [(example[0], example[0])]))
    costs = Costs(analyse(model, example))
    found = (costs.params(), costs.macs(), costs.bytes())
    assert found == tuple(reading.parts[key] for key in ("params", "macs_dense", "bytes_dense"))


def test_macs_are_of_one_example_whatever_the_batch_and_a_fixed_batch_is_divided():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(self.one(x).reshape(4, 8))

    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    for batch in (1, 2, 7):
        assert Costs(analyse(plain, torch.ones(batch, 5))).macs() == 5 * 8 + 8 * 3
    analysis = analyse(Fixed(), torch.ones(4, 5))
    assert analysis.note and Costs(analysis).macs({analysis.groups[0].name: 6}) == 5 * 6 + 6 * 3
    with pytest.raises(ModelError, match="times of batches of 9"):
        Costs(analysis, batch=9).ms()


def test_times_are_those_of_the_shapes_of_the_shrunken_network():
    """With multiply-adds for a clock, the forecast of a batch is its multiply-adds; each shape is measured once."""
    asked = []

    def clock(call):
        with plain_kernels(), FlopCounterMode(display=False) as counter:
            call()
        asked.append(counter.get_total_flops())
        return asked[-1] / 2

    for name in ("resnext", "gqa_decoder", "gru_tagger", "shufflenet_v1", "unet_bilinear", "vit_fused"):
        model, example = built(name)
        analysis = analyse(model, example)
        costs = Costs(analysis, LayerTimes(clock=clock), batch=3)
        for kept in ({}, costs.kept(some(analysis, 2))):
            assert costs.ms(kept) == 3 * costs.macs(kept)
            measured = len(asked)
            assert costs.ms(kept) == 3 * costs.macs(kept) and len(asked) == measured


def test_the_clock_of_the_machine_gives_milliseconds_of_every_layer():
    analysis = analyse(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.ones(2, 6))
    times = LayerTimes()
    costs = Costs(analysis, times)
    assert costs.ms() > 0 and costs.ms() == pytest.approx(sum(times.table.values()))
    assert len(times.table) == 3


def test_numbers_in_the_graph_are_timed_too():
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(torch.where(x.sum() > 0, self.one(x), torch.zeros(())))

    def clock(call):
        return float(call().dim() > 1)

    costs = Costs(analyse(Bounded(), torch.ones(2, 6)), LayerTimes(clock=clock))
    assert costs.ms() == 3  # two layers and the choice between them; the sum is one number


def test_unknown_groups_and_impossible_counts_are_refused():
    analysis = analyse(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.ones(2, 6))
    costs = Costs(analysis)
    with pytest.raises(UsageError, match="no group '0.weigth'.*Did you mean '0.weight'"):
        costs.params({"0.weigth": 3})
    with pytest.raises(UsageError, match="has 8 units; it cannot keep 9"):
        costs.macs({"0.weight": 9})
    assert costs.at("units", costs.gone({"0.weight": 5})) == 5
