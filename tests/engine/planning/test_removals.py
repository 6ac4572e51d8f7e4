"""Plans that remove units first: the target stays that of the whole network, in the user's words and on its clock."""

import copy
from dataclasses import replace

import pytest
from tests.engine.planning.plan_kit import how, task_of

from secateur.criteria.magnitude import Magnitude
from secateur.engine.planning.carrying import take_out
from secateur.engine.planning.planner import Planner
from secateur.engine.planning.plans import Removal
from secateur.engine.planning.removals import _Search, _Smaller
from secateur.engine.planning.targets import parse_aim

WORDS = ("unstructured",)


@pytest.mark.parametrize("to", ["latency 0.001x", "bytes 0.01x", "macs 0.000001x"])
def test_what_cannot_be_met_is_told_in_the_words_of_the_user(to):
    task, aim = task_of(), parse_aim(to)
    search = _Search(task, aim, how(WORDS, units=("channels",)))

    with search.whole.trying() as search.whole.trial:
        plan, error = search.tried(task, aim, search.inner)

    assert plan is None and str(error).startswith(f"{aim} cannot be met with unstructured")


def test_a_share_of_the_time_is_one_of_the_whole_network():
    """The file of the whole network is called in turn with that of the smaller one, at one pace."""
    task, aim = task_of(), parse_aim("latency 0.7x")
    whole = Planner(task, aim, how(WORDS, measure=True))
    smaller = replace(task, model=copy.deepcopy(task.model))
    take_out(smaller, Removal("macs 0.5x", ("channels",), Magnitude(), {"0.weight": (1, 1)}, 0.0))

    with whole.trying() as whole.trial:
        level = _Smaller(smaller, aim, how(WORDS, measure=True), whole)
        with level.trying() as level.trial:
            assert level.trial.beside is whole.trial and level.trial.bytes() < whole.trial.bytes()
            assert level.ms_now == whole.ms_now and level.goal == pytest.approx(0.7 * whole.ms_now)
            before = level.cost.now
            level._keep_pace()
            assert level.cost.now == pytest.approx(before * whole.ms_now / whole.cost.now)
            assert level.read(level.market.least("ms")) > 0
