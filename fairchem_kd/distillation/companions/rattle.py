"""Rattled copies: displaced structures for which the teacher speaks (arXiv 2306.14818, sec. 4).

The copies of a structure come from a pool of its own, so that what the teacher says of them can
be kept: the noise of a copy is a function of the pool's seed, the structure and the copy's number
in the pool, and which of them a step takes is one of the run's seed, the step and the structure.
Without a pool, noise is new at every step: a function of the run's seed, the step, the structure
and the number of the copy. Neither the rank, nor the number of ranks, nor the place in the batch
enters, and no global generator is drawn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.schema import option
from fairchem_kd.stock.structures import pick

WHERE = "task.distillation.rattle"
DRAWS = 5  # of the noise of one copy, before the copy is given up
PROOF = 8  # copies that have to be asked for before std is called too large

Array = NDArray[np.float64]


@dataclass
class RattleOptions:
    """Rattled copies of the structures of each batch, which the teacher labels."""

    copies: float = option(
        0.5, ge=0, le=100, help="per structure: round(copies * B) of a batch of B"
    )
    std: list[float] | float = option(
        0.05, gt=0, help="of each coordinate's noise, in Å: its standard deviation; a list: in turn"
    )
    pool: int | None = option(
        8, ge=1, le=1000, help="displaced copies of a structure, at most; null: new ones every step"
    )
    pool_seed: int = option(0, ge=0, help="of the copies in the pool, which other runs share")
    min_distance: float = option(
        0.55, ge=0, help="of the sum of two covalent radii: nearer than that, noise is drawn anew"
    )
    max_force: float = option(
        50.0, gt=0, help="eV/Å: copies on which the teacher's largest force exceeds it do not count"
    )

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"{WHERE}.std must be greater than 0, or a list of such numbers.")

    @property
    def scales(self) -> list[float]:
        """The standard deviations, in Å."""
        return self.std if isinstance(self.std, list) else [self.std]

    def pooled(self, draws: float) -> int | None:
        """The size of the pools in a training that takes so many copies of each structure.

        Not larger than the training can use up, so that asking a teacher about the pools costs
        no more than asking it about what the training takes; None for no pool.
        """
        return None if self.pool is None else int(max(1, min(self.pool, 0.75 * draws)))


class Rattler:
    """Makes the copies of one training.

    Args:
        options: what the config gave.
        seed: of the run.
        draws: copies that the training takes of each structure, on average.
    """

    def __init__(self, options: RattleOptions, seed: int, draws: float = float("inf")) -> None:
        self.options = options
        self.seed = seed
        self.pool = options.pooled(draws)
        self._asked = self._dropped = 0

    def __call__(self, batch: Batch, step: int) -> Batch | None:
        """``round(copies * B)`` displaced copies of members of ``batch``, or None for none.

        Every structure gets the same whole number of copies; which ones get one more is drawn, by
        the same rule as the noise. Atoms that are fixed stay where they are. A copy that brings two
        atoms too close in each of several draws is left out.

        Args:
            batch: B structures in host memory.
            step: of the optimiser, from 1.

        Raises:
            UserError: ``std`` breaks the minimum distances nearly always.
        """
        systems, positions = [], []
        for system, structure in enumerate(self._members(batch, step)):
            for copy in range(structure.copies):
                rattled = self._copy(structure, copy)
                self._asked += 1
                if rattled is None:
                    self._dropped += 1
                else:
                    systems.append(system)
                    positions.append(rattled)
        if self._asked >= PROOF and self._dropped > 0.9 * self._asked:
            raise UserError(
                f"{WHERE}.std is {max(self.options.scales):g} Å, which brings atoms closer than "
                f"min_distance in {self._dropped} of {self._asked} copies: choose a smaller one "
                "(0.02 to 0.1 Å is usual)."
            )
        return _picked(batch, systems, positions)

    def _copy(self, structure: _Structure, copy: int) -> Array | None:
        """Positions of one more copy of a structure, Å, ``(N, 3)``; None for none."""
        scales = self.options.scales
        if self.pool is None:
            return structure.rattled(self.options, scales[copy % len(scales)], copy)
        number = int.from_bytes(structure.digest("pool", copy), "little") % self.pool
        return self._from_pool(structure, number)

    def _from_pool(self, structure: _Structure, number: int) -> Array | None:
        scales = self.options.scales
        pooled = replace(structure, key=f"pool/{self.options.pool_seed}".encode())
        return pooled.rattled(self.options, scales[number % len(scales)], number)

    def from_pool(self, batch: Batch, number: int) -> Batch | None:
        """The copies with this number in their pools of all structures; None for none."""
        found = [self._from_pool(one, number) for one in self._structures(batch, b"")]
        systems = [system for system, pos in enumerate(found) if pos is not None]
        return _picked(batch, systems, [pos for pos in found if pos is not None])

    def _members(self, batch: Batch, step: int) -> list[_Structure]:
        members = self._structures(batch, f"{self.seed}/{step}".encode())
        everyone, more = divmod(round(self.options.copies * len(members)), max(len(members), 1))
        for member in members:
            member.copies = everyone
        for member in sorted(members, key=lambda m: m.digest("member"))[:more]:
            member.copies += 1
        return members

    def _structures(self, batch: Batch, key: bytes) -> list[_Structure]:
        natoms = batch.natoms.tolist()
        stops = np.cumsum(natoms)
        pos, numbers = batch.pos.cpu().numpy(), batch.atomic_numbers.cpu().numpy().astype(int)
        free = (batch.fixed.cpu().numpy() == 0) if "fixed" in batch else np.ones(len(pos), bool)
        cells = batch.cell.cpu().view(-1, 3, 3).double().numpy()
        pbc = batch.pbc.cpu().view(-1, 3).numpy() if _has_pbc(batch) else np.ones((len(natoms), 3))
        return [
            _Structure(
                pos=pos[stop - number : stop],
                numbers=numbers[stop - number : stop],
                free=free[stop - number : stop],
                cell=cells[system],
                pbc=pbc[system].astype(bool),
                key=key,
            )
            for system, (number, stop) in enumerate(zip(natoms, stops, strict=True))
        ]


@dataclass
class _Structure:
    pos: NDArray[np.float32]  # Å, (N, 3)
    numbers: NDArray[np.int64]  # (N,)
    free: NDArray[np.bool_]  # (N,)
    cell: Array  # Å, (3, 3)
    pbc: NDArray[np.bool_]  # (3,)
    key: bytes  # of the run and the step, or of the pool
    copies: int = 0

    def digest(self, *purpose: object) -> bytes:
        """128 bits out of run and step or pool, structure and purpose.

        The structure is known by its contents: not every data set names its samples.
        """
        told = "/".join(map(str, purpose)).encode()
        digest = hashlib.blake2b(self.key + b"/" + told, digest_size=16)
        digest.update(self.pos.tobytes())
        digest.update(self.numbers.tobytes())
        return digest.digest()

    def rattled(self, options: RattleOptions, std: float, copy: int) -> Array | None:
        """Displaced positions, Å, ``(N, 3)``; None where every draw brings atoms too close."""
        clean = self.pos.astype(np.float64)
        before = self._distances(clean)
        radii = covalent_radii[self.numbers]
        limit = options.min_distance * (radii[:, None] + radii[None, :])
        limit = np.minimum(limit, before)  # what the data holds is no fault of the noise
        for draw in range(DRAWS):
            key = int.from_bytes(self.digest("noise", copy, draw), "little")
            generator = np.random.Generator(np.random.Philox(key=key))
            noise = std * generator.standard_normal(clean.shape)
            pos = clean + np.where(self.free[:, None], noise, 0.0)
            if not (self._distances(pos) < limit).any():
                return pos
        return None

    def _distances(self, pos: Array) -> Array:
        """Å, ``(N, N)``, to the nearest image; infinite on the diagonal.

        Nearest by rounding fractional coordinates, which is exact for all that is shorter than half
        the cell's smallest height, and so for atoms that come too close.
        """
        vectors = pos[:, None] - pos[None, :]
        if abs(np.linalg.det(self.cell)) > 1e-6:
            shifts = np.round(vectors @ np.linalg.inv(self.cell)) * self.pbc
            vectors = vectors - shifts @ self.cell
        distances = np.sqrt((vectors**2).sum(-1))
        np.fill_diagonal(distances, np.inf)
        return distances


def _picked(batch: Batch, systems: Sequence[int], positions: Sequence[Array]) -> Batch | None:
    """Members of a batch at other positions, Å, ``(N, 3)`` each; None for no members."""
    if not systems:
        return None
    pos = torch.from_numpy(np.concatenate(positions)).to(batch.pos.dtype)
    return pick(batch, systems, pos=pos)


def _has_pbc(batch: Batch) -> bool:
    return "pbc" in batch and batch.pbc is not None
