"""The forecast of the loss against calculus, counting and measuring."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from secateur.core.errors import ModelError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit, Unstructured
from secateur.core.streams import stream
from secateur.core.task import Task, frozen
from secateur.data import Loader, load
from secateur.engine.planning.changes import mask_of, units_kept, zeros
from secateur.engine.planning.pieces import pieces
from secateur.engine.planning.probing import Law, Losses, Probe, fit, frontier
from secateur.engine.planning.rises import DENSITIES, Rises, loss_rises, masks_for
from secateur.engine.planning.roots import root
from secateur.engine.planning.shares import _Heard, shares
from secateur.solvers.exact_obs import ExactObs
from secateur.testing.snapshot import changes, snapshot

PATTERNS = [Unstructured(), Block(4, 1), NM(2, 4), Unit()]
RUNGS = (0.75, 0.5, 0.25)


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


class Odd(nn.Module):
    """Every kind of layer: grouped, dilated and padded convolutions, a tied layer, ReLU in place, an LSTM."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, padding=1)
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, groups=2)
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        bias = self.line(x.flatten(2)).mean(2)
        x = F.relu_(self.first(x))
        x = F.relu_(self.norm(x)) + bias[:, :, None, None]
        x = self.mirror(F.tanh(self.groups(x)))
        x = torch.tanh(self.tied(x.flatten(2).mT))
        x, _ = self.lstm(self.again(F.relu_(self.tied(x))))
        return self.head(x.mean(1))


def options_of(net, names):
    return {
        name: zeros(w.detach(), w.detach().abs(), [p for p in PATTERNS if not p.why_not(tuple(w.shape))], RUNGS)
        for name, w in net.named_parameters()
        if name in names
    }


def moved(task, options, along):
    """How far each example's output moves along some directions, for every option: by central differences."""
    (inputs, _, _), step = next(pieces(task, 16)), 1e-6
    own = {name: p.detach() for name, p in task.model.named_parameters()}
    found = {}
    with frozen(task.model), torch.no_grad():
        for name, option in options.items():
            rows = []
            for column in option.columns(slice(None)).unbind(1):
                change = column.reshape(own[name].shape) * step
                up, down = (functional_call(task.model, {name: own[name] + s * change}, (inputs,)) for s in (1, -1))
                rows.append(torch.stack([((up - down) / (2 * step) * u).flatten(1).sum(1) for u in along]))
            found[name] = torch.stack(rows, 2)  # directions, examples, options
    return found


NAMES = (
    "line.weight",
    "first.weight",
    "groups.weight",
    "mirror.weight",
    "tied.weight",
    "lstm.weight_hh_l0",
    "head.weight",
)


def odd_task():
    return Task(seeded(Odd).eval(), CrossEntropy(), [(tensor(7, 4, 5, 5), torch.arange(7) % 4)])


def test_shares_are_the_square_of_the_directional_derivative():
    """All kinds of layers at once, float64; gradients of examples and differences of outputs are two ways."""
    task = odd_task()
    options = options_of(task.model, NAMES)
    assert set(options) == set(NAMES)
    before = snapshot(task)
    got = shares(task, options, 16, draws=2, seed=3)
    assert not changes(before, snapshot(task))
    random, (x, y) = stream(3, "planning", "roots"), task.data[0]
    along = [root(task.loss, task.model(x), y, random) for _ in range(2)]
    assert got.examples == 7
    for name, far in moved(task, options, along).items():
        torch.testing.assert_close(got.rises[name], far.square().mean((0, 1)) / 2, rtol=1e-5, atol=1e-12)


def test_shares_are_the_divergence_where_classes_are_few():
    """Four backward passes for four classes: the divergence of the moved probabilities, from torch's own."""
    task = odd_task()
    options = options_of(task.model, NAMES)
    got = shares(task, options, 16, draws=4)
    output = task.model(task.data[0][0]).detach()
    along = [unit.expand_as(output) for unit in torch.eye(4, dtype=output.dtype)]
    for name, far in moved(task, options, along).items():
        for option, share in enumerate(got.rises[name].tolist()):
            after = (output + far[:, :, option].T).log_softmax(1)
            want = F.kl_div(after, output.log_softmax(1), reduction="batchmean", log_target=True)
            assert share == pytest.approx(want.item(), rel=1e-5, abs=1e-12)


def test_shares_of_pieces_are_those_of_the_whole():
    """One output and a square loss: u is a sign times a constant, so nothing is random."""
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))
    data = [(tensor(n, 8, seed=n), tensor(n, 1, seed=n + 50)) for n in (20, 3, 30)]
    options = options_of(net, ("0.weight", "2.weight"))
    some = shares(Task(net, nn.MSELoss(), data), options, 40)
    x, y = (torch.cat(part)[:40] for part in zip(*data, strict=True))
    whole = shares(Task(net, nn.MSELoss(), [(x, y)]), options, 40, draws=3, seed=9)
    assert some.examples == whole.examples == 40
    for name in options:
        torch.testing.assert_close(some.rises[name], whole.rises[name], rtol=1e-10, atol=0.0)


def test_exact_for_a_linear_network_at_its_least_squares():
    """There the slope is zero and the loss quadratic: the share is the rise that is measured."""
    x = tensor(40, 8)
    y = x @ tensor(8, 1, seed=1) + 0.3 * tensor(40, 1, seed=2)
    net = nn.Linear(8, 1, bias=False).double()
    net.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()
    task = Task(net, nn.MSELoss(), [(x, y)])
    options = {"weight": zeros(net.weight.detach(), net.weight.detach().abs(), [Unstructured()], RUNGS)}
    got = shares(task, options, 40).rises["weight"]
    for rung, share in enumerate(got.tolist()):
        pruned = net.weight.detach() + options["weight"].change("unstructured", rung)
        assert share == pytest.approx(task.mean_loss({"weight": pruned}) - task.mean_loss(), rel=1e-9)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_root_has_the_curvature_of_cross_entropy(shape):
    """The mean of u uᵀ over many draws is the second derivative of one example's loss."""
    logits, classes = tensor(*shape), shape[-1]
    target = torch.zeros(shape[:-1], dtype=torch.long)
    loss = CrossEntropy()
    hessian = torch.autograd.functional.hessian(lambda z: loss(z[None], target[None]), logits)
    draws = 20000
    many = logits.expand(draws, *shape)
    u = root(loss, many, target.expand(draws, *shape[:-1]), stream(0, "test")).flatten(1)
    size = math.prod(shape)
    torch.testing.assert_close(u.T @ u / draws, hessian.reshape(size, size), atol=0.02, rtol=0.0)
    assert classes == 3


def test_root_of_any_loss_is_a_square_root():
    """Of a loss that is not known here the matrix itself is made; with one output its square is the curvature."""
    z, y = tensor(5, 1), tensor(5, 1, seed=1)
    u = root(lambda a, b: (a - b).pow(4).mean(), z, y, stream(0, "test"))
    torch.testing.assert_close(u.square(), 12 * (z - y).square())


def test_padding_does_not_count():
    logits, target = tensor(1, 4, 3), torch.tensor([[0, -100, 2, -100]])
    u = root(CrossEntropy(), logits, target, stream(0, "test"))
    assert u[0, 1].abs().max() == u[0, 3].abs().max() == 0 < u[0, 0].abs().max()


def unlabelled(**options):
    """Twelve examples; one batch of them is without a single target, and so are two more."""
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)))
    x, y = tensor(12, 8), torch.arange(12) % 3
    y[[1, 2, 3, 5, 11]] = options.get("ignored", -100)
    return net, x, y


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(ignore=7), nn.CrossEntropyLoss(ignore_index=7)])
def test_examples_without_a_target_are_left_out(loss):
    """The losses are those of the others alone, and the forecast is made of finite numbers."""
    ignored = loss.ignore if isinstance(loss, CrossEntropy) else loss.ignore_index
    net, x, y = unlabelled(ignored=ignored)
    task, kept = Task(net, loss, list(zip(x.split(4), y.split(4), strict=True))), y != ignored
    losses = Losses(task)

    torch.testing.assert_close(losses.before, F.cross_entropy(net(x[kept]), y[kept], reduction="none").detach())
    made = loss_rises(task, ["0.weight", "2.weight"], ["unstructured"])
    assert made.examples[1] == int(kept.sum())
    assert all(math.isfinite(probe.rise) for probe in made.probes)
    assert all(map(math.isfinite, itertools.chain(*(by["unstructured"] for by in made.layers.values()))))


def test_losses_that_are_no_numbers_are_refused():
    net, x, y = unlabelled()
    with pytest.raises(ModelError, match="no target of the examples"):
        Losses(Task(net, CrossEntropy(), [(x, torch.full_like(y, -100))]))
    x[4] = math.inf
    with pytest.raises(ModelError, match="1 of 7 examples"):
        Losses(Task(net, CrossEntropy(), [(x, y)]))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 12), (8, 4, 3, 3)])
def test_columns_are_the_pattern_s_own_zeros(pattern, shape):
    weight = tensor(*shape)
    made = zeros(weight, weight.abs(), [pattern], RUNGS)
    columns = made.columns(slice(None))
    for rung in range(made.rungs[str(pattern)]):
        mask = mask_of(weight.abs(), pattern, RUNGS[rung])
        assert torch.equal(columns[:, rung].reshape(shape), torch.where(mask, 0.0, -weight))
        assert torch.equal(made.change(str(pattern), rung), torch.where(mask, 0.0, -weight))
    assert torch.equal(made.columns(slice(2, 5)), columns.reshape(8, -1, made.width)[2:5].reshape(-1, made.width))


@pytest.mark.parametrize("density", [0.001, 0.37, 0.5, 0.99, 1.0])
def test_masks_keep_exactly_what_a_density_means(density):
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)))
    task = Task(net, nn.MSELoss(), [(tensor(4, 8), tensor(4, 8, seed=1))])
    for pattern in PATTERNS:
        mask = masks_for(task, {"0.weight": (str(pattern), density)}, patterns=PATTERNS)["0.weight"]
        units = pattern.units((12, 8))
        kept = units if density == 1 else pattern.fixed((12, 8)) or max(1, round(density * units))
        assert int(mask.sum()) == kept * pattern.unit_size((12, 8))
        if density < 1:
            assert units_kept(pattern, (12, 8), density) == kept


def by_hand(values=(0.01, 0.04, 0.2)):
    layers = {"a": {"unstructured": values}, "b": {"unstructured": values, "2:4": (0.03,) * 3}}
    return Rises(RUNGS, layers, fixed={"2:4": 0.5})


def test_shares_rise_as_the_density_falls_and_pass_through_the_rungs():
    made = by_hand()
    for density, share in zip(RUNGS, (0.01, 0.04, 0.2), strict=True):
        assert made.at("a", "unstructured", density) == pytest.approx(share, rel=1e-12)
    path = [made.at("a", "unstructured", 1 - i / 1000) for i in range(1000)]
    assert path[0] == 0.0 and all(a <= b for a, b in itertools.pairwise(path))
    assert {made.at("b", "2:4", d) for d in (0.9, 0.5, 0.1)} == {0.03}


def test_totals_add_up_before_the_law():
    made = by_hand()
    one, two = {"a": ("unstructured", 0.5)}, {"b": ("2:4", 0.5)}
    assert made.share({**one, **two}) == pytest.approx(made.share(one) + made.share(two))
    told = made.total({**one, **two})
    assert told.low < told.value < told.high
    assert told.value == made.law.at(0.07)[0]
    assert made.total({}).value == made.total({}).high == 0.0
    assert made.limit(told.value) == pytest.approx(0.07, rel=1e-3)


def test_shares_that_begin_at_zero():
    made = by_hand((0.0, 0.0, 0.2))
    path = [made.at("a", "unstructured", 1 - i / 100) for i in range(100)]
    assert path[0] == path[40] == 0.0 < path[70]
    assert all(a <= b for a, b in itertools.pairwise(path))


def test_law_finds_the_numbers_that_made_the_probes():
    probes = [Probe(k, 2.0 * k * (1 + k / 0.1), 1e-6) for k in (0.003, 0.01, 0.03, 0.06, 0.1, 0.15)]
    law = fit(probes)
    assert law.factor == pytest.approx(2.0, rel=0.25) and law.bend == pytest.approx(0.1, rel=0.6)
    for probe in probes:
        value, low, high = law.at(probe.share)
        assert low < probe.rise < high and value == pytest.approx(probe.rise, rel=0.15)
    assert law.n == 6 and law.spread < fit([]).spread


def test_law_rises_and_turns_round():
    law: Law = fit([Probe(0.05, 0.3, 0.05), Probe(0.01, -0.02, 0.03)])
    values = [law.at(10.0**power)[0] for power in range(-9, 4)]
    assert all(0 < a < b for a, b in itertools.pairwise(values))
    for rise in (1e-9, 1e-4, 0.05, 0.7):
        assert law.at(law.inverse(rise))[0] == pytest.approx(rise, rel=0.02)
    assert law.at(0.0) == (0.0, 0.0, 0.0) and law.inverse(0.0) == 0.0


def test_probes_below_their_error_pull_down_without_a_logarithm():
    """A rise that drowns in its error says that it is small, not that it is nothing."""
    seen = [Probe(0.1, 0.01, 0.02), Probe(0.1, -0.03, 0.02), Probe(0.1, 0.0, 0.02)]
    assert 0 < fit(seen).at(0.1)[0] < fit([]).at(0.1)[0]


def test_measured_losses_are_those_of_the_task():
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 4)))
    task = Task(net, CrossEntropy(), [(tensor(n, 8, seed=n), torch.arange(n) % 4) for n in (5, 3)])
    at = {"0.weight": net[0].weight.detach() * 0.5}
    probe = Losses(task).probe(0.1, at)
    assert probe.rise == pytest.approx(task.mean_loss(at) - task.mean_loss())
    ones = [replace(task, data=[(x[i : i + 1], y[i : i + 1])]) for x, y in task.data for i in range(len(x))]
    rises = torch.tensor([one.mean_loss(at) - one.mean_loss() for one in ones], dtype=torch.float64)
    assert probe.stderr == pytest.approx(float(rises.std()) / math.sqrt(8))


def test_frontier_keeps_the_level_and_one_price():
    table = {"a": {"u": (0.01, 0.05, 0.3)}, "b": {"u": (0.001, 0.002, 0.02), "n": (0.0015,)}}
    kept = {"a": {"u": RUNGS}, "b": {"u": RUNGS, "n": (0.5,)}}
    same = {"a": {"u": 1.0}, "b": {"u": 1.0, "n": 1.0}}
    sums = []
    for level in (1e-5, 0.002, 0.03, 0.1, 9.0):
        choice = frontier(table, kept, level, same, {"a": 0.5, "b": 0.5})
        sums.append(sum(table[n][p][i] for n, (p, i) in choice.items()))
        assert sums[-1] <= level
    assert sums[0] == 0.0 and sums == sorted(sums) and sums[-1] == pytest.approx(0.32)


def test_a_solver_s_changes_are_forecast():
    """One output, square loss: the share is the mean squared change of the output, which a solver makes smaller."""
    x = tensor(64, 16) @ tensor(16, 16, seed=3)
    net = nn.Sequential(nn.Linear(16, 1)).double()
    task = Task(net, nn.MSELoss(), [(x, net(x).detach())])
    plain = loss_rises(task, ["0.weight"], ["unstructured"], densities=RUNGS, probes=0)
    better = loss_rises(task, ["0.weight"], ["unstructured"], densities=RUNGS, probes=0, solver=ExactObs())
    for density in RUNGS:
        mask = masks_for(task, {"0.weight": ("unstructured", density)})["0.weight"]
        change = x[:64] @ torch.where(mask, 0.0, -net[0].weight.detach()).T
        assert plain.at("0.weight", "unstructured", density) == pytest.approx(change.square().mean().item())
        assert better.at("0.weight", "unstructured", density) < plain.at("0.weight", "unstructured", density)


@pytest.fixture(scope="module")
def trained():
    """A small network trained on digits, and the examples it was trained on in batches."""
    data = load("digits")
    loader = Loader(data.train, 64, shuffle=True, mean=data.mean, std=data.std)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
        )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for epoch in range(12):
        for x, y in loader.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.zero_grad()
    return Task(net.eval(), CrossEntropy(), loader), Task(
        net, CrossEntropy(), Loader(data.test, 256, mean=data.mean, std=data.std)
    )


def test_forecasts_of_a_trained_network_come_true(trained):
    """Choices drawn by chance: nine of ten rises below 0.5 within a factor 3, on the data and on the test part."""
    task, test = trained
    names = [name for name in task.params() if name.endswith("weight")]
    before = snapshot(task)
    made = loss_rises(task, names, ["unstructured", "2:4"])
    assert not changes(before, snapshot(task))
    assert made.apart and made.probes and made.densities == DENSITIES
    random, hits, inside, count = stream(1, "test"), 0, 0, 0
    for where in (task, test):
        start = where.mean_loss()
        for _ in range(30):
            draw = torch.rand(len(names) + 1, generator=random).tolist()
            chosen = {n: ("unstructured", math.exp(-2.5 * draw[-1] * d)) for n, d in zip(names, draw[:-1], strict=True)}
            model = copy.deepcopy(where.model)
            masks_for(where, chosen).apply_(model)
            rise, told = replace(where, model=model).mean_loss() - start, made.total(chosen)
            if 0.005 < rise < 0.5:
                count, hits = count + 1, hits + (told.value / 3 < rise < told.value * 3)
                inside += told.low < rise < told.high
    assert count >= 20 and hits >= 0.9 * count and inside >= 0.7 * count


def test_more_of_the_same_seed_is_the_same(trained):
    task, _ = trained
    one, two = (loss_rises(task, ["1.weight"], ["4x1"], examples=32, probes=2) for _ in range(2))
    assert one == two and one.to_json() == two.to_json()


def test_tensors_that_cannot_take_a_pattern_have_no_forecast(trained):
    task, _ = trained
    made = loss_rises(task, ["1.weight", "5.weight"], ["4x1"], examples=16, probes=0)
    assert set(made.layers) == {"1.weight"}
    with pytest.raises(UsageError, match=r"no forecast of the loss for `5\.weight`"):
        made.at("5.weight", "4x1", 0.5)
    with pytest.raises(UsageError, match="for the pattern '2:4'"):
        made.at("1.weight", "2:4", 0.5)
    with pytest.raises(UsageError, match="density 0.0"):
        made.at("1.weight", "4x1", 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tensors": []}, "no tensor is named"),
        ({"tensors": ["1.wieght"]}, r"no parameter `1\.wieght`"),
        ({"patterns": ["3:2"]}, "1 <= n < m"),
        ({"patterns": ["fancy"]}, "fancy"),
        ({"densities": [1.0]}, "densities"),
        ({"densities": []}, "densities"),
        ({"examples": 0}, "examples is 0"),
    ],
)
def test_refused(trained, options, match):
    task, _ = trained
    given = {"tensors": ["1.weight"], "patterns": ["unstructured"], **options}
    with pytest.raises(UsageError, match=match):
        loss_rises(task, given.pop("tensors"), given.pop("patterns"), **given)


def test_inputs_changed_in_place_are_told():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.tanh(self.one(x))
            out = self.two(x.detach())
            x.mul_(2)
            return out + self.two(x)

    net = Careless()
    task = Task(net, CrossEntropy(), [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ModelError, match="in place"):
        loss_rises(task, ["two.weight"], ["unstructured"], probes=0)
    assert not isinstance(Masks.dense(net)["two.weight"], nn.Parameter)


def test_sums_stay_on_the_device_of_the_weights():
    """On the meta device there are shapes but no numbers: a copy to the processor within the pass cannot be made."""
    layer = nn.Linear(6, 4, device="meta")
    options = {"weight": zeros(layer.weight.detach(), torch.rand(4, 6, device="meta"), [Unstructured()], RUNGS)}
    heard = _Heard(options, 3, {}, {"weight": layer.weight.detach()})
    heard.along["weight"] = []

    heard.begin()
    heard.add("weight", layer, torch.rand(3, 6, device="meta"), torch.rand(3, 4, device="meta"))

    (total,) = heard.along["weight"]
    assert total.device.type == "meta" and total.shape == (3, len(RUNGS)) and total.dtype == torch.float64
