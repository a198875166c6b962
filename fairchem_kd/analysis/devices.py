"""Where an analysis runs."""

from __future__ import annotations

import torch

from fairchem_kd.denormals import flush_denormals


def choose_device(*, cpu: bool = False) -> torch.device:
    """CUDA where it is there and wanted, else the CPU, with denormals flushed as in training."""
    if torch.cuda.is_available() and not cpu:
        return torch.device("cuda")
    flush_denormals()
    return torch.device("cpu")
