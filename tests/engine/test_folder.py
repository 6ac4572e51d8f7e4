"""The folder: it loads without this library, its zeros are zeros, and what was changed is noticed."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.core.errors import FileError, MaskError, ModelError
from secateur.core.masks import Masks
from secateur.core.select import top_mask
from secateur.engine.folder import Artefact, card_digest, load_state, resolve, save, structure_of
from secateur.nets import build


def pruned(net, share=0.5):
    """The network with the smallest weights of every tensor set to zero, and its masks."""
    dense = Masks.dense(net)
    every = dense.match(net)
    masks = Masks({n: top_mask(every[n].detach().abs(), int(m.numel() * share)) for n, m in dense.items()})
    masks.apply_(net)
    return net, masks


def mlp(**options):
    torch.manual_seed(3)
    return build("mlp", (1, 8, 8), 10, widths=(12, 9), **options)


def artefact_of(folder, net, masks, options, use="mlp", shape=(1, 8, 8), outputs=10):
    """An artefact as a run writes it."""
    model = {"use": use, "options": options, "input_shape": list(shape), "outputs": outputs}
    card = {"do": "prune", "kept": masks.kept, "total": masks.total}
    return save(folder, net, masks, structure_of(net, model, {}), "# by hand\n", card)


@pytest.fixture
def made(tmp_path):
    """A small pruned artefact."""
    net, masks = pruned(mlp(batch_norm=True))
    return artefact_of(tmp_path / "a", net, masks, {"widths": [12, 9], "batch_norm": True})


def test_the_weights_load_without_secateur(made, tmp_path):
    """Torch, safetensors and a class written by hand give the outputs that ``Artefact.build`` gives."""
    script = textwrap.dedent(
        """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "secateur":
                    raise ImportError("secateur is not here")

        sys.meta_path.insert(0, Refuse())
        import torch
        from safetensors.torch import load_file, save_file
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1 = nn.Linear(64, 12, bias=False)
                self.bn1 = nn.BatchNorm1d(12)
                self.fc2 = nn.Linear(12, 9, bias=False)
                self.bn2 = nn.BatchNorm1d(9)
                self.head = nn.Linear(9, 10)

            def forward(self, x):
                x = torch.relu(self.bn1(self.fc1(x.flatten(1))))
                return self.head(torch.relu(self.bn2(self.fc2(x))))

        try:
            import secateur
        except ImportError:
            pass
        else:
            raise SystemExit("the hook does not work")
        net = Net()
        net.load_state_dict(load_file(sys.argv[1]), strict=True)
        x = load_file(sys.argv[2])["x"]
        with torch.no_grad():
            save_file({"y": net.eval()(x)}, sys.argv[3])
        assert not [name for name in sys.modules if name.partition(".")[0] == "secateur"]
        """
    )
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save_file

    save_file({"x": x}, tmp_path / "x.safetensors")
    words = [
        sys.executable,
        "-c",
        script,
        made.folder / "weights.safetensors",
        tmp_path / "x.safetensors",
        tmp_path / "y",
    ]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=quiet)
    assert done.returncode == 0, done.stderr

    with torch.no_grad():
        wanted = made.build()(x)
    torch.testing.assert_close(load_file(tmp_path / "y")["y"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_pruned_weights_are_all_zero_bits_in_the_file(tmp_path, dtype, bits):
    """Also those that the network holds as -0.0, which ``== 0`` does not tell apart."""
    net, masks = pruned(mlp().to(dtype))
    with torch.no_grad():
        net.fc1.weight[~masks["fc1.weight"]] = -0.0
    assert int((net.fc1.weight.detach().view(bits) != 0).sum()) > masks.counts()["fc1.weight"]

    state = artefact_of(tmp_path / "a", net, masks, {"widths": [12, 9]}).state()

    for name, mask in masks.items():
        assert int(state[name].view(bits)[~mask].count_nonzero()) == 0
        assert torch.equal(state[name][mask], net.get_parameter(name).detach()[mask])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fc1.weight", "head.bias"])
def test_a_network_that_is_not_finite_is_not_saved(tmp_path, value, name):
    """Nothing at all is written, not even the folder's first file."""
    net, masks = pruned(mlp())
    with torch.no_grad():
        net.get_parameter(name)[masks[name] if name in masks else ...] = value

    with pytest.raises(ModelError, match=f"`{name}` holds NaN or infinity"):
        artefact_of(tmp_path / "a", net, masks, {"widths": [12, 9]})

    assert not (tmp_path / "a").exists()


def test_a_pruned_weight_that_is_not_zero_is_not_saved(tmp_path):
    """One leaking weight is enough; the message counts it."""
    net, masks = pruned(mlp())
    with torch.no_grad():
        net.fc2.weight[~masks["fc2.weight"]] += torch.eye(1, int((~masks["fc2.weight"]).sum()))[0]

    with pytest.raises(MaskError, match=r"1 of 54 pruned weights of `fc2\.weight`"):
        artefact_of(tmp_path / "a", net, masks, {"widths": [12, 9]})

    assert not (tmp_path / "a").exists()


def test_opening_reads_back_what_was_saved(made):
    """Weights, masks and card; building gives the very network, in evaluation mode."""
    again = Artefact.open(made.folder)

    assert again.digest == made.digest
    assert again.masks() == made.masks() and again.masks().kept == again.card["kept"]
    net = again.build()
    assert not net.training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in again.state().items())
    assert again.card["files"].keys() == {"weights.safetensors", "masks.safetensors", "structure.json", "recipe.toml"}


@pytest.mark.parametrize("name", ["weights.safetensors", "masks.safetensors", "structure.json", "recipe.toml"])
def test_every_changed_file_is_noticed(made, name):
    """Any one byte changed, a byte more, a byte less, or the file gone."""
    path = made.folder / name
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(FileError, match=name):
            Artefact.open(made.folder)
    for other in (whole + b" ", whole[:-1], b""):
        path.write_bytes(other)
        with pytest.raises(FileError, match=name):
            Artefact.open(made.folder)
    path.unlink()
    with pytest.raises(FileError, match=name):
        Artefact.open(made.folder)
    path.write_bytes(whole)
    Artefact.open(made.folder)


@pytest.mark.parametrize("card", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"weights.safetensors": 7}}'])
def test_a_card_that_is_none_is_refused(made, card):
    """Not JSON, or JSON of another kind."""
    (made.folder / "card.json").write_text(card)

    with pytest.raises(FileError, match="card"):
        Artefact.open(made.folder)


def test_weights_of_another_network_are_refused_even_with_matching_digests(made, tmp_path):
    """Whoever mends the digest still cannot load weights that do not fit the structure."""
    net, masks = pruned(build("mlp", (1, 8, 8), 10, widths=(12, 8), batch_norm=True))
    other = artefact_of(tmp_path / "b", net, masks, {"widths": [12, 8], "batch_norm": True})
    card = json.loads((made.folder / "card.json").read_text())
    for name in ("weights.safetensors", "masks.safetensors"):
        (made.folder / name).write_bytes((other.folder / name).read_bytes())
        card["files"][name] = other.card["files"][name]
    (made.folder / "card.json").write_text(json.dumps({**card, "digest": card_digest(card)}))

    with pytest.raises(FileError, match="has shape"):
        Artefact.open(made.folder).build()


class Own(nn.Module):
    """A network from outside, with tied weights, a buffer and a type of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.a = nn.Linear(16, 16, bias=False)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.arange(16.0))

    def forward(self, x):
        return self.b(torch.relu(self.a(x + self.shift)))


def equal_networks(one, other):
    """State dicts equal in names, types and bits."""
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tied_weights_and_every_type_go_through_save_and_load(tmp_path, dtype):
    """A fresh instance filled from the folder is equal to the bit, and its tie still holds."""
    net, masks = pruned(Own().to(dtype))
    saved = secateur.save(tmp_path / "own", net, masks, notes={"by": "me"})
    assert saved.card["by"] == "me" and saved.structure["tied"] == {"a.weight": ["b.weight"]}

    with torch.no_grad():
        fresh = Own().to(dtype)
        for p in fresh.parameters():
            p.zero_()
    filled, found = secateur.load(tmp_path / "own", fresh)

    equal_networks(filled, net)
    assert filled is fresh and filled.a.weight is filled.b.weight
    assert found == masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_language_model_goes_through_save_and_load(tmp_path, dtype):
    """The head of a small GPT is its embedding: one tensor, one mask at most, and equal outputs afterwards."""
    options = {"vocab": 17, "length": 8, "dim": 16, "depth": 1, "heads": 2}
    torch.manual_seed(5)
    net, masks = pruned(build("gpt_tiny", None, None, **options).to(dtype))
    secateur.save(tmp_path / "gpt", net, masks)

    filled, found = secateur.load(tmp_path / "gpt", build("gpt_tiny", None, None, **options).to(dtype))

    equal_networks(filled, net)
    assert found == masks
    tokens = torch.arange(16).reshape(2, 8) % 17
    with torch.no_grad():
        assert torch.equal(filled.eval()(tokens), net.eval()(tokens))


def test_masks_are_read_off_the_zeros_by_default(tmp_path):
    """``save`` without masks takes exact zeros for pruned."""
    net, masks = pruned(mlp())

    secateur.save(tmp_path / "a", net)

    assert secateur.load(tmp_path / "a", mlp())[1] == masks


def test_saving_changes_nothing(tmp_path):
    """The network, its modes and its gradients are as they were; a -0.0 stays one in memory."""
    net, masks = pruned(mlp())
    net.train()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = copy.deepcopy(net.state_dict())

    secateur.save(tmp_path / "a", net, masks)

    assert net.training and torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert all(
        torch.equal(before[name].view(torch.int32), value.view(torch.int32)) for name, value in net.state_dict().items()
    )


def test_load_state_says_what_does_not_fit():
    """Missing, unknown and misshapen tensors, and leftovers of torch's own pruning, each by name."""
    state = mlp().state_dict()
    for change, says in (
        (lambda s: s.pop("fc1.bias"), r"lacks `fc1\.bias` \(1 missing, 0 unknown\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"no `extra` \(0 missing, 1 unknown\)"),
        (lambda s: s.update({"fc1.bias": torch.zeros(3)}), r"`fc1\.bias` has shape \(3,\)"),
        (
            lambda s: s.update({"fc1.weight_orig": s.pop("fc1.weight"), "fc1.weight_mask": torch.ones(12, 64)}),
            "weight_mask",
        ),
    ):
        given = dict(state)
        change(given)
        net = mlp()
        with pytest.raises(FileError, match=says):
            load_state(net, given, "the file")
        equal_networks(net, mlp())


def test_resolve_takes_the_last_finished_step(made, tmp_path):
    """Of a run folder, by number and not by letter; a step of measuring holds no network."""
    run = tmp_path / "run"
    for name in ("2-prune-aa", "10-train-bb", "9-train-cc", "11-measure-dd", "12-train-ee"):
        (run / name).mkdir(parents=True)
    for name in ("2-prune-aa", "10-train-bb", "9-train-cc"):
        for file in made.folder.iterdir():
            (run / name / file.name).write_bytes(file.read_bytes())
    (run / "11-measure-dd" / "card.json").write_text("{}")
    (run / "12-train-ee" / "state.pt").write_bytes(b"unfinished")

    assert resolve(run).name == "10-train-bb"
    assert resolve(run / "2-prune-aa").name == "2-prune-aa"
    with pytest.raises(FileError, match="12-train-ee is unfinished|no network"):
        resolve(run / "12-train-ee")
    with pytest.raises(FileError, match="no folder"):
        resolve(tmp_path / "rum")
