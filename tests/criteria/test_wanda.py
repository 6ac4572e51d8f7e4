"""Wanda: |w| times the norm of what it multiplies."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.allocations import Uniform
from secateur.core.choose import choose
from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.wanda import Wanda


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(net, *inputs, **options):
    task = Task(net, lambda output, target: output.mean(), [(x, 0) for x in inputs])
    return Wanda(**options)(task, Masks.dense(net))


class Uses(nn.Module):
    """A weight or a layer used by a function."""

    def __init__(self, use, part=None):
        super().__init__()
        self.weight, self.part, self.use = nn.Parameter(randn(4, 3)) if part is None else None, part, use

    def forward(self, x, **more):
        return self.use(x, self.weight if self.part is None else self.part, **more)


LAYERS = {
    "linear": (nn.Linear(4, 3), (6, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 7)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), (4, 7, 7)),
    "circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 7)),
    "volume": (nn.Conv3d(2, 3, 2, padding=1), (2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    "einsum": (Uses(lambda x, w: torch.einsum("nti,io->nto", x, w)), (6, 4)),
    "product": (Uses(lambda x, w: x @ w), (6, 4)),
    "addmm": (Uses(lambda x, w: torch.addmm(torch.ones_like(w[0]), x.reshape(-1, 4), w)), (6, 4)),
    "lookup": (Uses(lambda x, w: functional.embedding(x.abs().long().clamp(max=3), w)), (6, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_the_square_is_what_the_output_changes_by_when_one_weight_goes(name):
    """The definition, through the layer's own forward pass; two batches give the sum over both."""
    net, x = LAYERS[name][0].double(), randn(5, *LAYERS[name][1], seed=1)
    score = scored(net, x[:2], x[2:])["weight"].reshape(-1)
    with torch.no_grad():
        before, flat = net(x), net.weight.reshape(-1)
        for i in range(0, len(flat), max(1, len(flat) // 9)):
            old = flat[i].clone()
            flat[i] = 0
            torch.testing.assert_close((net(x) - before).square().sum(), score[i].square(), rtol=1e-10, atol=1e-12)
            flat[i] = old


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "cell"), [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_recurrent_layers_are_scored_as_their_cells_run_by_hand(kind, cell, batch_first):
    layer, x = kind(3, 4, 2, bidirectional=True, batch_first=batch_first).double(), randn(5, 6, 3)
    scores, rows = scored(layer, x), x.transpose(0, 1) if batch_first else x
    for level in range(2):
        outputs = []
        for way in ("", "_reverse"):
            one = cell(rows.shape[-1], 4).double()
            one.load_state_dict({n: layer.get_parameter(f"{n}_l{level}{way}") for n in one.state_dict()})
            state, hidden = None, [torch.zeros_like(rows[0, :, :1]).expand(-1, 4)]
            for row in rows.flip(0) if way else rows:
                state = one(row, state)
                hidden.append(state[0] if isinstance(state, tuple) else state)
            for name, inputs in (("weight_ih", rows), ("weight_hh", torch.stack(hidden[:-1]))):
                expected = one.get_parameter(name).abs() * inputs.flatten(0, 1).norm(dim=0)
                torch.testing.assert_close(scores[f"{name}_l{level}{way}"], expected.detach())
            outputs.append(torch.stack(hidden[:0:-1] if way else hidden[1:]).detach())
        rows = torch.cat(outputs, -1)


def test_attention_is_heard_inside_and_padding_is_not():
    mha, x, real = nn.MultiheadAttention(6, 2, batch_first=True).double(), randn(2, 4, 6), torch.ones(2, 4)
    real[1, 2:] = 0
    net = Uses(lambda x, part, attention_mask: part(x, x, x, need_weights=False)[0], mha)
    scores = scored(net, {"x": x, "attention_mask": real})
    mixed = (mha(x, x, x)[0] - mha.out_proj.bias) @ mha.out_proj.weight.inverse().T
    for name, inputs in (("part.in_proj_weight", x), ("part.out_proj.weight", mixed)):
        expected = net.get_parameter(name).abs() * inputs[real.bool()].norm(dim=0)
        torch.testing.assert_close(scores[name], expected.detach())


def test_scaling_inputs_up_and_weights_down_changes_nothing_and_rows_keep_alike():
    net, x, factor = nn.Linear(6, 4).double(), randn(9, 6), torch.tensor([1e-3, 1, 5, 40, 0.2, 1e3]).double()
    same = scored(net, torch.eye(6).double(), rows=True)["weight"]
    assert torch.equal(same.argsort(1), net.weight.detach().abs().argsort(1))  # equal norms: magnitude within rows
    first = scored(net, x, rows=True)
    net.weight.data /= factor
    assert torch.equal(scored(net, x * factor, rows=True)["weight"], first["weight"])
    assert choose(first, 12, allocation=Uniform())["weight"].sum(1).tolist() == [3, 3, 3, 3]


def test_what_is_not_heard_is_refused_by_name():
    with pytest.raises(ModelError, match="`weight` are known.*--skip 'weight'"):
        scored(Uses(lambda x, w: x @ (w * 1)), randn(5, 4))
    with pytest.raises(ModelError, match="no example reaches it"):  # an expert that gets no row
        scored(Uses(lambda x, part: part(x[:0]), nn.Linear(4, 3).double()), randn(5, 4))
    pack = nn.utils.rnn.pack_sequence
    with pytest.raises(ModelError, match="`part.weight_ih_l0` are known"):
        scored(
            Uses(lambda x, part: part(pack([x[0], x[1, :2]]))[0].data, nn.GRU(4, 3, bias=False).double()),
            randn(2, 5, 4),
        )
    with pytest.raises(DataError, match="NaN or infinite"):
        scored(nn.Linear(4, 3).double(), randn(5, 4) * torch.inf)
