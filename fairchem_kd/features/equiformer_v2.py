"""Features of fairchem's EquiformerV2 (Liao et al. 2024, arXiv 2306.12059).

The model of OCP's checkpoints (``equiformer_v2``) and the backbone of hydras, which differ in where
their heads are. States are whole at the end of a block; a last norm comes before the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from torch import Tensor, nn

from fairchem_kd.features.architecture import on_input, on_output, register_architecture
from fairchem_kd.features.so3 import Irreps, Read, SphericalFeatures, on_messages


def _before(block: nn.Module) -> Read:
    return lambda part: on_input(block, lambda args: part(args[0].embedding))


def _after(block: nn.Module) -> Read:
    return lambda part: on_output(block, lambda output: part(output.embedding))


class _EquiformerV2Features(SphericalFeatures):
    """States after each block, and the messages that its attention sums.

    ``node`` is what the heads take in. So is ``vector`` in a model with a head for forces; others
    make their energies of l = 0 alone, so that the default is the block before.
    """

    detaches_positions = True  # the rotations of edges

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        blocks = list(model.blocks)
        layers = [("x before the first block", _before(blocks[0]))]
        layers += [(f"x after block {k}", _after(block)) for k, block in enumerate(blocks, start=1)]

        def normed(part: Callable[[Tensor], Tensor]) -> Any:
            return on_output(model.norm, part)

        forces = self.heads("force_block", "forces") or self.heads("vector_block", "forces")
        default = None if forces else len(blocks) - 1
        self.add_states(("x after the last norm, which the heads take in", normed), layers, default)
        attention = [block.ga for block in blocks]
        messages = Irreps(tuple(model.lmax_list), model.num_heads * model.attn_value_channels)
        self.add_messages(
            messages.scalar_channels,
            [on_messages(one.so2_conv_2, messages.scalars) for one in attention],
            bool(getattr(model, "activation_checkpoint", False)),
        )
        if getattr(root, "use_energy_lin_ref", False):
            self.absent["atom_energy"] = (
                "use_energy_lin_ref adds references of elements that its atoms do not show"
            )
            return
        for name in ("energy_block", "scalar_block"):
            self.add_readouts(
                name, 1.0 / model.avg_num_nodes, lambda output: output.embedding[:, 0]
            )

    @property
    def irreps(self) -> Irreps:
        return Irreps(tuple(self.backbone.lmax_list), self.backbone.sphere_channels)


@register_architecture
class EquiformerV2Features(_EquiformerV2Features):
    """Of the model with its heads in it."""

    model_class = EquiformerV2


@register_architecture
class EquiformerV2BackboneFeatures(_EquiformerV2Features):
    """Of a hydra's backbone."""

    model_class = EquiformerV2Backbone
