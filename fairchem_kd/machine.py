"""The machine: cores, device, precisions, and denormal numbers, flushed to zero on CPUs.

The tails of a Gaussian radial basis are denormal numbers, on which the arithmetic of some
processors is many times slower and that of others is not. The flag belongs to a thread and is
inherited by the threads that it starts, so it has to be set before the first parallel region of a
process, and once more in every data-loader worker.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FP32 = "fp32"
#: How a teacher may compute: ``tf32`` lets NVIDIA's GPUs multiply matrices so, and is fp32 anywhere
#: else; ``bf16`` is torch's autocast.
PRECISIONS = (FP32, "tf32", "bf16")


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine's under taskset or a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def denormals_are_flushed() -> bool:
    """Whether this thread takes denormal numbers for zero, on which speed on a CPU depends."""
    import torch

    return (torch.tensor([1e-40]) * torch.tensor([0.5])).item() == 0


def flush_denormals(enabled: bool = True) -> None:
    """Set the flag for this thread and for those that it starts (no-op where unsupported)."""
    import torch

    torch.set_flush_denormal(enabled)


def flush_worker(worker_id: int) -> None:
    """Set the flag in a data-loader worker; a module-level function, so that it pickles."""
    flush_denormals()


def choose_device(*, cpu: bool = False) -> torch.device:
    """CUDA where it is there and wanted, else the CPU, with denormals flushed as in training."""
    import torch

    if torch.cuda.is_available() and not cpu:
        return torch.device("cuda")
    flush_denormals()
    return torch.device("cpu")


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be had on a device; None where nobody says."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [_available(), _left_to_group("memory.max", "memory.current")]
    return min((one for one in found if one is not None), default=None)


def _available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_to_group(limit: str, used: str) -> int | None:
    """What a container or a job of a scheduler may still take, where it has a limit."""
    try:
        folder = Path("/sys/fs/cgroup")
        most, taken = ((folder / name).read_text("utf-8") for name in (limit, used))
        return max(0, int(most) - int(taken))
    except (OSError, ValueError):  # none, or "max"
        return None
