"""What tells the runs of a sweep apart, as columns of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fairchem_kd.sweep.manifest import Run


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """The keys whose values differ between runs, in the sweep's order."""
    keys = {key: None for run in runs for key in run.values}
    return [key for key in keys if len({_cell(run, key) for run in runs}) > 1]


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key by its last two parts, or as many as tell it from the others."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        name = key
        for count in range(min(2, len(parts)), len(parts)):
            name = ".".join(parts[-count:])
            if sum(f".{other}".endswith(f".{name}") for other in keys) == 1:
                break
        else:
            name = key
        short[key] = name
    return short


def columns(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads, and cells for each run: the points' names where all have one, else their values."""
    if all(run.label for run in runs):
        return ["point"], [[run.label] for run in runs]
    keys = swept_keys(runs)
    labelled = any(run.label for run in runs)
    heads = ["point"] * labelled + list(short_keys(keys).values())
    return heads, [
        [run.label or "-"] * labelled + [_cell(run, key) for key in keys] for run in runs
    ]


def titles(runs: Sequence[Run]) -> dict[str, str]:
    """A few words on each run's point, by the run's name: its label, or what it alone has."""
    short = short_keys(swept_keys(runs))
    return {
        run.name: run.label
        or ", ".join(f"{name}={_cell(run, key)}" for key, name in short.items())
        or "the base config"
        for run in runs
    }


def _cell(run: Run, key: str) -> str:
    return str(run.values[key]) if key in run.values else "-"
