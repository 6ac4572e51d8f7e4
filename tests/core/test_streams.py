"""Random streams: functions of seed and name, and nothing global."""

import torch

from secateur.core.streams import global_state, number, seed_global, set_global_state, stream


def test_random_streams_are_functions_of_seed_and_name():
    one, two, other = stream(0, "order", 1), stream(0, "order", 1), stream(0, "order", 2)
    state = torch.get_rng_state()

    draws = [torch.rand(100, generator=g) for g in (one, two, other)]

    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len({number(seed, name) for seed in range(50) for name in ("mask", "order", "init")}) == 150
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_state_can_be_put_back():
    with torch.random.fork_rng():
        state = global_state()
        seed_global(1, "dropout")
        first = torch.rand(3)
        seed_global(1, "dropout")
        assert torch.equal(torch.rand(3), first)
        set_global_state(state)
        assert torch.equal(torch.get_rng_state(), state["cpu"])
