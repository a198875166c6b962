"""A student's dynamics, and where on its way its teacher says something else.

What a student needs to learn most is where its own dynamics go (as in on-policy sampling, and in
the committees of DP-GEN): frames at which its forces and the teacher's differ by something, and yet
not so much that nothing there makes sense; and the last ones before its dynamics break down.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairchem_kd.explore.dynamics import Walker, drive
from fairchem_kd.explore.geometry import Array
from fairchem_kd.explore.potentials import Answer, Potential
from fairchem_kd.explore.rattling import NO_ANSWER, placed
from fairchem_kd.explore.settings import Found, Group, Settings, Window
from fairchem_kd.explore.starts import Start

BEYOND = "student and teacher further apart than the window"
BELOW = "student and teacher closer than the window"
CRASHED = "student's dynamics crashed"
KEPT_OF_CRASH = "crash"
_LOOKS = 4  # frames before a crash that are looked at
#: Of the structures given, the share on which a student is closer to its teacher than the window.
_QUANTILE = 0.9
_WIDTH = 10.0  # the window's upper end over its lower one
_LEAST = 1e-3  # eV/Å: no window begins below


def difference(start: Start, student: Answer, teacher: Answer) -> float:
    """eV/Å: of the forces on a free atom, the largest difference."""
    apart = np.linalg.norm(student.forces - teacher.forces, axis=1)
    return float(apart[start.free].max(initial=0.0))


def find_window(starts: Sequence[Start], student: Potential, teacher: Potential) -> Window | None:
    """From where on a student is further from its teacher than on nine in ten of the structures.

    None where nothing can be said of any of them.
    """
    found = []
    for at in range(0, len(starts), student.batch):
        chunk = starts[at : at + student.batch]
        atoms = [start.atoms() for start in chunk]
        for start, own, theirs in zip(chunk, student(atoms), teacher(atoms), strict=True):
            if own is not None and theirs is not None:
                found.append(difference(start, own, theirs))
    if not found:
        return None
    low = max(float(np.quantile(found, _QUANTILE)), _LEAST)
    return Window(float(f"{low:.3g}"), float(f"{_WIDTH * low:.3g}"))


class _Following:
    """What is kept while students are on their way."""

    def __init__(self, settings: Settings, teacher: Potential) -> None:
        assert settings.window is not None
        self.settings = settings
        self.window = settings.window
        self.teacher = teacher
        self.group = Group()

    def at_frames(self, _: int, going: Sequence[tuple[Walker, Answer]]) -> None:
        asked = self.teacher([walker.atoms for walker, _ in going])
        for (walker, own), theirs in zip(going, asked, strict=True):
            pos = walker.atoms.positions
            why = self._why_not(walker, pos, theirs)
            if why or theirs is None:
                self._stop(walker, why)
                continue
            apart = difference(walker.start, own, theirs)
            self.group.differences.append(apart)
            if apart > self.window.high:
                self._stop(walker, BEYOND)
            elif self.window.holds(apart):
                self.group.found.append(Found(walker.number, pos.copy(), "student", apart, theirs))
            else:
                self.group.counts[BELOW] += 1

    def at_end(self, walker: Walker, why: str) -> None:
        """Keep the last frames of which the teacher says something that one can learn from."""
        self.group.counts[CRASHED] += 1
        self.group.counts[f"dynamics ended: {why}"] += 1
        recent = list(walker.recent)[::-1][:: max(1, self.settings.every // _LOOKS)][:_LOOKS]
        kept = 0
        for pos in recent:
            if kept == self.settings.before_crash:
                return
            settled = walker.start.settled(pos)
            (theirs,) = self.teacher([placed(walker.start, settled)])
            if self._why_not(walker, settled, theirs) or theirs is None:
                continue
            largest = float(np.linalg.norm(theirs.forces, axis=1).max())
            self.group.found.append(Found(walker.number, settled, KEPT_OF_CRASH, largest, theirs))
            kept += 1

    def _why_not(self, walker: Walker, pos: Array, theirs: Answer | None) -> str:
        if theirs is None:
            return NO_ANSWER
        return walker.guard.broken_by(pos, theirs.forces)

    def _stop(self, walker: Walker, why: str) -> None:
        walker.done = True
        self.group.counts[why] += 1


def student_dynamics(
    starts: Sequence[Start], settings: Settings, student: Potential, teacher: Potential
) -> Group:
    """Dynamics with the student's forces, and what its teacher makes of them."""
    following = _Following(settings, teacher)
    walkers = [Walker(number, start, settings) for number, start in enumerate(starts)]
    drive(walkers, student, settings, following.at_frames, following.at_end)
    following.group.found.sort(key=lambda one: one.start)
    return following.group
