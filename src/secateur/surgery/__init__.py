"""Removing units from a network: what can go, and a smaller network that is proved to compute the same."""

from secateur.surgery.analysis import Analysis, Granularity, Group, Row, analyse
from secateur.surgery.shrink import Removal, Shrunk, shrink

__all__ = ["Analysis", "Granularity", "Group", "Removal", "Row", "Shrunk", "analyse", "shrink"]
