"""Masks: set algebra, files, and the zeros they stand for."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from secateur.core.errors import FileError, MaskError, ModelError, UsageError
from secateur.core.files import pack_bits, read_tensors, unpack_bits, write_tensors
from secateur.core.masks import Masks
from secateur.core.patterns import NM
from secateur.core.prunable import check_finite, coverage


def network(*widths, dtype=torch.float32):
    """Linear layers with weights that are nowhere zero."""
    net = nn.Sequential(*(nn.Linear(i, o, dtype=dtype) for i, o in zip(widths, widths[1:], strict=False)))
    random = torch.Generator().manual_seed(sum(widths))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand(p.shape, generator=random) + 0.5)
    return net


def some(net, seed=0):
    """Random masks of everything prunable in a network."""
    random = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(m.shape, generator=random) < 0.5 for n, m in Masks.dense(net).items()})


class Tied(nn.Module):
    """A lookup table whose weights are the head's too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.body = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 6, bias=False)
        self.twin.weight = self.head.weight


BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


@given(BITS)
@settings(deadline=None, max_examples=50)
def test_operators_are_set_algebra_entry_by_entry(pairs):
    one, two = Masks({"w": torch.tensor([a for a, _ in pairs])}), Masks({"w": torch.tensor([b for _, b in pairs])})

    assert (one & two)["w"].tolist() == [a and b for a, b in pairs]
    assert (one | two)["w"].tolist() == [a or b for a, b in pairs]
    assert (one - two)["w"].tolist() == [a and not b for a, b in pairs]
    assert (~one)["w"].tolist() == [not a for a, _ in pairs]
    assert ~(one & two) == ~one | ~two
    assert (one - two) | (one & two) == one


def test_counts_and_sparsity():
    masks = Masks({"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(4, dtype=torch.bool)})

    assert (masks.kept, masks.total, masks.sparsity, masks.counts()) == (5, 8, 0.375, {"a": 1, "b": 4})
    assert repr(masks) == "Masks(2 tensors, kept 5 of 8, sparsity 0.3750)"
    assert (Masks({}).kept, Masks({}).sparsity) == (0, 0.0)


def test_masks_are_immutable_and_own_their_memory():
    mine = torch.tensor([True, False])
    masks = Masks({"w": mine})
    digest = Masks({"w": torch.tensor([True, False])}).digest

    mine.fill_(True)

    assert masks["w"].tolist() == [True, False] and masks.digest == digest
    with pytest.raises(TypeError):
        masks["w"] = mine
    with pytest.raises(TypeError):
        del masks["w"]
    combined = masks & Masks({"w": torch.tensor([True, True])})
    combined["w"].fill_(False)
    assert masks["w"].tolist() == [True, False], "an operand shares memory with the result"


def test_the_digest_depends_on_names_shapes_and_bits_alone():
    one, two = torch.tensor([True, False, True, True]), torch.zeros(2, 3, dtype=torch.bool)
    masks = Masks({"a": one, "b": two})

    assert masks == Masks({"b": two, "a": one}) and hash(masks) == hash(Masks({"b": two, "a": one}))
    assert masks == Masks({"a": one, "b": torch.zeros(3, 2, dtype=torch.bool).T})
    assert masks != Masks({"a": one, "b": two.reshape(3, 2)})
    assert masks != Masks({"a": one, "c": two})
    assert masks != Masks({"a": ~one, "b": two})
    assert masks != {"a": one} and masks.to("cpu") == masks
    assert masks.to("meta")["a"].device.type == "meta"


def test_a_mask_that_is_not_boolean_is_refused():
    with pytest.raises(
        MaskError, match=r"`w` has type torch.float32; make it boolean \(`mask.bool\(\)`\), True = kept"
    ):
        Masks({"w": torch.ones(2)})


def test_masks_of_other_tensors_do_not_combine():
    masks = Masks({"a": torch.ones(2, dtype=torch.bool)})

    with pytest.raises(MaskError, match="only one side has `a`, `b`"):
        masks & Masks({"b": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(MaskError, match=r"`a` have shapes \(2,\) and \(3,\)"):
        masks | Masks({"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(KeyError, match="no mask for `b`. Known: a"):
        masks["b"]
    assert "b" not in masks and masks.get("b") is None


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_bits_come_back_in_every_shape(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5

    packed = pack_bits(mask)

    assert packed.dtype == torch.uint8 and packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_bits(packed, tuple(shape)), mask)


def test_the_first_entry_is_the_lowest_bit():
    assert pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


def test_a_file_gives_back_equal_masks_in_one_bit_a_weight(tmp_path):
    net = network(64, 128, 10)
    masks = some(net)

    digest = masks.save(tmp_path / "masks.safetensors", made_by="a test", digest="not this one")

    assert Masks.load(tmp_path / "masks.safetensors") == masks
    assert (tmp_path / "masks.safetensors").stat().st_size < masks.total / 8 + 1000
    assert read_tensors(tmp_path / "masks.safetensors")[1]["made_by"] == "a test"
    assert len(digest) == 64 and masks.save(tmp_path / "again") != digest, "the digest covers the metadata"


def test_a_truncated_file_is_one_clear_error(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    some(network(3, 4)).save(whole)
    content = whole.read_bytes()

    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(FileError, match="cut.*(damaged|not a mask file)"):
            Masks.load(cut)


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x80, 0xFF])
def test_a_changed_byte_is_one_clear_error_or_changes_nothing(tmp_path, flip):
    path = tmp_path / "masks"
    masks = Masks({"a.weight": some(network(3, 5))["0.weight"], "b": torch.tensor([True, False])})
    masks.save(path)
    content = path.read_bytes()
    refused = 0

    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        try:
            assert Masks.load(path) == masks, f"byte {place} changed the masks unseen"
        except FileError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > len(content) / 2


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"shapes": "{}"},
        {"shapes": "[]", "digest": ""},
        {"shapes": '{"w": [99999999999999999999]}', "digest": ""},
        {"shapes": '{"w": [1e999]}', "digest": ""},
        {"shapes": '{"w": 8}', "digest": ""},
        {"shapes": '{"w": "8"}', "digest": ""},
        {"shapes": '{"other": [8]}', "digest": ""},
        {"shapes": "null", "digest": ""},
        {"shapes": "{", "digest": ""},
    ],
    ids=str,
)
def test_a_safetensors_file_that_holds_no_masks_is_refused(tmp_path, about):
    write_tensors(tmp_path / "weights", {"w": torch.zeros(1, dtype=torch.uint8)}, about)

    with pytest.raises(FileError, match="weights is (not a mask file of this library|damaged)"):
        Masks.load(tmp_path / "weights")


def test_packed_bits_of_another_type_are_refused(tmp_path):
    about = {"shapes": json.dumps({"w": [8]}), "digest": ""}
    write_tensors(tmp_path / "weights", {"w": torch.zeros(1)}, about)

    with pytest.raises(FileError, match="packed masks are bytes"):
        Masks.load(tmp_path / "weights")


def test_a_missing_file_names_its_neighbours(tmp_path):
    some(network(2, 2)).save(tmp_path / "masks.safetensors")

    with pytest.raises(FileError, match=r"mask.safetensors does not exist; did you mean .*masks.safetensors\?"):
        Masks.load(tmp_path / "mask.safetensors")
    with pytest.raises(FileError, match="there is no folder"):
        Masks.load(tmp_path / "nowhere" / "masks.safetensors")


def test_masks_of_another_network_are_refused_by_name_and_shape():
    masks = some(network(3, 4, 2))

    with pytest.raises(
        MaskError, match="another network: this one has no parameter `1.weight`. Did you mean .0.weight"
    ):
        masks.apply_(network(3, 4))
    with pytest.raises(MaskError, match=r"`1.weight` has shape \(7, 4\), its mask \(2, 4\).*widths it was pruned with"):
        masks.check(network(3, 4, 7))
    with pytest.raises(MaskError, match=r"has no parameter `body.0`. Did you mean 'body.1'"):
        net = nn.Module()
        net.body = nn.ParameterList([torch.ones(2, 2)])
        net.body.register_parameter("1", nn.Parameter(torch.ones(2, 2)))
        del net.body._parameters["0"]
        Masks({"body.0": torch.ones(2, 2, dtype=torch.bool)}).match(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_applied_zeros_are_plus_zero_whatever_was_there(dtype):
    net = nn.Linear(6, 1, dtype=dtype)
    values = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, -1.0, 2.0]], dtype=dtype)
    net.weight.data.copy_(values)
    masks = Masks({"weight": torch.tensor([[False] * 5 + [True]])})

    masks.apply_(net)

    assert net.weight[0, :5].tolist() == [0.0] * 5 and not net.weight[0, :5].signbit().any()
    assert net.weight[0, 5] == 2
    masks.check(net)


def test_a_check_names_tensor_count_and_cure():
    net = network(3, 4, 2)
    masks = Masks({n: torch.zeros(m.shape, dtype=torch.bool) for n, m in Masks.dense(net).items()})
    masks.apply_(net)
    net[1].weight.data[0, :3] = torch.tensor([1e-30, float("nan"), -0.0])

    with pytest.raises(MaskError, match=r"2 of 8 pruned weights of `1.weight`.*`masks.hold`.*`masks.apply_\(model\)`"):
        masks.check(net)
    masks.apply_(net)
    masks.check(net)


def test_zeros_of_a_network_give_masks_and_the_known_losses():
    net = network(4, 4)
    masks = some(net)
    masks.apply_(net)
    assert Masks.from_zeros(net) == masks

    with torch.no_grad():
        net[0].weight.view(-1)[masks["0.weight"].view(-1).nonzero()[0]] = -0.0
    assert Masks.from_zeros(net).kept == masks.kept - 1, "a kept weight of exactly zero counts as pruned"


def test_tied_weights_have_one_mask_under_the_first_name():
    net = Tied()
    dense = Masks.dense(net)
    masks = Masks({n: torch.zeros(m.shape, dtype=torch.bool) for n, m in dense.items()})

    masks.apply_(net)

    assert set(dense) == {"head.weight", "body.weight"}
    assert net.twin.weight.eq(0).all() and net.twin.weight is net.head.weight


def test_masks_see_through_wrappers_and_parametrizations():
    net = network(3, 4, 2)
    names = set(Masks.dense(net))
    twin = parametrizations.orthogonal(copy.deepcopy(net)[0], "weight")

    assert set(Masks.dense(torch.optim.swa_utils.AveragedModel(net))) == names
    assert set(Masks.dense(torch.compile(net, backend="eager"))) == names
    assert set(Masks.dense(nn.DataParallel(net))) == names
    assert set(Masks.dense(twin)) == {"weight"}


def test_coverage_gives_the_reason_for_every_tensor_left_alone():
    net = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "conv": nn.Conv2d(4, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 4),
            "list": nn.ParameterList([torch.ones(3, 3)]),
        }
    )
    net["conv"].register_parameter(
        "whole_weight", nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    )
    net["conv"].register_parameter("no_weight", nn.Parameter(torch.ones(0, 4)))

    found = coverage(net)

    assert set(found.prunable) == {
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"
    }  # fmt: skip
    assert set(found.prunable) | set(found.left_alone) == {n for n, _ in net.named_parameters()}
    assert "rows are looked up" in found.left_alone["table.weight"]
    assert "bias or scale" in found.left_alone["norm.weight"] and "bias or scale" in found.left_alone["conv.bias"]
    assert "free parameter" in found.left_alone["list.0"] and "free parameter" in found.left_alone["attention.bias_k"]
    assert found.left_alone["conv.whole_weight"] == "its type is torch.int8"
    assert found.left_alone["conv.no_weight"] == "it is empty"


def test_a_head_tied_to_a_lookup_table_is_left_alone_unless_named():
    net = nn.ModuleDict({"head": nn.Linear(4, 6, bias=False), "table": nn.Embedding(6, 4), "body": nn.Linear(4, 4)})
    net["table"].weight = net["head"].weight

    assert set(coverage(net).prunable) == {"body.weight"}
    assert set(coverage(net, only=["table.*"]).prunable) == {"head.weight"}, "any of its names will do"
    assert set(coverage(net, only=["*weight"], skip=["table*"]).prunable) == {"body.weight"}


def test_globs_choose_and_a_glob_without_a_match_is_refused():
    net = network(3, 4, 4, 2)

    assert set(coverage(net, only=["1.*"]).prunable) == {"1.weight", "1.bias"}
    assert coverage(net, only=["1.*"]).left_alone["0.weight"] == "not named"
    assert set(coverage(net, skip=["0.*", "2.*"]).prunable) == {"1.weight"}
    assert coverage(net, skip=["0.*"]).left_alone["0.weight"] == "skipped by name"
    with pytest.raises(UsageError, match=r"no parameter matches '1.wieght'. Did you mean '1.weight'\?"):
        coverage(net, only=["1.wieght"])
    with pytest.raises(UsageError, match=r"no parameter matches 'layer\*'. Known: 0.bias"):
        Masks.dense(net, skip=["layer*"])


def test_a_pattern_leaves_tensors_alone_that_cannot_take_it_unless_they_are_named():
    net = network(6, 8, 4)

    found = coverage(net, pattern=NM(2, 4))

    assert set(found.prunable) == {"1.weight"}
    assert found.left_alone["0.weight"] == "its input width 6 is not a multiple of 4"
    with pytest.raises(UsageError, match=r"`0.weight` of shape \(8, 6\) cannot take the pattern 2:4"):
        coverage(net, only=["0.weight"], pattern=NM(2, 4))


def test_a_network_with_nothing_to_prune_is_refused_with_the_reasons():
    with pytest.raises(ModelError, match=r"nothing in this network can be pruned \(`weight`: a bias.*--only 'glob'"):
        Masks.dense(nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match="it has no parameters"):
        Masks.dense(nn.ReLU())
    with pytest.raises(ModelError, match="its shape is not known before the network has seen a batch"):
        Masks.dense(nn.LazyLinear(3))


def test_weights_that_are_not_finite_are_named():
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan"), -float("inf")])}

    with pytest.raises(ModelError, match=r"2 of 3 weights of `b` are NaN or infinite.*earlier checkpoint"):
        check_finite(weights)
