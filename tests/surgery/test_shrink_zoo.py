"""Every network of the zoo loses a third of its units: it computes, learns, exports and reloads, and says the same."""

import copy
import random

import pytest
import torch
from tests.surgery.hf import HF
from tests.surgery.proofs import apart, copied, draw, outputs, reached, snapshot, unchanged, wider, zeroed_by_hand
from tests.surgery.zoo import ARCHITECTURES

from secateur.surgery import analyse, shrink
from secateur.surgery.reference import casts

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

NAMES = [*ARCHITECTURES, *HF]
KINDS = ("exact", "all", "one")
SLOW = {"t5_seq2seq", "whisper_seq2seq", "two_tower", "gqa_interleaved", "qwen3_lm", "mistral_lm", "llama_lm_eager"}
NOTHING = {"gmlp"}
"""Networks of which every unit is a part of a normalisation's statistics."""
FIXED: set[str] = set()
"""Networks that take no other batch."""


def build(name):
    """The network in evaluation mode, its arguments, and those as a tuple and keywords."""
    if name in HF:
        pytest.importorskip("transformers")
    model, example = (ARCHITECTURES.get(name) or HF[name])()
    return model.eval(), example, ((), example) if isinstance(example, dict) else (example, {})


def check(name, granularity, kinds, thorough):
    """Remove units drawn by each kind and prove what is left."""
    dense, example, (args, kwargs) = build(name)
    analysis = analyse(dense, example, granularity)
    dtype = None if casts(analysis.run) else torch.float64
    before = snapshot(dense)
    learned = (
        {training: reached(copy.deepcopy(dense), args, kwargs, training) for training in (False, True)}
        if thorough
        else {}
    )
    for kind in kinds:
        picked = draw(random.Random(f"{name}{granularity}{kind}"), analysis, kind)
        if not picked:
            assert name in NOTHING and kind == "exact"
            continue
        model = copy.deepcopy(dense)
        done = shrink(model, example, picked, analysis=analysis)
        assert done.rewritten or done.model is model
        assert done.params[1] < done.params[0] == sum(p.numel() for p in dense.parameters())
        found = outputs(done.model, example, dtype)
        if not any(analysis.group(group).inexact for group in picked):
            other = example if analysis.note or name in FIXED else wider(example)
            by_hand = outputs(zeroed_by_hand(dense, analysis, picked), other, dtype)
            assert apart(outputs(done.model, other, dtype), by_hand) < (1e-9 if dtype else 1e-5)
        assert all(torch.isfinite(x).all() for x in found)
        if thorough:
            learns(done, args, kwargs, learned)
            reloads(done.model, example)
            exports(done.model, args, kwargs, example)
    assert unchanged(before, dense)


def learns(done, args, kwargs, learned):
    """What had a gradient still has one, and a step of an optimizer changes the outputs."""
    model = copied(done.model)  # a rewritten one shares what was not cut with the dense network
    for training in (False,) if done.rewritten else (False, True):
        assert reached(model, args, kwargs, training) >= learned[training], "a parameter has lost its gradient"
    one = outputs(model, kwargs or args)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert apart(outputs(model, kwargs or args), one) > 0


def reloads(model, example):
    """A copy with other numbers gives the same again once it has the saved ones."""
    twin = copied(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, example), outputs(model, example), strict=True))


def exports(model, args, kwargs, example):
    """torch.export takes the smaller network as it took the dense one."""
    program = torch.export.export(copied(model), args, kwargs, strict=False)
    assert apart(outputs(program.module(check_guards=False), example), outputs(model, example)) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_heads_and_channels_go_without_a_trace(name):
    check(name, "heads", KINDS, thorough=False)


@pytest.mark.parametrize("name", ["shufflenet_v2", "vit_sdpa", "lstm_classifier", "tied_lm", "unet", "bert_classifier"])
def test_what_is_left_learns_exports_and_reloads(name):
    check(name, "heads", ("all",), thorough=True)


@pytest.mark.parametrize("name", ["timm_style", "gqa_decoder", "einsum_attention"])
def test_dimensions_of_heads_go_without_a_trace(name):
    check(name, "dims", KINDS, thorough=False)


@pytest.mark.long
@pytest.mark.parametrize("granularity", ["heads", "dims"])
@pytest.mark.parametrize("name", NAMES)
def test_everything_on_every_network(name, granularity):
    check(name, granularity, KINDS, thorough=True)
