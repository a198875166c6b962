"""A student as one file that needs torch alone: its network, traced by ``torch.export``.

A stock model makes its graph in its forward, by code that no tracing survives. So what is exported
is the network behind the graph: stock's own layers, one after the other as stock's forward has
them, on edges that are given. Who loads the file (:mod:`fairchem_kd.md.module`) makes the edges by
the rule that the file names (:mod:`fairchem_kd.models.module_file`).

    atom_energies[, forces] = network(numbers, source, target, vectors)

Energies are of the atoms, normalised, ``(N,)``; forces ``(N, 3)``, of a model with direct ones.
Gradient forces are left to the one who loads it: the slope with respect to ``vectors`` says them,
and the stress too.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from fairchem.core.models.painn.painn import PaiNN
from fairchem.core.models.schnet import SchNetWrap
from fairchem.core.modules.scaling import ScaleFactor
from torch import Tensor, nn

from fairchem_kd.errors import UserError
from fairchem_kd.files import plain, write_whole
from fairchem_kd.models.module_file import ABOUT, FORMAT
from fairchem_kd.models.units import Units
from fairchem_kd.stock.gradient_forces import has_gradient_forces


class PaiNNNetwork(nn.Module):
    """A stock PaiNN behind its graph.

    Args:
        model: with fitted scale factors, or with none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.atom_emb, self.radial_basis = model.atom_emb, model.radial_basis
        self.messages, self.updates = model.message_layers, model.update_layers
        self.out_energy = model.out_energy
        self.out_forces = model.out_forces if model.regress_forces else None
        scales = [getattr(model, f"upd_out_scalar_scale_{i}") for i in range(model.num_layers)]
        self.scales = [_factor(scale) for scale in scales]

    def forward(
        self, numbers: Tensor, source: Tensor, target: Tensor, vectors: Tensor
    ) -> tuple[Tensor, ...]:
        """Energies ``(N,)`` of the atoms, and direct forces ``(N, 3)``, both normalised.

        Args:
            numbers: atomic numbers ``(N,)``.
            source: ``(E,)``: where an edge starts.
            target: ``(E,)``: whom it tells.
            vectors: Å, ``(E, 3)``: from the target to the source.
        """
        distances = vectors.norm(dim=-1)
        units = vectors / distances[:, None]
        edge_rbf = self.radial_basis(distances)
        x = self.atom_emb(numbers)
        vec = torch.zeros_like(x)[:, None, :].expand(-1, 3, -1)
        for message, update, scale in zip(self.messages, self.updates, self.scales, strict=True):
            xh = message.x_proj(message.x_layernorm(x))
            told = message.message(xh[source], vec[source], message.rbf_proj(edge_rbf), units)
            dx, dvec = (_sums(one, target, like) for one, like in zip(told, (x, vec), strict=True))
            x, vec = (x + dx) * math.sqrt(0.5), vec + dvec
            dx, dvec = update(x, vec)
            x, vec = (x + dx) * scale, vec + dvec
        energies = self.out_energy(x).squeeze(1)
        if self.out_forces is None:
            return (energies,)
        for layer in self.out_forces.output_network:
            x, vec = layer(x, vec)
        return energies, vec.squeeze(2)


class SchNetNetwork(nn.Module):
    """A stock SchNet behind its graph.

    Args:
        model: whose energy is the sum over its atoms.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding, self.distance_expansion = model.embedding, model.distance_expansion
        self.interactions = model.interactions
        self.lin1, self.act, self.lin2 = model.lin1, model.act, model.lin2

    def forward(
        self, numbers: Tensor, source: Tensor, target: Tensor, vectors: Tensor
    ) -> tuple[Tensor, ...]:
        """As :meth:`PaiNNNetwork.forward`, without forces."""
        distances = vectors.norm(dim=-1)
        basis = self.distance_expansion(distances)
        h = self.embedding(numbers)
        for block in self.interactions:
            conv = block.conv
            fade = 0.5 * (torch.cos(distances * math.pi / conv.cutoff) + 1.0)
            x = conv.lin1(h)
            told = x[source] * (conv.nn(basis) * fade[:, None])
            h = h + block.lin(block.act(conv.lin2(_sums(told, target, x))))
        return (self.lin2(self.act(self.lin1(h))).squeeze(1),)


def _sums(values: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """``values`` of edges summed onto their targets, in the shape of ``like``."""
    return torch.zeros_like(like).index_add(0, target, values)


def _factor(scale: ScaleFactor) -> float:
    """By what a scale factor multiplies; one that was never fitted by nothing."""
    return float(scale.scale_factor) if scale.fitted else 1.0


def network_of(model: nn.Module, name: str) -> nn.Module:
    """The network of a stock model behind its graph.

    Args:
        model: bare, on the CPU.
        name: of its file, for errors.

    Raises:
        UserError: there is none for such a model.
    """
    if not getattr(model, "use_pbc", False):
        if isinstance(model, PaiNN | SchNetWrap):
            raise UserError(
                f"{name} makes its graphs without periodicity (model.use_pbc: false), which no "
                "module does: hand the checkpoint itself on."
            )
    elif isinstance(model, PaiNN):
        gradient = model.regress_forces and not model.direct_forces
        if gradient:
            raise UserError(
                f"{name} takes forces from its node features (regress_forces: true with "
                "direct_forces: false), which are the slope of no energy: train it with "
                "task.conservative."
            )
        return PaiNNNetwork(model)
    elif isinstance(model, SchNetWrap):
        if model.reduce not in ("sum", "add"):
            raise UserError(
                f"{name} is a SchNet whose energy is the {model.reduce} over its atoms, and a "
                "module knows sums alone: hand the checkpoint itself on."
            )
        return SchNetNetwork(model)
    raise UserError(
        f"{name} is a {type(model).__name__}, and modules are made of PaiNN and SchNet alone: hand "
        "the checkpoint itself on."
    )


def about(
    model: Any, units: Units, elements: Collection[int] | None, outputs: Collection[str]
) -> dict[str, Any]:
    """What :mod:`fairchem_kd.models.module_file` says that stands beside the network.

    Args:
        model: one that :func:`network_of` takes.
        units: its normalisers and element references.
        elements: atomic numbers that it was trained on; None where that is not known.
        outputs: what its config has it predict.
    """
    painn = isinstance(model, PaiNN)
    scale, shift = _scale_and_shift(units, "energy")
    references = units.elementrefs.get("energy")
    values = [] if references is None else references.element_references.double().tolist()
    forces: dict[str, Any] | None = None
    if "forces" in outputs:
        of_head = painn and not has_gradient_forces(model)
        forces = {"from": "head" if of_head else "energy"}
        forces["scale"], forces["shift"] = _scale_and_shift(units, "forces")
        if has_gradient_forces(model):  # eV of the energy, whatever the forces' normaliser
            forces["scale"] = scale
    embedding = model.atom_emb.embeddings if painn else model.embedding
    return {
        "format": FORMAT,
        "model": "painn" if painn else "schnet",
        "graph": {
            "cutoff": float(model.cutoff),
            "max_neighbors": int(model.max_neighbors),
            "both_ways": painn,
        },
        "outputs": ["atom_energies", *(["forces"] if forces and forces["from"] == "head" else [])],
        "energy": {"scale": scale, "shift": shift, "references": values},
        "forces": forces,
        "elements": None if elements is None else sorted(elements),
        # PaiNN's embedding begins with hydrogen, SchNet's with an atom that is none
        "numbers": embedding.num_embeddings - (0 if painn else 1),
        "torch": torch.__version__,
    }


def _scale_and_shift(units: Units, name: str) -> tuple[float, float]:
    normalizer = units.normalizers.get(name)
    if normalizer is None:
        return 1.0, 0.0
    return float(normalizer.rmsd), float(normalizer.mean)


def write_module(network: nn.Module, told: dict[str, Any], path: Path) -> None:
    """Trace a network and write it, whole or not at all.

    Args:
        network: of :func:`network_of`.
        told: of :func:`about`.
        path: ``NAME.pt2``.

    Raises:
        UserError: this version of torch cannot.
    """
    network = network.eval().requires_grad_(requires_grad=False)
    chance = torch.Generator().manual_seed(0)
    atoms, edges = 5, 17
    given = (
        torch.ones(atoms, dtype=torch.int64),
        torch.randint(atoms, (edges,), generator=chance),
        torch.randint(atoms, (edges,), generator=chance),
        torch.randn(edges, 3, generator=chance),
    )
    number = {0: torch.export.Dim("atoms")}
    edge = {0: torch.export.Dim("edges")}
    try:
        with warnings.catch_warnings():  # of torch's own internals
            warnings.simplefilter("ignore")
            traced = torch.export.export(
                network, given, dynamic_shapes=(number, edge, edge, edge), strict=False
            )
            text = json.dumps(plain(told), indent=1)
            made = io.BytesIO()
            torch.export.save(traced, made, extra_files={ABOUT: text})
    except Exception as error:
        raise UserError(
            f"torch {torch.__version__} cannot export this network ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no more is said'}): take another "
            "version of torch, or hand the checkpoint itself on."
        ) from error
    write_whole(path, lambda file: file.write(made.getvalue()))
