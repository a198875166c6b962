"""Features of fairchem's GemNet-OC (Gasteiger et al. 2022, arXiv 2204.02782).

Edges are those of the main graph, which is symmetrised and not sorted by target atom. fairchem's
``main_graph["vector"]`` points from the source ``edge_index[0]`` to the target ``edge_index[1]``
(it is what forces are made of), and ``main_graph["cell_offset"]`` is the negative of fairchem's
usual offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC
from torch import Tensor, nn

from fairchem_kd.features.architecture import (
    MEAN_READOUT,
    Architecture,
    Graph,
    Handle,
    on_output,
    register_architecture,
    wrap_method,
)


def _weights(head: nn.Module | None) -> Tensor | None:
    """``(C,)``: what a linear head without bias multiplies its input with; None for another one."""
    linear = getattr(head, "linear", None)
    plain = isinstance(linear, nn.Linear) and linear.bias is None and len(linear.weight) == 1
    return linear.weight.detach()[0] if plain and linear is not None else None


@register_architecture
class GemNetOCFeatures(Architecture):
    """Atom and edge embeddings, and what the output blocks and heads make of them.

    ``node`` and ``edge`` are x_E and x_F, the inputs of the final linear heads. Edge features of
    the force branch are offered only where forces come out of it: without direct forces it does
    not exist, and without forces it was never trained.
    """

    model_class = GemNetOC

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        atom = model.atom_emb.emb_size
        edge = model.edge_emb.dense.linear.out_features
        blocks = len(model.int_blocks)

        final_energy = self.head("out_mlp_E", "energy")
        final_forces = self.head("out_mlp_F", "forces")
        # in a hydra, the heads alone decide; the stock model has the module even if it is not used
        if not model.direct_forces or (root is model and not model.regress_forces):
            final_forces = None

        if final_energy is not None:
            words = "x_E, the input of the energy head"
            readout = _weights(self.head("out_energy", "energy"))
            self.add("node", "node", atom, words, on_output(final_energy), readout=readout)
        if final_forces is not None:
            words = "x_F, the input of the force head"
            # coupled forces are made of the mean over an edge and its reverse: no sum over targets
            coupled = getattr(model, "forces_coupled", False)
            readout = None if coupled else _weights(self.head("out_forces", "forces"))
            self.add("edge", "edge", edge, words, on_output(final_forces), readout=readout)
        for k in range(blocks + 1):
            where = f"after interaction block {k}" if k else "after the embedding block"
            node = on_output(model.int_blocks[k - 1], 0) if k else on_output(model.atom_emb)
            self.add(f"node@{k}", "node", atom, f"h, atom embeddings {where}", node)
        for k in range(blocks + 1):
            where = f"after interaction block {k}" if k else "after the embedding block"
            message = on_output(model.int_blocks[k - 1], 1) if k else on_output(model.edge_emb)
            self.add(f"edge@{k}", "edge", edge, f"m, edge embeddings {where}", message)
        for k in range(blocks + 1):
            out = on_output(model.out_blocks[k], 0)
            self.add(f"out_node@{k}", "node", atom, f"x_E of output block {k}", out)
        for k in range(blocks + 1 if final_forces is not None else 0):
            out = on_output(model.out_blocks[k], 1)
            self.add(f"out_edge@{k}", "edge", edge, f"x_F of output block {k}", out)
        if model.extensive:
            self.add_atom_energies(self.heads("out_energy", "energy"))
        else:
            self.absent["atom_energy"] = MEAN_READOUT
        names = ["edge"] if final_forces is not None else []
        names += [f"edge@{k}" for k in range(blocks + 1)]
        self.aliases = {name.replace("edge", "vector"): name for name in names}
        if final_forces is None:
            why = (
                "this model has no trained head for direct forces; "
                f"name a layer, edge@0 to edge@{blocks}"
            )
            self.absent |= {"edge": why, "out_edge": why}
            self.absent["vector"] = why.replace("edge@", "vector@")

    @property
    def atom_embedding(self) -> nn.Module:
        return self.backbone.atom_emb

    @property
    def num_elements(self) -> int:
        return self.backbone.atom_emb.embeddings.num_embeddings

    def watch_graph(self, emit: Callable[[Graph], None]) -> Handle:
        def receive(output: Any) -> None:
            main = output[0]
            emit(Graph(main["edge_index"], main["vector"], -main["cell_offset"]))

        return wrap_method(self.backbone, "get_graphs_and_indices", receive)
