"""How new structures are made: what all modes and each of them are told."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fairchem_kd.explore.geometry import Array
from fairchem_kd.explore.guards import Limits
from fairchem_kd.explore.potentials import Answer

RATTLE, RELAX, MD, STUDENT = "rattle", "relax", "md", "student"
MODES = (RATTLE, RELAX, MD, STUDENT)
DRAWS = 5  #: of the noise of one copy, before the copy is given up


@dataclass(frozen=True)
class Window:
    """Largest differences of a force, eV/Å, between which a student has something to learn."""

    low: float
    high: float

    def holds(self, difference: float) -> bool:
        return self.low <= difference <= self.high


@dataclass(frozen=True)
class Settings:
    """What is made of each structure; ``Limits`` are those of every mode."""

    mode: str = RATTLE
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    alike: float = 0.01  #: Å, see :class:`fairchem_kd.explore.duplicates.Known`
    most: int | None = None  #: frames that are kept of a split, evenly spread over what was found
    batch: int = 1  #: structures that are worked on together
    std: tuple[float, ...] = (0.03, 0.06, 0.12)  #: Å, of each coordinate's noise; in turn
    copies: int = 4  #: of each structure; of relaxations, how often they are repeated
    relax_steps: int = 8  #: along the forces, at most
    temperature: tuple[float, float] = (300.0, 300.0)  #: K, at the beginning and at the end
    steps: int = 200  #: of dynamics
    every: int = 20  #: steps between two frames
    time_step: float = 0.5  #: fs
    friction: float = 0.02  #: per fs, of the Langevin thermostat
    window: Window | None = None
    before_crash: int = 2  #: frames that are kept of the last ones before a student's crash

    def temperature_at(self, step: int) -> float:
        """K."""
        first, last = self.temperature
        return first + (last - first) * step / max(self.steps, 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Found:
    """A new structure."""

    start: int  #: of the group's structures, which one it came of
    pos: Array  #: Å, (N, 3), as a data set keeps them
    kind: str  #: rattled, relaxed, dynamics, student, or crash
    value: float  #: Å of noise, K, or eV/Å between student and teacher
    answer: Answer | None = None  #: the teacher's


@dataclass
class Group:
    """What came of some structures."""

    found: list[Found] = field(default_factory=list)
    #: how many were not taken, or ended, for which reason
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[float] = field(default_factory=list)  #: eV/Å, of the frames looked at
