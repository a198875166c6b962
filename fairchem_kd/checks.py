"""What a batch must hold before a model sees it, checked while it is still in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from torch_geometric.data import Batch


def check_finite(batch: Batch, targets: tuple[str, ...]) -> None:
    """Refuse NaN or infinity in positions and labels, naming the structure.

    A batch that is on a GPU already is not looked at: that would wait for the device.

    Raises:
        UserError: the first structure (its sid and fid) with such a value.
    """
    for key in ("pos", "cell", *targets):
        values = batch.get(key) if key in batch else None
        if not isinstance(values, torch.Tensor) or values.is_cuda:
            continue
        finite = torch.isfinite(values.reshape(values.shape[0], -1)).all(dim=1)
        if bool(finite.all()):
            continue
        row = int((~finite).nonzero()[0])
        system = int(batch.batch[row]) if len(values) == len(batch.batch) else row
        what = {"pos": "positions", "cell": "cell"}.get(key, f"{key} label")
        raise UserError(
            f"The {what} of structure {_name(batch, system)} of the dataset is not finite (NaN or "
            "infinity): remove or mend the sample and start again."
        )


def _name(batch: Batch, system: int) -> str:
    """``sid 12, fid 3`` of one structure of a batch, as far as the dataset names it."""
    words = [
        f"{key} {value[system]}"
        for key in ("sid", "fid")
        if key in batch and (value := batch[key]) is not None and len(value) > system
    ]
    return ", ".join(words).replace("tensor(", "").replace(")", "") or f"{system} of its batch"
