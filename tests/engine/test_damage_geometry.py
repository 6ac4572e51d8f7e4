"""Angle, length and margin against their definitions in float64, and the identities they obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.damage_kit import Fixed, Tagger, conv, features, images, mlp

from secateur.data import Split
from secateur.engine.damage import geometry as module
from secateur.engine.damage.geometry import by_class, geometry, logits_error, of_outputs, spread_of, summary
from secateur.engine.damage.outputs import outputs


def case(n=40, p=5, classes=4, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, p), (classes, p)))
    b = torch.randn(classes, generator=g, dtype=torch.float64) if bias else None
    return x, w, b, torch.randint(classes, (n,), generator=g)


def by_definition(x, w, b, y):
    """One example, in plain Python."""
    dot = lambda u, v: math.fsum(float(a) * float(c) for a, c in zip(u, v, strict=True))  # noqa: E731
    norm = lambda u: math.sqrt(dot(u, u))  # noqa: E731
    angle = math.acos(max(-1.0, min(1.0, dot(w[y], x) / norm(w[y]) / norm(x))))
    margins = {j: (dot(w[y] - w[j], x) + float(b[y] - b[j])) / norm(w[y] - w[j]) for j in range(len(w)) if j != y}
    nearest = min(margins, key=lambda j: margins[j])
    return angle, norm(x), margins[nearest], nearest


@pytest.mark.parametrize("at_once", [1, 37, 1 << 22])
def test_against_the_definition(at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    x, w, b, y = case()
    found = geometry(x, w, b, y)
    for i in range(len(x)):
        angle, length, margin, nearest = by_definition(x[i], w, b, int(y[i]))
        assert float(found.angle[i]) == pytest.approx(angle, abs=1e-12)
        assert float(found.length[i]) == pytest.approx(length, rel=1e-14)
        assert float(found.margin[i]) == pytest.approx(margin, abs=1e-12)
        assert int(found.nearest[i]) == nearest


@pytest.mark.parametrize("net, data, bound", [
    (mlp(), features(), 1e-14), (mlp(bias=False), features(), 1e-14), (conv(), images(), 1e-5),
    (conv().bfloat16(), images(), 2e-2),
])  # fmt: skip
def test_a_logits_follow_from_the_features(net, data, bound):
    found = outputs(net, data)
    made = found.features.x.double() @ found.features.weight.double().T
    made = made if found.features.bias is None else made + found.features.bias.double()
    error = logits_error(found, found.features)
    assert error <= bound
    top = max(1.0, float(found.logits.double().abs().max()))
    assert error == pytest.approx(float((made - found.logits.double()).abs().max()) / top, abs=1e-15)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), bias=st.booleans())
def test_b_a_margin_is_negative_exactly_where_the_answer_is_wrong(seed, classes, bias):
    x, w, b, y = case(classes=classes, seed=seed, bias=bias)
    logits = x @ w.T + (0.0 if b is None else b)
    assert torch.equal(geometry(x, w, b, y).margin < 0, logits.argmax(1) != y)


def test_b_of_two_classes_the_margin_is_the_distance_to_the_boundary():
    x, w, b, y = case(classes=2)
    normal, offset = w[0] - w[1], b[0] - b[1]
    foot = x - ((x @ normal + offset) / normal.square().sum())[:, None] * normal  # the nearest point of the boundary
    assert (foot @ normal + offset).abs().max() < 1e-12
    torch.testing.assert_close(geometry(x, w, b, y).margin.abs(), (x - foot).norm(dim=1))


def test_c_longer_features_have_the_same_angle_and_larger_margins():
    x, w, _, y = case(bias=False)
    one, two = geometry(x, w, None, y), geometry(3.5 * x, w, None, y)
    torch.testing.assert_close(two.angle, one.angle)
    torch.testing.assert_close(two.length, 3.5 * one.length)
    torch.testing.assert_close(two.margin, 3.5 * one.margin)


def test_d_a_vector_added_to_every_row_changes_angles_only():
    x, w, _, y = case(bias=False)
    shifted = w + torch.linspace(-2, 3, w.shape[1], dtype=torch.float64)
    one, two = geometry(x, w, None, y), geometry(x, shifted, None, y)
    torch.testing.assert_close(two.margin, one.margin)
    assert torch.equal((x @ w.T).argmax(1), (x @ shifted.T).argmax(1))
    assert not torch.allclose(two.angle, one.angle, atol=0.1)


def test_e_a_step_of_the_margin_ties_the_class_with_the_nearest():
    x, w, b, y = case()
    found = geometry(x, w, b, y)
    along = w[y] - w[found.nearest]
    moved = x - found.margin[:, None] * along / along.norm(dim=1, keepdim=True)
    logits, rows = moved @ w.T + b, torch.arange(len(x))
    torch.testing.assert_close(logits[rows, y], logits[rows, found.nearest])
    right = found.margin > 0
    assert right.any() and not right.all()
    torch.testing.assert_close(logits[right].max(1).values, logits[rows, y][right])  # no third class leads yet


# What is not defined


def test_zero_vectors_have_no_angle_and_are_counted():
    x, w, b, y = case()
    x[3], w[1] = 0.0, 0.0
    found = geometry(x, w, b, y)
    undefined = (torch.arange(len(x)) == 3) | (y == 1)
    assert torch.equal(found.angle.isnan(), undefined)
    assert found.margin.isfinite().all() and found.length[3] == 0
    assert summary(found)["angle"]["undefined"] == int(undefined.sum())


def test_equal_rows_have_no_boundary():
    x, w, b, y = case(classes=4)
    w[2] = w[0]
    b[2] = b[0]
    found = geometry(x, w, b, y)
    assert torch.equal(found.margin.isnan(), (y == 0) | (y == 2))
    assert (found.nearest[found.margin.isnan()] == -1).all()
    b[2] = b[0] + 0.1  # now class 2 is always before class 0, wherever the features are
    found = geometry(x, w, b, y)
    assert (found.margin[y == 0] == -torch.inf).all() and (found.nearest[y == 0] == 2).all()
    assert found.margin[y == 2].isfinite().all()
    wrong = (x @ w.T + b).argmax(1) != y
    assert torch.equal(found.margin < 0, wrong)
    assert summary(found)["margin"]["undefined"] == int((y == 0).sum())


def test_a_single_class_has_no_margin():
    x, w, b, _ = case(classes=1)
    found = geometry(x, w, b, torch.zeros(len(x), dtype=torch.int64))
    assert found.margin.isnan().all() and found.angle.isfinite().all()
    table = summary(found)["margin"]
    assert table == {"mean": None, "std": None, "quartiles": None, "undefined": len(x)}


def test_features_along_their_row_have_an_angle_of_zero_although_they_round_beyond():
    _, w, _, _ = case(classes=200)
    x, y = torch.cat([3 * w, -1e-100 * w]), torch.arange(200).repeat(2)
    found = geometry(x, w, None, y)
    cosine = (x @ w.T)[torch.arange(400), y] / x.norm(dim=1) / w.norm(dim=1)[y]
    assert (cosine > 1).any() and (cosine < -1).any()  # whose angles would be NaN
    assert found.angle[:200].abs().max() < 1e-7 and (found.angle[200:] - math.pi).abs().max() < 1e-7


# Summaries


def test_summaries_against_torch_over_all_and_each_class():
    x, w, b, y = case(n=41)
    found = geometry(x, w, b, torch.where(y == 3, 0, y))  # class 3 has no example
    table, rows = summary(found), by_class(found, torch.where(y == 3, 0, y), 4)
    for name in ("angle", "length", "margin"):
        values = getattr(found, name)
        assert table[name]["mean"] == pytest.approx(float(values.mean()))
        assert table[name]["std"] == pytest.approx(float(values.std(correction=0)))
        quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        assert table[name]["quartiles"] == pytest.approx(quartiles.tolist())
        assert rows[1][name] == pytest.approx(float(values[y == 1].mean()))
        assert rows[3][name] is None


def test_the_spread_of_one_value_and_of_none():
    one = torch.tensor([2.0], dtype=torch.float64)
    assert spread_of(one) == {"mean": 2.0, "std": 0.0, "quartiles": [2.0] * 3, "undefined": 0}
    assert spread_of(one[:0])["mean"] is None


def test_networks_without_features_have_no_geometry():
    assert of_outputs(outputs(Fixed(), features(6, 3))) is None
    tokens = outputs(Tagger(), Split(torch.zeros(2, 3).long(), torch.zeros(2, 3).long()))
    assert of_outputs(tokens) is None
    net = mlp()
    found = outputs(net, features())
    with pytest.raises(ValueError, match="tokens are not kept"):
        logits_error(tokens, found.features)
