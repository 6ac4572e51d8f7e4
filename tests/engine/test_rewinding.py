"""Rewind steps of recipes: survivors are bit for bit what they were, and the controls differ in one thing only."""

import pytest
import torch

from secateur.core import streams
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.engine.comparing import Comparison, Reference
from secateur.engine.folder import Artefact
from secateur.engine.recipe import Recipe
from secateur.engine.rewinding import fresh, set_back
from secateur.engine.runner import Runner
from secateur.nets import build

MODEL = {"use": "resnet_cifar", "depth": 8, "width": 4}
DATA = {"use": "digits", "train": 200, "test": 100, "batch": 50}
TRAIN = {"do": "train", "epochs": 1, "lr": 0.05}
PRUNE = {"do": "prune", "to": "sparsity 0.8", "examples": 50}


def ran(tmp_path, *steps, seed=3):
    """The artefacts of the steps of a recipe."""
    recipe = Recipe.from_table({"seed": seed, "model": MODEL, "data": DATA, "step": list(steps)})
    runner = Runner(recipe, tmp_path)
    runner.run()
    return [Artefact.open(row["folder"]) for row in runner.plan()]


def initial(seed=3):
    """The network that a recipe of this seed begins with, made without one."""
    streams.seed_global(seed, "init")
    options = {key: value for key, value in MODEL.items() if key != "use"}
    return build(MODEL["use"], (1, 8, 8), 10, **options).state_dict()


def under(state, masks):
    """The same state with zeros where masks prune."""
    return {name: torch.where(masks[name], t, torch.zeros_like(t)) if name in masks else t for name, t in state.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_survivors_go_back_to_the_beginning_with_all_other_state(tmp_path):
    trained, pruned, back, ended = ran(tmp_path, TRAIN, PRUNE, {"do": "rewind"}, TRAIN)
    masks = pruned.masks()
    assert_same(dict(back.masks().items()), dict(masks.items()))
    assert_same(back.state(), under(initial(), masks))
    assert any(name.endswith("running_mean") for name in back.state())
    assert back.card["rewound"] == {"to": 0, "weights": "same", "masks": "same"}
    assert ended.card["dense"]["digest"] == trained.digest  # the verdict is against the trained network
    assert_same(ended.state(), under(ended.state(), masks))


def test_survivors_go_back_to_the_result_of_a_step(tmp_path):
    first, *_, back = ran(tmp_path, TRAIN, TRAIN, PRUNE, {"do": "rewind", "to": 1})
    assert_same(back.state(), under(first.state(), back.masks()))


def test_shuffled_masks_keep_the_counts_and_the_weights(tmp_path):
    pruned, back = ran(tmp_path, PRUNE, {"do": "rewind", "masks": "shuffled"})
    assert back.masks().counts() == pruned.masks().counts()
    assert any(not torch.equal(back.masks()[name], pruned.masks()[name]) for name in pruned.masks())
    assert_same(back.state(), under(initial(), back.masks()))


def test_fresh_weights_are_others_of_the_same_distribution_under_the_same_masks(tmp_path):
    pruned, back = ran(tmp_path, PRUNE, {"do": "rewind", "weights": "fresh"})
    again, other = ran(tmp_path / "2", PRUNE, {"do": "rewind", "weights": "fresh"}, seed=4)
    assert_same(dict(back.masks().items()), dict(pruned.masks().items()))
    name = list(pruned.masks())[-2]
    kept = pruned.masks()[name]
    assert not (back.state()[name][kept] == initial()[name][kept]).any()
    assert not torch.equal(back.state()[name], other.state()[name])
    wide = fresh({**_built(), "options": {"depth": 8, "width": 32}}, 3).state_dict()[name].std()
    streams.seed_global(0, "init")
    assert wide == pytest.approx(
        float(build("resnet_cifar", (1, 8, 8), 10, depth=8, width=32).state_dict()[name].std()), rel=0.05
    )


def _built():
    return {"use": MODEL["use"], "input_shape": [1, 8, 8], "outputs": 10, "options": {}}


def test_drawing_fresh_weights_leaves_torch_s_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh(_built(), 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_network_that_lost_units_cannot_go_back_before_that(tmp_path):
    with pytest.raises(UsageError, match=r"step 2: units are removed between step 0 and this rewind"):
        ran(tmp_path, {"do": "shrink", "to": "params 0.6x", "examples": 50}, {"do": "rewind"})
    assert list(tmp_path.iterdir()) == []
    *_, back = ran(tmp_path, {"do": "shrink", "to": "params 0.6x", "examples": 50}, TRAIN, {"do": "rewind", "to": 1})
    assert_same(back.state(), Artefact.open(next(tmp_path.glob("1-shrink-*"))).state())


def test_other_shapes_or_tensors_are_refused_and_nothing_is_changed():
    net, wider = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for other in (wider, torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.nn.Linear(3, 4, bias=False)):
        with pytest.raises(UsageError, match="units were removed in between"):
            set_back(net, other, Masks({"weight": torch.ones(4, 3) > 0}), "before")
    assert_same(net.state_dict(), before)


def test_weights_that_had_been_pruned_by_then_are_not_counted_as_kept(tmp_path):
    steps = [TRAIN, PRUNE, TRAIN, {"do": "rewind", "to": 2, "masks": "shuffled"}]
    with pytest.raises(UsageError, match=r"weights of `.*` that are to be kept are pruned in the result of step 2"):
        ran(tmp_path, *steps)
    back = ran(tmp_path, *steps[:3], {"do": "rewind", "to": 2})[-1]  # the same masks may
    pruned = Artefact.open(next(tmp_path.glob("2-prune-*")))
    assert_same(back.state(), pruned.state())


def test_a_network_that_was_set_back_is_not_what_results_are_compared_with(tmp_path):
    trained, back, pruned, ended = ran(tmp_path, TRAIN, {"do": "rewind"}, PRUNE, TRAIN)
    assert back.masks().kept == back.masks().total
    assert [card["dense"]["digest"] for card in (back.card, pruned.card, ended.card)] == [trained.digest] * 3


def test_finished_steps_are_read_and_the_others_go_on(tmp_path):
    whole = ran(tmp_path / "whole", TRAIN, PRUNE, {"do": "rewind"}, TRAIN)
    ran(tmp_path / "part", TRAIN, PRUNE, {"do": "rewind"})
    again = ran(tmp_path / "part", TRAIN, PRUNE, {"do": "rewind"}, TRAIN)
    assert [artefact.digest for artefact in again] == [artefact.digest for artefact in whole]


def test_a_captured_graph_has_no_fresh_weights():
    with pytest.raises(UsageError, match="captured graph"):
        fresh({"use": "net.pt2", "input_shape": [3], "outputs": 2, "options": {}}, 0)


def test_bfloat16_and_tied_weights_go_back():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    net, before = Tied().bfloat16(), Tied().bfloat16()
    mask = torch.rand(6, 4) > 0.5
    left = set_back(net, before, Masks({"embed.weight": mask}), "before")
    assert left["embed.weight"].equal(mask) and net.head.weight is net.embed.weight
    assert torch.equal(net.embed.weight, before.embed.weight * mask) and net.embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([TRAIN, {"do": "rewind", "to": 2}], "step 2: rewind to 2"),
        ([TRAIN, {"do": "measure"}, {"do": "rewind", "to": 2}], "step 3: rewind to 2"),
        ([TRAIN, {"do": "rewind", "to": -1}], "to is -1"),
        ([TRAIN, {"do": "rewind", "to": 1, "weights": "fresh"}], "0 with fresh weights"),
        ([TRAIN, {"do": "rewind", "weights": "old"}], "weights"),
    ],
)
def test_bad_steps_are_refused_before_anything_runs(steps, says):
    with pytest.raises(UsageError, match=says):
        Recipe.from_table({"model": MODEL, "data": DATA, "step": steps})


def test_tickets_of_a_comparison_differ_from_magnitude_by_the_rewinding_alone():
    compared = {"sparsity": [0.9], "seeds": [0], "epochs": 5, "methods": ["lth", "lth-reinit", "lth-shuffled"]}
    made = Comparison.from_table({"model": MODEL, "data": DATA, "compare": compared})
    jobs = {job.method: job.recipe["step"] for job in made.jobs(Reference(1, 1, 1, "", "", (1, 1)))}
    for name, options in (("lth", {}), ("lth-reinit", {"weights": "fresh"}), ("lth-shuffled", {"masks": "shuffled"})):
        train, prune, back, rest = jobs[name]
        assert [train, prune, rest] == jobs["magnitude"]
        assert back == {"do": "rewind", **options}
