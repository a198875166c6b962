"""Samples of every data set, looked at before the first step.

What one sample lacks ends a training when it is drawn, or at the first evaluation, hours later. So
of every set the first batch and samples spread over the rest are looked at: what models, labels,
metrics and predictions will ask of them.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import covalent_radii

from fairchem_kd.errors import UserError
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.neighbours import cutoff_of, sample_without_neighbours
from fairchem_kd.stock.samples import collate
from fairchem_kd.stock.search import MEND, distances_of, too_much

MOST = 256  # samples of a set that are looked at
_APART = 0.01  # Å: two atoms of a structure that are not at one place
#: What no label of a structure in these units is: eV an atom (all electrons of uranium: 8e5), eV/Å.
_LARGEST = {"energy": 1e7, "forces": 1e5}
#: Bounds of the distance of the closest atoms over the sum of their covalent radii, where positions
#: are in Å; in Bohr it is 1.9 times what it should be, in nm a tenth.
_BONDS = (0.4, 1.6)
_PAIRS_OF = 1000  # atoms of a structure whose pairs are looked at


@dataclass(frozen=True)
class Search:
    """How a model looks for neighbours."""

    cutoff: float  #: Å
    batch_size: int
    device: torch.device


def check_samples(
    dataset: Any, where: str, outputs: Mapping[str, Mapping[str, Any]], targets: Iterable[str],
    *, named: bool, search: Search | None = None, elements: int | None = None,
) -> None:  # fmt: skip
    """Refuse a data set of which a sample does not fit.

    Args:
        dataset: whose samples are looked at, `MOST` of them.
        where: its key in the config.
        outputs: the trainer's ``output_targets``.
        targets: the labels that each sample has to have.
        named: whether each has to have a ``sid``, for predictions.
        search: how neighbours are looked for in batches of it.
        elements: the model knows the elements 1 to this one; None: it is not known.

    Raises:
        UserError: naming the set, the sample's number and the key.
    """
    count = len(dataset)
    targets = list(targets)
    found, bonds = [], []
    for index in _chosen(count):
        sample = read_sample(dataset, index, where)
        problem = _problem(sample, outputs, targets, named) or _strange(sample, targets, elements)
        if not problem:
            apart, bond = _closest(sample)
            bonds += [] if bond is None else [bond]
            if apart < _APART:
                problem = f"has two atoms at one place ({apart:.2g} Å apart): remove one, or it"
        if problem:
            raise UserError(f"{where}: sample {index}{_name(sample)} {problem}.")
        if search is not None:
            found.append((distances_of(sample, search.cutoff), index, _name(sample)))
    if search is not None and found:
        _check_search(found, where, search)
    _tell_units(bonds, where)


def _check_search(found: list[tuple[float, int, str]], where: str, search: Search) -> None:
    """Refuse samples whose neighbours cannot be looked for: one alone, or a usual batch."""
    largest, index, name = max(found)
    usual = search.batch_size * sum(count for count, _, _ in found) / len(found)
    what = f"{where}: the neighbours within {search.cutoff:g} Å of"
    if problem := too_much(largest, search.device):
        raise UserError(f"{what} sample {index}{name} take {problem}: {MEND}.")
    if problem := too_much(usual, search.device):
        raise UserError(f"{what} a batch of {search.batch_size} samples take {problem}: {MEND}.")


def read_sample(dataset: Any, index: int, where: str) -> Any:
    """One sample of a data set.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return dataset[index]
    except UserError:
        raise
    except Exception as error:  # whatever the reader makes of bytes that are no sample
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where}: sample {index} cannot be read ({type(error).__name__}: {reason}); mend or "
            "remove it."
        ) from error


def check_neighbours(
    dataset: Any, where: str, model: torch.nn.Module, device: torch.device | str
) -> None:
    """Refuse a data set with a sample in which no atom has a neighbour, where the model does.

    Some models allow such a sample, so that the first one found is given to it.

    Raises:
        UserError: naming the set and the sample.
    """
    cutoff = cutoff_of(model)
    if cutoff is None:
        return
    chosen = _chosen(len(dataset))
    index = next((i for i in chosen if sample_without_neighbours(dataset[i], cutoff)), None)
    if index is None:
        return
    was_training = model.training
    model.eval()
    try:
        with isolated_random_state(), torch.no_grad():
            model(collate([dataset[index]]).to(device))
    except Exception as error:  # in stock's models it is their own message that fails
        raise UserError(
            f"{where}: sample {index}{_name(dataset[index])} has no two atoms within {cutoff:g} Å "
            "of each other, and the model needs neighbours: leave such structures out, isolated "
            "atoms for example."
        ) from error
    finally:
        model.train(was_training)


def _chosen(count: int) -> Sequence[int]:
    """The first ones, and others evenly spread."""
    if count <= MOST:
        return range(count)
    half = MOST // 2
    return [*range(half), *(half + i * (count - half) // half for i in range(half))]


def _problem(
    sample: Any, outputs: Mapping[str, Mapping[str, Any]], targets: Sequence[str], named: bool
) -> str:
    """What does not fit; empty where all does."""
    for key in ("pos", "atomic_numbers", "natoms", "cell", *(("sid",) if named else ())):
        if getattr(sample, key, None) is None:
            mend = "predictions are written by it" if key == "sid" else "models need it"
            return f"has no '{key}', and {mend}: write it into the data"
    for key in ("pos", "atomic_numbers", "natoms", "cell", "tags", "fixed", *targets):
        value = getattr(sample, key, None)
        if value is None or isinstance(value, torch.Tensor):
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.Tensor):
            return f"has '{key}' of the type {type(value).__name__}, and not as a tensor"
    natoms = int(torch.as_tensor(sample.natoms))
    for key, shape in (("pos", (natoms, 3)), ("atomic_numbers", (natoms,))):
        found = tuple(torch.as_tensor(getattr(sample, key)).shape)
        if found != shape:
            return f"has '{key}' of shape {found}, and {natoms} atoms need {shape}"
    if torch.as_tensor(sample.cell).numel() != 9:
        return f"has 'cell' of shape {tuple(torch.as_tensor(sample.cell).shape)}, not (1, 3, 3)"
    fixed = getattr(sample, "fixed", None)
    if fixed is not None and tuple(torch.as_tensor(fixed).shape) != (natoms,):
        return (
            f"has 'fixed' of shape {tuple(torch.as_tensor(fixed).shape)}: it has to say of each of "
            f"the {natoms} atoms whether it is fixed, 0 or 1"
        )
    tags = getattr(sample, "tags", None)
    if tags is not None and tuple(torch.as_tensor(tags).shape) != (natoms,):
        return f"has 'tags' of shape {tuple(torch.as_tensor(tags).shape)}, not ({natoms},)"
    for name in targets:
        value = getattr(sample, name, None)
        if value is None:
            return f"has no label '{name}', and others have: remove it, or give it one"
        rows = natoms if outputs.get(name, {}).get("level", "system") == "atom" else 1
        size = torch.as_tensor(value).numel()
        if size == 0 or size % rows:
            return f"has the label '{name}' with {size} numbers, which {rows} rows do not share"
        if name == "forces" and size != 3 * natoms:
            return f"has forces of {size} numbers, and {natoms} atoms need {3 * natoms}"
        if name == "energy" and size != 1:
            return f"has the label 'energy' with {size} numbers, and a structure has one"
        label = torch.as_tensor(value)
        if rows == natoms > 1 and len(label) != natoms:
            return (
                f"has the label '{name}' of shape {tuple(label.shape)}, and not a row for each of "
                "its atoms"
            )
    return ""


def not_finite(key: str, value: Any) -> str:
    """What is wrong with a value of a sample that is not finite; empty of one that is."""
    if bool(torch.isfinite(torch.as_tensor(value)).all()):
        return ""
    words = {
        "pos": "positions that are",
        "cell": "a cell that is",
        "energy": "an energy label that is",
    }
    named = words.get(key, f"a {key} label that is")
    return f"has {named} not finite (NaN or infinity): remove or mend it"


def _strange(sample: Any, targets: Sequence[str], elements: int | None) -> str:
    """What cannot be, in a sample of the right shape; empty where all can."""
    for key in ("pos", "cell", *targets):
        value = torch.as_tensor(getattr(sample, key)).double()
        if problem := not_finite(key, value):
            return problem
        largest = _LARGEST.get(key, math.inf)
        size = float(value.abs().max()) / (int(sample.natoms) if key == "energy" else 1)
        if key in targets and size > largest:
            unit = "eV an atom" if key == "energy" else "eV/Å"
            return f"has labels of {key} of {size:.3g} {unit}, which cannot be: remove or mend it"
    kinds = torch.as_tensor(sample.atomic_numbers).double()
    if bool((kinds != kinds.round()).any()):
        wrong = kinds[kinds != kinds.round()][0].item()
        return f"has the atomic number {wrong:g}, and they are whole numbers"
    for wrong in kinds[(kinds < 1) | (kinds >= len(covalent_radii))].tolist():
        return f"has the atomic number {wrong:g}, which no element has"
    if elements is not None and float(kinds.max()) > elements:
        return (
            f"has the atomic number {kinds.max():g}, and the model knows the elements 1 to "
            f"{elements}: leave such structures out, or raise its number of elements"
        )
    return ""


def _closest(sample: Any) -> tuple[float, float | None]:
    """The distance of the closest atoms, Å, and the least one over the sum of covalent radii.

    Images in other cells do not count; of one atom, and of very many, nothing is known.
    """
    pos = torch.as_tensor(sample.pos).double()
    if not 1 < len(pos) <= _PAIRS_OF:
        return math.inf, None
    radii = torch.from_numpy(covalent_radii)[torch.as_tensor(sample.atomic_numbers).long().cpu()]
    distances = torch.cdist(pos, pos, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    bonds = distances / (radii[:, None] + radii[None, :]).to(pos.device)
    return float(distances.min()), float(bonds.min())


def _tell_units(bonds: Sequence[float], where: str) -> None:
    """Warn where the closest atoms of most samples are not as far apart as atoms are."""
    if not bonds:
        return
    usual = float(torch.tensor(bonds).median())
    least, most = _BONDS
    if not least <= usual <= most:
        logging.warning(
            f"{where}: the closest atoms of its samples are {usual:.2g} times as far apart as a "
            "bond is long (in the median): positions and cells have to be in Å."
        )


def _name(sample: Any) -> str:
    named = {key: getattr(sample, key, None) for key in ("sid", "fid")}
    words = [f"{key} {_plain(value)}" for key, value in named.items() if value is not None]
    return f" ({', '.join(words)})" if words else ""


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
