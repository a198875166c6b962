"""A frozen model out of a fairchem checkpoint, and what it says about a batch.

    checkpoint -> architecture, weights (EMA where there are any), normalisers, references
    batch -> Teacher.forward -> TeacherOutput(raw, features) -> Teacher.denormalized -> eV, eV/Å, ..

Everything is read from the checkpoint; nothing of the architecture is repeated in a config.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ase.data import chemical_symbols as _symbols
from fairchem.core.modules.scaling.util import ensure_fitted
from torch import Tensor, nn

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.features import Captured, FeatureExtractor, architecture_of, energy_name_of
from fairchem_kd.features.architecture import draws_numbers
from fairchem_kd.models.build import _unfitted, build_model, check_finite, read_units
from fairchem_kd.models.elements import known_elements
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.legacy import modern_config, predicts_relaxed_energy
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state, same_draws
from fairchem_kd.stock.gradient_forces import has_gradient_forces
from fairchem_kd.stock.neighbours import refuse_isolated

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass
class TeacherOutput:
    """What one forward gave: detached, and still normalised as the teacher was trained."""

    #: by output, ``(B, C)`` of systems or ``(N, C)`` of atoms: C 1 of an energy, 3 of forces; none
    #: where none was asked for
    raw: dict[str, Tensor]
    features: Captured | None  #: those requested; None where no extractor was given


class Teacher:
    """A frozen model in eval mode, its normalisers and references, and what it was trained on.

    Not a module, so that holding one never puts its weights into a state_dict; never trained, and
    never wrapped in DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        outputs: Mapping[str, Mapping[str, Any]],
        *,
        elements: Iterable[int] | None = None,
        name: str = "the teacher",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: loaded and on its device; it is frozen here.
            units: its normalisers and element references, on the same device.
            outputs: the ``outputs`` block of its config.
            elements: atomic numbers of its training data; None where that is not known.
            name: what errors call it.
            config: the ``model`` block of its config, as far as it is known.
        """
        self.model = model.eval().requires_grad_(False)
        self.units = units
        self.name = name
        self.config = dict(config or {})
        self.elements = None if elements is None else frozenset(elements)
        forces = getattr(model, "regress_forces", True) or has_gradient_forces(model)
        self.outputs = {k: v for k, v in given_outputs(outputs) if forces or k != "forces"}
        #: the output that its ``atom_energy`` is of; None where it has none, or several may be
        self.energy_name = energy_name_of(model)
        self._embedded = _embedded_elements(model)
        self.draws = draws_numbers(model)
        known = set(range(1, self._embedded + 1))
        if self.elements is not None:
            known &= self.elements
        self._known = torch.tensor([z in known for z in range(len(_symbols) + 1)])

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        trust: bool = False,
        elements: Iterable[str | int] | None = None,
        device: torch.device | str = "cpu",
        where: str = "task.distillation.teacher.checkpoint",
    ) -> Teacher:
        """The teacher in the checkpoint at ``path``, of fairchem 1.x or of OCP before it.

        Args:
            path: a training checkpoint (its EMA weights are taken where it has any), a
                best_checkpoint.pt, or an exported file.
            trust: unpickle a file that holds more than tensors and plain values.
            elements: what it was trained on, where no card ``NAME.json`` beside the file says.
            device: where it will run.
            where: the config's key, for errors.

        Raises:
            UserError: the file cannot be read, does not fit its own config, or has unfitted scale
                factors.
        """
        path = Path(path)
        try:
            checkpoint = read_checkpoint(path, trust=trust)
            known = known_elements(path, elements)
            with isolated_random_state():
                teacher = _build(cls, checkpoint, known, str(path), torch.device(device))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if known is None:
            logging.warning(
                f"It is not known which elements the teacher {path} was trained on: no card "
                f"{path.with_suffix('.json')} and no task.distillation.teacher.elements say so, "
                "so structures with other elements cannot be refused."
            )
        return teacher

    def require_outputs(self, names: Iterable[str]) -> None:
        """Make sure that the teacher gives all of ``names``.

        Raises:
            UserError: naming the first that it does not give.
        """
        for name in names:
            if name not in self.outputs:
                raise UserError(
                    f"{self.name} does not predict '{name}'{did_you_mean(name, self.outputs)} (it "
                    f"predicts {', '.join(self.outputs) or 'nothing'}); "
                    "take a teacher that does, or a loss that does not need it."
                )

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse atoms that the teacher knows nothing about.

        One look-up per atom. On a GPU the answer has to be waited for: check batches on the CPU,
        where they come from.

        Args:
            atomic_numbers: ``(N,)``, of any type.

        Raises:
            UserError: naming the elements.
        """
        known = self._known
        if known.device != atomic_numbers.device:
            known = self._known = known.to(atomic_numbers.device)
        numbers = atomic_numbers.long()
        inside = numbers.clamp(0, len(known) - 1)
        unknown = ~known[inside] | (inside != numbers)
        if not bool(unknown.any()):
            return
        strange = sorted(set(numbers[unknown].tolist()))
        shown = ", ".join(_symbols[z] if 0 < z < len(_symbols) else f"Z={z}" for z in strange)
        if self.elements is not None and all(1 <= z <= self._embedded for z in strange):
            trained = " ".join(_symbols[z] for z in sorted(self.elements))
            reason = f"it was trained on {trained} (its card, or teacher.elements)"
        else:
            reason = f"its embedding table has the elements 1 to {self._embedded}"
        raise UserError(
            f"The data holds {shown}, which {self.name} does not know: {reason}; take structures "
            "without these elements, or a teacher that was trained on them."
        )

    @torch.no_grad()
    def forward(
        self,
        batch: Batch,
        extractor: FeatureExtractor | None = None,
        *,
        outputs: bool = True,
    ) -> TeacherOutput:
        """Outputs and, with an extractor made for ``self.model``, features of one batch.

        The batch is left as it was, and so are the global generators: a model that draws random
        numbers draws the same ones for every batch, so that its answers are a function of that.
        Forces that the teacher makes by autograd are made so here:
        fairchem's models switch gradients on for their own forward.

        Args:
            outputs: whether outputs are wanted too; without them the forward ends with the last
                feature.
        """
        if self.model.training:
            self.model.eval()
        view = copy.copy(batch)  # models set keys (pbc) and ask for gradients with respect to pos
        view.pos = batch.pos.detach().clone()
        drawing = same_draws(batch.pos.device) if self.draws else nullcontext()
        try:
            if extractor is None:
                with drawing:
                    return TeacherOutput(self._outputs(self.model(view), batch), None)
            out: Mapping[str, Any] = {}
            with drawing, extractor.capture(detach=True, stop=not outputs) as features:
                out = self.model(view)
        except Exception:
            refuse_isolated(batch, self.model)
            raise
        return TeacherOutput(self._outputs(out, batch) if outputs else {}, features)

    def _outputs(self, out: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        shaped = shaped_outputs(out, self.outputs, batch, self.name)
        return {name: value.detach() for name, value in shaped.items()}

    def denormalized(self, output: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        """The outputs in physical units: energies ``(B,)`` in eV, forces ``(N, 3)`` in eV/Å."""
        physical = {
            name: self.units.physical(name, value, batch) for name, value in output.raw.items()
        }
        return {k: v.squeeze(1) if v.shape[1] == 1 else v for k, v in physical.items()}


def _build(
    cls: type[Teacher],
    checkpoint: dict[str, Any],
    elements: frozenset[int] | None,
    name: str,
    device: torch.device,
) -> Teacher:
    model = build_model(checkpoint, name).to(device)
    check_finite(model, name)
    config = modern_config(checkpoint["config"])
    try:
        ensure_fitted(model)
    except ValueError as error:
        raise UserError(_unfitted(config, name, str(error))) from error
    if predicts_relaxed_energy(config):
        logging.warning(
            f"The teacher {name} was trained on energies of relaxed structures (IS2RE): as a "
            "target, its energy fits a student of the same task only. Its features fit any."
        )
    return cls(
        model,
        Units(*read_units(checkpoint, device)),
        config["outputs"],
        elements=elements,
        name=name,
        config=config.get("model"),
    )


def given_outputs(
    outputs: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The outputs that a model gives itself: of one put together of its irreps, these."""
    for name, config in outputs.items():
        parts = config.get("decomposition")
        if not parts:
            yield name, config
            continue
        for part, own in parts.items():
            yield part, {"level": config.get("level", "system"), **own}


def shaped_outputs(
    out: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], batch: Batch, name: str
) -> dict[str, Tensor]:
    """What a model's forward gave, shaped as fairchem's trainer shapes it: rows by level.

    Args:
        out: of the forward; of a hydra by head and then by property.
        outputs: the ``outputs`` block of its config.
        batch: of B structures and N atoms.
        name: what errors call the model.

    Returns:
        ``(B, C)`` of structures and ``(N, C)`` of atoms, by output.

    Raises:
        UserError: an output is not there.
    """
    systems, atoms = batch.natoms.numel(), batch.pos.shape[0]
    shaped = {}
    for key, config in outputs.items():
        value = out.get(key)
        if isinstance(value, Mapping):  # a hydra model: head, then property
            value = value.get(config.get("property"))
        if value is None:
            raise UserError(
                f"{name} says that it predicts '{key}', but its model gives "
                f"{_given(out)}: outputs.{key}.property in its config has to name what its "
                "head gives."
            )
        rows = atoms if config.get("level", "system") == "atom" else systems
        shaped[key] = value.view(rows, -1)
    return shaped


def _given(out: Mapping[str, Any]) -> str:
    """What a model's forward gave, in words: ``energy, dipole.energy``."""
    words = []
    for name, value in out.items():
        inner = list(value) if isinstance(value, Mapping) else []
        words += [f"{name}.{key}" for key in inner] if inner else [str(name)]
    return ", ".join(words) or "nothing"


def _embedded_elements(model: nn.Module) -> int:
    """Atomic numbers 1 to this one have a row in the model's embedding table."""
    try:
        return architecture_of(model).num_elements
    except UserError:  # no features of it are known; a row more or less is the model's own matter
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        return min(len(_symbols) - 1, max(tables, default=len(_symbols)) - 1)
