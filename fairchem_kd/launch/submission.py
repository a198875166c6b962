"""What a job asks of a scheduler, through submitit, and what a scheduler has against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fairchem_kd.errors import UserError


class Executor(AutoExecutor):
    """submitit's executor, for jobs of ranks that meet, and that may be interrupted.

    It takes what stock's ``main`` asks for and makes of it what a cluster has to be told:

    - no GPUs with ``--cpu``; and none twice where the config's ``slurm:`` block asks for them;
    - ``slurm:`` before everything else, whether its options are spelt with ``-`` or ``_``;
    - that the job may be requeued, whatever the cluster's default;
    - each rank's CPUs to ``srun`` as well, which has not taken them from the job since SLURM
      22.05, and would bind a rank and its data loaders to one;
    - that all ranks end when one of them fails, instead of waiting for it.

    Args:
        folder: of logs and submitit's files, with ``%j`` for the job.
        cpu: the ranks want no GPUs.
        more: further arguments of submitit's.
    """

    def __init__(self, folder: str | Path, *, cpu: bool = False, **more: Any) -> None:
        super().__init__(folder=folder, **more)
        self.cpu = cpu

    @property
    def is_local(self) -> bool:
        """Whether there is no scheduler here, and jobs are processes of this machine."""
        return self.cluster == "local"

    def update_parameters(self, **parameters: Any) -> None:
        """submitit's, after what the class says."""
        given = sbatch_options(parameters.pop("slurm_additional_parameters", None))
        cpus = given.get("cpus_per_task", parameters.get("cpus_per_task", 1))
        if self.cpu:
            parameters["gpus_per_node"] = 0 if self.is_local else None
        elif any("gpu" in f"{name} {given.get(name)}" for name in _ASK_FOR_GPUS if name in given):
            parameters["gpus_per_node"] = None
        super().update_parameters(
            **parameters,
            slurm_additional_parameters=given,
            slurm_srun_args=[f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        )


_ASK_FOR_GPUS = ("gres", "gpus", "gpus_per_task", "gpus_per_socket")


def sbatch_options(block: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config's ``slurm:`` block as submitit spells options, and requeueing with it.

    Options that are null or false are left out.
    """
    given = {str(key).replace("-", "_"): value for key, value in (block or {}).items()}
    if given.get("requeue", True) is False:
        given["no_requeue"] = True
    if not given.get("no_requeue"):
        given["requeue"] = True
    return {key: value for key, value in given.items() if value is not None and value is not False}


@contextmanager
def refusals_told(nodes: int, executor: AutoExecutor | None = None) -> Iterator[None]:
    """Within the block, what a scheduler has against a job is raised as a sentence.

    Args:
        nodes: that are asked for.
        executor: the one that submits; None: submitit's choice.

    Raises:
        UserError: a job is refused, or several nodes are asked for where there is no scheduler.
    """
    cluster = AutoExecutor.which() if executor is None else executor.cluster
    if nodes > 1 and cluster == "local":
        raise UserError(
            f"--num-nodes {nodes}: there is no scheduler here, and without one --submit runs jobs "
            "on this machine alone; leave out --num-nodes, or submit where sbatch is."
        )
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ") for line in str(error).splitlines()]
        reason = "; ".join(line.removeprefix("error: ") for line in lines if line.strip())
        raise UserError(
            f"the scheduler refused the job: {reason or 'it gave no reason'} (what was asked for "
            "comes from --num-gpus, --num-nodes, the --slurm-* flags and the config's slurm block)."
        ) from error
