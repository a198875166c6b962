"""Collecting whole trajectories into splits, and the nested quarters of the training set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fairchem_kd.data.frames import Frame, Trajectory

#: Folder of the first 1/4, 2/4 and 3/4 of the training set; ``train`` itself is the whole.
QUARTERS = {1: "train_1of4", 2: "train_2of4", 3: "train_3of4"}


@dataclass
class Split:
    """Frames in the order of their trajectories. A trajectory's id is unique in the data set."""

    name: str
    frames: list[Frame] = field(default_factory=list)
    sids: list[int] = field(default_factory=list)  #: the trajectory of each frame
    fids: list[int] = field(default_factory=list)  #: its number within the trajectory
    infos: list[dict[str, str]] = field(default_factory=list)  #: of each frame's trajectory
    skipped: Counter[str] = field(default_factory=Counter)
    tried: int = 0  #: trajectories computed, those without a usable frame included

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def trajectories(self) -> int:
        return len(set(self.sids))


def collect(name: str, size: int, first_sid: int, stream: Iterable[Trajectory]) -> Split:
    """Take trajectories in order until ``size`` frames are together; the last may be cut short."""
    split = Split(name)
    for number, trajectory in enumerate(stream):
        split.tried += 1
        split.skipped.update(trajectory.skipped)
        for fid, frame in enumerate(trajectory.frames[: size - len(split)]):
            split.frames.append(frame)
            split.sids.append(first_sid + number)
            split.fids.append(fid)
            split.infos.append(trajectory.info)
        if len(split) == size:
            break
    return split


def quarter_lengths(sids: list[int]) -> dict[int, int]:
    """How many leading frames make up 1, 2 and 3 quarters, never cutting a trajectory.

    Each is the first trajectory boundary at or after the exact share.
    """
    lengths = {}
    for quarter in QUARTERS:
        end = -(-quarter * len(sids) // 4)
        while end < len(sids) and sids[end] == sids[end - 1]:
            end += 1
        lengths[quarter] = end
    return lengths
