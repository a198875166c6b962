"""Samples of every data set, looked at before the first step.

What one sample lacks ends a training when it is drawn, or at the first evaluation, hours later. So
of every set the first batch and samples spread over the rest are looked at: what models, labels,
metrics and predictions will ask of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fairchem_kd.errors import UserError
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.neighbours import cutoff_of, sample_without_neighbours
from fairchem_kd.stock.samples import collate
from fairchem_kd.stock.search import MEND, distances_of, too_much

MOST = 256  # samples of a set that are looked at


@dataclass(frozen=True)
class Search:
    """How a model looks for neighbours."""

    cutoff: float  #: Å
    batch_size: int
    device: torch.device


def check_samples(
    dataset: Any, where: str, outputs: Mapping[str, Mapping[str, Any]], targets: Iterable[str],
    *, named: bool, search: Search | None = None,
) -> None:  # fmt: skip
    """Refuse a data set of which a sample does not fit.

    Args:
        dataset: whose samples are looked at, `MOST` of them.
        where: its key in the config.
        outputs: the trainer's ``output_targets``.
        targets: the labels that each sample has to have.
        named: whether each has to have a ``sid``, for predictions.
        search: how neighbours are looked for in batches of it.

    Raises:
        UserError: naming the set, the sample's number and the key.
    """
    count = len(dataset)
    targets = list(targets)
    found = []
    for index in _chosen(count):
        sample = read_sample(dataset, index, where)
        problem = _problem(sample, outputs, targets, named)
        if problem:
            raise UserError(f"{where}: sample {index}{_name(sample)} {problem}.")
        if search is not None:
            found.append((distances_of(sample, search.cutoff), index, _name(sample)))
    if search is not None and found:
        _check_search(found, where, search)


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
    return ""


def _name(sample: Any) -> str:
    named = {key: getattr(sample, key, None) for key in ("sid", "fid")}
    words = [f"{key} {_plain(value)}" for key, value in named.items() if value is not None]
    return f" ({', '.join(words)})" if words else ""


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
