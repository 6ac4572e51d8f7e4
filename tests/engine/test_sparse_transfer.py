# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Transfer of pruned backbones: zeros that stay, features that are cached, backbones that stand still, error ratios."""

import copy
import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError, FileError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies import sparse_transfer as study
from secateur.engine.studies.rewind import Way

MEAN, STD = (0.4, 0.5), (0.2, 0.3)
DECAY = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


def images(count=22, classes=3, seed=0):
    random = stream(seed, "test", "transfer")
    x = torch.randint(256, (count, 2, 6, 6), generator=random).to(torch.uint8)
    return Split(x, torch.randint(classes, (count,), generator=random))


def loader(split=None, order=0, dtype=torch.float64, **options):
    split = split or images()
    scale = {"mean": MEAN, "std": STD, **options}
    return Loader(split, 5, shuffle=True, seed=order, dtype=dtype, **scale)


def way(dtype=torch.float64, epochs=3, seed=0, options=None, **loading):
    return Way(loader(dtype=dtype, **loading), TrainStep(epochs=epochs, **(options or DECAY)), seed)


def network(dtype=torch.float64):
    """Convolution, BatchNorm with statistics of its own, dropout and a head of four outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {
            "conv": nn.Conv2d(2, 5, 3, padding=1), "norm": nn.BatchNorm2d(5), "relu": nn.ReLU(),
            "pool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "drop": nn.Dropout(0.3),
            "hidden": nn.Linear(20, 7), "act": nn.ReLU(), "head": nn.Linear(7, 4),
        }  # fmt: skip
        net = nn.Sequential(OrderedDict(layers))
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.to(dtype).eval()


def pruned(dtype=torch.float64):
    net = network(dtype)
    masks = Masks({
        n: torch.rand(m.shape, generator=stream(0, n)) < 0.5 for n, m in Masks.dense(net).items()
    })  # fmt: skip
    masks.apply_(net)
    return net, masks


def start(dtype=torch.float64):
    net, masks = pruned(dtype)
    return study.backbone(net, loader(dtype=dtype), masks)


def body(net):
    return {name: t for name, t in net.state_dict().items() if not name.startswith("head.")}


def test_a_backbone_is_a_copy_with_masks_of_all_but_the_head():
    net, masks = pruned()
    found = study.backbone(net, loader(), masks)
    assert found.head == "head" and set(found.masks) == {"conv.weight", "hidden.weight"} and found.net is not net
    assert (found.mean, found.std) == (MEAN, STD)
    inferred = study.backbone(net, loader(), infer=True)
    assert inferred.masks == found.masks


@pytest.mark.parametrize(
    "options", [DECAY, {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}], ids=["momentum", "adamw"]
)
def test_zeros_stay_zero_when_everything_is_trained_and_the_new_head_is_dense(tmp_path, options):
    found = start()
    net = study.full(found, way(options=options), tmp_path, 3)
    found.masks.check(net)
    assert net.head.out_features == 3 and bool(net.head.weight.ne(0).all())
    for name, mask in found.masks.items():
        old, new = found.net.state_dict()[name], net.state_dict()[name]
        assert bool((new[mask] != old[mask]).all()) and not bool(new[~mask].any())
    assert not torch.equal(net.norm.running_mean, found.net.norm.running_mean)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_training_on_cached_features_is_training_behind_the_frozen_backbone(tmp_path, dtype, near):
    found = start(dtype)
    cached = study.linear(found, way(dtype), tmp_path / "cached", 3)
    through = study.linear(found, way(dtype), tmp_path / "through", 3, cached=False)
    first = study.with_head(found, 3, 0)
    for name in ("head.weight", "head.bias"):
        one, other = cached.state_dict()[name], through.state_dict()[name]
        assert torch.allclose(one, other, rtol=0, atol=near)
        assert float((one - first.state_dict()[name]).abs().max()) > 100 * near


def test_training_on_cached_features_is_softmax_regression_written_out(tmp_path):
    found, how = start(), way()
    net = study.linear(found, how, tmp_path, 3)
    first = study.with_head(found, 3, 0)
    weight, bias = (first.head.weight.detach().clone(), first.head.bias.detach().clone())
    stem = nn.Sequential(*list(found.net.children())[:-1]).eval()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, (x, y) in enumerate(batch for epoch in range(3) for batch in how.loader.epoch(epoch)):
        z = stem(x).detach()
        gap = (z @ weight.T + bias).softmax(1) - functional.one_hot(y, 3)
        slopes = [gap.T @ z / len(y) + 1e-2 * weight, gap.mean(0) + 1e-2 * bias]
        speed = [0.9 * s + g for s, g in zip(speed, slopes, strict=True)]
        rate = 0.05 * (1 + math.cos(math.pi * step / how.steps)) / 2
        weight, bias = weight - rate * speed[0], bias - rate * speed[1]
    assert torch.allclose(net.head.weight, weight, rtol=0, atol=1e-12)
    assert torch.allclose(net.head.bias, bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cached", [True, False])
def test_linear_transfer_leaves_weights_and_statistics_of_the_backbone(tmp_path, cached):
    found = start()
    before = copy.deepcopy(found.net.state_dict())
    net = study.linear(found, way(), tmp_path, 3, cached=cached)
    for name, tensor in body(net).items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(t, before[n]) for n, t in found.net.state_dict().items())
    assert not torch.equal(net.head.weight, study.with_head(found, 3, 0).head.weight)
    assert not net.training and all(p.requires_grad for p in net.parameters())


def test_augmentation_is_refused_with_cached_features_and_allowed_behind_the_frozen_backbone(tmp_path):
    found, how = start(), way(augment="flip")
    with pytest.raises(UsageError, match=r"augments \('flip'\)"):
        study.linear(found, how, tmp_path / "a", 3)
    flipped = study.linear(found, how, tmp_path / "b", 3, cached=False)
    plain = study.linear(found, way(), tmp_path / "c", 3)
    assert all(torch.equal(a, b) for a, b in zip(body(flipped).values(), body(plain).values(), strict=True))
    assert not torch.allclose(flipped.head.weight, plain.head.weight, rtol=0, atol=1e-6)


def test_features_are_what_the_head_is_given_in_the_order_of_the_split():
    found, split = start(), images()
    taken = study.features(found, split, batch=4)
    x = (split.x.double() / 255 - torch.tensor(MEAN).view(2, 1, 1)) / torch.tensor(STD).view(2, 1, 1)
    stem = nn.Sequential(*list(found.net.children())[:-1]).eval()
    assert torch.allclose(taken.x, stem(x), rtol=0, atol=1e-6) and torch.equal(taken.y, split.y)
    assert torch.allclose(found.net.head(taken.x), found.net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "full"])
def test_a_finished_transfer_is_read_and_another_backbone_is_refused(tmp_path, kind):
    found, go = start(), getattr(study, kind)
    net = go(found, way(), tmp_path, 3)
    before = (tmp_path / "state.pt").stat().st_mtime_ns
    again = go(found, way(), tmp_path, 3)
    assert (tmp_path / "state.pt").stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    other = copy.deepcopy(found.net)
    with torch.no_grad():
        other.hidden.weight.mul_(1.5)
    with pytest.raises(FileError):
        go(replace(found, net=other), way(), tmp_path, 3)


def test_heads_are_a_function_of_the_seed():
    found = start()
    one, two, three = (study.with_head(found, 3, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    new, old = body(study.with_head(found, 3, 0)), body(found.net)
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)


def test_the_relative_increase_is_that_of_the_errors():
    dense = {"a": 90.0, "b": 60.0}
    assert study.increase(dense, dense) == study.Increase({"a": 0.0, "b": 0.0}, 0.0)
    found = study.increase(dense, {"a": 85.0, "b": 70.0})
    assert math.isclose(found.tasks["a"], 0.5) and math.isclose(found.tasks["b"], -0.25)
    assert math.isclose(found.mean, 0.125)
    with pytest.raises(UsageError, match="no error on b"):
        study.increase({"a": 90.0, "b": 100.0}, dense)
    with pytest.raises(UsageError, match="differ"):
        study.increase(dense, {"a": 90.0})
    with pytest.raises(UsageError, match="per cent"):
        study.increase(dense, {"a": 90.0, "b": 101.0})


def test_scores_are_of_all_examples_or_of_classes():
    found = start(torch.float32)
    split = Split(images().x, images(classes=4).y)
    logits = torch.cat([found.net(x) for x, _ in Loader(split, 22, mean=MEAN, std=STD)])
    right = (logits.argmax(1) == split.y).float()
    classes = [float(right[split.y == c].mean()) for c in range(4)]
    assert math.isclose(study.score(found.net, split, found), 100 * float(right.mean()), rel_tol=1e-6)
    assert math.isclose(study.score(found.net, split, found, True), 100 * sum(classes) / 4, rel_tol=1e-6)
    assert not math.isclose(sum(classes) / 4, float(right.mean()), rel_tol=1e-3)


def test_classes_are_picked_and_numbered_anew():
    split = images(40, 6)
    part = study.only_classes(split, [4, 1])
    rows = [i for i, y in enumerate(split.y.tolist()) if y in (4, 1)]
    assert torch.equal(part.x, split.x[rows]) and part.y.tolist() == [int(split.y[i] == 1) for i in rows]
    for wrong in ([4, 9], [1, 1], []):
        with pytest.raises(DataError, match="classes"):
            study.only_classes(split, wrong)


def test_multiply_adds_are_those_of_one_pass_and_the_head_or_of_all():
    found, how = start(), way()
    kept = found.masks.counts()
    head = 7 * 3
    dense = 36 * 5 * 2 * 9 + 20 * 7 + head
    cost = study.macs(found, how, 3)
    assert cost["full"].dense == 3 * 3 * 22 * dense
    assert cost["linear"].dense == 22 * dense + 3 * 3 * 22 * head
    assert cost["linear"].sparse < cost["linear"].dense
    per_image = (cost["linear"].sparse - 3 * 3 * 22 * head) / 22
    assert cost["full"].sparse == 9 * 22 * per_image
    # zero padding: the edges of the map may be counted or not, the weights kept are
    assert math.isclose(per_image, 36 * kept["conv.weight"] + kept["hidden.weight"] + head)


def test_the_search_for_a_rate_takes_the_best_and_the_earlier_of_equals():
    scores = {0.1: 3.0, 0.01: 5.0, 0.001: 5.0}
    assert study.best_rate(list(scores), scores.__getitem__) == (0.01, scores)
    for rates in ([], [0.1, 0.1]):
        with pytest.raises(UsageError, match="rates"):
            study.best_rate(rates, scores.__getitem__)
    with pytest.raises(DataError, match="NaN"):
        study.best_rate([0.1, 0.2], lambda rate: math.nan if rate > 0.1 else 1.0)


def test_what_does_not_fit_is_refused(tmp_path):
    net, masks = pruned()
    found = start()
    with pytest.raises(MaskError, match="infer=True"):
        study.backbone(net, loader())
    with pytest.raises(MaskError, match="has shape"):
        study.backbone(net, loader(), Masks({"hidden.weight": torch.ones(7, 19, dtype=torch.bool)}))
    with pytest.raises(MaskError, match="are not zero"):
        study.backbone(network(), loader(), masks)
    with pytest.raises(ModelError, match="linear layer"):
        study.backbone(nn.Sequential(net, nn.ReLU()), loader(), infer=True)
    for go in (study.linear, study.full):
        with pytest.raises(ModelError, match="2 outputs for labels up to 2; give it 3"):
            go(found, way(), tmp_path, 2)
        with pytest.raises(DataError, match="the loader's mean is None"):
            go(found, way(mean=None, std=None), tmp_path, 3)
    with pytest.raises(ModelError, match="at least 2"):
        study.with_head(found, 1, 0)
    with pytest.raises(UsageError, match="Loader"):
        study.full(found, replace(way(), loader=Plain()), tmp_path, 3)
    assert not list(tmp_path.iterdir())


class Plain:
    """Batches that say nothing of their scale."""

    def __len__(self):
        return 1

    def epoch(self, number, start=0):
        return iter(loader().epoch(0))


def test_a_head_for_each_position_has_no_features_to_cache():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x).flatten(2).transpose(1, 2))

    net = Tokens().double()
    found = study.backbone(net, loader(), infer=True)
    with pytest.raises(ModelError, match="one row"):
        study.features(found, images())
