"""Models as stock fairchem gives them to ASE, and structures for them to act on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fairchem_kd.errors import UserError
from fairchem_kd.models.file import weights_only_everywhere
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.conservative import is_conservative
from fairchem_kd.stock.gradient_forces import give_gradient_forces
from fairchem_kd.stock.noise import quiet
from fairchem_kd.stock.samples import use_our_collater
from fairchem_kd.stock.search import look_before_searching

if TYPE_CHECKING:
    import ase
    from ase.calculators.calculator import Calculator

    from fairchem_kd.analysis.subjects.runs import ModelFile
    from fairchem_kd.analysis.subjects.structures import Structures


def make_calculator(file: ModelFile, *, cpu: bool = True) -> Calculator:
    """Stock fairchem's OCPCalculator of a checkpoint.

    ``file`` has passed :mod:`fairchem_kd.models.gate`; files that its config names are read
    without executing code too, unless the user trusts it.

    Raises:
        UserError: stock cannot load it, or would build it from another file.
    """
    from fairchem.core.common.relaxation.ase_utils import OCPCalculator

    model = file.config.get("model")
    if not file.trust and isinstance(model, Mapping) and model.get("finetune_config"):
        raise UserError(
            f"{file.path} has OCPCalculator build its model from another file first "
            "(model.finetune_config): export it (`fairchem-kd export`), or give --trust if you "
            "trust both."
        )
    use_our_collater()
    look_before_searching()
    reading = nullcontext() if file.trust else weights_only_everywhere()
    # Given the config, stock does not take the file's: in a SLURM job it would unpickle a file in
    # the folder that `slurm` names, and outside of debug mode make folders.
    config = copy.deepcopy(dict(file.config))
    for key in ("slurm", "cmd", "is_debug", "local_rank", "logger"):
        config.pop(key, None)
    dataset = config.get("dataset")
    config["dataset"] = {"train": {**(dataset if isinstance(dataset, Mapping) else {}), "src": ""}}
    with quiet(), isolated_random_state(), reading:
        try:
            made = OCPCalculator(config_yml=config, checkpoint_path=file.path, cpu=cpu, seed=0)
        except Exception as error:  # whatever stock makes of a config that misses what it needs
            raise UserError(
                f"{file.path} cannot be loaded by fairchem's OCPCalculator "
                f"({type(error).__name__}: {error}); take a checkpoint that fairchem wrote."
            ) from error
    if is_conservative(file.config):  # of which stock's trainer knows the energy alone
        give_gradient_forces(made.trainer._unwrapped_model, made.trainer.normalizers)
    return made


def atoms_of(structures: Structures) -> list[ase.Atoms]:
    """The structures as ASE has them, fixed atoms fixed, periodic along all axes."""
    from fairchem.core.common.relaxation.ase_utils import batch_to_atoms

    found: list[Any] = []
    for batch in structures.batches(64):
        found += batch_to_atoms(batch, wrap_pos=False)
    return found
