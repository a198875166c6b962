"""Between a model's normalised outputs and physical units: those of the labels, eV and eV/Å.

Teacher and student may have been trained with different normalisers and element references, so the
teacher's outputs are made physical with the teacher's and normalised with the student's before
they are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fairchem.core.modules.normalization.element_references import LinearReferences
    from fairchem.core.modules.normalization.normalizer import Normalizer
    from torch_geometric.data import Batch


class Units:
    """The normalisers and element references of one model, by the name of the output.

    The mappings are looked at, not copied: a trainer fills its own after construction.
    """

    def __init__(
        self,
        normalizers: Mapping[str, Normalizer],
        elementrefs: Mapping[str, LinearReferences],
    ) -> None:
        self.normalizers = normalizers
        self.elementrefs = elementrefs

    def physical(self, name: str, values: Tensor, batch: Batch) -> Tensor:
        """``values`` of the output ``name``, as the model gives them, in its unit; same shape."""
        if name in self.normalizers:
            values = self.normalizers[name].denorm(values)
        if name in self.elementrefs:
            values = self.elementrefs[name](values, batch)
        return values

    def normalized(self, name: str, values: Tensor, batch: Batch) -> Tensor:
        """The inverse of :meth:`physical`."""
        if name in self.elementrefs:
            values = self.elementrefs[name].dereference(values, batch)
        if name in self.normalizers:
            values = self.normalizers[name].norm(values)
        return values

    def physical_atom_energies(self, values: Tensor, batch: Batch, name: str = "energy") -> Tensor:
        """Per-atom values (N, 1) whose sum over a system is its physical output ``name``.

        The normaliser's mean, which belongs to a system, is shared out evenly over its atoms; each
        atom carries the reference of its own element.
        """
        scale, shift = self._atom_scale_and_shift(values, batch, name)
        return values * scale + shift

    def normalized_atom_energies(
        self, values: Tensor, batch: Batch, name: str = "energy"
    ) -> Tensor:
        """The inverse of :meth:`physical_atom_energies`."""
        scale, shift = self._atom_scale_and_shift(values, batch, name)
        return (values - shift) / scale

    def _atom_scale_and_shift(
        self, values: Tensor, batch: Batch, name: str
    ) -> tuple[Tensor, Tensor]:
        scale, shift = values.new_ones(()), torch.zeros_like(values)
        if (normalizer := self.normalizers.get(name)) is not None:
            scale = normalizer.rmsd.to(values)
            share = 1.0 / batch.natoms.to(values)[batch.batch]
            shift = shift + normalizer.mean.to(values) * share[:, None]
        if (references := self.elementrefs.get(name)) is not None:
            per_element = references.element_references.to(values)
            shift = shift + per_element[batch.atomic_numbers.long()][:, None]
        return scale, shift
