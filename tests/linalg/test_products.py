"""Curvature products and gradients of single examples, against torch.func.hessian and one backward pass each."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.errors import DataError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.linalg import products
from secateur.linalg.products import Operator, hvp, per_example_gradients
from secateur.testing import CASES
from secateur.testing.cases import recut
from secateur.testing.quadratics import dense

pytestmark = [  # what torch.func.hessian, the reference, says on its way
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def some_kept(task, share=0.3):
    random = torch.Generator().manual_seed(1)
    return Masks({n: torch.rand(p.shape, generator=random) < share for n, p in task.params().items()})


def function_of(task, masks):
    """All examples joined, and the network's output as a function of the kept entries alone."""
    own, kept = dict(task.model.named_parameters()), {n: m for n, m in masks.items()}
    inputs, target = torch.cat([x for x, _ in task.data]), torch.cat([y for _, y in task.data])
    w = torch.cat([own[n].detach()[m] for n, m in kept.items()])

    def output(flat):
        at, start = {}, 0
        for n, m in kept.items():
            count = int(m.sum())
            part, place = flat[start : start + count], m.flatten().nonzero()[:, 0]
            at[n] = own[n].detach().flatten().index_copy(0, place, part).reshape(m.shape)
            start += count
        return functional_call(task.model, at, (inputs,))

    return output, w, target


def true_hessian(task, masks):
    """Forward over reverse, a column at a time: torch.func.hessian, which batches them, is wrong for LayerNorm."""
    output, w, target = function_of(task, masks)
    slope = grad(lambda flat: task.loss(output(flat), target))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([jvp(slope, (w,), (axis,))[1] for axis in torch.eye(len(w), dtype=w.dtype)], 1)


def true_ggn(task, masks):
    output, w, target = function_of(task, masks)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(output)(w)
        outer = hessian(lambda z: task.loss(z, target))(output(w))
    jacobian, k = jacobian.flatten(0, -2), jacobian.shape[:-1].numel()
    return jacobian.T @ outer.reshape(k, k) @ jacobian


def single_gradients(task, masks):
    """One copy of the network, one backward pass for each example."""
    net = copy.deepcopy(task.model).eval()
    rows = []
    for inputs, target in task.data:
        for i in range(len(inputs)):
            net.zero_grad()
            task.loss(net(inputs[i : i + 1]), target[i : i + 1]).backward()
            own = dict(net.named_parameters())
            rows.append(torch.cat([own[n].grad[m] for n, m in masks.items()]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_dense_matrices_are_those_of_torch_func(name):
    """The products with all unit vectors, against jvp, jacrev and single backward passes on all examples."""
    task = CASES[name]()
    masks = some_kept(task, 0.25)
    rows = single_gradients(task, masks)
    torch.testing.assert_close(Operator(task, masks).dense(), true_hessian(task, masks), **TIGHT)
    torch.testing.assert_close(Operator(task, masks, "ggn").dense(), true_ggn(task, masks), **TIGHT)
    torch.testing.assert_close(Operator(task, masks, "fisher").dense(), rows.T @ rows / len(rows), **TIGHT)


@pytest.mark.parametrize("name", ["tanh_mlp", "relu_mlp", "conv_bn", "residual_bn", "depthwise", "lstm"])
def test_the_hessian_is_that_of_torch_func_where_it_can_be_trusted(name):
    task = CASES[name]()
    masks = some_kept(task, 0.25)
    output, w, target = function_of(task, masks)
    expected = hessian(lambda flat: task.loss(output(flat), target))(w)
    torch.testing.assert_close(Operator(task, masks).dense(), expected, **TIGHT)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_gradients_of_single_examples(name):
    task = CASES[name]()
    masks = some_kept(task)
    rows = torch.cat(list(per_example_gradients(task, masks)))
    torch.testing.assert_close(rows, single_gradients(task, masks), **TIGHT)
    slopes, flat = task.gradients(), Operator(task, masks)
    torch.testing.assert_close(rows.mean(0), flat.flatten(slopes), **TIGHT)


@pytest.mark.parametrize("name", ["tanh_mlp", "conv_bn", "tied", "attention"])
def test_examples_one_by_one_give_the_rows_of_all_at_once(name, monkeypatch):
    """Both routes, and a batch cut into pieces of one example."""
    task = CASES[name]()
    masks = some_kept(task)
    together = torch.cat(list(per_example_gradients(task, masks)))
    monkeypatch.setattr(products, "_ROWS", 1)
    pieces = list(per_example_gradients(task, masks))
    monkeypatch.setattr(products, "_together", lambda *_: None)
    assert [len(piece) for piece in pieces] == [1] * 6
    torch.testing.assert_close(torch.cat(pieces), together, **TIGHT)
    torch.testing.assert_close(torch.cat(list(per_example_gradients(task, masks))), together, **TIGHT)


def test_what_vmap_does_not_know_goes_one_by_one():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.seen = nn.Linear(3, 2).double(), []

        def forward(self, x):
            self.seen.append(len(x))
            return self.line(x) * (1.0 if x.sum().item() < 1e9 else 0.0)  # vmap refuses .item()

    task = Task(Counting(), nn.functional.cross_entropy, [(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))])
    masks = Masks.dense(task.model)
    torch.testing.assert_close(next(per_example_gradients(task, masks)), single_gradients(task, masks), **TIGHT)
    assert task.model.seen[-4:] == [1] * 4


def test_whole_tensors_of_an_encoder_layer():
    """torch's own layer takes a fused path in evaluation mode, which must stay off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).double().eval()
    task = Task(layer, lambda o, t: ((o.mean(1) - t) ** 2).mean(), [(torch.randn(3, 5, 4).double(), torch.randn(3, 4))])
    masks = some_kept(task)
    torch.testing.assert_close(torch.cat(list(per_example_gradients(task, masks))), single_gradients(task, masks))
    torch.testing.assert_close(Operator(task, masks).dense(), true_hessian(task, masks), **TIGHT)


def test_hvp_over_whole_tensors_is_a_column_of_the_known_hessian():
    h = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [0.5, 0.0, 1.0]])
    task, v = dense(h, slope=[1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(hvp(task, {"weight": v})["weight"], v @ h.double(), rtol=1e-14, atol=1e-14)


def test_the_second_order_forecast_agrees_with_the_task():
    task = CASES["attention"]()
    direction = {n: torch.randn_like(p) for n, p in task.params().items()}
    curved = hvp(task, direction)
    half = sum((curved[n] * d).sum() for n, d in direction.items()).item() / 2
    assert half == pytest.approx(task.taylor(direction)[1], rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_on_the_way_to_a_product_is_that_of_the_task(name):
    task = CASES[name]()
    op = Operator(task, some_kept(task))
    v = torch.randn(op.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope, product = op.with_gradient(v)
    torch.testing.assert_close(slope, op.flatten(task.gradients()), **TIGHT)
    torch.testing.assert_close(product, op @ v, **TIGHT)
    with pytest.raises(UsageError, match="comes with the 'hessian' times"):
        Operator(task, op.masks, "ggn").with_gradient(v)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_any_cut_into_batches_gives_the_same(kind):
    task = CASES["conv_bn"]()
    masks = some_kept(task)
    v = torch.randn(masks.kept, 2, dtype=torch.float64)
    one, other = Operator(task, masks, kind), Operator(recut(task, (1, 2, 3)), masks, kind)
    torch.testing.assert_close(one @ v, other @ v, **TIGHT)
    torch.testing.assert_close((one @ v)[:, 1], one @ v[:, 1], **TIGHT)


def test_flatten_and_unflatten_are_inverse_at_the_kept_entries():
    task = CASES["tied"]()
    masks = some_kept(task)
    op = Operator(task, masks)
    weights = {n: p.detach() for n, p in task.params().items()}
    flat = op.flatten(weights)
    assert flat.shape == (op.size,) and op.size == masks.kept
    back = op.unflatten(flat)
    assert all(torch.equal(back[n], weights[n] * masks[n]) for n in masks)
    assert torch.equal(op.flatten(back), flat)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_half_precision_weights_have_float32_products(kind):
    half, full = CASES["tanh_mlp"](torch.bfloat16), CASES["tanh_mlp"]()
    masks = Masks.dense(full.model)
    v = torch.randn(masks.kept, generator=torch.Generator().manual_seed(0))
    rough, exact = Operator(half, masks, kind) @ v, Operator(full, masks, kind) @ v
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_the_network_is_left_as_it_was():
    task = CASES["conv_bn"]()
    task.model.train()
    before = copy.deepcopy(task.model.state_dict())
    masks = Masks.dense(task.model)
    with torch.no_grad():
        for kind in ("hessian", "ggn", "fisher"):
            assert not (Operator(task, masks, kind) @ torch.ones(masks.kept)).requires_grad
    assert all(m.training for m in task.model.modules())
    assert all(p.grad is None for p in task.model.parameters())
    assert all(torch.equal(before[n], t) for n, t in task.model.state_dict().items())


def test_a_loss_linear_in_the_weights_has_no_curvature():
    task = dense(torch.zeros(3, 3), slope=[1.0, 2.0, 3.0])
    masks = Masks.dense(task.model)
    for kind in ("hessian", "ggn"):
        assert not (Operator(task, masks, kind) @ torch.ones(3)).any()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * 3 * ctx.saved_tensors[0] ** 2


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, x):
        return Once.apply(self.line(x))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_what_cannot_be_differentiated_twice_is_refused(kind):
    task = Task(Cubed(), nn.functional.cross_entropy, [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))])
    masks = Masks.dense(task.model)
    with pytest.raises(ModelError, match="differentiated twice"):
        Operator(task, masks, kind) @ torch.ones(6)
    torch.testing.assert_close(next(per_example_gradients(task, masks)), single_gradients(task, masks))


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    op = Operator(task, masks)
    with pytest.raises(UsageError, match=r"shape \(95,\) or \(95, k\) is needed here, not \(3,\)"):
        op @ torch.ones(3)
    with pytest.raises(UsageError, match="`4.weight`"):
        op.flatten({n: p for n, p in task.params().items() if n != "4.weight"})
    with pytest.raises(MaskError, match="nowhere"):
        hvp(task, {"nowhere": torch.ones(2)})
    with pytest.raises(UsageError, match="keep no weight"):
        Operator(task, masks - masks)
    with pytest.raises(DataError, match="no example"):
        Operator(Task(task.model, task.loss, []), masks) @ torch.ones(op.size)
    with pytest.raises(ModelError, match=r"the loss has shape \(1,\)"):
        next(per_example_gradients(Task(task.model, lambda o, t: o.sum(1), task.data), masks))
    x, y = task.data[0]
    bad = torch.where(torch.arange(4)[:, None] == 2, float("inf"), x)
    with pytest.raises(DataError, match="gradient of example 2 is not finite"):
        next(per_example_gradients(Task(task.model, task.loss, [(bad, y)]), masks))
    with pytest.raises(ModelError, match="not finite"):
        op @ torch.full((op.size,), float("nan"))


def test_rows_hold_no_graph():
    """Also where parameters outside the masks ask for gradients."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    data = [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))]
    masks = Masks({"0.weight": torch.ones(4, 3, dtype=torch.bool)})
    for rows in per_example_gradients(Task(net, torch.nn.functional.cross_entropy, data), masks):
        assert not rows.requires_grad and rows.shape == (5, 12)
