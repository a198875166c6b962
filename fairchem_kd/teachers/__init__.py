"""What a teacher says of a batch, whatever stands behind it.

:class:`Teacher` is the seam: distillation asks ``teach(batch, requests)`` and gets a frozen
:class:`Taught`. :class:`LiveTeacher` runs the model at every step, and an :class:`EnsembleTeacher`
several. Another source (a store, a calculator) is one more file here with the same methods.
"""

from __future__ import annotations

from fairchem_kd.teachers.base import Taught, Teacher
from fairchem_kd.teachers.ensemble import EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher

__all__ = ["EnsembleTeacher", "LiveTeacher", "Taught", "Teacher"]
