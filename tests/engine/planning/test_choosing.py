"""The best choice among offers: against every choice there is, within the limit to the unit, and why tensors stay."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.planning.plan_kit import how, network, task_of

from secateur.core.patterns import parse_pattern
from secateur.core.streams import stream
from secateur.engine.planning.choosing import NANO, Market, Seller, ladder, stored
from secateur.engine.planning.planner import plan_network
from secateur.engine.planning.searching import largest, read_twice

FEW = (0.5, 0.2, 0.05)


def seller(name, shape, harm, ms, words=("unstructured", "4x1"), macs=7):
    """A tensor with losses and times that are plain formulas."""
    worse = {word: 1 + 0.4 * i for i, word in enumerate(words)}
    quick = {word: 1 - 0.3 * i for i, word in enumerate(words)}
    return Seller(
        name, shape, macs, {word: parse_pattern(word) for word in words},
        lambda word, d: harm * worse[word] * (1 - d) ** 2,
        lambda word, d: ms if not word else ms * (0.1 + 1.1 * d) * quick[word], FEW,
    )  # fmt: skip


def market(seed, tensors=4):
    draws = torch.rand((tensors, 2), generator=stream(seed, "market")).tolist()
    return Market(tuple(seller(f"t{i}", (8, 8 * (i + 1)), a, 0.2 + b) for i, (a, b) in enumerate(draws)))


def every_choice(made, quantity):
    """Cost and loss of all combinations of offers."""
    for offers in itertools.product(*(s.offers for s in made.sellers)):
        yield sum(o.cost(quantity) for o in offers), math.fsum(o.loss for o in offers)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["ms", "bytes", "macs", "params"]), st.floats(0.05, 1.1))
def test_the_choice_is_at_least_as_good_as_every_other(seed, quantity, share):
    """No combination of rungs within the limit loses less; what is left of it only buys weights back."""
    made = market(seed)
    limit = round(share * made.now(quantity))
    best = min((loss for cost, loss in every_choice(made, quantity) if cost <= limit), default=None)

    choice = made.best(quantity, limit)

    if best is None:
        assert choice is None and made.least(quantity).cost(quantity) > limit
        return
    assert choice.cost(quantity) <= limit
    assert choice.loss <= best + 1e-12 and choice.exact and choice.bound <= best + 1e-12
    for offer, s in zip(choice.offers.values(), made.sellers, strict=True):
        again = s.offer(offer.pattern, offer.kept)
        assert again == offer and 0 < offer.kept <= s.total


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_the_cheapest_choice_within_a_loss(seed, limit):
    made = market(seed)
    best = min(cost for cost, loss in every_choice(made, "macs") if loss <= limit)

    choice = made.cheapest("macs", limit)

    assert choice.cost("macs") <= best and choice.loss <= limit


def test_weights_are_met_to_the_unit():
    """As many single weights as asked for, exactly, whatever the number."""
    made = Market(tuple(s.only(["unstructured"]) for s in market(3).sellers))
    least = made.least("params").cost("params")
    for keep in (*range(least, least + 40), made.now("params") - 1, made.now("params")):
        assert made.best("params", keep).cost("params") == keep
    assert made.best("params", least - 1) is None


def test_the_same_density_everywhere_is_never_better():
    made = market(5)
    for share in (0.3, 0.5, 0.8):
        limit = round(share * made.now("ms"))
        for word in ("unstructured", "4x1"):
            alone = made.only([word])
            even, chosen = alone.uniform(word, "ms", limit), alone.best("ms", limit)
            assert even is None or (even.cost("ms") <= limit and len({o.pattern for o in even.offers.values()}) <= 2)
            assert even is None or chosen.loss <= even.loss + 1e-12


def test_why_a_tensor_stays_as_it_is():
    slow = Seller("t", (8, 8), 3, {"unstructured": parse_pattern("unstructured")}, lambda w, d: 1 - d,
                  lambda w, d: 1.5 if w else 1.0, FEW)  # fmt: skip
    assert slow.never("ms") == "never pays: at best 1.5 ms (unstructured), as it is 1 ms"
    assert slow.never("params") == ""
    assert slow.only([]).never("ms") == "it cannot take any of the patterns"


def test_bytes_are_those_of_a_bit_for_each_place_and_the_values():
    assert stored(64, 64) == 256
    assert stored(1000, 100_000) == 12_500 + 4000 + 128
    assert list(ladder()) == sorted(ladder(), reverse=True) and 0 < min(ladder()) < max(ladder()) < 1


@pytest.mark.parametrize("bias", [0.5, 1.0, 1.7])
def test_a_search_ends_at_the_goal_whatever_the_forecast_is_off_by(bias):
    """What is measured is ``bias`` times the limit and never falls below 1: the largest limit that meets the goal."""
    read = lambda limit: max(1.0, bias * limit)  # noqa: E731
    met, missed = largest(
        10.0, lambda limit: limit, read, 10.0, lambda t: t.limit + 10.0 - t.got, rounds=12, slack=0.02
    )
    assert 9.8 <= met.got <= 10.0
    assert missed is None or missed.got > 10.0

    met, missed = largest(0.5, lambda limit: limit, read, 0.5, lambda t: t.limit + 0.5 - t.got, rounds=8, slack=0.02)
    assert met is None and missed.got >= 1.0


def test_a_patient_search_ends_sooner_and_still_meets_the_goal():
    """Slack that grows takes what a narrow one would improve on; without end it takes the first that meets."""
    read = lambda limit: 1.3 * limit  # noqa: E731
    tried = []
    given = {"goal": 10.0, "propose": lambda t: 0.97 * t.limit * 10.0 / t.got, "rounds": 6, "slack": 0.01}

    met, _ = largest(10.0, lambda limit: tried.append(limit) or limit, read, **given, patience=lambda tries: 4.0)
    assert len(tried) == 2 and met.got == pytest.approx(9.7)

    tried.clear()
    met, _ = largest(
        1.0, lambda limit: tried.append(limit) or limit, read, **given,
        patience=lambda tries: float("inf") if tries > 1 else 1.0,
    )  # fmt: skip
    assert len(tried) == 2 and met.got <= 10.0


def test_nano_seconds_are_whole():
    plan = plan_network(task_of(network()), "ms 1.2", how(compare=False))
    assert NANO == 10**6 and plan.figures["ms"].forecast <= 1.2


def test_a_pattern_that_takes_longer_at_first_is_still_left_out_where_nothing_need_go():
    """Costs that jump up where zeros begin: the highest density whose cost fits is found, the tensor whole first."""
    slow = lambda word, d: 0.2 + 1.2 * d if word else 1.0  # noqa: E731
    pattern = {"unstructured": parse_pattern("unstructured")}
    made = Market(tuple(Seller(n, (40, 40), 1, pattern, lambda w, d: (1 - d) ** 2, slow, FEW) for n in "ab"))

    for limit in (2.0, 1.9, 1.0, 0.55):
        even = made.uniform("unstructured", "ms", round(limit * NANO))
        fits = [k for k in range(1601) if 2 * slow("unstructured" if k < 1600 else "", k / 1600) <= limit + 1e-9]
        best = 2 * (1 - max(fits) / 1600) ** 2
        assert even.cost("ms") <= limit * NANO and best <= even.loss <= best + 0.03
    assert made.uniform("unstructured", "ms", round(0.4 * NANO)) is None


@pytest.mark.parametrize(("word", "least"), [("unstructured", 1), ("4x1", 4)])
def test_offers_go_down_to_one_unit(word, least):
    """Of a large tensor too; and none has fewer."""
    one = Seller("t", (400, 300), 1, {word: parse_pattern(word)}, lambda w, d: 1 - d, lambda w, d: d, ladder(120_000))
    assert min(offer.kept for offer in one.offers) == least
    assert Market((one,)).uniform(word, "params", 3 * least).cost("params") <= 3 * least
    rungs = ladder(120_000)
    assert list(rungs) == sorted(set(rungs), reverse=True) and rungs[-1] == 1 / 120_000


def test_bytes_of_halves():
    assert stored(1000, 100_000, 2) == 12_500 + 2000 + 128 and stored(90_000, 100_000, 2) == 186_000 + 6_628
    assert stored(99_000, 100_000, 2) == 200_000


def test_a_reading_that_was_lucky_is_read_again():
    """Each first reading is a tenth too low: what is taken in the end meets the goal by readings that are not."""
    true, seen = (lambda limit: 1.2 * limit), []

    def search(first, high):
        return largest(
            first, lambda limit: limit, lambda limit: 0.9 * true(limit), 10.0, lambda t: 0.99 * t.limit * 10.0 / t.got,
            rounds=6, slack=0.03, high=high,
        )  # fmt: skip

    def again(limit):
        seen.append(limit)
        return true(limit)

    lucky, _ = search(10.0, math.inf)
    assert true(lucky.made) > 10.0 >= lucky.got
    met, missed = read_twice(search, again, 10.0, 10.0)
    assert 8.5 <= true(met.made) <= 10.0 and met.got == true(met.made) and missed.got > 10.0
    assert seen == sorted(seen, reverse=True) and len(seen) > 1

    assert read_twice(search, lambda limit: 11.0, 10.0, 10.0) == (None, missed)  # never met twice
