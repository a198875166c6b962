"""Features of fairchem's eSCN (Passaro and Zitnick 2023, arXiv 2302.03655).

Layers after the first return increments, so that a state is whole where the next layer takes it in.
The heads take in its values at points of the sphere, to which all degrees add.
"""

from __future__ import annotations

from typing import Any

from fairchem.core.models.escn.escn import eSCN
from torch import nn

from fairchem_kd.features.architecture import Emit, Handle, on_input, register_architecture
from fairchem_kd.features.so3 import Irreps, Read, SphericalFeatures, on_messages

#: what stock multiplies a sum of energies by
_SCALE = 0.001


def _before(layer: nn.Module) -> Read:
    return lambda part: on_input(layer, lambda args: part(args[0].embedding))


def _after_last(layer: nn.Module, first: bool) -> Read:
    """What went in + increment, of the layer that no other follows; the first returns all of it."""

    def read(part: Any) -> Any:
        def attach(emit: Emit) -> Handle:
            def hook(_module: nn.Module, args: Any, output: Any) -> None:
                state = output.embedding
                emit(part(state if first else args[0].embedding + state))

            return layer.register_forward_hook(hook)

        return attach

    return read


@register_architecture
class ESCNFeatures(SphericalFeatures):
    """States after each layer; ``node`` and ``vector`` are those of the last."""

    model_class = eSCN
    detaches_positions = True  # the rotations of edges
    turns_from = 1  # the embedding of elements is l = 0 alone

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        blocks = list(model.layer_blocks)
        layers = [("x, the embedding", _before(blocks[0]))]
        layers += [(f"x after layer {k}", _before(blocks[k])) for k in range(1, len(blocks))]
        last = (f"x after layer {len(blocks)}", _after_last(blocks[-1], len(blocks) == 1))
        layers.append(last)
        self.add_states(last, layers, None)
        irreps = self.irreps
        self.add_messages(
            irreps.scalar_channels,
            [on_messages(one.message_block.so2_block_target, irreps.scalars) for one in blocks],
            bool(model.activation_checkpoint),
        )
        self.add_readouts("energy_block", _SCALE, lambda output: output)

    @property
    def irreps(self) -> Irreps:
        return Irreps(tuple(self.backbone.lmax_list), self.backbone.sphere_channels)
