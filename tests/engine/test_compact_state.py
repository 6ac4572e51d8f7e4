"""The train step's ``compact_state``: the weights of dense state under every kind of rule, resumed to the bit."""

import shutil

import pytest
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.checkpoint import STATE
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.acdc import Acdc
from secateur.rules.gradual import Gradual
from secateur.rules.rigl import Rigl
from secateur.rules.set import Set
from secateur.rules.topkast import Topkast

RULES = {
    "acdc": Acdc(sparsity=0.7),
    "gradual": Gradual(sparsity=0.8),
    "rigl": Rigl(sparsity=0.7, alpha=0.5, every=3),
    "set": Set(sparsity=0.7),
    "topkast": Topkast(sparsity=0.7, backward=0.4, every=3),
}
OPTIMIZERS = {
    "sgd": {"nesterov": True, "weight_decay": 0.01, "clip": 1.0},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.3, "ema": 0.9},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.001},
}


def training(rule, options, compact, folder=None, watch=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)).double()
    x = torch.randn(12, 6, generator=stream(0, "data"), dtype=torch.float64)
    loader = Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=torch.float64)
    given = {"lr": 0.1, **options}
    step = TrainStep(epochs=10, rules=(RULES[rule],), compact_state=compact, save_every=1, **given)
    return Training(model, loader, step, folder=folder, watch=watch)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_weights_are_those_of_dense_state(rule, name):
    one, other = (training(rule, OPTIMIZERS[name], compact) for compact in (False, True))

    dense, compact = one.fit(), other.fit()

    assert dense.digest == compact.digest and dense.kept < dense.total
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, rule, name):
    stops = (4, 16, 25)

    def copied(row):
        if row["step"] in stops and "train/loss" not in row or row["step"] - 1 in stops:
            target = tmp_path / str(row["step"])
            target.mkdir(exist_ok=True)
            shutil.copyfile(tmp_path / "whole" / STATE, target / STATE)

    (tmp_path / "whole").mkdir()
    whole = training(rule, OPTIMIZERS[name], True, tmp_path / "whole", copied)
    wanted = whole.fit()
    folders = [folder for folder in tmp_path.iterdir() if folder.name != "whole"]
    assert len(folders) >= 3

    for folder in folders:
        again = training(rule, OPTIMIZERS[name], True, folder)
        assert again.fit().digest == wanted.digest
        state = again.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in whole.model.state_dict().items())


def test_the_state_is_as_small_as_the_network():
    run = training("rigl", OPTIMIZERS["adamw"], True)
    masks = run.fit()

    state = run.run.optimizer.state.values()
    entries = sum(v.numel() for each in state for v in each.values() if isinstance(v, torch.Tensor) and v.dim())
    biases = 16 + 3
    assert masks.kept == 44 and Masks.dense(run.model).total == 144
    assert entries == 2 * (masks.kept + biases)
