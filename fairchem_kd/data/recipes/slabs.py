"""Adsorbates on metal slabs with EMT labels: an OC20-like task that needs no download.

EMT is ASE's effective-medium theory. Its parameters for Al, Ni, Cu, Pd, Ag, Pt and Au are fitted to
those metals; those for H, C, N and O are made up (ASE's documentation says so). The labels are thus
a smooth, exactly reproducible, many-body potential with the shape of the OC20 task, and not
chemistry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.build import fcc100, fcc110, fcc111, fcc211
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, covalent_radii
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from ase.units import fs

from fairchem_kd.data.frames import Array, Frame, Trajectory, too_close

METALS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}

# (builder, repeats): 12 to 20 metal atoms, so that training on a laptop is quick.
FACETS: dict[str, tuple[Callable[..., Atoms], tuple[tuple[int, int, int], ...]]] = {
    "fcc111": (fcc111, ((2, 2, 3), (2, 2, 4), (2, 3, 3), (3, 2, 3))),
    "fcc100": (fcc100, ((2, 2, 3), (2, 2, 4), (2, 3, 3), (3, 2, 3))),
    "fcc110": (fcc110, ((2, 2, 4), (2, 3, 3), (1, 3, 5))),
    "fcc211": (fcc211, ((3, 2, 3), (3, 2, 2))),
}

# Positions in Å; the first atom is the one that points to the metal.
ADSORBATES: dict[str, tuple[str, tuple[tuple[float, float, float], ...]]] = {
    "H": ("H", ((0, 0, 0),)),
    "C": ("C", ((0, 0, 0),)),
    "N": ("N", ((0, 0, 0),)),
    "O": ("O", ((0, 0, 0),)),
    "CO": ("CO", ((0, 0, 0), (0, 0, 1.14))),
    "OH": ("OH", ((0, 0, 0), (0, 0, 0.98))),
    "NH": ("NH", ((0, 0, 0), (0, 0, 1.03))),
    "CH": ("CH", ((0, 0, 0), (0, 0, 1.10))),
    "N2": ("NN", ((0, 0, 0), (0, 0, 1.11))),
    "NO": ("NO", ((0, 0, 0), (0, 0, 1.16))),
    "O2": ("OO", ((0, 0, 0), (0, 0, 1.25))),
    "CN": ("CN", ((0, 0, 0), (0, 0, 1.18))),
    "CH2": ("CHH", ((0, 0, 0), (0.93, 0, 0.60), (-0.93, 0, 0.60))),
    "NH2": ("NHH", ((0, 0, 0), (0.81, 0, 0.63), (-0.81, 0, 0.63))),
    "H2O": ("OHH", ((0, 0, 0), (0.76, 0, 0.59), (-0.76, 0, 0.59))),
    "CHO": ("CHO", ((0, 0, 0), (-0.95, 0, 0.55), (1.03, 0, 0.60))),
}

#: (adsorbate, metal) pairs that no training, validation or test slab holds, pure or in an alloy.
HELD_OUT = frozenset(
    {
        ("H", "Au"), ("C", "Al"), ("N", "Pt"), ("O", "Cu"), ("CO", "Pt"), ("CO", "Ag"),
        ("OH", "Ag"), ("NH", "Ni"), ("CH", "Cu"), ("N2", "Pd"), ("NO", "Al"), ("O2", "Ni"),
        ("CN", "Au"), ("CH2", "Pd"), ("NH2", "Cu"), ("H2O", "Pt"), ("CHO", "Ni"),
    }
)  # fmt: skip

FRAMES_PER_TRAJECTORY = 5
MAX_FORCE = 15.0  # eV/Å, on any atom
MIN_FORCE = 0.15  # eV/Å, the largest on a free atom: below it frames of a relaxation are all alike
MIN_MOVE = 0.03  # Å, the largest displacement of an atom between two kept frames
CLOSEST = 0.62  # of the sum of two covalent radii
VACUUM = 14.0  # Å between the slab's top and its next image


def is_held_out(adsorbate: str, metals: tuple[str, ...]) -> bool:
    """Whether any of the slab's metals makes a held-out pair with the adsorbate."""
    return any((adsorbate, metal) in HELD_OUT for metal in metals)


def draw_system(rng: np.random.Generator, held_out: bool) -> tuple[str, tuple[str, ...]]:
    """An adsorbate and one metal, or two for an alloy, on the asked side of the held-out line."""
    while True:
        adsorbate = str(rng.choice(list(ADSORBATES)))
        metals = rng.choice(list(METALS), size=1 if rng.random() < 0.4 else 2, replace=False)
        named = tuple(str(metal) for metal in metals)
        if is_held_out(adsorbate, named) == held_out:
            return adsorbate, named


def build_slab(rng: np.random.Generator, facet: str, metals: tuple[str, ...]) -> Atoms:
    """A strained slab of one metal or of a random or ordered binary alloy, tags and constraint set.

    Tag 1 goes to atoms of the upper half with fewer than the bulk's 12 neighbours, tag 0 to all
    others, which are fixed, as in OC20.
    """
    builder, repeats = FACETS[facet]
    size = repeats[rng.integers(len(repeats))]
    ordered = bool(rng.random() < 0.5)
    share = float(rng.uniform(0.2, 0.8)) if len(metals) == 2 and not ordered else 0.5
    constants = [METALS[metal] for metal in metals]
    mean = constants[0] if len(metals) == 1 else (1 - share) * constants[0] + share * constants[1]
    constant = mean * (1.0 + rng.uniform(-0.05, 0.05))
    slab = builder(metals[0], size=size, a=constant, vacuum=None)
    height = float(np.ptp(slab.positions[:, 2]))
    slab.cell[2] = (0.0, 0.0, height + VACUUM)
    slab.positions[:, 2] -= slab.positions[:, 2].min()
    slab.pbc = True

    if len(metals) == 2:
        if ordered:  # alternating layers, or alternating atoms in the order of building
            layer = np.unique(slab.positions[:, 2].round(3), return_inverse=True)[1]
            mask = (layer if rng.random() < 0.5 else np.arange(len(slab))) % 2 == 1
        else:
            mask = rng.random(len(slab)) < share
        numbers = slab.numbers.copy()
        numbers[mask] = atomic_numbers[metals[1]]
        slab.numbers = numbers

    neighbours = np.zeros(len(slab), dtype=int)
    reach = 1.2 * constant / np.sqrt(2.0)
    for shift in np.ndindex(5, 5):
        offset = (shift[0] - 2) * slab.cell[0] + (shift[1] - 2) * slab.cell[1]
        gap = slab.positions[None] + offset - slab.positions[:, None]
        distance = np.linalg.norm(gap, axis=-1)
        neighbours += ((distance > 1e-6) & (distance < reach)).sum(axis=1)
    surface = (neighbours < 12) & (slab.positions[:, 2] > 0.5 * height)
    slab.set_tags(surface.astype(int))
    slab.set_constraint(FixAtoms(mask=~surface))
    return slab


def _rotation(rng: np.random.Generator, max_tilt: float) -> Array:
    """A rotation ``(3, 3)``: any turn about z, then a tilt of z by at most ``max_tilt``."""
    turn, azimuth = rng.uniform(0, 2 * np.pi, size=2)
    tilt = np.arccos(rng.uniform(np.cos(max_tilt), 1.0))

    def about_z(angle: float) -> Array:
        c, s = np.cos(angle), np.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    c, s = np.cos(tilt), np.sin(tilt)
    about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return about_z(azimuth) @ about_y @ about_z(turn)


def add_adsorbate(rng: np.random.Generator, slab: Atoms, adsorbate: str) -> None:
    """Put one adsorbate on a random site, turned at random, at a random height.

    C of CO and CN points to the metal, tilted by up to 60 degrees; other molecules point anywhere.
    The molecule comes down until an atom is within a random share (0.8 to 1.25) of the covalent
    distance to the slab.
    """
    symbols, places = ADSORBATES[adsorbate]
    tilt = np.pi / 3 if adsorbate in ("CO", "CN") else np.pi
    shape = np.asarray(places, dtype=float) * rng.uniform(0.92, 1.15)
    shape = shape @ _rotation(rng, tilt).T
    site = rng.random(2) @ slab.cell[:2, :2]
    molecule = Atoms(symbols, positions=shape, tags=[2] * len(symbols))
    molecule.positions[:, :2] += site

    tightness = rng.uniform(0.8, 1.25)
    radii = covalent_radii[molecule.numbers][:, None] + covalent_radii[slab.numbers][None]
    images = [i * slab.cell[0] + j * slab.cell[1] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    around = slab.positions[None] + np.asarray(images)[:, None]  # (9, N, 3)
    height = slab.positions[:, 2].max() + 5.0 - molecule.positions[:, 2].min()
    while height > 0:
        placed = molecule.positions + np.array([0.0, 0.0, height])
        gap = np.linalg.norm(placed[:, None, None] - around[None], axis=-1).min(axis=1)
        if (gap < tightness * radii).any():
            break
        height -= 0.05
    molecule.positions[:, 2] += height
    slab.extend(molecule)


def label(atoms: Atoms) -> tuple[Frame | None, str]:
    """The frame of a structure rounded to float32, or None and why it is left out."""
    pos = atoms.positions.astype(np.float32)
    cell = np.asarray(atoms.cell).astype(np.float32)
    stored = Atoms(atoms.numbers, positions=pos.astype(float), cell=cell.astype(float), pbc=True)
    if too_close(stored.get_all_distances(mic=True), covalent_radii[stored.numbers], CLOSEST):
        return None, "atoms too close"
    stored.calc = EMT()
    energy = float(stored.get_potential_energy())
    forces = stored.get_forces()
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        return None, "label not finite"
    tags = atoms.get_tags().astype(np.int32)
    fixed = (tags == 0).astype(np.int32)
    size = np.linalg.norm(forces, axis=1)
    if size.max() > MAX_FORCE:
        return None, f"force above {MAX_FORCE:g} eV/Å"
    if size[fixed == 0].max() < MIN_FORCE:
        return None, f"forces below {MIN_FORCE:g} eV/Å"
    frame = Frame(
        numbers=stored.numbers.astype(np.int64), pos=pos, cell=cell, tags=tags, fixed=fixed,
        energy=energy, forces=forces.astype(np.float32),
    )  # fmt: skip
    return frame, ""


def _move(rng: np.random.Generator, atoms: Atoms, start: Array, kind: str, step: int) -> None:
    """Go on to the trajectory's next frame, in place."""
    if kind == "rattle":
        scale = np.where(atoms.get_tags() == 2, 1.5, 1.0)[:, None] * rng.uniform(0.03, 0.22)
        atoms.set_positions(start + rng.normal(size=start.shape) * scale)
    elif kind == "relax":
        FIRE(atoms, logfile=None, maxstep=0.1).run(fmax=0.05, steps=(1, 2, 4, 6, 8)[step])
    else:
        VelocityVerlet(atoms, timestep=2.0 * fs).run(6)


def make_trajectory(seed: int, split: int, index: int, held_out: bool) -> Trajectory:
    """Trajectory ``index`` of a split: a rattled slab, relaxed, heated or rattled again and again.

    The same arguments give the same bytes, whatever ran before in the process.
    """
    rng = np.random.default_rng([seed, split, index])
    adsorbate, metals = draw_system(rng, held_out)
    facet = str(rng.choice(list(FACETS)))
    kind = str(rng.choice(["rattle", "relax", "md"], p=[0.3, 0.35, 0.35]))
    atoms = build_slab(rng, facet, metals)
    # A random alloy may come out as a pure metal.
    metals = tuple(metal for metal in metals if atomic_numbers[metal] in atoms.numbers)
    info = {"adsorbate": adsorbate, "metals": "-".join(metals), "facet": facet, "kind": kind}
    trajectory = Trajectory(info)
    if held_out and not is_held_out(adsorbate, metals):
        trajectory.skipped["held-out metal not in the alloy"] += FRAMES_PER_TRAJECTORY
        return trajectory

    for _ in range(2 if rng.random() < 0.25 else 1):
        add_adsorbate(rng, atoms, adsorbate)
    atoms.calc = EMT()
    start = atoms.positions.copy()
    if kind != "rattle":  # set_positions leaves the fixed atoms where they are
        atoms.set_positions(start + rng.normal(size=start.shape) * rng.uniform(0.05, 0.2))
    if kind == "md":
        temperature = rng.uniform(400, 2500)
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)

    last: Array | None = None
    for step in range(FRAMES_PER_TRAJECTORY):
        if step > 0 or kind == "rattle":
            _move(rng, atoms, start, kind, step)
        if not np.isfinite(atoms.positions).all():
            trajectory.skipped["trajectory diverged"] += 1
            break
        moved = np.inf if last is None else np.abs(atoms.positions - last).max()
        if moved < MIN_MOVE:
            trajectory.skipped["too like the frame before"] += 1
            continue
        frame, reason = label(atoms)
        if frame is None:
            trajectory.skipped[reason] += 1
            if kind == "md" and reason.startswith(("atoms", "force above")):
                break  # such a start would only blow up further
            continue
        trajectory.frames.append(frame)
        last = atoms.positions.copy()
    return trajectory
