"""A model's errors on a split, by stock fairchem's own evaluation.

The stock trainer's ``validate`` runs, with the model's own normalisers and references and the stock
Evaluator; the Evaluator's arguments are noted on their way, so that every system's share of each
error is known as well, which is what a paired bootstrap needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairchem.core.common.utils import setup_imports
from fairchem.core.modules.evaluator import Evaluator
from fairchem.core.trainers import OCPTrainer
from numpy.typing import NDArray

from fairchem_kd.errors import UserError
from fairchem_kd.models.frozen import Teacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.analysis.subjects.splits import Split

Array = NDArray[Any]

#: Energies (eV) and force components (eV/Å) of a system all within these: fairchem's thresholds,
#: at which models of small size score 0, and looser ones.
WITHIN = {"efwt": (0.02, 0.03), "efwt_5x": (0.1, 0.15), "efwt_10x": (0.2, 0.3)}

_ENERGY = ["mae"]
_FORCES = ["mae", "cosine_similarity", "magnitude_error"]
PARITY_LIMIT = 20_000  #: force components that are kept for a parity plot


@dataclass
class Evaluation:
    """What :func:`evaluate` found.

    ``metrics``: ``energy_mae`` (eV), ``energy_mae_per_atom`` (eV per atom, fixed atoms counted),
    ``forces_mae`` (eV/Å), ``forces_cosine_similarity``, ``forces_magnitude_error`` (eV/Å) and the
    shares of :data:`WITHIN`. Those of forces are missing for a model without forces.

    ``systems``: arrays ``(S,)`` in the order of the data: ``sid``, ``fid``, ``natoms``,
    ``counted_atoms`` (whose forces count: the free ones, or all), ``energy_error`` (predicted minus
    label, eV), and sums over the counted atoms: ``forces_abs_error`` (over xyz too),
    ``forces_cosine``, ``forces_magnitude_error``; ``forces_max_error`` is their largest component.

    ``parity``: predictions and labels: ``energy`` and ``energy_label`` ``(S,)`` and, of about
    :data:`PARITY_LIMIT` components at most, ``forces`` and ``forces_label``.
    """

    metrics: dict[str, float]
    systems: dict[str, Array]
    parity: dict[str, Array]

    @property
    def has_forces(self) -> bool:
        return "forces_abs_error" in self.systems


def evaluate(
    model: Teacher,
    split: Split,
    *,
    batch_size: int = 32,
    free_atoms: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Run ``model`` over ``split`` in this process, on the device that the model is on.

    Args:
        model: as :func:`fairchem_kd.analysis.subjects.runs.load_model` gives it.
        split: with labels of energies and, if the model has forces, of forces.
        batch_size: structures at a time.
        free_atoms: count the forces on free atoms alone.
        progress: show a bar on a terminal.

    Raises:
        UserError: structures that the model cannot take, or labels that are missing.
    """
    setup_imports()
    trainer = _Evaluating(model, split, batch_size, free_atoms)
    found = trainer.validate(split="val", disable_tqdm=None if progress else True)
    systems = {name: np.concatenate(parts) for name, parts in trainer.systems.items()}
    parity = {name: np.concatenate(parts) for name, parts in trainer.parity.items()}
    if not systems.get("counted_atoms", np.ones(1)).any():
        raise UserError(
            f"No atom of the split {split.name} ({split.path}) is free, so that no force is "
            "compared: give --atoms all, or name another split."
        )
    metrics = {name: float(value["metric"]) for name, value in found.items() if name != "loss"}
    # Stock's own per-atom error divides by the free atoms alone, which is not what is meant by it.
    metrics["energy_mae_per_atom"] = float(
        np.mean(np.abs(systems["energy_error"]) / systems["natoms"])
    )
    if "forces_max_error" in systems:
        for name, thresholds in WITHIN.items():
            metrics[name] = within(systems, *thresholds)
    return Evaluation(metrics, systems, parity)


def within(systems: Mapping[str, Array], energy: float, forces: float) -> float:
    """The share of systems whose energy and every counted force component are within (EFwT)."""
    good = (np.abs(systems["energy_error"]) < energy) & (systems["forces_max_error"] < forces)
    return float(np.mean(good))


class _Noting(Evaluator):
    """The stock Evaluator, which keeps the last predictions and targets that it was given."""

    def __init__(self, stock: Evaluator) -> None:
        super().__init__(stock.task, stock.target_metrics)
        self.prediction: dict[str, torch.Tensor] = {}
        self.target: dict[str, torch.Tensor] = {}

    def eval(self, prediction: Any, target: Any, prev_metrics: Any = None) -> Any:
        self.prediction, self.target = prediction, target
        return super().eval(prediction, target, prev_metrics)


class _Evaluating(OCPTrainer):
    """A stock trainer that only validates: a model that is there already, on data that is open."""

    output_targets: dict[str, Any]

    def __init__(self, model: Teacher, split: Split, batch_size: int, free_atoms: bool) -> None:
        self._given = model
        self._free_atoms = free_atoms
        self.systems: dict[str, list[Array]] = {}
        self.parity: dict[str, list[Array]] = {}
        labelled = split.dataset[0]
        outputs = {"energy": {**model.outputs.get("energy", {}), "level": "system"}}
        metrics: dict[str, list[str]] = {"energy": _ENERGY}
        if "energy" not in model.outputs:
            raise UserError(f"{model.name} predicts no energies, so it cannot be compared.")
        if "forces" in model.outputs:
            if getattr(labelled, "forces", None) is None:
                raise UserError(
                    f"The split {split.name} ({split.path}) has no forces, but {model.name} "
                    "predicts them; name one with both."
                )
            metrics["forces"] = _FORCES
            outputs["forces"] = {
                **model.outputs["forces"],
                "level": "atom",
                "train_on_free_atoms": free_atoms,
                "eval_on_free_atoms": free_atoms,
            }
        if getattr(labelled, "fixed", None) is None:
            raise UserError(
                f"The split {split.name} ({split.path}) does not say which atoms are fixed (key "
                "'fixed'), which fairchem's evaluation needs."
            )
        device = next(model.model.parameters()).device
        super().__init__(
            task={},
            model={"name": type(model.model).__name__},
            outputs=outputs,
            dataset={},
            optimizer={},
            # not used, but without one the config counts as an old one
            loss_functions=[{"energy": {"fn": "mae", "coefficient": 1}}],
            evaluation_metrics={"metrics": metrics},
            identifier="evaluate",
            local_rank=device.index or 0,
            is_debug=True,  # no folders
            cpu=device.type == "cpu",
            inference_only=True,
        )
        self.normalizers.update(model.units.normalizers)
        self.elementrefs.update(model.units.elementrefs)
        self.val_loader = split.loader(batch_size)
        total = batch_size * len(self.val_loader)
        self._parity_share = min(1.0, PARITY_LIMIT / (3 * 20 * total))
        self._chance = np.random.default_rng(0)  # the same components for every model

    def load_model(self) -> None:
        self.model = self._given.model

    def _forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self._given.check_elements(batch.atomic_numbers)
        return super()._forward(batch)

    def _compute_loss(self, out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return torch.zeros(())

    def _compute_metrics(self, out: Any, batch: Batch, evaluator: Any, metrics: Any = None) -> Any:
        noting = _Noting(evaluator)
        outputs = self.output_targets
        if self._free_atoms and "forces" in outputs and bool((batch.fixed != 0).all()):
            # stock cannot count the forces of no atom; the energies count as ever
            noting.target_metrics = {"energy": _ENERGY}
            self.output_targets = {"energy": outputs["energy"]}
        try:
            metrics = super()._compute_metrics(out, batch, noting, metrics)
        finally:
            self.output_targets = outputs
        self._note(batch, noting.prediction, noting.target)
        return metrics

    def _note(self, batch: Batch, prediction: Any, target: Any) -> None:
        """Each system's share of the errors, from what the Evaluator was given."""
        natoms = batch.natoms.cpu().numpy()
        count = len(natoms)
        energy, label = (x["energy"].view(-1).double().cpu().numpy() for x in (prediction, target))
        found = {
            "sid": self._identifiers(batch, "sid"),
            "fid": self._identifiers(batch, "fid"),
            "natoms": natoms,
            "energy_error": energy - label,
        }
        parity = {"energy": energy, "energy_label": label}
        if "forces" in self.output_targets:
            counted = natoms
            if self._free_atoms:
                counted = target["natoms"].cpu().numpy()
            found["counted_atoms"] = counted
            rows = slice(None) if counted.any() else slice(0)  # of none that is free
            forces, labels = (x["forces"][rows].float() for x in (prediction, target))
            error = (forces - labels).abs()
            cosine = torch.cosine_similarity(forces, labels)
            magnitude = (forces.norm(dim=-1) - labels.norm(dim=-1)).abs()
            system = np.repeat(np.arange(count), counted)

            def summed(values: torch.Tensor) -> Array:
                weights = values.double().cpu().numpy()
                return np.bincount(system, weights=weights, minlength=count)

            largest = np.zeros(count)
            np.maximum.at(largest, system, error.amax(dim=-1).double().cpu().numpy())
            found["forces_abs_error"] = summed(error.sum(dim=-1))
            found["forces_cosine"] = summed(cosine)
            found["forces_magnitude_error"] = summed(magnitude)
            found["forces_max_error"] = largest
            kept = self._chance.random(forces.numel()) < self._parity_share
            parity["forces"] = forces.view(-1).cpu().numpy()[kept]
            parity["forces_label"] = labels.view(-1).cpu().numpy()[kept]
        for store, values in ((self.systems, found), (self.parity, parity)):
            for name, value in values.items():
                store.setdefault(name, []).append(np.asarray(value))

    def _identifiers(self, batch: Batch, key: str) -> Array:
        """``sid`` or ``fid`` of every system; where there is none, the systems are numbered."""
        values = getattr(batch, key, None)
        if values is None:
            seen = sum(len(part) for part in self.systems.get(key, []))
            return seen + np.arange(batch.natoms.numel())
        if isinstance(values, torch.Tensor):
            return values.view(-1).cpu().numpy()
        return np.asarray([str(value) for value in values])
