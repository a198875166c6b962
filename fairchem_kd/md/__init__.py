"""Running a student: what it is for."""

from fairchem_kd.md.calculator import Exploded, StudentCalculator

__all__ = ["Exploded", "StudentCalculator"]
