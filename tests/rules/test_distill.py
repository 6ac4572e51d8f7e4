"""Distillation: gradients against closed forms, and what must not matter does not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.hold import Hold
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.distill import Distill
from secateur.testing.cases import attention, tanh_mlp


class Fixed(nn.Module):
    """Gives the same logits whatever it is given; its one weight is trainable."""

    def __init__(self, logits):
        super().__init__()
        self.logits_ = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits_


def real(*shape, name="x"):
    return torch.randn(*shape, generator=stream(0, name), dtype=torch.float64)


def run_of(student, teacher):
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    masks = Masks({"logits_": torch.ones_like(student.logits_, dtype=torch.bool)})
    return Run(student, optimizer, Hold(masks, student, optimizer), 10, 5, teacher=teacher)


def mixed(rule, s, t, target):
    """Value of the mixed loss and its gradient by the student's logits."""
    student, teacher = Fixed(s), Fixed(t)
    run = run_of(student, teacher)
    rule.begin(run)
    output = student(None)
    loss = rule.loss(run, CrossEntropy()(output, target), (torch.zeros(1), target), output)
    loss.backward()
    assert teacher.logits_.grad is None
    return loss.item(), student.logits_.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gradient_is_the_analytic_one(temperature, alpha):
    """Card test (a): a (softmax(s) - y) + (1-a) T (softmax(s/T) - softmax(t/T)), over N examples; 1e-12."""
    s, t, target = real(7, 5), 3 * real(7, 5, name="t"), torch.arange(7) % 5

    value, slope = mixed(Distill(temperature, alpha), s, t, target)

    hard = s.softmax(1) - functional.one_hot(target, 5)
    soft = temperature * ((s / temperature).softmax(1) - (t / temperature).softmax(1))
    torch.testing.assert_close(slope, (alpha * hard + (1 - alpha) * soft) / 7, rtol=0, atol=1e-12)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    plain = -s.log_softmax(1)[torch.arange(7), target].mean()
    assert abs(value - (alpha * plain + (1 - alpha) * temperature**2 * kl).item()) < 1e-12


def test_high_temperature_is_matching_of_logits():
    """Card test (b): T = 1e4 and centred logits: the gradient tends to (s - t) / K."""
    s, t = (x - x.mean(1, keepdim=True) for x in (real(3, 6), real(3, 6, name="t")))

    _, slope = mixed(Distill(1e4, 0.0), s, t, torch.zeros(3).long())
    _, single = mixed(Distill(1e4, 0.0), s.float(), t.float(), torch.zeros(3).long())

    torch.testing.assert_close(3 * slope, (s - t) / 6, rtol=0, atol=1e-4)
    torch.testing.assert_close(3 * single.double(), (s - t) / 6, rtol=0, atol=1e-3)


def test_equal_logits_give_no_loss_and_no_gradient():
    """Card test (c)."""
    s = real(4, 5)

    value, slope = mixed(Distill(3.0, 0.0), s, s, torch.zeros(4).long())

    assert value == 0.0 and float(slope.abs().max()) < 1e-15


def test_a_constant_on_all_teacher_logits_changes_nothing():
    """Card test (d)."""
    s, t, target = real(4, 5), real(4, 5, name="t"), torch.zeros(4).long()

    one, other = mixed(Distill(2.0, 0.2), s, t, target), mixed(Distill(2.0, 0.2), s, t + 100, target)

    assert abs(one[0] - other[0]) < 1e-12
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-13)


def training(rule, task, teacher, **options):
    pairs = list(task.data)
    split = Split(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
    rules = () if rule is None else (rule,)
    step = TrainStep(epochs=4, lr=0.1, rules=rules, **options)
    loader = Loader(split, 4, shuffle=True, dtype=split.x.dtype)
    made = Training(task.model, loader, step, teacher=teacher)
    made.fit()
    return task.model.state_dict()


def test_alpha_one_is_plain_training_to_the_bit():
    """Card test (e), with dropout and label smoothing."""
    plain = training(None, attention(), None, smoothing=0.1)

    distilled = training(Distill(alpha=1.0), attention(), attention(seed=1).model, smoothing=0.1)

    assert all(torch.equal(plain[name], distilled[name]) for name in plain)


def test_the_teacher_is_used_in_evaluation_mode_and_left_alone():
    """A teacher handed over in training mode, with dropout, teaches as in evaluation mode, and draws no numbers."""
    loud, quiet = attention(seed=1).model.train(), attention(seed=1).model.eval()
    before = copy.deepcopy(loud.state_dict())

    one = training(Distill(), attention(), loud)
    other = training(Distill(), attention(), quiet)

    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], tensor) for name, tensor in loud.state_dict().items())
    assert all(p.grad is None for p in loud.parameters())


def test_a_student_with_only_soft_targets_reaches_its_teacher():
    """alpha = 0, no label used: the difference from a teacher of the same shape nearly vanishes."""
    task, teacher = tanh_mlp(batches=(16, 16)), tanh_mlp(batches=(16, 16), seed=1).model
    pairs = [(x, torch.zeros(len(x)).long()) for x, _ in task.data]
    loader = Loader(Split(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])), 16, dtype=torch.float64)
    step = TrainStep(epochs=200, optimizer="adam", lr=0.02, rules=(Distill(2.0, 0.0),))

    def gap():
        with torch.no_grad():
            return max(float((task.model(x).softmax(1) - teacher(x).softmax(1)).abs().max()) for x, _ in pairs)

    before = gap()

    Training(task.model, loader, step, teacher=teacher).fit()

    assert before > 0.5 and gap() < 0.1


def test_padding_does_not_count_in_sequences():
    """(N, T, V): the mean runs over tokens whose target is not -100, whatever the others hold."""
    s, t = real(2, 3, 4), real(2, 3, 4, name="t")
    target = torch.tensor([[1, 2, -100], [0, -100, -100]])
    rule = Distill(2.0, 0.25)

    value, slope = mixed(rule, s, t, target)
    s[target == -100] = 1e3
    again, _ = mixed(rule, s, t, target)

    counted = target != -100
    p, q = (t[counted] / 2).softmax(-1), (s[counted] / 2).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    plain = functional.cross_entropy(s[counted], target[counted])
    assert abs(value - (0.25 * plain + 0.75 * 4 * kl).item()) < 1e-12
    assert value == again and (slope[~counted] == 0).all()


def test_half_precision_logits_are_compared_in_float32():
    """bfloat16 outputs at a low temperature overflow nothing and give a float32 loss."""
    s, t = (100 * real(4, 5)).bfloat16(), (100 * real(4, 5, name="t")).bfloat16()

    loss = Distill(0.1, 0.0).divergence(s, t)

    exact = Distill(0.1, 0.0).divergence(s.double(), t.double())
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 1e-5 * exact.item()


def test_networks_that_do_not_fit_are_refused():
    """No teacher, other classes, shared weights."""
    student = Fixed(real(2, 5))
    with pytest.raises(UsageError, match="there is no teacher. Set `teacher`"):
        Distill().begin(run_of(student, None))
    with pytest.raises(UsageError, match="share weights"):
        Distill().begin(run_of(student, student))
    run = run_of(student, Fixed(real(2, 6)))
    output = student(None)
    with pytest.raises(UsageError, match=r"shape \(2, 6\), the student's \(2, 5\)"):
        Distill().loss(run, output.sum(), (torch.zeros(1), torch.zeros(2).long()), output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"alpha": 1.5}, r"alpha is 1.5; it must be in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha is -0.1"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Distill(**options)


def test_recipes_can_hold_it():
    rule = Distill(2.0, 0.5)

    assert value_of(Rule, table_of(rule), "rule") == rule
