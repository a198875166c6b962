"""The data card: everything that one must know to use, judge or rebuild a data set."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from fairchem_kd.data.frames import Array
from fairchem_kd.data.splits import Split
from fairchem_kd.reading import read_json

CARD = "card.json"
FORMAT = 1


def fit_references(split: Split) -> dict[int, float]:
    """Energy per element in eV, by least squares of the energies on the element counts.

    Rounded to 1e-6 eV, so that the last bits of a linear-algebra library do not matter.
    """
    elements = sorted({int(z) for frame in split.frames for z in frame.numbers})
    counts = np.array([[(f.numbers == z).sum() for z in elements] for f in split.frames], float)
    energies = np.array([f.energy for f in split.frames])
    values = np.linalg.lstsq(counts, energies, rcond=None)[0]
    return {z: round(float(value), 6) for z, value in zip(elements, values, strict=True)}


def referenced(split: Split, references: dict[int, float]) -> Array:
    """Energies minus the sum of their atoms' references, eV, ``(frames,)``."""
    return np.array(
        [f.energy - sum(references.get(int(z), 0.0) for z in f.numbers) for f in split.frames]
    )


def _summary(values: Array) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def statistics(split: Split, energies: Array) -> dict[str, Any]:
    """Counts, elements, and the spread of energies and forces of a split.

    ``force_rms`` is over the xyz components of every atom, ``force_rms_free`` over free atoms only,
    ``force_norm_max`` over the largest force of each frame.
    """
    forces = np.concatenate([f.forces for f in split.frames]).astype(float)
    free = np.concatenate([f.fixed for f in split.frames]) == 0
    largest = np.array([np.linalg.norm(f.forces.astype(float), axis=1).max() for f in split.frames])
    sizes = np.array([len(f.numbers) for f in split.frames], dtype=float)
    numbers = np.unique(np.concatenate([f.numbers for f in split.frames]))
    return {
        "frames": len(split),
        "trajectories": split.trajectories,
        "trajectories_tried": split.tried,
        "skipped_frames": dict(sorted(split.skipped.items())),
        "elements": [chemical_symbols[z] for z in numbers],
        "natoms": _summary(sizes),
        "free_atoms": int(free.sum()),
        "energy": _summary(energies),
        "force_rms": float(np.sqrt((forces**2).mean())),
        "force_rms_free": float(np.sqrt((forces[free] ** 2).mean())),
        "force_norm_max": {
            "median": float(np.median(largest)),
            "p95": float(np.percentile(largest, 95)),
            "max": float(largest.max()),
        },
    }


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of the distributions that shaped the data."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_card(root: Path, card: dict[str, Any]) -> None:
    (root / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_card(root: Path) -> dict[str, Any] | None:
    """The card of a data set, or None where there is none that can be read."""
    try:
        return read_json(root / CARD)
    except (OSError, ValueError):
        return None
