"""What has to hold of any loss, on made-up features in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_kd.features import FeatureSpec, Request
from fairchem_kd.losses import Labels, Loss, LossInputs, Part
from fairchem_kd.stock.label_losses import DEFAULT, label_losses

#: Channels of the student and of the teacher, which differ so that a mix-up shows as a shape.
CHANNELS = (5, 7)
_OUTPUTS: dict[str, dict[str, Any]] = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True},
}
_WIDTHS = {"energy": 1, "forces": 3}


def check_loss(
    term: Loss,
    *,
    natoms: Sequence[int] = (3, 1, 4),
    over_batch: bool = False,
    tolerance: float = 1e-6,
) -> None:
    """Check that a loss is one: of features of nodes and vectors, of outputs, of energies of atoms.

    Its gradient is that of its value; it does not depend on the order of atoms or on how
    structures lie in space, nor on which of two mirror images they are; structures on which the
    teacher is not to be trusted neither count nor teach; and any number of ranks gives the same
    value, since its parts are sums and counts.

    Args:
        term: made by ``from_options`` and not yet built; it is built here.
        natoms: of the structures, two or more.
        over_batch: it compares atoms of all structures with each other, so that its parts do not
            add up over ranks.
        tolerance: relative, of values and gradients.

    Raises:
        AssertionError: saying what does not hold.
    """
    assert len(natoms) > 1, "give two structures or more"
    case = _Case(term, natoms)
    value = case.value()
    assert value.dim() == 0, f"the value has the shape {tuple(value.shape)}, and no number"
    assert bool(torch.isfinite(value)), f"the value is {value.item()}"
    _check_gradient(case, tolerance)
    _assert_same(case.value(case.permuted()), value, tolerance, "the order of atoms")
    _assert_same(case.value(case.turned()), value, tolerance, "how structures lie in space")
    mirrored = case.value(case.turned(mirrored=True))
    _assert_same(mirrored, value, tolerance, "which of a structure's two mirror images it sees")
    _check_trust(case, tolerance)
    if not over_batch:
        first, second = case.of([0]), case.of(range(1, len(natoms)))
        parts = [case.parts(first), case.parts(second)]
        split = _mean([part for own in zip(*parts, strict=True) for part in [_joined(own)]])
        _assert_same(split, value, tolerance, "how structures are dealt out to ranks")


class _Case:
    """A term with inputs for it."""

    def __init__(self, term: Loss, natoms: Sequence[int]) -> None:
        self.term, self.natoms = term, list(natoms)
        labels = Labels(label_losses(DEFAULT), _OUTPUTS)
        self._labels = labels
        specs = [
            {
                request: FeatureSpec(request.address, request.form, channels, "")
                for request in wanted
            }
            for wanted, channels in zip(
                (term.student_requests(), term.teacher_requests()), CHANNELS, strict=True
            )
        ]
        term.build(specs[0], specs[1], torch.Generator().manual_seed(0), labels)
        term.double()
        self.inputs = self._made()
        if term.needs_statistics:
            term.update_statistics(self.inputs.teacher, self.inputs.batch)
            term.finalize_statistics()

    def _made(self) -> LossInputs:
        generator = torch.Generator().manual_seed(1)
        atoms, systems = sum(self.natoms), len(self.natoms)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def feature(request: Request, channels: int) -> Tensor:
            assert request.form in ("node", "vector"), f"no {request.form} features are made here"
            return drawn(atoms, *((3,) if request.form == "vector" else ()), channels)

        student = {r: feature(r, CHANNELS[0]) for r in self.term.student_requests()}
        teacher = {r: feature(r, CHANNELS[1]) for r in self.term.teacher_requests()}
        outputs = self.term.compared_outputs(self._labels)
        energies = self.term.compared_atom_energies(self._labels)
        sides = []
        for _ in range(2):
            rows = {name: systems if name == "energy" else atoms for name in outputs}
            sides.append({name: drawn(rows[name], _WIDTHS[name]) for name in outputs})
        shares = [{name: drawn(atoms, 1) for name in energies} for _ in range(2)]
        samples = [
            Data(
                pos=drawn(number, 3),
                natoms=number,
                fixed=torch.arange(number) % 3 == 1,
                tags=torch.arange(number) % 3,
                atomic_numbers=torch.ones(number, dtype=torch.long),
            )
            for number in self.natoms
        ]
        batch = Batch.from_data_list(samples)
        return LossInputs(
            batch,
            student=student,
            teacher=teacher,
            student_outputs=sides[0],
            teacher_outputs=sides[1],
            student_atom_energies=shares[0],
            teacher_atom_energies=shares[1],
        )

    def parts(self, inputs: LossInputs | None = None) -> list[Part]:
        """Those that are of the loss; numbers for the records alone are left out."""
        found = self.term(self.inputs if inputs is None else inputs)
        return [part for part in found if part.weight is not None]

    def value(self, inputs: LossInputs | None = None) -> Tensor:
        return _mean(self.parts(inputs))

    def mapped(self, batch: Batch, change: Any, systems: Tensor | None = None) -> LossInputs:
        """The inputs with ``change(name or request, tensor)`` of each."""
        own = self.inputs

        def each(block: Any) -> Any:
            return {key: change(key, value) for key, value in block.items()}

        return LossInputs(
            batch,
            student=each(own.student),
            teacher=each(own.teacher),
            student_outputs=each(own.student_outputs),
            teacher_outputs=each(own.teacher_outputs),
            student_atom_energies=each(own.student_atom_energies),
            teacher_atom_energies=each(own.teacher_atom_energies),
            systems=systems,
        )

    def permuted(self) -> LossInputs:
        """Atoms of each structure in another order."""
        generator, start, orders = torch.Generator().manual_seed(2), 0, []
        for number in self.natoms:
            orders.append(torch.randperm(number, generator=generator) + start)
            start += number
        order = torch.cat(orders)
        batch = self.inputs.batch.clone()
        for key in ("pos", "fixed", "tags", "atomic_numbers"):
            batch[key] = batch[key][order]

        def change(key: Any, value: Tensor) -> Tensor:
            return value if key == "energy" and self._of_systems(value) else value[order]

        return self.mapped(batch, change)

    def _of_systems(self, value: Tensor) -> bool:
        return len(value) == len(self.natoms)

    def turned(self, *, mirrored: bool = False) -> LossInputs:
        """All structures turned, and mirrored too where that is wanted."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        matrix, _ = torch.linalg.qr(drawn)
        matrix = matrix * matrix.det() * (-1 if mirrored else 1)
        batch = self.inputs.batch.clone()
        batch.pos = batch.pos @ matrix.T

        def change(key: Any, value: Tensor) -> Tensor:
            if key == "forces":
                return value @ matrix.T
            if value.dim() == 3:
                return torch.einsum("xy,nyc->nxc", matrix, value)
            return value

        return self.mapped(batch, change)

    def of(self, structures: Any) -> LossInputs:
        """Some structures alone, as another rank has them."""
        chosen = list(structures)
        batch = Batch.from_data_list([self.inputs.batch[i] for i in chosen])
        atoms = torch.isin(self.inputs.batch.batch, torch.tensor(chosen))

        def change(key: Any, value: Tensor) -> Tensor:
            return value[chosen] if key == "energy" and self._of_systems(value) else value[atoms]

        return self.mapped(batch, change)


def _mean(parts: Sequence[Part]) -> Tensor:
    """The value of parts on one rank."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        value = part.total if part.count is None else part.total / torch.as_tensor(part.count)
        assert part.weight is not None
        total = total + part.weight * value
    return total


def _joined(parts: Sequence[Part]) -> Part:
    """One part of several ranks: sums and counts added up."""
    total = sum((part.total for part in parts), torch.zeros((), dtype=torch.float64))
    counts = [part.count for part in parts]
    count = None
    if None not in counts:
        count = sum(torch.as_tensor(c, dtype=torch.float64) for c in counts if c is not None)
    return Part(parts[0].name, parts[0].weight, total, count)


def _check_gradient(case: _Case, tolerance: float) -> None:
    """Along a random direction of the student's values and of the loss's parameters."""
    inputs = case.inputs
    blocks = (inputs.student, inputs.student_outputs, inputs.student_atom_energies)
    leaves = [value for block in blocks for value in block.values()]
    leaves += [p for p in case.term.parameters() if p.requires_grad]
    for leaf in leaves:
        leaf.requires_grad_(True)
    gradients = torch.autograd.grad(case.value(), leaves, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients), "nothing has a gradient"
    generator = torch.Generator().manual_seed(4)
    steps = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in leaves]
    slope = sum(
        float((g * s).sum()) for g, s in zip(gradients, steps, strict=True) if g is not None
    )
    size, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for leaf, step in zip(leaves, steps, strict=True):
                leaf += sign * size * step
            values.append(case.value().item())
    numeric = (values[0] - values[1]) / (2 * size)
    for leaf in leaves:
        leaf.requires_grad_(isinstance(leaf, torch.nn.Parameter))
    near = abs(slope - numeric) <= max(1e3 * tolerance, 1e-5) * max(abs(numeric), 1e-3)
    assert near, f"the gradient gives a slope of {slope:.6g}, and the value one of {numeric:.6g}"


def _check_trust(case: _Case, tolerance: float) -> None:
    """What is said of structures that do not count changes nothing, and they learn nothing."""
    last = len(case.natoms) - 1
    systems = torch.tensor([number != last for number in range(last + 1)])
    atoms = case.inputs.batch.batch == last

    def spoiled(key: Any, value: Tensor) -> Tensor:
        rows = ~systems if key == "energy" and case._of_systems(value) else atoms
        made = torch.where(rows.view(-1, *(1,) * (value.dim() - 1)), value + 3.0, value)
        made = made.detach().requires_grad_(True)
        made.register_hook(lambda g, rows=rows: seen.append(g[rows]))
        return made

    seen: list[Tensor] = []
    plain = case.value(case.mapped(case.inputs.batch, lambda _, value: value, systems))
    value = case.value(case.mapped(case.inputs.batch, spoiled, systems))
    _assert_same(value, plain, tolerance, "structures that the teacher is not trusted on")
    if value.requires_grad:
        value.backward()
    taught = max((float(g.abs().max()) for g in seen if g.numel()), default=0.0)
    assert taught == 0, "structures that the teacher is not trusted on have a gradient"


def _assert_same(value: Tensor, expected: Tensor, tolerance: float, of: str) -> None:
    difference = float((value - expected).detach().abs())
    scale = max(abs(float(expected.detach())), 1e-12)
    assert difference <= tolerance * scale, (
        f"the value depends on {of}: {float(value.detach()):.8g} and {float(expected.detach()):.8g}"
    )
