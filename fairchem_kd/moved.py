"""Documented modules by the names that they had before every module got a room."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "fairchem_kd.trainer": "fairchem_kd.distillation.trainer",  # in configs: `trainer:`
    "fairchem_kd.teacher": "fairchem_kd.models.frozen",
    "fairchem_kd.checkpoint": "fairchem_kd.models.file",
    "fairchem_kd.export": "fairchem_kd.models.export",
    "fairchem_kd.records": "fairchem_kd.training.records",
    "fairchem_kd.analysis.evaluation": "fairchem_kd.analysis.compare.evaluation",
    "fairchem_kd.analysis.extract": "fairchem_kd.analysis.embeddings.extract",
    "fairchem_kd.analysis.gap": "fairchem_kd.analysis.compare.gap",
    "fairchem_kd.analysis.models": "fairchem_kd.analysis.subjects.runs",
    "fairchem_kd.analysis.similarity": "fairchem_kd.analysis.cka.similarity",
    "fairchem_kd.analysis.splits": "fairchem_kd.analysis.subjects.splits",
}


class _Alias(Loader):
    """Loads a module that is known under another name, and leaves it as it is."""

    def __init__(self, home: str) -> None:
        self.home = home
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.home)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importlib has put the alias's there


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        home = MOVED.get(fullname)
        return None if home is None else ModuleSpec(fullname, _Alias(home))


def know_old_names() -> None:
    """Let the old names be imported, after all that are files."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
