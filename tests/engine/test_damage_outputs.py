"""One pass of a network: answers, probabilities and the inputs of its last linear layer."""

import copy

import pytest
import torch
from tests.engine.damage_kit import Fixed, Tagger, answering, conv, features, images, mlp
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError
from secateur.core.losses import CrossEntropy
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.damage.certainty import certainty, histogram
from secateur.engine.damage.outputs import NOT_CALLED, SEQUENCES, alike, outputs
from secateur.probes.accuracy import Accuracy
from secateur.probes.calibration import Calibration


def test_answers_probabilities_and_features_are_those_of_the_network():
    net, split = mlp(), features(50)
    found = outputs(net, split, batch=16)
    hidden = net[1](net[0](split.x)).detach()
    logits = net[2](hidden).detach()
    p = logits.softmax(1)
    torch.testing.assert_close(found.logits, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.features.x, hidden, rtol=1e-12, atol=1e-12)
    assert found.features.layer == "2"
    torch.testing.assert_close(found.features.weight, net[2].weight.detach())
    torch.testing.assert_close(found.features.bias, net[2].bias.detach())
    assert torch.equal(found.answers, logits.argmax(1))
    torch.testing.assert_close(found.confidence, p.max(1).values)
    lead = [float(row[y] - max(row[j] for j in range(3) if j != y)) for row, y in zip(p, split.y, strict=True)]
    torch.testing.assert_close(found.lead, torch.tensor(lead, dtype=torch.float64))
    assert torch.equal(found.example, torch.arange(50)) and not found.position.any()
    assert not found.tokens and found.classes == 3


def test_right_answers_and_calibration_are_those_of_the_probes():
    net, data = conv(), images(40)
    found = outputs(net, data, batch=7)
    task = Task(net, CrossEntropy(), Loader(data.test, 40, mean=data.mean, std=data.std))
    assert 100 * int(found.right.sum()) / 40 == pytest.approx(Accuracy()(task).value, abs=1e-12)
    wanted = Calibration(15)(task)
    assert found.calibration.value == pytest.approx(wanted.value, rel=1e-5)
    assert {k: v for k, v in found.calibration.parts.items() if k.endswith("count")} == {
        k: v for k, v in wanted.parts.items() if k.endswith("count")
    }


def test_the_network_its_modes_and_the_random_numbers_are_left_alone():
    net = conv().train()
    net[1].eval()
    state, before, modes = copy.deepcopy(net.state_dict()), torch.get_rng_state(), [m.training for m in net.modules()]
    one, two = outputs(net, images()), outputs(net, images())
    assert torch.equal(one.logits, two.logits)  # no dropout
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert not one.logits.requires_grad


def test_a_network_that_gives_nan_is_named_and_left_without_hooks():
    net = mlp()
    with torch.no_grad():
        net[2].weight[1, 1] = torch.nan
    with pytest.raises(DataError, match=r"network 'thin': .* logits are NaN"):
        outputs(net, features(), name="thin")
    assert not any(module._forward_hooks for module in net.modules())


def test_a_bfloat16_network_gets_inputs_of_its_type():
    net, data = conv().bfloat16(), images()
    found = outputs(net, data)
    assert found.logits.dtype == torch.bfloat16
    again = functional.linear(found.features.x, found.features.weight, found.features.bias)
    torch.testing.assert_close(again, found.logits, rtol=2e-2, atol=2e-2)
    assert found.confidence.dtype == torch.float64


# Heads without features


class After(nn.Module):
    """A linear layer with something behind it."""

    def __init__(self, what):
        super().__init__()
        self.one, self.two, self.what = nn.Linear(6, 5).double(), nn.Linear(5, 3).double(), what

    def forward(self, x):
        return self.what(self.two(self.one(x)))


def attention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(3, 1, batch_first=True)

        def forward(self, x):
            return self.attend(*[x.reshape(len(x), 2, 3)] * 3)[0].sum(1)

    return Attends().double()


@pytest.mark.parametrize(
    "net, why",
    [
        (After(torch.square), "convolution; the last linear layer called is `two`"),
        (After(lambda x: x.add_(1)), "the last linear layer called is `two`"),
        (nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 3, 1), nn.Flatten()).double(), NOT_CALLED),
        (attention(), NOT_CALLED),
        (Fixed(), NOT_CALLED),
    ],
)
def test_a_head_that_is_not_linear_has_answers_but_no_features(net, why):
    split = features(20)
    found = outputs(net, split)
    assert found.features is None and why in found.refused
    assert len(found.answers) == 20
    assert not any(module._forward_hooks for module in net.modules())


def test_what_looks_linear_in_the_first_batch_only_is_refused():
    net, split = After(torch.relu), features(8)
    with torch.no_grad():
        net.two.weight.copy_(torch.ones(3, 5))
        net.two.bias.fill_(0.0)
        net.one.weight.copy_(torch.eye(6)[:5])
        net.one.bias.fill_(0.0)
    x = split.x.abs()
    x[4:] *= -1  # from the second batch on the relu shows
    found = outputs(net, Split(x, split.y), batch=4)
    assert found.features is None and "some examples only" in found.refused
    assert outputs(net, Split(x[:4], split.y[:4]), batch=4).features is not None


def test_a_head_that_is_called_by_keyword_and_widened_is_found():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3, bias=False)

        def forward(self, x):
            return self.head(input=x).double()

    split = features(9, dtype=torch.float32)
    found = outputs(Named(), split)
    assert torch.equal(found.features.x, split.x) and found.features.bias is None


def test_a_layer_called_twice_gives_the_inputs_of_its_last_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 6).double()

        def forward(self, x):
            return self.head(self.head(x))

    net, split = Twice(), features(9)
    torch.testing.assert_close(outputs(net, split).features.x, net.head(split.x).detach())


# Tokens


def test_tokens_that_do_not_count_are_left_out():
    x = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
    y = torch.tensor([[-100, 2, -100, 3], [5, 6, -100, -100]])
    net = Tagger()
    found = outputs(net, Split(x, y), batch=1)
    logits = net(x).detach()
    assert found.labels.tolist() == [2, 3, 5, 6]
    assert found.example.tolist() == [0, 0, 1, 1] and found.position.tolist() == [1, 3, 0, 1]
    assert found.answers.tolist() == [int(logits[i, j].argmax()) for i, j in ((0, 1), (0, 3), (1, 0), (1, 1))]
    assert found.tokens and found.logits is None and found.features is None and found.refused == SEQUENCES


def test_examples_that_do_not_count_have_no_features():
    split = features(6)
    y = torch.tensor([0, -100, 1, -100, -100, 2])
    found = outputs(mlp(), Split(split.x, y), batch=2)
    whole = outputs(mlp(), split)
    assert found.example.tolist() == [0, 2, 5]
    torch.testing.assert_close(found.features.x, whole.features.x[[0, 2, 5]])


def test_data_without_a_label_and_labels_without_a_class_are_refused():
    split = features(4)
    with pytest.raises(DataError, match="no label counts"):
        outputs(mlp(), Split(split.x, torch.full((4,), -100)))
    with pytest.raises(DataError, match=r"4 labels are not in 0\.\.2"):
        outputs(mlp(), Split(split.x, torch.full((4,), 3)))
    one, two = (outputs(mlp(), features(6, seed=seed)) for seed in (0, 1))
    with pytest.raises(DataError, match="different labels"):
        alike(one, two)


# How sure it is


def test_bins_and_histograms_by_hand():
    x = torch.log(torch.tensor([[0.92, 0.04, 0.04], [0.5, 0.3, 0.2], [0.1, 0.32, 0.58], [0.2, 0.45, 0.35]]).double())
    found = outputs(Fixed(), Split(x, torch.tensor([0, 1, 2, 0])))
    table = certainty(found)
    # confidences 0.92 and 0.58 right, 0.5 and 0.45 wrong
    filled = {i: (row["count"], row["accuracy"]) for i, row in enumerate(table["bins"]) if row["count"]}
    assert filled == {6: (1, 0.0), 7: (1, 0.0), 8: (1, 1.0), 13: (1, 1.0)}
    assert table["bins"][0]["confidence"] is None and len(table["bins"]) == 15
    assert table["ece"].value == pytest.approx((0.08 + 0.5 + 0.42 + 0.45) / 4)
    torch.testing.assert_close(found.lead, torch.tensor([0.88, -0.2, 0.26, -0.25], dtype=torch.float64))
    hist = table["leads"]
    assert sum(hist["right"]) == 2 and sum(hist["wrong"]) == 2
    assert hist["right"][37] == 1 and hist["right"][25] == 1  # (0.85, 0.9] and (0.25, 0.3]


def test_a_histogram_counts_each_value_once_at_its_ends_too():
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, False, True])
    table = histogram(values, right, -1.0, 1.0, 4)
    assert table["edges"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert table["right"] == [1, 1, 0, 1] and table["wrong"] == [1, 0, 1, 0]


def test_one_class_is_sure_and_right():
    found = outputs(Fixed(), Split(answering([0, 0], 1), torch.tensor([0, 0])))
    assert found.confidence.tolist() == [1.0, 1.0] and found.lead.tolist() == [1.0, 1.0]
    assert certainty(found)["ece"].value == 0.0
