"""Stock's trainer with what is worked around in it, and nothing added to what it trains.

Each function says what stock does, and why that is worked around.
"""

from __future__ import annotations

import copy
import datetime
import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from fairchem.core.common import distutils
from fairchem.core.common.utils import setup_imports
from fairchem.core.trainers import OCPTrainer

from fairchem_kd.errors import UserError
from fairchem_kd.machine import flush_denormals, flush_worker
from fairchem_kd.stock.conservative import is_conservative
from fairchem_kd.stock.constraints import use_our_rule
from fairchem_kd.stock.datasets import with_own_databases
from fairchem_kd.stock.gradient_forces import give_gradient_forces
from fairchem_kd.stock.kept_samples import KeptSamples, Room, repeatable
from fairchem_kd.stock.neighbours import refuse_isolated
from fairchem_kd.stock.partition import use_our_partition
from fairchem_kd.stock.samples import use_our_collater
from fairchem_kd.stock.search import look_before_searching
from fairchem_kd.stock.soft_lengths import soften_lengths
from fairchem_kd.stock.softness import softness

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from torch_geometric.data import Batch

Trainer = TypeVar("Trainer", bound=OCPTrainer)

#: Of 255 that file systems have, less what a timestamp and a file written aside add.
_LONGEST_NAME = 180


#: What an output is, where the config does not say.
_OF_OUTPUTS = {"level": "system", "train_on_free_atoms": True, "eval_on_free_atoms": True}


class StockTrainer(OCPTrainer):
    """Stock's :class:`OCPTrainer`, mended: same losses, same steps, same weights.

    Args:
        flush_denormal: flush denormal numbers to zero where it runs on a CPU.
        stock: OCPTrainer's own.
    """

    def __init__(self, *, flush_denormal: bool = False, **stock: Any) -> None:
        check_run_names(stock)
        use_our_collater()
        use_our_partition()
        use_our_rule()
        look_before_searching()
        self._run_dir = stock.get("run_dir") or os.getcwd()
        self._flush_denormal = flush_denormal
        self._room = Room()
        self._kept: dict[int, KeptSamples] = {}  # by the identity of what they hold
        if flush_denormal and (stock.get("cpu", False) or not torch.cuda.is_available()):
            flush_denormals()
        super().__init__(**stock)

    def _get_timestamp(self, device: torch.device, suffix: str | None) -> str:
        """A run folder of this run's own; stock's clock has a granularity of 128 s."""
        return fresh_timestamp(self._run_dir, device, suffix, claim=not self.is_debug)

    def load_datasets(self) -> None:
        try:
            super().load_datasets()
        except UserError:
            raise
        except Exception as error:  # whatever a reader makes of a file that is not for it
            named = [
                f"dataset.{split} ({settings.get('src')})"
                for split, settings in self._data_settings().items()
            ]
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{' or '.join(named)} cannot be opened ({type(error).__name__}: {reason}): name "
                "other files, or mend the options of the data set."
            ) from error

    def _data_settings(self) -> dict[str, Mapping[str, Any]]:
        """The splits that the config has."""
        keys = {"train": "dataset", "val": "val_dataset", "test": "test_dataset"}
        found = {split: self.config.get(key) or {} for split, key in keys.items()}
        return {split: settings for split, settings in found.items() if settings.get("src")}

    def load_model(self) -> None:
        try:
            super().load_model()
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise UserError(f"model has a key that the model does not know: {error}.") from error
        if is_conservative(self.config):
            give_gradient_forces(self._unwrapped_model, self.normalizers)
        soft = softness(self.config)
        if soft is not None:
            soften_lengths(self._unwrapped_model, soft)

    def kept(self, dataset: Any, workers: int | None = None) -> Any:
        """A data set whose samples are kept once read, if this process reads them itself.

        The same one for the same data set, so that whoever looks at it before training reads for
        the training too.
        """
        in_workers = self.config["optim"]["num_workers"] if workers is None else workers
        if in_workers or not repeatable(dataset):
            return dataset
        return self._kept.setdefault(id(dataset), KeptSamples(dataset, self._room))

    def get_dataloader(self, dataset: Any, sampler: Any, workers: int | None = None) -> DataLoader:
        loader = super().get_dataloader(self.kept(dataset, workers), sampler, workers)
        flush = self._flush_denormal and self.device.type == "cpu"
        return with_own_databases(loader, flush_worker if flush else None)

    def _forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        try:
            return super()._forward(batch)
        except UserError:
            raise
        except Exception:
            refuse_isolated(batch, self._unwrapped_model)
            raise

    def load_task(self) -> None:
        self.config["evaluation_metrics"] = with_primary_metric(
            self.config.get("evaluation_metrics"), self.config["outputs"]
        )
        super().load_task()
        for output in self.output_targets.values():
            # as stock has it of outputs that are parts of another; without, a step ends it
            for key, usual in _OF_OUTPUTS.items():
                output.setdefault(key, usual)

    @property
    def last_step(self) -> int:
        """The optimiser steps of the whole training."""
        return self.config["optim"]["max_epochs"] * len(self.train_loader)

    def take_step(self, batch: Batch) -> float:
        """One step on ``batch``, which is used up, as stock's loop takes it; returns its loss."""
        self.model.train()
        with torch.autocast("cuda", enabled=self.scaler is not None):
            loss = self._compute_loss(self._forward(batch), batch)
        value = loss.item()
        self._backward(self.scaler.scale(loss) if self.scaler else loss)
        return value

    def warn_of_no_evaluation(self) -> None:
        """Stock saves and evaluates at multiples of a number of steps, and not at the end."""
        optim = self.config["optim"]
        steps = self.last_step
        eval_every = optim.get("eval_every", len(self.train_loader))
        if eval_every <= steps or self.is_debug or not distutils.is_master():
            return
        saved = 0 < optim.get("checkpoint_every", eval_every) <= steps
        left = "no best_checkpoint.pt" if saved else "no checkpoint"
        logging.warning(
            f"This training has {steps} steps, optim.eval_every is {eval_every}: it ends without "
            f"an evaluation and leaves {left}. Give a smaller optim.eval_every."
        )


def check_run_names(config: Mapping[str, Any]) -> None:
    """Refuse names that would put a run's files elsewhere than into folders of that name.

    Stock joins both into paths as they come: ``../x`` would leave the run's folder, and a line
    break would forge lines of a log.

    Raises:
        UserError: a name that is no name of a folder.
    """
    for key in ("identifier", "timestamp_id"):
        name = config.get(key)
        if name is None or name == "":
            continue
        flag, text = f"--{key.replace('_', '-')}", str(name)
        if "/" in text or "\\" in text or not text.isprintable() or text in (".", ".."):
            raise UserError(
                f"{flag} {text[:80]!r} cannot be a folder's name, and runs' folders are called so: "
                "use letters, digits, '-', '_' and '.'."
            )
        if len(text.encode()) > _LONGEST_NAME:
            raise UserError(
                f"{flag} has {len(text.encode())} bytes, and a folder's name at most "
                f"{_LONGEST_NAME} here; give a shorter one."
            )


def in_one_process(
    trainer: type[Trainer],
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    identifier: str,
    cpu: bool | None = None,
    **more: Any,
) -> Trainer:
    """A trainer in this process that makes no folders and writes nothing (stock's debug mode).

    Args:
        trainer: its class.
        config: a training config, as in a file or in a checkpoint; it is not changed.
        dataset: its splits, in place of the config's.
        identifier: of what it is for, in the log.
        cpu: run on the CPU; None: where there is no GPU.
        more: what is to be given in place of the config's, by OCPTrainer's names.
    """
    setup_imports()
    use_our_collater()
    use_our_rule()
    given: dict[str, Any] = {
        "task": config.get("task", {}),
        "model": config["model"],
        "outputs": config.get("outputs", {}),
        "dataset": dataset,
        "optimizer": config["optim"],
        "loss_functions": config.get("loss_functions", {}),
        "evaluation_metrics": config.get("evaluation_metrics", {}),
    }
    given = copy.deepcopy(given | more)
    return trainer(
        **given,
        identifier=identifier,
        local_rank=0,
        is_debug=True,
        cpu=not torch.cuda.is_available() if cpu is None else cpu,
    )


def fresh_timestamp(
    run_dir: str, device: torch.device, suffix: str | None, *, claim: bool = True
) -> str:
    """A name for a new run that no other run has, the same on every rank.

    Stock's ``_get_timestamp`` sends the time through a float32 tensor: a granularity of 128 s, so
    that two runs with the same identifier share a folder and the second silently resumes the first.
    Here the first rank claims the folder by creating it (a debugging run makes no folders, and
    claims none), and tells its name to the others.
    """
    name = [""]
    if distutils.is_master():
        now = datetime.datetime.now()
        while True:
            name[0] = now.strftime("%Y-%m-%d-%H-%M-%S") + (f"-{suffix}" if suffix else "")
            if not claim:
                break
            try:
                os.makedirs(os.path.join(run_dir, "checkpoints", name[0]))
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    distutils.broadcast_object_list(name, src=0, device=device)
    return name[0]


def with_primary_metric(given: dict[str, Any] | None, outputs: Iterable[str]) -> dict[str, Any]:
    """``evaluation_metrics`` with a primary metric: where none is given, an MAE, of forces first.

    Stock's ``update_best`` fails without one (``"mae" in None``). Where a config names ``trainer:
    forces`` or ``energy``, stock has defaults, but those go with these names.
    """
    chosen = dict(given or {})
    chosen["metrics"] = chosen.get("metrics") or {name: ["mae"] for name in outputs}
    if not chosen.get("primary_metric"):
        measured = [name for name, metrics in chosen["metrics"].items() if "mae" in metrics]
        if measured:
            name = "forces" if "forces" in measured else measured[0]
            chosen["primary_metric"] = f"{name}_mae"
    return chosen
