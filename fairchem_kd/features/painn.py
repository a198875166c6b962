"""Features of fairchem's PaiNN (Schütt et al. 2021, arXiv 2102.03150).

Message and update layers return increments, so the states are read where they are whole: as the
inputs of the next layer. fairchem's ``edge_vector`` points from ``edge_index[1]``, the target, to
``edge_index[0]``, and is turned round here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairchem.core.models.painn.painn import PaiNN
from torch import Tensor, nn

from fairchem_kd.features.architecture import (
    Architecture,
    Emit,
    Graph,
    Handle,
    on_input,
    on_output,
    register_architecture,
    wrap_method,
)


def edge_products(vectors: Tensor, graph: Graph) -> Tensor:
    """Dot products over xyz of the two end atoms' vectors, ``(N, 3, C)`` to ``(E, C)``.

    One component at a time, so that there is no (E, 3, C) tensor in between.
    """
    source, target = graph.edge_index
    products = [x.index_select(0, source) * x.index_select(0, target) for x in vectors.unbind(1)]
    return products[0] + products[1] + products[2]


def _after_update(update: nn.Module) -> Callable[[Emit], Handle]:
    """Vectors after an update layer that no other layer follows: what went in + increment."""

    def attach(emit: Emit) -> Handle:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            emit(args[1] + output[1])

        return update.register_forward_hook(hook)

    return attach


@register_architecture
class PaiNNFeatures(Architecture):
    """Scalars and vectors after each message and update layer, and edge features made of vectors.

    ``node`` is the state after the last update layer. So are ``vector`` and ``edge`` in a model
    with direct forces; in others the last update's vectors never reach an output, and those weights
    are never trained, so that the default is the layer before.
    """

    model_class = PaiNN

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        width, layers = model.hidden_channels, len(model.update_layers)
        nodes = {0: on_output(model.atom_emb)}
        vectors = {}
        for k in range(1, layers + 1):
            nodes[k] = on_output(getattr(model, f"upd_out_scalar_scale_{k - 1}"))
            if k < layers:
                vectors[k] = on_input(model.message_layers[k], 1)
            else:
                vectors[k] = _after_update(model.update_layers[k - 1])
        default = layers if self.heads("out_forces", "forces") else layers - 1

        self.add("node", "node", width, "x after the last update layer", nodes[layers])
        products = "scalar products, per channel, of the end atoms' vec"
        if default:
            after = f"after update layer {default}"
            self.add("vector", "vector", width, f"vec {after}", vectors[default])
            self.add("edge", "edge", width, f"{products} {after}", vectors[default], edge_products)
        else:
            why = "no vectors of this model reach its output; name a layer, {}@1"
            self.absent = {name: why.format(name) for name in ("vector", "edge")}
        for k, attach in nodes.items():
            where = f"after update layer {k}" if k else "after the embedding"
            self.add(f"node@{k}", "node", width, f"x {where}", attach)
        for k, attach in vectors.items():
            where = f"after update layer {k}"
            if k > default:
                where += ", which reaches no output: partly untrained"
            self.add(f"vector@{k}", "vector", width, f"vec {where}", attach)
        for k, attach in vectors.items():
            where = f"after update layer {k}"
            self.add(f"edge@{k}", "edge", width, f"{products} {where}", attach, edge_products)
        for k in range(1, layers + 1):
            update = model.update_layers[k - 1]
            where = f"after message layer {k}"
            self.add(f"message_node@{k}", "node", width, f"x {where}", on_input(update, 0))
        for k in range(1, layers + 1):
            update = model.update_layers[k - 1]
            where = f"after message layer {k}"
            self.add(f"message_vector@{k}", "vector", width, f"vec {where}", on_input(update, 1))
        self.add_atom_energies(self.heads("out_energy", "energy"))

    @property
    def atom_embedding(self) -> nn.Module:
        return self.backbone.atom_emb

    @property
    def num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings

    def watch_graph(self, emit: Callable[[Graph], None]) -> Handle:
        def receive(output: Any) -> None:
            edge_index, cell_offsets, _, _, (edge_vector,), _ = output
            emit(Graph(edge_index, -edge_vector, cell_offsets))

        # generate_graph_values returns no cell offsets; symmetrize_edges, inside it, does
        return wrap_method(self.backbone, "symmetrize_edges", receive)
