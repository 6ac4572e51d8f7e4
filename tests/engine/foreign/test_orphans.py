"""What other libraries leave in state dicts: whole pairs are merged, halves are refused, strange types are counted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.foreign.test_reading import random
from torch import nn
from torch.nn.utils import prune

import secateur
from secateur.core.errors import FileError, ModelError
from secateur.core.masks import Masks
from secateur.engine.foreign.adopting import Network, adopt


class Masking(nn.Module):
    """A layer that multiplies by a mask of its own on the way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("weight_mask", torch.ones(3, 4))

    def forward(self, x):
        return x @ (self.weight * self.weight_mask).t()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The class is found under the name that the folder writes down."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__, fromlist=["x"]))


def state(keep=0.5):
    """A weight that is alive everywhere, and a mask beside it."""
    return {"weight": random(3, 4), "weight_mask": (random(3, 4, keep=keep, seed=3) != 0).float()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_a_mask_beside_its_weight_is_applied(tmp_path, dtype):
    """Weights under zeros of ``weight_mask`` are zero in the folder, and the mask is its mask."""
    whole = {f"fc.{name}": tensor for name, tensor in state().items()}
    pruned = whole["fc.weight_mask"] == 0
    save_file({**whole, "fc.weight_mask": whole["fc.weight_mask"].to(dtype)}, tmp_path / "a.safetensors")

    done = adopt(tmp_path / "a.safetensors", tmp_path / "out")

    back = load_file(tmp_path / "out" / "weights.safetensors")
    assert set(back) == {"fc.weight"}
    assert torch.equal(back["fc.weight"], torch.where(pruned, 0.0, whole["fc.weight"]))
    assert torch.equal(Masks.load(tmp_path / "out" / "masks.safetensors")["fc.weight"], ~pruned)
    alive = int((whole["fc.weight"][pruned] != 0).sum())
    assert any(f"{alive:,} weights under them became zero" in note for note in done.notes)


def test_a_class_that_has_the_mask_keeps_it(tmp_path):
    """Its names are right as they are; the outputs do not change."""
    net = Masking()
    net.load_state_dict(state())
    torch.save(net.state_dict(), tmp_path / "a.pt")

    adopt(tmp_path / "a.pt", tmp_path / "out", Network(f"{__name__}:Masking", shape=(4,)))

    loaded, masks = secateur.load(tmp_path / "out")
    x = random(2, 4, seed=5)
    torch.testing.assert_close(loaded(x), net(x))
    assert torch.equal(masks["weight"], net.weight_mask.bool())


def test_other_tensors_that_end_in_mask_are_left(tmp_path):
    """Masks of attention, gates with halves and masks of another shape belong to the network."""
    whole = {"attn": random(2, 2), "attn_mask": torch.ones(2, 2), "causal_mask": torch.ones(2, 2),
             "a.weight": random(2, 2), "a.weight_mask": torch.full((2, 2), 0.5),
             "b.bias": random(2), "b.bias_mask": torch.ones(3)}  # fmt: skip
    torch.save(whole, tmp_path / "a.pt")

    adopt(tmp_path / "a.pt", tmp_path / "out")

    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == set(whole)


@pytest.mark.parametrize(("gone", "words"), [
    ("0.weight_mask", "`0.weight_orig`, half of .*not `0.weight_mask`: what of it is pruned is lost.*'weight'"),
    ("0.weight_orig", "`0.weight_mask`, half of .*not `0.weight_orig`: its weight is lost"),
])  # fmt: skip
def test_half_of_a_pair_is_refused(tmp_path, gone, words):
    """Without the mask nobody knows what is pruned, without the original there is nothing to prune."""
    net = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    torch.save({name: t for name, t in net.state_dict().items() if name != gone}, tmp_path / "a.pt")

    with pytest.raises(FileError, match=words):
        adopt(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spectral_normalisation_is_no_half(tmp_path):
    """Its original has vectors beside it."""
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)))
    torch.save(net.state_dict(), tmp_path / "a.pt")

    adopt(tmp_path / "a.pt", tmp_path / "out")

    assert set(load_file(tmp_path / "out" / "weights.safetensors")) == set(net.state_dict())


def test_a_pair_beside_another_weight(tmp_path):
    """Where the plain weight lies there too it must be what the pair gives."""
    pair = {"w.weight_orig": random(2, 3), "w.weight_mask": torch.tensor([[1.0, 0, 1], [0, 1, 1]])}
    torch.save({**pair, "w.weight": pair["w.weight_orig"] * pair["w.weight_mask"]}, tmp_path / "a.pt")
    torch.save({**pair, "w.weight": random(2, 3, seed=7)}, tmp_path / "b.pt")

    assert adopt(tmp_path / "a.pt", tmp_path / "out").kept == 4
    with pytest.raises(FileError, match="holds `w.weight` and also `w.weight_orig` with its mask, and they differ"):
        adopt(tmp_path / "b.pt", tmp_path / "other")


def test_one_of_several_networks(tmp_path):
    """Tables without a common name are joined, and each is to be had alone."""
    one, two = {"fc.weight": random(3, 4)}, {"fc.weight": random(2, 3), "average": random(2)}
    torch.save(
        {"generator": one, "discriminator": two, "g_ema": {"fc.weight": random(3, 4, seed=1)}}, tmp_path / "a.pt"
    )

    whole = adopt(tmp_path / "a.pt", tmp_path / "whole")
    alone = adopt(tmp_path / "a.pt", tmp_path / "alone", entry="discriminator")
    copy = adopt(tmp_path / "a.pt", tmp_path / "copy", entry="g_ema")

    names = {"generator.fc.weight", "discriminator.fc.weight", "discriminator.average"}
    assert set(load_file(tmp_path / "whole" / "weights.safetensors")) == names
    assert any("`--entry generator`" in note for note in whole.notes)
    assert any("not taken: g_ema (1 tensors)" in note for note in whole.notes)
    assert set(load_file(tmp_path / "alone" / "weights.safetensors")) == set(two) and alone.tensors == 2
    assert torch.equal(load_file(tmp_path / "copy" / "weights.safetensors")["fc.weight"], random(3, 4, seed=1))
    assert copy.tensors == 1
    with pytest.raises(FileError, match="there are: generator, discriminator, g_ema"):
        adopt(tmp_path / "a.pt", tmp_path / "more", entry="ema")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits(tmp_path, dtype):
    """Zeros are counted as in any type, pairs are merged, and what is not finite is refused."""
    weight = random(4, 6, keep=0.5).to(dtype)
    mask = (random(4, 6, keep=0.5, seed=2) != 0).to(dtype)
    save_file({"a.weight": weight, "b.weight_orig": weight.clone(), "b.weight_mask": mask}, tmp_path / "a.safetensors")

    adopt(tmp_path / "a.safetensors", tmp_path / "out")

    back = load_file(tmp_path / "out" / "weights.safetensors")
    assert back["a.weight"].dtype == back["b.weight"].dtype == dtype
    assert torch.equal(back["a.weight"].float(), weight.float())
    assert torch.equal(back["b.weight"].float(), torch.where(mask.float() == 0, 0.0, weight.float()))
    masks = Masks.load(tmp_path / "out" / "masks.safetensors")
    assert torch.equal(masks["a.weight"], weight.float() != 0) and torch.equal(masks["b.weight"], mask.float() == 1)
    bad = torch.full((2, 2), float("nan"))
    for name, tensor in (("b", bad.to(dtype)), ("c", bad.to(torch.complex64))):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match="4 of 4 weights of `w` are NaN"):
            adopt(tmp_path / f"{name}.safetensors", tmp_path / "never")


def test_what_is_not_taken_is_on_the_card(tmp_path):
    """Tensors that were not looked at are named there."""
    torch.save({"model": {"fc.weight": random(3, 4)}, "grid": random(3, 3)}, tmp_path / "a.pt")

    adopt(tmp_path / "a.pt", tmp_path / "out")

    notes = json.loads((tmp_path / "out" / "card.json").read_text())["notes"]
    assert "grid was not read: a tensor beside the network" in notes
