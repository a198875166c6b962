"""The two commands: `fairchem` (stock, and what we add) and `fairchem-kd` (a dispatcher).

A module that is a subcommand of `fairchem-kd` has ``add_arguments(parser)`` and ``run(args)``,
which returns the exit code. It is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.plugin import check_fairchem_core


class Command(NamedTuple):
    """Where a subcommand lives, what it does, and whether it can do without fairchem-core."""

    module: str
    help: str
    standalone: bool = False


COMMANDS = {
    "cka": Command("fairchem_kd.analysis.cli_cka", "show how similar the layers of two models are"),
    "compare": Command("fairchem_kd.analysis.cli_compare", "show what distillation gained"),
    "configs": Command("fairchem_kd.configs", "list or copy the shipped YAML configs", True),
    "cost": Command("fairchem_kd.analysis.cli_cost", "time models, and what distilling costs"),
    "data": Command("fairchem_kd.data.cli", "make datasets with real labels, or convert your own"),
    "demo": Command(
        "fairchem_kd.demo.cli", "train students with and without a teacher, and compare"
    ),
    "doctor": Command("fairchem_kd.doctor", "check this installation and say what to mend", True),
    "export": Command("fairchem_kd.export", "make a small, portable checkpoint of a run's best"),
    "features": Command(
        "fairchem_kd.analysis.cli_features", "write a model's embeddings of structures to a file"
    ),
    "fit-scales": Command("fairchem_kd.fit_scales", "fit the scale factors of GemNet-OC or PaiNN"),
    "init": Command("fairchem_kd.init", "write the config that distils a student"),
    "inspect": Command("fairchem_kd.features.inspect", "list the features that a model offers"),
    "physics": Command("fairchem_kd.analysis.cli_physics", "check how models do as potentials"),
    "report": Command("fairchem_kd.analysis.cli_report", "put a whole study on one HTML page"),
    "sweep": Command("fairchem_kd.sweep.cli", "run a YAML's many configs, and tabulate them"),
}


#: Warnings of stock fairchem's code that a user of our commands can do nothing about.
NOISE = (
    r"'PaiNN\w*\.jittable' is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def report(error: UserError) -> int:
    """Print what the user can mend on stderr, and return the exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def _drop_noise() -> None:
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


def fairchem(argv: Sequence[str] | None = None) -> int:
    """Run the `fairchem` command and return its exit code."""
    try:
        check_fairchem_core()
    except UserError as error:
        return report(error)
    from fairchem_kd.launch import main

    _drop_noise()
    try:
        return main(argv)
    except KeyboardInterrupt:
        told = "stopped; a training goes on with --timestamp-id and the name of its run's folder"
        print(f"\n{told}", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairchem-kd` command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fairchem-kd",
        description="Tools around knowledge distillation with fairchem.",
        epilog="Training is done with `fairchem main --mode train --config-yml CONFIG`.",
    )
    parser.add_argument("--version", action="version", version=f"fairchem-kd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {
        name: subparsers.add_parser(name, help=command.help, description=command.help)
        for name, command in COMMANDS.items()
    }
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # --help, --version or an error: all of them exit
    command = COMMANDS[argv[0]]
    _drop_noise()
    try:
        if not command.standalone:
            check_fairchem_core()
        module = importlib.import_module(command.module)
        module.add_arguments(parsers[argv[0]])
        return module.run(parser.parse_args(argv))
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        told = f"stopped: fairchem-kd {argv[0]}; the files it had written are whole"
        print(f"\n{told}", file=sys.stderr)
        return 130
