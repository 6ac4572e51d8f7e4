"""Networks compiled from torch: the same results, files that come back, parts that stay in torch, refusals."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import _native
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.task import Task
from secateur.engine.compiling import FromFile, clock
from secateur.nets import build
from secateur.probes.accuracy import Accuracy
from secateur.runtime.compiled import Compiled, compile_network
from secateur.runtime.session import Session

needs_core = pytest.mark.skipif(_native.library() is None, reason=f"no compiled core: {_native.why_not()}")


def sparse(net: nn.Module, zeros: float = 0.8) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.data.normal_(0, 0.1)
            module.running_var.data.uniform_(0.5, 1.5)
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data.masked_fill_(torch.rand_like(weight) < zeros, 0.0)
    return net.eval()


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class Sines(nn.Module):
    """Two layers with an operator between them that the core lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.sin(self.one(x)))


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x * y


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5", "vgg11", "resnet20", "wide_resnet", "vit_tiny"])
@pytest.mark.parametrize("batch", [1, 9])
def test_compiled_networks_compute_what_torch_does(name: str, batch: int) -> None:
    torch.manual_seed(1)
    net = sparse(build(name))
    shape = (1, 28, 28) if name.startswith("lenet") else (3, 32, 32)
    fast = compile_network(net, torch.randn(2, *shape), threads=2)
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        assert gap(fast(x), net(x)) < 1e-5
    assert fast.whole


def test_tensors_give_tensors_and_arrays_arrays() -> None:
    fast = compile_network(nn.Linear(5, 3), torch.randn(1, 5), threads=1)
    x = torch.randn(4, 5)
    assert isinstance(fast(x), Tensor)
    assert isinstance(fast(x.numpy()), np.ndarray)
    assert np.array_equal(fast(x).numpy(), fast(x.numpy()))


def test_the_network_is_left_as_it_was() -> None:
    net = build("resnet20").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    compile_network(net, torch.randn(2, 3, 32, 32), threads=1)
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_saved_plans_come_back_to_the_bit(tmp_path) -> None:
    net = sparse(build("resnet20"))
    fast = compile_network(net, torch.randn(2, 3, 32, 32), threads=2)
    path = fast.save(tmp_path)
    assert path == tmp_path / "plan.safetensors"
    x = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    with secateur.runtime.load(tmp_path, threads=2) as back:
        assert np.array_equal(back(x), fast(x))
    assert np.abs(Session(path, reference=True)(x) - fast(x)).max() <= 1e-5 * np.abs(fast(x)).max()


def test_a_sparse_plan_is_small(tmp_path) -> None:
    net = sparse(build("resnet_cifar", width=64), 0.9)
    size = compile_network(net, torch.randn(2, 3, 32, 32)).save(tmp_path).stat().st_size
    assert size <= 0.22 * 4 * sum(p.numel() for p in net.parameters())


def test_unknown_operators_stay_in_torch_and_are_named(tmp_path) -> None:
    net = Sines().eval()
    fast = compile_network(net, torch.randn(2, 7), threads=1)
    x = torch.randn(5, 7)
    with torch.no_grad():
        assert gap(fast(x), net(x)) < 1e-5
    rows = fast.explain(x)
    assert [row["path"] for row in rows].count("torch") == 1
    assert "sin" in next(row["op"] for row in rows if row["path"] == "torch")
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    with pytest.raises(ModelError, match="sin"):
        fast.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="sin"):
        compile_network(net, torch.randn(2, 7), strict=True)


def test_several_inputs_and_results() -> None:
    fast = compile_network(Pair(), (torch.randn(2, 6), torch.randn(2, 6)), threads=1)
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    total, product = fast(a, b)
    assert torch.equal(total, a + b) and torch.equal(product, a * b)
    with pytest.raises(UsageError, match="1 inputs given, the network takes 2"):
        fast(a)


@needs_core
def test_explain_counts_the_zeros_of_each_layer() -> None:
    net = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    rows = [r for r in compile_network(net, torch.randn(1, 3, 9, 9)).explain(torch.randn(1, 3, 9, 9)) if r["weights"]]
    assert [(r["nonzeros"], r["weights"]) for r in rows] == [
        (int((net[i].weight != 0).sum()), net[i].weight.numel()) for i in (0, 2)
    ]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s: s(np.zeros((1, 4), np.float32)), "the network takes \\['batch', 5\\]"),
        (lambda s: s(np.zeros((0, 5), np.float32)), "the network takes"),
        (lambda s: s(np.zeros((1, 5), np.complex64)), "complex64"),
        (lambda s: s(), "0 inputs given"),
    ],
)
def test_wrong_inputs_are_named(tmp_path, call, says: str) -> None:
    compile_network(nn.Linear(5, 3), torch.randn(1, 5)).save(tmp_path)
    with Session(tmp_path, threads=1) as session, pytest.raises(UsageError, match=says):
        call(session)


def test_wrong_options_are_named(tmp_path) -> None:
    compile_network(nn.Linear(5, 3), torch.randn(1, 5)).save(tmp_path)
    with pytest.raises(UsageError, match="threads is 0"):
        Session(tmp_path, threads=0)
    with pytest.raises(FileError, match="there is no plan at"):
        Session(tmp_path / "nothing")
    if _native.library() is not None:
        with pytest.raises(UsageError, match="isa 'z80' is not one of"):
            Session(tmp_path, isa="z80")
        with pytest.raises(UsageError, match="more than the limit"):
            Session(tmp_path, memory_limit=64)(np.zeros((1, 5), np.float32))
        closed = Session(tmp_path, threads=1)
        closed.close()
        with pytest.raises(UsageError, match="closed"):
            closed(np.zeros((1, 5), np.float32))


def test_compile_takes_networks_folders_and_plans(tmp_path) -> None:
    net = nn.Linear(5, 3)
    with pytest.raises(UsageError, match="needs one batch of its inputs"):
        secateur.compile(net)
    with pytest.raises(UsageError, match="pass example_inputs"):
        secateur.compile(tmp_path)
    fast = secateur.compile(net, torch.randn(1, 5), threads=1)
    assert isinstance(fast, Compiled)
    fast.save(tmp_path)
    assert isinstance(secateur.compile(tmp_path, threads=1), Session)


def test_the_clock_reads_the_plan_from_disk(tmp_path) -> None:
    net = sparse(build("lenet_300_100"))
    made = clock(build("lenet_300_100").eval(), net, torch.randn(1, 1, 28, 28), tmp_path, 1)
    assert (tmp_path / "plan.safetensors").stat().st_size == made["plan"].value
    assert made["ratio"].low <= made["ratio"].value <= made["ratio"].high
    assert made["ratio"].value == pytest.approx(made["against"].value / made["compiled"].value)


def test_a_plan_on_disk_answers_as_the_network_does(tmp_path) -> None:
    """Its accuracy and its interval are those of the network in torch, batch by batch from the file."""
    torch.manual_seed(0)
    net = sparse(build("lenet_300_100")).eval()
    x = torch.randn(300, 1, 28, 28)
    labels = net(x).argmax(1)
    labels[::3] = torch.randint(0, 10, (100,))
    data = [(x[:128], labels[:128]), (x[128:256], labels[128:256]), (x[256:], labels[256:])]
    path = secateur.compile(net, x[:1], threads=1).save(tmp_path)
    with Session(path, threads=1) as session:
        found = Accuracy()(Task(FromFile(session), CrossEntropy(), data))
    wanted = Accuracy()(Task(net, CrossEntropy(), data))
    assert (found.value, found.low, found.high, found.n) == (wanted.value, wanted.low, wanted.high, wanted.n)
    assert 60 < found.value < 90


def test_what_cannot_be_compiled_says_why(tmp_path) -> None:
    made = clock(Sines().eval(), Sines().eval(), torch.randn(1, 7), tmp_path, 1)
    assert "sin" in made["compiled"].note and "ratio" not in made
    assert not list(tmp_path.iterdir())
