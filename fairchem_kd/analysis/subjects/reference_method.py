"""The methods that the built-in data have their labels from, as ASE calculators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.reading import read_json

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

EMT, XTB = "EMT", "GFN2-xTB"
METHODS = {"emt": EMT, "xtb": XTB}
_OF_RECIPES = {"slabs": EMT, "collisions": XTB}


def method_of(settings: Mapping[str, Any]) -> str | None:
    """The method behind the labels of a data set's config, by its ``build`` or its card.

    None where neither names a recipe of ours.
    """
    build = settings.get("build")
    recipe = build.get("recipe") if isinstance(build, Mapping) else build
    if recipe is None and isinstance(settings.get("src"), str):
        try:
            recipe = read_json(Path(settings["src"]).parent / "card.json")["options"]["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return _OF_RECIPES.get(str(recipe))


def method_calculator(method: str) -> Calculator:
    """A fresh calculator of ``method`` (:data:`EMT` or :data:`XTB`).

    Raises:
        UserError: it needs a package that is not installed.
    """
    if method == EMT:
        from ase.calculators.emt import EMT as Emt

        return Emt()
    from fairchem_kd.data.recipes.collisions import check_tblite

    check_tblite()
    return _xtb()


def _xtb() -> Calculator:
    from ase.calculators.calculator import CalculationFailed, Calculator, all_changes

    from fairchem_kd.data.recipes.collisions import Xtb

    class MolecularXtb(Calculator):
        """GFN2-xTB as the collisions' labels have it: of molecules, whatever box they are in."""

        implemented_properties = ["energy", "forces"]  # noqa: RUF012  (as ASE declares it)

        def calculate(
            self,
            atoms: Any = None,
            properties: Any = ("energy",),
            system_changes: Any = all_changes,
        ) -> None:
            super().calculate(atoms, properties, system_changes)
            assert self.atoms is not None
            try:
                single = Xtb(self.atoms.numbers, self.atoms.positions)
                energy, forces = single(self.atoms.positions, restart=False)
            except RuntimeError as error:
                raise CalculationFailed(f"GFN2-xTB: {error}") from error
            self.results = {"energy": energy, "forces": forces}

    return MolecularXtb()
