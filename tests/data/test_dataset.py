import hashlib

import pytest
import torch

from secateur.core.errors import DataError
from secateur.data import Dataset, Split
from secateur.data.dataset import stratified


def table(n=20, classes=4, name="t", **more):
    x = torch.arange(n * 3, dtype=torch.float32).view(n, 3)
    y = torch.arange(n) % classes
    names = tuple(map(str, range(classes)))
    return Dataset(name, Split(x, y), Split(x[:5] + 0.5, y[:5]), names, "features", **more)


def rows(split):
    return {tuple(row) for row in split.x.tolist()}


def test_a_split_knows_its_length():
    assert len(Split(torch.zeros(7, 2), torch.zeros(7, dtype=torch.long))) == 7


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), "3 inputs and 4 targets"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), r"empty: x has shape \(0, 2\)"),
        (torch.tensor(1.0), torch.zeros(1, dtype=torch.long), "x of a split is a number"),
    ],
)
def test_a_split_refuses_what_does_not_match(x, y, words):
    with pytest.raises(DataError, match=words):
        Split(x, y)


def test_shape_and_outputs_come_from_the_data():
    data = table(classes=3)
    assert data.input_shape == (3,)
    assert data.outputs == 3


def test_digest_is_the_sha256_of_types_shapes_and_values():
    data = table(mean=(0.0,) * 3, std=(1.0,) * 3)
    whole = hashlib.sha256(repr(("features", (0.0,) * 3, (1.0,) * 3)).encode())
    for part, split in (("train", data.train), ("test", data.test)):
        for tensor in (split.x, split.y):
            whole.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert data.digest == whole.hexdigest()


def test_digest_changes_with_any_label_or_input_and_not_with_the_name():
    first, second, renamed = table(), table(), table(name="other")
    assert first.digest == second.digest == renamed.digest
    changed = table()
    changed.test.y[0] = 3
    moved = table()
    moved.train.x[4, 1] += 1e-3
    assert len({first.digest, changed.digest, moved.digest, table(n=19).digest}) == 4


def test_digest_reads_bfloat16_and_strided_tensors():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.zeros(4, dtype=torch.long)
    straight = Dataset("b", Split(x, y), Split(x, y), ("0",), "features")
    strided = Dataset("b", Split(x.t().contiguous().t(), y), Split(x, y), ("0",), "features")
    assert straight.digest == strided.digest


def test_subset_takes_different_examples_of_the_whole_and_is_a_function_of_the_seed():
    data = table()
    small = data.subset(train=8, test=2, seed=1)
    assert (len(small.train), len(small.test)) == (8, 2)
    assert len(rows(small.train)) == 8
    assert rows(small.train) < rows(data.train)
    assert small.digest == data.subset(8, 2, seed=1).digest != data.subset(8, 2, seed=2).digest
    assert "8 of 20 train" in small.note
    assert len(data.subset(train=8).test) == len(data.test)


def test_validation_and_training_examples_are_a_partition():
    data = table()
    held = data.split_validation(6, seed=3)
    assert held.validation is not None
    assert (len(held.train), len(held.validation)) == (14, 6)
    assert rows(held.train) | rows(held.validation) == rows(data.train)
    assert not rows(held.train) & rows(held.validation)
    assert torch.equal(held.train.x, held.train.x.sort(0).values)
    assert held.digest == data.split_validation(6, seed=3).digest != data.split_validation(6, seed=4).digest


@pytest.mark.parametrize("count", [0, -1, 21])
def test_a_subset_must_have_as_many_examples_as_there_are(count):
    with pytest.raises(DataError, match=f"{count} train examples asked of 't'; give 1 to 20"):
        table().subset(train=count)


@pytest.mark.parametrize("count", [0, 20])
def test_validation_must_leave_examples_to_train_on(count):
    with pytest.raises(DataError, match="give 1 to 19"):
        table().split_validation(count)


@pytest.mark.parametrize(
    ("x", "y", "kind", "words"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "features", "labels run from 0 to 3, .* must lie in 0..1"),
        (torch.zeros(4, 3), torch.tensor([0, -1, 0, 0]), "features", "labels run from -1 to 0"),
        (torch.zeros(4, 3), torch.zeros(4), "features", r"labels must be int64 \(4,\), these are torch.float32"),
        (torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4).long(), "features", "must be floating"),
        (torch.zeros(4, 3, 3, dtype=torch.uint8), torch.zeros(4).long(), "image", r"must be uint8 \(N, C, H, W\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), "text", "must be int64"),
        (torch.full((4, 3), 2), torch.zeros(4, 3).long(), "text", "inputs run from 2 to 2"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 2).long(), "text", r"labels must be int64 \(4, 3\)"),
    ],
)
def test_a_data_set_refuses_tensors_that_do_not_fit_its_kind(x, y, kind, words):
    with pytest.raises(DataError, match=words):
        Dataset("bad", Split(x, y), Split(x, y), ("0", "1"), kind)


def test_training_and_test_examples_must_have_one_shape():
    y = torch.zeros(2).long()
    with pytest.raises(DataError, match=r"'bad' test: an example has shape \(4,\), in the training part \(3,\)"):
        Dataset("bad", Split(torch.zeros(2, 3), y), Split(torch.zeros(2, 4), y), ("0",), "features")


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.0,) * 3, None, "go together"),
        ((0.0,) * 2, (1.0,) * 2, "2 means and 2 standard deviations for 3 channels"),
        ((0.0,) * 3, (1.0, 0.0, 1.0), "every entry must be positive"),
    ],
)
def test_mean_and_std_must_fit_the_channels(mean, std, words):
    with pytest.raises(DataError, match=words):
        table(mean=mean, std=std)


def test_a_stratified_split_is_a_partition_with_the_classes_in_proportion():
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 17 + [3] * 3)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    first, second = stratified(y, 23, 0, "t")
    assert len(second) == 23
    assert sorted(first.tolist() + second.tolist()) == list(range(100))
    for label in range(4):
        assert abs(int((y[second] == label).sum()) - 0.23 * int((y == label).sum())) < 1
    again = stratified(y, 23, 0, "t")[1]
    assert torch.equal(second, again)
    assert not torch.equal(second, stratified(y, 23, 1, "t")[1])


def test_a_single_example_cannot_be_split():
    with pytest.raises(DataError, match="has 1 examples, too few"):
        stratified(torch.zeros(1).long(), 1, 0, "t")
