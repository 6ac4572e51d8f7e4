"""Corrupted images: each way by its definition, the same pictures for all networks, and what is skipped."""

import io
import math
import sys

import pytest
import torch
from tests.engine.damage_kit import conv, features, images, pruned, random
from torch import nn

from secateur.core.errors import UsageError
from secateur.data import Dataset, Loader, Split
from secateur.engine.damage import corruptions as module
from secateur.engine.damage.corruptions import SEVERITIES, TABLE, corrupt, corruptions, pixels


def pictures(n=6, channels=3, side=16):
    return torch.rand(n, channels, side, side, generator=random(3))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_corrupted_images_stay_images_and_get_worse(name, channels):
    x = pictures(channels=channels)
    before = x.clone()
    far = []
    for level in range(1, SEVERITIES + 1):
        out = corrupt(x, name, level)
        assert out.shape == x.shape and out.dtype == x.dtype and 0 <= out.min() and out.max() <= 1
        far.append(float((out - x).square().mean()))
    assert torch.equal(x, before)
    assert far == sorted(far) and far[0] > 0


def test_contrast_and_brightness_by_definition():
    x = pictures(2)
    for level, (factor, shift) in enumerate(zip(TABLE["contrast"], TABLE["brightness"], strict=True), 1):
        near = torch.stack([torch.stack([m + factor * (p - m) for p in i for m in [p.mean()]]) for i in x])
        torch.testing.assert_close(corrupt(x, "contrast", level), near.clamp(0, 1))
        torch.testing.assert_close(corrupt(x, "brightness", level), (x + shift).clamp(0, 1))


def test_noise_has_the_deviation_it_says_and_depends_on_seed_and_place_alone():
    x = torch.full((200, 1, 8, 8), 0.5)
    one = corrupt(x, "gaussian noise", 1)
    assert float((one - x).std()) == pytest.approx(0.08, rel=0.02)
    assert torch.equal(one, corrupt(x, "gaussian noise", 1)) and not torch.equal(
        one, corrupt(x, "gaussian noise", 1, 1)
    )
    assert torch.equal(one[:150], corrupt(x[:150], "gaussian noise", 1))
    torch.testing.assert_close((corrupt(x, "gaussian noise", 2) - x)[:9] * 8 / 12, (one - x)[:9])  # one draw for all
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], one[128])


def test_blur_by_definition():
    x, width = pictures(1, 1, 16)[0, 0].double(), TABLE["gaussian blur"][4] * 16 / 32
    reach = math.ceil(4 * width)
    weights = {d: math.exp(-d * d / 2 / width**2) for d in range(-reach, reach + 1)}
    inside = lambda i: min(max(i, 0), 15)  # noqa: E731
    pairs = [(di, dj, a * b) for di, a in weights.items() for dj, b in weights.items()]
    whole = sum(w for _, _, w in pairs)
    mean = lambda i, j: sum(w * float(x[inside(i + di), inside(j + dj)]) for di, dj, w in pairs) / whole  # noqa: E731
    wanted = torch.tensor([[mean(i, j) for j in range(16)] for i in range(16)], dtype=torch.float64)
    torch.testing.assert_close(corrupt(x[None, None], "gaussian blur", 5)[0, 0], wanted)
    assert torch.allclose(corrupt(torch.full((1, 3, 5, 9), 0.3), "gaussian blur", 5), torch.tensor(0.3))  # small image


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(channels):
    from PIL import Image

    x = pictures(2, channels)
    out = corrupt(x, "jpeg", 2)
    for one, made in zip(x, out, strict=True):
        picture = (one * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(picture[:, :, 0] if channels == 1 else picture).save(file, "JPEG", quality=18)
        wanted = torch.tensor(list(Image.open(file).tobytes())).view(16, 16, channels).permute(2, 0, 1)
        assert torch.equal((made * 255).round().long(), wanted)


@pytest.mark.parametrize("name, level", [("fog", 1), ("jpeg", 0), ("contrast", 6)])
def test_unknown_corruptions_are_refused(name, level):
    with pytest.raises(UsageError, match=f"corruption '{name}' at severity {level}"):
        corrupt(pictures(), name, level)


# Accuracy


def test_rows_count_what_the_networks_answer_on_the_same_pictures():
    net, data = conv(), images(40)
    nets = [("dense", net), ("thin", pruned(net, 0.7))]
    table = corruptions(nets, data, examples=1000, seed=5, batch=16)
    assert table["examples"] == 40 and len(table["rows"]) == 25
    assert [(row["corruption"], row["severity"], row["parameter"]) for row in table["rows"]] == [
        (name, level, parameter) for name, row in TABLE.items() for level, parameter in enumerate(row, 1)
    ]
    x = data.test.x.float() / 255
    checked = [None, ("gaussian noise", 3), ("contrast", 2)]
    for case, row in zip(checked, [table["clean"], table["rows"][2], table["rows"][11]], strict=True):
        spoilt = x if case is None else corrupt(x, *case, seed=5)
        right = {name: net.eval()((spoilt - 0.4) / 0.3).argmax(1) == data.test.y for name, net in nets}
        for name, hits in right.items():
            assert row["accuracy"][name].parts["right"] == int(hits.sum())
            assert row["accuracy"][name].value == 100 * int(hits.sum()) / 40
        lost = int((right["dense"] & ~right["thin"]).sum())
        assert row["change"]["thin"].parts["only_b"] == lost
        assert "dense" not in row["change"]


def test_the_same_network_twice_changes_nothing():
    net = conv()
    table = corruptions([("a", net), ("b", net)], images(20), examples=10)
    assert table["examples"] == 10
    for row in table["rows"]:
        change = row["change"]["b"]
        assert (change.value, change.parts["only_a"], change.parts["only_b"]) == (0.0, 0.0, 0.0)


def test_floating_images_are_taken_as_they_are_and_uncounted_labels_left_out():
    seen = []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :3]

    x = pictures(5)
    table = corruptions([("a", Sees())], Split(x, torch.tensor([0, -100, 2, 1, -100])))
    assert table["examples"] == 3
    assert torch.equal(seen[0], x[[0, 2, 3]])


# What is skipped


@pytest.mark.parametrize("data, why", [
    (features(), r"shape \(6,\)"),
    (Split(torch.rand(4, 2, 5, 5), torch.zeros(4).long()), r"shape \(2, 5, 5\); an image has 1 or 3"),
    (Split(torch.rand(4, 3, 5, 5) * 2 - 1, torch.zeros(4).long()), "the inputs run from -"),
    (Split(torch.zeros(4, 3, 5, 5).long(), torch.zeros(4).long()), r"torch\.int64"),
])  # fmt: skip
def test_what_is_no_image_is_skipped_with_the_reason(data, why):
    heard = []
    assert corruptions([("a", conv())], data, skip=lambda *words: heard.append(words)) is None
    assert len(heard) == 1 and heard[0][0] == "corruptions"
    with pytest.raises(AssertionError, match=why):
        assert not heard[0][1], heard[0][1]


def test_without_pillow_the_other_corruptions_are_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    heard = []
    table = corruptions([("a", conv())], images(8), skip=lambda *words: heard.append(words))
    assert {row["corruption"] for row in table["rows"]} == set(TABLE) - {"jpeg"}
    assert [what for what, _ in heard] == ["corruptions: jpeg"] and "pip install" in heard[0][1]


def test_a_network_that_gives_nan_for_bright_images_loses_these_rows_only():
    class Bright(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + (torch.nan if float(x.mean()) > 0.58 else 0.0)

    heard = []
    data = Split(pictures(), torch.zeros(6).long())
    table = corruptions([("a", Bright())], data, skip=lambda *words: heard.append(words))
    assert {row["corruption"] for row in table["rows"]} == set(TABLE) - {"brightness"}
    assert heard[0][0] == "corruptions: brightness" and "network 'a': " in heard[0][1]


def test_modes_and_random_numbers_are_left_alone():
    net = conv().train()
    before = torch.get_rng_state()
    corruptions([("a", net)], images(8))
    assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in net.modules())


def test_the_images_of_a_data_set_are_those_of_its_test_part():
    data = images(5)
    whole, why = pixels(data)
    assert whole is data.test.x and why == ""
    assert isinstance(data, Dataset) and module.SEVERITIES == len(TABLE["jpeg"])
    scaled = next(iter(Loader(data.test, 5, mean=data.mean, std=data.std)))[0]
    torch.testing.assert_close(scaled, (whole.float() / 255 - 0.4) / 0.3)
