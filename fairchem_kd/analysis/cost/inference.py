"""What models cost once they are trained: throughput over batch sizes, memory, a step of MD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fairchem_kd.analysis.cost.timing import Timing, peak_memory, take_turns

if TYPE_CHECKING:
    import ase
    from ase.calculators.calculator import Calculator
    from torch_geometric.data import Batch

    from fairchem_kd.models.frozen import Teacher


@dataclass(frozen=True)
class Speed:
    """One model on one batch, neighbour search included."""

    systems: int
    atoms: int
    timing: Timing
    peak_memory: int  #: bytes beyond weights and batch

    @property
    def systems_per_second(self) -> float:
        return self.systems / self.timing.median

    @property
    def atoms_per_second(self) -> float:
        return self.atoms / self.timing.median

    def as_dict(self) -> dict[str, Any]:
        return {
            "systems": self.systems,
            "atoms": self.atoms,
            "systems_per_second": self.systems_per_second,
            "atoms_per_second": self.atoms_per_second,
            "peak_memory_bytes": self.peak_memory,
            "per_batch": self.timing.as_dict(),
        }


@torch.no_grad()
def measure_inference(
    models: Mapping[str, Teacher],
    batches: Sequence[Batch],
    *,
    repeats: int = 7,
    warm_up: int = 2,
    progress: bool = False,
) -> dict[str, list[Speed]]:
    """Every model's forward on every batch; the models take turns.

    Args:
        models: by label, as :func:`fairchem_kd.analysis.subjects.runs.load_model` gives them,
            all on one device.
        batches: of the sizes that are wanted; on the device before the clock starts.
        repeats: timed turns.
        warm_up: turns before them.
        progress: show a bar on a terminal.

    Raises:
        UserError: structures that a model does not know.
    """
    found: dict[str, list[Speed]] = {label: [] for label in models}
    device = next(next(iter(models.values())).model.parameters()).device
    for batch in tqdm(batches, desc="inference", disable=None if progress else True):
        for model in models.values():
            model.check_elements(batch.atomic_numbers)
        work = batch.clone().to(device)
        ways = [_forward(model, work) for model in models.values()]
        timings = take_turns(ways, device, repeats=repeats, warm_up=warm_up)
        for label, way, timing in zip(models, ways, timings, strict=True):
            memory = peak_memory(way, device)
            found[label].append(Speed(batch.natoms.numel(), len(batch.pos), timing, memory))
    return found


def _forward(model: Teacher, batch: Batch) -> Any:
    return lambda: model.forward(batch)


def measure_md(
    calculators: Mapping[str, Calculator],
    atoms: ase.Atoms,
    *,
    steps: int = 10,
    warm_up: int = 2,
    time_step: float = 0.5,
) -> dict[str, Timing]:
    """Seconds per step of NVE dynamics in ASE, through each calculator; the models take turns.

    Args:
        calculators: by label.
        atoms: where each starts, at rest.
        steps: timed steps.
        warm_up: steps before them.
        time_step: fs.
    """
    from ase import units
    from ase.md.verlet import VelocityVerlet

    runs = []
    for calculator in calculators.values():
        system = atoms.copy()
        system.calc = calculator
        dynamics = VelocityVerlet(system, timestep=time_step * units.fs)
        runs.append(lambda dynamics=dynamics: dynamics.run(1))
    timings = take_turns(runs, torch.device("cpu"), repeats=steps, warm_up=warm_up)
    return dict(zip(calculators, timings, strict=True))
