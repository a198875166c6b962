"""How far the members of an ensemble are apart, and what follows from it for a structure.

The spread of an ensemble tells where it errs, and by how much only up to a factor: members that
were trained alike err alike. So the factor is fitted to labels before the first step,

    spread(b) = ratio * std over members,   ratio = rms(mean - label) / rms(std over members),

and from then on a structure ``b`` of an output weighs ``(s^2 + m^2) / (s^2 + spread(b)^2)`` in the
losses on that output, with ``s`` a floor and ``m`` the rms of the spreads of the labelled
structures, so that such a structure weighs about 1; or does not count at all past a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairchem_kd.distillation.agreement import Shift, composition, evenly
from fairchem_kd.distillation.members import Seen, check_forces, check_zeros
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.losses import Part
from fairchem_kd.schema import option
from fairchem_kd.teachers.ensemble import EnsembleTeacher
from fairchem_kd.training.ranks import rank, refused_by_all, same_on_ranks

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.features import Request
    from fairchem_kd.teachers import Taught

WHERE = "task.distillation.teacher.ensemble"
#: In logs and records: the mean spread of an output, and the share of structures past a limit.
SPREAD, MASKED = "spread", "masked"
_BATCH = 16
_TELLING = 0.1  # rank correlation of spreads and errors below which spreads tell nothing,
_SURE = 32  # of so many structures
_FEW = 8  # labelled structures from which a ratio can be told
_UNITS = {"energy": "eV", "forces": "eV/Å"}


@dataclass
class EnsembleOptions:
    """Several teachers (``teacher.checkpoint`` is a list): what their spread is used for."""

    features: str | None = option(
        None, help="the checkpoint whose features and energies of atoms count; default: the first"
    )
    weights: bool = option(
        False, help="losses on outputs weigh a structure by 1/(floor² + spread²), about 1 if usual"
    )
    floor: dict[str, float] | None = option(
        None, help="of weights, by output (eV, eV/Å); default: the spread of labelled structures"
    )
    limit: dict[str, float] | None = option(
        None, help="by output (eV, eV/Å): structures whose spread exceeds it do not count"
    )
    calibrate: bool = option(
        True, help="multiply spreads by the ratio of errors to spreads on labelled structures"
    )
    samples: int = option(256, ge=_FEW, help="labelled structures for that, evenly spread")

    def check(self, where: str) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: there are such.
        """
        for key in ("floor", "limit"):
            for name, value in (getattr(self, key) or {}).items():
                if value <= 0:
                    raise UserError(f"{where}.{key}.{name} must be greater than 0, not {value:g}.")
        if self.floor and not self.weights:
            raise UserError(
                f"{where}.floor belongs to the weights, which are off: set {where}.weights: true, "
                "or take floor out."
            )


class Spreads:
    """The spreads of one ensemble, calibrated, and what structures count by them.

    Args:
        options: what the config gave.
        compared: the outputs that losses compare.
        given: all outputs of the ensemble.

    Raises:
        UserError: the options name an output that is not there, or one that no loss compares.
    """

    def __init__(
        self, options: EnsembleOptions, compared: Sequence[str], given: Iterable[str]
    ) -> None:
        self.options = options
        self.compared = list(compared)
        given = list(given)
        for key, known, why in (
            ("limit", given, "which no member predicts"),
            ("floor", self.compared, "which no loss compares"),
        ):
            for name in getattr(options, key) or {}:
                if name not in known:
                    raise UserError(
                        f"{WHERE}.{key} has '{name}', {why}{did_you_mean(name, known)}: take it "
                        "out."
                    )
        if options.weights and not self.compared:
            raise UserError(
                f"{WHERE}.weights is of losses on outputs, and there is none: add vanilla or "
                "per_atom_energy, or set weights to false."
            )
        #: by output, that are compared or limited
        self.ratios = dict.fromkeys(dict.fromkeys([*compared, *(options.limit or {})]), 1.0)
        self.usual: dict[str, float] = {}  # rms of the calibrated spreads of labelled structures

    # -- calibration ------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self,
        teacher: EnsembleTeacher,
        requests: Sequence[Request],
        dataset: Any,
        collate: Callable[[list[Any]], Batch],
        device: torch.device,
        shifted: Shift | None = None,
    ) -> None:
        """Find ratios and usual spreads on labelled structures; the log says what they are.

        Args:
            teacher: the ensemble, on the device.
            requests: the features that are asked for too, which a store has.
            dataset: with labels, as far as there are any.
            collate: makes a batch of samples.
            shifted: what answers are changed by before they are compared with labels.

        Raises:
            UserError: members differ by the zero of their energies, by the unit of their forces,
                or never at all.
        """
        chosen = evenly(len(dataset), self.options.samples)
        seen = Seen()
        for start in range(0, len(chosen), _BATCH):
            samples = [dataset[i] for i in chosen[start : start + _BATCH]]
            batch = collate(samples).to(device)
            seen.add(teacher, requests, batch, self.ratios, shifted)
            seen.compositions += [composition(sample) for sample in samples]
        if "forces" in self.ratios:
            check_forces(teacher, seen)
        if "energy" in self.ratios:
            check_zeros(teacher, seen)
        for name in self.ratios:
            self._fit_output(name, *seen.of(name))

    def fit_on_first(self, *arguments: Any) -> None:
        """`fit` on the first rank, for all; a collective.

        Raises:
            UserError: on every rank, what `fit` refuses.
        """
        with refused_by_all():
            if rank() == 0:
                self.fit(*arguments)
        self.load_state_dict(same_on_ranks(self.state_dict()))

    def _fit_output(self, name: str, spreads: np.ndarray, errors: np.ndarray) -> None:
        """Ratio and usual spread of one output.

        Args:
            spreads: ``(S,)``, NaN where the ensemble says nothing.
            errors: ``(S,)``, rms over the structure of mean - label, NaN where there is no label.
        """
        there = np.isfinite(spreads)
        unit = _UNITS.get(name, "in its own unit")
        if not (spreads[there] > 0).any():
            raise UserError(
                f"{WHERE}: the members say the same {name} of all of {there.sum()} structures of "
                "dataset.train, so that their spread tells nothing: take teachers that were "
                "trained apart, with other seeds or data."
            )
        both = there & np.isfinite(errors)
        told = f"spread {_rms(spreads[there]):.3g} {unit} (rms of {there.sum()} structures)"
        if not self.options.calibrate:
            told += ", not calibrated"
        elif both.sum() < _FEW:
            told += f", not calibrated: of {both.sum()} of them there is a label, {_FEW} are needed"
        else:
            self.ratios[name] = _rms(errors[both]) / _rms(spreads[both])
            used = self.options.weights or name in (self.options.limit or {})
            alike = _rank_correlation(spreads, errors)
            told += (
                f", error {_rms(errors[both]):.3g}: spreads count {self.ratios[name]:.3g} times; "
                f"rank correlation of spread and error {alike:.2f}"
            )
            if alike < _TELLING and both.sum() >= _SURE and used:
                logging.warning(
                    f"The spread of the ensemble's {name} does not tell where it errs (rank "
                    f"correlation {alike:.2f} on {both.sum()} labelled structures), so that {WHERE}"
                    ".weights and limit do nothing good by it: leave them out, or take teachers "
                    "that differ more."
                )
        self.usual[name] = self.ratios[name] * _rms(spreads[there])
        logging.info(f"The ensemble's {name}: {told}")

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"ratios": dict(self.ratios), "usual": dict(self.usual)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on with what was fitted; an output that is new has what was never fitted."""
        for name in self.ratios:
            self.ratios[name] = float(state["ratios"].get(name, 1.0))
        self.usual = {name: float(value) for name, value in state["usual"].items()}

    # -- of a batch -------------------------------------------------------------------------------

    def weigh(
        self, taught: Taught, counting: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor], dict[str, Part]]:
        """Which structures count, what they weigh by output, ``(B,)``, and what is noted of both.

        Args:
            taught: of a batch.
            counting: ``(B,)``, those that count otherwise; None: all.
        """
        if not self.ratios:
            return counting, {}, {}
        spreads = self.of(taught)
        noted = {}
        there = torch.ones_like(taught.natoms, dtype=torch.bool) if counting is None else counting
        for name, spread in spreads.items():
            total = torch.where(there, spread, 0.0).sum()
            noted[f"{SPREAD}_{name}"] = Part("", None, total, there.sum())
        within = self.counting(spreads)
        if within is not None:
            noted[MASKED] = Part("", None, (there & ~within).sum(), there.sum())
            counting = there & within
        return counting, self.weights(spreads), noted

    def of(self, taught: Taught) -> dict[str, Tensor]:
        """Calibrated spreads of the structures of a batch, ``(B,)`` by output."""
        return {name: ratio * taught.spread[name] for name, ratio in self.ratios.items()}

    def weights(self, spreads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By output that is compared, what each structure weighs, ``(B,)``; empty: all the same."""
        if not self.options.weights:
            return {}
        found = {}
        for name in self.compared:
            usual = self.usual[name]
            floor = (self.options.floor or {}).get(name, usual)
            found[name] = (floor**2 + usual**2) / (floor**2 + spreads[name] ** 2)
        return found

    def counting(self, spreads: Mapping[str, Tensor]) -> Tensor | None:
        """``(B,)``, false for structures past a limit; None where there is no limit."""
        counting = None
        for name, limit in (self.options.limit or {}).items():
            within = spreads[name] <= limit
            counting = within if counting is None else counting & within
        return counting


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _rank_correlation(spreads: np.ndarray, errors: np.ndarray) -> float:
    """Spearman's, of the structures with both; 0 where one of them never changes."""
    both = np.isfinite(spreads) & np.isfinite(errors)
    ranks = [np.argsort(np.argsort(values[both])) for values in (spreads, errors)]
    if any(np.ptp(values[both]) == 0 for values in (spreads, errors)):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
