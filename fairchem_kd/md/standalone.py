"""The python file that loads module files where neither fairchem nor fairchem-kd is installed."""

from __future__ import annotations

from fairchem_kd.calculators.bundle import bundled

LOADER = "kd_student.py"  #: what it is called beside a module file

#: In the order in which they stand in the file.
MODULES = (
    "_version",
    "text",
    "errors",
    "json_file",
    "weights_only",
    "stock.pairs",
    "models.module_file",
    "md.exploded",
    "md.skin",
    "md.module",
    "md.lammps",
)
_HEAD = '''\
"""Students of fairchem-kd as ASE calculators, out of module files (NAME.pt2).

    from {name} import ModuleCalculator
    atoms.calc = ModuleCalculator("NAME.pt2")

Needs torch, numpy, scipy and ASE; no fairchem-core, no fairchem-kd. Loading a file runs what torch
finds in it: take files that you trust.

Written by fairchem-kd {version} out of its own modules; write it anew rather than change it.
"""

from __future__ import annotations

'''


def loader() -> str:
    """The text of the file."""
    return bundled(LOADER.removesuffix(".py"), MODULES, _HEAD, foot="")
