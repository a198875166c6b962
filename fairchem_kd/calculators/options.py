"""The options of a command that asks a calculator, and what they stand for."""

from __future__ import annotations

import argparse

from fairchem_kd.calculators.factory import Factory
from fairchem_kd.errors import UserError


def add_calculator_arguments(group: argparse._ActionsContainer, *, required: bool) -> None:
    """Which calculator, how it is made, and whether it is asked again."""
    group.add_argument(
        "--calculator", required=required, metavar="MODULE:FACTORY",
        help="an ASE calculator: ase.calculators.emt:EMT, or my_file:make in the current folder",
    )  # fmt: skip
    group.add_argument(
        "--calculator-args", metavar="JSON", help="keyword arguments of the factory, as JSON"
    )
    group.add_argument(
        "--teacher-name", metavar="NAME",
        help="tells it from another calculator with the same factory, arguments and version",
    )  # fmt: skip
    group.add_argument(
        "--retry", action="store_true",
        help="ask again about structures of which the calculator could say nothing",
    )  # fmt: skip


def factory_of(args: argparse.Namespace) -> Factory | None:
    """The factory that the options name; None for none.

    Raises:
        UserError: an option that will not do, or that goes with a factory alone.
    """
    if args.calculator is not None:
        return Factory.given(args.calculator, args.calculator_args, args.teacher_name)
    for name in ("calculator_args", "teacher_name", "retry"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} goes with --calculator MODULE:FACTORY, which is not "
                "given."
            )
    return None


def parse_part(given: str | None) -> tuple[int, int] | None:
    """``3/20`` as (2, 20).

    Raises:
        UserError: it reads otherwise.
    """
    if given is None:
        return None
    number, slash, of = given.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise UserError(f"--part {given} must read I/N, with I from 1 to N, such as 3/20.")
    return int(number) - 1, int(of)
