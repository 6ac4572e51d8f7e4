"""Two processes on one machine: equal masks, joined scores, and the trajectory of one process."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from secateur.core.choose import broadcast, choose, reduce_scores
from secateur.core.masks import Masks
from secateur.core.task import Task

pytestmark = pytest.mark.processes

SCRIPT = pathlib.Path(__file__).with_name("ranks.py")
_spec = importlib.util.spec_from_file_location("secateur_test_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes found; neither may hang."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(folder)]
    started = []
    try:
        for rank in range(2):
            with open(folder / f"{rank}.log", "wb") as log:
                started.append(subprocess.Popen([*command, str(rank)], stdout=log, stderr=log, env=environment))
        codes = [process.wait(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(2))
    assert codes == [0, 0], logs
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def found(both, request):
    """The results of one scenario from both processes."""
    pair = [results[request.param] for results in both]
    for result in pair:
        assert isinstance(result, dict), result
    return pair


def scenario(name):
    return pytest.mark.parametrize("found", [name], indirect=True, ids=[name])


def single():
    """The same training in this one process, on the joined batches."""
    model = ranks.network()
    for hold in ranks.train(model):
        last = hold
    return {n: p.detach() for n, p in model.named_parameters()}, last.masks


def assert_equal_and_near(one, two, reference):
    assert one.keys() == two.keys() == reference.keys()
    for name, weight in reference.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-10)


@scenario("digests")
def test_different_masks_are_refused_by_every_process(found):
    for result in found:
        for case in ("bits", "names", "strangers", "swap", "swap names"):
            assert result[case].startswith("MaskError: the 2 processes hold different masks ("), (case, result[case])
            assert "`masks = secateur.broadcast(masks)`" in result[case]
        assert result["unchanged"] and result["after broadcast"] == "nothing was refused"


@scenario("digests")
def test_broadcast_gives_every_process_the_masks_of_the_first(found):
    expected = ranks.random_masks(ranks.network(), 5).digest

    assert [result["broadcast"] for result in found] == [expected, expected]


@scenario("scores")
def test_joined_scores_are_those_of_one_process_over_all_data(found):
    x, y = ranks.points()
    whole = Task(ranks.network(), nn.functional.cross_entropy, [(x, y)]).gradients()
    first = Task(ranks.network(), nn.functional.cross_entropy, [(x[:5], y[:5])]).gradients()

    for name in whole:
        torch.testing.assert_close(found[0]["joined"][name], whole[name], rtol=0, atol=1e-14)
        torch.testing.assert_close(found[0]["none here"][name], first[name], rtol=0, atol=1e-14)
        assert torch.equal(found[0]["joined"][name], found[1]["joined"][name]), "every process has the same bits"
        assert found[0]["half"][name].eq(3).all(), "the shares of 1,001 and 1,002 examples add up in bf16"
    assert all("DataError: no process has an example" in result["none"] for result in found)


@scenario("scores")
def test_the_first_process_decides(found):
    assert found[0]["own decision"] != found[1]["own decision"]
    assert found[1]["decision"] == found[0]["decision"] == found[0]["own decision"]


@scenario("replicated")
def test_data_parallel_training_is_that_of_one_process_on_the_joined_batch(found):
    reference, masks = single()

    assert_equal_and_near(found[0]["weights"], found[1]["weights"], reference)
    assert found[0]["kept"] == found[1]["kept"] and found[0]["kept"][-1] == (masks.kept, masks.digest)
    for name, mask in masks.items():
        assert found[0]["weights"][name][~mask].eq(0).all()


@scenario("sharded")
def test_sharded_training_is_that_of_one_process_on_the_joined_batch(found):
    reference, masks = single()

    assert_equal_and_near(found[0]["weights"], found[1]["weights"], reference)
    for name, mask in masks.items():
        assert found[0]["weights"][name][~mask].eq(0).all()


@scenario("sharded")
def test_sharded_zeros_stay_after_every_step_and_in_the_optimizer(found):
    model = ranks.network()
    before, after = ranks.random_masks(model, 1), ranks.random_masks(model, 2)

    for result in found:
        assert result["alive"] == [0] * (ranks.STEPS + 1)
        assert result["zeros"][: ranks.SWAP + 1] == [before.digest] * ranks.SWAP + [(before & after).digest]
        assert result["clean"] == [0.0] * (ranks.STEPS + 1)
        assert result["names"] == list(model.state_dict())


@scenario("sharded")
def test_a_process_notices_what_was_written_to_its_shard(found):
    for result in found:
        assert "pruned weights of `0.weight` are not zero" in result["noticed"]
        assert result["applied"] == "nothing was refused"


def test_a_single_process_needs_no_group():
    score = {"w": torch.tensor([[1.0, 2.0]])}
    masks = choose(score, 1)

    assert reduce_scores(score, 3) is score
    assert broadcast(masks) is masks
    assert isinstance(masks, Masks)
