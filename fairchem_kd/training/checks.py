"""What a batch must hold before a model sees it, checked while it is still in host memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fairchem_kd.errors import UserError
from fairchem_kd.stock.neighbours import name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch_geometric.data import Batch


#: What OCP's data sets call their labels.
_OLD_LABELS = {"energy": ("y", "y_relaxed"), "forces": ("force",)}


def check_labels(sample: Any, targets: Iterable[str], where: str) -> None:
    """Refuse a data set whose samples lack a label that a loss is for.

    Args:
        sample: one of them, with ``key_mapping`` and transforms applied.
        targets: of the losses.
        where: the data set's key in the config.

    Raises:
        UserError: naming the label, and the keys that may be it under another name.
    """
    missing = [name for name in targets if name not in sample]
    if not missing:
        return
    held = [str(key) for key in sample.to_dict()]
    old = {key: name for name in missing for key in _OLD_LABELS.get(name, ()) if key in held}
    if old:
        pairs = ", ".join(f"{key}: {name}" for key, name in old.items())
        mend = f"set {where}.key_mapping: {{{pairs}}}"
    else:
        mend = (
            f"name the key that holds it in {where}.key_mapping, or for ASE's formats set "
            f"{where}.a2g_args: {{r_energy: true, r_forces: true}}"
        )
    raise UserError(
        f"The samples of {where} have no '{missing[0]}' to train on (they have {', '.join(held)}): "
        f"{mend}."
    )


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
            f"The {what} of structure {name_of(batch, system)} of the dataset is not finite (NaN "
            "or infinity): remove or mend the sample and start again."
        )


def refuse_unlearned(model: torch.nn.Module, error: RuntimeError) -> None:
    """Say what DistributedDataParallel means by a reduction that has not finished.

    Args:
        model: after a step.
        error: of its next forward.

    Raises:
        UserError: no loss reaches some parameters.
    """
    if "Expected to have finished reduction" not in str(error):
        return
    left = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    shown = ", ".join(name.removeprefix("module.") for name in left[:3])
    raise UserError(
        f"No loss reaches {len(left)} of the model's parameters ({shown}): add a loss on what they "
        "predict to loss_functions, or have the model predict what is learned alone "
        "(model.regress_forces: false where no forces are)."
    ) from error


def none_free(batch: Batch) -> bool:
    """Whether every atom of a batch in host memory is fixed."""
    fixed = batch.get("fixed")
    return fixed is not None and not fixed.is_cuda and bool((fixed != 0).all())


def refuse_none_free(batch: Batch, outputs: Mapping[str, Mapping[str, Any]], key: str) -> None:
    """Refuse a batch without a free atom, where an output is compared on free atoms alone.

    Args:
        batch: of which every atom is fixed.
        outputs: the trainer's ``output_targets``.
        key: ``train_on_free_atoms`` or ``eval_on_free_atoms``.

    Raises:
        UserError: naming the first structure.
    """
    for name, output in outputs.items():
        if output.get("level") == "atom" and output.get(key):
            raise UserError(
                f"No atom is free in a batch of {len(batch.natoms)} structures (the first is "
                f"{name_of(batch, 0)}), and outputs.{name}.{key} leaves fixed atoms out: leave out "
                f"structures that are fixed as a whole, or set outputs.{name}.{key}: false."
            )


def refuse_divergence(metrics: Mapping[str, Mapping[str, float]], step: int) -> None:
    """Refuse to take a step whose loss or errors are not finite.

    Stock turns predictions that are not finite into 0 and goes on, so that its loss shows nothing.
    The numbers are those that stock has read from the device for its log.

    Raises:
        UserError: with what to do.
    """
    for name, metric in metrics.items():
        value = metric.get("metric", 0.0)
        if (name == "loss" or name.endswith(("_mae", "_mse"))) and not math.isfinite(value):
            raise UserError(
                f"Step {step}: {name} is {value}, so the training has diverged, and this step is "
                f"not taken. {_MEND}"
            )


def refuse_gradients(parameters: Iterable[torch.nn.Parameter], step: int) -> None:
    """Refuse to take a step with gradients that are not finite.

    Raises:
        UserError: with what to do.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
        raise UserError(
            f"Step {step}: gradients are NaN or infinite, so the training has diverged, and this "
            f"step is not taken. {_MEND}"
        )


_MEND = (
    "What was saved before stays as it is: take a smaller optim.lr_initial or a warm-up, give "
    "optim.clip_grad_norm, and look for labels or structures that are out of the ordinary."
)
