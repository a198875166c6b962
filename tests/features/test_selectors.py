"""A tap takes an item by its index, or whatever a function makes of what it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fairchem_kd.features import on_input, on_output


class Pair(nn.Module):
    """Gives a tuple, as message layers do."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x * y


def seen(attach: Any, module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    values: list[torch.Tensor] = []
    handle = attach(values.append)
    module(*args)
    handle.remove()
    module(*args)  # the hook is gone
    (value,) = values
    return value


def test_items_and_functions() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    pair, linear = Pair(), nn.Identity()
    assert seen(on_output(linear), linear, x) is x
    assert torch.equal(seen(on_output(pair, 1), pair, x, y), x * y)
    assert torch.equal(
        seen(on_output(pair, lambda out: out[0] - out[1]), pair, x, y), x + y - x * y
    )
    assert seen(on_input(pair, 1), pair, x, y) is y
    assert torch.equal(seen(on_input(pair, lambda args: args[0][:1]), pair, x, y), x[:1])
