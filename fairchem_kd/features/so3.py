"""What EquiformerV2, eSCN and eSEN have in common: states that are irreps of SO(3).

A state of an atom is ``(K, C)``: C channels of the coefficients of all degrees l up to a highest,
one after the other, 2l + 1 each, in e3nn's order and orientation. There a degree 1 is (x, y, z), so
that its three coefficients are a vector as they stand; a degree 0 is a scalar. Where a model has
several resolutions, the coefficients of each follow those of the one before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fairchem_kd.features.architecture import (
    MEAN_READOUT,
    Architecture,
    Emit,
    Graph,
    Handle,
    wrap_method,
)

#: Attaches to a module, and reads what it is given off the whole state ``(N, K, C)``.
Read = Callable[[Callable[[Tensor], Tensor]], Callable[[Emit], Handle]]


class Irreps(NamedTuple):
    """Where degrees stand in a state."""

    highest: tuple[int, ...]  # degree, of each resolution
    channels: int  # of each resolution

    @property
    def _starts(self) -> list[tuple[int, int]]:
        starts, start = [], 0
        for degree in self.highest:
            starts.append((start, degree))
            start += (degree + 1) ** 2
        return starts

    def scalars(self, state: Tensor) -> Tensor:
        """Degree 0, ``(N, K, C)`` to ``(N, channels of all resolutions)``; a copy.

        A view would keep all K coefficients in memory for as long as one of them is held.
        """
        return torch.cat([state[:, start] for start, _ in self._starts], dim=-1)

    def vectors(self, state: Tensor) -> Tensor:
        """Degree 1, ``(N, K, C)`` to ``(N, 3, channels of the resolutions that have it)``."""
        parts = [state[:, start + 1 : start + 4] for start, degree in self._starts if degree]
        return torch.cat(parts, dim=-1)

    @property
    def scalar_channels(self) -> int:
        return len(self.highest) * self.channels

    @property
    def vector_channels(self) -> int:
        return sum(degree > 0 for degree in self.highest) * self.channels


def on_messages(
    convolution: nn.Module, read: Callable[[Tensor], Tensor]
) -> Callable[[Emit], Handle]:
    """Attach to the messages ``(E, K, C)`` that a layer makes of the output of ``convolution``.

    EquiformerV2 and eSCN weigh that output and turn it back in place, and then have it summed by
    its own method; so it is read when that is called.
    """

    def attach(emit: Emit) -> Handle:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            reduce = output._reduce_edge

            def once(*args: Any, **kwargs: Any) -> None:
                # a circle of references ends; two may wait for the same messages
                vars(output).pop("_reduce_edge", None)
                emit(read(output.embedding))
                reduce(*args, **kwargs)

            vars(output)["_reduce_edge"] = once

        return convolution.register_forward_hook(hook)

    return attach


class SphericalFeatures(Architecture):
    """Scalars (l = 0) and vectors (l = 1) of the states, and scalars of the messages.

    These models turn each edge into a frame of its own, of which one angle is drawn anew in every
    forward, from the global random generator.
    """

    draws_numbers: ClassVar[bool] = True

    @property
    @abstractmethod
    def irreps(self) -> Irreps:
        """Of the states."""

    @property
    def atom_embedding(self) -> nn.Module:
        return self.backbone.sphere_embedding

    @property
    def num_elements(self) -> int:
        return self.backbone.sphere_embedding.num_embeddings - 1  # row 0 is no element

    def add_states(
        self, last: tuple[str, Read], layers: Sequence[tuple[str, Read]], vectors: int | None
    ) -> None:
        """Offer ``node``, ``vector`` and those of each layer.

        Args:
            last: in words and as it is read, what the heads take in.
            layers: the same of the state before the first layer and after each.
            vectors: the layer whose vectors are the default; None: those that the heads take in.
        """
        irreps = self.irreps
        nodes = [read(irreps.scalars) for _, read in layers]
        words, read = last
        same = next((k for k, (_, one) in enumerate(layers) if one is read), None)
        node = read(irreps.scalars) if same is None else nodes[same]
        self.add("node", "node", irreps.scalar_channels, f"l = 0 of {words}", node)
        turning = []
        if irreps.vector_channels:
            turning = [one(irreps.vectors) for _, one in layers]
            chosen = same if vectors is None else vectors
            vector = read(irreps.vectors) if chosen is None else turning[chosen]
            words = words if chosen is None else layers[chosen][0]
            self.add("vector", "vector", irreps.vector_channels, f"l = 1 of {words}", vector)
        else:
            self.absent["vector"] = "the highest degree of this model is l = 0, which has none"
        for k, ((words, _), attach) in enumerate(zip(layers, nodes, strict=True)):
            self.add(f"node@{k}", "node", irreps.scalar_channels, f"l = 0 of {words}", attach)
        for k, attach in enumerate(turning):
            if self.turns_from <= k:
                words = layers[k][0]
                self.add(
                    f"vector@{k}", "vector", irreps.vector_channels, f"l = 1 of {words}", attach
                )

    #: the first layer after which the states have more than l = 0
    turns_from: ClassVar[int] = 0

    def add_messages(
        self, channels: int, layers: Sequence[Callable[[Emit], Handle]], recomputed: bool
    ) -> None:
        """Offer ``edge`` and those of each layer.

        Args:
            channels: of the messages.
            layers: what reads those of each layer.
            recomputed: whether layers forget their messages, and make them again for a gradient.
        """
        if recomputed:
            self.absent["edge"] = (
                "with activation checkpointing its messages are not kept; switch that off"
            )
            return
        words = "l = 0 of the messages of layer {}, before they are summed onto their target atoms"
        self.add("edge", "edge", channels, words.format(len(layers)), layers[-1])
        for k, attach in enumerate(layers, start=1):
            self.add(f"edge@{k}", "edge", channels, words.format(k), attach)

    def add_readouts(self, name: str, factor: float, select: Callable[[Any], Tensor]) -> None:
        """Offer what atoms give to the outputs whose heads have a module ``name``.

        Args:
            name: of the module.
            factor: by which the sum over atoms is multiplied.
            select: takes ``(N, 1)`` out of what it gives.
        """
        sums, means = self._readouts(name)
        if sums:
            self.add_atom_energies(sums, lambda output: factor * select(output))
        elif means:
            self.absent["atom_energy"] = MEAN_READOUT

    def _readouts(self, name: str) -> tuple[dict[str, nn.Module], list[str]]:
        """By output those that are summed, and the names of those that are averaged."""
        owners: Mapping[str, nn.Module] = getattr(self.root, "output_heads", {"energy": self.root})
        reduced = {
            getattr(head, name, None): getattr(head, "reduce", "sum") for head in owners.values()
        }
        modules = self.heads(name, "energy")
        sums = {key: module for key, module in modules.items() if reduced[module] == "sum"}
        return sums, [key for key in modules if key not in sums]

    def watch_graph(self, emit: Callable[[Graph], None]) -> Handle:
        def receive(graph: Any) -> None:
            made = graph if isinstance(graph, dict) else vars(graph)
            # fairchem's vectors point from the target to the source
            unit = -made["edge_distance_vec"] / made["edge_distance"][:, None]
            emit(Graph(made["edge_index"], unit, made["cell_offsets"]))

        return wrap_method(self.backbone, "generate_graph", receive)
