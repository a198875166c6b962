"""Collisions of small molecules with GFN2-xTB labels: a COLL-like task that needs no download.

Two molecules start 5 Å apart, turned at random and warm, and fly at each other; frames are taken
along the way. GFN2-xTB (Bannwarth et al. 2019) is a semi-empirical tight-binding method; tblite
computes it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.data import atomic_masses, covalent_radii
from numpy.typing import NDArray

from fairchem_kd.data.frames import Array, Frame, Trajectory, too_close
from fairchem_kd.errors import UserError

#: Closed-shell molecules of H, C, N and O, by ASE's names.
MOLECULES = (
    "H2", "N2", "CO", "H2O", "NH3", "CH4", "CO2", "HCN", "N2O", "C2H2", "H2CO", "C2H4", "CH3OH",
)  # fmt: skip

#: Molecules that only test_ood has, of the same elements; each of its pairs holds one.
HELD_OUT = ("C2H6", "H2O2", "N2H4", "HCOOH", "CH3CN", "H2CCO", "H3CNH2", "CH3CHO")

SEPARATION = 5.0  # Å between the centres of mass
TIME_STEP = 0.5  # fs
STRIDE = 8  # steps between two frames that may be kept
CANDIDATES = 24  # frames that may be kept, in all 96 fs
FRAMES_PER_TRAJECTORY = 6
MAX_FORCE = 30.0  # eV/Å, on any atom
CLOSEST = 0.55  # of the sum of two covalent radii
CELL = 40.0  # Å: no model's cutoff reaches the next image


def check_tblite() -> None:
    """Raise UserError where tblite is not installed; it is imported by the workers alone."""
    if importlib.util.find_spec("tblite") is None:
        raise UserError(
            "The recipe 'collisions' needs tblite for its GFN2-xTB labels, which is not installed; "
            "install it with: pip install 'fairchem-kd[collisions]'."
        )


class Xtb:
    """GFN2-xTB energy and forces of one molecular system.

    Args:
        numbers: atomic numbers, ``(N,)``.
        pos: Å, ``(N, 3)``.
    """

    def __init__(self, numbers: NDArray[np.int64], pos: Array) -> None:
        from tblite.interface import Calculator

        self.calculator = Calculator("GFN2-xTB", numbers, pos / units.Bohr)
        self.calculator.set("verbosity", 0)
        self.result: Any = None

    def __call__(self, pos: Array, restart: bool = True) -> tuple[float, Array]:
        """Energy in eV and forces in eV/Å, ``(N, 3)``; from the last wave function or afresh.

        Raises:
            RuntimeError: the SCF does not converge.
        """
        self.calculator.update(positions=pos / units.Bohr)
        self.result = self.calculator.singlepoint(self.result if restart else None)
        energy = float(self.result.get("energy")) * units.Hartree
        return energy, -self.result.get("gradient") * (units.Hartree / units.Bohr)


def _rotation(rng: np.random.Generator) -> Array:
    """A rotation ``(3, 3)``, uniform over all of them."""
    matrix, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix *= np.sign(np.diag(upper))
    matrix[:, 0] *= np.sign(np.linalg.det(matrix))
    return matrix


def draw_pair(rng: np.random.Generator, held_out: bool) -> tuple[str, Atoms, Array]:
    """Two molecules about to collide, around the cell's centre, and their velocities.

    Args:
        held_out: whether one of the two is from ``HELD_OUT``.

    Returns:
        The names, the atoms, and velocities in Å/fs ``(N, 3)`` without net momentum.
    """
    names = [str(name) for name in rng.choice(MOLECULES, size=2)]
    if held_out:
        names[0] = str(rng.choice(HELD_OUT))
    temperature = rng.uniform(100, 1000)
    speed = rng.uniform(0.02, 0.06)  # Å/fs, of one centre of mass towards the other
    parts, velocities = [], []
    for side, name in zip((-1.0, 1.0), names, strict=True):
        part = molecule(name)
        part.positions = (part.positions - part.get_center_of_mass()) @ _rotation(rng).T
        part.positions[:, 2] += side * SEPARATION / 2
        part.positions[:, :2] += side * rng.uniform(-0.4, 0.4, size=2)  # not quite head on
        mass = part.get_masses()[:, None]
        thermal = rng.normal(size=part.positions.shape) * np.sqrt(
            units.kB * temperature / mass
        ) * units.fs  # fmt: skip
        thermal -= (mass * thermal).sum(axis=0) / mass.sum()
        thermal[:, 2] -= side * speed / 2
        parts.append(part)
        velocities.append(thermal)
    pair = parts[0] + parts[1]
    velocity = np.concatenate(velocities)
    mass = pair.get_masses()[:, None]
    velocity -= (mass * velocity).sum(axis=0) / mass.sum()
    pair.positions += CELL / 2 - pair.get_center_of_mass()
    return "+".join(sorted(names)), pair, velocity


def label(xtb: Xtb, numbers: NDArray[np.int64], pos: Array) -> tuple[Frame | None, str]:
    """The frame of positions rounded to float32, or None and why it is left out."""
    rounded = pos.astype(np.float32)
    exact = rounded.astype(float)
    distances = np.linalg.norm(exact[:, None] - exact[None], axis=-1)
    if too_close(distances, covalent_radii[numbers], CLOSEST):
        return None, "atoms too close"
    try:
        energy, forces = xtb(exact, restart=False)
    except RuntimeError:
        return None, "SCF not converged"
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        return None, "label not finite"
    if np.linalg.norm(forces, axis=1).max() > MAX_FORCE:
        return None, f"force above {MAX_FORCE:g} eV/Å"
    frame = Frame(
        numbers=numbers, pos=rounded, cell=(np.eye(3) * CELL).astype(np.float32),
        # GemNet-OC's quadruplets are for tags 1 and 2 (its qint_tags), so no atom may have 0.
        tags=np.full(len(numbers), 2, dtype=np.int32), fixed=np.zeros(len(numbers), dtype=np.int32),
        energy=energy, forces=forces.astype(np.float32),
    )  # fmt: skip
    return frame, ""


def make_trajectory(seed: int, split: int, index: int, *, held_out: bool) -> Trajectory:
    """Trajectory ``index`` of a split: velocity-Verlet dynamics of one collision.

    The same arguments give the same bytes, whatever ran before in the process.
    """
    rng = np.random.default_rng([seed, split, index])
    names, pair, velocity = draw_pair(rng, held_out)
    kept = set(rng.choice(CANDIDATES, size=FRAMES_PER_TRAJECTORY, replace=False).tolist())
    trajectory = Trajectory({"molecules": names})

    numbers = pair.numbers.astype(np.int64)
    pos = pair.positions.copy()
    # Forces over masses are accelerations in ASE's unit of time, of which a fs is units.fs.
    to_acceleration = units.fs**2 / atomic_masses[numbers][:, None]
    xtb = Xtb(numbers, pos)
    try:
        acceleration = xtb(pos)[1] * to_acceleration  # Å/fs²
        for candidate in range(max(kept) + 1):
            if candidate in kept:
                frame, reason = label(xtb, numbers, pos)
                if frame is None:
                    trajectory.skipped[reason] += 1
                else:
                    trajectory.frames.append(frame)
            for _ in range(STRIDE):
                velocity += 0.5 * TIME_STEP * acceleration
                pos += TIME_STEP * velocity
                acceleration = xtb(pos)[1] * to_acceleration
                velocity += 0.5 * TIME_STEP * acceleration
    except RuntimeError:
        trajectory.skipped["SCF not converged during the dynamics"] += 1
    return trajectory
