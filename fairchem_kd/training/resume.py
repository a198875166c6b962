"""What a run needs to go on from its own folder as if it had never been interrupted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.random_state import random_state
from fairchem_kd.training.ranks import world_size

#: The key under which a checkpoint holds everything that only distillation needs, and its version.
STATE_KEY = "fairchem_kd"
STATE_FORMAT = 2  # 1: the random state of the first rank alone, under "random_state"

_HINT = "the student's checkpoint (--checkpoint) has to be one that fairchem itself wrote"


def previous_of(path: str | Path) -> Path:
    """Where the checkpoint that was at ``path`` before is kept."""
    path = Path(path)
    return path.with_name(f"previous_{path.name}")


def has_checkpoint(path: str | Path) -> bool:
    """Whether a run left a checkpoint at ``path``, or the one before it."""
    return Path(path).is_file() or previous_of(path).is_file()


def read_student(path: str | Path, *, own: bool) -> dict[str, Any]:
    """A checkpoint's contents; of a run's ``own``, those of the newest that can be read.

    Raises:
        UserError: as :func:`read_checkpoint`, or its state is of a newer format.
    """
    try:
        contents = read_checkpoint(path, hint=_HINT, own=True)
    except UserError as error:
        if not (own and previous_of(path).is_file()):
            raise
        logging.warning(f"{error} Going on from the one before it, {previous_of(path)}.")
        contents = read_checkpoint(previous_of(path), hint=_HINT, own=True)
    check_format(contents.get(STATE_KEY), path)
    return contents


def check_format(state: Mapping[str, Any] | None, path: str | Path) -> None:
    """Refuse the state of a newer version of this package."""
    if state is not None and state.get("format", 0) > STATE_FORMAT:
        raise UserError(
            f"{path} was written by a newer fairchem-kd (format {state['format']}, this one reads "
            f"up to {STATE_FORMAT}): upgrade fairchem-kd, or start from best_checkpoint.pt."
        )


def remove_leftovers(checkpoint: str | Path) -> None:
    """Remove what a killed save left half-written beside a run's checkpoint."""
    for part in Path(checkpoint).parent.glob(".*checkpoint.pt.*.part"):
        part.unlink(missing_ok=True)


def random_states(*, gather: bool) -> list[dict[str, Any]]:
    """The random states of all ranks, by rank, on the first one; a collective if ``gather``."""
    own = random_state()
    if not gather or world_size() == 1:
        return [own]
    states: list[Any] = [None] * world_size()
    dist.gather_object(own, states if dist.get_rank() == 0 else None)
    return states


def random_state_for(state: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """This rank's random state out of a checkpoint's, the first one's where it has none."""
    states = state["random_states"] if "random_states" in state else [state["random_state"]]
    if len(states) != world_size():
        logging.warning(
            f"This run was saved by {len(states)} rank(s) and goes on with {world_size()}: not as "
            "if it had never been interrupted."
        )
    return states[rank] if len(states) == world_size() else states[0]


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any], run: str) -> None:
    """Refuse to go on with another model than the run's; tell of other settings that differ.

    Args:
        saved: the config in the run's checkpoint.
        config: the trainer's.
        run: the run's folder name.

    Raises:
        UserError: the model differs.
    """
    other = list(_differences(saved["model"], config["model"], "model"))
    if other:
        raise UserError(
            f"--timestamp-id {run}: that run was started with another model "
            f"({', '.join(other[:3])}); give the config that it was started with, or leave out "
            "--timestamp-id to start a new run."
        )
    blocks = ("task", "outputs", "optim", "loss_functions", "dataset", "val_dataset")
    changed = [
        text for key in blocks for text in _differences(saved.get(key), config.get(key), key)
    ]
    changed += _differences(saved["cmd"].get("seed"), config["cmd"].get("seed"), "seed")
    if changed:
        logging.warning(f"Going on with other settings than {run} had: {', '.join(changed[:8])}")


def check_same_steps(
    state: Mapping[str, Any] | None, *, step: int, epoch: float, steps: int, run: str
) -> None:
    """Refuse to go on where an epoch has another number of steps than the run had.

    Its position in the data, its schedules and its end are all counted in steps: it would end early
    or late, somewhere else in its schedules, without a word.

    Args:
        state: what the run's checkpoint holds under `STATE_KEY`; None of a stock trainer's.
        step: its number of steps.
        epoch: its number of epochs.
        steps: of an epoch now.
        run: the run's folder name.

    Raises:
        UserError: they differ.
    """
    then = (state or {}).get("steps_per_epoch")
    if then is None:  # by a stock trainer, or an earlier version of ours
        then = round(step / epoch) if step and epoch else steps
    if then != steps:
        raise UserError(
            f"--timestamp-id {run}: an epoch of that run had {then} steps, and would have {steps} "
            "now; give the training set that it was started with, and the same number of "
            "structures per step (ranks times optim.batch_size), or leave out --timestamp-id to "
            "start a new run."
        )


def _differences(then: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted({*then, *now}, key=str):
            yield from _differences(then.get(name), now.get(name), f"{key}.{name}")
    elif then != now:
        yield f"{key}: {then} there, {now} here"
