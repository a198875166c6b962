"""How much of the gap between student and teacher distillation closed, and how sure that is.

    gap closed = (MAE_student - MAE_distilled) / (MAE_student - MAE_teacher)

per target, on one held-out set (arXiv 2306.14818). Two kinds of intervals, both of 95 %:

- *over systems*: a paired bootstrap. The systems are drawn anew, with replacement, and all models
  are judged on the same draw. Frames of one trajectory (one ``sid``) are drawn together, since
  they are not independent. It says how far the result holds for other structures, for the seeds
  that were trained; one seed is enough for it.
- *over seeds*: Student's t. It says how far the result holds for other seeds, and needs two.

The verdict is about the difference of student and distilled student, and asks both intervals. Of
fewer than five groups of systems it is no evidence, whatever they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[Any]

LEVEL = 0.95
FEWEST = 5  #: independent groups of systems; of fewer a bootstrap's interval is no evidence
RESAMPLES = 2000
BETTER, WORSE, NO_EVIDENCE = "better", "worse", "no evidence"
TARGETS = {"energy_mae": "energy", "forces_mae": "forces"}


class Interval(NamedTuple):
    low: float
    high: float


class Errors(NamedTuple):
    """One model's absolute errors on a target: each system's sum ``(S,)``, of how many ``(S,)``."""

    total: Array
    size: Array

    @property
    def mae(self) -> float:
        return float(self.total.sum() / self.size.sum())


@dataclass(frozen=True)
class Gap:
    """The gap closed on one target, in the target's units (eV, eV/Å) but for ``closed``.

    ``student``, ``distilled``: MAE, the mean over seeds. ``teacher`` and all that needs one is None
    without a teacher. ``closed`` is None where it is not defined, and ``undefined`` then says why.
    ``gain`` is ``student - distilled``: positive where distillation helped.
    """

    target: str
    student: float
    distilled: float
    teacher: float | None
    closed: float | None
    closed_over_systems: Interval | None
    closed_over_seeds: Interval | None
    gain: float
    gain_over_systems: Interval | None
    gain_over_seeds: Interval | None
    seeds: tuple[int, int]  #: of the student, of the distilled student
    paired: bool
    verdict: str
    undefined: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gap_closed(student: float, distilled: float, teacher: float) -> float | None:
    """The share of the gap that is closed; None where the teacher is not better than the student.

    Args:
        student: error of the student without distillation.
        distilled: error of the same student with it.
        teacher: error of the teacher.
    """
    gap = student - teacher
    return (student - distilled) / gap if gap > 0 else None


def target_errors(systems: Mapping[str, Array], target: str) -> Errors:
    """The errors on ``energy_mae`` or ``forces_mae`` out of an Evaluation's ``systems``."""
    if target == "energy_mae":
        total = np.abs(systems["energy_error"]).astype(float)
        return Errors(total, np.ones_like(total))
    return Errors(systems["forces_abs_error"].astype(float), 3.0 * systems["counted_atoms"])


def measure_gap(
    target: str,
    student: Sequence[Errors],
    distilled: Sequence[Errors],
    teacher: Errors | None = None,
    *,
    groups: Array | None = None,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Gap:
    """The gap closed on one target, with intervals and a verdict.

    Args:
        target: its name, for the result.
        student: errors of each seed of the student, all on the same systems.
        distilled: the same for the distilled student.
        teacher: the same for the teacher.
        groups: ``(S,)``; systems of one value are drawn together. By default each is on its own.
        paired: the two lists go by the same seeds in the same order.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    s, d = (np.array([one.mae for one in many]) for many in (student, distilled))
    t = None if teacher is None else teacher.mae
    closed = None if t is None else gap_closed(s.mean(), d.mean(), t)
    paired = paired and len(s) == len(d)

    enough = count_groups(len(student[0].total), groups) >= FEWEST
    draws = resampled_maes(
        [_mean(student), _mean(distilled), *([] if teacher is None else [teacher])],
        groups,
        resamples,
        seed,
    )
    gain_over_systems = closed_over_systems = None
    if draws is not None:
        gains = draws[:, 0] - draws[:, 1]
        gain_over_systems = percentiles(gains)
        if closed is not None:
            gaps = draws[:, 0] - draws[:, 2]
            if (gaps > 0).mean() > LEVEL:  # else the ratio has no interval worth the name
                closed_over_systems = percentiles(gains[gaps > 0] / gaps[gaps > 0])
    gain_over_seeds = t_interval(s, d, paired)
    closed_over_seeds = None
    if closed is not None and t is not None and paired and bool((s > t).all()):
        shares = (s - d) / (s - t)
        closed_over_seeds = t_interval(shares, np.zeros_like(shares), paired=True)
    undefined = ""
    if t is None:
        undefined = "no teacher"
    elif closed is None:
        undefined = "the teacher is not better than the student"
    return Gap(
        target,
        float(s.mean()),
        float(d.mean()),
        t,
        closed,
        closed_over_systems,
        closed_over_seeds,
        float(s.mean() - d.mean()),
        gain_over_systems,
        gain_over_seeds,
        (len(s), len(d)),
        paired,
        verdict(gain_over_systems, gain_over_seeds) if enough else NO_EVIDENCE,
        undefined,
    )


def count_groups(systems: int, groups: Array | None) -> int:
    """How many systems, or groups of them that are drawn together, are independent."""
    return systems if groups is None else len(np.unique(np.asarray(groups)))


def verdict(*gains: Interval | None) -> str:
    """What intervals of the gain say together: all that there are must lie on one side of 0."""
    known = [gain for gain in gains if gain is not None]
    if known and all(gain.low > 0 for gain in known):
        return BETTER
    if known and all(gain.high < 0 for gain in known):
        return WORSE
    return NO_EVIDENCE


def resampled_maes(
    errors: Sequence[Errors], groups: Array | None, resamples: int = RESAMPLES, seed: int = 0
) -> Array | None:
    """MAEs of several models on redrawn sets of systems, the same draws for all.

    Returns:
        ``(resamples, models)``; None where there are not two groups to draw from.
    """
    systems = len(errors[0].total)
    labels = np.arange(systems) if groups is None else np.asarray(groups)
    _, group = np.unique(labels, return_inverse=True)
    number = int(group.max()) + 1 if systems else 0
    if number < 2:
        return None
    totals = np.stack([np.bincount(group, e.total, number) for e in errors], axis=1)
    counts = np.stack([np.bincount(group, e.size, number) for e in errors], axis=1)
    chance = np.random.default_rng(seed)
    maes = []
    block = max(1, 10_000_000 // number)  # draws at a time, to bound the memory
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = chance.multinomial(number, np.full(number, 1.0 / number), size=size)
        with np.errstate(invalid="ignore"):  # a draw without any counted atom
            maes.append((drawn @ totals) / (drawn @ counts))
    return np.concatenate(maes)


def percentiles(values: Array) -> Interval:
    """The central :data:`LEVEL` of ``values``."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def t_interval(first: Array, second: Array, paired: bool) -> Interval | None:
    """Student's interval of ``mean(first) - mean(second)``; None for fewer than two values of each.

    Paired, or else Welch's, which lets the two have variances and lengths of their own.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        return None
    centre = float(first.mean() - second.mean())
    if paired:
        variance, freedom = float(np.var(first - second, ddof=1)) / n, float(n - 1)
    else:
        a, b = float(np.var(first, ddof=1)) / n, float(np.var(second, ddof=1)) / m
        variance = a + b
        denominator = a**2 / (n - 1) + b**2 / (m - 1)
        freedom = variance**2 / denominator if denominator > 0 else float(n + m - 2)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(variance)
    return Interval(centre - half, centre + half)


def _mean(errors: Sequence[Errors]) -> Errors:
    """Seeds of one model as one: on the same systems, means of errors are errors of the mean."""
    return Errors(np.mean([e.total for e in errors], axis=0), errors[0].size)
