"""Features of fairchem's eSEN (Fu et al. 2025, arXiv 2502.12147), which is a backbone of hydras.

States are tensors ``(N, K, C)`` throughout; a last norm comes before the heads. Forces are those
of a head, or the gradient of the energy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairchem.core.models.esen.esen import Linear_Force_Head, eSEN_Backbone
from torch import Tensor, nn

from fairchem_kd.features.architecture import Emit, Handle, on_output, register_architecture
from fairchem_kd.features.so3 import Irreps, Read, SphericalFeatures


def _after(module: nn.Module) -> Read:
    return lambda part: on_output(module, part)


class _Both:
    """Undoes two attachments."""

    def __init__(self, first: Handle, second: Handle) -> None:
        self.handles = first, second

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _messages(layer: Any) -> Callable[[Emit], Handle]:
    """Attach to l = 0 of what a layer sums, ``(E, C)``: turning it back leaves that as it is."""

    def attach(emit: Emit) -> Handle:
        made: list[Tensor] = []

        def scalars(_module: nn.Module, _args: Any, output: Tensor) -> None:
            values = output[:, 0].clone()  # a view would hold all degrees
            if layer.use_envelope:
                made.append(values)
            else:
                emit(values)

        def weighted(_module: nn.Module, _args: Any, output: Tensor) -> None:
            emit(made.pop() * output.view(-1, 1))

        first = layer.so2_conv_2.register_forward_hook(scalars)
        if not layer.use_envelope:
            return first
        return _Both(first, layer.envelope.register_forward_hook(weighted))

    return attach


@register_architecture
class ESENFeatures(SphericalFeatures):
    """States after each block, and the messages that its edgewise part sums.

    ``node`` is what the heads take in. So is ``vector`` in a model with a head for forces; others
    make their energies of l = 0 alone, so that the default is the block before.
    """

    model_class = eSEN_Backbone

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        model = self.backbone
        self.detaches_positions = bool(model.direct_forces)  # the rotations of edges
        blocks = list(model.blocks)
        layers = [("x before the first block", _after(model.edge_degree_embedding))]
        layers += [(f"x after block {k}", _after(block)) for k, block in enumerate(blocks, start=1)]
        heads = getattr(root, "output_heads", {}).values()
        forces = any(isinstance(head, Linear_Force_Head) for head in heads)
        last = ("x after the last norm, which the heads take in", _after(model.norm))
        self.add_states(last, layers, None if forces else len(blocks) - 1)
        self.add_messages(
            model.sphere_channels,
            [_messages(block.edge_wise) for block in blocks],
            bool(model.activation_checkpointing),
        )
        self.add_readouts("energy_block", 1.0, lambda output: output.view(-1, 1))

    @property
    def irreps(self) -> Irreps:
        return Irreps((self.backbone.lmax,), self.backbone.sphere_channels)
