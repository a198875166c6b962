"""Several teachers that speak as one: the mean of what they say, and how far they are apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureSpec, Request
from fairchem_kd.teachers.base import Taught
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import MEMBERS, MISSING, SAID, Reading, StoredTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

KEY = "task.distillation.teacher.checkpoint"


class EnsembleTeacher:
    """The mean of several teachers' outputs; features and energies of atoms are of one of them.

    Args:
        members: two or more, of any architectures, with the same outputs; models, and stores of
            what teachers have said that are not here.
        lead: the number of the one whose features are compared.

    Raises:
        UserError: two of them are the same, or do not give the same outputs.
    """

    def __init__(self, members: Sequence[LiveTeacher | RecordedTeacher], lead: int = 0) -> None:
        #: the members as they are, models and stores of those that are not here
        self.given = list(members)
        #: those that are asked: a member, or what reads its store
        self.members: list[LiveTeacher | RecordedTeacher | StoredTeacher] = list(members)
        self.lead = lead
        self._check()

    def _check(self) -> None:
        first = self.given[0]
        known: dict[str, str] = {}
        for number, one in enumerate(self.given):
            where = one.where if isinstance(one, RecordedTeacher) else f"{KEY}[{number}]"
            for told in (one.identity, one.digest):
                if told in known:
                    raise UserError(
                        f"{where}: {called(one)} is the same teacher as {known[told]}, so that "
                        "they are never apart: name each once."
                    )
            known |= dict.fromkeys((one.identity, one.digest), called(one))
            for level in sorted(set(first.levels.items()) ^ set(one.levels.items())):
                name, of = level
                having, other = (first, one) if level in first.levels.items() else (one, first)
                raise UserError(
                    f"{where}: {called(other)} does not predict '{name}' of the level {of}, and "
                    f"{called(having)} does: the members of an ensemble give the same outputs, so "
                    "take teachers of the same targets."
                )

    # -- what they are ----------------------------------------------------------------------------

    @property
    def lives(self) -> list[LiveTeacher]:
        """The members that are models."""
        return [one for one in self.given if isinstance(one, LiveTeacher)]

    @property
    def is_here(self) -> bool:
        """Whether all of them can be asked about what a store lacks."""
        return all(one.is_here for one in self.given)

    @property
    def name(self) -> str:
        return " and ".join(called(one) for one in self.given)

    @property
    def identity(self) -> str:
        told = "/".join([*(one.identity for one in self.given), str(self.lead)])
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def levels(self) -> Mapping[str, str]:
        return self.given[0].levels

    @property
    def energy_name(self) -> str | None:
        return self.given[self.lead].energy_name

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        return self.given[self.lead].specs(requests)

    def require_outputs(self, names: Iterable[str]) -> None:
        self.given[0].require_outputs(names)

    def check_elements(self, atomic_numbers: Tensor) -> None:
        for one in self.given:
            one.check_elements(atomic_numbers)

    # -- stores -----------------------------------------------------------------------------------

    @property
    def stores(self) -> list[StoredTeacher]:
        """Of the members whose answers are kept."""
        return [one for one in self.members if isinstance(one, StoredTeacher)]

    def said(self, batch: Batch, memos: Sequence[Any] | None = None) -> dict[str, Any]:
        """What the stores hold of a batch in host memory, member by member."""
        return {
            MEMBERS: [
                one.said(batch, memos) if isinstance(one, StoredTeacher) else {MISSING: []}
                for one in self.members
            ]
        }

    def reading(self, collate: Callable[[list[Any]], Batch]) -> Callable[[list[Any]], Batch]:
        """``collate``, which reads the stores too: in a loader's workers, ahead of the step."""
        return Reading(self.said, collate)

    @contextmanager
    def asked_in_passing(self) -> Iterator[None]:
        """Within the block no line says that a store lacks something."""
        with ExitStack() as stack:
            for one in self.stores:
                stack.enter_context(one.asked_in_passing())
            yield

    # -- what they say ----------------------------------------------------------------------------

    def answers(
        self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True
    ) -> list[Taught]:
        """What each says, in their order; without outputs, only the one with the features."""
        said = batch[SAID][MEMBERS] if SAID in batch else [None] * len(self.members)
        found = []
        for number, (one, part) in enumerate(zip(self.members, said, strict=True)):
            own = requests if number == self.lead else ()
            if not outputs and number != self.lead:
                continue
            if isinstance(one, StoredTeacher):
                found.append(one.recall(batch, part, own))
            else:
                found.append(one.teach(batch, own, outputs=outputs))
        return found

    def teach(self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        answers = self.answers(batch, requests, outputs=outputs)
        if not outputs:
            return dataclasses.replace(answers[0], outputs={})
        return self.combined(answers)

    def combined(self, answers: Sequence[Taught]) -> Taught:
        """One answer out of those of all members."""
        lead = answers[self.lead]
        means, spreads = {}, {}
        for name, level in self.levels.items():
            values = torch.stack([one.outputs[name].double() for one in answers])
            means[name] = values.mean(0)
            spreads[name] = _spread(values, level, lead.natoms)
        return Taught(
            lead.natoms,
            means,
            lead.features,
            lead.atom_energies,
            _trusted(answers),
            self.name,
            spreads,
        )


def called(member: LiveTeacher | RecordedTeacher) -> str:
    """What tells a member from the others: of the stores of one kind of calculator the folder."""
    return str(member.folder) if isinstance(member, RecordedTeacher) else member.name


def _spread(values: Tensor, level: str, natoms: Tensor) -> Tensor:
    """How far M answers are apart, ``(B,)``: their standard deviation, the rms over a structure.

    Args:
        values: ``(M, B, C)`` of structures or ``(M, N, C)`` of atoms.
        level: ``system`` or ``atom``.
        natoms: ``(B,)``.
    """
    variance = values.var(0, unbiased=True).mean(1)
    if level == "atom":
        systems = torch.arange(len(natoms), device=natoms.device)
        of = torch.repeat_interleave(systems, natoms)
        sums = variance.new_zeros(len(natoms)).index_add(0, of, variance)
        variance = sums / natoms.clamp(min=1)
    return variance.sqrt()


def _trusted(answers: Sequence[Taught]) -> Tensor | None:
    """``(B,)``: where each of them can be relied on; None: everywhere."""
    trusted = None
    for one in answers:
        if one.trusted is not None:
            trusted = one.trusted if trusted is None else trusted & one.trusted
    return trusted
