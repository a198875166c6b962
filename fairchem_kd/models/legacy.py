"""Checkpoints of older releases, in the layout of fairchem-core 1.10.

What changed on the way from OCP (the ``ocpmodels`` package) to here:

- the model was a name, with its arguments beside it in ``model_attributes``;
- weights were saved inside one or two wrappers, ``module.`` or ``module.module.``;
- normalisers were called ``target`` and ``grad_target`` and held ``mean`` and ``std``, or stood in
  ``dataset`` only;
- outputs were not listed: the task's dataset format says which there are;
- PyTorch Geometric's SchNet had a buffer that nothing read, and summed with ``readout: add``.

Everything here leaves what it is given as it was, and returns a file of today as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fairchem_kd.errors import UserError

#: Names of the two targets before fairchem-core 1.0.
_TARGETS = {"target": "energy", "grad_target": "forces"}

#: What OCP's trainers handed to every model, and no model takes any more.
_GONE_ARGUMENTS = ("num_atoms", "bond_feat_dim", "num_targets")

#: Buffers that a model no longer has, by its name; nothing was computed from them.
_GONE_BUFFERS = {"schnet": ("atomic_mass",)}

#: The dataset format of IS2RE, whose label is the energy of the relaxed structure.
_RELAXED_FORMAT = "single_point_lmdb"

#: Keys of configs before fairchem-core 1.0.
_RENAMED = {"loss_fns": "loss_functions", "eval_metrics": "evaluation_metrics"}

_ENERGY: dict[str, Any] = {"level": "system"}


def modern(checkpoint: Mapping[str, Any], name: str = "the checkpoint") -> dict[str, Any]:
    """``checkpoint`` with its config, weights and normalisers laid out as fairchem-core 1.10 does.

    Args:
        checkpoint: what :func:`fairchem_kd.models.file.read_checkpoint` returned.
        name: what errors call it.

    Raises:
        UserError: its normalisers cannot be made out.
    """
    config = modern_config(checkpoint["config"])
    gone = _GONE_BUFFERS.get(str(config["model"].get("name")), ())
    state = without_wrappers(checkpoint["state_dict"])
    if any(key in state for key in gone):
        state = {key: value for key, value in state.items() if key not in gone}
    return {
        **checkpoint,
        "config": config,
        "state_dict": state,
        "normalizers": _normalizers(checkpoint, name),
    }


def modern_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with ``model`` as one block, and with ``outputs``."""
    new = dict(config)
    model, attributes = new["model"], new.pop("model_attributes", None)
    if isinstance(model, str):
        model = {**(attributes or {}), "name": model}
    if attributes is not None:
        model = {key: value for key, value in model.items() if key not in _GONE_ARGUMENTS}
        if model.get("name") == "schnet" and model.get("readout") == "add":
            model["readout"] = "sum"
    new["model"] = copy.deepcopy(dict(model))
    for old, key in _RENAMED.items():
        if old in new and not new.get(key):
            new[key] = new.pop(old)
    old_layout = not new.get("loss_functions")
    if not new.get("outputs"):
        forces = {"level": "atom", **_free_atoms(new.get("task") or {})}
        energy_only = _format(new) == _RELAXED_FORMAT or new.get("trainer") == "energy"
        new["outputs"] = {"energy": dict(_ENERGY)} | ({} if energy_only else {"forces": forces})
    if old_layout:
        new["loss_functions"] = _loss_functions(new)
        new["evaluation_metrics"] = _metrics(new)
        new["dataset"] = _dataset(new)
        new["trainer"] = "ocp"  # forces and energy, the two of OCP, are one now
    return new


def refuse_renamed_keys(config: Mapping[str, Any], where: str) -> None:
    """Refuse a training config with keys that fairchem-core 1.10 calls otherwise and ignores.

    Raises:
        UserError: naming the first of them and its name today.
    """
    for old, key in _RENAMED.items():
        if config.get(old) and not config.get(key):
            raise UserError(
                f"{where} has '{old}', which fairchem-core 1.x calls '{key}': rename it."
            )
    if isinstance(config.get("model"), str):
        raise UserError(
            f"{where} names its model as checkpoints of OCP did (model: {config['model']}): write "
            f"its arguments under model, with name: {config['model']} among them."
        )


def modern_training_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A training config as stock's trainer understands it, splits by name.

    OCP's configs list train, val and test under ``dataset``, and have ``task.dataset`` and
    coefficients under ``optim`` in place of ``loss_functions`` and ``outputs``. Stock's own
    function makes these out of them, as it does in a training with that config.

    Raises:
        UserError: it has keys of another release, or no losses.
    """
    from fairchem.core.common.utils import update_config

    refuse_renamed_keys(config, where)
    new = copy.deepcopy(dict(config))
    splits = new.get("dataset")
    if isinstance(splits, (list, tuple)):
        splits = dict(zip(("train", "val", "test"), splits, strict=False))
    if not isinstance(splits, Mapping) or not isinstance(splits.get("train"), Mapping):
        return new
    new["dataset"] = dict(splits)
    if not new.get("loss_functions") and (new.get("task") or {}).get("dataset"):
        try:
            new = {**update_config({**new, "dataset": splits["train"]})}
        except NotImplementedError:
            raise UserError(
                f"{where} is for the task dataset '{new['task']['dataset']}', which fairchem-core "
                "1.10 does not train: give a config with loss_functions and outputs."
            ) from None
        new["dataset"] = {**splits, "train": new["dataset"]}
    return new


def predicts_relaxed_energy(config: Mapping[str, Any]) -> bool:
    """Whether the labels were energies of relaxed structures (IS2RE), not of the given ones."""
    dataset = config.get("dataset")
    mapping = dataset.get("key_mapping") if isinstance(dataset, Mapping) else None
    return _format(config) == _RELAXED_FORMAT or "y_relaxed" in (mapping or {})


def scale_file(config: Mapping[str, Any]) -> str | None:
    """The ``scale_file`` that a checkpoint's config names, a path on the machine that trained it.

    None where it names none; a dictionary in its place counts as none.
    """
    model = modern_config(config)["model"]
    for block in (model, model.get("backbone")):
        if isinstance(block, Mapping) and isinstance(block.get("scale_file"), str):
            return block["scale_file"]
    return None


def _format(config: Mapping[str, Any]) -> str | None:
    task, dataset = config.get("task") or {}, config.get("dataset")
    return task.get("dataset") or (dataset.get("format") if isinstance(dataset, Mapping) else None)


def _free_atoms(task: Mapping[str, Any]) -> dict[str, bool]:
    return {
        "train_on_free_atoms": task.get("train_on_free_atoms", False),
        "eval_on_free_atoms": task.get("eval_on_free_atoms", True),
    }


def _loss_functions(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The losses that ``optim`` described, with OCP's defaults."""
    optim = config.get("optim") or {}
    losses = []
    for name, old, fn, coefficient in (
        ("energy", "energy", "mae", 1),
        ("forces", "force", "l2mae", 30),
    ):
        if name in config["outputs"]:
            weight = optim.get(f"{old}_coefficient", coefficient)
            losses.append({name: {"fn": optim.get(f"loss_{old}", fn), "coefficient": weight}})
    return losses


def _metrics(config: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: ["mae"] for name in config["outputs"]}
    primary = (config.get("task") or {}).get("primary_metric")
    known = primary in [f"{name}_mae" for name in metrics]
    return {"metrics": metrics, "primary_metric": primary if known else f"{[*metrics][-1]}_mae"}


def _dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dataset block with its format, and with what OCP's samples called the labels.

    OCPCalculator wants a ``src`` to remove, whatever it is.
    """
    dataset = config.get("dataset")
    given = dict(dataset) if isinstance(dataset, Mapping) else {}
    relaxed = _format(config) == _RELAXED_FORMAT
    mapping = {"y_relaxed": "energy"} if relaxed else {"y": "energy", "force": "forces"}
    return {"src": "", "key_mapping": mapping, **given, "format": _format(config) or "lmdb"}


def without_wrappers(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names as the bare model has them. DataParallel and DistributedDataParallel each add one."""
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _normalizers(checkpoint: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    saved = checkpoint.get("normalizers") or {}
    found = {_TARGETS.get(key, key): _normalizer(state, key, name) for key, state in saved.items()}
    dataset = checkpoint["config"].get("dataset")
    if found or not isinstance(dataset, Mapping) or not dataset.get("normalize_labels"):
        return found
    if "target_std" not in dataset:
        raise UserError(
            f"{name} was trained on normalised labels (dataset.normalize_labels), but neither its "
            "normalizers nor dataset.target_mean and target_std say with which numbers; add them "
            "to the file's config, or take another checkpoint of this run."
        )
    for old, key in _TARGETS.items():
        if f"{old}_std" in dataset:
            state = {"mean": dataset.get(f"{old}_mean", 0.0), "std": dataset[f"{old}_std"]}
            found[key] = _normalizer(state, old, name)
    return found


def _normalizer(state: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """``mean`` and ``rmsd``, tensors of no dimension."""
    if "rmsd" in state and isinstance(state["rmsd"], torch.Tensor):
        return dict(state)
    spread = state.get("rmsd", state.get("std", state.get("stdev")))
    if spread is None:
        raise UserError(
            f"{name} has a normaliser '{key}' without rmsd or std (it has "
            f"{', '.join(map(str, state)) or 'nothing'}); take another checkpoint of this run."
        )
    values = {}
    for part, value in (("mean", state.get("mean", 0.0)), ("rmsd", spread)):
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
        if tensor.numel() != 1:
            raise UserError(
                f"{name} has a normaliser '{key}' of {tensor.numel()} numbers, one per component; "
                "only models with one mean and one spread per target can be teachers."
            )
        values[part] = tensor.reshape(())
    return values
