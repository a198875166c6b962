"""How finished runs do as potentials, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.compare.comparison import group_by_recipe
from fairchem_kd.analysis.physics import tables as shown
from fairchem_kd.analysis.physics.plots import figures
from fairchem_kd.analysis.physics.study import Settings, study_physics
from fairchem_kd.analysis.subjects.calculators import atoms_of
from fairchem_kd.analysis.subjects.reference_method import METHODS, method_of
from fairchem_kd.analysis.subjects.runs import ModelFile, read_model, read_named
from fairchem_kd.analysis.subjects.structures import data_of, open_structures
from fairchem_kd.errors import UserError
from fairchem_kd.machine import choose_device
from fairchem_kd.md import StudentCalculator
from fairchem_kd.report.study import Study


def study(
    runs: Sequence[str],
    *,
    teacher: Path | None = None,
    data: str | None = None,
    structures: int = 5,
    method: str = "auto",
    settings: Settings | None = None,
    cpu: bool = False,
    trust: bool = False,
) -> Study:
    """Run dynamics, relaxations, finite differences and scans with every model.

    Args:
        runs: folders of runs, checkpoints, or ``LABEL=RUN``.
        teacher: likewise; the runs' own where none is given.
        data: structures to start from; the runs' test set where none are given.
        structures: how many, evenly spread.
        method: of the labels, ``none``, or ``auto`` for what the data set's card says.
        settings: of what is run.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle files that may run code.

    Raises:
        UserError: models, structures or a method that will not do.
    """
    files = _models(runs, teacher, trust)
    source = data or data_of(list(files.values())[-1][0])
    with open_structures(source, limit=structures) as opened:
        atoms = atoms_of(opened)
        path = opened.path
    device = choose_device(cpu=cpu)
    found = study_physics(
        {
            label: [StudentCalculator(f.path, device=device, trust=f.trust) for f in seeds]
            for label, seeds in files.items()
        },
        atoms,
        method=_method(method, source),
        data=path,
        settings=settings or Settings(),
        progress=True,
    )
    return Study(
        "physics",
        tables=partial(shown.tables, found),
        figures=partial(figures, found),
        as_dict=partial(shown.as_dict, found),
    )


def _models(runs: Sequence[str], teacher: Path | None, trust: bool) -> dict[str, list[ModelFile]]:
    """The files of every seed by label, the teacher first.

    Raises:
        UserError: one file given twice, or a model without forces.
    """
    named = read_named(runs, trust=trust)
    own_teacher = next((file.teacher for _, file in named if file.teacher), None)
    given = teacher or own_teacher
    if str(given).lower() == "none" and not Path(str(given)).exists():
        given = None
    groups = group_by_recipe(named)
    files: dict[str, list[ModelFile]] = {}
    if given is not None:
        path = read_model(given, trust=trust)
        own = [g for g in groups if any(f.path.resolve() == path.path.resolve() for f in g.files)]
        groups = [group for group in groups if group not in own]
        label = own[0].label if own else "teacher"
        if any(group.label == label for group in groups):
            label = f"teacher {path.identifier}"
        files[label] = [path]
    files |= {group.label: list(group.files) for group in groups}
    for name, seeds in files.items():
        for file in seeds:
            if "forces" not in _outputs(file.config):
                raise UserError(
                    f"{file.path} ('{name}') predicts no forces, and dynamics and relaxations need "
                    "them; leave it out."
                )
    return files


def _outputs(config: Mapping[str, Any]) -> Sequence[str]:
    return list(config.get("outputs") or ("energy", "forces"))


def _method(asked: str, source: Any) -> str | None:
    if asked != "auto":
        return METHODS.get(asked)
    return method_of(source if isinstance(source, Mapping) else {"src": str(source)})
