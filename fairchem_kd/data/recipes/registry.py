"""The recipes that `fairchem-kd data` and the `build` key know, and their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.data.frames import Trajectory
from fairchem_kd.data.recipes import collisions, slabs
from fairchem_kd.errors import UserError, did_you_mean

MakeTrajectory = Callable[[int, int, int], Trajectory]  #: (seed, split number, index)


@dataclass(frozen=True)
class Recipe:
    """How to make a data set."""

    name: str
    sizes: Mapping[str, int]  #: frames of each split by default; the first is ``train``
    make: Callable[[str], MakeTrajectory]  #: for the name of a split
    frames_per_trajectory: int  #: at most
    atoms_per_frame: int  #: about, to estimate the disk space
    method: str
    note: str
    distributions: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)  #: more for the card
    check: Callable[[], None] = lambda: None  #: raises UserError when something is not installed


def _make_slab(split: str) -> MakeTrajectory:
    return partial(slabs.make_trajectory, held_out=split == "test_ood")


SLABS = Recipe(
    name="slabs",
    sizes={"train": 3000, "val": 500, "test": 500, "test_ood": 500},
    make=_make_slab,
    frames_per_trajectory=slabs.FRAMES_PER_TRAJECTORY,
    atoms_per_frame=20,
    method="EMT of ASE (effective-medium theory)",
    note=(
        "Adsorbates on strained metal and binary-alloy slabs. EMT's parameters for H, C, N and O "
        "are made up (see ASE's documentation): a many-body potential to learn, not chemistry. "
        "Forces are given for every atom, without constraints; sub-surface atoms (tag 0) are "
        "fixed. test_ood holds the pairs of adsorbate and metal that no other split has."
    ),
    distributions=("ase", "numpy"),
    facts={
        "metals": sorted(slabs.METALS),
        "adsorbates": sorted(slabs.ADSORBATES),
        "facets": sorted(slabs.FACETS),
        "held_out_pairs": sorted(f"{adsorbate}/{metal}" for adsorbate, metal in slabs.HELD_OUT),
        "max_force": slabs.MAX_FORCE,
    },
)


def _make_collision(split: str) -> MakeTrajectory:
    return partial(collisions.make_trajectory, held_out=split == "test_ood")


COLLISIONS = Recipe(
    name="collisions",
    sizes={"train": 4000, "val": 500, "test": 1000, "test_ood": 500},
    make=_make_collision,
    frames_per_trajectory=collisions.FRAMES_PER_TRAJECTORY,
    atoms_per_frame=8,
    method="GFN2-xTB, each label an SCF of its own, through tblite",
    note=(
        "Pairs of small closed-shell molecules flying at each other, no fixed atoms. They sit in "
        f"a cell of {collisions.CELL:g} Å, so that use_pbc: true works and no image is in reach. "
        "Every atom has tag 2, since GemNet-OC's quadruplets leave out tag 0. Each pair of "
        "test_ood holds a molecule that no other split has."
    ),
    distributions=("ase", "numpy", "tblite"),
    facts={
        "molecules": sorted(collisions.MOLECULES),
        "held_out_molecules": sorted(collisions.HELD_OUT),
        "max_force": collisions.MAX_FORCE,
    },
    check=collisions.check_tblite,
)

RECIPES = {recipe.name: recipe for recipe in (SLABS, COLLISIONS)}


@dataclass(frozen=True)
class Options:
    """A recipe with its seed and sizes: what, with the versions, determines every label.

    ``references`` is the folder of another data set of the recipe, whose elements' energies are
    taken instead of a fit to this one: so both have one zero, and models one kind of label.
    """

    recipe: Recipe
    seed: int
    sizes: dict[str, int]
    references: str | None = None

    def as_dict(self) -> dict[str, Any]:
        told = {"recipe": self.recipe.name, "seed": self.seed, **self.sizes}
        return told if self.references is None else {**told, "references": self.references}


def _integer(value: object, where: str, low: int) -> int:
    try:
        number = int(value) if isinstance(value, (int, str)) else None
    except ValueError:
        number = None
    if number is None or isinstance(value, bool) or number < low:
        raise UserError(f"{where} is {value!r}, but must be a whole number of at least {low}.")
    return number


def least_sizes(recipe: Recipe) -> dict[str, int]:
    """The fewest frames of each split: a quarter of ``train`` must hold a whole trajectory."""
    return dict.fromkeys(recipe.sizes, 1) | {"train": 4 * recipe.frames_per_trajectory}


def parse_options(mapping: object, where: str) -> Options:
    """Check a ``build`` mapping: ``{recipe: slabs, seed: 0, train: 3000, ...}``.

    Raises:
        UserError: an unknown recipe or key, or a value that is out of range.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} is {mapping!r}, but must be a mapping such as {{recipe: slabs}}.")
    name = mapping.get("recipe")
    if name is None:
        raise UserError(f"{where} has no recipe; give one of: {', '.join(sorted(RECIPES))}.")
    if name not in RECIPES:
        raise UserError(f"{where}.recipe: unknown '{name}'{did_you_mean(str(name), RECIPES)}.")
    recipe = RECIPES[str(name)]
    known = ["recipe", "seed", "references", *recipe.sizes]
    for key in mapping:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}.")
    seed = _integer(mapping.get("seed", 0), f"{where}.seed", 0)
    least = least_sizes(recipe)
    sizes = {
        split: _integer(mapping.get(split, default), f"{where}.{split}", least[split])
        for split, default in recipe.sizes.items()
    }
    references = mapping.get("references")
    if references is not None and not (isinstance(references, str) and references.strip()):
        raise UserError(
            f"{where}.references is {references!r}, but must be the folder of a data set, such as "
            f"data/{recipe.name}."
        )
    return Options(recipe, seed, sizes, None if references is None else str(Path(references)))
