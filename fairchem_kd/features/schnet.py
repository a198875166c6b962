"""Features of fairchem's SchNet (Schütt et al. 2017, arXiv 1706.08566): scalars only."""

from __future__ import annotations

from fairchem.core.models.schnet import SchNetWrap
from torch import nn

from fairchem_kd.features.architecture import (
    MEAN_READOUT,
    Architecture,
    on_input,
    on_output,
    register_architecture,
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
