# Networks come by name, so the type checker cannot know their attributes.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""Networks by name: arguments from the data and the user, and what is refused."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import nets
from secateur.core.errors import FileError, ModelError, UsageError

OWN = """
import torch
from torch import nn

def net(width=3, outputs=2):
    return nn.Linear(width, outputs)

def anything(**options):
    return nn.Linear(len(options) + 1, 1)

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 1)

def number():
    return 3

def broken(width=1):
    raise RuntimeError("no such width")

made = nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    (tmp_path / "own_networks_for_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks_for_test", raising=False)
    yield "own_networks_for_test"
    sys.modules.pop("own_networks_for_test", None)


def test_names_are_listed_without_torch():
    code = """
        import sys
        sys.modules["torch"] = None  # importing torch now fails
        from secateur import nets
        print(*nets.names())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == nets.names() == sorted(set(nets.names()))
    assert {"mlp", "lenet5", "vgg16", "resnet20", "wide_resnet", "resnet50", "mobilenet_v2", "lstm"} <= set(
        nets.names()
    )


IMAGES = ["lenet5", "vgg11", "vgg13", "vgg16", "vgg19", "resnet_cifar", "resnet20", "resnet32", "resnet56"]
IMAGES += ["wide_resnet", "resnet18", "resnet34", "resnet50", "mobilenet_v1", "mobilenet_v2", "vit_tiny"]


@pytest.mark.parametrize("name", [*IMAGES, "mlp", "lenet_300_100"])
def test_image_data_set_channels_size_and_outputs(meta, name):
    model = meta(name, (1, 36, 36), 7)
    assert model.eval()(torch.empty(2, 1, 36, 36, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "lenet_300_100"])
def test_feature_data_set_inputs_and_outputs(name):
    assert nets.build(name, (6,), 3)(torch.zeros(2, 6)).shape == (2, 3)


def test_text_data_set_the_vocabulary_and_length_of_language_models():
    tokens = torch.full((2, 16), 28)
    for name in ("gpt_tiny", "lstm"):
        assert nets.build(name, (16,), 29)(tokens).shape == (2, 16, 29)
    assert nets.build("gpt_tiny", [16], 29).wpe.num_embeddings == 16


def test_text_data_set_length_and_outputs_of_classifiers():
    tokens = torch.full((2, 16), 10)
    bert = nets.build("bert_tiny", (16,), 5, vocab=11)
    assert bert(tokens).shape == (2, 5) and bert.position.num_embeddings == 16
    assert nets.build("lstm", (16,), 5, vocab=11, classify=True)(tokens).shape == (2, 5)


def test_sequences_of_vectors_set_lstm_inputs():
    assert nets.build("lstm", (9, 5), 4)(torch.zeros(2, 9, 5)).shape == (2, 9, 4)


def test_what_the_user_says_goes_before_the_data():
    assert nets.build("gpt_tiny", (16,), 29, vocab=32, length=20).wte.num_embeddings == 32
    assert nets.build("mlp", (6,), 2, outputs=1).head.out_features == 1
    assert nets.build("lstm", (16,), 29, vocab=27).embedding.num_embeddings == 27


def test_lists_and_whole_numbers_are_taken_for_tuples_and_floats():
    assert nets.build("mlp", widths=[5, 4]).fc2.in_features == 5
    assert nets.build("mlp", widths=[]).head.in_features == 784
    assert nets.build("mobilenet_v1", width=1, outputs=2).head.in_features == 1024


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mobilenetv2",
            {},
            r"no network is called 'mobilenetv2'. Did you mean 'mobilenet_v2'\?.*package.module:function",
        ),
        ("resnet20", {"widht": 8}, r"resnet20 has no option 'widht'. Did you mean 'width'\?"),
        ("lenet_300_100", {"widths": [3]}, r"no option 'widths'. Known: inputs, outputs"),
        ("resnet20", {"width": "8"}, r"resnet20: width='8' is str; it must be a whole number"),
        ("resnet20", {"width": True}, r"resnet20: width=True is bool; it must be a whole number"),
        ("resnet20", {"width": 8.0}, r"resnet20: width=8.0 is float; it must be a whole number"),
        ("resnet20", {"shortcut": "C"}, r"resnet20: shortcut='C' must be 'A'"),
        ("vgg16", {"width": "half"}, r"vgg16: width='half' is str; it must be a number"),
        ("mlp", {"widths": 300}, r"mlp: widths=300 is int; it must be a list of whole numbers"),
        ("mlp", {"widths": [300, 0.5]}, r"mlp: widths=\[300, 0.5\] is list; it must be a list of whole numbers"),
        ("mlp", {"batch_norm": 1}, r"mlp: batch_norm=1 is int; it must be true or false"),
        ("mlp", {"activation": 3}, r"mlp: activation=3 is int; it must be text"),
        ("lenet5", {"widths": [1, 2]}, r"lenet5: widths=\(1, 2\) must be three numbers"),
        ("lstm", {"vocab": "a"}, r"lstm: vocab='a' is str; it must be a whole number or left out"),
        ("mlp", {"activation": "rleu"}, r"mlp: no activation is called 'rleu'. Did you mean 'relu'\?"),
        ("mlp", {"widths": [300, 0]}, r"mlp: widths\[1\]=0 must be a whole number of at least 1"),
        ("lenet5", {"widths": [1, 2, -1]}, r"lenet5: widths\[2\]=-1 must be"),
        ("lenet5", {"size": 12}, r"lenet5: size=12 leaves nothing.*at least 13×13"),
        ("vgg11", {"size": 28}, r"vgg11: size=28 is too small for its five poolings.*32×32"),
        ("vgg16", {"width": 0.0}, r"vgg16: width=0.0 must be a finite number above 0"),
        ("mobilenet_v2", {"width": float("nan")}, r"mobilenet_v2: width=nan must be"),
        ("resnet_cifar", {"depth": 21}, r"resnet_cifar: depth=21 is not of the form 6n \+ 2. Use 8, 14, 20"),
        ("wide_resnet", {"depth": 20}, r"wide_resnet: depth=20 is not of the form 6n \+ 4. Use 10, 16"),
        ("wide_resnet", {"dropout": 1.0}, r"wide_resnet: dropout=1.0 must be at least 0 and less than 1"),
        ("resnet18", {"outputs": 0}, r"resnet18: outputs=0 must be a whole number of at least 1"),
        ("vit_tiny", {"size": 30}, r"vit_tiny: size=30 is not divisible by patch=4"),
        ("vit_tiny", {"heads": 5}, r"vit_tiny: dim=192 is not divisible by heads=5"),
        ("gpt_tiny", {"heads": 3}, r"gpt_tiny: dim=128 is not divisible by heads=3"),
        ("bert_tiny", {"vocab": 9, "length": 4, "heads": 3}, r"bert_tiny: dim=128 is not divisible by heads=3"),
        ("bert_tiny", {"length": 4}, r"bert_tiny must be told vocab: set vocab = <number>"),
        ("bert_tiny", {"vocab": 9, "length": 4, "segments": -1}, r"bert_tiny: segments=-1 must be"),
        ("lstm", {}, r"lstm: how many different tokens are there\? Set vocab"),
        ("lstm", {"vocab": 9, "classify": True}, r"lstm: how many logits should it give\? Set outputs"),
        ("lstm", {"vocab": 9, "inputs": 4, "outputs": 2}, r"lstm: vocab=9 is for tokens and inputs=4 for vectors"),
        ("a_module:", {}, r"'a_module:' is not of the form 'package.module:name'"),
        ("no_such_module_here:net", {}, r"cannot import 'no_such_module_here'"),
    ],
)
def test_wrong_names_and_options_are_refused_with_the_cure(name, options, message):
    with pytest.raises(UsageError, match=message):
        nets.build(name, **options)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "options", "message"),
    [
        ("resnet20", (6,), 3, {}, r"resnet20 takes images, \(channels, height, width\); the data gives \(6,\)"),
        ("lenet5", (28, 28), 3, {}, r"lenet5 takes images.*\(28, 28\)"),
        ("vit_tiny", (3, 32, 24), 3, {}, r"vit_tiny takes square images; the data gives 32×24"),
        ("vit_tiny", (3, 30, 30), 3, {}, r"vit_tiny: size=30 is not divisible by patch=4"),
        ("vgg16", (1, 28, 28), 3, {}, r"vgg16: size=28 is too small"),
        ("lenet5", (1, 8, 8), 3, {}, r"lenet5: size=8 leaves nothing"),
        ("gpt_tiny", (3, 32, 32), 3, {}, r"gpt_tiny takes texts, \(tokens,\); the data gives \(3, 32, 32\)"),
        ("lstm", (3, 32, 32), 3, {}, r"lstm takes texts.*or sequences of vectors with inputs; the data gives"),
        (
            "resnet20",
            (3, 32, 32),
            3,
            {"channels": 1},
            r"resnet20: channels=1 does not fit the data, which needs channels=3",
        ),
        ("mlp", (6,), 3, {"inputs": 7}, r"mlp: inputs=7 does not fit the data, which needs inputs=6"),
        ("lenet5", (1, 28, 28), 3, {"size": 32}, r"lenet5: size=32 does not fit the data, which needs size=28"),
        ("gpt_tiny", (16,), 29, {"length": 8}, r"gpt_tiny: length=8 is too small for the data, which needs 16"),
        ("gpt_tiny", (16,), 29, {"vocab": 8}, r"gpt_tiny: vocab=8 is too small for the data, which needs 29"),
        ("bert_tiny", (16,), 2, {}, r"bert_tiny must be told vocab"),
        ("mlp", (), 3, {}, r"input_shape=\(\) must be one or more numbers of at least 1"),
        ("mlp", (3, 0), 3, {}, r"input_shape=\(3, 0\) must be"),
        ("mlp", (3,), 0, {}, r"mlp: outputs=0 must be a whole number of at least 1"),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused(name, shape, outputs, options, message):
    with pytest.raises(UsageError, match=message):
        nets.build(name, shape, outputs, **options)


def test_own_function_gets_the_options_only(own):
    model = nets.build(f"{own}:net", (9, 9), 5, width=4)
    assert isinstance(model, nn.Linear) and (model.in_features, model.out_features) == (4, 2)
    assert nets.build(f"{own}:anything", (9, 9), 5, a=1, b=2).in_features == 3
    assert nets.build(f"{own}:net", (9, 9), 5, outputs=6).out_features == 6


def test_own_class_is_called(own):
    assert nets.build(f"{own}:Net", width=4).layer.in_features == 4


@pytest.mark.parametrize(
    ("what", "options", "kind", "message"),
    [
        ("net", {"widht": 1}, UsageError, r"net has no option 'widht'. Did you mean 'width'\?"),
        ("nett", {}, UsageError, r"has no 'nett'. Did you mean 'net'\?"),
        ("Net", {}, UsageError, r"cannot be called with options \[\]: missing a required argument: 'width'"),
        ("made", {}, UsageError, r"an object of type Linear; name a function or class that builds the network"),
        ("number", {}, ModelError, r"gave an object of type int; it must return a torch.nn.Module"),
        ("broken", {"width": 7}, ModelError, r"broken\(width=7\) failed: RuntimeError: no such width"),
    ],
)
def test_own_functions_that_do_not_work_are_refused(own, what, options, kind, message):
    with pytest.raises(kind, match=message):
        nets.build(f"{own}:{what}", **options)


@pytest.fixture
def captured(small, tmp_path):
    """A captured network's path, the network and its input."""
    model, inputs = small("resnet20")
    model.eval()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (inputs,)), path)
    return str(path), model, inputs


def test_a_captured_network_computes_the_same_under_the_same_names(captured):
    path, model, inputs = captured
    loaded = nets.build(path, (3, 9, 9), 4)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))


def test_a_captured_network_takes_modes_gradients_and_edits(captured):
    path, _, inputs = captured
    model = nets.build(path)
    assert model.train().training and not model.eval().training
    model(inputs).square().mean().backward()
    assert model.get_parameter("conv1.weight").grad.abs().sum() > 0
    with torch.no_grad():
        model.get_parameter("fc.weight").zero_()
        model.get_parameter("fc.bias").fill_(2)
        assert torch.equal(model(inputs), torch.full((3, 4), 2.0))


def test_a_captured_network_takes_no_options(captured):
    with pytest.raises(UsageError, match=r"takes no options; leave out width"):
        nets.build(captured[0], width=3)


def test_captured_files_that_cannot_be_read_are_named(captured, tmp_path):
    whole = Path(captured[0]).read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt2").write_text("not a network")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt2")
    at = whole.index(b"conv1.weight")
    (tmp_path / "bent.pt2").write_bytes(whole[:at] + b"#" * 400 + whole[at + 400 :])
    with pytest.raises(FileError, match=r"there is no file .*missing.pt2"):
        nets.build(str(tmp_path / "missing.pt2"))
    for name in ("cut", "text", "bent"):
        with pytest.raises(FileError, match=rf"{name}.pt2' cannot be read: .*torch.export.save"):
            nets.build(str(tmp_path / f"{name}.pt2"))
    with pytest.raises(FileError, match=r"weights.pt2' is not a file of torch.export.save"):
        nets.build(str(tmp_path / "weights.pt2"))
