"""Features of fairchem's SchNet (Schütt et al. 2017, arXiv 1706.08566): scalars only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairchem.core.models.schnet import SchNetWrap
from torch import nn

from fairchem_kd.features.architecture import (
    MEAN_READOUT,
    Architecture,
    Graph,
    Handle,
    on_input,
    on_output,
    register_architecture,
    wrap_method,
)


@register_architecture
class SchNetFeatures(Architecture):
    """Atom states after each interaction; ``node`` is the last one, the input of ``lin1``."""

    model_class = SchNetWrap

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        width, blocks = model.hidden_channels, len(model.interactions)
        # interactions return increments: a state is whole where the next module takes it
        nodes = {0: on_output(model.embedding), blocks: on_input(model.lin1, 0)}
        nodes |= {k: on_input(model.interactions[k], 0) for k in range(1, blocks)}

        self.add("node", "node", width, "h after the last interaction", nodes[blocks])
        for k in range(blocks + 1):
            where = f"after interaction {k}" if k else "after the embedding"
            self.add(f"node@{k}", "node", width, f"h {where}", nodes[k])
        self.absent = {
            "vector": "SchNet has no vectors",
            "edge": "SchNet has no edge features",
        }
        if model.reduce in ("sum", "add"):
            self.add_atom_energies({"energy": model.lin2})
        else:
            self.absent["atom_energy"] = MEAN_READOUT

    @property
    def atom_embedding(self) -> nn.Module:
        return self.backbone.embedding

    @property
    def num_elements(self) -> int:
        return self.backbone.embedding.num_embeddings - 1  # row 0 is padding

    def watch_graph(self, emit: Callable[[Graph], None]) -> Handle:
        """fairchem's edges where it is periodic, else those of PyG's SchNet inside it."""
        if self.backbone.use_pbc:

            def receive(graph: Any) -> None:
                # from the target to the source, as in PaiNN
                unit = -graph.edge_distance_vec / graph.edge_distance[:, None]
                emit(Graph(graph.edge_index, unit, graph.cell_offsets))

            return wrap_method(self.backbone, "generate_graph", receive)

        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            pos, (source, target) = args[0], output[0]
            vectors = pos[target] - pos[source]
            unit = vectors / vectors.norm(dim=1, keepdim=True)
            emit(Graph(output[0], unit, vectors.new_zeros(len(vectors), 3)))

        return self.backbone.interaction_graph.register_forward_hook(hook)
