"""Random search: samplers give numbers in [0, 1), distributions make values of them.

A value depends on the sweep's seed, the key and the sample's number alone, so that more samples, or
more keys, leave the points that exist as they are. (Under ``sobol`` more keys change all points.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.schema import option, parse

SAMPLERS = ("random", "sobol")


MOST_POINTS = 100_000  #: of a sweep: more are a slip, and fill the memory before anything runs


@dataclass
class Uniform:
    """Between ``low`` and ``high``, evenly."""

    low: float = option(help="smallest value")
    high: float = option(help="largest value")

    def __call__(self, u: float) -> Any:
        return _rounded(self.low + u * (self.high - self.low))


@dataclass
class LogUniform(Uniform):
    """Between ``low`` and ``high``, evenly in their logarithm."""

    low: float = option(gt=0, help="smallest value")

    def __call__(self, u: float) -> Any:
        return _rounded(self.low * (self.high / self.low) ** u)


@dataclass
class Integer:
    """A whole number from ``low`` to ``high``, both included."""

    low: int = option(help="smallest value")
    high: int = option(help="largest value")

    def __call__(self, u: float) -> Any:
        return self.low + min(math.floor(u * (self.high - self.low + 1)), self.high - self.low)


@dataclass
class Choice:
    """One of ``values``, each as likely."""

    values: list[Any] = option(help="the values")

    def __call__(self, u: float) -> Any:
        return self.values[min(math.floor(u * len(self.values)), len(self.values) - 1)]


DISTRIBUTIONS: dict[str, type] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "integer": Integer,
    "choice": Choice,
}


@dataclass
class RandomSearch:
    """The block ``random`` of a sweep."""

    samples: int = option(ge=1, le=MOST_POINTS, help="how many points")
    keys: dict[str, Any] = option(help="a distribution, or a list to choose from, for each key")
    sampler: str = option("random", choices=SAMPLERS, help="independent, or evenly spread (sobol)")
    seed: int = option(0, ge=0, help="of the sampler; not of the trainings")


def distribution(given: Any, where: str) -> Any:
    """The distribution that ``given`` (a list of choices, or a mapping) describes.

    Raises:
        UserError: an unknown distribution, or bounds that do not fit.
    """
    if isinstance(given, list):
        given = {"distribution": "choice", "values": given}
    options = dict(given)
    name = options.pop("distribution")
    if name not in DISTRIBUTIONS:
        hint = did_you_mean(str(name), DISTRIBUTIONS)
        raise UserError(f"{where}.distribution cannot be {name!r}{hint}.")
    made: Any = parse(DISTRIBUTIONS[name], options, where)
    if isinstance(made, Choice):
        if not made.values:
            raise UserError(f"{where} has no values to choose from; give some.")
    elif not made.low < made.high:
        raise UserError(f"{where}.low must be less than high, not {made.low:g} and {made.high:g}.")
    return made


def draw(search: RandomSearch, distributions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``search.samples`` points, each a value for every key."""
    keys = list(distributions)
    numbers = _SAMPLERS[search.sampler](search, keys)  # (samples, keys)
    return [
        {key: distributions[key](float(u)) for key, u in zip(keys, row, strict=True)}
        for row in numbers
    ]


def _independent(search: RandomSearch, keys: list[str]) -> np.ndarray:
    columns = []
    for key in keys:
        digest = hashlib.sha256(f"{search.seed} {key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        columns.append(generator.random(search.samples))
    return np.stack(columns, axis=1)


def _sobol(search: RandomSearch, keys: list[str]) -> np.ndarray:
    import torch

    engine = torch.quasirandom.SobolEngine(len(keys), scramble=True, seed=search.seed)
    return engine.draw(search.samples, dtype=torch.float64).numpy()


_SAMPLERS = {"random": _independent, "sobol": _sobol}


def _rounded(value: float) -> float:
    """Four significant digits: enough for a search, and readable in a table."""
    return float(f"{value:.4g}")
