"""The YAML of a sweep, and the points that it spans.

Two forms. Stock fairchem's: a config whose leaves are lists of values, all combinations of which
are run. And ours, known by its keys, which says more::

    base: yaml_configs/kd/e2n.yml      # `fairchem --sweep-yml` takes its --config-yml instead
    seeds: [0, 1, 2]
    set: {optim.max_epochs: 7}         # for every point
    grid: {task.distillation.losses.e2n.coefficient: [1, 10, 100]}
    random: {samples: 20, keys: {optim.lr_initial: {distribution: loguniform, low: ..., high: ...}}}
    points: {plain: {task.distillation.losses: null}}

``grid``, ``random`` and ``points`` add up. Keys are dotted, nested or both.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.schema import is_null, option, parse
from fairchem_kd.sweep.sampling import MOST_POINTS, SAMPLERS, RandomSearch, distribution, draw


@dataclass
class _File:
    """Our form of the file."""

    base: str | None = option(None, help="the config that every point changes")
    seeds: list[int] | None = option(None, help="each point is run with each of them")
    set: dict[str, Any] | None = option(None, help="keys that are the same in every point")
    grid: dict[str, Any] | None = option(None, help="lists of values, all combinations")
    random: RandomSearch | None = option(None, help="values drawn from distributions")
    points: Any = option(None, help="single points, as a list or under names")


OWN_KEYS = tuple(_File.__dataclass_fields__)


@dataclass(frozen=True)
class Point:
    """What one point of a sweep sets: values by dotted key, and its name where it has one."""

    values: dict[str, Any]
    label: str = ""

    def __str__(self) -> str:
        told = ", ".join(f"{key}={value}" for key, value in self.values.items())
        return self.label or told or "the base config"


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read: ``points`` have the values of ``set`` in them; no seeds: None."""

    path: Path
    points: list[Point]
    base: Path | None = None
    seeds: list[int] | None = None


def read_sweep(path: str | Path, given_with: str = "") -> Sweep:
    """Read a sweep file of either form.

    Args:
        given_with: how the file was named, for the message where it is missing.

    Raises:
        UserError: the file is missing, not a mapping, or describes no point.
    """
    path = Path(path)
    contents = _read(path, given_with)
    if not isinstance(contents, Mapping) or not contents:
        raise UserError(
            f"{path}: the file must hold a list of values to try, or keys that do; an empty sweep "
            "has nothing to run."
        )
    ours = set(OWN_KEYS) & set(contents) or _near_ours(contents)
    if not ours:
        return Sweep(path, [Point(values) for values in _grid(contents, str(path))])
    file = _parse(contents, path)
    everywhere = dict(_flat(file.set or {}, f"{path}: set"))
    points = []
    if file.grid:
        points += [Point(everywhere | values) for values in _grid(file.grid, f"{path}: grid")]
    if file.random is not None:
        found = _flat(file.random.keys, f"{path}: random.keys", leaf=_is_distribution)
        distributions = {k: distribution(v, f"{path}: random.keys.{k}") for k, v in found}
        if not distributions:
            raise UserError(f"{path}: random.keys is empty; give the keys to search over.")
        points += [Point(everywhere | values) for values in draw(file.random, distributions)]
    points += [
        Point(everywhere | dict(_flat(values, where)), label)
        for label, values, where in _listed(file.points, f"{path}: points")
    ]
    if file.seeds and file.grid is file.random is file.points is None:
        points = [Point(everywhere)]  # the base config, with several seeds
    if not points:
        raise UserError(
            f"{path} is an empty sweep: give it a grid, random or points (or seeds, for the base "
            "config alone)."
        )
    if file.seeds is not None:
        if not file.seeds:
            raise UserError(f"{path}: seeds is empty; give some, or remove the key.")
        if len(set(file.seeds)) < len(file.seeds):
            raise UserError(f"{path}: seeds has one of its numbers twice; give each once.")
    return Sweep(path, points, Path(file.base) if file.base else None, file.seeds)


def _read(path: Path, given_with: str) -> Any:
    from fairchem_kd.stock.configs import read_yaml

    try:
        return read_yaml(path)
    except OSError as error:
        by = f", given with {given_with}," if given_with else ""
        what = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise UserError(f"the file {path}{by} {what}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _parse(contents: Mapping[str, Any], path: Path) -> _File:
    if "sampler" in contents:
        raise UserError(
            f"{path}: sampler stands in the block random (random.sampler: "
            f"{' | '.join(SAMPLERS)}); move it there."
        )
    try:
        return parse(_File, contents, "sweep")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _near_ours(contents: Mapping[str, Any]) -> bool:
    """Whether a file with none of our keys has one that was meant to be."""
    words = ("grid", "random", "points", "seeds", "sampler")
    keys = [str(key) for key in contents if key != "seed"]  # which is fairchem's
    return any(difflib.get_close_matches(key, words, cutoff=0.75) for key in keys)


def _grid(given: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Every combination of the lists in ``given``."""

    def lists(node: Any) -> bool:
        return not (isinstance(node, Mapping) and node)

    axes = list(_flat(given, where, leaf=lists))
    for key, values in axes:
        if not (isinstance(values, list) and values):
            raise UserError(f"{where}: {key} must hold a list of values to try, or keys that do.")
    number = math.prod(len(values) for _, values in axes)
    if number > MOST_POINTS:
        raise UserError(
            f"{where} spans {number:,} points, and a sweep has {MOST_POINTS:,} at most: give fewer "
            "values, or draw some of them with random."
        )
    return [
        {key: _parsed(value) for (key, _), value in zip(axes, values, strict=True)}
        for values in itertools.product(*(values for _, values in axes))
    ]


def _flat(
    given: Mapping[str, Any], where: str, leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[str, Any]]:
    """Nested keys as dotted ones; by default a leaf is whatever is not a mapping with keys."""
    seen: set[str] = set()

    def walk(node: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for name, child in node.items():
            key = f"{above}.{name}" if above else str(name)
            is_leaf = leaf(child) if leaf else not (isinstance(child, Mapping) and child)
            if not is_leaf:
                if not isinstance(child, Mapping):
                    raise UserError(f"{where}: {key} must be a list or a mapping, not {child!r}.")
                yield from walk(child, key)
            else:
                yield key, _parsed(child)

    for key, value in walk(given, ""):
        for other in seen:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise UserError(
                    f"{where}: {other} and {key} set the same place; give one of the two."
                )
        seen.add(key)
        yield key, value


def _is_distribution(node: Any) -> bool:
    return isinstance(node, list) or (isinstance(node, Mapping) and "distribution" in node)


def _parsed(value: Any) -> Any:
    """A string as the command line would read it: ``1e-4``, text in YAML, is a number here."""
    from fairchem_kd.stock.configs import as_on_the_command_line

    return as_on_the_command_line(value)


def _listed(given: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    if is_null(given):
        return
    if isinstance(given, Mapping):
        entries = [(str(label), values) for label, values in given.items()]
    elif isinstance(given, list):
        entries = [("", values) for values in given]
    else:
        raise UserError(f"{where} must be a list of points, or points under names.")
    for number, (label, values) in enumerate(entries):
        place = f"{where}.{label}" if label else f"{where}[{number}]"
        if values is not None and not isinstance(values, Mapping):
            raise UserError(f"{place} must be a mapping of keys to values, not {values!r}.")
        yield label, values or {}, place
