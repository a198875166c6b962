"""The figures of one model as a potential over all structures, with what they are uncertain by.

Two things are kept apart: other structures (95 % intervals by a bootstrap over structures, of
shares Wilson's, which know that five of five is not certainty) and other seeds of the training (the
standard deviation over them). Of several seeds the mean is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairchem_kd.analysis.compare.gap import Interval, percentiles
from fairchem_kd.analysis.physics.dynamics import Dynamics
from fairchem_kd.analysis.physics.measure import Consistency, Relaxation, Scan

Array = NDArray[np.float64]

RESAMPLES = 2000


@dataclass
class Findings:
    """What one checkpoint, or the labels' method, did: structure by structure."""

    dynamics: list[Dynamics] = field(default_factory=list)
    relaxations: list[Relaxation] = field(default_factory=list)
    consistency: list[Consistency] = field(default_factory=list)
    scans: list[Scan | None] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "dynamics": [one.as_dict() for one in self.dynamics],
            "relaxations": [one.as_dict() for one in self.relaxations],
            "forces": [one.as_dict() for one in self.consistency],
            "scans": [one and one.as_dict() for one in self.scans],
        }


@dataclass(frozen=True)
class Measured:
    """A figure: the mean over seeds; over what it may vary is None where there is but one of it."""

    value: float
    over_structures: Interval | None  #: 95 %
    over_seeds: float | None  #: standard deviation

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _mean(values: Array) -> Array:
    return np.nanmean(values, axis=-1)


def _median(values: Array) -> Array:
    return np.nanmedian(values, axis=-1)


def _root_of_ratio(values: Array) -> Array:
    """Of complex numbers: the root of the sum of real parts over that of imaginary ones."""
    total = np.nansum(values, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(total.real / total.imag)


Statistic = Callable[[Any], Array]

#: Figure -> how the values of structures ``(..., S)`` become one; shares are means of 0 and 1.
STATISTICS: dict[str, Statistic] = {
    "md_stable": _mean,
    "md_drift": _median,
    "md_fluctuation": _median,
    "relax_converged": _mean,
    "relax_steps": _mean,
    "relax_energy_above": _median,
    "relax_displacement": _median,
    "force_mismatch": _mean,
    "force_mismatch_relative": _root_of_ratio,
    "scan_error": _mean,
    "scan_mismatch": _mean,
    "scan_turns": _mean,
}
SHARES = ("md_stable", "relax_converged")


def values_of(one: Findings, method: Findings | None) -> dict[str, NDArray[Any]]:
    """Every figure's values by structure ``(S,)``, in eV, Å and ps; NaN where there is none.

    ``force_mismatch_relative`` is complex: its parts are the mean squares of which it is a ratio.
    """
    forces = [(np.array(c.forces), np.array(c.differences)) for c in one.consistency]
    scans = one.scans
    theirs = method.scans if method is not None else [None] * len(scans)
    pairs = zip(scans, theirs, strict=True)
    found: dict[str, Sequence[float | None]] = {
        "md_stable": [d.stable for d in one.dynamics],
        "md_drift": [None if d.drift is None else abs(d.drift) for d in one.dynamics],
        "md_fluctuation": [d.fluctuation for d in one.dynamics],
        "relax_converged": [r.converged for r in one.relaxations],
        "relax_steps": [r.steps for r in one.relaxations],
        "relax_energy_above": [r.energy_above for r in one.relaxations],
        "relax_displacement": [r.displacement for r in one.relaxations],
        "force_mismatch": [float(np.mean(np.abs(f - d))) if len(f) else None for f, d in forces],
        "scan_error": [ours.error(other) if ours and other else None for ours, other in pairs],
        "scan_mismatch": [scan.mismatch if scan else None for scan in scans],
        "scan_turns": [scan.turns if scan else None for scan in scans],
    }
    arrays: dict[str, NDArray[Any]] = {}
    for name, values in found.items():
        known = np.array([math.nan if v is None else v for v in values], dtype=float)
        arrays[name] = np.where(np.isfinite(known), known, math.nan)
    arrays["force_mismatch_relative"] = np.array(
        [
            complex(np.mean(np.square(f - d)), np.mean(np.square(d))) if len(f) else math.nan
            for f, d in forces
        ]
    )
    return arrays


def summarise(
    seeds: Sequence[Findings], method: Findings | None, *, resamples: int = RESAMPLES
) -> dict[str, Measured | None]:
    """Every figure of one model; None where no structure gave a value.

    Args:
        seeds: of each of its checkpoints, on the same structures.
        method: of the labels' method on them, where it is known.
        resamples: draws of the bootstrap, the same for every model.
    """
    by_seed = [values_of(one, method) for one in seeds]
    found: dict[str, Measured | None] = {}
    for name, statistic in STATISTICS.items():
        values = np.stack([own[name] for own in by_seed])  # (seeds, structures)
        with warnings.catch_warnings():  # of structures none of which gave a value
            warnings.simplefilter("ignore", RuntimeWarning)
            each = statistic(values)
            known = each[np.isfinite(each)]
            if not len(known):
                found[name] = None
                continue
            interval: Interval | None
            if name in SHARES:
                interval = wilson(float(known.mean()), values.shape[1])
            else:
                interval = _over_structures(values, statistic, resamples)
        spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
        found[name] = Measured(float(known.mean()), interval, spread)
    return found


def _over_structures(values: Array, statistic: Statistic, resamples: int) -> Interval | None:
    """Structures are drawn anew, the same ones for every seed."""
    number = values.shape[1]
    if np.isfinite(values).any(axis=0).sum() < 2:
        return None
    drawn = np.random.default_rng(0).integers(number, size=(resamples, number))
    draws = np.nanmean(statistic(values[:, drawn]), axis=0)
    return percentiles(draws[np.isfinite(draws)])


def wilson(share: float, number: int) -> Interval:
    """Wilson's 95 % interval of a share of so many structures."""
    z = 1.959964
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    root = math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    half = z / (1 + z**2 / number) * root
    return Interval(max(0.0, middle - half), min(1.0, middle + half))
