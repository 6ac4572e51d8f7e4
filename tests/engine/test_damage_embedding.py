"""Features in the plane: principal components against an SVD, t-SNE by its seed; and who is chosen to be shown."""

import sys

import pytest
import torch
from tests.engine.damage_kit import Fixed, answering, features, images, mlp, pruned, random

from secateur.core.errors import DataError, UsageError
from secateur.data import Split
from secateur.engine.damage import embedding
from secateur.engine.damage.embedding import pca, tsne
from secateur.engine.damage.geometry import of_outputs
from secateur.engine.damage.outputs import outputs
from secateur.engine.damage.samples import axes, choose, flipped, planes, tensors


def placed(found, chosen, skip):
    return planes(found, axes(found, skip), chosen, 0, skip)


@pytest.mark.parametrize("n, p", [(40, 6), (7, 30), (3, 2), (2, 5)])
def test_components_are_those_of_the_singular_values(n, p):
    x = torch.randn(n, p, generator=random(), dtype=torch.float64)
    plane = pca(x)
    centred = x - x.mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    for i in range(min(2, n - 1)):
        sign = rows[i][rows[i].abs().argmax()].sign()
        torch.testing.assert_close(plane.axes[i], rows[i] * sign, rtol=1e-7, atol=1e-7)
        assert float(plane.explained[i]) == pytest.approx(float(values[i] ** 2 / values.square().sum()))
    torch.testing.assert_close(plane(x), centred @ plane.axes.T)


def test_the_largest_loading_is_positive_whatever_the_sign_of_the_data():
    x = torch.randn(20, 4, generator=random(1), dtype=torch.float64)
    one, two = pca(x), pca(-x)
    torch.testing.assert_close(one.axes, two.axes)
    assert all(float(axis[axis.abs().argmax()]) > 0 for axis in one.axes)


@pytest.mark.parametrize("x, rank", [
    (torch.ones(5, 3), 0), (torch.ones(1, 3), 0), (torch.arange(6.0)[:, None], 1),
    (torch.outer(torch.arange(6.0), torch.tensor([1.0, 2.0, -3.0])), 1),
])  # fmt: skip
def test_directions_that_do_not_exist_are_zero(x, rank):
    plane = pca(x)
    assert [bool(axis.any()) for axis in plane.axes] == [i < rank for i in range(2)]
    assert plane.explained.tolist() == pytest.approx([1.0, 0.0] if rank else [0.0, 0.0])
    assert not plane(x)[:, rank:].any()


def test_many_rows_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(embedding, "FIT", 5)
    x = torch.randn(17, 4, generator=random(), dtype=torch.float64)
    torch.testing.assert_close(pca(x).axes, pca(x[::4]).axes)


def test_axes_of_another_width_do_not_fit():
    with pytest.raises(DataError, match="features of 3 numbers do not fit axes of 4"):
        pca(torch.randn(5, 4, generator=random()))(torch.zeros(2, 3))


def test_tsne_follows_from_its_seed_and_keeps_groups_apart():
    centres = 20 * torch.eye(3, 5)
    x = torch.cat([c + torch.randn(12, 5, generator=random(i)) for i, c in enumerate(centres)])
    before = torch.get_rng_state()
    one = tsne(x, 1)
    assert torch.equal(one, tsne(x, 1)) and one.shape == (36, 2) and one.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)
    near = torch.cdist(one, one).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(near // 12, torch.arange(36) // 12)


@pytest.mark.parametrize("x, why", [
    (torch.zeros(3, 4), "3 examples"), (torch.zeros(2001, 1), "2,001 examples"), (torch.ones(9, 4), "all equal"),
    (torch.full((9, 4), torch.inf), "NaN or infinity"),
])  # fmt: skip
def test_what_tsne_cannot_arrange_is_refused(x, why):
    with pytest.raises(DataError, match=why):
        tsne(x, 0)


# Who is shown


@pytest.mark.parametrize("n, changed, examples, wanted", [
    (100, 10, 40, (10, 30)), (100, 90, 40, (30, 10)), (100, 50, 40, (20, 20)), (30, 5, 40, (5, 25)),
    (30, 30, 7, (7, 0)), (30, 0, 7, (0, 7)), (1, 0, 1, (0, 1)), (1, 1, 1, (1, 0)),
])  # fmt: skip
def test_flipped_examples_take_up_to_half(n, changed, examples, wanted):
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=random(4))[:changed]] = True
    chosen = choose(mask, examples, 0)
    assert (int(mask[chosen].sum()), int((~mask)[chosen].sum())) == wanted
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, choose(mask, examples, 0))
    if n > examples > 1:
        assert not torch.equal(chosen, choose(mask, examples, 1))


def test_flipped_is_any_network_that_answers_otherwise():
    found = [
        outputs(Fixed(), Split(answering(answers), torch.tensor([0, 0, 0, 0])))
        for answers in ([0, 1, 2, 0], [0, 1, 1, 0], [0, 0, 2, 0])
    ]
    assert flipped(found).tolist() == [False, True, True, False]
    assert not flipped(found[:1]).any()


def test_tensors_are_those_of_the_chosen_examples():
    net, split = mlp(), features(30)
    found = [outputs(net, split), outputs(pruned(net), split), outputs(Fixed(), Split(split.x[:, :3], split.y))]
    measured, chosen = [of_outputs(one) for one in found], torch.tensor([2, 5, 29])
    table = tensors(found, measured, chosen, split)
    assert table["index"].tolist() == [2, 5, 29] and torch.equal(table["targets"], split.y[chosen])
    for v, one in enumerate(found):
        assert torch.equal(table["predictions"][v], one.answers[chosen])
        assert torch.equal(table["confidence"][v], one.confidence[chosen].float())
    for name in ("angle", "length", "margin"):
        assert torch.equal(table[name][1], getattr(measured[1], name)[chosen].float())
        assert table[name][2].isnan().all() and table[name].dtype == torch.float32
    assert "images" not in table and "position" not in table


@pytest.mark.parametrize("floating", [False, True])
def test_pictures_are_the_ones_of_the_data(floating):
    data = images(9, channels=3, side=5)
    split = Split(data.test.x.float() / 255, data.test.y) if floating else data.test
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    chosen = torch.tensor([1, 7])
    found = [outputs(net, split)]
    table = tensors(found, [None], chosen, split)
    assert torch.equal(table["images"], data.test.x[chosen].permute(0, 2, 3, 1))
    assert "angle" not in table


def test_planes_of_each_network():
    net, split = mlp(), features(30)
    other = mlp(hidden=4)  # another width of the last layer
    found = [outputs(one, split, name=name) for name, one in (("dense", net), ("thin", pruned(net)), ("small", other))]
    found.append(outputs(Fixed(), Split(split.x[:, :3], split.y), name="none"))
    chosen, heard = torch.arange(0, 30, 2), []
    made, table = placed(found, chosen, lambda *words: heard.append(words))
    axes = pca(found[0].features.x)
    for v in (0, 1):
        torch.testing.assert_close(made["pca"][v], axes(found[v].features.x[chosen]).float())
    for v in (0, 1, 2):
        own = pca(found[v].features.x)
        torch.testing.assert_close(made["pca_own"][v], own(found[v].features.x[chosen]).float())
        assert table["explained"][found[v].name] == own.explained.tolist()
        torch.testing.assert_close(made["tsne"][v], tsne(found[v].features.x[chosen], 0).float())
    assert made["pca"][2:].isnan().all() and made["pca_own"][3].isnan().all() and made["tsne"][3].isnan().all()
    assert [what for what, _ in heard] == ["pca of small"] and "do not fit" in heard[0][1]
    assert table["perplexity"] == 14 / 3 and table["explained"]["none"] is None


def test_without_scikit_learn_there_are_components_and_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    heard = []
    made, table = placed([outputs(mlp(), features(30))], torch.arange(30), lambda *words: heard.append(words))
    assert set(made) == {"pca", "pca_own"} and "perplexity" not in table
    assert heard[0][0] == "tsne of network" and "pip install" in heard[0][1]
    with pytest.raises(UsageError):
        tsne(torch.randn(9, 3, generator=random()), 0)


def test_more_examples_than_tsne_takes_are_thinned(monkeypatch):
    from secateur.engine.damage import samples

    monkeypatch.setattr(samples, "TSNE", 10)
    made, _ = placed([outputs(mlp(), features(28))], torch.arange(28), lambda *words: None)
    there = made["tsne"][0].isfinite().all(1)
    assert there.nonzero().flatten().tolist() == list(range(0, 28, 3))
