"""Parameters and multiply-adds against the numbers that papers and their reference code give."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PUBLISHED = [
    ("lenet_300_100", {}, 266_610),
    ("lenet5", {}, 431_080),
    ("resnet20", {}, 269_722),
    ("resnet20", {"shortcut": "B"}, 272_474),
    ("resnet32", {}, 464_154),
    ("resnet_cifar", {"depth": 44}, 658_586),
    ("resnet56", {}, 853_018),
    ("resnet_cifar", {"depth": 110}, 1_727_962),
    ("wide_resnet", {}, 10_961_370),
    ("wide_resnet", {"depth": 40, "widen": 4}, 8_949_210),
    ("wide_resnet", {"depth": 28, "widen": 10}, 36_479_194),
    ("resnet18", {}, 11_689_512),
    ("resnet34", {}, 21_797_672),
    ("resnet50", {}, 25_557_032),
    ("mobilenet_v1", {}, 4_231_976),
    ("mobilenet_v2", {}, 3_504_872),
    ("vit_tiny", {"size": 224, "patch": 16, "depth": 12, "outputs": 1000}, 5_717_416),  # DeiT-tiny
    ("bert_tiny", {"vocab": 30_522, "length": 512}, 4_385_920 + 2 * 128 + 2),  # and the classifier
    ("gpt_tiny", {"vocab": 50_257, "length": 1024, "dim": 768, "depth": 12, "heads": 12}, 124_439_808),  # GPT-2 small
]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "options", "count"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(meta, name, options, count):
    assert parameters(meta(name, **options)) == count


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_has_the_weights_of_its_configuration(meta, name):
    blocks = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # columns of table 1 of the paper
    columns = {
        "A": [64, 128, 256, 256, 512, 512, 512, 512],
        "B": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
        "D": [64, 64, 128, 128, *[256] * 3, *[512] * 6],
        "E": [64, 64, 128, 128, *[256] * 4, *[512] * 8],
    }
    wide = columns[blocks[name]]
    convolutions = sum(9 * i * o for i, o in zip([3, *wide], wide, strict=False))
    assert parameters(meta(name)) == convolutions + 2 * sum(wide) + 512 * 10 + 10


@pytest.mark.parametrize(
    ("name", "side", "millions"),
    [
        ("resnet20", 32, 40.55),
        ("resnet56", 32, 125.5),
        ("vgg16", 32, 313.2),
        ("resnet18", 224, 1814),
        ("resnet50", 224, 4089),
        ("mobilenet_v1", 224, 568.7),
        ("mobilenet_v2", 224, 300.8),
    ],
)
def test_multiply_adds_are_the_published_ones(meta, name, side, millions):
    model = meta(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, rel=1e-3)


def test_resnet20_multiply_adds_follow_from_its_layers(meta):
    # Stem, then three stages at 32, 16 and 8 pixels; the first convolution of a stage has half the channels coming in.
    stem, head = 27 * 16 * 32**2, 64 * 10
    one = 6 * 9 * 16 * 16 * 32**2
    two, three = ((5.5 * 9 * wide * wide) * side**2 for wide, side in ((32, 16), (64, 8)))
    with FlopCounterMode(display=False) as counter:
        meta("resnet20").eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * (stem + one + two + three + head)


@pytest.mark.parametrize(("width", "count"), [(0.5, 1_331_592), (0.25, 470_072)])
def test_mobilenet_v1_is_thinned_as_published(meta, width, count):
    assert parameters(meta("mobilenet_v1", width=width)) == count


def test_untied_gpt_has_one_more_matrix(meta):
    assert parameters(meta("gpt_tiny", tied=False)) - parameters(meta("gpt_tiny")) == 65 * 128
