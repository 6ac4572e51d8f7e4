"""A batch run in pieces gives what it gives whole; networks that mix their examples are never cut."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur import _native
from secateur.nets import build
from secateur.runtime.compiled import compile_network
from secateur.runtime.session import Session

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"no compiled core: {_native.why_not()}")


class Merged(nn.Module):
    """Folds tokens into the batch and back, with a token of its own in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        y = torch.relu(self.one(x.reshape(-1, 6)))
        return self.two(y).reshape(x.shape[0], -1, 4) + torch.arange(4.0)


class OverExamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Between(nn.Module):
    """Every example against every other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(0, 1), 1)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.permute(1, 0, 2)).permute(1, 0, 2)


CUT = {
    "resnet20": (lambda: build("resnet20"), (3, 32, 32)),
    "vit_tiny": (lambda: build("vit_tiny"), (3, 32, 32)),
    "merged": (Merged, (7, 6)),
    "gru": (lambda: Last(), (5, 6)),
}
WHOLE = {"over examples": (OverExamples, (5,)), "between": (Between, (5,)), "turned": (Turned, (4, 6))}


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("piece", [1, 2, 3, 5])
def test_pieces_give_what_the_whole_gives(name: str, piece: int, tmp_path) -> None:
    torch.manual_seed(0)
    make, shape = CUT[name]
    net = make().eval()
    path = compile_network(net, torch.randn(2, *shape)).save(tmp_path)
    x = torch.randn(5, *shape)
    with torch.no_grad():
        wanted = net(x).numpy()
    with Session(path, threads=2, tuning={"piece": piece}) as session:
        found = session(x.numpy())
        assert session.explain(5)["piece"] == min(piece, 5)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_examples_is_not_cut(name: str, tmp_path) -> None:
    make, shape = WHOLE[name]
    net = make().eval()
    path = compile_network(net, torch.randn(3, *shape)).save(tmp_path)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        wanted = net(x).numpy()
    with Session(path, threads=1, tuning={"piece": 1}) as session:
        found = session(x.numpy())
        assert session.explain(4)["piece"] == 4 or name == "turned"
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_large_maps_are_cut_by_themselves(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1)).eval()
    path = compile_network(net, torch.randn(1, 3, 112, 112)).save(tmp_path)
    x = torch.randn(5, 3, 112, 112)
    with Session(path, threads=2) as session:
        found = session(x.numpy())
        assert session.explain(5)["piece"] == 1
    with torch.no_grad():
        assert np.abs(found - net(x).numpy()).max() < 1e-4
