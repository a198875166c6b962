"""What goes through student and teacher beside the labelled structures of a step.

    labelled | unlabelled | rattled copies of members of both

The student runs once on all of them. The labelled ones come first, so that their part of the
outputs, which is all that the label loss and the metrics see, is a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from fairchem_kd.distillation.companions.rattle import Rattler
from fairchem_kd.distillation.companions.unlabelled import UnlabelledLoader
from fairchem_kd.losses import pair_atoms
from fairchem_kd.stock.structures import join
from fairchem_kd.teachers.stored import SAID, join_said
from fairchem_kd.training.checks import check_finite


class Companions:
    """Adds a step's unlabelled structures and rattled copies to its labelled batch."""

    def __init__(self, rattler: Rattler | None, unlabelled: UnlabelledLoader | None) -> None:
        self.rattler = rattler
        self.unlabelled = unlabelled
        #: Moves copies on to where the models differ, where they are to be adversarial.
        self.adversary: Callable[[Batch], Batch] | None = None
        #: What a store holds of a batch, where answers are stored.
        self.said: Callable[[Batch], dict[str, Any]] | None = None

    @property
    def label_factor(self) -> float:
        """What the labels' loss is multiplied by where they share the structures with a teacher."""
        mixing = None if self.unlabelled is None else self.unlabelled.mixing
        return 1.0 if mixing is None else mixing[0]

    def joined(self, batch: Batch, step: int) -> Batch:
        """All structures of a step, in host memory; ``batch`` itself where there are no companions.

        Where copies are made, ``rattled`` ``(B,)`` of the result is true for them. Where labels and
        teacher share the structures out, ``mixed`` ``(B,)`` is what each weighs for the teacher.
        """
        clean, parts = batch, [batch]
        if self.unlabelled is not None:
            more = self.unlabelled(step)
            check_finite(more, ())
            clean = join([batch, more])
            parts.append(more)
        if self.rattler is None:
            if self.unlabelled is not None and self.unlabelled.mixing is not None:
                clean.mixed = torch.zeros(len(clean.natoms))
                clean.mixed[len(batch.natoms) :] = self.unlabelled.mixing[1]
            return self._with_answers(clean, parts)
        copies = self.rattler(clean, step)
        if copies is not None and self.adversary is not None:
            copies = self.adversary(copies)
        whole = join([clean] if copies is None else [clean, copies])
        whole.rattled = torch.arange(len(whole.natoms)) >= len(clean.natoms)
        if self.rattler.options.antithetic:  # pair after pair
            copied = whole.rattled.nonzero().view(-1, 2)
            whole.pairs = pair_atoms(whole.natoms, copied)
        return self._with_answers(whole, parts if copies is None else [*parts, copies])

    def _with_answers(self, whole: Batch, parts: Sequence[Batch]) -> Batch:
        """``whole``, with what has been read of its parts; copies are read here."""
        if self.said is not None:
            read = [part[SAID] if SAID in part else self.said(part) for part in parts]
            whole[SAID] = join_said(list(zip(read, parts, strict=True)))
        return whole


def labelled_part(outputs: dict[str, Tensor], batch: Batch, levels: dict[str, str]) -> dict:
    """The rows of ``outputs`` that belong to the labelled ``batch``, which came first.

    Args:
        outputs: ``(B', ...)`` per system or ``(N', ...)`` per atom, B' >= B and N' >= N.
        levels: ``system`` or ``atom`` by output.
    """
    systems, atoms = len(batch.natoms), len(batch.pos)
    return {
        name: value[: atoms if levels[name] == "atom" else systems]
        for name, value in outputs.items()
    }
