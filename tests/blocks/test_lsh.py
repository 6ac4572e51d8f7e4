# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOperatorIssue=false
"""The hash-routed layer: buckets by definition, closed-form experts, what is not selected stands still."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.blocks.hashes import Hashes, euclidean, grid, hyperplanes
from secateur.blocks.lsh import LshLayer, Occupancy, hold_unselected
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.streams import stream


def points(count, inputs, name="x", seed=0):
    return 2 * torch.rand(count, inputs, generator=stream(seed, name), dtype=torch.float64) - 1


def made(expert="constant", outputs=2, width=0.6, count=3, x=None, y=None, **options):
    """A layer in float64 on 200 points of the square, fitted to random targets or to the given ones."""
    x = points(200, 2) if x is None else x
    layer = LshLayer(euclidean(x.shape[1], count, width, 0), outputs, expert, **options).double()
    layer.fit_(x, points(len(x), outputs, "y") if y is None else y)
    return layer, x


def named(hashes, x):
    """Buckets by the definition, one number at a time."""
    a, b = hashes.directions.tolist(), hashes.offsets.tolist()
    w = None if hashes.width is None else float(hashes.width)
    found = []
    for row in x.tolist():
        z = [
            math.fsum(p * q for p, q in zip(direction, row, strict=True)) + c for direction, c in zip(a, b, strict=True)
        ]
        found.append(tuple(int(v >= 0) if w is None else math.floor(v / w) for v in z))
    return found


@pytest.mark.parametrize("keys", ["packed", "tuple"])
@pytest.mark.parametrize(
    "hashes", [hyperplanes(3, 5, 0, 1.0), euclidean(3, 4, 0.7, 1), grid(3, 0.5)], ids=["planes", "strips", "grid"]
)
def test_every_example_is_answered_by_the_mean_of_its_bucket(hashes, keys):
    x, y = points(300, 3), points(300, 2, "y")
    layer = LshLayer(hashes, 2, keys=keys).double()
    found = layer.fit_(x, y)
    names = named(hashes, x)
    members = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    wanted = torch.stack([torch.stack([y[i] for i in members[name]]).mean(0) for name in names])
    assert torch.allclose(layer(x), wanted, rtol=0, atol=1e-14)
    sizes = [len(m) for m in members.values()]
    assert found == layer.occupancy() == Occupancy(len(sizes), sizes.count(1), max(sizes), 300)
    assert layer.buckets == len(members) > 4


def test_one_bucket_for_all_is_the_dense_expert():
    x, y = points(60, 4), points(60, 3, "y")
    layer = LshLayer(euclidean(4, 3, 1e6, 2), 3, "linear").double()
    assert layer.fit_(x, y).buckets == 1
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1).double()], 1), y).solution
    assert torch.allclose(layer(x), x @ solved[:4] + solved[4], rtol=0, atol=1e-12)
    dense = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.linear.copy_(dense.weight[None])
        layer.constant.copy_(dense.bias[None])
    assert torch.allclose(layer(x), dense(x), rtol=0, atol=1e-15)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert torch.allclose(layer.linear.grad[0], dense.weight.grad, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.constant.grad[0], dense.bias.grad, rtol=1e-12, atol=1e-12)


def test_linear_experts_are_the_least_squares_of_their_bucket_and_flat_where_its_examples_do_not_differ():
    x, y = points(120, 2), points(120, 2, "y")
    layer = LshLayer(euclidean(2, 2, 0.9, 3), 2, "linear").double()
    layer.fit_(x, y)
    where, thin = layer.route(x), 0
    for bucket in range(layer.buckets):
        mine = where == bucket
        a, b = x[mine] - x[mine].mean(0), y[mine] - y[mine].mean(0)
        slope = torch.linalg.pinv(a) @ b  # of the least norm
        assert torch.allclose(layer.linear[bucket], slope.T, rtol=0, atol=1e-7 * (1 + float(slope.abs().max())))
        thin += int(mine.sum()) == 1
        if int(mine.sum()) == 1:
            assert torch.equal(layer.linear[bucket], torch.zeros(2, 2).double())
    assert thin and layer.buckets > thin


@pytest.mark.parametrize(("by", "share"), [("mean", 1.0), ("middle", 0.5)])
def test_the_error_is_at_most_the_constant_of_lipschitz_times_the_diameter(by, share):
    slope = torch.tensor([3.0, -4.0]).double()  # of length 5, so |f(x) - f(y)| <= 5 |x - y|

    def target(x):
        return (x @ slope).sin()[:, None]

    side = torch.linspace(-1, 1, 81, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    for hashes in (grid(2, 0.25), euclidean(2, 4, 0.3, 0, unit=True)):
        layer = LshLayer(hashes, 1).double()
        layer.fit_(x, target(x), by)
        where = layer.route(x)
        wide = max(float(torch.cdist(x[where == i], x[where == i]).max()) for i in range(layer.buckets))
        worst = float((layer(x) - target(x)).abs().max().detach())
        assert 0 < worst <= share * 5 * wide + 1e-12
        assert wide < 1


def test_hyperplanes_collide_by_the_angle_alone_when_they_go_through_the_origin():
    trials = 20_000
    pairs = [points(2, 6, "pair", seed) * (1 + 4 * seed) for seed in range(4)]
    for x in pairs:
        angle = math.acos(float(functional.cosine_similarity(x[0], x[1], 0)))
        wanted = 1 - angle / math.pi
        codes = hyperplanes(6, trials, 5)(x)
        share = float((codes[0] == codes[1]).double().mean())
        assert abs(share - wanted) <= 3 * math.sqrt(wanted * (1 - wanted) / trials)
    x = torch.tensor([[1.0, 0.0], [-0.09, 0.9959]]).double()
    angle = math.acos(float(functional.cosine_similarity(x[0], x[1], 0)))
    codes = hyperplanes(2, trials, 5, spread=2.0)(x)
    wanted, share = 1 - angle / math.pi, float((codes[0] == codes[1]).double().mean())
    assert abs(wanted - 0.47) < 0.005 and abs(share - wanted) > 30 * math.sqrt(0.25 / trials)


def test_strips_collide_as_the_triangle_kernel_says():
    """P(same strip | a) = max(0, 1 - |a·(x - y)| / w) for b ~ U[0, w)."""
    x, trials, width = points(2, 3), 20_000, 1.5
    hashes = euclidean(3, trials, width, 7)
    gap = (hashes.directions @ (x[0] - x[1])).abs() / width
    wanted = float((1 - gap).clamp(min=0).mean())
    codes = hashes(x)
    share = float((codes[0] == codes[1]).double().mean())
    assert abs(share - wanted) <= 3 * math.sqrt(wanted * (1 - wanted) / trials)


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {}], ids=["momentum", "plain"])
def test_training_by_squared_error_converges_to_the_bucket_means(options):
    x, y = points(80, 2), points(80, 2, "y")
    layer, _ = made(x=x, y=y, width=1.2, count=2)
    wanted = layer.constant.detach().clone()
    layer.occupy(x)
    assert not layer.constant.any()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2, **options)
    hold_unselected(layer, optimizer)
    for _ in range(150):
        optimizer.zero_grad()
        where = layer.route(x)  # each bucket by its own mean error, so that all converge at one rate
        (((layer(x) - y) ** 2).sum(1) / layer.counts[where]).sum().backward()
        optimizer.step()
    assert torch.allclose(layer.constant, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("expert", ["constant", "linear"])
def test_permuting_a_batch_permutes_its_outputs_to_the_bit(expert):
    layer, x = made(expert)
    x = torch.cat([x, 3 * points(50, 2, "new")])
    order = torch.randperm(len(x), generator=stream(0, "order"))
    assert torch.equal(layer(x)[order], layer(x[order]))


@pytest.mark.parametrize("expert", ["constant", "linear"])
def test_experts_that_no_example_selects_have_a_gradient_of_exactly_zero(expert):
    layer, x = made(expert)
    layer(x[:5]).square().sum().backward()
    used = torch.zeros(layer.buckets, dtype=torch.bool).index_fill_(0, layer.route(x[:5]), True)
    for table in layer.tables():
        moved = table.grad.flatten(1).ne(0).any(1)
        assert torch.equal(moved, used) and 0 < int(used.sum()) <= 5 < layer.buckets


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_and_momentum_leave_what_was_not_selected(name):
    layer, x = made("linear")
    moved = copy.deepcopy(layer)
    optimizer = OPTIMIZERS[name](layer.parameters())
    handles = hold_unselected(layer, optimizer)
    for number, batch in enumerate(x[:24].split(4)):
        before = copy.deepcopy((list(layer.tables()), optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        layer(batch).square().sum().backward()
        optimizer.step()
        rest = torch.ones(layer.buckets, dtype=torch.bool).index_fill_(0, layer.route(batch), False)
        for place, (table, old) in enumerate(zip(layer.tables(), before[0], strict=True)):
            assert torch.equal(table[rest], old[rest])
            assert bool((table[~rest] != old[~rest]).flatten(1).any(1).all())
            for key, value in optimizer.state[table].items():
                if value.shape == table.shape:
                    was = before[1][place][key] if number else torch.zeros_like(value)
                    assert torch.equal(value[rest], was[rest]) and bool((value[~rest] != was[~rest]).any())
    other = OPTIMIZERS[name](moved.parameters())  # without being held they do move
    start = moved.constant.detach().clone()
    moved(x[:4]).square().sum().backward()
    other.step()
    rest = torch.ones(layer.buckets, dtype=torch.bool).index_fill_(0, moved.route(x[:4]), False)
    assert not torch.equal(moved.constant[rest], start[rest])
    for handle in handles:
        handle.remove()
    held = layer.constant.detach().clone()
    optimizer.zero_grad()
    layer(x[:4]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.constant[rest], held[rest])


def test_a_held_optimizer_refuses_a_closure():
    layer, x = made()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    hold_unselected(layer, optimizer)
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: layer(x).sum().item())


def test_an_unseen_bucket_is_answered_by_the_one_that_differs_in_the_fewest_hashes():
    layer, _ = made(width=0.4, count=4)
    x = 2.5 * points(100, 2, "new")
    names = list(map(tuple, layer.codes.tolist()))
    new = 0
    for row, name in zip(layer.route(x).tolist(), named(layer.hashes, x), strict=True):
        apart = [
            (
                sum(a != b for a, b in zip(name, own, strict=True)),
                sum(abs(a - b) for a, b in zip(name, own, strict=True)),
                i,
            )
            for i, own in enumerate(names)
        ]
        assert row == min(apart)[2]
        new += min(apart)[0] > 0
    assert 20 < new < 100


@pytest.mark.parametrize("expert", ["constant", "linear"])
def test_the_mean_of_all_experts_answers_when_it_is_asked_to_and_gets_no_gradient(expert):
    layer, x = made(expert, unseen="mean")
    far = torch.tensor([[50.0, 50.0]]).double()
    assert layer.route(far).tolist() == [-1]
    share = layer.counts.double() / 200
    wanted = (share[:, None] * layer.constant).sum(0)
    if expert == "linear":
        wanted = wanted + (share[:, None, None] * layer.linear).sum(0) @ far[0]
    out = layer(torch.cat([x[:3], far]))
    assert torch.allclose(out[3], wanted, rtol=1e-12) and torch.equal(out[:3], layer(x[:3]))
    layer.selected.zero_()
    layer(far).sum().backward()
    assert not layer.constant.grad.any() and not layer.selected.any()


@pytest.mark.parametrize("expert", ["constant", "linear"])
def test_a_saved_layer_routes_and_answers_as_before(expert, tmp_path):
    layer, x = made(expert)
    torch.save(nn.Sequential(layer).state_dict(), tmp_path / "state.pt")
    other = nn.Sequential(LshLayer(euclidean(2, 3, 9.0, 99), 2, expert).double())  # other hashes and no bucket
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.cat([x, 2 * points(40, 2, "new")])
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    planes = nn.Sequential(LshLayer(hyperplanes(2, 3, 0), 2, expert).double())
    with pytest.raises(RuntimeError, match="hashes.width"):
        planes.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_casting_the_layer_leaves_its_routing():
    layer, x = made()
    small = copy.deepcopy(layer).half()
    assert small.constant.dtype == torch.float16 and small.hashes.directions.dtype == torch.float64
    assert torch.equal(small.route(x), layer.route(x))
    assert torch.equal(small(x), layer.constant.half()[layer.route(x)])


def test_float32_inputs_on_the_boundary_belong_to_the_cell_above():
    layer = LshLayer(grid(1, 0.25), 1)
    x = torch.arange(-8, 8)[:, None] * 0.25
    layer.occupy(torch.cat([x, x + 0.1]))
    assert layer.codes.flatten().tolist() == list(range(-8, 8))
    assert torch.equal(layer.route(x), layer.route(x + 0.1))
    assert torch.equal(layer.route(torch.nextafter(x[1:], x[:-1])), layer.route(x[:-1]))


def test_no_gradient_flows_through_the_routing():
    layer, x = made()
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is None
    linear, _ = made("linear")
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.linear[linear.route(x)].sum(1), rtol=1e-12)


def test_the_cost_of_an_example_counts_routing_and_not_the_buckets():
    layer, _ = made("linear", outputs=2, count=3)
    cost = layer.active()
    routing = 3 * 2 + 3 + 1
    assert cost.parameters == routing + 2 + 2 * 2 and cost.macs == 3 * 2 + 2 * 2
    assert cost.total == routing + layer.buckets * (2 + 4 + 3)
    more, _ = made("linear", outputs=2, count=3, width=0.2)
    assert more.active().parameters == cost.parameters and more.active().total > cost.total


def test_keys_of_63_bits_are_exact_and_more_are_refused():
    x = points(400, 8)
    for count, keys in ((63, "packed"), (63, "tuple"), (80, "tuple")):
        layer = LshLayer(hyperplanes(8, count, 0), 1, keys=keys)
        layer.occupy(x)
        names = sorted(set(named(layer.hashes, x)))
        assert layer.codes.tolist() == list(map(list, names))
        assert [layer.codes[i].tolist() for i in layer.route(x)] == list(map(list, named(layer.hashes, x)))
    with pytest.raises(UsageError, match=r'64 hashes .* 64\.0 bits, .* keys="tuple"'):
        LshLayer(hyperplanes(8, 64, 0), 1)
    with pytest.raises(UsageError, match="bits"):
        LshLayer(euclidean(8, 20, 0.01, 0), 1).occupy(x)
    LshLayer(euclidean(8, 20, 0.01, 0), 1, keys="tuple").occupy(x)


def test_narrow_strips_give_every_example_its_own_bucket_and_occupancy_says_so():
    layer, x = made(width=1e-3)
    assert layer.occupancy() == Occupancy(200, 200, 1, 200)
    assert LshLayer(grid(2, 0.1), 1).occupancy() == Occupancy(0, 0, 0, 0)


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_not_above_zero_is_refused(width):
    with pytest.raises(UsageError, match="above 0"):
        euclidean(2, 3, width, 0)
    with pytest.raises(UsageError, match="above 0"):
        grid(2, width)


def test_what_does_not_fit_is_refused():
    layer, x = made()
    linear, _ = made("linear")
    bad = x.clone()
    bad[3, 0] = math.nan
    refusals = [
        (ModelError, "no bucket", lambda: LshLayer(grid(2, 0.1), 1)(x)),
        (DataError, "NaN", lambda: layer(bad)),
        (DataError, r"floating \(N, 2\)", lambda: layer(points(3, 5))),
        (DataError, "at least one", lambda: layer.occupy(x[:0])),
        (DataError, r"\(200, 2\)", lambda: layer.fit_(x, points(200, 1))),
        (DataError, "finite", lambda: layer.fit_(x, points(200, 2) / 0)),
        (UsageError, "by='mean'", lambda: linear.fit_(x, points(200, 2), "middle")),
        (UsageError, "at least 1", lambda: LshLayer(grid(2, 0.1), 0)),
        (UsageError, "at least 1", lambda: hyperplanes(2, 0, 0)),
        (UsageError, "spread", lambda: hyperplanes(2, 2, 0, -1.0)),
        (UsageError, "K, inputs", lambda: Hashes(torch.zeros(3), torch.zeros(3))),
    ]
    for (kind, match, call), _ in zip(refusals, itertools.count()):
        with pytest.raises(kind, match=match):
            call()
