"""Running a student: what it is for."""

from fairchem_kd.md.calculator import StudentCalculator
from fairchem_kd.md.exploded import Exploded
from fairchem_kd.md.module import ModuleCalculator

__all__ = ["Exploded", "ModuleCalculator", "StudentCalculator"]
