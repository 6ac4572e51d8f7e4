"""The whole damage report: figures that agree with each other, two files that belong together, every kind of data."""

import json
import math

import pytest
import torch
from tests.engine.damage_kit import Tagger, answering, conv, features, images, mlp, pruned
from torch import nn

from secateur.cli.main import main
from secateur.core.errors import DataError, FileError, UsageError
from secateur.data import Dataset, Split
from secateur.engine.damage import DAMAGE, SAMPLES, damage, read_damage
from secateur.engine.damage.corruptions import TABLE, corrupt
from secateur.engine.damage.embedding import pca
from secateur.engine.damage.record import plain
from secateur.engine.folder import Artefact


@pytest.fixture(scope="module")
def report():
    net, data = conv(), images(40)
    return damage(net, pruned(net, 0.7), data, others=[("hard", pruned(net, 0.9))], examples=12, corrupted=10, batch=16)


def test_the_report_holds_every_part_of_every_network(report):
    table = report.table
    names = ["dense", "pruned", "hard"]
    assert table["format"] == "secateur.damage/1" and table["variants"] == names
    assert set(table["changes"]) == {"pruned", "hard"}
    assert all(list(table[part]) == names for part in ("accuracy", "calibration", "geometry"))
    assert table["classes"] == ["kind 0", "kind 1", "kind 2"] and table["skipped"] == []
    assert table["data"] == {
        "name": "toy", "kind": "image", "note": "", "input_shape": [3, 8, 8], "examples": 40, "decisions": 40,
        "not_counted": 0, "tokens": False,
    }  # fmt: skip
    assert table["corruptions"]["examples"] == 10 and len(table["corruptions"]["rows"]) == 25
    assert set(table["seconds"]) >= {"forward", "geometry", "corruptions"}
    json.dumps(table, allow_nan=False)


def test_figures_agree_with_each_other(report):
    table = report.table
    right = {name: table["accuracy"][name]["parts"]["right"] for name in table["variants"]}
    for name, change in table["changes"].items():
        flips = change["flips"]
        assert flips["both_right"] + flips["right_wrong"] == right["dense"]
        assert flips["both_right"] + flips["wrong_right"] == right[name]
        assert sum(row["count"] for row in change["classes"]) == 40
        assert sum(row["right_after"] for row in change["classes"]) == right[name]
        margins = table["geometry"][name]["margin_before"]
        assert margins["flipped"]["count"] == 40 - flips["agree"] and margins["stable"]["count"] == flips["agree"]
    margins = {name: shape["margins"] for name, shape in table["geometry"].items()}
    assert margins["hard"]["edges"] == margins["dense"]["edges"]
    for name, counts in margins.items():
        # zero is inside a bin: only there may right and wrong answers meet
        both = [i for i, pair in enumerate(zip(counts["right"], counts["wrong"], strict=True)) if all(pair)]
        assert all(counts["edges"][i] <= 0 <= counts["edges"][i + 1] for i in both)
        assert (sum(counts["right"]), sum(counts["wrong"])) == (right[name], 40 - right[name])
    for name, sure in table["calibration"].items():
        assert sum(row["count"] for row in sure["bins"]) == 40
        assert sum(sure["leads"]["right"]) == sum(sure["confidences"]["right"]) == right[name]
        assert 40 * sure["accuracy"] == pytest.approx(right[name])


def test_samples_agree_with_the_figures(report):
    samples, about = report.samples, report.table["samples"]
    assert {name: list(tensor.shape) for name, tensor in samples.items()} == about["tensors"]
    assert about["count"] == 12
    predictions = samples["predictions"]
    assert int((predictions[1:] != predictions[0]).any(0).sum()) == about["flipped"] == min(6, about["flipped_in_all"])
    wrong = predictions != samples["targets"]
    assert torch.equal(samples["margin"] < 0, wrong)
    assert samples["images"].shape == (12, 8, 8, 3) and samples["pca"].shape == (3, 12, 2)
    assert torch.equal(samples["pca"][0], samples["pca_own"][0])


def test_corrupted_copies_are_what_the_networks_make_of_corrupted_samples(report):
    net, data, samples, about = conv().eval(), images(40), report.samples, report.table["samples"]
    assert about["kinds"] == list(TABLE) and (about["severity"], about["copies"]) == (3, 12)
    assert torch.equal(samples["copies.kind"], torch.arange(5).repeat_interleave(12))
    assert torch.equal(samples["copies.targets"], samples["targets"].repeat(5))
    clean = data.test.x[samples["index"]].float() / 255
    for kind, name in enumerate(TABLE):
        rows = samples["copies.kind"] == kind
        assert torch.equal(samples["copies.index"][rows], samples["index"])
        spoilt = corrupt(clean, name, 3)
        shown = samples["copies.images"][rows].permute(0, 3, 1, 2)
        torch.testing.assert_close(shown / 255, spoilt, rtol=0, atol=0.51 / 255)
        with torch.no_grad():
            logits = net((spoilt - 0.4) / 0.3)
        assert torch.equal(samples["copies.predictions"][0, rows], logits.argmax(1))
        torch.testing.assert_close(samples["copies.confidence"][0, rows], logits.softmax(1).amax(1))
    axes = pca(net[:5]((data.test.x.float() / 255 - 0.4) / 0.3).detach())
    wanted = axes(net[:5]((spoilt - 0.4) / 0.3).detach())
    torch.testing.assert_close(samples["copies.pca"][0, rows], wanted.float(), rtol=1e-4, atol=1e-4)
    wrong = samples["copies.predictions"] != samples["copies.targets"]
    assert torch.equal(samples["copies.margin"] < 0, wrong)


def test_data_that_are_no_images_have_no_copies():
    found = damage(mlp(), pruned(mlp()), features(20), examples=5)
    assert not any(name.startswith("copies") for name in found.samples) and "kinds" not in found.table["samples"]


def test_the_same_seed_gives_the_same_report(report):
    net, data = conv(), images(40)
    again = damage(
        net, pruned(net, 0.7), data, others=[("hard", pruned(net, 0.9))], examples=12, corrupted=10, batch=16
    )
    assert {k: v for k, v in again.table.items() if k != "seconds"} == {
        k: v for k, v in report.table.items() if k != "seconds"
    }
    assert all(torch.equal(tensor, report.samples[name]) for name, tensor in again.samples.items())


def test_names_come_with_the_networks():
    net, data = mlp(), features(10)
    table = damage(("first", net), ("second", pruned(net)), data, examples=3).table
    assert table["variants"] == ["first", "second"] and "second" in table["changes"]
    with pytest.raises(UsageError, match="'a', 'a'; give each a name of its own"):
        damage(("a", net), ("a", net), data)
    with pytest.raises(UsageError, match="examples=0"):
        damage(net, net, data, examples=0)


# Files


def test_what_is_written_is_read_back(report, tmp_path):
    digests = report.write(tmp_path / "new")
    back = read_damage(tmp_path / "new")
    assert back.table == report.table
    assert set(back.samples) == set(report.samples)
    for name, tensor in back.samples.items():
        assert tensor.dtype == report.samples[name].dtype
        assert torch.equal(tensor.nan_to_num(7.0), report.samples[name].nan_to_num(7.0))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(digests) == [DAMAGE, SAMPLES]


@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f / DAMAGE).unlink(), "cannot read"),
    (lambda f: (f / DAMAGE).write_text("{}"), "not a damage report of format"),
    (lambda f: (f / DAMAGE).write_text("{"), "not JSON"),
    (lambda f: (f / SAMPLES).unlink(), "cannot read"),
    (lambda f: (f / SAMPLES).write_bytes((f / SAMPLES).read_bytes()[:-1]), "is not the file that damage.json"),
])  # fmt: skip
def test_damaged_files_are_refused(report, tmp_path, spoil, says):
    report.write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(FileError, match=says):
        read_damage(tmp_path)


def test_a_report_without_its_figures_is_no_report_and_leaves_nothing_half_written(report, tmp_path):
    (tmp_path / DAMAGE / "in the way").mkdir(parents=True)
    with pytest.raises(FileError, match="cannot write .*damage.json"):
        report.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [DAMAGE, SAMPLES]
    with pytest.raises(FileError, match="cannot read"):
        read_damage(tmp_path)


def test_what_is_not_finite_is_null():
    table = plain({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": "nan", "e": True, "f": 3}})
    assert table == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "nan", "e": True, "f": 3}}


# Kinds of networks and data


def small(net, other, data, **options):
    made = damage(net, other, data, **{"examples": 6, "corrupted": 4, **options})
    json.dumps(made.table, allow_nan=False)
    return made.table, made.samples


def test_bfloat16():
    net = conv().bfloat16()
    table, samples = small(net, pruned(net, 0.5), images(12))
    assert table["geometry"]["pruned"]["logits_error"] < 2e-2 and len(table["corruptions"]["rows"]) == 25
    assert samples["margin"].dtype == torch.float32


def test_a_language_model():
    tokens = torch.randint(7, (9, 5), generator=torch.Generator().manual_seed(1))
    split = Split(tokens, tokens.roll(-1, 1))
    data = Dataset("text", split, split, tuple("abcdefg"), "text")
    table, samples = small(Tagger(seed=0), Tagger(seed=1), data)
    assert table["data"]["tokens"] and table["data"]["decisions"] == 45
    assert table["geometry"] == {"dense": None, "pruned": None} and table["corruptions"] is None
    assert {row["what"]: row["why"] for row in table["skipped"]}["features of pruned"].startswith("the network answers")
    assert set(samples) == {"index", "position", "targets", "predictions", "confidence", "context"}
    assert torch.equal(data.test.y[samples["index"], samples["position"]], samples["targets"])
    dense = Tagger(seed=0)(tokens).argmax(-1)
    assert torch.equal(dense[samples["index"], samples["position"]], samples["predictions"][0])


def test_of_a_text_the_samples_keep_what_comes_before_the_answer():
    tokens = torch.randint(7, (9, 60), generator=torch.Generator().manual_seed(1))
    split = Split(tokens, tokens.roll(-1, 1))
    found = damage(Tagger(), pruned(Tagger()), Dataset("letters", split, split, tuple("abcdefg"), "text"), examples=30)
    rows = zip(found.samples["index"].tolist(), found.samples["position"].tolist(), strict=True)
    for row, (index, position) in zip(found.samples["context"].tolist(), rows, strict=True):
        whole = tokens[index, : position + 1].tolist()
        assert row == [-1] * max(0, 48 - len(whole)) + whole[-48:]
    assert "context" not in damage(Tagger(), pruned(Tagger()), split, examples=30).samples


def test_tokens_that_do_not_count_are_in_no_figure():
    split = Split(torch.arange(6).view(2, 3), torch.tensor([[0, -100, 2], [-100, -100, 1]]))
    table, samples = small(Tagger(seed=0), Tagger(seed=1), split)
    assert table["data"]["decisions"] == 3 and table["data"]["not_counted"] == 3
    assert samples["index"].tolist() == [0, 0, 1] and samples["position"].tolist() == [0, 2, 2]
    assert table["changes"]["pruned"]["flips"]["count"] == 3


def test_a_network_without_finite_outputs_is_named():
    net = mlp()
    broken = pruned(net)
    with torch.no_grad():
        broken[0].bias.fill_(torch.nan)
    with pytest.raises(DataError, match=r"network 'broken': .*NaN"):
        damage(net, net, features(8), others=[("broken", broken)])


def test_a_network_that_rules_out_every_class_has_figures_all_the_same():
    class Logs(nn.Module):
        def forward(self, x):
            return x.log()

    x = answering([0, 1, 2, 0])  # the logarithm of zero is -infinity
    x[3] = 0.0
    table, _ = small(Logs(), Logs(), Split(x, torch.tensor([0, 1, 1, 0])))
    assert table["calibration"]["dense"]["nll"] is None
    flips = table["changes"]["pruned"]["flips"]
    assert flips["agree"] == 4 and flips["same_wrong"] == 1


def test_a_class_without_a_test_example():
    split = features(12)
    table, _ = small(mlp(classes=5), pruned(mlp(classes=5)), Split(split.x, split.y))
    rows = table["changes"]["pruned"]["classes"]
    assert [row["count"] for row in rows[3:]] == [0, 0] and [row["change"] for row in rows[3:]] == [None, None]
    assert table["geometry"]["dense"]["classes"][4] == {"class": 4, "angle": None, "length": None, "margin": None}


def test_one_class_only():
    split = features(6, classes=1)
    table, samples = small(mlp(classes=1), pruned(mlp(classes=1)), split)
    assert table["changes"]["pruned"]["flips"]["both_right"] == 6
    assert table["changes"]["pruned"]["most_hurt"]["sentence"] == ""
    assert table["geometry"]["dense"]["margin"]["undefined"] == 6 and samples["margin"].isnan().all()


def test_one_example_only():
    data = images(1)
    table, samples = small(conv(), pruned(conv()), data)
    assert table["data"]["examples"] == 1 and samples["index"].tolist() == [0]
    assert [row["what"] for row in table["skipped"]] == ["tsne of dense", "tsne of pruned"]
    assert samples["pca"].shape == (2, 1, 2) and not samples["pca"].any()
    assert samples["images"].shape == (1, 8, 8, 3)


def test_a_smaller_network_beside_the_dense_one():
    table, samples = small(mlp(hidden=5), mlp(hidden=3), features(12))
    assert table["geometry"]["pruned"]["width"] == 3
    assert [row["what"] for row in table["skipped"]] == ["corruptions", "pca of pruned"]
    assert samples["pca"][1].isnan().all() and samples["pca_own"].isfinite().all()


def test_a_convolutional_head_beside_a_linear_one():
    net = conv()
    other = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    table, samples = small(net, other, images(12))
    assert table["geometry"]["pruned"] is None and table["geometry"]["dense"] is not None
    assert [row["what"] for row in table["skipped"]] == ["features of pruned"]
    assert samples["angle"][1].isnan().all() and samples["angle"][0].isfinite().all()


# The measure step


def test_a_measure_step_writes_the_report_when_asked(tmp_path, capsys):
    words = ["--net", "mlp", "--data", "digits", "-s", "data.train=120", "-s", "data.test=40"]
    dense, cut, out = (str(tmp_path / name) for name in ("dense", "cut", "out"))
    assert main(["train", *words, "-s", "model.widths=[8]", "--epochs", "1", "-o", dense]) == 0
    assert main(["prune", dense, "--to", "sparsity 0.8", "-o", cut]) == 0
    assert main(["measure", cut, "--damage", "-o", out]) == 0
    capsys.readouterr()
    step = lambda name: next((tmp_path / name).glob("*-measure-*"))  # noqa: E731
    plain_card, card = (json.loads((step(name) / "card.json").read_text()) for name in ("cut", "out"))
    assert DAMAGE not in plain_card["files"] and not (step("cut") / DAMAGE).exists()
    assert {DAMAGE, SAMPLES, "verdict.json"} <= set(card["files"])
    found = read_damage(step("out"))
    verdict = json.loads((step("out") / "verdict.json").read_text())
    for which in ("dense", "pruned"):
        assert found.table["accuracy"][which]["value"] == verdict[which]["accuracy"]["value"]
    assert found.table["changes"]["pruned"]["accuracy"]["low"] == verdict["change"]["accuracy"]["low"]
    assert found.table["data"]["examples"] == 40 and found.samples["images"].shape == (40, 8, 8, 1)
    assert main(["prune", dense, "--to", "sparsity 0.5", "-o", str(tmp_path / "half")]) == 0
    again = ["measure", cut, "-o", str(tmp_path / "again"), "--beside", str(tmp_path / "half")]
    assert main(again) == 2 and "set `damage = true`" in capsys.readouterr().err
    assert main([*again, "--damage"]) == 0
    more = read_damage(step("again")).table
    assert (
        more["variants"] == ["dense", "pruned", "half"]
        and more["changes"]["pruned"] == found.table["changes"]["pruned"]
    )
    half = json.loads((step("half") / "verdict.json").read_text())
    assert more["accuracy"]["half"]["value"] == half["pruned"]["accuracy"]["value"]
    net = Artefact.open(card["pruned"]).build()
    assert (
        found.table["geometry"]["pruned"]["width"]
        == [m for m in net.modules() if isinstance(m, nn.Linear)][-1].in_features
    )
