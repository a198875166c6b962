"""The teacher itself, asked anew for every batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairchem_kd.features import GRAPH, FeatureExtractor, FeatureSpec, Request, output_of
from fairchem_kd.features.architecture import needs_autograd, refuse_wrong_forces
from fairchem_kd.machine import FP32
from fairchem_kd.teachers.base import Taught

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.models.frozen import Teacher as FrozenModel


class LiveTeacher:
    """A frozen model, run on every batch.

    Args:
        frozen: the model with its units, on the device of the batches.
        precision: how it computes, one of `PRECISIONS`, whatever the process has set.

    Raises:
        UserError: its forces are not what they are called.
    """

    def __init__(self, frozen: FrozenModel, precision: str = FP32) -> None:
        refuse_wrong_forces(frozen.model, f"The model in {frozen.name}")
        self.frozen = frozen
        self.precision = precision
        # faster than no_grad by the counting of versions and views that it leaves out
        self._mode = torch.no_grad if needs_autograd(frozen.model) else torch.inference_mode
        self.require_outputs = frozen.require_outputs
        self.check_elements = frozen.check_elements
        self._extractors: dict[tuple[Request, ...], FeatureExtractor] = {}

    @cached_property
    def identity(self) -> str:
        """A digest of the weights and the precision; worked out once, for it reads all of them."""
        weights = _digest(self.frozen.model.state_dict())
        return weights if self.precision == FP32 else f"{weights}-{self.precision}"

    @cached_property
    def digest(self) -> str:
        """A digest of all that its answers depend on, config and units among it."""
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
    def name(self) -> str:
        return self.frozen.name

    @property
    def is_here(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.frozen.model.parameters()).device

    def spread(self, output: str) -> float | None:
        normalizer = self.frozen.units.normalizers.get(output)
        return None if normalizer is None else abs(float(normalizer.rmsd))

    @property
    def levels(self) -> dict[str, str]:
        """``system`` or ``atom``, by output."""
        outputs = self.frozen.outputs.items()
        return {name: config.get("level", "system") for name, config in outputs}

    @property
    def energy_name(self) -> str | None:
        return self.frozen.energy_name

    def extractor(self, requests: Sequence[Request]) -> FeatureExtractor:
        """The taps for these features, made once; features of edges come with the edges."""
        key = tuple(requests)
        if any(request.form == "edge" for request in key) and GRAPH not in key:
            key = (*key, GRAPH)
        if key not in self._extractors:
            self._extractors[key] = FeatureExtractor(self.frozen.model, list(key))
        return self._extractors[key]

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        return self.extractor(requests).specs

    @torch.no_grad()
    def teach(self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        with self._mode(), self.computing(batch.pos.device.type):
            said = self.frozen.forward(batch, self.extractor(requests), outputs=outputs)
        assert said.features is not None
        features = {r: _usable(said.features[r].values) for r in self.specs(requests)}
        units = self.frozen.units
        # In float64: references of total energies are orders larger than what is compared.
        physical = {
            name: units.physical(name, _usable(value).double(), batch)
            for name, value in said.raw.items()
        }
        atom_energies = {}
        for request, values in features.items():
            name = output_of(request, self.energy_name)
            if name is not None:
                atom_energies[name] = units.physical_atom_energies(values.double(), batch, name)
        return Taught(batch.natoms, physical, features, atom_energies, origin=self.frozen.name)

    @contextmanager
    def computing(self, device: str) -> Iterator[None]:
        """Within the block torch computes in this teacher's precision, and then as before."""
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        half = self.precision == "bf16"
        matmul.allow_tf32 = self.precision == "tf32"
        try:
            with torch.autocast(device, torch.bfloat16 if half else None, enabled=half):
                yield
        finally:
            matmul.allow_tf32 = before


def _usable(value: Tensor) -> Tensor:
    """A tensor that autograd may keep, which one of inference mode is not; halves as fp32."""
    if value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value.clone() if value.is_inference() else value


def _digest(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(torch.as_tensor(value).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
