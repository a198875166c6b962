"""What the columns of a store are called."""

from __future__ import annotations

ENERGY, FORCES = "energy", "forces"


def output_column(name: str) -> str:
    """Of an output of a model: an energy, forces, or whatever it predicts."""
    return f"output:{name}"


def atom_energy_column(output: str) -> str:
    """Of what atoms give to an output.

    Of the energy the name without more, as in stores from before there were others.
    """
    return "atom_energy" if output == ENERGY else f"atom_energy:{output}"


def feature_column(address: str, form: str) -> str:
    """Of a feature in a form: ``node``, ``vector`` or, summed onto atoms, of ``edge``."""
    return f"feature:{address}:{form}"
