"""What the demo trains: one config per student, and how long each runs.

Every student has the same config apart from its teacher's part and what a step's structures are.
The one with all of its teacher is trained a second time, for longer; the last one is the plain
student again, given as many more steps as fill the time which that takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.data.build import ensure_built
from fairchem_kd.digest import sha256_of
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.stock.noise import quiet
from fairchem_kd.training.schedule import steps_per_epoch, stretch

#: Config file (without .yml) -> what tables call it, in the order of the table.
STUDENTS = {
    "plain": "plain",
    "e2n": "e2n",
    "outputs": "outputs",
    "all": "all together",
}
BASELINE = "plain"
WHOLE = "all"  #: which is also trained for longer
LONGEST = "all_long"  #: whose time the plain student gets in the last run
LONG, LONG_LABEL = "plain_long", "plain, for that long"
LONGER = 4  #: times as many steps


@dataclass(frozen=True)
class Training:
    """One run of one student."""

    name: str
    label: str
    seed: int
    config: Mapping[str, Any]  #: resolved: no includes
    steps: int

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Its name holds a digest of all that its result depends on."""
        content = json.dumps([self.config, self.seed, teacher_digest(self.config)], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.name}-s{self.seed}-{digest}"


def teacher_digest(config: Mapping[str, Any]) -> str:
    """Of the teacher's checkpoint that a config names; empty where it names none."""
    distillation = (config.get("task") or {}).get("distillation") or {}
    path = (distillation.get("teacher") or {}).get("checkpoint")
    if not path or not Path(path).is_file():
        return ""
    return sha256_of(path)


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The students' configs in ``folder``, by name, checked, with their data built.

    Raises:
        UserError: one is missing or wrong, or they are not about one student.
    """
    from fairchem_kd.launch.config import make_parser, read_config

    missing = [name for name in STUDENTS if not (folder / f"{name}.yml").is_file()]
    if missing:
        raise UserError(
            f"The demo's config {folder / f'{missing[0]}.yml'} does not exist in {Path.cwd()}: run "
            "the demo from the root of the repository, write the shipped configs there with "
            "`fairchem-kd configs --copy .`, or name their folder with --configs."
        )
    parser = make_parser()
    configs = {}
    for name in STUDENTS:
        path = folder / f"{name}.yml"
        args = parser.parse_args(["--mode", "train", "--config-yml", str(path)])
        with quiet():  # fairchem names every key that a config overrides
            config = read_config(args, [])
        try:
            parse_distillation(config.get("task"))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        ensure_built(config)
        keys = ("trainer", "logger", "model", "task", "dataset", "outputs", "loss_functions",
                "evaluation_metrics", "optim")  # fmt: skip
        configs[name] = {key: config[key] for key in keys if key in config}
    for name, config in configs.items():
        for key in ("model", "outputs"):
            if config.get(key) != configs[BASELINE].get(key):
                raise UserError(
                    f"{folder / name}.yml has another {key} than {BASELINE}.yml, but the demo "
                    "compares one and the same student."
                )
    return configs


def plan(
    configs: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    structures: int,
    steps: int | None = None,
    times: int = LONGER,
) -> list[Training]:
    """Every training but the last ones, whose length the others decide (see :func:`longer`).

    The two on which the last one waits come first.

    Args:
        configs: as :func:`read_configs` gives them.
        seeds: each student is trained once with each.
        structures: labelled ones in an epoch.
        steps: in place of the configs' own, rounded to whole epochs.
        times: as many steps has the longer training of `WHOLE`.
    """
    labels = labels_by_name(times)
    names = [LONGEST, BASELINE, *(name for name in STUDENTS if name != BASELINE)]
    made = []
    for seed in seeds:
        for name in names:
            config = configs[WHOLE if name == LONGEST else name]
            per_epoch = steps_per_epoch(config, structures)
            epochs = int(config["optim"]["max_epochs"])
            if steps is not None:
                epochs = max(1, round(steps / per_epoch))
            if name == LONGEST:
                epochs *= times
            made.append(_training(name, labels[name], seed, config, epochs, per_epoch))
    return made


def labels_by_name(times: int = LONGER) -> dict[str, str]:
    """What tables call the trainings, in the order of the table."""
    longest = f"{STUDENTS[WHOLE]}, {times} times as long"
    return {**STUDENTS, LONGEST: longest, LONG: LONG_LABEL}


def longer(plain: Training, seconds: float, plain_seconds: float, structures: int) -> Training:
    """The plain student for ``seconds`` instead of ``plain_seconds``, its schedule stretched."""
    per_epoch = steps_per_epoch(plain.config, structures)
    epochs = max(1, round(plain.steps / per_epoch * seconds / plain_seconds))
    return _training(LONG, LONG_LABEL, plain.seed, plain.config, epochs, per_epoch)


def _training(
    name: str, label: str, seed: int, config: Mapping[str, Any], epochs: int, per_epoch: int
) -> Training:
    stretched = stretch(config, epochs, per_epoch)
    # Test sets are for the end: fairchem would predict on one whenever the validation improves.
    stretched["dataset"].pop("test", None)
    return Training(name, label, seed, stretched, epochs * per_epoch)
