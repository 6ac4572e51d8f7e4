"""Large allocations: silence below 1 GB, a warning that names the cheaper way, a refusal of what cannot fit."""

import warnings

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.linalg.inverses import fisher_inverse
from secateur.linalg.memory import LARGE, available, check, estimate


def test_estimate_is_what_torch_allocates():
    for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.float64):
        assert estimate((3, 5, 7), dtype) == torch.zeros(3, 5, 7, dtype=dtype).nbytes


def test_this_machine_has_some_memory_but_not_an_exabyte():
    room = available()
    assert room is None or 0 < room < 1 << 60


def test_small_ones_pass_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(LARGE - 1, "a matrix", "use less")


def test_large_ones_are_announced_or_refused():
    room = available("cpu")
    if room is not None and room <= LARGE:
        pytest.skip("less than 1 GB is free here")
    with pytest.warns(UserWarning, match=r"a matrix takes 1.0 GB. To do with less, use less\."):
        check(LARGE, "a matrix", "use less")


def test_what_cannot_fit_is_refused_with_the_cheaper_way():
    if available() is None:
        pytest.skip("this system does not tell its free memory")
    with pytest.raises(UsageError, match=r"a matrix needs 1,073,741,824.0 GB and cpu has .* left. .*, use less\."):
        check(1 << 60, "a matrix", "use less")
    with pytest.raises(UsageError, match=r"the inverse of 4,194,304 weights .* use MFac or blocks"):
        fisher_inverse(torch.ones(1, 1 << 22), 1e-3)


def test_a_device_of_unknown_size_is_announced():
    with pytest.warns(UserWarning, match="takes 1,073,741,824.0 GB"):
        check(1 << 60, "a matrix", "use less", "meta")
