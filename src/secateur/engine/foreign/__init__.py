"""Weights in files that others wrote: read without running anything in them, written back in the same format."""

from secateur.engine.foreign.reading import read
from secateur.engine.foreign.record import Foreign

__all__ = ["Foreign", "read"]
