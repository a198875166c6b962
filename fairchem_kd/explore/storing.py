"""Filling a store with what a teacher says of the frames that an exploration has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.calculators.asking import Calculator
from fairchem_kd.explore.answers import Answers


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


class Noting:
    """Puts what a calculator says of the frames of explorations into its store.

    Args:
        calculator: that was asked on the way, too.
        store: the store's folder.
        retry: ask again about structures of which nothing could be said.
    """

    def __init__(self, calculator: Calculator, store: Path, *, retry: bool = False) -> None:
        self.calculator = calculator
        self.store = store
        self.retry = retry
        self._kept: list[Path] = []

    def keep(self, dest: Path, out: Path, card: dict[str, Any], answers: Answers) -> None:
        """Keep what it said of the frames of a data set, without asking it about them again.

        Args:
            dest: where the data set will be, for what is told.
            out: where it is.
            card: its card.
            answers: what was said.

        Raises:
            UserError: the store is another teacher's, or the calculator will not do.
        """
        self.calculator.recall = answers
        try:
            self._fill({str(dest / name): out / name for name in card["splits"]})
        finally:
            self.calculator.recall = None
        self._kept += [dest / name for name in card["splits"]]

    def has(self, splits: Sequence[Path]) -> bool:
        """Whether :meth:`keep` has seen to these."""
        return set(splits) <= set(self._kept)

    def fill(self, splits: Sequence[Path]) -> None:
        """Ask about what the store lacks, as ``fairchem-kd teach DATA --calculator`` does.

        Raises:
            UserError: see :meth:`keep`.
        """
        self._fill({str(path): path for path in splits})

    def fill_for_training(self, config: Path) -> None:
        """Ask about what the store lacks of all that a training will ask its teacher.

        Raises:
            UserError: see :meth:`keep`; or it is no config of a distillation.
        """
        from fairchem_kd.distillation.asking import Asking, ask_for_training

        ask_for_training(config, Asking(self.store, self.calculator, retry=self.retry))

    def _fill(self, splits: Mapping[str, Path]) -> None:
        from fairchem_kd.distillation.asking import Asking, ask_for_samples

        samples = {}
        for name, path in splits.items():
            with open_structures(path) as structures:
                samples[name] = list(structures.samples())
        ask_for_samples(samples, Asking(self.store, self.calculator, retry=self.retry))
