"""Doctor: what is wrong with this machine, or with a file of weights; and a repaired copy."""

from secateur.engine.doctor.examining import Report, examine
from secateur.engine.doctor.findings import Finding
from secateur.engine.doctor.machine import environment
from secateur.engine.doctor.mending import Mended, mend
from secateur.engine.doctor.opening import Beside

__all__ = ["Beside", "Finding", "Mended", "Report", "environment", "examine", "mend"]
