"""Removing units from a network: what can go, and a smaller network that is proved to compute the same."""

from secateur.surgery.analysis import Analysis, Granularity, Group, Row, analyse
from secateur.surgery.blocks import Block, Shortened, block_influence, blocks, remove_blocks
from secateur.surgery.choosing import Goal, choose, parse_goal
from secateur.surgery.costs import Costs
from secateur.surgery.dead import Cleared, dead_units, shrink_dead
from secateur.surgery.scoring import how, unit_scores, unscored
from secateur.surgery.shrink import Removal, Shrunk, shrink
from secateur.surgery.times import LayerTimes

__all__ = [
    "Analysis", "Block", "Cleared", "Costs", "Goal", "Granularity", "Group", "LayerTimes", "Removal", "Row",
    "Shortened", "Shrunk", "analyse", "block_influence", "blocks", "choose", "dead_units", "how", "parse_goal",
    "remove_blocks", "shrink", "shrink_dead", "unit_scores", "unscored",
]  # fmt: skip
