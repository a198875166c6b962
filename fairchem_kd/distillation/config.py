"""The ``task.distillation`` block of a config, as typed and validated classes.

Everything here is checked before a teacher is loaded or a GPU touched. Each loss brings the options
of its own (:mod:`fairchem_kd.losses`); what is common to all of a run stands here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.distillation.balance import GRADIENTS, BalanceOptions, balance_options
from fairchem_kd.distillation.companions import RattleOptions, UnlabelledOptions
from fairchem_kd.distillation.ensembles import MASKED, SPREAD, EnsembleOptions
from fairchem_kd.distillation.gradients import DiagnosticOptions
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.losses import Loss, loss_class
from fairchem_kd.losses.schedule import Schedule
from fairchem_kd.machine import FP32, PRECISIONS
from fairchem_kd.schema import is_null, option, parse
from fairchem_kd.stock.conservative import KEY as CONSERVATIVE
from fairchem_kd.stock.softness import KEY as SOFT_LENGTHS
from fairchem_kd.teachers.answers import PRECISIONS as KEPT
from fairchem_kd.teachers.place import AUTO, OFF

WHERE = "task.distillation"
#: Keys of ``task`` that stock does not read.
OURS = ("distillation", CONSERVATIVE, SOFT_LENGTHS)
#: What stands beside the terms' values in logs and records.
RESERVED = ("loss", "lr", "epoch", "step", "grad_norm", "rattle", "untrusted", "label_loss", MASKED)


@dataclass
class TeacherConfig:
    """Where the teacher is; its architecture, normalisers and scale factors come from the file.

    Without a file, a store of what it has said is the teacher, for whatever that holds.
    """

    checkpoint: str | list[str] | None = option(
        None,
        help="the teacher's checkpoint; a list: an ensemble, whose mean teaches, in which a folder "
        "is the store of a member that is not here",
    )
    trust_checkpoint: bool = option(
        False, help="unpickle a file that the safe reader refuses: this runs code from the file"
    )
    elements: list[str | int] | None = option(
        None, help="elements of its training data, where neither file nor card says"
    )
    precision: str = option(
        FP32,
        choices=PRECISIONS,
        help="how it computes: tf32 is of NVIDIA's GPUs (fp32 elsewhere), bf16 torch's autocast",
    )
    store: str | list[str] = option(
        AUTO,
        help="where its answers are kept and read: auto, off (ask at every step) or a folder, "
        "which without checkpoint is the teacher; a list of folders: an ensemble of such",
    )
    energy_zero: str = option(
        "teacher",
        choices=("teacher", "labels"),
        help="labels: its energies are shifted, by a fit for each element, to the labels' zero",
    )
    max_gb: float = option(20.0, gt=0, help="GB that the store may have; the rest is asked live")
    store_features: str = option(
        "fp32", choices=tuple(KEPT), help="how features are kept; outputs are kept whole"
    )
    ensemble: EnsembleOptions | None = option(
        None, help="of a list of checkpoints or stores: what their spread is used for"
    )

    def __post_init__(self) -> None:
        if (several := named_in(self.checkpoint)) is not None:
            self.checkpoint = _members(several, "checkpoint", "the path of a checkpoint")
        if (several := named_in(self.store)) is not None:
            self.store = _members(several, "store", "the folder of a store") or ""
        self._check_store()
        self._check_ensemble()

    def _check_store(self) -> None:
        if isinstance(self.store, str):
            if not self.store.strip():
                raise UserError(f"{WHERE}.teacher.store must be auto, off or a folder, not empty.")
            return
        if self.checkpoint:
            raise UserError(
                f"{WHERE}.teacher.store is a list, which is an ensemble of stores alone, and there "
                f"is a {WHERE}.teacher.checkpoint too: give one folder for what that says, or name "
                "the stores beside it in the list of checkpoints."
            )
        for number, name in enumerate(self.store):
            if name.strip().lower() in (AUTO, OFF):
                raise UserError(
                    f"{WHERE}.teacher.store[{number}] is {name}, which is no store of a teacher: "
                    "name the folders of the members."
                )

    def _check_ensemble(self) -> None:
        if self.ensemble is None:
            return
        if len(self.members) < 2:
            raise UserError(
                f"{WHERE}.teacher.ensemble is of several teachers, and {WHERE}.teacher.checkpoint "
                "(or store) names fewer than two: give a list of them, or take ensemble out."
            )
        lead = self.ensemble.features
        if lead is not None and lead not in self.members:
            key = "store" if isinstance(self.store, list) else "checkpoint"
            raise UserError(
                f"{WHERE}.teacher.ensemble.features is '{lead}', which is none of teacher."
                f"{key}{did_you_mean(lead, self.members)}: name it as it is there."
            )

    @property
    def members(self) -> list[str]:
        """What an ensemble is of; empty where one teaches."""
        named = self.store if isinstance(self.store, list) else self.checkpoint
        return named if isinstance(named, list) else []

    @property
    def lead(self) -> int:
        """The number of the member whose features are compared."""
        named = self.ensemble.features if self.ensemble is not None else None
        return self.members.index(named) if named else 0

    @property
    def is_recorded(self) -> bool:
        """Whether the teacher is a store, or several, and nothing else."""
        if isinstance(self.store, list):
            return True
        return not self.checkpoint and self.store.strip().lower() not in (AUTO, OFF)


@dataclass
class LabelLoss:
    """What the labels count while something is distilled; plain training takes them as they are.

    Its ``schedule`` is a loss term's: features first and labels afterwards, or the other way round.
    """

    coefficient: float = option(1.0, ge=0, help="factor on the whole loss of the labels")
    schedule: Schedule = option(factory=Schedule, help="how that changes over training")


@dataclass
class ProjectionOptim:
    """How the projections are trained, apart from the student and with AdamW.

    Their learning rate is multiplied by whatever the student's scheduler does to the student's.
    """

    lr: float | None = option(None, gt=0, help="default: the student's lr_initial")
    weight_decay: float = option(0.0, ge=0, help="AdamW's weight decay")
    clip_grad_norm: float | None = option(None, gt=0, help="default: the student's clip_grad_norm")


@dataclass
class DistillationConfig:
    """``task.distillation``; ``terms`` is filled from ``losses``."""

    teacher: TeacherConfig = option(factory=TeacherConfig, help="the teacher")
    losses: dict[str, Any] | None = option(None, help="loss terms, each under its own name")
    labels: LabelLoss = option(factory=LabelLoss, help="what the labels count beside the losses")
    rattle: RattleOptions | None = option(None, help="displaced copies that the teacher labels")
    unlabelled: UnlabelledOptions | None = option(None, help="structures without labels")
    projections: ProjectionOptim = option(factory=ProjectionOptim, help="their optimiser")
    statistics_samples: int = option(
        256, ge=1, help="training samples, evenly spread, from which features are standardised"
    )
    diagnostics: DiagnosticOptions = option(
        factory=DiagnosticOptions, help="each term's gradient beside the labels', in the records"
    )
    balance: str | BalanceOptions | None = option(
        None, help="gradient_norm or uncertainty: factors of the terms that follow the training"
    )
    validate: bool = option(
        False,
        help="report the distillation losses on the validation set too, but for those on slopes "
        "and on pairs of copies",
    )
    flush_denormal: bool = option(True, help="CPU only: flush denormal numbers to zero")

    def __post_init__(self) -> None:
        self.terms: dict[str, Loss] = {}
        for name, given in (self.losses or {}).items():
            if not is_null(given):  # `null` switches off a term of an included file
                self.terms[name] = loss_term(name, given, f"{WHERE}.losses")
        if self.unlabelled is not None and self.rattle is not None and self.rattle.needs_forces:
            raise UserError(
                f"{WHERE}.rattle.mode {self.rattle.mode} goes by the labels' forces, and the "
                f"structures of {WHERE}.unlabelled have none: take plain or fixed_length, or leave "
                "unlabelled out."
            )
        if self.unlabelled is not None and self.unlabelled.weight is not None:
            self._check_mixing()
        self.balancing = balance_options(self.balance)
        if (
            self.balancing is not None
            and self.balancing.kind == GRADIENTS
            and self.labels.coefficient == 0
        ):
            raise UserError(
                f"{WHERE}.balance gradient_norm goes by the gradient of the labels' loss, whose "
                f"{WHERE}.labels.coefficient is 0: take uncertainty, or let the labels count."
            )
        for term in self.active_terms.values():
            pairs = self.rattle and self.rattle.antithetic and self.rattle.copies > 0
            if term.needs_pairs and not pairs:
                raise UserError(
                    f"{term.where} compares rattled copies in pairs: set {WHERE}.rattle: "
                    "{antithetic: true}, with copies above 0, which makes them."
                )
        if any(term.coefficient > 0 for term in self.terms.values()) and not (
            self.teacher.checkpoint or self.teacher.is_recorded
        ):
            raise UserError(
                f"{WHERE}.teacher.checkpoint is required by {WHERE}.losses: give the path of a "
                "trained fairchem checkpoint, or in teacher.store that of a store of what a "
                "teacher has said, or set the losses to null."
            )

    def _check_mixing(self) -> None:
        """Refuse what the shares of labels and teacher leave without a meaning.

        Raises:
            UserError: there is such a thing.
        """
        key = f"{WHERE}.unlabelled.weight"
        if self.rattle is not None and self.rattle.copies > 0:
            raise UserError(
                f"{key} shares the structures of a step out between labels and teacher, and "
                "rattled copies belong to neither: leave rattle out, or set weight: null."
            )
        active = self.active_terms.values()
        if active and not any(t.needs_outputs or t.needs_atom_energy for t in active):
            raise UserError(
                f"{key} is of losses on outputs, and there is none: add vanilla, or set it to null."
            )

    @property
    def active_terms(self) -> dict[str, Loss]:
        """The terms that are worth computing: those with a coefficient above 0."""
        return {name: term for name, term in self.terms.items() if term.coefficient > 0}


def parse_distillation(task: Mapping[str, Any] | None) -> DistillationConfig:
    """The typed block out of a config's ``task`` (without one: plain training).

    Raises:
        UserError: one sentence naming the key that is wrong.
    """
    task = task or {}
    for key in task:
        near = difflib.get_close_matches(str(key), OURS, n=1)
        if key not in OURS and near:
            raise UserError(f"task has an unknown key '{key}' (did you mean '{near[0]}'?).")
    return parse(DistillationConfig, _with_off(task.get("distillation")), WHERE)


def _with_off(block: Any) -> Any:
    """The block, with ``store: off`` as it was meant: YAML reads an ``off`` as false."""
    teacher = block.get("teacher") if isinstance(block, Mapping) else None
    if not isinstance(teacher, Mapping) or teacher.get("store") is not False:
        return block
    return {**block, "teacher": {**teacher, "store": OFF}}


def named_in(given: Any) -> list[str] | None:
    """The files or folders of a list, as YAML or the command line (``[a.pt, b.pt]``) gives it.

    None where it is no list.
    """
    if isinstance(given, str) and re.fullmatch(r"\s*\[.*\]\s*", given):
        words = given.strip().strip("[]").split(",")
        return [word.strip(" '\"") for word in words if word.strip()]
    return list(given) if isinstance(given, list | tuple) else None


def _members(given: list[str], key: str, what: str) -> str | list[str] | None:
    """The files or folders of a list; of one alone, that.

    Args:
        given: as a config has them.
        key: under ``task.distillation.teacher``.
        what: each of them is, in words.

    Raises:
        UserError: one of them is named twice, or by nothing.
    """
    seen: dict[Path, str] = {}
    for number, name in enumerate(given):
        where = f"{WHERE}.teacher.{key}[{number}]"
        if is_null(name):
            raise UserError(f"{where} is empty: give {what}, or take it out.")
        path = Path(name).resolve()
        if path in seen:
            kind = "file" if key == "checkpoint" else "folder"
            raise UserError(
                f"{where}: {name} is the same {kind} as {seen[path]}, so that they are never "
                "apart: name each once."
            )
        seen[path] = name
    return given if len(given) > 1 else next(iter(given), None)


def loss_term(name: str, given: Any, within: str) -> Loss:
    """A term out of its options, found at ``within``.

    Raises:
        UserError: a name or options that do not fit.
    """
    where = f"{within}.{name}"
    if name in RESERVED or name.startswith(f"{SPREAD}_"):
        raise UserError(f"{where}: records have a value of that name already; choose another.")
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise UserError(f"{where}: a term's name has letters, digits, '_' and '-' only.")
    if isinstance(given, str) and given.strip() in ("{}", ""):
        given = {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be a mapping of options ({{}} for the defaults) or null.")
    options = dict(given)
    kind = options.pop("kind", name)
    return loss_class(str(kind), where).from_options(options, where)


def refuse_graph_parallel(gp_gpus: int | None) -> None:
    """Refuse fairchem's splitting of one graph over several GPUs: features live on whole graphs."""
    if gp_gpus is not None:
        raise UserError("--gp-gpus: distillation does not run graph-parallel; remove the flag.")
