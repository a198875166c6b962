"""How many structures and atoms a model takes a second, at inference."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fairchem_kd.machine import denormals_are_flushed, device_name

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.analysis.subjects.splits import Split
    from fairchem_kd.models.frozen import Teacher


@dataclass(frozen=True)
class Throughput:
    """A measurement of :func:`measure_throughput`, and what it depends on."""

    systems_per_second: float
    atoms_per_second: float
    batch_size: int  #: structures in a batch
    atoms: float  #: in a batch, on average
    seconds: list[float]  #: of each repeat, per batch
    device: str
    threads: int
    flush_denormal: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_throughput(
    model: Teacher,
    split: Split,
    *,
    batch_size: int = 32,
    batches: int = 1,
    repeats: int = 7,
    warm_up: int = 2,
) -> Throughput:
    """Time the model's forward on the first batches of a split, neighbour search included.

    The batches are in memory, and on the device, before the clock starts. The median over
    ``repeats`` counts, each of which takes all batches once.

    Args:
        model: as :func:`fairchem_kd.analysis.subjects.runs.load_model` gives it.
        split: where the structures come from.
        batch_size: structures in a batch; fewer where the split has fewer.
        batches: how many different batches.
        repeats: timed passes.
        warm_up: passes before them.
    """
    device = next(model.model.parameters()).device
    work = [batch.to(device) for batch in islice(split.loader(batch_size), batches)]
    if len(work) > 1 and work[-1].natoms.numel() < batch_size:
        work.pop()  # the split's last, smaller batch
    systems = sum(batch.natoms.numel() for batch in work)
    atoms = sum(int(batch.natoms.sum()) for batch in work)
    seconds = []
    for repeat in range(warm_up + repeats):
        _wait(device)
        start = time.perf_counter()
        _pass(model, work)
        _wait(device)
        if repeat >= warm_up:
            seconds.append((time.perf_counter() - start) / len(work))
    middle = median(seconds) * len(work)
    return Throughput(
        systems / middle,
        atoms / middle,
        systems // len(work),
        atoms / len(work),
        seconds,
        device_name(device),
        torch.get_num_threads(),
        denormals_are_flushed(),
    )


def _pass(model: Teacher, work: list[Batch]) -> None:
    for batch in work:
        model.forward(batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
