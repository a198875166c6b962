"""The `fairchem-kd` command, which finds the file of a subcommand and hands over to it.

A module that is a subcommand of `fairchem-kd` has ``add_arguments(parser)`` and ``run(args)``,
which returns the exit code. It is imported only when it is asked for, and what it imports itself,
torch above all, it imports in ``run``: help and usage errors come without that.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fairchem_kd._version import __version__
from fairchem_kd.commands.arguments import Parser
from fairchem_kd.commands.completion import SHELLS, script
from fairchem_kd.commands.terminal import on_any_terminal
from fairchem_kd.errors import UserError, of_disk, report
from fairchem_kd.stock.noise import drop_noise
from fairchem_kd.stock.plugin import check_fairchem_core


class Command(NamedTuple):
    """Where a subcommand lives, what it does, and whether it can do without fairchem-core."""

    module: str
    help: str
    standalone: bool = False


COMMANDS = {
    "accept": Command("fairchem_kd.commands.accept", "hold a student against the bars of a use"),
    "cka": Command("fairchem_kd.commands.cka", "show how similar the layers of two models are"),
    "compare": Command("fairchem_kd.commands.compare", "show what distillation gained"),
    "configs": Command(
        "fairchem_kd.commands.configs", "list or copy the shipped YAML configs", True
    ),
    "cost": Command("fairchem_kd.commands.cost", "time models, and what distilling costs"),
    "data": Command(
        "fairchem_kd.commands.data", "make datasets with real labels, or convert your own"
    ),
    "demo": Command(
        "fairchem_kd.commands.demo", "train students with and without a teacher, and compare"
    ),
    "doctor": Command(
        "fairchem_kd.commands.doctor", "check this installation and say what to mend", True
    ),
    "explore": Command(
        "fairchem_kd.commands.explore", "make new structures: rattled, relaxed, from dynamics"
    ),
    "export": Command(
        "fairchem_kd.commands.export", "make a small, portable checkpoint of a run's best"
    ),
    "features": Command(
        "fairchem_kd.commands.features", "write a model's embeddings of structures to a file"
    ),
    "fit-scales": Command(
        "fairchem_kd.commands.fit_scales", "fit the scale factors of GemNet-OC or PaiNN"
    ),
    "init": Command("fairchem_kd.commands.init", "write the config that distils a student"),
    "inspect": Command("fairchem_kd.commands.inspect", "list the features that a model offers"),
    "physics": Command("fairchem_kd.commands.physics", "check how models do as potentials"),
    "report": Command("fairchem_kd.commands.report", "put a whole study on one HTML page"),
    "rounds": Command(
        "fairchem_kd.commands.rounds", "train, explore with the student, and train on"
    ),
    "teach": Command(
        "fairchem_kd.commands.teach", "keep what a teacher says, for trainings to read"
    ),
    "sweep": Command("fairchem_kd.commands.sweep", "run a YAML's many configs, and tabulate them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairchem-kd` command and return its exit code."""
    return on_any_terminal(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    parser = Parser(
        prog="fairchem-kd",
        description="Tools around knowledge distillation with fairchem.",
        epilog="Training is done with `fairchem main --mode train --config-yml CONFIG`.",
    )
    parser.add_argument("--version", action="version", version=f"fairchem-kd {__version__}")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        help='what a shell completes this command by: eval "$(fairchem-kd --completion bash)"',
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {
        name: subparsers.add_parser(name, help=command.help, description=command.help)
        for name, command in COMMANDS.items()
    }
    if argv and argv[0].startswith("--completion"):
        return _complete(parser, parsers, argv)
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # --help, --version or an error: all of them exit
    command = COMMANDS[argv[0]]
    drop_noise()
    try:
        module = importlib.import_module(command.module)
        module.add_arguments(parsers[argv[0]])
        args = parser.parse_args(argv)
        if not command.standalone:
            check_fairchem_core()
        return module.run(args)
    except UserError as error:
        return report(error)
    except OSError as error:
        return report(of_disk(error))
    except KeyboardInterrupt:
        told = f"stopped: fairchem-kd {argv[0]}; the files it had written are whole"
        print(f"\n{told}", file=sys.stderr)
        return 130


def _complete(
    parser: Parser, parsers: Mapping[str, argparse.ArgumentParser], argv: Sequence[str]
) -> int:
    """Print the script of a shell; no subcommand is asked for beside it."""
    alone = argparse.ArgumentParser(prog="fairchem-kd", add_help=False)
    alone.add_argument("--completion", choices=SHELLS, required=True)
    shell = alone.parse_args(argv).completion
    for name, command in COMMANDS.items():
        importlib.import_module(command.module).add_arguments(parsers[name])
    print(script(parser, shell), end="")
    return 0
