"""Frames of a teacher's own dynamics."""

from __future__ import annotations

from collections.abc import Sequence

from fairchem_kd.explore.dynamics import Walker, drive
from fairchem_kd.explore.potentials import Answer, Potential
from fairchem_kd.explore.settings import Found, Group, Settings
from fairchem_kd.explore.starts import Start


def teacher_dynamics(starts: Sequence[Start], settings: Settings, teacher: Potential) -> Group:
    """Every so many steps a frame, until the end or until a limit is broken."""
    group = Group()
    walkers = [Walker(number, start, settings) for number, start in enumerate(starts)]

    def at_frames(step: int, going: Sequence[tuple[Walker, Answer]]) -> None:
        kelvin = settings.temperature_at(step)
        for walker, answer in going:
            pos = walker.atoms.positions.copy()
            group.found.append(Found(walker.number, pos, "dynamics", kelvin, answer))

    def at_end(_: Walker, why: str) -> None:
        group.counts[f"dynamics ended: {why}"] += 1

    drive(walkers, teacher, settings, at_frames, at_end)
    group.found.sort(key=lambda one: one.start)
    return group
