"""What a user is told: noise, a sum for a mean, too few examples, no minimum; weights that no module call reaches."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur
from secateur.core.allocations import Uniform
from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.sockets import find
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.obd import Obd
from secateur.criteria.random import Random
from secateur.criteria.snip import Snip
from secateur.criteria.taylor import Taylor
from secateur.criteria.woodfisher import WoodFisher
from secateur.engine.cautions import Caution, caution, check_passes, check_slope, heard
from secateur.engine.compensating import NOT_CALLED, compensate, plan_layers
from secateur.solvers.exact_obs import ExactObs

CE = functional.cross_entropy


def told(work, *args, **options):
    """The cautions of a call."""
    with heard() as texts:
        work(*args, **options)
    return texts


def task_of(net, count=24, loss=CE, batch=None, width=6):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=random, dtype=torch.float64)
    y = torch.randint(0, 3, (count,), generator=random)
    batch = batch or count
    return Task(net.double(), loss, list(zip(x.split(batch), y.split(batch), strict=True)))


def chain(*widths):
    torch.manual_seed(0)
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# How cautions are heard


def test_texts_are_heard_once_and_other_warnings_go_on():
    with pytest.warns(DeprecationWarning, match="old"), heard() as texts:
        warnings.simplefilter("always")
        caution("first")
        caution("first")
        warnings.warn("second", UserWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert texts == ["first", "second"]


def test_an_error_says_it_all():
    ears = heard()
    texts = ears.__enter__()
    caution("first")
    assert not ears.__exit__(ModelError, ModelError("refused"), None)
    assert texts == []


# Random in evaluation mode


class Noisy(nn.Module):
    def __init__(self, obeys):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.obeys = nn.Linear(6, 5), nn.Linear(5, 3), obeys

    def forward(self, x):
        return self.two(functional.dropout(self.one(x), 0.5, self.training if self.obeys else True))


@pytest.mark.parametrize("method", ["obd", "woodfisher", "fisher_diagonal", "grasp", "sosp_h"])
def test_curvatures_of_noise_are_refused(method):
    task = task_of(Noisy(obeys=False))
    with pytest.raises(ModelError, match=rf"24 examples in evaluation mode .* {method} needs a curvature"):
        secateur.plan(task, "sparsity 0.5", find("criteria", method)())


def test_solvers_refuse_noise_and_leave_the_network_alone():
    task = task_of(Noisy(obeys=False))
    before = {name: p.clone() for name, p in task.params().items()}
    with pytest.raises(ModelError, match=r"exact_obs needs a curvature.*self\.training"):
        secateur.prune(task, "sparsity 0.5", solver=ExactObs())
    assert all(torch.equal(p, before[name]) for name, p in task.params().items())


@pytest.mark.parametrize("criterion", [Magnitude(), Snip()])
def test_other_scores_of_noise_are_told(criterion):
    task = task_of(Noisy(obeys=False))
    with pytest.warns(Caution, match="draws random numbers even when it does not train"):
        assert secateur.plan(task, "keep 20", criterion).masks.kept == 20


def test_where_no_data_is_looked_at_nothing_is_told():
    assert told(secateur.plan, task_of(Noisy(obeys=False)), "sparsity 0.5", forecast=False) == []


def test_dropout_that_obeys_the_mode_is_no_noise_and_nothing_is_left_behind():
    for obeys in (True, False):
        net = Noisy(obeys).train()
        task, state = task_of(net), torch.get_rng_state()
        texts = told(check_passes, task, Magnitude())
        assert bool(texts) != obeys
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in net.modules())


# A sum for a mean


def padded(output, target):
    return CE(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def over(number):
    return lambda output, target: CE(output, target, reduction="sum") / number


def penalised(output, target):
    return CE(output, target) + output.square().mean()


def squares(output, target):
    return functional.mse_loss(output, functional.one_hot(target, 3).to(output), reduction="sum")


@pytest.mark.parametrize("loss", [over(1), over(1000.0), squares])
@pytest.mark.parametrize("count", [2, 7, 24])
def test_a_sum_is_told_with_its_figures(loss, count):
    task = task_of(chain(6, 5, 3), count, loss)
    with pytest.warns(Caution, match="looks like a sum") as found:
        secateur.plan(task, "sparsity 0.5")
    even = count // 2 * 2
    x, y = task.data[0]
    with torch.no_grad():
        whole = float(loss(task.model(x[:even]), y[:even]))
    assert f"it is {whole:.4g} for a batch and {whole / 2:.4g} on average" in str(found[0].message)


@pytest.mark.parametrize("loss", [CE, penalised])
@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_a_mean_is_not(loss, count):
    assert told(check_passes, task_of(chain(6, 5, 3), count, loss), Magnitude()) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_mean_over_tokens_is_none_however_they_are_padded(seed):
    """Halves of one token and of many: the mean weighs them unlike, and may come close to one of them."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (8,), generator=random)
    x = torch.randn(8, 40, 6, generator=random, dtype=torch.float64)
    y = torch.randint(0, 3, (8, 40), generator=random)
    y[torch.arange(40) >= lengths[:, None]] = -100
    net = chain(6, 5, 3).double()
    assert told(check_passes, Task(net, padded, [(x, y)]), Magnitude()) == []
    sums = lambda o, t: CE(o.flatten(0, 1), t.flatten(), ignore_index=-100, reduction="sum")  # noqa: E731
    assert len(told(check_passes, Task(net, sums, [(x, y)]), Magnitude())) == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: o.sum() * 0.0,
        lambda o, t: CE(o, t) * torch.tensor(1e-300, dtype=torch.float64),
        lambda o, t: CE(1e6 * functional.one_hot(t, 3).double() + 0 * o, t),
        lambda o, t: torch.log(torch.tensor(float(len(o)))) + 0 * o.sum(),
    ],
    ids=["zero", "tiny", "fitted", "grows by the logarithm"],
)
def test_losses_near_zero_and_of_other_growth_are_no_sums(loss):
    assert told(check_passes, task_of(chain(6, 5, 3), 24, loss), Magnitude()) == []


def test_a_loss_for_one_size_of_batch_says_nothing():
    fixed = CE(torch.zeros(24, 3), torch.zeros(24, dtype=torch.long), reduction="none").double()
    assert told(check_passes, task_of(chain(6, 5, 3), 24, lambda o, t: (fixed * o.sum(1)).sum()), Magnitude()) == []


# Too few examples


def carried_out(task, solver=None, **options):
    solver = solver or ExactObs()
    made = plan_layers(task, solver, "sparsity 0.5", None, Uniform(), Unstructured())
    return compensate(task, made, solver, Unstructured(), forecast=False, **options)


@pytest.mark.parametrize("inputs", ["sequential", "dense"])
def test_too_few_examples_are_told_in_one_line_and_the_advice_is_enough(inputs):
    task = task_of(chain(12, 9, 4, 3), 7, width=12)
    x = task.data[0][0]
    ranks = [int(torch.linalg.matrix_rank(x)), int(torch.linalg.matrix_rank(torch.tanh(task.model[0](x))))]
    assert ranks == [7, 7]
    with pytest.warns(Caution) as found:
        carried_out(task, inputs=inputs)
    (text,) = [str(warning.message) for warning in found]
    assert "`0.weight` has 12 inputs and a Gram matrix of rank 7 at most" in text
    assert "`2.weight` has 9 inputs and a Gram matrix of rank 7 at most" in text
    assert "4.weight" not in text and "-s examples=12" in text
    assert told(carried_out, task_of(chain(12, 9, 4, 3), 12, width=12), inputs=inputs) == []
    assert len(told(carried_out, task_of(chain(12, 9, 4, 3), 11, width=12), inputs=inputs)) == 1


def test_the_places_of_a_convolution_and_of_tied_layers_count():
    """Three examples with four places each are rank 12 of 18 inputs; five examples are rank 20."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))

    def images(count):
        return [(torch.randn(count, 2, 4, 4, dtype=torch.float64), torch.arange(count) % 3)]

    (text,) = told(carried_out, Task(net.double(), CE, images(3)))
    assert "`0.weight` has 18 inputs and a Gram matrix of rank 12 at most" in text and "examples=12`" in text
    (text,) = told(carried_out, Task(net.double(), CE, images(5)))
    assert "0.weight" not in text and "`3.weight` has 12 inputs and a Gram matrix of rank 5 at most" in text

    twins = chain(6, 6, 6, 3)
    twins[2].weight = twins[0].weight
    texts = told(carried_out, task_of(twins, 5))
    assert len(texts) == 1 and "`0.weight`" not in texts[0] and "`4.weight` has 6 inputs" in texts[0]


# No minimum


class Bowl(nn.Module):
    """``w`` itself, for an input of ones: with the loss below, a quadratic in the weight alone."""

    def __init__(self, at):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([at], dtype=torch.float64))

    def forward(self, x):
        return self.weight * x


def bowl(at, centre, bends):
    """``mean of sum h (w - c)² / 2``: slope ``h (w - c)`` and curvature ``h``."""
    h, c = torch.tensor(bends, dtype=torch.float64), torch.tensor(centre, dtype=torch.float64)
    ones = torch.ones(4, 1, dtype=torch.float64)
    return Task(Bowl(at), lambda o, t: (h * (o - c).square()).sum(1).mean() / 2, [(ones, ones)])


@pytest.mark.parametrize(("centre", "flagged"), [(1.0, False), (1.4, False), (1.6, True), (0.6, False), (0.4, True)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_slope_that_outweighs_the_curvature_is_told(centre, flagged, scale):
    """The smaller weight 1 goes: the slope is ``h (c - 1)``, the curvature ``h / 2``, whatever the scale of h."""
    task = bowl([1.0, 5.0], [centre, 5.0], [scale, scale])
    texts = told(secateur.plan, task, "keep 1", Obd("exact"))
    assert bool(texts) == flagged
    if flagged:
        assert f"({scale * (centre - 1):.3g}) is larger than the second-order one ({scale / 2:.3g})" in texts[0]
        assert "obd" in texts[0]
    assert told(secateur.plan, task, "keep 1") == []  # magnitude promises nothing about the loss


def test_where_the_curvature_is_unknown_or_not_a_number_nothing_is_told():
    for slope, curvature in ((1.0, None), (1.0, math.nan), (math.nan, 1.0), (0.0, 0.0), (1.0, 1.0)):
        check_slope(Obd(), slope, curvature)
    with pytest.warns(Caution, match=r"\(1\) .* \(-2\)"):
        check_slope(Obd(), 1.0, -2.0)
    check_slope(Random(0), 1.0, 0.0)


@pytest.mark.parametrize("curvature", ["layers", "ggn"])
def test_solvers_tell_it_of_the_network_as_it_was(curvature):
    """A linear layer fitted by least squares is at its minimum; moved away from it by five times itself, it is not."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=random, dtype=torch.float64)
    y = torch.randn(40, 3, generator=random, dtype=torch.float64)

    def fitted(factor):
        net = nn.Linear(5, 3, bias=False).double()
        net.weight.data = factor * torch.linalg.lstsq(x, y).solution.T
        return Task(net, lambda o, t: (o - t).square().sum(1).mean() / 2, [(x, y)])

    options = {"solver": ExactObs(), "curvature": curvature}
    assert told(secateur.prune, fitted(1.0), "sparsity 0.5", **options) == []
    with pytest.warns(Caution, match="not at a minimum.*exact_obs looks at the second order alone"):
        secateur.prune(fitted(5.0), "sparsity 0.5", **options)


# Weights that no call of a module reaches


class Functional(nn.Module):
    """The layers of :func:`chain`, their weights used with einsum, with a function, and by a module."""

    def __init__(self, plain):
        super().__init__()
        self.weight = nn.Parameter(plain[0].weight.detach().clone())
        self.shift = nn.Parameter(plain[0].bias.detach().clone())
        self.middle, self.last = plain[2], plain[4]

    def forward(self, x):
        x = torch.tanh(torch.einsum("oi,ni->no", self.weight, x) + self.shift)
        return self.last(torch.tanh(functional.linear(x, self.middle.weight, self.middle.bias)))


NAMES = {"0.weight": "weight", "2.weight": "middle.weight", "4.weight": "last.weight"}


@pytest.mark.parametrize(
    "criterion",
    [Taylor(), Snip(), WoodFisher(), Obd("hutchinson", samples=8), Obd("exact"), find("criteria", "fisher_diagonal")(),
     find("criteria", "sosp_h")(), find("criteria", "wanda")()],
)  # fmt: skip
def test_weights_used_by_functions_score_as_those_of_modules(criterion):
    plain = task_of(chain(6, 5, 4, 3))
    other = task_of(Functional(plain.model))
    one = criterion(plain, Masks.dense(plain.model, only=list(NAMES)))
    two = criterion(other, Masks.dense(other.model, only=list(NAMES.values())))
    for name, twin in NAMES.items():
        assert one[name].any()
        torch.testing.assert_close(two[twin], one[name], rtol=1e-9, atol=1e-14)


def test_solvers_leave_alone_what_no_module_call_reaches():
    task = task_of(Functional(chain(6, 5, 4, 3)))
    before = {name: p.clone() for name, p in task.params().items()}
    with heard():
        cut = secateur.prune(task, "sparsity 0.5", solver=ExactObs())
    assert cut.plan.counts == {"last.weight": (6, 12)}
    assert cut.plan.left_alone["middle.weight"] == NOT_CALLED
    assert "linear and convolution layers" in cut.plan.left_alone["weight"]
    assert "left alone: middle.weight (its layer is never called as a module" in str(cut.plan)
    for name, p in task.params().items():
        assert torch.equal(p, before[name]) == (name != "last.weight")


def test_when_no_layer_is_called_both_reasons_are_told():
    task = task_of(Functional(chain(6, 5, 4, 3)))
    with pytest.raises(ModelError, match="none of weight, middle.weight .*linear and convolution.*never called"):
        plan_layers(task, ExactObs(), "sparsity 0.5", skip=["last.weight"])


def test_a_tied_weight_must_be_called_at_every_place():
    net = Functional(chain(6, 4, 4, 3))
    net.also = nn.Linear(4, 4)
    net.also.weight = net.middle.weight
    net.middle, net.also = net.also, net.middle
    task = task_of(nn.Sequential(net))
    assert plan_layers(task, ExactObs(), "sparsity 0.5").left_alone["0.middle.weight"] == NOT_CALLED


# Not finite


def test_inputs_that_overflow_are_refused_with_the_name_of_the_layer():
    class Bursts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.two(1e200 * self.one(x))

    torch.manual_seed(0)
    task = task_of(Bursts())
    before = {name: p.clone() for name, p in task.params().items()}
    with pytest.raises(DataError, match=r"inputs of layer `two\.weight` are not finite, or their squares overflow"):
        carried_out(task)
    assert all(torch.equal(p, before[name]) for name, p in task.params().items())
