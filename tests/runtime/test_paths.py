"""The choice between lists and blocks: measured, remembered, and never a change of the result."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from secateur import _native
from secateur.core.errors import UsageError
from secateur.runtime import Session, measured
from secateur.runtime.compiled import compile_network

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"no compiled core: {_native.why_not()}")


@pytest.fixture
def plan(tmp_path):
    """Two layers that are half zero, one grouped, and a shortcut that is summed within another layer."""
    torch.manual_seed(0)
    net = Two().eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data *= torch.rand_like(weight) < 0.5
    return compile_network(net, torch.randn(2, 8, 12, 12), threads=1).save(tmp_path / "plan.safetensors")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.alone = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.inner, self.short = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(16, 12, 1)

    def forward(self, x):
        x = torch.relu(self.alone(torch.relu(self.two(torch.relu(self.one(x))))))
        return self.inner(torch.tanh(x)) + self.short(x)


def test_what_was_measured_is_remembered(plan, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 8, 12, 12)).astype(np.float32)
    cache = tmp_path / "cache"
    first = measured(plan, x, threads=1, cache=cache)
    known = json.loads((cache / "paths.json").read_text())
    assert len(known) == 2  # `one` and `two`; the grouped layer and the two that are summed are left to the rule
    assert all(set(times) == {"lists", "blocks"} and min(times.values()) > 0 for times in known.values())
    before = (cache / "paths.json").stat().st_mtime_ns
    assert measured(plan, x, threads=1, cache=cache) == first
    assert (cache / "paths.json").stat().st_mtime_ns == before
    assert len(json.loads((cache / "paths.json").read_text())) == 2
    measured(plan, x[:1], threads=1, isa="base", cache=cache)
    assert len(json.loads((cache / "paths.json").read_text())) == 4


@pytest.mark.parametrize("faster", ["lists", "blocks"])
def test_the_memory_decides_and_the_result_stays(plan, tmp_path, faster):
    x = np.random.default_rng(1).standard_normal((1, 8, 12, 12)).astype(np.float32)
    measured(plan, x, threads=1, cache=tmp_path)
    place = tmp_path / "paths.json"
    known = json.loads(place.read_text())
    place.write_text(json.dumps({key: {"lists": 2.0, "blocks": 2.0, faster: 1.0} for key in known}))
    tuning = measured(plan, x, threads=1, cache=tmp_path)
    with Session(plan, threads=1) as plain, Session(plan, threads=1, tuning=tuning) as tuned:
        np.testing.assert_allclose(tuned(x), plain(x), rtol=0, atol=1e-5)
        steps = {step["node"]: step for step in tuned.explain(1)["steps"] if step["path"] in ("lists", "blocks")}
    chosen = {node: step["path"] for node, step in steps.items() if node in ("one", "two")}
    assert chosen == {"one": faster, "two": faster}
    assert all(steps[node]["reason"] == "chosen by tuning" for node in tuning["layers"])


def test_a_near_tie_keeps_the_rule(plan, tmp_path):
    x = np.zeros((1, 8, 12, 12), np.float32)
    measured(plan, x, threads=1, cache=tmp_path)
    place = tmp_path / "paths.json"
    near = {key: {"lists": 1.0, "blocks": 0.98} for key in json.loads(place.read_text())}
    place.write_text(json.dumps(near))
    assert measured(plan, x, threads=1, cache=tmp_path) == {"layers": {}}


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": {"lists": 1}}', '{"a": 3}', "\x00"])
def test_a_damaged_memory_counts_for_nothing(plan, tmp_path, content):
    (tmp_path / "paths.json").write_text(content)
    x = np.zeros((1, 8, 12, 12), np.float32)
    assert "layers" in measured(plan, x, threads=1, cache=tmp_path)
    assert len(json.loads((tmp_path / "paths.json").read_text())) == 2


def test_a_folder_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("")
    x = np.zeros((1, 8, 12, 12), np.float32)
    assert "layers" in measured(plan, x, threads=1, cache=tmp_path / "file" / "cache")


def test_it_needs_inputs(plan):
    with pytest.raises(UsageError, match="one batch"):
        measured(plan)


def test_a_compiled_network_measures_each_of_its_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    torch.manual_seed(1)
    net, x = Broken().eval(), torch.randn(2, 3, 9, 9)
    fast = compile_network(net, x, threads=1, measure_paths=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=0, atol=1e-5)
    assert len(json.loads((tmp_path / "paths.json").read_text())) == 2
