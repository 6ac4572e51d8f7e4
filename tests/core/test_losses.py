"""Cross-entropy against its definition."""

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.losses import CrossEntropy


def test_cross_entropy_is_the_mean_over_examples_and_tokens():
    random = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, 5, 3, generator=random), torch.randint(0, 3, (4, 5), generator=random)
    chosen = -logits.double().log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)

    torch.testing.assert_close(CrossEntropy()(logits, target).double(), chosen.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        CrossEntropy()(logits[:, 0], target[:, 0]).double(), chosen[:, 0].mean(), rtol=1e-6, atol=0
    )
    padded = target.clone()
    padded[:, 3:] = -100
    torch.testing.assert_close(CrossEntropy()(logits, padded).double(), chosen[:, :3].mean(), rtol=1e-6, atol=0)
    smooth = 0.9 * chosen.mean() - 0.1 * logits.double().log_softmax(-1).mean()
    torch.testing.assert_close(CrossEntropy(smoothing=0.1)(logits, target).double(), smooth, rtol=1e-6, atol=0)
    assert CrossEntropy()(logits.bfloat16(), target).dtype == torch.float32
    assert CrossEntropy()(logits.double(), target).dtype == torch.float64


@pytest.mark.parametrize(
    ("output", "target"),
    [((4, 3), (5,)), ((4,), (4,)), ((2, 3, 3), (3, 2)), ((3, 3, 3, 3), (3, 3, 3)), ((4, 3), (4, 1))],
)
def test_shapes_that_do_not_belong_together_are_refused(output, target):
    with pytest.raises(DataError, match=r"cross-entropy needs logits \(N, classes\) with targets"):
        CrossEntropy()(torch.zeros(output), torch.zeros(target, dtype=torch.long))
