"""How similar two representations of the same atoms are: linear CKA, unbiased, in one pass.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of features X ``(N, D)`` and Y ``(N, E)`` is
``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with ``K = X X^T`` and ``L = Y Y^T``. The plain
estimator of HSIC is biased: independent features of a small sample score well above 0. Here it is
the unbiased one (:mod:`fairchem_kd.losses.hsic`), in which no sample meets itself, out of sums over
samples. Added up batch by batch these give the value of the whole sample: it is no average of
values of batches, and does not depend on how the sample was cut.

Vectors ``(N, 3, D)`` are samples of three rows each, x, y and z. A shift of x, y and z would not
turn with the structure, so they are not centred (over orientations their mean is 0), and where no
sample meets itself, no atom does: ``HSIC = (|C|^2 - sum_i |X_i^T Y_i|^2) / (N(N-1))``, which stays
the same however each structure is turned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairchem_kd.losses.hsic import Sums, scalar_hsic, scalar_sums

Form = Literal["node", "vector"]
Key = Any  # hashable; of the user's own choosing

GROUPS = 8  #: parts of the sample that take turns in being left out, for the errors
MEMORY = 2**30  #: bytes of sums; where so many parts would need more, there are fewer of them


@dataclass(frozen=True)
class Estimate:
    """A value, and what it would be without each part of the sample.

    ``value`` is NaN where it is undefined: a feature that does not vary, or too few atoms.
    """

    value: float
    without: NDArray[np.float64]  #: (G,), empty where there is but one part

    @property
    def error(self) -> float | None:
        """The standard error, by the delete-a-group jackknife; None where there is but one."""
        groups = len(self.without)
        if groups < 2:
            return None
        spread = np.square(self.without - self.without.mean()).sum()
        return float(np.sqrt((groups - 1) / groups * spread))

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval: Student's t for so many groups times the error."""
        from scipy.stats import t

        if self.error is None:
            return None
        return float(t.ppf(0.975, len(self.without) - 1)) * self.error

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two values of one sample: what their parts share does not count."""
        return Estimate(self.value - other.value, self.without - other.without)


class Similarity:
    """Linear CKA between features of the same atoms, for any number of pairs.

    Args:
        form: ``node``: features ``(N, D)``; ``vector``: ``(N, 3, D)``.
        pairs: the features, by keys of one's own, that are to be compared.
        groups: parts of the sample for the errors; 1 for none.
    """

    def __init__(
        self, form: Form, pairs: Iterable[tuple[Key, Key]], *, groups: int = GROUPS
    ) -> None:
        wanted = dict.fromkeys(pairs)
        keys = dict.fromkeys(key for pair in wanted for key in pair)
        self.form = form
        self.groups = groups
        self._sums: dict[tuple[Key, Key], dict[int, Sums]] = {
            pair: {} for pair in [*wanted, *((key, key) for key in keys)]
        }
        self._shifts: dict[Key, Tensor] = {}
        self._known: dict[tuple[Key, Key], NDArray[np.float64]] = {}

    @torch.no_grad()
    def update(self, features: Mapping[Key, Tensor], position: float = 0.0) -> None:
        """Take in one batch: the features of the same atoms under every key.

        Args:
            features: by key, ``(N, D)`` or ``(N, 3, D)``.
            position: where in the sample the batch stands, from 0 to 1: neighbours, which may well
                be frames of one trajectory, are left out together.
        """
        if not self._shifts:
            self._fit_groups(features)
        self._known.clear()
        values = {}
        for key in dict.fromkeys(key for pair in self._sums for key in pair):
            value = features[key].detach().double()
            if key not in self._shifts:
                # HSIC does not change with it, but what cancels in the sums becomes small
                shift = value.mean(0) if self.form == "node" and len(value) else value.new_zeros(())
                self._shifts[key] = shift
            values[key] = value - self._shifts[key]
        group = min(int(position * self.groups), self.groups - 1)
        count = scalar_sums if self.form == "node" else _vector_sums
        for (first, second), sums in self._sums.items():
            new = count(values[first], values[second])
            old = sums.get(group)
            sums[group] = new if old is None else {k: old[k] + new[k] for k in new}

    def _fit_groups(self, features: Mapping[Key, Tensor]) -> None:
        numbers = sum(features[a].shape[-1] * features[b].shape[-1] for a, b in self._sums)
        self.groups = max(1, min(self.groups, MEMORY // (8 * numbers)))

    def cka(self, first: Key, second: Key) -> Estimate:
        """The similarity of two features that were named as a pair."""
        both, *own = (self._hsic(pair) for pair in ((first, second), (first, first), (second,) * 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            values = both / np.sqrt(own[0] * own[1])
        values[(own[0] <= 0) | (own[1] <= 0)] = np.nan
        return Estimate(float(values[0]), values[1:])

    def _hsic(self, pair: tuple[Key, Key]) -> NDArray[np.float64]:
        """Of the whole sample and, where it has several parts, without each of them: ``(1 + G,)``.

        Kept until the next update, since every layer meets many others.
        """
        if pair not in self._known:
            parts = list(self._sums[pair].values())
            whole = {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
            samples = [whole]
            if len(parts) > 1:
                samples += [{key: whole[key] - part[key] for key in whole} for part in parts]
            value = scalar_hsic if self.form == "node" else _vector_hsic
            self._known[pair] = np.array([float(value(sums)) for sums in samples])
        return self._known[pair]


def _vector_sums(x: Tensor, y: Tensor) -> Sums:
    # |X_i^T Y_i|^2 = <X_i X_i^T, Y_i Y_i^T>: of matrices 3 x 3
    own = (x @ x.transpose(1, 2)) * (y @ y.transpose(1, 2))
    return {
        "count": own.new_tensor(len(own)),
        "C": x.reshape(-1, x.shape[2]).T @ y.reshape(-1, y.shape[2]),
        "own": own.sum(),
    }


def _vector_hsic(sums: Sums) -> Tensor:
    n = sums["count"]
    if n < 2:
        return n.new_tensor(float("nan"))
    return (sums["C"].square().sum() - sums["own"]) / (n * (n - 1))
