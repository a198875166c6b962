"""The bars that a student has to clear: which figures there are, and limits of them by use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.reading import Unreadable, read_yaml
from fairchem_kd.schema import is_null, read_value

AT_MOST, AT_LEAST = "at most", "at least"
ERRORS, GAP, PHYSICS, SPEED = "errors", "gap", "physics", "speed"


@dataclass(frozen=True)
class Figure:
    """What can be measured of a student, and which way is better."""

    group: str  #: what it is measured with
    sense: str  #: `AT_MOST` or `AT_LEAST`
    unit: str
    help: str
    share: bool = False  #: between 0 and 1


_WORST = "on the worst of the splits"
#: By the name that a file of bars has for it.
FIGURES: dict[str, Figure] = {
    "energy_mae": Figure(ERRORS, AT_MOST, "eV", f"error of energies, {_WORST}"),
    "energy_mae_per_atom": Figure(ERRORS, AT_MOST, "eV/atom", f"the same per atom, {_WORST}"),
    "forces_mae": Figure(ERRORS, AT_MOST, "eV/Å", f"error of force components, {_WORST}"),
    "forces_cosine_similarity": Figure(
        ERRORS, AT_LEAST, "", f"of predicted and true forces, {_WORST}"
    ),
    "energy_gap_closed": Figure(
        GAP, AT_LEAST, "", f"share of the gap from --baseline to the teacher, {_WORST}"
    ),
    "forces_gap_closed": Figure(GAP, AT_LEAST, "", f"the same of forces, {_WORST}"),
    "md_stable": Figure(PHYSICS, AT_LEAST, "", "share of NVE runs that last", share=True),
    "md_drift": Figure(
        PHYSICS, AT_MOST, "eV/atom/ps", "slope of the total energy, median without its sign"
    ),
    "md_fluctuation": Figure(PHYSICS, AT_MOST, "eV/atom", "its spread about that line, median"),
    "relax_converged": Figure(
        PHYSICS, AT_LEAST, "", "share of relaxations that converge", share=True
    ),
    "relax_steps": Figure(PHYSICS, AT_MOST, "", "steps of a relaxation, mean"),
    "relax_energy_above": Figure(
        PHYSICS, AT_MOST, "eV", "of where they end over the labels' method's own ends, median"
    ),
    "relax_displacement": Figure(PHYSICS, AT_MOST, "Å", "of the free atoms from there, median"),
    "force_mismatch": Figure(
        PHYSICS, AT_MOST, "eV/Å", "forces against the slope of the energy, mean"
    ),
    "force_mismatch_relative": Figure(PHYSICS, AT_MOST, "", "the same over that slope, rms"),
    "scan_error": Figure(PHYSICS, AT_MOST, "eV", "of energies along a bond, by the labels' method"),
    "md_steps_per_second": Figure(SPEED, AT_LEAST, "1/s", "of MD in ASE, on one structure"),
    "md_speedup": Figure(SPEED, AT_LEAST, "", "the same over the teacher's"),
}

#: Bars by what a student is for. Relaxations that end within 5 meV rank structures as their labels
#: do; 0.1 meV per atom and ps heat 300 K by 0.4 % in 1 ps; a student below twice the teacher's
#: speed is hardly worth its errors.
USES: dict[str, dict[str, float]] = {
    "screening": {
        "energy_mae_per_atom": 0.010,
        "forces_mae": 0.10,
        "md_speedup": 2.0,
    },
    "relaxation": {
        "forces_mae": 0.10,
        "relax_converged": 0.9,
        "relax_energy_above": 0.005,
        "force_mismatch_relative": 0.2,
        "md_speedup": 2.0,
    },
    "md": {
        "forces_mae": 0.10,
        "md_stable": 1.0,
        "md_drift": 1e-4,
        "force_mismatch_relative": 0.05,
        "md_speedup": 2.0,
    },
}


def bars_for(use: str | None, file: Path | None) -> dict[str, float]:
    """The limits by figure: those of a use, and over them those of a file.

    Args:
        use: one of `USES`.
        file: YAML, ``figure: limit``; ``null`` takes away a bar of the use.

    Raises:
        UserError: neither is given, or the file is not what it should be.
    """
    if use is None and file is None:
        raise UserError(
            f"There is nothing to hold the student against: give --for {'|'.join(USES)}, or --bars "
            "FILE."
        )
    found = dict(USES[use]) if use is not None else {}
    if file is not None:
        for name, limit in read_bars(file).items():
            if limit is None:
                found.pop(name, None)
            else:
                found[name] = limit
    if not found:
        raise UserError(
            f"{file} leaves no bar: name a figure and its limit ({', '.join(FIGURES)})."
        )
    return found


def read_bars(file: Path) -> dict[str, float | None]:
    """What a file of bars says.

    Raises:
        UserError: it is missing, or has a figure or a limit that there is not.
    """
    try:
        given = read_yaml(file)
    except OSError as error:
        raise UserError(
            f"--bars {file} cannot be read ({error.strerror}): name a YAML file of bars."
        ) from error
    except Unreadable as error:
        raise UserError(f"--bars {file} cannot be read ({error}): name a YAML file.") from error
    if not isinstance(given, Mapping):
        raise UserError(
            f"{file} holds no bars: give lines such as forces_mae: 0.05, a figure and its limit."
        )
    return {str(name): _limit(str(name), limit, file) for name, limit in given.items()}


def _limit(name: str, given: Any, file: Path) -> float | None:
    if name not in FIGURES:
        raise UserError(f"{file} has an unknown figure '{name[:60]}'{did_you_mean(name, FIGURES)}.")
    if is_null(given):
        return None
    figure = FIGURES[name]
    bounds = {"ge": None if figure.group == GAP else 0.0, "le": 1.0 if figure.share else None}
    return float(read_value(float, given, f"{file}: {name}", bounds))
