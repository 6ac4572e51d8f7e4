import itertools

import numpy as np
import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.data.loader import flipped_crop


def numbered(n):
    """Example i holds i."""
    return Split(torch.arange(n, dtype=torch.float32).view(n, 1), torch.arange(n))


def pictures(n, channels=3, height=9, width=7, seed=0):
    x = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return Split(x.to(torch.uint8), torch.arange(n))


def labels(batches):
    return [y.tolist() for _, y in batches]


def flat(batches):
    return [i for batch in labels(batches) for i in batch]


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True)
    )


def test_without_shuffle_the_order_is_that_of_the_split():
    loader = Loader(numbered(10), 4)
    assert labels(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(loader) == 3
    assert labels(loader) == labels(loader.epoch(5))


def test_inputs_stay_with_their_targets():
    for x, y in Loader(numbered(50), 8, shuffle=True).epoch(2):
        assert torch.equal(x[:, 0], y.float())


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return flat(Loader(numbered(40), 7, shuffle=True, seed=seed).epoch(epoch))

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(s, e)) for s, e in itertools.product((0, 1), (0, 1, 2))}) == 6
    assert sorted(order(3, 4)) == list(range(40))
    assert order(3, 4) == torch.randperm(40, generator=stream(3, "order", 4)).tolist()


def test_the_global_random_state_is_neither_used_nor_changed():
    before = torch.get_rng_state()
    loader = Loader(pictures(20), 8, shuffle=True, augment="crop-flip")
    first = list(loader)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert same(first, list(loader))
    torch.set_rng_state(before)


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("start", [0, 2, 5, 6])
def test_an_epoch_taken_up_in_the_middle_gives_the_same_bits(augment, start):
    loader = Loader(pictures(43), 8, shuffle=True, seed=5, augment=augment, mean=(0.5,) * 3, std=(0.2,) * 3)
    whole = list(loader.epoch(3))
    assert same(whole[start:], list(loader.epoch(3, start)))


def test_epochs_can_be_read_side_by_side():
    loader = Loader(pictures(20), 8, shuffle=True, augment="crop-flip")
    one, two = loader.epoch(1), loader.epoch(2)
    mixed = [(next(one), next(two)) for _ in range(len(loader))]
    assert same([a for a, _ in mixed], list(loader.epoch(1)))
    assert same([b for _, b in mixed], list(loader.epoch(2)))


@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_of_ranks_are_disjoint_and_cover_the_split(shuffle):
    shares = [flat(Loader(numbered(24), 5, shuffle=shuffle, rank=r, world=4).epoch(1)) for r in range(4)]
    assert [len(share) for share in shares] == [6] * 4
    assert sorted(itertools.chain(*shares)) == list(range(24))


def test_ranks_have_equal_counts_with_the_first_examples_of_the_order_twice():
    loaders = [Loader(numbered(10), 2, shuffle=True, seed=1, rank=r, world=4) for r in range(4)]
    shares = [flat(loader.epoch(2)) for loader in loaders]
    order = flat(Loader(numbered(10), 10, shuffle=True, seed=1).epoch(2))
    assert [len(share) for share in shares] == [3] * 4
    assert {len(loader) for loader in loaders} == {2}
    assert sorted(itertools.chain(*shares)) == sorted(order + order[:2])


def test_without_wrap_every_example_comes_once():
    shares = [flat(Loader(numbered(10), 2, rank=r, world=4, wrap=False)) for r in range(4)]
    assert shares == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


def test_more_ranks_than_examples_wrap_around():
    assert [flat(Loader(numbered(2), 1, rank=r, world=5)) for r in range(5)] == [[0], [1], [0], [1], [0]]


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_batches_of_all_ranks_together_are_those_of_one_process(augment):
    options = {"shuffle": True, "seed": 2, "augment": augment}
    whole = list(Loader(pictures(24), 6, **options).epoch(1))
    shares = [list(Loader(pictures(24), 2, rank=r, world=3, **options).epoch(1)) for r in range(3)]
    assert len(whole) == len(shares[0]) == 4
    for number, (x, y) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(x[rank::3], shares[rank][number][0])
            assert torch.equal(y[rank::3], shares[rank][number][1])


def test_drop_last_leaves_out_the_smaller_batch():
    loader = Loader(numbered(10), 4, drop_last=True)
    assert labels(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(loader) == 2


def slow_crop(picture, top, left, flip, pad):
    """One picture (C, H, W), by plain slices of a padded array."""
    channels, height, width = picture.shape
    wide = np.zeros((channels, height + 2 * pad, width + 2 * pad), dtype=picture.dtype)
    wide[:, pad : pad + height, pad : pad + width] = picture
    crop = wide[:, top : top + height, left : left + width]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize(("pad", "kind"), [(4, torch.uint8), (2, torch.float64), (0, torch.bfloat16)])
def test_crops_equal_slices_of_each_padded_picture(pad, kind):
    cases = list(itertools.product(range(2 * pad + 1), range(2 * pad + 1), (False, True)))
    x = pictures(len(cases)).x
    top, left, flip = (torch.tensor(column) for column in zip(*cases, strict=True))
    got = flipped_crop(x.to(kind), top, left, flip, pad)
    assert got.dtype == kind
    for picture, case, out in zip(x.numpy(), cases, got, strict=True):
        assert np.array_equal(out.double().numpy(), slow_crop(picture, *case, pad).astype(float))


def test_crop_flip_draws_every_shift_and_both_directions():
    """Each example is one of the 162 possible crops, and over many examples every one of them comes."""
    picture = pictures(1, channels=1).x[0]
    wanted = {
        slow_crop(picture.numpy(), t, le, f, 4).tobytes(): (t, le, f)
        for t, le, f in itertools.product(range(9), range(9), (False, True))
    }
    split = Split(picture.expand(4000, -1, -1, -1), torch.zeros(4000).long())
    batches = Loader(split, 500, augment="crop-flip", seed=1)
    seen = [wanted[(x * 255).round().to(torch.uint8).numpy().tobytes()] for batch, _ in batches for x in batch]
    assert set(seen) == set(wanted.values())
    assert abs(sum(flip for _, _, flip in seen) / 4000 - 0.5) < 0.04


def test_flip_leaves_or_mirrors_each_picture():
    split = pictures(300)
    got = torch.cat([x for x, _ in Loader(split, 64, augment="flip")])
    plain = split.x.float() / 255
    mirrored = [bool(torch.equal(g, p.flip(2))) for g, p in zip(got, plain, strict=True)]
    assert all(m or torch.equal(g, p) for m, g, p in zip(mirrored, got, plain, strict=True))
    assert 110 < sum(mirrored) < 190


def test_augmentation_differs_between_epochs_and_batches():
    split = Split(pictures(1).x.expand(16, -1, -1, -1), torch.zeros(16).long())
    batches = [x for epoch in (0, 1) for x, _ in Loader(split, 8, augment="crop-flip").epoch(epoch)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_pixels_are_scaled_and_normalised_by_channel():
    split = pictures(12)
    mean, std = (0.2, 0.5, 0.8), (0.1, 0.2, 0.3)
    ((x, _),) = Loader(split, 12, mean=mean, std=std, dtype=torch.float64)
    wanted = np.stack([(split.x[:, c].numpy() / 255 - mean[c]) / std[c] for c in range(3)], axis=1)
    np.testing.assert_allclose(x.numpy(), wanted, rtol=1e-14)
    assert x.dtype == torch.float64


def test_black_borders_are_black_before_normalisation():
    split = Split(torch.full((64, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(64).long())
    ((x, _),) = Loader(split, 64, augment="crop-flip", mean=(0.5,), std=(0.25,))
    assert set(x.unique().tolist()) == {-2.0, 2.0}


def test_lower_precision_is_the_rounded_float32_batch():
    split = pictures(6)
    options = {"mean": (0.3,) * 3, "std": (0.3,) * 3}
    ((full, _),) = Loader(split, 6, **options)
    ((half, _),) = Loader(split, 6, dtype=torch.bfloat16, **options)
    assert torch.equal(full.bfloat16(), half)


def test_tokens_and_labels_stay_whole_numbers():
    split = Split(torch.arange(12).view(4, 3), torch.arange(12).view(4, 3))
    for x, y in Loader(split, 2, dtype=torch.bfloat16):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, y)


def test_batches_do_not_share_memory_with_the_split():
    split = numbered(4)
    for x, _ in Loader(split, 2):
        x.zero_()
    assert split.x.sum() == 6


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_has_at_least_one_example(batch):
    with pytest.raises(DataError, match=f"a batch of {batch} examples"):
        Loader(numbered(3), batch)


def test_drop_last_must_leave_a_batch():
    with pytest.raises(DataError, match="rank 0 of 1 has 3 of 3 examples for batches of 4, and drop_last"):
        Loader(numbered(3), 4, drop_last=True)
    with pytest.raises(DataError, match="rank 1 of 2 has 0 of 1 examples"):
        Loader(numbered(1), 4, rank=1, world=2, wrap=False)


def test_inputs_that_are_not_finite_are_counted():
    x = torch.zeros(5, 4)
    x[1, 2], x[3, 0], x[3, 1] = float("nan"), float("inf"), float("nan")
    with pytest.raises(DataError, match="3 of 20 input values, in 2 of 5 examples, .* first is in example 1"):
        Loader(Split(x, torch.zeros(5).long()), 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"augment": "crop_flip"}, UsageError, "Did you mean 'crop-flip'"),
        ({"rank": 2, "world": 2}, UsageError, "rank 2 of 2"),
        ({"rank": -1}, UsageError, "rank -1 of 1"),
        ({"dtype": torch.int32}, UsageError, "torch.int32 is not floating"),
        ({"mean": (0.5,) * 3}, DataError, "go together"),
        ({"mean": (0.5,), "std": (0.5,)}, DataError, "for 3 channels"),
    ],
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Loader(pictures(4), 2, **options)


def test_only_images_can_be_augmented():
    with pytest.raises(UsageError, match=r"these inputs are torch.float32 \(4, 1\); use augment='none'"):
        Loader(numbered(4), 2, augment="flip")


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 3)])
def test_an_epoch_or_start_out_of_range_is_refused(epoch, start):
    with pytest.raises(UsageError, match=f"epoch {epoch}"):
        Loader(numbered(4), 2).epoch(epoch, start)
