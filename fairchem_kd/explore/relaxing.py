"""Rattle, relax, repeat: structures around which a teacher's own landscape leads.

The idea is augment-atoms' (J. L. A. Gardner; used in arXiv 2506.10956): a structure is rattled,
goes some way down along a model's forces, and is the parent of the next one where its energy allows
that at a temperature. Cells stay as they are here, parents are a chain, and how far one goes down
is drawn, so that there are structures of all stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import units

from fairchem_kd.explore.geometry import Array
from fairchem_kd.explore.guards import Guard
from fairchem_kd.explore.potentials import Answer, Potential
from fairchem_kd.explore.rattling import NO_ANSWER, displaced
from fairchem_kd.explore.settings import Found, Group, Settings
from fairchem_kd.explore.starts import Start

REJECTED = "energies too high for the temperature"
_SOFTNESS = 0.1  # Å per eV/Å: a step goes no further, however small forces are
_LEAST_FORCE = 1e-3  # eV/Å: below it there is no way down


class _Chain:
    """One structure, rattled and relaxed again and again."""

    def __init__(self, number: int, start: Start, settings: Settings) -> None:
        self.number = number
        self.start = start
        self.settings = settings
        self.guard = Guard(start, settings.limits)
        self.atoms = start.atoms()
        self.parent = start.pos  # Å, (N, 3)
        self.parent_energy = 0.0  # eV
        self.left = 0  # steps down that are to be taken
        self.taken = 0
        self.std = 0.0
        self.fails = ""
        self.answer: Answer | None = None

    def rattle(self, repeat: int) -> None:
        """Leave the parent."""
        self.generator = self.start.generator(self.settings.seed, "relax", repeat)
        self.std = self.settings.std[repeat % len(self.settings.std)]
        self.left = int(self.generator.integers(0, self.settings.relax_steps + 1))
        self.taken = 0
        pos, self.fails = displaced(self.guard, self.parent, self.std, self.generator)
        if pos is not None:
            self.atoms.positions[:] = pos

    @property
    def moving(self) -> bool:
        return not self.fails and self.left > 0

    def step(self, answer: Answer | None) -> None:
        """Go down along the forces, the k-th step by at most std / k (Robbins and Monro)."""
        self.fails = self._broken(answer)
        if self.fails or answer is None:
            return
        forces = np.where(self.start.free[:, None], answer.forces, 0.0)
        largest = float(np.linalg.norm(forces, axis=1).max())
        self.taken, self.left = self.taken + 1, self.left - 1
        if largest < _LEAST_FORCE:
            self.left = 0
            return
        scale = min(self.std / (self.taken * largest), _SOFTNESS)
        self.atoms.positions[:] = self.start.settled(self.atoms.positions + scale * forces)
        self.fails = self.guard.broken_by(self.atoms.positions)

    def end(self, answer: Answer | None) -> str:
        """Take it for the next parent, or say why not."""
        why = self.fails or self._broken(answer)
        if why or answer is None:
            return why
        free = max(int(self.start.free.sum()), 1)
        uphill = (answer.energy - self.parent_energy) / free
        heat = units.kB * self.settings.temperature[0]
        if uphill > 0 and self.generator.random() >= np.exp(-uphill / heat):
            return REJECTED
        self.parent, self.parent_energy = self.atoms.positions.copy(), answer.energy
        self.answer = answer
        return ""

    def _broken(self, answer: Answer | None) -> str:
        if answer is None:
            return NO_ANSWER
        return self.guard.broken_by(self.atoms.positions, answer.forces, whole=False)


def relax(starts: Sequence[Start], settings: Settings, teacher: Potential) -> Group:
    """``settings.copies`` times rattle and relax, all structures side by side.

    A structure becomes the next parent, and is kept, with the probability min(1, exp(-u / kT)) of
    Metropolis, u being the energy that it lies above its parent for each free atom; with that of
    the whole structure hardly any would be taken of more than a few atoms.
    """
    group = Group()
    chains = [_Chain(number, start, settings) for number, start in enumerate(starts)]
    for chain, answer in zip(chains, _ask(teacher, chains), strict=True):
        if answer is None:
            group.counts[NO_ANSWER] += 1
        else:
            chain.parent_energy = answer.energy
            chain.answer = answer
    chains = [chain for chain in chains if chain.answer is not None]
    for repeat in range(settings.copies):
        for chain in chains:
            chain.rattle(repeat)
        while moving := [chain for chain in chains if chain.moving]:
            for chain, answer in zip(moving, _ask(teacher, moving), strict=True):
                chain.step(answer)
        ended = [chain for chain in chains if not chain.fails]
        answers: dict[int, Answer | None] = {
            chain.number: answer for chain, answer in zip(ended, _ask(teacher, ended), strict=True)
        }
        for chain in chains:
            answer = answers.get(chain.number)
            why = chain.end(answer)
            if why:
                group.counts[why] += 1
            else:
                group.found.append(Found(chain.number, _copy(chain), "relaxed", chain.std, answer))
    group.found.sort(key=lambda one: one.start)
    return group


def _ask(teacher: Potential, chains: Sequence[_Chain]) -> list[Answer | None]:
    return teacher([chain.atoms for chain in chains]) if chains else []


def _copy(chain: _Chain) -> Array:
    return chain.parent.copy()
