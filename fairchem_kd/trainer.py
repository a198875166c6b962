"""The trainer by its first name, ``fairchem_kd.trainer.DistillationTrainer``, for configs."""

from fairchem_kd.distillation.trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
