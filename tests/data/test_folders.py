import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from secateur.core.errors import DataError, UsageError
from secateur.data import Dataset, load


def pixels(n, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_pictures(file, arrays, labels, image="image", label="label", names=None):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": png(a), "path": None} for a in arrays], kind)
    table = pa.table({image: cells, label: labels})
    if names:
        features = {"info": {"features": {label: {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_numbers(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


@pytest.mark.parametrize("form", ["{part}.parquet", "data/{part}-00000-of-00001.parquet", "{part}/0000.parquet"])
@pytest.mark.parametrize(("column", "label"), [("image", "label"), ("img", "fine_label"), ("picture", "digit")])
def test_pictures_in_parquet_files_come_back_byte_for_byte(tmp_path, form, column, label):
    train, test = pixels(7, (6, 5, 3)), pixels(3, (6, 5, 3), 1)
    write_pictures(tmp_path / form.format(part="train"), train, [0, 1, 2, 0, 1, 2, 0], column, label)
    write_pictures(tmp_path / form.format(part="test"), test, [2, 1, 0], column, label)
    data = load(f"folder:{tmp_path}")
    assert data.kind == "image"
    assert np.array_equal(data.train.x.permute(0, 2, 3, 1).numpy(), train)
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1).numpy(), test)
    assert data.train.y.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.test.y.tolist() == [2, 1, 0]
    assert data.classes == ("0", "1", "2")
    np.testing.assert_allclose(data.mean, (train / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (train / 255).std((0, 1, 2)), rtol=1e-12)
    assert data.note == ""


def test_shards_are_joined_in_order_and_class_names_read_from_the_metadata(tmp_path):
    arrays = pixels(6, (4, 4))
    for i in range(3):
        piece = tmp_path / f"train-0000{i}-of-00003.parquet"
        write_pictures(piece, arrays[2 * i : 2 * i + 2], [0, 1], names=["cat", "dog"])
    write_pictures(tmp_path / "test.parquet", arrays[:1], [1], names=["cat", "dog"])
    write_pictures(tmp_path / "validation.parquet", arrays[1:3], [1, 0], names=["cat", "dog"])
    data = load(tmp_path)
    assert np.array_equal(data.train.x[:, 0].numpy(), arrays)
    assert data.classes == ("cat", "dog")
    assert data.validation is not None
    assert np.array_equal(data.validation.x[:, 0].numpy(), arrays[1:3])


def test_plain_binary_columns_hold_pictures_too(tmp_path):
    arrays = pixels(4, (3, 3))
    write_numbers(tmp_path / "train.parquet", image=[png(a) for a in arrays], label=[0, 1, 0, 1])
    write_numbers(tmp_path / "test.parquet", image=[png(arrays[0])], label=[0])
    assert np.array_equal(load(str(tmp_path)).train.x[:, 0].numpy(), arrays)


def test_one_coloured_picture_makes_the_set_coloured(tmp_path):
    gray, colour = pixels(3, (4, 4)), pixels(1, (4, 4, 3))
    write_pictures(tmp_path / "train.parquet", [*gray, *colour], [0, 1, 0, 1])
    write_pictures(tmp_path / "test.parquet", gray[:1], [0])
    data = load(tmp_path)
    assert data.input_shape == (3, 4, 4)
    assert np.array_equal(data.train.x[0].numpy(), np.stack([gray[0]] * 3))
    assert np.array_equal(data.train.x[3].permute(1, 2, 0).numpy(), colour[0])


def test_numeric_columns_become_features_in_the_order_of_the_file(tmp_path):
    write_numbers(
        tmp_path / "train.parquet", b=[1, 2, 3], label=["n", "y", "n"], a=[0.5, 1.5, 2.5], name=["x", "y", "z"]
    )
    write_numbers(tmp_path / "test.parquet", name=["w"], a=[9.5], label=["y"], b=[8])
    data = load(tmp_path)
    assert data.kind == "features"
    assert data.train.x.tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]]
    assert data.test.x.tolist() == [[8, 9.5]]
    assert data.classes == ("n", "y")
    assert (data.train.y.tolist(), data.test.y.tolist()) == ([0, 1, 0], [1])


def test_lists_of_numbers_become_features(tmp_path):
    write_numbers(tmp_path / "train.parquet", v=[[1.0, 2.0], [3.0, 4.0]], on=[True, False], target=[1, 0])
    write_numbers(tmp_path / "test.parquet", v=[[5.0, 6.0]], on=[True], target=[1])
    data = load(tmp_path)
    assert data.train.x.tolist() == [[1, 2, 1], [3, 4, 0]]
    assert data.test.x.tolist() == [[5, 6, 1]]


def test_without_a_test_part_a_fixed_fifth_is_cut_off_and_said_so(tmp_path):
    write_numbers(tmp_path / "all.parquet", v=list(range(50)), label=[i % 2 for i in range(50)])
    data, again = load(tmp_path), load(tmp_path / "all.parquet")
    assert (len(data.train), len(data.test)) == (40, 10)
    assert torch.bincount(data.test.y).tolist() == [5, 5]
    assert sorted(torch.cat([data.train.x, data.test.x]).flatten().tolist()) == list(range(50))
    assert "fixed, class-stratified fifth" in data.note
    assert data.digest == again.digest


def test_a_validation_part_stands_in_for_the_test_part(tmp_path):
    write_numbers(tmp_path / "train.parquet", v=[1, 2], label=[0, 1])
    write_numbers(tmp_path / "val.parquet", v=[3], label=[0])
    data = load(tmp_path)
    assert data.test.x.tolist() == [[3]]
    assert data.validation is None
    assert "the validation part is the test part" in data.note


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_numbers(tmp_path / "train.parquet", v=list(range(1000)), label=[0] * 1000)
    write_numbers(tmp_path / "test.parquet", v=[1], label=[0])
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train.parquet: damaged or not a parquet file .*fetch it again"):
        load(tmp_path)


@pytest.mark.needs_data("mnist")
@pytest.mark.parametrize("keep", [0, 4, 1000, 2_000_000])
def test_a_truncated_real_file_is_named(data_dir, tmp_path, keep):
    (tmp_path / "mnist").mkdir()
    for part in ("train", "test"):
        with (data_dir / "mnist" / f"{part}.parquet").open("rb") as file:
            (tmp_path / "mnist" / f"{part}.parquet").write_bytes(file.read(keep))
    with pytest.raises(DataError, match="mnist/train.parquet: damaged"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"v": [1.0, None], "label": [0, 1]}, "train.parquet: 1 of 2 cells of the column 'v' are empty"),
        ({"v": [1.0, 2.0], "label": [0, None]}, "1 of 2 cells of the column 'label' are empty"),
        (
            {"v": [1.0, 2.0], "label": [0.5, 1.5]},
            "the label column 'label' is double; labels must be integers or text",
        ),
        ({"v": [1.0, 2.0], "w": [1.0, 2.0]}, "no label column among v, w"),
        ({"v": [[1.0], [1.0, 2.0]], "label": [0, 1]}, "the lists in the column 'v' have several lengths"),
        ({"v": [[1.0], [None]], "label": [0, 1]}, "1 numbers are missing in the column 'v'"),
        ({"v": ["a", "b"], "label": [0, 1]}, "neither pictures nor numbers among the columns v, label"),
        ({"v": [1.0, 2.0], "label": [0, -4]}, "labels run from -4"),
        ({"image": [b"no picture", b"nor this"], "label": [0, 1]}, "train.parquet row 0: cannot be read as a picture"),
    ],
)
def test_unusable_columns_are_named(tmp_path, train, words):
    write_numbers(tmp_path / "train.parquet", **train)
    write_numbers(tmp_path / "test.parquet", **train)
    with pytest.raises(DataError, match=words):
        load(tmp_path)


def test_parts_must_fit_each_other(tmp_path):
    write_numbers(tmp_path / "train.parquet", v=[1.0, 2.0], label=["a", "b"])
    write_numbers(tmp_path / "test.parquet", v=[1.0], label=["c"])
    with pytest.raises(DataError, match=r"test.parquet: the label 'c' is not among the classes \(a, b\)"):
        load(tmp_path)
    write_numbers(tmp_path / "test.parquet", label=["a"])
    with pytest.raises(DataError, match="test.parquet: the column 'v' of the training part is missing"):
        load(tmp_path)
    write_numbers(tmp_path / "test.parquet", v=pa.array([], pa.float64()), label=pa.array([], pa.string()))
    with pytest.raises(DataError, match="test.parquet: the test part has no rows"):
        load(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match="no training part"):
        load(tmp_path)


def test_shards_must_have_the_same_columns(tmp_path):
    write_numbers(tmp_path / "train-0.parquet", v=[1.0], label=[0])
    write_numbers(tmp_path / "train-1.parquet", w=[1.0], label=[0])
    with pytest.raises(DataError, match="train-1.parquet: its columns"):
        load(tmp_path)


def test_several_configurations_must_be_told_apart(tmp_path):
    for name in ("one", "two"):
        write_numbers(tmp_path / name / "train.parquet", v=[1.0], label=[0])
    with pytest.raises(DataError, match="train files lie in several folders .*one.*two"):
        load(tmp_path)


def make_folder(root, layout, shape=(5, 4), suffix="png"):
    """``{"train/cat": 3}`` makes three pictures; returns them by path."""
    made = {}
    for number, (place, count) in enumerate(layout.items()):
        (root / place).mkdir(parents=True)
        for i, array in enumerate(pixels(count, shape, number)):
            Image.fromarray(array).save(root / place / f"{i}.{suffix}")
            made[f"{place}/{i}"] = array
    return made


def test_an_image_folder_gives_its_pictures_by_class(tmp_path):
    layout = {"train/dog": 2, "train/cat": 3, "test/cat": 1, "test/dog": 2, "val/dog": 1}
    made = make_folder(tmp_path, layout, (5, 4, 3))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a picture")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 5, 4)
    wanted = {"train": [*(f"train/cat/{i}" for i in range(3)), "train/dog/0", "train/dog/1"],
              "test": ["test/cat/0", "test/dog/0", "test/dog/1"], "validation": ["val/dog/0"]}  # fmt: skip
    for part, split in data.splits():
        assert np.array_equal(split.x.permute(0, 2, 3, 1).numpy(), np.stack([made[key] for key in wanted[part]]))
        assert [data.classes[i] for i in split.y] == [key.split("/")[1] for key in wanted[part]]


def test_an_image_folder_without_a_test_part_is_cut_and_says_so(tmp_path):
    make_folder(tmp_path, {"a": 10, "b": 20})
    data = load(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert torch.bincount(data.test.y).tolist() == [2, 4]
    assert "fixed, class-stratified fifth" in data.note


def test_pictures_of_several_sizes_are_refused_or_resized(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "test/a": 1}, (6, 4))
    make_folder(tmp_path, {"train/b": 2, "test/b": 1}, (8, 7))
    with pytest.raises(DataError, match=r"a.0.png is 4x6 and .*b.0.png is 7x8 .width x height.*size=32"):
        load(tmp_path)
    data = load(tmp_path, size=12)
    assert data.input_shape == (1, 12, 12)
    with Image.open(tmp_path / "train" / "b" / "1.png") as picture:
        wanted = np.asarray(picture.resize((12, 12), Image.Resampling.BILINEAR))
    assert np.array_equal(data.train.x[3, 0].numpy(), wanted)
    with pytest.raises(UsageError, match="size=0"):
        load(tmp_path, size=0)
    with pytest.raises(UsageError, match="no option 'sise'. Did you mean 'size'"):
        load(tmp_path, sise=3)


def test_a_test_class_must_be_a_training_class(tmp_path):
    make_folder(tmp_path, {"train/a": 2, "test/c": 1})
    with pytest.raises(DataError, match=r"the test class 'c' has no folder in the training part \(a\)"):
        load(tmp_path)


def test_a_damaged_picture_is_named(tmp_path):
    make_folder(tmp_path, {"train/a": 3, "test/a": 1}, (40, 40))
    file = tmp_path / "train" / "a" / "1.png"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="1.png: cannot be read as a picture"):
        load(tmp_path)


def test_pictures_of_16_bits_are_refused(tmp_path):
    make_folder(tmp_path, {"train/a": 1, "test/a": 1})
    Image.fromarray(np.arange(20, dtype=np.uint16).reshape(5, 4)).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(DataError, match="0.png: a picture of mode 'I;16'; convert it to 8 bits"):
        load(tmp_path)


def test_a_path_without_data_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"no data found. Expected train\*.parquet"):
        load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load(f"folder:{tmp_path}/none")
    with pytest.raises(DataError, match="no such folder"):
        load(f"{tmp_path}/none")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match="table.csv is no parquet file"):
        load(tmp_path / "table.csv")


CODE = """
import torch
from secateur.data import Dataset, Split
from secateur.core.errors import DataError

x, y = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])

def pair(shift=0.0, *, rows=6):
    return (x[:rows] + shift, y[:rows]), (x[:2], y[:2])

def images():
    pictures = (torch.arange(96) % 256).view(6, 1, 4, 4).to(torch.uint8)
    return Split(pictures, y), (pictures[:1], y[:1])

def tokens():
    t = torch.arange(8).view(2, 4)
    return (t, (t + 1) % 8), (t, (t + 1) % 8)

def whole():
    return Dataset("mine", Split(x, y), Split(x, y), ("a", "b", "c"), "features")

def needs(depth):
    return pair()

def wrong():
    return 3

def strange():
    return (x.int(), y), (x.int(), y)

def floats():
    return (x, y.float()), (x, y.float())

def breaks():
    raise KeyError("gone")

def refuses():
    raise DataError("my own words")

number = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "my_sets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield "my_sets"
    sys.modules.pop("my_sets", None)


def test_a_function_may_return_pairs_of_tensors(code):
    data = load(f"{code}:pair", shift=1.0, rows=4)
    assert isinstance(data, Dataset)
    assert (data.kind, data.outputs, data.name) == ("features", 3, "my_sets:pair")
    assert data.train.x.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert len(data.test) == 2


def test_a_function_may_return_a_data_set_images_or_tokens(code):
    assert load(f"{code}:whole").classes == ("a", "b", "c")
    images = load(f"{code}:images")
    assert (images.kind, images.input_shape) == ("image", (1, 4, 4))
    assert images.mean == pytest.approx([float(images.train.x.double().mean() / 255)], rel=1e-12)
    tokens = load(f"{code}:tokens")
    assert (tokens.kind, tokens.outputs) == ("text", 8)


@pytest.mark.parametrize(
    ("function", "options", "error", "words"),
    [
        ("pair", {"shfit": 1.0}, UsageError, "no option 'shfit'. Did you mean 'shift'"),
        ("needs", {}, UsageError, "needs the options depth"),
        ("nothing", {}, UsageError, "has no 'nothing'"),
        ("number", {}, UsageError, "is int; it must be a function"),
        ("wrong", {}, DataError, r"returned int; it must return a secateur Dataset, or \(\(x, y\), \(x, y\)\)"),
        ("strange", {}, DataError, r"inputs are torch.int32 \(6, 2\)"),
        ("floats", {}, DataError, "labels must be int64"),
        ("breaks", {}, DataError, "'my_sets:breaks' failed: KeyError: 'gone'"),
        ("refuses", {}, DataError, "^my own words$"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(code, function, options, error, words):
    with pytest.raises(error, match=words):
        load(f"{code}:{function}", **options)


def test_a_module_that_is_missing_is_named():
    with pytest.raises(UsageError, match="cannot import 'no_such_module'"):
        load("no_such_module:function")
