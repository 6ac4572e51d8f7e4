"""Named random streams: every random choice has a name and a seed, none uses the global generator."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def number(seed: int, *names: str | int) -> int:
    """A 63-bit seed that is a function of ``seed`` and the names alone.

    >>> number(0, "order", 1) == number(0, "order", 1), number(0, "order", 1) == number(0, "order", 2)
    (True, False)
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose, for example ``stream(seed, "order", epoch)``."""
    return torch.Generator(device=device).manual_seed(number(seed, *names))


def seed_global(seed: int, *names: str | int) -> None:
    """Seed torch's global generators (dropout and module constructors can use no other)."""
    torch.manual_seed(number(seed, *names))


@contextlib.contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Inside, torch's global generators are seeded by name; afterwards they are as they were, on all devices."""
    before = global_state()
    try:
        seed_global(seed, *names)
        yield
    finally:
        set_global_state(before)


def global_state() -> dict[str, torch.Tensor]:
    """The state of torch's global generators, to be put back with :func:`set_global_state`."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return state


def set_global_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`global_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    for name, value in state.items():
        if name.startswith("cuda") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value.cpu(), name)
