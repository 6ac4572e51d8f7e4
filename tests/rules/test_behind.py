"""What three rules share: ordinary networks train with them, and what is left is what evaluation mode computed."""

import copy
import warnings

import pytest
import torch
from tests.rules.behind_kit import heard, run_of
from torch import nn
from torch.nn.utils import parametrize

import secateur
from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import seed_global, stream
from secateur.engine.binding import table_of, value_of
from secateur.rules import _behind
from secateur.rules.l0 import L0, Gate
from secateur.rules.variational_bernoulli import Switch, VariationalBernoulli
from secateur.rules.variational_dropout import Noise, VariationalDropout
from secateur.testing.cases import CASES, conv_bn, tanh_mlp

KINDS = {L0: Gate, VariationalDropout: Noise, VariationalBernoulli: Switch}
SHARP = [
    L0(3.0, drop=0.91, examples=20),
    L0(3.0, "mixed", 0.91, examples=20),
    L0(3.0, "outputs", 0.91, examples=20),
    L0(3.0, "weights", 0.91, examples=20),
    VariationalDropout(start=0.0, stop=0.0, variance=-1.0, threshold=2.0, examples=20),
    VariationalBernoulli(log_gamma=-2.0, start=0.6, rate=0.5, examples=20),
]
"""Options with which something is pruned in a short run."""
every = pytest.mark.parametrize("rule", SHARP, ids=repr)
quiet = pytest.mark.filterwarnings("ignore:l0. all gates of", "ignore:variational_bernoulli. all inputs of")


class Attention(nn.Module):
    """An encoder layer of torch, whose attention reads a weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)
        for layer in (self.body.linear1, self.body.linear2, self.head):
            nn.init.normal_(layer.weight)  # some weights are large beside the noise

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def build(kind, seed=1):
    with torch.random.fork_rng():
        seed_global(seed, "net")
        return kind()


class Seen:
    """Mixed into a rule: keeps what the network computes in evaluation mode just before the end."""

    def end(self, run):
        run.model.eval()
        with torch.no_grad():
            self.outputs.append(run.model(self.x))
        run.model.train()
        super().end(run)


def watched(rule, x):
    kind = type(f"Watched{type(rule).__name__}", (Seen, type(rule)), {"x": x, "outputs": []})
    return kind(**{name: getattr(rule, name) for name in rule.__dataclass_fields__})


@quiet
@every
@pytest.mark.parametrize("name", ["relu_mlp", "conv_bn", "residual_bn", "depthwise", "attention", "lstm"])
def test_what_is_left_computes_what_evaluation_mode_did(rule, name):
    """Card test (d) of the gates and (e) of variational dropout: plain weights with exact zeros, 1e-12 in float64."""
    task = CASES[name](batches=(8, 6))
    x = next(iter(task.data))[0]
    rule = watched(rule, x)

    masks = secateur.train(task.model, list(task.data), rules=[rule], epochs=12, lr=0.02, optimizer="adam")

    assert not any(parametrize.is_parametrized(module) for module in task.model.modules())
    masks.check(task.model)
    with torch.no_grad():
        torch.testing.assert_close(task.model.eval()(x), rule.outputs[0], rtol=0, atol=1e-12)
    assert 0 < masks.kept < masks.total


@quiet
@every
def test_torch_s_own_attention_trains(rule):
    """Also in bfloat16 autocast and with micro-batches; a layer that is never called keeps its weights."""
    random = stream(0, "x")
    data = [(torch.randn(8, 5, 8, generator=random), torch.arange(8) % 3) for _ in range(4)]
    net = build(Attention)

    masks = secateur.train(net, data, rules=[rule], epochs=6, lr=0.02, optimizer="adamw", amp=True, accumulate=2)

    masks.check(net)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    uncalled = masks["body.self_attn.out_proj.weight"]
    assert bool(uncalled.all()) or isinstance(rule, L0)
    assert masks["body.linear1.weight"].sum() + masks["body.linear2.weight"].sum() < 2 * 96
    assert bool(masks["body.self_attn.in_proj_weight"].all())


@quiet
@every
def test_zeros_it_came_with_are_held(rule):
    """They stay zero in training, and the network that is left has them too."""
    task = conv_bn(batches=(8, 6))
    given = Masks({n: torch.rand(m.shape, generator=stream(0, n)) < 0.6 for n, m in Masks.dense(task.model).items()})

    masks = secateur.train(task.model, list(task.data), masks=given, rules=[rule], epochs=12, lr=0.02, optimizer="adam")

    assert (masks - given).kept == 0 < masks.kept < given.kept


@pytest.mark.parametrize("kind", KINDS)
def test_tied_and_transposed_weights_are_left_alone(kind):
    tied, up, other = nn.Linear(4, 4), nn.ConvTranspose2d(1, 1, 2), nn.Linear(4, 4)
    tied.weight = other.weight
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    frozen = nn.Linear(4, 4)
    frozen.weight.requires_grad_(False)
    net = nn.Sequential(tied, up, other, frozen, normed, nn.Linear(4, 2))
    masks = Masks.dense(net, only=["0.weight", "1.weight", "3.weight", "5.weight"])

    run = run_of(net, kind(), masks=masks)

    assert list(_behind.standing(run, KINDS[kind])) == ["5.weight"]
    with pytest.raises(ModelError, match="no dense or convolutional layer whose weight"):
        alone = nn.Sequential(nn.LSTM(3, 4))
        run_of(alone, kind())


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_itself_may_be_the_layer(kind):
    net = nn.Linear(4, 3)
    run = run_of(net, kind())
    assert list(_behind.standing(run, KINDS[kind])) == ["weight"]
    kind().end(run)
    assert type(net) is nn.Linear and list(net.state_dict()) == ["weight", "bias"] and not net._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_is_as_it_was_afterwards(kind):
    """The numbers behind the weights have no weight decay, and leave no group and no state behind."""
    net, rule = tanh_mlp().model, kind(examples=10)
    optimizer = torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.5)
    groups, known = len(optimizer.param_groups), {id(p) for p in net.parameters()}
    run = run_of(net, rule)
    run.optimizer = optimizer
    if kind is not VariationalBernoulli:
        _behind.enlist(run, KINDS[kind])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    net(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()

    rule.end(run)

    assert len(optimizer.param_groups) == groups
    assert {id(p) for p in optimizer.state} <= known


def test_the_size_of_the_data_is_counted():
    """Batches of 5, 5 and 3: taken for 15 until all have been seen, then 13; a number that is given goes first."""
    rule = L0()
    run = run_of(tanh_mlp().model, rule, per_epoch=3)
    sizes = []
    for step in range(7):
        for part in (4, 1) if step % 3 < 2 else (3,):  # micro-batches
            heard(run, rule, part)
        sizes.append(_behind.data_size(run, rule, 0))
        run.step += 1

    assert sizes == [15, 15, 13, 13, 13, 13, 13]
    heard(run, rule, 5)
    assert _behind.data_size(run, rule, 60_000) == 60_000


def test_words_are_terms_of_the_loss_and_soft_targets_are_not():
    rule = L0()
    run = run_of(tanh_mlp().model, rule, per_epoch=1)
    rule.loss(run, torch.zeros(()), (None, torch.zeros(4, 7, dtype=torch.long)), None)
    assert _behind.data_size(run, rule, 0) == 28
    run.state(rule).clear()
    rule.loss(run, torch.zeros(()), (None, torch.zeros(4, 7)), None)
    assert _behind.data_size(run, rule, 0) == 4


@every
def test_copies_can_be_made_while_it_works(rule):
    """And the copy computes the same."""
    net, x = tanh_mlp().model, next(iter(tanh_mlp().data))[0]
    run_of(net, rule)

    twin = copy.deepcopy(net)

    assert torch.equal(twin.eval()(x), net.eval()(x))
    assert torch.equal(twin.train()(x), net.train()(x))
    assert twin[0].parametrizations.weight.original is not net[0].parametrizations.weight.original


@every
def test_averages_are_refused(rule):
    task = tanh_mlp()
    with pytest.raises(UsageError, match="set `ema = 0`"):
        secateur.train(task.model, list(task.data), rules=[rule], epochs=2, ema=0.9)


@every
def test_chance_is_a_function_of_the_seed(rule):
    """Another seed gives another network; the global generator is not asked."""
    ends = []
    for seed in (0, 0, 1):
        task = tanh_mlp(batches=(8, 6))
        torch.rand(len(ends))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            secateur.train(task.model, list(task.data), rules=[rule], epochs=3, lr=0.05, seed=seed)
        ends.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))

    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@every
def test_the_share_that_would_be_left_is_noted_once_an_epoch(rule, tmp_path):
    """The last figure is that of the masks at the end."""
    import json

    task = tanh_mlp(batches=(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = secateur.train(task.model, list(task.data), rules=[rule], epochs=6, lr=0.02, folder=tmp_path)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    noted = [value for row in rows for key, value in row.items() if key.endswith("/kept")]
    assert len(noted) == 6 and noted[-1] == pytest.approx(1 - masks.sparsity, abs=1e-12)


@every
def test_recipes_can_hold_it(rule):
    assert value_of(type(rule), table_of(rule), "rule") == rule
