# Networks come by name, so the type checker cannot know their attributes.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""What every network does."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur import nets


def logits_shape(name, inputs):
    return (3, 6, 11) if name in ("gpt_tiny", "lstm") else (3, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", nets.names())
def test_every_parameter_gets_a_finite_gradient(small, name, training):
    model, inputs = small(name)
    model.train(training)
    output = model(inputs)
    assert output.shape == logits_shape(name, inputs)
    output.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", nets.names())
def test_bfloat16_stays_bfloat16_and_near_float32(small, name):
    model, inputs = small(name)
    model.eval()
    with torch.no_grad():
        exact = model(inputs)
        half = inputs.bfloat16() if inputs.is_floating_point() else inputs
        rough = model.bfloat16()(half)
    assert rough.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a relative error of 2^-8 a layer, of which there are up to 50.
    assert (rough.float() - exact).norm() <= 0.2 * exact.norm()


@pytest.mark.parametrize("name", nets.names())
def test_export_captures_the_same_function(small, name):
    model, inputs = small(name)
    model.eval()
    captured = torch.export.export(model, (inputs,)).module()
    with torch.no_grad():
        assert torch.equal(captured(inputs), model(inputs))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vit_tiny"])
def test_export_with_a_free_batch_size_takes_other_batches(small, name):
    model, inputs = small(name)
    model.eval()
    free = {0: torch.export.Dim("n")}
    captured = torch.export.export(model, (inputs,), dynamic_shapes=(free,)).module()
    _, more = small(name, count=5)
    with torch.no_grad():
        torch.testing.assert_close(captured(more), model(more))


@pytest.mark.parametrize("name", nets.names())
def test_the_global_seed_alone_decides_the_weights(small, name):
    one, two = small(name)[0].state_dict(), small(name)[0].state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", nets.names())
def test_another_seed_gives_every_matrix_other_weights(small, name):
    one, two = dict(small(name)[0].named_parameters()), dict(small(name, seed=1)[0].named_parameters())
    matrices = [key for key, weight in one.items() if weight.dim() > 1]
    assert matrices and not [key for key in matrices if torch.equal(one[key], two[key])]


@pytest.mark.parametrize("name", nets.names())
def test_evaluation_does_not_depend_on_the_rest_of_the_batch(small, name):
    model, inputs = small(name)
    model.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        torch.testing.assert_close(model(inputs[1:2]), model(inputs)[1:2])


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vit_tiny", "bert_tiny", "gpt_tiny", "lstm"])
def test_the_loss_can_be_differentiated_twice(small, name):
    model, inputs = small(name)
    model.eval()
    weights = list(model.parameters())
    # Fused attention has no second derivative in torch.
    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(model(inputs).square().mean(), weights, create_graph=True)
        curved = torch.autograd.grad(sum(s.square().sum() for s in slopes), weights, materialize_grads=True)
    assert any(c.abs().sum() > 0 for c in curved) and all(torch.isfinite(c).all() for c in curved)


def test_no_module_keeps_a_hidden_copy_of_its_weights(small):
    for name in nets.names():
        model, inputs = small(name)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            output = model(inputs)
        assert isinstance(model, nn.Module) and not output.any(), name
