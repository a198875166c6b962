"""Forces that are the slope of a stock model's energy, which makes it a potential.

Stock's PaiNN without a head for forces differentiates the sum of its node features in place of its
energy. So a stock model that predicts energies alone (``regress_forces: false``) is taken, and its
energy is differentiated here. Its weights, and so its checkpoints, stay stock's.

Stock's other models differentiate the normalised energy and leave it to the config to give both
normalisers one ``rmsd``; with two, their forces are the slope of another energy than theirs. Here
both are looked at, so that forces in eV/Å are the slope of energies in eV whatever they are.

An energy that jumps has no slope there. Stock's PaiNN lets a neighbour's message fade towards the
cutoff, but for a bias, with which its energy jumps when an atom comes into reach. It starts at 0,
and a training here leaves it there.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrap
from fairchem.core.models.esen.esen import eSEN_Backbone
from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC
from fairchem.core.models.painn.painn import PaiNN
from fairchem.core.models.schnet import SchNetWrap
from torch import Tensor, nn

from fairchem_kd.errors import UserError
from fairchem_kd.stock.conservative import WHERE, refuse_own_forces

if TYPE_CHECKING:
    from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
    from fairchem.core.modules.normalization.normalizer import Normalizer
    from torch_geometric.data import Batch

#: Whose energy depends on the positions through differentiable operations alone; of models that
#: detach rotations of edges, the gradient would lack a part without a word.
DIFFERENTIABLE: tuple[type[nn.Module], ...] = (PaiNN, SchNetWrap, GemNetOC, DimeNetPlusPlusWrap)
SAME = 1e-4  #: by which factors of the two normalisers may differ


def give_gradient_forces(model: nn.Module, normalizers: Mapping[str, Normalizer]) -> None:
    """Have a stock model of energies give ``forces`` too: minus the slope of its energy.

    ``model`` keeps its parameters and its ``state_dict``. Under ``no_grad`` it gives forces without
    a graph, otherwise ones that can be differentiated again.

    Args:
        model: bare, with ``regress_forces: false``; one that gives such forces already is left.
        normalizers: of ``energy`` and ``forces``, where there are any; looked at in each forward,
            since a trainer fills them later.

    Raises:
        UserError: it makes forces itself, or its energy is not known to be differentiable.
    """
    if has_gradient_forces(model):
        return
    if not isinstance(model, DIFFERENTIABLE):
        names = ", ".join(one.__name__.removesuffix("Wrap") for one in DIFFERENTIABLE)
        raise UserError(
            f"{WHERE} is known to be right for {names}, and not for {type(model).__name__}, parts "
            "of which may not be differentiated: take one of these, or take the key out."
        )
    refuse_own_forces(getattr(model, "regress_forces", True), "model.regress_forces")
    if isinstance(model, GemNetOC) and model.direct_forces:
        raise UserError(
            f"model.direct_forces is not false, so that a GemNet-OC has a head for forces that "
            f"{WHERE} leaves without a use: set model.direct_forces: false."
        )
    for bias in _jumps(model):
        bias.register_hook(torch.zeros_like)
    stock: Any = type(model)
    model.__class__ = _with_forces(stock)
    model._normalizers_of_forces = normalizers  # type: ignore[assignment]


@torch.no_grad()
def close_at_cutoff(model: nn.Module, ema: ExponentialMovingAverage | None) -> None:
    """Take out of weights that were loaded with what an energy jumps at the cutoff.

    Args:
        model: bare; nothing happens to one without forces from :func:`give_gradient_forces`.
        ema: the averages of its weights, where there are any.
    """
    jumps = list(_jumps(model)) if has_gradient_forces(model) else []
    if not any(bool(bias.any()) for bias in jumps):
        return
    logging.info(
        "The weights are of a PaiNN whose energy jumps when an atom comes into reach (the bias of "
        "its message_layers.*.rbf_proj): that is set to 0, and the training makes up for it."
    )
    for bias in jumps:
        bias.zero_()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, average in zip(trained, ema.shadow_params if ema else (), strict=False):
        if any(parameter is bias for bias in jumps):
            average.zero_()


def _jumps(model: nn.Module) -> Iterator[nn.Parameter]:
    """What a PaiNN's messages have left of a neighbour at the cutoff."""
    for layer in model.message_layers if isinstance(model, PaiNN) else ():
        yield layer.rbf_proj.bias


def has_gradient_forces(model: nn.Module) -> bool:
    """Whether its forces come from :func:`give_gradient_forces`."""
    return isinstance(model, _GradientForces)


def forces_are_slopes(model: nn.Module) -> bool:
    """Whether a model is known to take its forces from its energy, its own way or ours.

    Args:
        model: bare; of a hydra its backbone.
    """
    if has_gradient_forces(model):
        return True
    direct = getattr(model, "direct_forces", False) or not getattr(model, "regress_forces", False)
    # eSEN detaches rotations of edges only where it has a head for forces
    return isinstance(model, (*DIFFERENTIABLE, eSEN_Backbone)) and not direct


@contextmanager
def strained(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, a forward leaves the slopes of its energy with strain in what is yielded.

    One tensor ``(B, 3, 3)``, symmetric, in normalised energy; over the volume that is the stress.
    The graph has to follow ``strain`` of the batch, as
    :class:`~fairchem_kd.stock.reused_graphs.ReusedGraphs` does.

    Args:
        model: one of :func:`give_gradient_forces`.
    """
    found: list[Tensor] = []
    held: Any = model
    held._strain_slopes = found
    try:
        yield found
    finally:
        held._strain_slopes = None


def check_gradient_forces(model: nn.Module, normalizers: Mapping[str, Normalizer]) -> None:
    """Refuse normalisers with which gradient forces are no slope, or tell of stock's that are not.

    Args:
        model: bare.
        normalizers: those that it is trained with.

    Raises:
        UserError: the normaliser of forces shifts them, and ``task.conservative`` is asked for.
    """
    forces = normalizers.get("forces")
    if has_gradient_forces(model):
        if forces is not None and float(forces.mean.abs().max()) > 0:
            raise UserError(
                "dataset.train.transforms.normalizer.forces has the mean "
                f"{float(forces.mean.reshape(-1)[0]):g}, and forces that are shifted are the slope "
                f"of no energy, which {WHERE} asks for: set that mean to 0."
            )
        return
    if not forces_are_slopes(getattr(model, "backbone", model)):
        return
    ratio = 1.0 / float(_scale(normalizers))
    if abs(ratio - 1.0) > SAME:
        logging.warning(
            f"The model's forces are the slope of its normalised energy, and are {ratio:.3g} times "
            "that of its energy in eV, so that no weights get both right: give energy and forces "
            "one rmsd (dataset.train.transforms.normalizer), or set model.regress_forces: false "
            f"with {WHERE}: true, which minds both."
        )


def _scale(normalizers: Mapping[str, Normalizer]) -> Tensor:
    """What turns slopes of the normalised energy into normalised forces: ``rmsd`` over ``rmsd``."""
    one = torch.ones(())
    energy, forces = (normalizers.get(name) for name in ("energy", "forces"))
    above = one if energy is None else energy.rmsd
    below = one if forces is None else forces.rmsd
    return (above / below).reshape(())


class _GradientForces(nn.Module):
    """Put before a stock model's class: its ``forward`` with forces."""

    _normalizers_of_forces: Mapping[str, Normalizer]
    _strain_slopes: list[Tensor] | None = None

    def forward(self, data: Batch) -> dict[str, Tensor]:
        """Stock's outputs, and ``forces``: ``(N, 3)``, normalised as the trainer's are."""
        twice = torch.is_grad_enabled()
        view = copy.copy(data)  # the caller's stays as it is
        with torch.enable_grad():
            if not data.pos.requires_grad:
                view.pos = data.pos.detach().requires_grad_(True)
            ends = [view.pos]
            if self._strain_slopes is not None:
                ends.append(_strain(view))
            out = super().forward(view)
            slope, *more = torch.autograd.grad(out["energy"].sum(), ends, create_graph=twice)
        if self._strain_slopes is not None:
            self._strain_slopes[:] = [(one + one.mT).detach() / 2 for one in more]
        if not twice:
            out = {k: v.detach() if isinstance(v, Tensor) else v for k, v in out.items()}
        return {**out, "forces": -_scale(self._normalizers_of_forces).to(slope.dtype) * slope}

    def generate_graph(self, *args: Any, **options: Any) -> Any:
        """Stock's graph, whose distances may be written to.

        Stock's PaiNN does, and without periodicity autograd would still need them as they were.
        """
        graph = super().generate_graph(*args, **options)  # type: ignore[misc]
        graph.edge_distance = graph.edge_distance.clone()
        return graph


def _strain(view: Batch) -> Tensor:
    """Have a batch's positions strained by nothing, ``(B, 3, 3)``, which is also its ``strain``."""
    strain = view.pos.new_zeros(len(view.natoms), 3, 3).requires_grad_(True)
    view.strain = strain  # for whoever makes the graph: images are strained as well
    view.pos = view.pos + (view.pos[:, None] @ strain[view.batch]).squeeze(1)
    return strain


@functools.cache
def _with_forces(cls: Any) -> Any:
    """The stock class with gradient forces, under its own name."""
    return type(cls.__name__, (_GradientForces, cls), {"__module__": cls.__module__})
