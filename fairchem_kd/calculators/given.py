"""The calculator that a command's options name."""

from __future__ import annotations

import argparse

from fairchem_kd.calculators.asking import Calculator, parse_features
from fairchem_kd.calculators.options import factory_of
from fairchem_kd.errors import UserError


def calculator_of(args: argparse.Namespace) -> Calculator:
    """The calculator that the options name.

    Raises:
        UserError: it cannot be made.
    """
    factory = factory_of(args)
    if factory is None:
        raise UserError("--calculator MODULE:FACTORY is missing.")
    return Calculator(factory, parse_features(args.features))
