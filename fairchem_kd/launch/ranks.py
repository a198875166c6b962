"""A rank of a run: how it is made ready, and how its error is told by the launching process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairchem.core import _cli
from fairchem.core.common.utils import setup_logging
from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fairchem_kd.data.build import ensure_built
from fairchem_kd.errors import UserError
from fairchem_kd.launch.interrupt import ranks_stop_themselves
from fairchem_kd.machine import flush_denormals
from fairchem_kd.stock.noise import plain_logs
from fairchem_kd.stock.partition import use_our_partition
from fairchem_kd.stock.plugin import register
from fairchem_kd.stock.predictions import keep_all_predictions
from fairchem_kd.stock.relaxation import make_relaxable
from fairchem_kd.stock.samples import use_our_collater
from fairchem_kd.training.closing import tell_end
from fairchem_kd.training.interruption import Stopped
from fairchem_kd.training.restartable import RestartableTrainer


def own_port() -> None:
    """Have this process, the only rank of its run, listen on a port that nobody else can have.

    Stock's ``setup_env_local`` looks for a free one seconds before it is used, and frees it again;
    of several runs that start together two may find the same. Port 0 is chosen when it is used.
    """
    os.environ["MASTER_PORT"] = "0"


def join_submitted_ranks(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare this rank of a submitted job, and return the config with which it finds the others.

    For submitted jobs stock's ``distutils.setup`` knows nccl and GPUs alone, one port for all
    jobs of a node, and no scheduler but SLURM. Without ``submit`` it takes what torch's own
    launchers set, and the backend that the config names; that is set here from submitit's
    environment. Where ranks are on CPUs, each takes as many threads as the job has CPUs for it,
    or without a scheduler its share of those that PyTorch would take.

    Raises:
        UserError: the job is for GPUs, and there is none here.
    """
    job = JobEnvironment()
    devices = 0 if config["cpu"] else torch.cuda.device_count()
    if not (config["cpu"] or devices):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"rank {job.global_rank} sees no GPU on {job.hostname} (CUDA_VISIBLE_DEVICES is "
            f"{seen!r}), and the job was submitted for GPUs: submit it to a partition that has "
            "them, with a PyTorch for CUDA, or give --cpu."
        )
    address = "localhost" if job.num_nodes == 1 else job.hostnames[0]
    # One port for a job's ranks, which cannot agree on one before they have met.
    number = int("".join(filter(str.isdigit, job.raw_job_id)))
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(10000 + number % 20000),
        RANK=str(job.global_rank),
        # A cluster may show each rank its own GPU alone, which then is the first.
        LOCAL_RANK=str(0 if devices == 1 else job.local_rank),
        WORLD_SIZE=str(job.num_tasks),
    )
    if job.num_tasks == 1:
        own_port()
    if config["cpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # stock would give each rank one that it sees
        if "OMP_NUM_THREADS" not in os.environ:
            share = torch.get_num_threads() // (job.num_tasks // job.num_nodes)
            own = os.environ.get("SLURM_CPUS_PER_TASK") or share
            torch.set_num_threads(max(1, int(own)))
    return {**config, "submit": False, "world_size": job.num_tasks}


#: Set in launched ranks: the file to which the first one to meet a UserError writes its sentence,
#: and the one to which those that Ctrl-C has stopped write how to go on.
_SENTENCE, _STOPPED = "FAIRCHEM_KD_USER_ERROR_FILE", "FAIRCHEM_KD_STOPPED_FILE"
INTERRUPTED = 130  # the exit code of a rank that Ctrl-C has ended before it could save


class KDRunner(_cli.Runner):
    """Stock's `Runner`, in a process that has been made ready for it."""

    def __call__(self, config: dict[str, Any]) -> None:
        """Train, validate, predict or relax, as the config says."""
        setup_logging()
        plain_logs()
        if config.get("flush_denormal"):
            # Before the first parallel region; data-loader workers inherit it through fork.
            flush_denormals()
        register()
        make_relaxable()
        use_our_collater()
        use_our_partition()
        keep_all_predictions()
        if config.get("submit"):
            # Built by the job, not on the login node; ranks and jobs wait for each other.
            ensure_built(config)
            config = join_submitted_ranks(config)
        super().__call__(config)
        if config["mode"] == "train" and isinstance(self.trainer, RestartableTrainer):
            tell_end(self.trainer)

    def checkpoint(self, config: dict[str, Any]) -> DelayedSubmission:
        """What submitit is to run when the job starts again: this run, from where it has come."""
        trainer = getattr(self, "trainer", None)
        if trainer is None:  # it was still being set up
            return DelayedSubmission(KDRunner(), config)
        if not hasattr(trainer, "interruption"):
            config = super().checkpoint(config).args[0]  # a stock trainer: saved here and now
            return DelayedSubmission(KDRunner(), {**config, "submit": True})
        # Ours has saved, where that made sense; its own checkpoint goes before --checkpoint.
        if trainer.logger is not None:
            trainer.logger.mark_preempting()
        return DelayedSubmission(KDRunner(), {**config, "timestamp_id": trainer.timestamp_id})


def run_rank(config: dict[str, Any]) -> None:
    """Run the only rank, in this process."""
    own_port()
    KDRunner()(config)


def run_launched_rank(config: dict[str, Any]) -> None:
    """Run one of several ranks; what the user can mend goes to the launching process."""
    try:
        KDRunner()(config)
    except UserError as error:
        _tell(_SENTENCE, str(error))
        sys.exit(2)
    except Stopped as stop:
        _tell(_STOPPED, str(stop))  # and end well: a rank that fails has the others killed
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _tell(file: str, text: str) -> None:
    """Write for the launching process, whole; of several ranks one is heard."""
    path = Path(os.environ[file])
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text, "utf-8")
    part.replace(path)


@contextmanager
def sentence_of_ranks() -> Iterator[None]:
    """Raise a launched rank's UserError here, in place of all that elastic launch has to say.

    Ctrl-C in the block leaves the ranks to save and to end by themselves.

    Raises:
        Stopped: they have, after Ctrl-C.
        KeyboardInterrupt: by a second one, or before there was a step to save.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fairchem_kd_") as folder,
        ranks_stop_themselves() as interrupted,
    ):
        sentence, stopped = Path(folder) / "sentence", Path(folder) / "stopped"
        os.environ |= {_SENTENCE: str(sentence), _STOPPED: str(stopped)}
        # They report exit codes and where an exception came from; by then the rank has spoken.
        loggers = [
            logging.getLogger(f"torch.distributed.elastic.{name}")
            for name in ("multiprocessing.api", "agent.server.api")
        ]

        def unspoken(record: logging.LogRecord) -> bool:
            return not (sentence.exists() or interrupted())

        for logger in loggers:
            logger.addFilter(unspoken)
        try:
            yield
        except ChildFailedError:
            if sentence.exists():
                raise UserError(sentence.read_text("utf-8")) from None
            if interrupted():
                raise KeyboardInterrupt from None
            raise
        except SignalException as error:
            if error.sigval is signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        finally:
            del os.environ[_SENTENCE], os.environ[_STOPPED]
            for logger in loggers:
                logger.removeFilter(unspoken)
        if stopped.exists():
            raise Stopped(stopped.read_text("utf-8"))
