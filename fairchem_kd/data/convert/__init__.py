"""Other people's files as fairchem's data sets."""

from __future__ import annotations

from fairchem_kd.data.convert.conversion import convert

__all__ = ["convert"]
