"""Filling a store with what a teacher says of the frames that an exploration has found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.calculators.asking import Calculator


def splits_of(dest: Path, card: dict[str, Any]) -> list[Path]:
    """The folders of a data set's splits."""
    return [dest / name for name in card["splits"]]


def fill_from_model(
    splits: Sequence[Path],
    checkpoint: Path,
    store: str,
    features: Sequence[str],
    *,
    cpu: bool,
    trust: bool,
) -> Path:
    """Keep what a checkpoint says, as ``fairchem-kd teach DATA --teacher`` does; the store.

    Args:
        splits: folders of LMDBs.
        checkpoint: the teacher.
        store: ``auto`` or a folder.
        features: addresses of the features that are kept with its outputs.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle a file that may run code.

    Raises:
        UserError: the teacher has no such feature, or the store will not do.
    """
    from fairchem_kd.analysis.embeddings.extract import feature_tap
    from fairchem_kd.distillation.config import TeacherConfig
    from fairchem_kd.distillation.teaching import teach_samples
    from fairchem_kd.machine import choose_device
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.teachers import LiveTeacher

    device = choose_device(cpu=cpu)
    frozen = Teacher.from_checkpoint(checkpoint, trust=trust, device=device, where="--teacher")
    live = LiveTeacher(frozen)
    requests = list(feature_tap(frozen.model, features).specs) if features else []
    config = TeacherConfig(str(checkpoint), store=store, max_gb=20.0)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_structures(path)) for path in splits]
        samples = {structures.path: structures.samples for structures in opened}
        return teach_samples(live, requests, config, samples)


def fill_from_calculator(
    splits: Sequence[Path], calculator: Calculator, store: Path, *, retry: bool = False
) -> Path:
    """Keep what an ASE calculator says, as ``fairchem-kd teach DATA --calculator`` does; the store.

    Raises:
        UserError: the store is another teacher's, or the calculator will not do.
    """
    from fairchem_kd.distillation.asking import Asking, ask_for_samples

    with ExitStack() as stack:
        opened = [stack.enter_context(open_structures(path)) for path in splits]
        samples = {structures.path: list(structures.samples()) for structures in opened}
    ask_for_samples(samples, Asking(store, calculator, retry=retry))
    return store
