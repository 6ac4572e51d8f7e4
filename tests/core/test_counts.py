"""The promise: masks keep exactly the weights that were asked for, whatever pattern and allocation."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.allocations import ALLOCATIONS, ByCost, ErdosRenyi, Global, Lamp, Uniform, lamp
from secateur.core.choose import choose, keep_counts
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.patterns import NM, PATTERNS, Block, Unit, Unstructured

PATTERN_CASES = [Unstructured(), NM(2, 4), NM(1, 4), NM(1, 2), Block(4, 1), Block(1, 4), Block(2, 4), Block(), Unit()]
ALLOCATION_CASES = [Uniform(), Global(), ErdosRenyi(), ErdosRenyi(kernel=False), Lamp(), ByCost()]
EXHAUSTIVE = [(p, a) for p in PATTERN_CASES for a in ALLOCATION_CASES]


@st.composite
def networks(draw, most=4):
    """Scores >= 0 of linear and convolution weights that every pattern fits, often equal, not all zero."""
    shapes = []
    for _ in range(draw(st.integers(1, most))):
        outs, ins = draw(st.sampled_from([4, 8, 12])), draw(st.sampled_from([4, 8]))
        kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (1, 3), (2,)]))
        shapes.append((outs, ins, *kernel))
    kind = draw(st.sampled_from(["equal", "ties", "zeros", "random", "scaled"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = {}
    for i, shape in enumerate(shapes):
        if kind == "equal":
            score = torch.full(shape, 0.5)
        elif kind == "ties":
            score = torch.randint(0, 3, shape, generator=random).float()
        elif kind == "zeros":
            score = torch.rand(shape, generator=random) if i == 0 else torch.zeros(shape)
        else:
            score = torch.rand(shape, generator=random) * (100.0**i if kind == "scaled" else 1)
        scores[f"layer{i}.weight"] = score.to(dtype)
    scores["layer0.weight"].view(-1)[0] = 1
    return scores


def unit_sizes(scores, pattern):
    return {name: pattern.unit_size(tuple(score.shape)) for name, score in scores.items()}


def kept_units(mask, pattern):
    """The number of whole units in a mask; fails when a unit is cut or a group has a wrong count."""
    matrix = mask.reshape(mask.shape[0], -1)
    if isinstance(pattern, NM):
        groups = mask.movedim(1, -1).reshape(-1, pattern.m).sum(1)
        assert (groups == pattern.n).all()
        return int(mask.sum())
    if isinstance(pattern, Block):
        blocks = matrix.unfold(0, pattern.rows, pattern.rows).unfold(1, pattern.cols, pattern.cols)
        units = blocks.reshape(-1, pattern.rows * pattern.cols)
    elif isinstance(pattern, Unit):
        units = matrix
    else:
        units = matrix.reshape(-1, 1)
    assert (units.all(1) == units.any(1)).all(), "a unit was cut"
    return int(units.all(1).sum())


@pytest.mark.parametrize(("pattern", "allocation"), EXHAUSTIVE, ids=lambda case: repr(case))
@settings(deadline=None, max_examples=20)
@given(scores=networks(), data=st.data())
def test_the_budget_is_met_to_the_weight_in_every_combination(pattern, allocation, scores, data):
    check_budget(pattern, allocation, scores, data)


@pytest.mark.long
@pytest.mark.parametrize(("pattern", "allocation"), EXHAUSTIVE, ids=lambda case: repr(case))
@settings(deadline=None, max_examples=400)
@given(scores=networks(most=8), data=st.data())
def test_the_budget_is_met_to_the_weight_in_many_more_networks(pattern, allocation, scores, data):
    check_budget(pattern, allocation, scores, data)


def check_budget(pattern, allocation, scores, data):
    """Whole units, as many as were allotted, none of the budget wasted, no tensor empty."""
    sizes = unit_sizes(scores, pattern)
    total = sum(score.numel() for score in scores.values())
    least = sum(sizes.values())
    keep = data.draw(st.sampled_from([least, total, total - 1]) | st.integers(least, total))
    cost = {name: float(2**i) for i, name in enumerate(scores)}
    if isinstance(pattern, NM):
        if keep != total // pattern.m * pattern.n:
            with pytest.raises(BudgetError, match=rf"keeps {total // pattern.m * pattern.n:,} of .* not {keep:,}"):
                choose(scores, keep, pattern, allocation, cost)
        keep = total // pattern.m * pattern.n

    masks = choose(scores, keep, pattern, allocation, cost)
    allotted = keep_counts(scores, keep, pattern, allocation, cost)

    units = {name: kept_units(mask, pattern) for name, mask in masks.items()}
    assert units == allotted
    assert all(masks[name].shape == score.shape for name, score in scores.items())
    assert all(count >= 1 for count in units.values()), "a tensor is empty"
    if len(set(sizes.values())) == 1:
        size = next(iter(sizes.values()))
        assert masks.kept == keep // size * size
    else:
        assert masks.kept <= keep
        if isinstance(allocation, Uniform | ErdosRenyi):
            room = [size for name, size in sizes.items() if not masks[name].all()]
            assert all(masks.kept + size > keep for size in room), "another unit fits"
        elif masks.kept < total:
            assert masks.kept + max(sizes.values()) > keep, "the next unit fits, whichever it is"


@pytest.mark.parametrize("pattern", PATTERN_CASES, ids=repr)
@settings(deadline=None, max_examples=30)
@given(scores=networks(), data=st.data())
def test_global_counts_are_those_of_one_sorted_list(pattern, scores, data):
    """The slow definition: all units in one list, best first; each tensor's best unit is never lost."""
    if isinstance(pattern, NM):
        return
    sizes = unit_sizes(scores, pattern)
    keep = data.draw(st.integers(sum(sizes.values()), sum(s.numel() for s in scores.values())))
    units = {name: pattern.unit_scores(score).double().reshape(-1).tolist() for name, score in scores.items()}
    every = [(name, i, v / sizes[name]) for name, values in units.items() for i, v in enumerate(values)]
    plain = sorted(every, key=lambda unit: -unit[2])
    best = {name: max(range(len(v)), key=lambda i, v=v: v[i]) for name, v in units.items()}
    guarded = [u for u in plain if best[u[0]] == u[1]] + [u for u in plain if best[u[0]] != u[1]]

    counts = keep_counts(scores, keep, pattern, Global())

    wanted = []
    for order in (plain, guarded):
        spent, expected = 0, dict.fromkeys(scores, 0)
        for name, _, _ in order:
            if spent + sizes[name] > keep:
                break
            spent += sizes[name]
            expected[name] += 1
        wanted.append(expected)
    even = len(set(sizes.values())) == 1
    assert counts == (wanted[0] if even and all(wanted[0].values()) else wanted[1])


@settings(deadline=None, max_examples=60)
@given(scores=networks(), data=st.data())
def test_within_a_tensor_the_best_are_kept_and_equal_ones_by_index(scores, data):
    keep = data.draw(st.integers(len(scores), sum(s.numel() for s in scores.values())))

    masks = choose(scores, keep, Unstructured(), data.draw(st.sampled_from([Uniform(), ErdosRenyi(), Global()])))

    for name, mask in masks.items():
        values = scores[name].reshape(-1).tolist()
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert set(mask.reshape(-1).nonzero().reshape(-1).tolist()) == set(order[: int(mask.sum())])


def test_nm_groups_run_along_the_input_channels_of_a_convolution():
    """Written out: at each output and kernel position the two largest of each four input channels."""
    score = torch.rand(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))

    mask = NM(2, 4).mask(score, 48)

    for o, y, x, group in ((o, y, x, g) for o in range(3) for y in range(2) for x in range(2) for g in (0, 4)):
        values = score[o, group : group + 4, y, x]
        expected = torch.zeros(4, dtype=torch.bool)
        expected[values.topk(2).indices] = True
        assert torch.equal(mask[o, group : group + 4, y, x], expected)


def test_blocks_and_units_are_ranked_by_their_sums_and_bf16_sums_are_not_rounded():
    score = torch.tensor([[1.0] * 300, [1.0] * 299 + [1.5]]).bfloat16()  # 300 and 300.5 are one bf16 number

    assert Unit().mask(score, 1)[:, 0].tolist() == [False, True]
    assert Block(1, 300).mask(score, 1)[:, 0].tolist() == [False, True]


def test_infinite_scores_do_not_empty_another_tensor():
    scores = {"a": torch.full((3, 4), math.inf), "b": torch.ones(2, 8)}

    masks = choose(scores, 20, Unit(), Global())

    assert masks.counts() == {"a": 12, "b": 8}
    assert choose(scores, 2).counts() == {"a": 1, "b": 1}


def test_allocation_by_cost_prefers_cheap_weights():
    scores = {"cheap": torch.full((2, 4), 1.0), "dear": torch.full((2, 4), 2.0)}

    assert choose(scores, 9, allocation=Global()).counts() == {"cheap": 1, "dear": 8}
    assert choose(scores, 9, allocation=ByCost(), cost={"cheap": 1.0, "dear": 4.0}).counts() == {"cheap": 8, "dear": 1}
    assert choose(scores, 9, allocation=ByCost()).counts() == {"cheap": 1, "dear": 8}


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), data=st.data())
def test_uniform_counts_stay_within_one_weight_of_the_exact_share(sizes, data):
    scores = {f"t{i}": torch.rand(size) for i, size in enumerate(sizes)}
    keep = data.draw(st.integers(len(sizes), sum(sizes)))

    counts = Uniform()(scores, keep)

    assert sum(counts.values()) == keep
    shares = {f"t{i}": Fraction(keep * size, sum(sizes)) for i, size in enumerate(sizes)}
    if min(shares.values()) >= 1:
        assert all(abs(counts[name] - share) < 1 for name, share in shares.items())


@pytest.mark.parametrize("kernel", [True, False])
@settings(deadline=None, max_examples=60)
@given(scores=networks(), data=st.data())
def test_erdos_renyi_densities_follow_the_definition(kernel, scores, data):
    """The slow definition: the scale of ``min(1, scale * sum(dims) / prod(dims))`` that meets it, by halving."""
    total = sum(s.numel() for s in scores.values())
    keep = data.draw(st.integers(len(scores), total - 1))
    wish = {}
    for name, score in scores.items():
        dims = score.shape if kernel else score.shape[:2]
        wish[name] = sum(dims) / math.prod(dims)

    def shares(scale):
        return {name: min(1.0, scale * wish[name]) * score.numel() for name, score in scores.items()}

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle).values()) < keep else (low, middle)
    ideal = shares(high)

    counts = ErdosRenyi(kernel=kernel)(scores, keep)

    assert sum(counts.values()) == keep
    if min(ideal.values()) >= 1:
        assert all(abs(counts[name] - ideal[name]) < 1 + 1e-6 for name in scores)


def test_the_kernel_form_counts_kernel_dimensions_and_the_plain_form_does_not():
    scores = {"conv": torch.rand(16, 16, 3, 3), "wide": torch.rand(32, 72)}  # both 2,304 weights

    kernel, plain = ErdosRenyi()(scores, 461), ErdosRenyi(kernel=False)(scores, 461)

    assert kernel["conv"] / kernel["wide"] == pytest.approx((38 / 2304) / (104 / 2304), abs=0.01)
    assert plain["conv"] / plain["wide"] == pytest.approx((32 / 256) / (104 / 2304), abs=0.01)


def test_lamp_scores_of_one_two_three():
    """Sorted squares 1, 4, 9: 1/14, 4/13 and 9/9."""
    scores = lamp(torch.tensor([2.0, 3.0, 1.0]))

    torch.testing.assert_close(scores, torch.tensor([4 / 13, 1, 1 / 14], dtype=torch.float64), rtol=0, atol=1e-15)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=20, unique=True))
def test_lamp_is_its_definition(values):
    squares = [Fraction(v) ** 2 for v in values]
    tails = [sum(s for s in squares if s >= square) for square in squares]
    expected = [float(s / t) if t else 0.0 for s, t in zip(squares, tails, strict=True)]

    scores = lamp(torch.tensor(values))

    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-300)
    assert scores.max() == (1 if max(values) else 0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lamp_neither_overflows_nor_underflows(scale):
    scores = lamp(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * scale)

    torch.testing.assert_close(scores, torch.tensor([1 / 14, 4 / 13, 1], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [8.0, 1e-6, 1e12])
def test_lamp_ignores_the_scale_of_a_layer_and_global_magnitude_does_not(factor):
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(20, 30, generator=random, dtype=torch.float64) for name in "ab"}
    scaled = weights | {"b": weights["b"] * factor}

    assert choose(weights, 300, allocation=Lamp()) == choose(scaled, 300, allocation=Lamp())
    assert choose(weights, 300, allocation=Global()) != choose(scaled, 300, allocation=Global())


@pytest.mark.parametrize("allocation", ALLOCATION_CASES, ids=repr)
def test_too_small_a_budget_is_refused_with_the_sparsity_that_would_do(allocation):
    scores = {"a": torch.rand(10, 10), "b": torch.rand(10, 10)}

    with pytest.raises(
        BudgetError, match=r"keeping 1 of 200 weights would empty whole layers: 2 tensors.*at most 0.99"
    ):
        choose(scores, 1, allocation=allocation)
    with pytest.raises(BudgetError, match="cannot keep 201 of 200 weights; ask for 0 to 200"):
        choose(scores, 201, allocation=allocation)
    with pytest.raises(BudgetError, match="cannot keep -1 of 200"):
        choose(scores, -1, allocation=allocation)


def test_the_sparsity_that_an_error_offers_is_never_rounded_up():
    with pytest.raises(BudgetError, match=r"at most 0.999998\.$"):
        choose({"a": torch.rand(1666, 1000), "b": torch.rand(1, 667)}, 1)


def test_a_tensor_that_cannot_take_the_pattern_is_named_with_the_cure():
    with pytest.raises(UsageError, match=r"`a` of shape \(3, 6\).*input width 6 is not a multiple of 4.*--skip 'a'"):
        choose({"a": torch.rand(3, 6)}, 9, NM(2, 4))
    with pytest.raises(UsageError, match=r"3 x 6 matrix does not divide into 2 x 4 blocks"):
        choose({"a": torch.rand(3, 6)}, 9, Block(2, 4))
    with pytest.raises(UsageError, match="no input dimension"):
        choose({"a": torch.rand(3)}, 1, Unit())
    with pytest.raises(UsageError, match=r"2:4 keeps 6 weights here, not 5"):
        NM(2, 4).mask(torch.rand(3, 4), 5)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 2), (4, 4), (-1, 4), (0, 0)])
def test_impossible_groups_are_refused(n, m):
    with pytest.raises(UsageError, match="whole numbers 1 <= n < m"):
        NM(n, m)


@pytest.mark.parametrize(("rows", "cols"), [(0, 1), (1, 0), (-4, 1)])
def test_impossible_blocks_are_refused(rows, cols):
    with pytest.raises(UsageError, match="whole rows and cols of at least 1"):
        Block(rows, cols)


def test_scores_that_say_nothing_are_refused():
    zero = {"a": torch.zeros(4, 4)}

    with pytest.raises(ModelError, match="all scores are zero.*check the data and the network"):
        choose(zero, 8)
    assert choose(zero, 16).kept == 16
    with pytest.raises(ModelError, match="1 of 2 scores of `b` are NaN"):
        choose(zero | {"b": torch.tensor([math.nan, 1.0])}, 8)


def test_negative_scores_are_refused_where_they_would_be_squared_or_divided():
    signed = {"a": torch.tensor([[-3.0, 1.0], [2.0, 0.5]])}

    with pytest.raises(UsageError, match=r"LAMP squares.*`a` run from -3 to 2. Use `global`"):
        choose(signed, 2, allocation=Lamp())
    with pytest.raises(UsageError, match=r"`a` has a lowest score of -3.*Use `global`"):
        choose(signed, 2, allocation=ByCost())
    assert choose(signed, 2, allocation=Global())["a"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("cost", [{"b": 1.0}, {"a": 0.0}, {"a": -1.0}, {"a": math.nan}, {"a": math.inf}])
def test_a_missing_or_impossible_cost_is_refused(cost):
    with pytest.raises(UsageError, match="known cost > 0; `a`"):
        choose({"a": torch.rand(2, 2)}, 2, allocation=ByCost(), cost=cost)


def test_every_pattern_and_allocation_that_recipes_can_name_is_tested_here():
    assert {type(p) for p in PATTERN_CASES} == set(PATTERNS.values())
    assert {type(a) for a in ALLOCATION_CASES} == set(ALLOCATIONS.values())
