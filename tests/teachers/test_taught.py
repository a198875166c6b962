"""The seam between distillation and what teaches: what is said, and that no more is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import config, trainer
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd import Teacher as FrozenModel
from fairchem_kd.features import Request, atom_energy
from fairchem_kd.stock.structures import pick
from fairchem_kd.teachers import LiveTeacher, Taught

NODE, EDGE = Request("node", "node"), Request("edge", "node")
ATOM_ENERGY = atom_energy("energy")
LOSSES: dict[str, Any] = {"n2n": {}, "e2n": {}, "vanilla": {}, "per_atom_energy": {}}


class Remembering:
    """Says again, structure by structure, what another teacher said: nothing runs."""

    def __init__(self, live: LiveTeacher) -> None:
        self.identity = live.identity
        self.levels, self.energy_name = live.levels, live.energy_name
        self.specs = live.specs
        self.require_outputs = live.require_outputs
        self.check_elements = live.check_elements
        self._said: dict[bytes, tuple[Taught, int]] = {}

    def remember(self, batch: Any, taught: Taught) -> None:
        for place, key in enumerate(self._keys(batch)):
            self._said[key] = taught, place

    def _keys(self, batch: Any) -> list[bytes]:
        return [pos.numpy().tobytes() for pos in batch.pos.split(batch.natoms.tolist())]

    def teach(self, batch: Any, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        parts = [self._said[key][0].of([self._said[key][1]]) for key in self._keys(batch)]
        return Taught(
            batch.natoms,
            {n: torch.cat([p.outputs[n] for p in parts]) for n in parts[0].outputs},
            {r: torch.cat([p.features[r] for p in parts]) for r in requests},
            {n: torch.cat([p.atom_energies[n] for p in parts]) for n in parts[0].atom_energies},
        )


def test_a_live_teacher_speaks_in_physical_units(tmp_path: Path, data: Path, teacher: Path) -> None:
    with trainer(config(tmp_path, data)) as built:
        batch = next(iter(built.train_loader))
    frozen = FrozenModel.from_checkpoint(teacher)
    before = batch.clone()
    said = LiveTeacher(frozen).teach(batch, [NODE, ATOM_ENERGY])
    assert torch.equal(batch.pos, before.pos)
    assert set(batch.keys()) == set(before.keys())
    output = frozen.forward(batch)
    physical = frozen.denormalized(output, batch)
    for name, shape in (("energy", (3, 1)), ("forces", (len(batch.pos), 3))):
        assert said.outputs[name].shape == shape
        assert said.outputs[name].dtype == torch.float64
        expected = physical[name].double().view(shape)
        torch.testing.assert_close(said.outputs[name], expected, rtol=1e-5, atol=1e-5)
    (shares,) = said.atom_energies.values()
    sums = torch.zeros(3, 1, dtype=torch.float64).index_add(0, batch.batch, shares)
    torch.testing.assert_close(sums, said.outputs["energy"], rtol=1e-5, atol=1e-4)
    assert not said.features[NODE].requires_grad
    assert said.origin == str(teacher)
    with pytest.raises(FrozenInstanceError):
        said.origin = "another"  # type: ignore[misc]


def test_what_is_said_can_be_cut_by_structure(tmp_path: Path, data: Path, teacher: Path) -> None:
    with trainer(config(tmp_path, data)) as built:
        batch = next(iter(built.train_loader))
    live = LiveTeacher(FrozenModel.from_checkpoint(teacher))
    requests = [NODE, EDGE, ATOM_ENERGY]
    some = live.teach(batch, requests).of([2, 0])
    again = live.teach(pick(batch, [2, 0]), requests)
    assert torch.equal(some.natoms, again.natoms)
    for name, values in again.outputs.items():
        torch.testing.assert_close(some.outputs[name], values, rtol=1e-4, atol=1e-5)
    for request, values in again.features.items():
        torch.testing.assert_close(some.features[request], values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some.atom_energies, again.atom_energies, rtol=1e-4, atol=1e-5)


def test_distillation_needs_no_more_than_the_seam(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """A teacher that runs no model gives the same loss and the same gradients, bit for bit."""
    with trainer(config(tmp_path, data, teacher=teacher, losses=LOSSES)) as built:
        built.set_up()
        built.model.train()
        batch = next(iter(built.train_loader))
        live = built.distillation.teacher
        remembering = Remembering(live)
        remembering.remember(batch, live.teach(batch, built.distillation.teacher_requests))
        results = []
        for teaching in (live, remembering):
            built.distillation.teacher = teaching
            built.optimizer.zero_grad()
            one = batch.clone()
            loss = built._compute_loss(built._forward(one), one)
            loss.backward()
            grads = [p.grad.clone() for p in built.model.parameters() if p.grad is not None]
            results.append((loss.item(), grads))
    (expected, gradients), (found, others) = results
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_what_is_not_trusted_does_not_count(tmp_path: Path, data: Path, teacher: Path) -> None:
    with trainer(config(tmp_path, data, teacher=teacher, losses={"vanilla": {}})) as built:
        built.set_up()
        batch = next(iter(built.train_loader))
        live = built.distillation.teacher
        said = live.teach(batch, [])
        trusted = torch.tensor([True, False, True])
        doubtful = Taught(said.natoms, said.outputs, said.features, trusted=trusted)
        live.teach = lambda batch, requests, outputs=True: doubtful
        with built.distillation.tap_student() as features:
            out = built._forward(batch)
        inputs = built.distillation.compared(batch, out, features).inputs
    assert torch.equal(inputs.systems, trusted)
