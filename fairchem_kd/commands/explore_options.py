"""How structures are made and what is left out: options of ``explore`` and of ``rounds``.

Imported for every help text, so nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.commands.arguments import at_least, more_than
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.explore.settings import Settings

#: As in :mod:`fairchem_kd.explore.settings`, which imports ASE; a test compares.
MODES = ("rattle", "relax", "md", "student")
OF_MODES = {
    "std": ("rattle", "relax"),
    "copies": ("rattle", "relax"),
    "relax_steps": ("relax",),
    "temperature": ("relax", "md", "student"),
    "steps": ("md", "student"),
    "every": ("md", "student"),
    "time_step": ("md", "student"),
    "friction": ("md", "student"),
    "window": ("student",),
    "before_crash": ("student",),
}
#: What :func:`add_dynamics_arguments` and :func:`add_limit_arguments` add.
OF_DYNAMICS = ("temperature", "steps", "every", "time_step", "friction", "window", "before_crash")
OF_LIMITS = ("min_distance", "max_gap", "max_force", "apart_from", "alike")
#: Structures that are worked on together, with a checkpoint and with a calculator.
MODEL_BATCH, CALCULATOR_BATCH = 16, 1


def add_making_arguments(parser: argparse.ArgumentParser) -> None:
    """How structures are made; each option goes with some of the modes."""
    group = parser.add_argument_group("how structures are made")
    group.add_argument(
        "--std", nargs="+", type=more_than(0.0), metavar="Å",
        help="rattle, relax: standard deviations of the noise, in turn (0.03 0.06 0.12)",
    )  # fmt: skip
    group.add_argument(
        "--copies", type=at_least(1), metavar="N",
        help="rattle: copies of a structure; relax: how often it is rattled and relaxed (4)",
    )  # fmt: skip
    group.add_argument(
        "--relax-steps", type=at_least(0), metavar="N",
        help="relax: steps down along the forces, at most; how many is drawn (8)",
    )  # fmt: skip
    add_dynamics_arguments(group)


def add_dynamics_arguments(group: argparse._ActionsContainer) -> None:
    """How dynamics run, and what is kept of a student's."""
    group.add_argument(
        "--temperature", nargs="+", type=more_than(0.0), metavar="K",
        help="relax: by which energies are accepted; md, student: of the dynamics, or at their "
        "beginning and end (300)",
    )  # fmt: skip
    group.add_argument("--steps", type=at_least(1), metavar="N", help="md, student (200)")
    group.add_argument(
        "--every", type=at_least(1), metavar="N", help="md, student: steps between two frames (20)"
    )
    group.add_argument("--time-step", type=more_than(0.0), metavar="FS", help="md, student (0.5)")
    group.add_argument(
        "--friction", type=at_least(0.0), metavar="PER_FS",
        help="md, student: of the Langevin thermostat (0.02)",
    )  # fmt: skip
    group.add_argument(
        "--window", nargs=2, type=at_least(0.0), metavar=("LOW", "HIGH"),
        help="student: frames are kept where the largest difference of its forces from the "
        "teacher's is within, eV/Å (from that of 9 in 10 of the given structures to ten times it)",
    )  # fmt: skip
    group.add_argument(
        "--before-crash", type=at_least(0), metavar="N",
        help="student: frames that are kept of the last ones before its dynamics crash (2)",
    )  # fmt: skip


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """What is left out of what was found."""
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--min-distance", type=at_least(0.0), default=0.55, metavar="SHARE",
        help="atoms closer than that share of the sum of their covalent radii (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-gap", type=more_than(0.0), default=5.0, metavar="Å",
        help="an atom or a fragment that far from all else, unless it was before (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-force", type=more_than(0.0), default=50.0, metavar="EV_PER_Å",
        help="larger forces on an atom (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--apart-from", nargs="+", type=Path, default=[], metavar="DATA",
        help="splits or files with whose structures nothing may be alike, beside those for "
        "validation and tests that lie beside SOURCE",
    )  # fmt: skip
    group.add_argument(
        "--alike", type=at_least(0.0), default=0.01, metavar="Å",
        help="structures whose distances are those of another one, of the source, of what was "
        "found, or of a split for tests beside it, but for that (%(default)s); 0: none",
    )  # fmt: skip


def check_dynamics(args: argparse.Namespace, mode: str) -> None:
    """Refuse dynamics that make no sense, and splits to stay apart from that are not there.

    Raises:
        UserError: naming the option.
    """
    if args.temperature is not None and len(args.temperature) > (1 if mode == "relax" else 2):
        raise UserError("--temperature takes one value, or of dynamics its beginning and its end.")
    if args.window is not None and not args.window[0] < args.window[1]:
        raise UserError(
            f"--window {args.window[0]:g} {args.window[1]:g} is empty: give the smaller value "
            "first."
        )
    steps, every = args.steps or 200, args.every or 20
    if mode in ("md", "student") and every > steps:
        raise UserError(f"--every {every} is more than --steps {steps}: no frame would be taken.")
    for path in args.apart_from:
        if not path.exists():
            raise UserError(f"--apart-from {path} does not exist; name a split or a file.")


def settings_of(args: argparse.Namespace, mode: str) -> Settings:
    """What the options say of how structures are made; what was not given has its default."""
    from fairchem_kd.explore.guards import Limits
    from fairchem_kd.explore.settings import Settings

    batch = args.batch or (MODEL_BATCH if args.calculator is None else CALCULATOR_BATCH)
    return Settings(
        mode=mode,
        seed=args.seed,
        limits=Limits(args.min_distance, args.max_gap, args.max_force),
        alike=args.alike,
        most=args.frames,
        batch=batch,
        **_given(args),
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of how structures are made that were given, as settings have them."""
    from fairchem_kd.explore.settings import Window

    named: dict[str, Any] = {name: getattr(args, name, None) for name in OF_MODES}
    given = {name: value for name, value in named.items() if value is not None}
    if "std" in given:
        given["std"] = tuple(given["std"])
    if "temperature" in given:
        given["temperature"] = (args.temperature[0], args.temperature[-1])
    if "window" in given:
        given["window"] = Window(*args.window)
    return given
