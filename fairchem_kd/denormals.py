"""Denormal numbers on CPUs, flushed to zero.

The tails of a Gaussian radial basis are denormal numbers, on which the arithmetic of some
processors is many times slower and that of others is not: ``benchmarks/flush_denormal.py`` tells
(on an AMD EPYC of the Zen 4 kind there is no difference). The flag belongs to a thread and is
inherited by the threads that it starts, so it has to be set before the first parallel region of a
process, and once more in every data-loader worker.
"""

from __future__ import annotations

import torch


def flush_denormals(enabled: bool = True) -> None:
    """Set the flag for this thread and for those that it starts (no-op where unsupported)."""
    torch.set_flush_denormal(enabled)


def flush_worker(worker_id: int) -> None:
    """Set the flag in a data-loader worker; a module-level function, so that it pickles."""
    flush_denormals()
