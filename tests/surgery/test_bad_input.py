"""What cannot be done is refused by name, and nothing has changed; what is unusual is worked on or left alone."""

# Modules have their parts by attribute and number, which pyright takes for tensors.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.proofs import apart, outputs, snapshot, unchanged
from torch import nn

from secateur.core.errors import ModelError, SecateurError, UsageError
from secateur.surgery import analyse, shrink


def network(**more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12, **more), nn.ReLU(), nn.Linear(12, 8, **more), nn.ReLU(), nn.Linear(8, 3))


def example(batch=4):
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch))


REMOVE = {"0.weight": [0, 5, 11], "2.weight": [3]}


def columns_zeroed(model):
    """The dense network without what REMOVE takes, by hand."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[2].weight[:, [0, 5, 11]] = 0
        dense[4].weight[:, 3] = 0
    return dense


@pytest.mark.parametrize("remove, words", [
    ({"nowhere.weight": [0]}, r"no group 'nowhere.weight'.*0\.weight"),
    ({"0.weight": [12]}, "units 0 to 11, not 12"),
    ({"0.weight": [-1]}, "units 0 to 11, not -1"),
    ({"0.weight": range(12)}, "nothing would be left of dimension 0 of `0.weight`"),
    ({"0.weight": [0], "2.weight": list(range(8))}, "nothing would be left of dimension 0 of `2.weight`"),
    ({}, "nothing is to be removed"),
])  # fmt: skip
def test_removals_that_make_no_sense_are_refused_by_name(remove, words):
    model = network()
    before = snapshot(model)

    with pytest.raises(UsageError, match=words):
        shrink(model, example(), remove)

    assert unchanged(before, model)


def test_a_unit_named_twice_goes_once():
    model = network()

    shrink(model, example(), {"0.weight": [3, 3]})

    assert model[0].weight.shape == (11, 6)


def test_an_unknown_granularity_is_refused():
    unchecked = inspect.unwrap(analyse)  # annotations are checked in tests alone
    with pytest.raises(UsageError, match="'heads' or 'dims', not 'rows'"):
        unchecked(network(), example(), "rows")


@pytest.mark.parametrize("wrong", [torch.zeros(4, 7), torch.zeros(4, 6, dtype=torch.int64), (), (example(), example()),
                                   {"nothing": example()}, "text"])  # fmt: skip
def test_an_example_that_does_not_fit_is_refused(wrong):
    model = network()
    before = snapshot(model)

    with pytest.raises(SecateurError):
        shrink(model, wrong, REMOVE)

    assert unchanged(before, model)


def test_an_example_that_does_not_fit_a_known_analysis_is_refused():
    model = network()
    found, before = analyse(model, example()), snapshot(model)

    with pytest.raises(SecateurError):
        shrink(model, torch.zeros(4, 7), REMOVE, analysis=found)

    assert unchanged(before, model)


def test_the_analysis_of_another_network_is_refused():
    model, other = network(), nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    found, before = analyse(other, example()), snapshot(model)

    with pytest.raises(SecateurError):
        shrink(model, example(), {"0.weight": [0]}, analysis=found)

    assert unchanged(before, model)


def test_an_analysis_is_spent_once_the_network_has_shrunk():
    model = network()
    found = analyse(model, example())
    shrink(model, example(), {"0.weight": [0]}, analysis=found)
    before = snapshot(model)

    with pytest.raises(SecateurError):
        shrink(model, example(), {"2.weight": [0]}, analysis=found)

    assert unchanged(before, model)


def test_weights_trained_since_the_analysis_are_the_ones_that_count():
    model = network()
    found = analyse(model, example())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    dense = columns_zeroed(model)

    shrink(model, example(), REMOVE, analysis=found)

    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


def test_weights_replaced_since_the_analysis_are_the_ones_that_count():
    model = network()
    found = analyse(model, example())
    model.load_state_dict({k: v + 0.25 for k, v in model.state_dict().items()}, assign=True)
    dense = columns_zeroed(model)

    try:
        shrink(model, example(), REMOVE, analysis=found)
    except SecateurError:
        return

    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) if h.sum() > 0 else self.b(-h)


def test_control_flow_that_depends_on_data_is_refused_with_the_cure():
    model = Branching()
    before = snapshot(model)

    with pytest.raises(ModelError, match="control flow depends on the values"):
        shrink(model, example(), {"a.weight": [0]})

    assert unchanged(before, model)


@pytest.mark.parametrize("place", [0, 2])
def test_weights_that_make_every_output_nan_are_refused(place):
    """There is nothing left to compare, so nothing would be proved."""
    model = network()
    with torch.no_grad():
        model[place].weight[1, 2] = float("nan")
    before = snapshot(model)

    with pytest.raises(ModelError):
        shrink(model, example(), {"0.weight": [0]})

    assert unchanged(before, model)


def test_units_that_are_not_finite_can_go():
    model = network()
    with torch.no_grad():
        model[0].weight[5] = float("nan")
        model[0].bias[5] = float("inf")
    dense = columns_zeroed(model)
    with torch.no_grad():
        dense[0].weight[5], dense[0].bias[5] = 0.0, 0.0  # zero times infinity is not zero

    shrink(model, example(), REMOVE)

    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules_are_refused_or_met_by_the_example():
    model = nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3))

    with pytest.raises(ModelError, match="[Ll]azy|initiali"):
        analyse(model, example())
    assert isinstance(model[0], nn.LazyLinear)

    model(example())
    shrink(model, example(), {"0.weight": [0]})
    assert model(example()).shape == (4, 3)


def test_a_network_that_cannot_be_copied_is_refused():
    model = network()
    model[2].lock = threading.Lock()
    before = snapshot(model)

    with pytest.raises(ModelError, match="cannot be copied"):
        shrink(model, example(), REMOVE)

    assert unchanged(before, model)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(training):
    model = nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(training)
    model[0][1].eval()
    before = [m.training for m in model.modules()]
    means = model[1].running_mean.clone()

    done = shrink(model, example(), {"0.0.weight": [0, 1]})

    assert done.model is model and [m.training for m in model.modules()] == before
    assert torch.equal(model[1].running_mean, means) and model[1].num_batches_tracked == 0


def test_the_global_generator_is_left_alone():
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    shrink(model, example(), {"0.0.weight": [0]})

    assert torch.equal(torch.rand(1), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrappers_are_looked_through(wrap):
    model = network()
    dense = columns_zeroed(model)

    shrink(wrap(model), example(), REMOVE)

    assert model[0].weight.shape == (9, 6) and model[2].weight.shape == (7, 9)
    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_kept(dtype):
    model, x = network().to(dtype), example().to(dtype)
    dense = columns_zeroed(model)

    shrink(model, x, REMOVE)

    assert {p.dtype for p in model.parameters()} == {dtype}
    wide = [outputs(m, (example(7),), torch.float64) for m in (model, dense)]
    assert apart(*wide) < 1e-12


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@torch.library.custom_op("secateur_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class Special(nn.Module):
    """One layer goes through an operator that nobody knows, the other does not."""

    def __init__(self, special):
        super().__init__()
        self.a, self.b, self.c, self.special = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3), special

    def forward(self, x):
        return self.c(F.relu(self.b(self.special(F.relu(self.a(x))))))


def test_an_unknown_operator_holds_its_units_and_is_listed():
    model = Special(lambda x: torch.ops.secateur_tests.doubled(x))
    analysis = analyse(model, example())

    assert [g.name for g in analysis.groups] == ["b.weight"] and analysis.operators == {"doubled": 1}
    why = {(row.tensor, row.dim): row.why for row in analysis.rows}
    assert why["a.weight", 0] == "no rule for doubled" and "fixed size" in why["b.weight", 1]
    assert all(row.units == 0 for row in analysis.rows if row.tensor == "a.weight")
    assert "not known: doubled (1 times)" in str(analysis)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.c.weight[:, 2] = 0
    shrink(model, example(), {"b.weight": [2]}, analysis=analysis)
    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


def test_an_autograd_function_is_looked_into_or_held():
    model = Special(Double.apply)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.b.weight[:, 4] = 0
        dense.c.weight[:, 2] = 0
    analysis = analyse(model, example())
    chosen = {"a.weight": [4], "b.weight": [2]}
    if "a.weight" not in {g.name for g in analysis.groups}:
        assert analysis.operators
        pytest.skip("this torch hands an autograd.Function on as an operator")

    shrink(model, example(), chosen, analysis=analysis)

    assert apart(outputs(model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


class Width(nn.Module):
    """Divides by the root of the width that it sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h / h.shape[-1] ** 0.5)


@pytest.mark.parametrize("dead", [False, True])
def test_an_example_on_which_nothing_happens_does_not_hide_a_difference(dead):
    torch.manual_seed(0)
    model, x, y = Width(), torch.zeros(2, 6), 100 * example(5)
    with torch.no_grad():
        model.a.bias.copy_(torch.full((12,), -50.0 if dead else 0.0))
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.b.weight[:, 3] = 0

    done = shrink(model, x, {"a.weight": [3]})

    assert apart(outputs(done.model, (y,)), outputs(dense, (y,))) < 1e-5


class Auxiliary(nn.Module):
    """A second head that only training reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return (self.b(h), self.aux(h)) if self.training else self.b(h)


def test_training_code_goes_on_or_the_removal_is_refused():
    torch.manual_seed(0)
    model = Auxiliary().train()
    before = snapshot(model)

    try:
        done = shrink(model, example(), {"a.weight": [3]}, rewriting=False)
    except SecateurError:
        assert unchanged(before, model)
        return

    assert [y.shape for y in done.model(example())] == [(4, 3), (4, 3)]


def test_what_the_graph_never_reads_is_not_offered():
    model = network()
    model.spare = nn.Parameter(torch.randn(5, 7))
    model.register_buffer("table", torch.randn(9))

    analysis = analyse(model, example())

    assert {g.name for g in analysis.groups} == {"0.weight", "2.weight"}


def test_refused_without_rewriting():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(torch.cat(torch.split(F.relu(self.a(x)), [5, 7], 1), 1))

    model = Fixed()
    before, dense = snapshot(model), copy.deepcopy(model)
    with torch.no_grad():
        dense.b.weight[:, 2] = 0

    with pytest.raises(ModelError, match="rewriting"):
        shrink(model, example(), {"a.weight": [2]}, rewriting=False)
    assert unchanged(before, model)

    done = shrink(model, example(), {"a.weight": [2]})
    assert "split" in done.rewritten and unchanged(before, model)
    assert apart(outputs(done.model, (example(7),)), outputs(dense, (example(7),))) < 1e-6


def test_a_frozen_batch_is_said():
    class Square(nn.Module):
        def forward(self, x):
            return x.reshape(4, 6) @ torch.ones(6, 6)

    analysis = analyse(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), Square()), example())

    assert analysis.note and "0.weight" in {g.name for g in analysis.groups}
