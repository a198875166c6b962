"""The teacher itself, asked anew for every batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from fairchem_kd.features import FeatureExtractor, FeatureSpec, Request, output_of
from fairchem_kd.features.architecture import refuse_wrong_forces
from fairchem_kd.teachers.base import Taught

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.models.frozen import Teacher as FrozenModel


class LiveTeacher:
    """A frozen model, run on every batch.

    Args:
        frozen: the model with its units, on the device of the batches.

    Raises:
        UserError: its forces are not what they are called.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        refuse_wrong_forces(frozen.model, f"The model in {frozen.name}")
        self.frozen = frozen
        self.require_outputs = frozen.require_outputs
        self.check_elements = frozen.check_elements
        self._extractors: dict[tuple[Request, ...], FeatureExtractor] = {}

    @cached_property
    def identity(self) -> str:
        """A digest of the weights; worked out once, for it reads all of them."""
        return _digest(self.frozen.model.state_dict())

    @cached_property
    def digest(self) -> str:
        """A digest of all that its answers depend on: weights, config, units, outputs."""
        frozen = self.frozen
        units: dict[str, Any] = {}
        for kind, modules in (
            ("normalizers", frozen.units.normalizers),
            ("elementrefs", frozen.units.elementrefs),
        ):
            for name, module in modules.items():
                values = module.state_dict()
                units |= {f"{kind}.{name}.{key}": value for key, value in values.items()}
        told = [type(frozen.model).__name__, frozen.config, frozen.outputs]
        words = json.dumps(told, sort_keys=True, default=str)
        return hashlib.sha256(f"{self.identity}{_digest(units)}{words}".encode()).hexdigest()

    @property
    def levels(self) -> dict[str, str]:
        """``system`` or ``atom``, by output."""
        outputs = self.frozen.outputs.items()
        return {name: config.get("level", "system") for name, config in outputs}

    @property
    def energy_name(self) -> str | None:
        return self.frozen.energy_name

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
        atom_energies = {}
        for request, values in features.items():
            name = output_of(request, self.energy_name)
            if name is not None:
                atom_energies[name] = units.physical_atom_energies(values.double(), batch, name)
        return Taught(batch.natoms, outputs, features, atom_energies, origin=self.frozen.name)


def _digest(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(torch.as_tensor(value).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
