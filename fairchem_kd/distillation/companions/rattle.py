"""Rattled copies: displaced structures for which the teacher speaks (arXiv 2306.14818, sec. 4).

The copies of a structure come from a pool of its own, so that what the teacher says of them can
be kept: the noise of a copy is a function of the pool's seed, the structure and the copy's number
in the pool, and which of them a step takes is one of the run's seed, the step and the structure.
Without a pool, noise is new at every step: a function of the run's seed, the step, the structure
and the number of the copy. Neither the rank, nor the number of ranks, nor the place in the batch
enters, and no global generator is drawn from. Adversarial copies begin so, and are moved on by
:mod:`fairchem_kd.distillation.adversary`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.schema import option
from fairchem_kd.stock.structures import pick

WHERE = "task.distillation.rattle"
PLAIN, LENGTH, ADVERSARIAL = "plain", "fixed_length", "adversarial"
BY_FORCE = ("without_force", "along_force", "around_force")  # the labels' forces
MODES = (PLAIN, LENGTH, *BY_FORCE, ADVERSARIAL)
DRAWS = 5  # of the noise of one copy, before the copy is given up
PROOF = 8  # copies that have to be asked for before std is called too large

Array = NDArray[np.float64]


@dataclass
class AdversarialOptions:
    """How copies are moved to where student and teacher differ, by gradient ascent."""

    steps: int = option(3, ge=1, le=100, help="of the ascent, each with both models' gradients")
    bound: str = option(
        "sphere",
        choices=("sphere", "ball"),
        help="sphere: each step moves each atom by rate; ball: by rate times its gradient",
    )
    rate: float = option(0.01, gt=0, help="Å (sphere), or Å for a gradient of 1 eV²/Å³ (ball)")
    radius: float = option(0.1, gt=0, help="Å by which an atom may move from where noise put it")
    off_force: bool = option(False, help="leave out what goes along the teacher's force")
    force_penalty: float = option(
        0.0, ge=0, help="eV/Å: how much the teacher's mean force counts against a place"
    )


@dataclass
class RattleOptions:
    """Rattled copies of the structures of each batch, which the teacher labels."""

    copies: float = option(
        0.5, ge=0, le=100, help="per structure: round(copies * B) of a batch of B"
    )
    mode: str = option(
        PLAIN,
        choices=MODES,
        help="plain: normal noise; by a length; by the labels' forces; by where the models differ",
    )
    antithetic: bool = option(
        False, help="copies in pairs, displaced by the same in opposite directions"
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
    adversarial: AdversarialOptions | None = option(
        None, help="of mode: adversarial: how copies are moved on"
    )

    def __post_init__(self) -> None:
        if self.adversarial is not None and self.mode != ADVERSARIAL:
            raise UserError(
                f"{WHERE}.adversarial is of mode: adversarial, and the mode is {self.mode}: take "
                "one of the two out."
            )
        if self.mode == ADVERSARIAL and self.antithetic:
            raise UserError(
                f"{WHERE}: adversarial copies go where the gradient says, and not in opposite "
                "pairs: set antithetic: false, or another mode."
            )
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"{WHERE}.std must be greater than 0, or a list of such numbers.")
        if self.antithetic and self.pool is not None and self.pool % 2:
            raise UserError(
                f"{WHERE}.pool is {self.pool}, and with antithetic: true copies come in pairs: "
                "give an even number."
            )

    @property
    def needs_forces(self) -> bool:
        """Whether the labels' forces say where atoms go."""
        return self.mode in BY_FORCE

    @property
    def scales(self) -> list[float]:
        """The standard deviations, in Å."""
        return self.std if isinstance(self.std, list) else [self.std]

    def check_pairs(self, structures: int) -> None:
        """Refuse antithetic copies of which a step never has a pair.

        Args:
            structures: of a step, copies aside.

        Raises:
            UserError: it has none.
        """
        if self.antithetic and self.copies > 0 and round(self.copies * structures / 2) < 1:
            raise UserError(
                f"{WHERE}.copies is {self.copies:g}, which of {structures} structures a step makes "
                f"no antithetic pair: give at least {2 / structures:g}."
            )

    def pooled(self, draws: float) -> int | None:
        """The size of the pools in a training that takes so many copies of each structure.

        Not larger than the training can use up, so that asking a teacher about the pools costs
        no more than asking it about what the training takes; None for no pool.
        """
        if self.pool is None or self.mode == ADVERSARIAL:  # which follow the student
            return None
        size = int(max(1, min(self.pool, 0.75 * draws)))
        return max(2, size - size % 2) if self.antithetic else size


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
        atoms too close in each of several draws is left out. Antithetic copies are drawn pair by
        pair, and the two of a pair follow each other.

        Args:
            batch: B structures in host memory.
            step: of the optimiser, from 1.

        Raises:
            UserError: ``std`` breaks the minimum distances nearly always, or there are no forces
                of which the mode makes use.
        """
        systems, positions = [], []
        for system, structure in enumerate(self._members(batch, step)):
            for copy in range(structure.copies):
                rattled = self._copy(structure, copy)
                self._asked += 1
                if rattled is None:
                    self._dropped += 1
                    continue
                systems += [system] * len(rattled)
                positions += rattled
        if self._asked >= PROOF and self._dropped > 0.9 * self._asked:
            raise UserError(
                f"{WHERE}.std is {max(self.options.scales):g} Å, which brings atoms closer than "
                f"min_distance in {self._dropped} of {self._asked} copies{self._or_still}: choose "
                "a smaller one (0.02 to 0.1 Å is usual)."
            )
        return _picked(batch, systems, positions)

    @property
    def _or_still(self) -> str:
        """Why else there may be no copy, in words."""
        if not self.options.needs_forces:
            return ""
        return (
            f" (or moves nothing, where no atom has a force that mode: {self.options.mode} needs)"
        )

    @property
    def _signs(self) -> tuple[int, ...]:
        """Of one displacement, in which directions it is taken."""
        return (1, -1) if self.options.antithetic else (1,)

    def _copy(self, structure: _Structure, copy: int) -> list[Array] | None:
        """Positions of one more copy, or pair, of a structure, Å, ``(N, 3)``; None for none."""
        scales = self.options.scales
        if self.pool is None:
            std = scales[copy % len(scales)]
            return structure.rattled(self.options, std, copy, self._signs)
        size = self.pool // len(self._signs)
        number = int.from_bytes(structure.digest("pool", copy), "little") % size
        return self._from_pool(structure, number)

    def _from_pool(self, structure: _Structure, number: int) -> list[Array] | None:
        scales = self.options.scales
        pooled = replace(structure, key=f"pool/{self.options.pool_seed}".encode())
        return pooled.rattled(self.options, scales[number % len(scales)], number, self._signs)

    def from_pool(self, batch: Batch, number: int) -> Batch | None:
        """The copies with this number in their pools of all structures; None for none."""
        draw, sign = divmod(number, len(self._signs))
        found = [self._from_pool(one, draw) for one in self._structures(batch, b"")]
        systems = [system for system, pos in enumerate(found) if pos is not None]
        return _picked(batch, systems, [pos[sign] for pos in found if pos is not None])

    def too_close(self, before: Batch, after: Batch) -> list[bool]:
        """By structure, whether moving them brings atoms too close that were not.

        Args:
            before, after: the same structures, in host memory.
        """
        pairs = zip(self._structures(before, b""), self._structures(after, b""), strict=True)
        return [one.too_close(other.pos, self.options.min_distance) for one, other in pairs]

    def _members(self, batch: Batch, step: int) -> list[_Structure]:
        members = self._structures(batch, f"{self.seed}/{step}".encode())
        number = round(self.options.copies * len(members) / len(self._signs))
        everyone, more = divmod(number, max(len(members), 1))
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
        forces = _forces(batch) if self.options.needs_forces else None
        return [
            _Structure(
                pos=pos[stop - number : stop],
                numbers=numbers[stop - number : stop],
                free=free[stop - number : stop],
                cell=cells[system],
                pbc=pbc[system].astype(bool),
                key=key,
                forces=None if forces is None else forces[stop - number : stop],
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
    copies: int = 0  # or pairs
    forces: Array | None = None  # eV/Å, (N, 3), of the labels, where they say the direction
    _limit: tuple[float, Array] | None = None  # the smallest distances, Å, (N, N), for a share

    def digest(self, *purpose: object) -> bytes:
        """128 bits out of run and step or pool, structure and purpose.

        The structure is known by its contents: not every data set names its samples.
        """
        told = "/".join(map(str, purpose)).encode()
        digest = hashlib.blake2b(self.key + b"/" + told, digest_size=16)
        digest.update(self.pos.tobytes())
        digest.update(self.numbers.tobytes())
        return digest.digest()

    def rattled(
        self, options: RattleOptions, std: float, copy: int, signs: Sequence[int] = (1,)
    ) -> list[Array] | None:
        """Displaced positions, Å, ``(N, 3)`` for each sign of the displacement.

        None where every draw brings atoms too close, or nothing moves.
        """
        clean = self.pos.astype(np.float64)
        for draw in range(DRAWS):
            key = int.from_bytes(self.digest("noise", copy, draw), "little")
            generator = np.random.Generator(np.random.Philox(key=key))
            noise = std * displacement(
                options.mode, generator.standard_normal(clean.shape), self.forces
            )
            noise = np.where(self.free[:, None], noise, 0.0)
            if options.needs_forces and not noise.any():
                return None
            found = [clean + sign * noise for sign in signs]
            if not any(self.too_close(pos, options.min_distance) for pos in found):
                return found
        return None

    def too_close(self, pos: NDArray[Any], share: float) -> bool:
        """Whether two atoms are nearer than a share of their radii, and than they were.

        Args:
            pos: others than its own, Å, ``(N, 3)``.
            share: of the sum of two covalent radii.
        """
        if self._limit is None or self._limit[0] != share:
            radii = covalent_radii[self.numbers]
            limit = share * (radii[:, None] + radii[None, :])
            # what the data holds is no fault of the noise
            self._limit = share, np.minimum(limit, self._distances(self.pos.astype(np.float64)))
        return bool((self._distances(pos.astype(np.float64)) < self._limit[1]).any())

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


def displacement(mode: str, noise: Array, forces: Array | None) -> Array:
    """Displacements ``(N, 3)`` in units of ``std``, after arXiv 2306.14818 and its code.

    ``plain``: the noise. ``fixed_length``: its directions, each atom by sqrt(3), which is the
    noise's rms length. ``without_force``: without its component along an atom's force;
    ``along_force``: that component alone; ``around_force``: noise around the force's direction.

    Args:
        mode: one of `MODES`.
        noise: standard normal numbers, ``(N, 3)``.
        forces: ``(N, 3)``, of which the directions count; an atom without force has none.
    """
    if mode in (PLAIN, ADVERSARIAL):  # the latter begin so
        return noise
    if mode == LENGTH:
        return np.sqrt(3.0) * _directions(noise)
    assert forces is not None
    along = _directions(forces)
    if mode == "around_force":
        return along + noise
    component = (noise * along).sum(-1, keepdims=True) * along
    return component if mode == "along_force" else noise - component


def _directions(vectors: Array) -> Array:
    """``(N, 3)``: unit vectors; 0 of what is 0."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def _forces(batch: Batch) -> Array:
    """The labels' forces, eV/Å, ``(N, 3)``.

    Raises:
        UserError: there are none.
    """
    forces = batch.get("forces")
    if forces is None:
        raise UserError(
            f"{WHERE}.mode goes by the labels' forces, which these structures do not have: take "
            f"{PLAIN} or {LENGTH}."
        )
    return forces.cpu().double().view(-1, 3).numpy()


def _picked(batch: Batch, systems: Sequence[int], positions: Sequence[Array]) -> Batch | None:
    """Members of a batch at other positions, Å, ``(N, 3)`` each; None for no members."""
    if not systems:
        return None
    pos = torch.from_numpy(np.concatenate(positions)).to(batch.pos.dtype)
    return pick(batch, systems, pos=pos)


def _has_pbc(batch: Batch) -> bool:
    return "pbc" in batch and batch.pbc is not None
