"""Langevin dynamics of many structures side by side, with one call of the potential a step.

The integrator is BAOAB (B. Leimkuhler and C. Matthews, Appl. Math. Res. Express 2013, 34): half a
kick, half a drift, the thermostat, half a drift, and half a kick with the new forces. Without
friction it is velocity Verlet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from ase import units
from ase.data import atomic_masses

from fairchem_kd.explore.geometry import Array
from fairchem_kd.explore.guards import Guard
from fairchem_kd.explore.potentials import Answer, Potential
from fairchem_kd.explore.settings import Settings
from fairchem_kd.explore.starts import Start

SILENT = "the potential could say nothing"


class Walker:
    """One structure on its way; fixed atoms rest."""

    def __init__(self, number: int, start: Start, settings: Settings) -> None:
        self.number = number
        self.start = start
        self.guard = Guard(start, settings.limits)
        self.atoms = start.atoms()
        self.done = False
        #: Å, (N, 3): where it was of late
        self.recent: deque[Array] = deque(maxlen=settings.every)
        self._generator = start.generator(settings.seed, "dynamics")
        self._free = start.free[:, None]
        self._mass = atomic_masses[start.numbers][:, None]  # u, (N, 1)
        self._half = 0.5 * settings.time_step * units.fs
        self._keep = float(np.exp(-settings.friction * settings.time_step))
        self.velocity = self._thermal(settings.temperature_at(0))  # Å per ASE's unit of time
        self.forces = np.zeros_like(start.pos)  # eV/Å

    def kick(self) -> None:
        """Half a step of the forces."""
        self.velocity += np.where(self._free, self._half * self.forces / self._mass, 0.0)

    def drift(self, temperature: float) -> None:
        """A step of the velocities, with the thermostat in its middle."""
        pos = self.atoms.positions + self._half * self.velocity
        if self._keep < 1:
            noise = np.sqrt(1 - self._keep**2) * self._thermal(temperature)
            self.velocity = self._keep * self.velocity + noise
        self.atoms.positions[:] = pos + self._half * self.velocity

    def settle(self) -> None:
        """Put the atoms where a data set keeps them, so that the forces there are its labels."""
        self.atoms.positions[:] = self.start.settled(self.atoms.positions)

    def _thermal(self, temperature: float) -> Array:
        spread = np.sqrt(units.kB * temperature / self._mass)
        normal = self._generator.standard_normal(self.start.pos.shape)
        return np.where(self._free, spread * normal, 0.0)


#: Takes the number of a step, and those under way with what is said of them.
AtFrames = Callable[[int, Sequence[tuple[Walker, Answer]]], None]
#: Takes one that cannot go on, and why.
AtEnd = Callable[[Walker, str], None]


def drive(
    walkers: Sequence[Walker],
    potential: Potential,
    settings: Settings,
    at_frames: AtFrames,
    at_end: AtEnd,
) -> None:
    """Drive all of them to the end, or for as long as each of them stays within its limits.

    Args:
        walkers: at their beginnings.
        potential: is asked about all of them at once.
        settings: how long, how hot, and how many steps lie between two frames.
        at_frames: is called with those still under way; marking one ``done`` stops it.
        at_end: is called with each that breaks a limit.
    """
    active = _with_forces(list(walkers), potential, at_end)
    for step in range(1, settings.steps + 1):
        if not active:
            return
        is_frame = step % settings.every == 0
        for walker in active:
            walker.kick()
            walker.drift(settings.temperature_at(step))
            if is_frame:
                walker.settle()
        active = _within(active, at_end, whole=is_frame)
        asked = potential([walker.atoms for walker in active]) if active else []
        going: list[tuple[Walker, Answer]] = []
        for walker, answer in zip(active, asked, strict=True):
            if answer is None:
                _end(walker, SILENT, at_end)
                continue
            why = walker.guard.broken_by(walker.atoms.positions, answer.forces, whole=False)
            if why:
                _end(walker, why, at_end)
                continue
            walker.forces = answer.forces
            walker.kick()
            walker.recent.append(walker.atoms.positions.copy())
            going.append((walker, answer))
        if is_frame and going:
            at_frames(step, going)
        active = [walker for walker, _ in going if not walker.done]


def _with_forces(walkers: list[Walker], potential: Potential, at_end: AtEnd) -> list[Walker]:
    """Those of which the potential can say something."""
    asked = potential([walker.atoms for walker in walkers]) if walkers else []
    for walker, answer in zip(walkers, asked, strict=True):
        if answer is None:
            _end(walker, SILENT, at_end)
        else:
            walker.forces = answer.forces
    return [walker for walker in walkers if not walker.done]


def _within(active: Sequence[Walker], at_end: AtEnd, *, whole: bool) -> list[Walker]:
    """Those whose atoms are where they may be: looked at before anybody is asked about them."""
    for walker in active:
        why = walker.guard.broken_by(walker.atoms.positions, whole=whole)
        if why:
            _end(walker, why, at_end)
    return [walker for walker in active if not walker.done]


def _end(walker: Walker, why: str, at_end: AtEnd) -> None:
    walker.done = True
    at_end(walker, why)
