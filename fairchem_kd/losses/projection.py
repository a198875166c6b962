"""Projections: from the student's channels to the teacher's, trained along and thrown away.

They act on the student's side only (M in the formulas of arXiv 2306.14818, section 3) and draw
their initial values from a generator of their own, so that the student's random numbers are the
same with and without them. On vectors ``(N, 3, H)`` they are equivariant: no bias, and no
non-linearity across xyz.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fairchem_kd.errors import UserError

PROJECTIONS = ("linear", "mlp", "identity")
#: Where features of different widths can be compared without one.
NONE = "none"


def projection(
    name: str,
    kind: Literal["node", "vector", "edge"],
    student_channels: int,
    teacher_channels: int,
    generator: torch.Generator,
) -> nn.Module:
    """The projection ``name`` for features of ``kind``, on CPU.

    Args:
        name: ``linear``, ``mlp``, ``identity`` or ``none``.
        kind: ``vector``: acts on the last axis of ``(N, 3, H)``; else of ``(N, H)``.
        student_channels: H.
        teacher_channels: D, the channels of its result.
        generator: the only source of its initial values; a CPU generator.

    Raises:
        UserError: ``identity`` with H other than D; an unknown name.
    """
    vector = kind == "vector"
    if name == "linear":
        return _linear(student_channels, teacher_channels, generator, bias=not vector)
    if name == "mlp":
        mlp = VectorMLP if vector else ScalarMLP
        return mlp(student_channels, teacher_channels, generator)
    if name == NONE:
        return nn.Identity()
    if name == "identity":
        if student_channels != teacher_channels:
            raise UserError(
                f"projection identity needs equal channels, not {student_channels} (student) and "
                f"{teacher_channels} (teacher): use linear."
            )
        return nn.Identity()
    raise UserError(f"projection cannot be '{name}'; known: {', '.join(PROJECTIONS)}.")


def without_shift(module: nn.Module) -> nn.Module:
    """The projection without the bias at its end, which cancels where atoms are compared."""
    last = module.last if isinstance(module, ScalarMLP) else module
    if isinstance(last, nn.Linear):
        last.register_parameter("bias", None)
    return module


class ScalarMLP(nn.Module):
    """Linear, SiLU, Linear: ``(N, H)`` to ``(N, D)``, hidden width D."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = _linear(inputs, outputs, generator, bias=True)
        self.last = _linear(outputs, outputs, generator, bias=True)

    def forward(self, scalars: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.first(scalars)))


class VectorMLP(nn.Module):
    """Linear, a gate from the norms over xyz, Linear: ``(N, 3, H)`` to ``(N, 3, D)``.

    The norms are invariant, so their gate may have a bias; the vectors see only linear maps of
    channels and a factor per channel, so rotations and reflections pass through.
    """

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = _linear(inputs, outputs, generator, bias=False)
        self.gate = _linear(outputs, outputs, generator, bias=True)
        self.last = _linear(outputs, outputs, generator, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.first(vectors)
        # the small constant keeps the derivative of the norm finite at 0
        norms = (hidden.square().sum(dim=-2, keepdim=True) + 1e-12).sqrt()
        return self.last(hidden * torch.sigmoid(self.gate(norms)))


def _linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool) -> nn.Linear:
    """A Linear as torch initialises it, but from ``generator``."""
    layer = skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
