"""AC/DC: phases change masks at their beginnings only, and dense ones start where sparse ones ended."""

import copy

import pytest
import torch
from torch import nn

from secateur.core.allocations import ByCost, Uniform
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.select import threshold
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.acdc import Acdc
from secateur.testing.rules_contract import check_rule

PHASES = (0.2, 0.2, 0.2, 0.4)


def data(batch=4):
    random = stream(0, "data")
    x = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), batch, shuffle=True, dtype=torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Diary:
    """Trains, and writes down weights, masks and loss after every step."""

    def __init__(self, rule, masks=None, epochs=10, **options):
        self.weights, self.masks, self.losses, self.momenta = [], [], [], []
        step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, "weight_decay": 0.01, **options})
        self.training = Training(net(), data(), step, masks=masks, watch=self.watch)
        self.result = self.training.fit()

    def watch(self, figures):
        if "train/loss" in figures:
            run = self.training.run
            self.weights.append(copy.deepcopy(run.model.state_dict()))
            self.masks.append(run.masks)
            self.losses.append(figures["train/loss"])
            self.momenta.append(sum(len(s) for s in run.optimizer.state.values()))


def test_sparse_phases_hold_k_weights_and_dense_ones_all():
    """Card test (a): 30 steps, sparse are 6..11 and 18..29; pruned entries stay 0; each phase has one mask."""
    diary = Diary(Acdc(sparsity=0.8, phases=PHASES), lr=1.0)

    keep = keep_for(0.8, diary.result.total)
    for done, (weights, masks) in enumerate(zip(diary.weights, diary.masks, strict=True), 1):
        sparse = 6 <= done < 12 or done >= 18
        assert masks.kept == (keep if sparse else masks.total), done
        alive = sum(int((weights[name] != 0).sum()) for name in masks)
        assert alive <= keep if sparse else alive == masks.total or done in (12, 13)
    assert len({m.digest for m in diary.masks[5:11]}) == len({m.digest for m in diary.masks[17:]}) == 1
    assert diary.masks[5] != diary.masks[17]
    assert diary.result == diary.masks[-1]


def test_compression_keeps_the_largest_weights_of_all_layers():
    """The projection: after step 18 what is kept is what lies above the k-th magnitude before it."""
    diary = Diary(Acdc(sparsity=0.8, phases=PHASES))
    keep = diary.result.kept

    plain = Diary(Acdc(sparsity=0.8, phases=PHASES, allocation=Uniform()))

    kept = [diary.weights[17][name][diary.masks[17][name]].abs() for name in diary.result]
    assert sum(k.numel() for k in kept) == keep
    before = diary.weights[16]
    cut = threshold([before[name].abs() for name in diary.result], keep + 20).value
    assert all(bool((before[name][diary.masks[17][name]].abs() >= cut).all()) for name in diary.result)
    shares = [count / plain.result[name].numel() for name, count in plain.result.counts().items()]
    assert max(shares) - min(shares) < 1 / 48 + 1e-12


def test_dense_phases_start_at_the_sparse_point():
    """Card test (b): decompression moves no weight, so the next loss is that of the sparse network; momentum is new."""
    diary = Diary(Acdc(sparsity=0.8, phases=PHASES))
    sparse = net()
    sparse.load_state_dict(diary.weights[11])
    x, y = next(data().epoch(4))

    loss = nn.functional.cross_entropy(sparse(x), y)

    assert diary.masks[10].kept < diary.masks[11].kept == diary.result.total
    gone = {name: ~diary.masks[10][name] for name in diary.result}
    assert all((diary.weights[11][name][mask] == 0).all() for name, mask in gone.items())
    assert diary.losses[12] == loss.item()
    assert diary.momenta[11] == 0 and diary.momenta[12] > 0


def test_before_the_first_compression_it_is_plain_training():
    """Card test (c): the dense warm-up equals SGD with momentum to the bit, and so does a run that prunes nothing."""
    plain = Diary(None)

    warm, never = Diary(Acdc(sparsity=0.8, phases=PHASES)), Diary(Acdc(sparsity=0.0, phases=PHASES))

    for step in range(30):
        for name, weight in plain.weights[step].items():
            assert torch.equal(weight, never.weights[step][name])
            assert step > 4 or torch.equal(weight, warm.weights[step][name])


def test_the_optimizer_begins_anew_with_a_dense_phase():
    """Adam after decompression takes the steps of an Adam made at that point (bias correction restarts too)."""
    diary = Diary(Acdc(sparsity=0.8, phases=PHASES), optimizer="adam", lr=0.01, schedule="constant", weight_decay=0.0)
    fresh = net()
    fresh.load_state_dict(diary.weights[11])
    optimizer = torch.optim.Adam(fresh.parameters(), 0.01)

    for x, y in data().epoch(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(fresh(x), y).backward()
        optimizer.step()

    assert all(torch.equal(w, diary.weights[14][name]) for name, w in fresh.state_dict().items())


def test_masks_it_came_with_are_lifted():
    """A pruned network becomes dense first; its zeros may move."""
    half = Masks({name: torch.rand(m.shape) < 0.5 for name, m in Masks.dense(net()).items()})

    diary = Diary(Acdc(sparsity=0.8, phases=PHASES), masks=half)

    assert diary.masks[0].kept == half.total
    assert diary.result.kept == keep_for(0.8, half.total)


def test_the_paper_s_schedule_is_understood():
    """100 epochs: dense 0-9, 13 phases of 5 from sparse at 10, dense 75-84, sparse 85-99."""
    rule = Acdc(phases=(0.1, *(0.05,) * 13, 0.1, 0.15))

    assert rule.starts(100) == [*range(10, 80, 5), 85]
    assert len(rule.phases) % 2 == 0
    check_rule(Acdc(sparsity=0.5, phases=(0.2, 0.2, 0.2, 0.4)), ["tanh_mlp"], epochs=5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"phases": (0.2, 0.3, 0.5)}, UsageError, "the run would end dense"),
        ({"phases": ()}, UsageError, "0 entries"),
        ({"phases": (0.5, 0.6)}, UsageError, "sum to 1.1"),
        ({"phases": (1.5, -0.5)}, UsageError, "positive shares"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Acdc(**options)


def test_phases_shorter_than_an_epoch_are_refused():
    """With the number of epochs that would do."""
    with pytest.raises(UsageError, match="the shortest phase has 1 steps, an epoch 3.*Train for 10 epochs or more"):
        Diary(Acdc(), epochs=5)
    with pytest.raises(BudgetError, match="would empty whole layers"):
        Diary(Acdc(sparsity=0.995))


def test_recipes_can_hold_it():
    rule = Acdc(sparsity=0.5, phases=PHASES, allocation=Uniform())

    assert value_of(Rule, table_of(rule), "rule") == rule
