"""The teacher itself, asked anew for every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fairchem_kd.features import FeatureExtractor, FeatureSpec, Request
from fairchem_kd.teachers.base import ATOM_ENERGY, Taught

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.models.frozen import Teacher as FrozenModel


class LiveTeacher:
    """A frozen model, run on every batch.

    Args:
        frozen: the model with its units, on the device of the batches.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen = frozen
        self.require_outputs = frozen.require_outputs
        self.check_elements = frozen.check_elements
        self._extractors: dict[tuple[Request, ...], FeatureExtractor] = {}

    @cached_property
    def identity(self) -> str:
        """A digest of the weights; worked out once, for it reads all of them."""
        digest = hashlib.sha256()
        for name, value in sorted(self.frozen.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def extractor(self, requests: Sequence[Request]) -> FeatureExtractor:
        """The taps for these features, made once."""
        key = tuple(requests)
        if key not in self._extractors:
            self._extractors[key] = FeatureExtractor(self.frozen.model, list(key))
        return self._extractors[key]

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        return self.extractor(requests).specs

    @torch.no_grad()
    def teach(self, batch: Batch, requests: Sequence[Request]) -> Taught:
        said = self.frozen.forward(batch, self.extractor(requests))
        assert said.features is not None
        features = {request: said.features[request].values for request in self.specs(requests)}
        units = self.frozen.units
        # In float64: references of total energies are orders larger than what is compared.
        outputs = {
            name: units.physical(name, value.double(), batch) for name, value in said.raw.items()
        }
        atom_energy = None
        if ATOM_ENERGY in features:
            atom_energy = units.physical_atom_energies(features[ATOM_ENERGY].double(), batch)
        return Taught(batch.natoms, outputs, features, atom_energy, origin=self.frozen.name)
