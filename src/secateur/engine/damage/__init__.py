"""What pruning did to a network's answers and features: figures and a sample set, for a report."""

from secateur.engine.damage.record import DAMAGE, SAMPLES, Damage, damage, read_damage

__all__ = ["DAMAGE", "SAMPLES", "Damage", "damage", "read_damage"]
