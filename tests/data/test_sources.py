import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.data import load, names

ATTRIBUTES = (3, 3, 2, 3, 4, 2)

RULES = {
    "monks1": lambda a: a[0] == a[1] or a[4] == 1,
    "monks2": lambda a: sum(v == 1 for v in a) == 2,
    "monks3": lambda a: (a[4] == 3 and a[3] == 1) or (a[4] != 4 and a[1] != 3),
}


def attributes(x):
    """The six attributes back from 17 one-hot inputs."""
    groups = np.split(x.numpy(), np.cumsum(ATTRIBUTES)[:-1], axis=1)
    assert all((g.sum(1) == 1).all() and set(np.unique(g)) <= {0, 1} for g in groups)
    return np.stack([g.argmax(1) + 1 for g in groups], axis=1)


@pytest.mark.parametrize(("name", "rows", "noisy"), [("monks1", 124, 0), ("monks2", 169, 0), ("monks3", 122, 6)])
def test_monks_test_sets_obey_their_rules_exactly(data_dir, name, rows, noisy):
    data = load(name, data_dir)
    assert (len(data.train), len(data.test), data.input_shape, data.outputs) == (rows, 432, (17,), 2)
    every = attributes(data.test.x)
    assert len({tuple(row) for row in every}) == 432
    assert [int(RULES[name](row)) for row in every] == data.test.y.tolist()
    wrong = sum(
        int(RULES[name](row)) != label
        for row, label in zip(attributes(data.train.x), data.train.y.tolist(), strict=True)
    )
    assert wrong == noisy


def test_a_damaged_monks_row_is_named_with_its_line(data_dir, tmp_path):
    shutil.copytree(data_dir / "monks", tmp_path / "monks", copy_function=shutil.copyfile)
    (tmp_path / "monks").chmod(0o755)
    file = tmp_path / "monks" / "monks-1.train"
    file.write_text(file.read_text().replace(" 1 1 1 1 3 3 2 data_22", " 1 1 1 1 3 9 2 data_22"))
    with pytest.raises(DataError, match=r"monks-1.train line 4: ' 1 1 1 1 3 9 2 data_22'"):
        load("monks1", tmp_path)


def test_nettalk_windows_spell_the_words_and_their_sounds(data_dir):
    data = load("nettalk", data_dir)
    table = [line.split("\t") for line in (data_dir / "nettalk" / "nettalk.data").read_text().splitlines()]
    listed = (data_dir / "nettalk" / "nettalk.list").read_text().rpartition("(THE")[2]
    common = {"the"} | set(re.findall("[a-z]+", listed.lower()))
    assert data.input_shape == (203,)
    assert len(common) == 1000
    for split, inside in ((data.train, True), (data.test, False)):
        entries = [row for row in table if (row[0] in common) is inside]
        assert len(split) == sum(len(word) for word, *_ in entries)
        codes = split.x.view(-1, 7, 29)
        assert torch.equal(codes.sum(2), torch.ones(len(split), 7))
        seen = np.array(list("abcdefghijklmnopqrstuvwxyz_,."))[codes.argmax(2).numpy()]
        at = 0
        for word, sounds, stress, _ in entries[:400]:
            padded = f"___{word}___"
            for i in range(len(word)):
                assert "".join(seen[at]) == padded[i : i + 7]
                assert data.classes[int(split.y[at])] == sounds[i] + stress[i]
                at += 1


def test_nettalk_tokens_are_the_one_hot_windows(data_dir):
    hot, tokens = (load("nettalk", data_dir, test_words=20, tokens=choice) for choice in (False, True))
    assert tokens.kind == "tokens" and tokens.train.x.dtype == torch.int64 and tokens.input_shape == (7,)
    assert torch.equal(hot.train.x.view(-1, 7, 29).argmax(2), tokens.train.x)
    assert torch.equal(hot.test.y, tokens.test.y)
    with pytest.raises(UsageError, match="must be true or false"):
        load("nettalk", data_dir, tokens=1)


def test_nettalk_test_words_can_be_sampled(data_dir):
    one, two = (load("nettalk", data_dir, test_words=50, seed=s) for s in (0, 0))
    assert one.digest == two.digest != load("nettalk", data_dir, test_words=50, seed=1).digest
    starts = one.test.x.view(-1, 7, 29)[:, 2].argmax(1) == 26
    assert int(starts.sum()) == 50
    with pytest.raises(DataError, match="test_words=0: the test part has 18973 words; give a number from 1 to 18973"):
        load("nettalk", data_dir, test_words=0)


def test_tinyshakespeare_tokens_spell_the_text(data_dir):
    data = load("tinyshakespeare", data_dir, block=100)
    text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
    cut = len(text) * 9 // 10
    assert data.kind == "text"
    assert data.classes == tuple(sorted(set(text)))
    assert data.outputs == 65
    for split, piece in ((data.train, text[:cut]), (data.test, text[cut:])):
        assert split.x.shape == split.y.shape == ((len(piece) - 1) // 100, 100)
        assert "".join(data.classes[i] for i in split.x.flatten().tolist()) == piece[: split.x.numel()]
        assert "".join(data.classes[i] for i in split.y.flatten().tolist()) == piece[1 : split.y.numel() + 1]
    assert load("tinyshakespeare", data_dir).input_shape == (128,)


def test_a_block_longer_than_the_text_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be" * 10)
    with pytest.raises(DataError, match="block=128: a part of the text has 18 characters; give 1 to 17"):
        load("tinyshakespeare", tmp_path)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, whole = load("digits", cache=False), load_digits()
    assert (len(data.train), len(data.test), data.input_shape, data.outputs) == (1437, 360, (1, 8, 8), 10)
    scaled = np.rint(whole.images * 255 / 16 + 1e-9).astype(np.uint8)
    wanted = sorted((image.tobytes(), int(label)) for image, label in zip(scaled, whole.target, strict=True))
    got = [(im.numpy().tobytes(), int(t)) for s in (data.train, data.test) for im, t in zip(s.x, s.y, strict=True)]
    assert sorted(got) == wanted
    share = np.bincount(data.test.y) - np.bincount(whole.target) * 360 / 1797
    assert np.abs(share).max() < 1
    pixels = data.train.x.double() / 255
    assert data.mean == pytest.approx([float(pixels.mean())], rel=1e-12)
    assert data.std == pytest.approx([float(pixels.std(correction=0))], rel=1e-12)


@pytest.mark.needs_data("mnist")
def test_mnist_has_its_examples_in_order(data_dir):
    data = load("mnist", data_dir)
    assert (len(data.train), len(data.test), data.input_shape, data.outputs) == (60000, 10000, (1, 28, 28), 10)
    assert data.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(data.train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.mean == pytest.approx([0.1307], abs=5e-5)
    assert data.std == pytest.approx([0.3081], abs=5e-5)


@pytest.mark.needs_data("cifar10")
def test_cifar10_has_its_classes_and_channels(data_dir):
    data = load("cifar10", data_dir)
    assert (len(data.train), len(data.test), data.input_shape) == (50000, 10000, (3, 32, 32))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert torch.bincount(data.train.y).tolist() == [5000] * 10
    assert data.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    assert data.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-3)


def test_made_sets_are_a_function_of_their_seed():
    for name in ("mnist1d", "blobs"):
        one, two = load(name, train=60, test=40), load(name, train=60, test=40)
        other = load(name, train=60, test=40, seed=1)
        assert one.digest == two.digest != other.digest
        assert (len(one.train), len(one.test)) == (60, 40)
        assert not torch.equal(one.train.x[:40], one.test.x)


def test_mnist1d_signals_have_40_points_and_can_be_told_apart():
    data = load("mnist1d")
    assert (len(data.train), len(data.test), data.input_shape, data.outputs) == (4000, 1000, (40,), 10)
    assert torch.bincount(data.train.y).tolist() == [400] * 10
    nearest = data.train.y[torch.cdist(data.test.x, data.train.x).argmin(1)]
    assert (nearest == data.test.y).double().mean() > 0.5


def test_blobs_have_the_centres_and_spread_asked_for():
    data = load("blobs", classes=3, features=5, train=30000, spread=0.1)
    assert (data.input_shape, data.outputs) == ((5,), 3)
    for label in range(3):
        mine = data.train.x[data.train.y == label].double()
        assert len(mine) == 10000
        torch.testing.assert_close(mine.std(0), torch.full((5,), 0.1, dtype=torch.float64), atol=0.005, rtol=0)
        test = data.test.x[data.test.y == label].double()
        torch.testing.assert_close(mine.mean(0), test.mean(0), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("blobs", {"classes": 0}, UsageError, "classes=0: give 1 or more"),
        ("blobs", {"spread": -1.0}, UsageError, "spread=-1.0: give 0 or more"),
        ("blobs", {"clases": 3}, UsageError, "no option 'clases'. Did you mean 'classes'"),
        ("blobs", {"train": "many"}, UsageError, "train='many' of the data set 'blobs' must be a whole number"),
        ("blobs", {"spread": "wide"}, UsageError, "spread='wide' .* must be a number"),
        ("mnist1d", {"train": 0}, DataError, "train=0"),
        ("digits", {"size": 16}, UsageError, "'digits' has no option 'size'"),
        ("mnits", {}, UsageError, "no data set is called 'mnits'. Did you mean 'mnist'"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, error, words):
    with pytest.raises(error, match=words):
        load(name, **options)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "monks2", "nettalk", "tinyshakespeare"])
def test_an_absent_set_says_where_it_looked_and_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub must not be asked
    folder = "monks" if name == "monks2" else name
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    text = str(caught.value)
    assert str(tmp_path / folder) in text
    assert "--data-dir" in text and "SECATEUR_DATA" in text and f"{folder}/" in text
    if name in ("mnist", "cifar10"):
        assert "pip install secateur[hub]" in text and f"{name}/train.parquet" in text
    else:
        assert "original text files, which are not fetched: `secateur[hub]` fetches mnist and cifar10 only" in text
        assert "UCI" in text or "GitHub" in text
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    with pytest.raises(DataError, match="no data folder is named"):
        load(name)


def test_the_environment_names_the_folder_when_no_argument_does(data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_DATA", str(data_dir))
    assert len(load("monks1").train) == 124
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load("monks1", tmp_path)


def test_a_missing_package_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"'digits' needs 'sklearn': `pip install secateur\[data\]`"):
        load("digits", cache=False)


def test_names_lists_every_built_in_set():
    assert names() == sorted(
        ["digits", "mnist", "cifar10", "monks1", "monks2", "monks3", "nettalk", "tinyshakespeare", "mnist1d", "blobs"]
    )


def test_importing_the_data_package_imports_no_optional_package():
    code = (
        "import sys, secateur.data; print([m for m in ('sklearn', 'pyarrow', 'PIL', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
