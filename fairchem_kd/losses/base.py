"""What every distillation loss is: typed options, what it needs, and parts to be averaged.

A new loss is a subclass of :class:`Loss` under ``@register_loss("name")``; a config then uses it
as ``kind: name``. A loss of another package is named by its dotted path, ``kind:
package.module.Class``, which imports it in every process, or by the name under which the package
offers it as an entry point (:data:`ENTRY_POINTS`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fairchem_kd.entry_points import offered
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.losses.elementwise import FUNCTIONS
from fairchem_kd.losses.schedule import Schedule
from fairchem_kd.schema import option, parse

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec, Request


@dataclass
class LossOptions:
    """What every term has."""

    coefficient: float | None = option(
        None, ge=0, help="factor on the loss; 0 switches the term off"
    )  # None: the loss's own
    schedule: Schedule = option(factory=Schedule, help="how the coefficient changes over training")


@dataclass
class ElementwiseOptions(LossOptions):
    """What a term that compares tensors element by element has."""

    fn: str = option("mse", choices=FUNCTIONS, help="how two values are compared")
    delta: float = option(1.0, gt=0, help="huber only: where the square ends and the line begins")


@dataclass(frozen=True)
class Part:
    """One local sum of a loss, before its mean over ranks.

    The mean over all elements of all ranks is the sum of ``total`` over ranks divided by the sum
    of ``count`` over ranks; with ``count`` None the part is a plain sum over ranks. A value that
    every rank works out from the rows of all (:func:`~fairchem_kd.losses.gather_rows`) has the
    count 1: the mean over ranks is the value itself, and its gradient that of a single rank.
    """

    name: str  # within the term; empty where it has but one part
    #: within the term; the term's coefficient and schedule come on top. None: no part of the loss,
    #: a number for the records alone
    weight: float | None
    total: Tensor  # (), local sum over elements, with its gradient
    count: Tensor | int | None  # local number of elements


@dataclass(frozen=True)
class Labels:
    """How a training learns its labels, for a loss that follows it."""

    losses: Sequence[tuple[str, Mapping[str, Any]]]  # (target, {"fn", "coefficient"}), as trained
    outputs: Mapping[str, Mapping[str, Any]]  # by target: level, train_on_free_atoms
    taught: Mapping[str, str] | None = None  # the teacher's outputs: level by name; None: unknown
    energy: str | None = "energy"  # the output whose atoms' shares both models offer by default


@dataclass
class LossInputs:
    """What the losses of one batch see.

    Outputs are in the student's normalised units, the teacher's too: by name, ``(B, C)`` of
    structures (energy: ``(B, 1)``) and ``(N, C)`` of atoms (forces: ``(N, 3)``); so is what atoms
    give to an output, ``(N, 1)``. Structures on which the teacher is not to be trusted do not
    count: a loss takes the rows that :meth:`atoms` and ``systems`` name.
    """

    batch: Any  # with natoms (B,) and fixed (N,)
    student: Mapping[Request, Tensor] = field(default_factory=dict)
    teacher: Mapping[Request, Tensor] = field(default_factory=dict)
    student_outputs: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_outputs: Mapping[str, Tensor] = field(default_factory=dict)
    student_atom_energies: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_atom_energies: Mapping[str, Tensor] = field(default_factory=dict)
    systems: Tensor | None = None  # (B,), true where a system counts; None: all of them
    step: int = 0  # of the optimiser, from 1: what is drawn at random depends on it alone
    #: ``(B,)`` by output, what a structure weighs in a loss on it, about 1 on average; where an
    #: output has none, all weigh 1
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    #: for cotangents ``(N, 3)`` of the teacher's normalised forces what they give at positions,
    #: ``(N, 3)`` per Å; None where no loss asks for slopes
    teacher_slopes: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    def atoms(self, *, free: bool = False) -> Tensor | None:
        """``(N,)``, true for the atoms that count, or the free ones of them; None: all atoms."""
        rows = self.systems[self.batch.batch] if self.systems is not None else None
        if free:
            rows = self.batch.fixed == 0 if rows is None else rows & (self.batch.fixed == 0)
        return rows

    def weighed(self, values: Tensor, output: str, *, per_atom: bool) -> Tensor:
        """Values of a loss on an output, times what their structures weigh.

        Args:
            values: ``(N, ...)`` of atoms or ``(B, ...)`` of structures.
        """
        weights = self.weights.get(output)
        if weights is None:
            return values
        weights = weights[self.batch.batch] if per_atom else weights
        return values * weights.to(values).view(-1, *(1,) * (values.dim() - 1))


class Loss(nn.Module):
    """A term of ``task.distillation.losses``.

    Its life: options are parsed (:meth:`from_options`); the trainer reads what it needs
    (:meth:`student_requests`, :meth:`teacher_requests`, :meth:`compared_outputs`,
    :attr:`needs_atom_energy`); :meth:`build` makes its modules once the channels are known; where
    :attr:`needs_statistics`, :meth:`update_statistics` sees some batches of the teacher, then
    :meth:`finalize_statistics`; after that it is called once per batch. What it needs depends on
    its options and arguments alone, never on what was called before. Nothing in it waits for the
    device or for other ranks, but for a loss that compares atoms with each other: it has the rows
    of all ranks from :func:`~fairchem_kd.losses.gather_rows`.

    Args:
        options: of the class :attr:`Options`.
        where: the term's place in the config, for messages.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[LossOptions]] = LossOptions
    #: Where a config gives none. Of standardised features 100 is on one scale whatever the pair of
    #: models; of the outputs it multiplies the training loss's own coefficients.
    default_coefficient: ClassVar[float] = 1.0
    #: Options that a written config shows, with their values.
    telling: ClassVar[tuple[str, ...]] = ()
    #: Whether it wants to see what the two models say of some structures before the first step.
    checks_pair: ClassVar[bool] = False
    #: Whether it differentiates forces with respect to positions: the batch's then have a graph.
    needs_slopes: ClassVar[bool] = False
    #: Whether it does so with the student's alone, which then have to be direct ones.
    needs_own_slopes: ClassVar[bool] = False
    #: Whether it compares structures in pairs: `fairchem_kd.losses.jacobian.pair_atoms`.
    needs_pairs: ClassVar[bool] = False

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__()
        self.options: Any = options
        self.where = where

    @classmethod
    def from_options(cls, given: Any, where: str) -> Loss:
        """The term from its mapping in the config.

        Raises:
            UserError: an unknown key or a value that does not fit.
        """
        return cls(parse(cls.Options, given, where), where)

    @classmethod
    def addresses(cls) -> dict[str, str]:
        """The features that it compares by default, by side: ``student``, ``teacher``.

        An option of the side's name names another feature. Empty: it compares no features.
        """
        return {}

    @classmethod
    def options_for(cls, outputs: Collection[str]) -> dict[str, Any]:
        """Options with which it does without the outputs that a teacher does not have."""
        return {}

    @property
    def coefficient(self) -> float:
        given = self.options.coefficient
        return self.default_coefficient if given is None else given

    @property
    def schedule(self) -> Schedule:
        return self.options.schedule

    @property
    def needs_outputs(self) -> tuple[str, ...]:
        """Names of the outputs that it may compare, by its options."""
        return ()

    def compared_outputs(self, labels: Labels) -> tuple[str, ...]:
        """Those of :attr:`needs_outputs` that it compares in a training with these labels.

        Raises:
            UserError: its options and the labels do not go together.
        """
        return self.needs_outputs

    @property
    def needs_atom_energy(self) -> bool:
        """Whether it compares what atoms give to an output: :meth:`compared_atom_energies`."""
        return False

    def compared_atom_energies(self, labels: Labels) -> tuple[str, ...]:
        """Names of the outputs of structures of which it compares what atoms give to them.

        Raises:
            UserError: its options name one that is none, or none and several may be meant.
        """
        if not self.needs_atom_energy:
            return ()
        if labels.energy is None:
            raise UserError(
                f"{self.where}: student and teacher do not have one energy of atoms by the same "
                "name; give both a head of that name."
            )
        return (labels.energy,)

    @property
    def needs_statistics(self) -> bool:
        return False

    def student_requests(self) -> list[Request]:
        return []

    def teacher_requests(self) -> list[Request]:
        return []

    def build(
        self,
        student_specs: Mapping[Request, FeatureSpec],
        teacher_specs: Mapping[Request, FeatureSpec],
        generator: torch.Generator,
        labels: Labels | None = None,
    ) -> None:
        """Make projection and standardizer, the random numbers from ``generator`` alone.

        Args:
            student_specs: by each of its :meth:`student_requests`, at least.
            teacher_specs: by each of its :meth:`teacher_requests`, at least.
            generator: a CPU generator.
            labels: of the training; None: there is none, and only whether the pair fits matters.

        Raises:
            UserError: what the two models offer does not fit, or not the labels.
        """

    def update_statistics(self, teacher: Mapping[Request, Tensor], batch: Any) -> None:
        """Take in one batch of the teacher's features."""

    def finalize_statistics(self) -> None:
        """Fix the statistics."""

    def forward(self, inputs: LossInputs) -> list[Part]:
        """The term's parts, the same ones on every rank.

        None of them where it can say nothing: an evaluation has no slopes and no pairs of copies.
        """
        raise NotImplementedError

    def check_pair(self, found: Mapping[str, float]) -> None:
        """Look at what it noted of the first structures of a training, before the first step.

        Only where :attr:`checks_pair`.

        Args:
            found: by name, its parts without weight.

        Raises:
            UserError: the pair of models gives it nothing to compare.
        """


def masked_sum(values: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Sum and number of the elements of ``values`` ``(N, ...)``, in the ``rows`` ``(N,)`` or all.

    Without indexing by a mask, which would wait for the device.
    """
    if rows is None:
        return values.sum(), values.numel()
    shaped = rows.view(-1, *(1,) * (values.dim() - 1))
    per_row = values[0].numel() if len(values) else 0
    return torch.where(shaped, values, 0).sum(), rows.sum() * per_row


#: The group of entry points under which other packages offer losses: names and classes.
ENTRY_POINTS = "fairchem_kd.losses"
_LOSSES: dict[str, type[Loss]] = {}
_L = TypeVar("_L", bound=type[Loss])


def register_loss(kind: str) -> Callable[[_L], _L]:
    """Make a subclass of :class:`Loss` known to configs as ``kind``."""

    def register(cls: _L) -> _L:
        if _LOSSES.get(kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"a loss named '{kind}' exists already: {_LOSSES[kind]}")
        cls.kind = kind
        _LOSSES[kind] = cls
        return cls

    return register


def known_losses() -> dict[str, type[Loss]]:
    """Every registered kind and its class, by name; those of other packages too."""
    _register_offered()
    return dict(sorted(_LOSSES.items()))


def _register_offered() -> None:
    """Register what other packages offer; ours keep their names."""
    for name, found in offered(ENTRY_POINTS).items():
        if not (isinstance(found, type) and issubclass(found, Loss)):
            logging.warning(f"The entry point '{name}' of {ENTRY_POINTS} is no loss: left out.")
        elif _LOSSES.setdefault(name, found) is not found:
            logging.warning(
                f"The entry point '{name}' of {ENTRY_POINTS} has the name of another loss, which "
                f"stays: name yours by its path, {found.__module__}.{found.__qualname__}."
            )
        elif "kind" not in vars(found):
            found.kind = name


def loss_class(kind: str, where: str) -> type[Loss]:
    """The class of a kind, of ours or of an entry point, or of the dotted path of a class.

    Raises:
        UserError: no such kind, or nothing of that path that is a :class:`Loss`.
    """
    if kind in _LOSSES:
        return _LOSSES[kind]
    module, _, name = kind.rpartition(".")
    if not module:
        if kind in known_losses():
            return _LOSSES[kind]
        raise UserError(f"{where} has the unknown kind '{kind}'{did_you_mean(kind, _LOSSES)}.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}.kind: '{kind}' cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Loss)):
        raise UserError(f"{where}.kind: '{kind}' is not a subclass of fairchem_kd.losses.Loss.")
    if not hasattr(found, "kind"):
        found.kind = kind
    return found
