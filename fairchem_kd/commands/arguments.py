"""How the commands parse: positional arguments anywhere, and numbers with a bound.

Imported for every help text, so nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fairchem_kd.errors import UserError

Number = TypeVar("Number", int, float)


class OutOfRange(argparse.ArgumentTypeError):
    """A number that its option cannot have; the message goes on after the option's name."""


def at_least(least: Number) -> Callable[[str], Number]:
    """The type of an option that takes no smaller number: whole ones if ``least`` is whole."""
    return _bounded(type(least), lambda number: number >= least, f"at least {least:g}")


def more_than(bound: Number) -> Callable[[str], Number]:
    """The type of an option that takes larger numbers only: whole ones if ``bound`` is whole."""
    return _bounded(type(bound), lambda number: number > bound, f"more than {bound:g}")


def _bounded(
    kind: type[Number], allowed: Callable[[Number], bool], words: str
) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise OutOfRange(f"must be {what} that is {words}, not '{text}'") from None
        if not (math.isfinite(value) and allowed(value)):
            raise OutOfRange(f"must be {words}, not {text}")
        return value

    return number


def words_of(args: argparse.Namespace, *names: str) -> list[str]:
    """Options as they would be given, for a process that is to do the same.

    Args:
        args: the options.
        names: of those that count; what was not given, an empty list and a switch that is off have
            no words.
    """
    words = []
    for name in names:
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [option, *map(str, values)]
    return words


def add_cluster_arguments(
    parser: argparse.ArgumentParser, jobs: str, *, array: bool = True
) -> argparse._ArgumentGroup:
    """What jobs ask of a scheduler; returns their group.

    Args:
        parser: of the command.
        jobs: what ``--submit`` does.
        array: they are an array, of which not all have to run at a time.
    """
    cluster = parser.add_argument_group("on a cluster (without SLURM: submitit's local executor)")
    cluster.add_argument("--submit", action="store_true", help=jobs)
    if array:
        cluster.add_argument(
            "--array-parallelism",
            type=at_least(1),
            default=16,
            metavar="N",
            help="jobs that may run at a time (default: 16)",
        )
    cluster.add_argument("--slurm-partition", help="name of the partition")
    cluster.add_argument("--slurm-account", help="name of the account")
    cluster.add_argument("--slurm-qos", help="name of the quality of service")
    cluster.add_argument(
        "--slurm-mem", type=at_least(1), default=80, help="memory of a node, in GB (default: 80)"
    )
    cluster.add_argument(
        "--slurm-timeout",
        type=more_than(0.0),
        default=72.0,
        help="hours, after which a job is queued again (default: 72)",
    )
    return cluster


class Parser(argparse.ArgumentParser):
    """A parser that takes ``A --flag B`` for ``A B --flag``, and so do its subcommands' parsers.

    Stock argparse has that in ``parse_intermixed_args``, which refuses subcommands.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False})
        self._intermixing = False

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, which every subcommand's parser is called with.

        Raises:
            UserError: a number is out of range.
        """
        if self._intermixing:
            return super().parse_known_args(args, namespace)
        # Words after `--` are positional, which the second pass of argparse would not know.
        plain = self._subparsers is not None or "--" in (args or ())
        self._intermixing = True
        try:
            parse = super().parse_known_args if plain else self.parse_known_intermixed_args
            return parse(args, namespace)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, OutOfRange):
                raise UserError(f"{error.argument_name} {error.message}.") from None
            self.error(str(error))
        finally:
            self._intermixing = False


def add_physics_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, dynamics and relaxations by which a model is looked at as a potential."""
    parser.add_argument(
        "--method",
        choices=("auto", "emt", "xtb", "none"),
        default="auto",
        help="of the labels (default: what the data set's card says)",
    )
    parser.add_argument(
        "--md-steps", type=more_than(1), default=200, metavar="N", help="of MD (200)"
    )
    parser.add_argument(
        "--time-step", type=more_than(0.0), default=0.5, metavar="FS", help="of MD (0.5)"
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0.0),
        default=300.0,
        metavar="K",
        help="of the velocities (300)",
    )
    parser.add_argument(
        "--fmax", type=more_than(0.0), default=0.05, help="of relaxations, eV/Å (0.05)"
    )
    parser.add_argument(
        "--relax-steps", type=more_than(0), default=100, metavar="N", help="of a relaxation (100)"
    )
