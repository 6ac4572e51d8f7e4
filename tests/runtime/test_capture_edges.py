"""What capture keeps, names, refuses and leaves to torch."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from secateur.core.errors import DataError, SecateurError
from secateur.nets import build
from secateur.runtime.capture import CaptureError, NativeSegment, TorchSegment, capture

_spec = importlib.util.spec_from_file_location("capture_kit", pathlib.Path(__file__).with_name("capture_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
Call = kit.Call

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def kinds(captured):
    """N for a native segment, T for one in torch."""
    return "".join("N" if isinstance(segment, NativeSegment) else "T" for segment in captured.segments)


# The user's network --------------------------------------------------------------------------------------------------


def test_the_network_stays_as_it_was():
    """Weights, flags of every module, hooks, flattened recurrent weights and torch's own switch."""
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(5), nn.LSTM(4, 3, batch_first=True)).train()
    model[1].eval()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat, fast = list(model[2]._flat_weights), torch.backends.mha.get_fastpath_enabled()

    capture(model, X)

    assert {
        name: bool(torch.equal(tensor, state[name])) for name, tensor in model.state_dict().items()
    } == dict.fromkeys(state, True)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(a is b for a, b in zip(model[2]._flat_weights, flat, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert prune.is_pruned(model) and torch.backends.mha.get_fastpath_enabled() == fast


def test_training_on_does_not_change_what_was_captured():
    """Captured weights are copies."""
    model = nn.Linear(8, 4)
    captured = capture(model, X)
    before = captured.weights["weight"].copy()

    with torch.no_grad():
        model.weight.add_(1)

    assert np.array_equal(captured.weights["weight"], before)


def test_unfused_weights_keep_their_names_and_bits():
    """Every weight of a network without BatchNorm is the state dict's, to the bit; nodes are called after modules."""
    model = build("gpt_tiny", vocab=10, length=5, depth=1, tied=False)
    captured = capture(model, torch.zeros(2, 5, dtype=torch.long))

    state = model.state_dict()
    for name, array in captured.weights.items():
        if name in state:
            assert np.array_equal(array, state[name].numpy())
    assert set(state) - set(captured.weights) == {"wpe.weight"}
    assert {node.name for node in captured.graph.nodes if node.op in ("linear", "layer_norm", "embedding")} == {
        "wte", "h.0.ln_1", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.ln_2", "h.0.mlp.c_fc", "h.0.mlp.c_proj", "ln_f",
        "lm_head",
    }  # fmt: skip


def test_batch_norm_is_folded_in_float64_and_zeros_stay_zeros():
    """Folded weights are the float64 products, rounded once; a masked weight is +0 afterwards."""
    torch.manual_seed(0)
    model = kit.unsettle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    conv, norm = model
    with torch.no_grad():
        conv.weight[conv.weight.abs() < 0.1] = 0
    zero = (conv.weight == 0).numpy()
    captured = capture(model, torch.randn(2, 3, 8, 8))

    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (conv.weight.double() * scale[:, None, None, None]).float().detach().numpy()
    bias = ((conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()).float().detach().numpy()
    assert np.array_equal(captured.weights["0.weight"], weight)
    assert np.allclose(captured.weights["0.bias"], bias, rtol=1e-6, atol=0)
    assert zero.any() and np.array_equal(captured.weights["0.weight"] == 0, zero)
    assert not np.signbit(captured.weights["0.weight"][zero]).any()


def test_tied_weights_are_stored_once():
    """One weight under its first name, read by both layers; folding into one leaves the other alone."""
    tied = capture(build("gpt_tiny", vocab=10, length=5, depth=1), torch.zeros(2, 5, dtype=torch.long))
    readers = [node.name for node in tied.graph.nodes if "wte.weight" in node.weights.values()]
    assert readers == ["wte", "lm_head"] and "lm_head.weight" not in tied.weights

    conv = nn.Conv2d(8, 8, 1)
    model = kit.unsettle(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), conv))
    inputs = (torch.randn(2, 8, 4, 4),)
    captured = capture(model, inputs)
    assert kit.census(captured) == {"conv": 2}
    assert np.array_equal(captured.weights["0.weight"], conv.weight.detach().numpy())
    kit.assert_same(captured, model, inputs)


def test_weights_in_use_are_captured_where_something_computes_them():
    """torch's pruning, old and new weight norm, spectral norm, orthogonal parametrization."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(4)]
    prune.l1_unstructured(layers[0], "weight", amount=0.5)
    parametrizations.weight_norm(layers[1])
    parametrizations.spectral_norm(layers[2])
    parametrizations.orthogonal(layers[3])
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(*layers, old, nn.utils.spectral_norm(nn.Linear(8, 8)))
    captured = capture(model, X, strict=True)

    assert kit.census(captured) == {"linear": 6}
    assert set(captured.weights) == {f"{at}.{role}" for at in range(6) for role in ("weight", "bias")}
    assert np.array_equal(captured.weights["0.weight"], layers[0].weight.detach().numpy())
    assert (captured.weights["0.weight"] == 0).mean() == 0.5
    kit.assert_same(captured, model, (X,))


def test_half_precision_becomes_float32_with_a_note():
    """The graph of a bfloat16 network is that of the network in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).to(torch.bfloat16)
    captured = capture(model, X.to(torch.bfloat16))

    assert "bfloat16" in captured.notes[0] and len(captured.notes) == 1
    assert captured.inputs[0].dtype == "f32"
    kit.assert_same(captured, model.float(), (X,))


# Inputs and results --------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Several results, one of them twice, one an input, one known."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, *, bias=None):
        y = self.layer(x) if bias is None else self.layer(x) + bias
        return {"logits": y, "again": y, "x": x, "hidden": y.relu(), "none": None, "ones": torch.ones(x.shape[0], 3)}


def test_results_are_named_after_their_keys():
    """One value for each tensor; inputs are taken by keyword and by position."""
    model = Several()
    captured = capture(model, {"x": X, "bias": torch.randn(2, 5, 8)})

    assert [spec.name for spec in captured.inputs] == ["x", "bias"]
    assert captured.outputs[0] == "logits" and len(set(captured.outputs)) == 5
    bias = torch.randn(3, 5, 8)
    found = kit.run(captured, X[[0, 1, 1]], bias)
    for got, want in zip(found, kit.flat(model(X[[0, 1, 1]], bias=bias)), strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    kit.assert_same(capture(model, X), model, (X,))


def test_token_ids_are_moved_behind_their_embedding():
    """Graphs hold ids only to look them up: views of ids become views of vectors, or stay in torch."""
    ids = torch.randint(0, 10, (2, 6), dtype=torch.int32)
    every = Call(
        lambda m, i: m[0](i[:, ::5].clone()).sum(1) + m[0](i[:, 2:].reshape(-1, 2, 2)[:, 1]).mean(1),
        nn.Embedding(10, 4),
    )
    captured = capture(every, ids)
    assert captured.inputs[0].dtype == "i64" and [part.ops for part in captured.parts] == [(("aten::slice", ""),)]
    kit.assert_same(captured, every, (ids,))

    odd = Call(lambda m, i: m[0](i[:, 1:5].reshape(-1, 2, 2)).sum(1), nn.Embedding(10, 4))
    ids = torch.randint(0, 10, (2, 5))
    captured = capture(odd, ids)
    assert kinds(captured) == "TN"
    kit.assert_same(captured, odd, (ids,))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_is_still_any_batch(batch):
    """torch takes sizes of 1 for constants; the graph has the batch free all the same."""
    model = build("gpt_tiny", vocab=10, length=5, depth=1)
    ids = torch.randint(0, 10, (batch, 5))
    captured = capture(model, ids)

    assert captured.graph.inputs[0].shape == (0, 5) and captured.graph.inputs[0].dtype == "i64"
    kit.assert_same(captured, model, kit.other((ids,), 4))


def test_a_batch_that_the_network_counts_is_fixed_and_noted():
    """Adding numbers for each of two examples works for two examples."""
    model = Call(lambda m, x: x + torch.arange(80.0).view(2, 5, 8))
    captured = capture(model, X)

    assert captured.graph.inputs[0].shape == (2, 5, 8)
    assert "batch is fixed to 2" in captured.notes[0]
    kit.assert_same(captured, model, (X,))


def test_a_network_from_a_pt2_file_is_captured(tmp_path):
    """Exported with its batch fixed, as torch.export does by itself."""
    model = build("lenet5")
    image = torch.randn(2, 1, 28, 28)
    torch.export.save(torch.export.export(model.eval(), (image,)), tmp_path / "net.pt2")
    captured = capture(build(str(tmp_path / "net.pt2")), image, strict=True)

    assert kit.census(captured) == {"conv": 2, "max_pool": 2, "reshape": 1, "linear": 2}
    assert {"conv1.weight", "fc2.bias"} <= set(captured.weights)
    kit.assert_same(captured, model, (image,))


# What stays in torch -------------------------------------------------------------------------------------------------


def test_unknown_operators_become_parts_between_graphs():
    """Two runs of unknown operators are two parts; the last run has two operators."""
    torch.manual_seed(0)
    model = kit.Sums()
    inputs = (torch.randn(2, 4),)
    captured = capture(model, inputs)

    assert kinds(captured) == "NTNTN"
    assert [part.ops for part in captured.parts] == [
        (("aten::cumsum", ""), ("aten::sin", "")),
        (("aten::cumsum", ""),),
    ]
    assert "aten::sin" in captured.notes[0]
    kit.assert_same(captured, model, inputs)
    kit.assert_same(captured, model, kit.other(inputs, 5))
    with pytest.raises(CaptureError, match="aten::cumsum"):
        _ = captured.graph


def test_strict_names_each_operator_its_module_and_the_cure():
    """No operator is forgotten."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"inner": kit.Sums()})["inner"])
    with pytest.raises(CaptureError, match="strict") as caught:
        capture(nn.Sequential(nn.Linear(8, 4), model[1]), X, strict=True)
    text = str(caught.value)
    assert "aten::cumsum in '1'" in text and "aten::sin in '1'" in text
    assert isinstance(caught.value, SecateurError)


def test_parts_that_do_not_meet_are_apart():
    """Two unknown operators side by side: two parts, and one graph before and behind both."""
    model = Call(
        lambda m, x: m[2](torch.cumsum(m[0](x), 1) + torch.flip(m[1](x), (1,))), *(nn.Linear(8, 8) for _ in "abc")
    )
    captured = capture(model, X)

    assert kinds(captured) == "NTTN"
    kit.assert_same(captured, model, (X,))


def crossing(parts, x):
    """Values cross with the batch in second place, and with the batch within a size."""
    y = torch.cumsum(parts[0](x).transpose(0, 1), 0)
    y = torch.cumsum(F.relu(y).reshape(-1, 8), 1)
    return parts[0](y.sin()), y


@pytest.mark.parametrize(
    "function",
    [
        crossing,
        lambda m, x: torch.cumsum(y := m[0](x).transpose(0, 1), 0) @ y.transpose(1, 2),
        lambda m, x: m[0](torch.cumsum(m[0](x), 1)) + m[0](x).reshape(-1, 8).view(-1, 5, 8),
        lambda m, x: x + torch.arange(x.shape[0], dtype=torch.float32)[:, None, None],
        lambda m, x: m[0](torch.sort(x, -1)[0]) + torch.topk(x, 1, -1)[0],
        lambda m, x: (m[0](x), m[0](x).argmax(-1)),
        lambda m, x: torch.where(x > 0, m[0](x), x),
        lambda m, x: F.avg_pool2d(m[0](x)[:, None], 3, 2, 1, ceil_mode=True),
        lambda m, x: F.embedding(m[0](x).argmax(-1), m[0].weight),
        lambda m, x: torch.cond(x.sum() > 0, lambda x: x.cumsum(1), lambda x: x - 1, (x,)) + m[0](x),
        lambda m, x: m[0](torch.view_as_real(torch.fft.fft(x)).sum(-1)),
    ],
)
def test_values_cross_between_parts(function):
    """Any shape and type of value goes from graph to torch and back."""
    torch.manual_seed(0)
    model = Call(function, nn.Linear(8, 8))
    captured = capture(model, X)

    assert captured.parts and captured.notes[-1].startswith("in torch: ")
    kit.assert_same(captured, model, (X,))
    kit.assert_same(captured, model, kit.other((X,), 3))


def test_a_mask_of_tokens_is_the_only_part_of_bert():
    """The comparison stays in torch, in front of one graph with everything else."""
    inner = build("bert_tiny", vocab=10, length=6, depth=1)
    model = Call(lambda m, ids, mask: m[0](ids, mask), inner)
    ids, mask = torch.randint(0, 10, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    captured = capture(model, (ids, mask))

    assert kinds(captured) == "TN" and captured.parts[0].ops == (("aten::ne", "parts.0"),)
    kit.assert_same(captured, model, (ids, mask))


def test_random_numbers_are_drawn_at_each_call():
    """They are no constants, although they depend on no input."""
    captured = capture(Call(lambda m, x: x + torch.rand(x.shape[0], 1, 1)), X)
    (part,) = captured.parts

    assert isinstance(part, TorchSegment) and part.ops == (("aten::rand", ""),)
    first, second = (kit.run(captured, X)[0] for _ in range(2))
    assert not torch.equal(first, second)


# What is refused -----------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """Control flow that looks at numbers."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Memory(nn.Module):
    """A result that depends on earlier calls, and a count that does not matter."""

    def __init__(self, used):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.used = used

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls if self.used else x * 2


def test_what_cannot_be_traced_is_refused_with_the_cause():
    """Control flow on numbers names torch.where; torch's error stays attached."""
    with pytest.raises(CaptureError, match="torch.where") as caught:
        capture(Branch(), X)
    assert caught.value.__cause__ is not None
    with pytest.raises(CaptureError, match=r"model\(\*example_inputs\)"):
        capture(nn.Linear(3, 3), X)
    with pytest.raises(DataError, match="no tensor"):
        capture(nn.Linear(3, 3), ())


def test_memory_between_calls_is_refused_where_results_depend_on_it():
    """A counter that nothing reads is left out."""
    assert kit.census(capture(Memory(False), X)) == {"const": 1, "binary": 1}
    with pytest.raises(CaptureError, match="'calls'"):
        capture(Memory(True), X)
