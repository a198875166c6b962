"""Displaced copies of structures, at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import numpy as np

from fairchem_kd.explore.geometry import Array
from fairchem_kd.explore.guards import Guard
from fairchem_kd.explore.potentials import Potential
from fairchem_kd.explore.settings import DRAWS, Found, Group, Settings
from fairchem_kd.explore.starts import Start

NO_ANSWER = "the teacher could say nothing"


def displaced(
    guard: Guard, pos: Array, std: float, generator: np.random.Generator
) -> tuple[Array | None, str]:
    """Positions with normal noise on free atoms; None, and why, where each draw breaks a limit.

    Args:
        guard: of the structure.
        pos: Å, ``(N, 3)``, from where.
        std: Å, of each coordinate.
        generator: gives as many numbers for each draw, whichever atoms are free.
    """
    why = ""
    for _ in range(DRAWS):
        noise = std * generator.standard_normal(pos.shape)
        moved = guard.start.settled(pos + np.where(guard.start.free[:, None], noise, 0.0))
        why = guard.broken_by(moved)
        if not why:
            return moved, ""
    return None, why


def rattle(starts: Sequence[Start], settings: Settings, teacher: Potential | None) -> Group:
    """``settings.copies`` copies of each structure.

    With a teacher, they have its labels, and those of too large forces are left out.
    """
    group = Group()
    made: list[Found] = []
    guards = [Guard(start, settings.limits) for start in starts]
    for number, guard in enumerate(guards):
        for copy in range(settings.copies):
            std = settings.std[copy % len(settings.std)]
            generator = guard.start.generator(settings.seed, "rattle", copy)
            pos, why = displaced(guard, guard.start.pos, std, generator)
            if pos is None:
                group.counts[why] += 1
            else:
                made.append(Found(number, pos, "rattled", std))
    if teacher is None:
        group.found = made
        return group
    for at in range(0, len(made), max(settings.batch, 1)):
        chunk = made[at : at + max(settings.batch, 1)]
        asked = teacher([placed(starts[one.start], one.pos) for one in chunk])
        for one, answer in zip(chunk, asked, strict=True):
            why = NO_ANSWER
            if answer is not None:
                why = guards[one.start].broken_by(one.pos, answer.forces, whole=False)
            if why:
                group.counts[why] += 1
            else:
                one.answer = answer
                group.found.append(one)
    return group


def placed(start: Start, pos: Array) -> ase.Atoms:
    """A structure with its atoms elsewhere."""
    atoms = start.atoms()
    atoms.positions[:] = pos
    return atoms
