"""Soft lengths of a stock PaiNN's vector features, in weights that stay stock's.

A PaiNN's update takes the length of vectors v, in each channel, as ``sqrt(|v|^2 + 1e-8)``. Where a
vector passes near 0 that has a bend as sharp as 1e-4, across which no step of an integrator goes
without an error: the total energy of dynamics drifts. With a larger number it is smooth, but the
1e-8 stands in stock's code.

Vectors can be made smaller, though, and whatever is made of them larger: with weights W times k for
v, and 1/k for what follows, every value but that length is as before, and the length is

    sqrt(k^2 |v|^2 + 1e-8) / k  =  sqrt(|v|^2 + (1e-4 / k)^2)

So a stock PaiNN has any softness, if it has the weights for it. They are of sizes that no
optimiser with one step for all of them can find. Hence a training here has W / k, and k W / k in
the forward and in every ``state_dict``: as a power of two k changes no digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fairchem.core.models.painn.painn import PaiNNUpdate
from torch import Tensor, nn
from torch.nn import functional

from fairchem_kd.errors import UserError
from fairchem_kd.stock.softness import WHERE, halvings


def soften_lengths(model: nn.Module, soft: float) -> None:
    """Have the lengths of a PaiNN's vector features softened by ``soft``, in its training.

    Its parameters become those of a model with such lengths; what it gives, saves and loads is
    the stock model that ``state_dict`` has. So loading does not soften: :func:`soften_weights`
    does.

    Args:
        model: bare, with updates of a PaiNN; one that was softened already is left.
        soft: in units of the features; taken to the nearest power of two times 1e-4.

    Raises:
        UserError: the model is no PaiNN.
    """
    if any(True for _ in _scaled(model)):
        return
    updates = list(_updates(model))
    if not updates:
        raise UserError(
            f"{WHERE} is of the vector features of PaiNN, and {type(model).__name__} has none of "
            "its updates: take the key out, or take a PaiNN."
        )
    for update in updates:
        for linear, weight, bias in _factors(update, 0.5 ** halvings(soft)):
            linear.__class__ = _Scaled
            linear.register_buffer("_weight_to_stock", weight, persistent=False)
            linear.register_buffer("_bias_to_stock", bias, persistent=False)


@torch.no_grad()
def soften_weights(
    model: nn.Module,
    before: float | None,
    after: float,
    averages: Sequence[Tensor] = (),
) -> None:
    """Give the weights of a PaiNN another softness, in place, which makes another model of it.

    Args:
        model: one of :func:`soften_lengths`.
        before: the softness with which what it has loaded was trained.
        after: what it gets.
        averages: of its trained parameters, in their order, which go with them.
    """
    factor = 0.5 ** (halvings(after) - halvings(before))
    scales = {}
    for update in _updates(model):
        for linear, weight, bias in _factors(update, factor):
            scales[id(linear.weight)] = weight
            if bias is not None:
                scales[id(linear.bias)] = bias
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, average in zip(trained, averages, strict=False):
        if id(parameter) in scales:
            average.mul_(scales[id(parameter)].to(average))
    for parameter in model.parameters():
        if id(parameter) in scales:
            parameter.mul_(scales[id(parameter)])


def averages_to_stock(model: nn.Module, averages: Sequence[Tensor]) -> list[Tensor]:
    """Averages of the trained parameters of ``model``, in their order, as those of stock's."""
    return _averages(model, averages, to_stock=True)


def averages_from_stock(model: nn.Module, averages: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`averages_to_stock`."""
    return _averages(model, averages, to_stock=False)


def _averages(model: nn.Module, averages: Sequence[Tensor], *, to_stock: bool) -> list[Tensor]:
    scales: dict[int, Tensor] = {}
    for layer in _scaled(model):
        scales[id(layer.weight)] = layer._weight_to_stock
        if layer._bias_to_stock is not None:
            scales[id(layer.bias)] = layer._bias_to_stock
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = list(averages)
    for place, (parameter, average) in enumerate(zip(trained, averages, strict=False)):
        scale = scales.get(id(parameter))
        if scale is not None and average.shape == parameter.shape:
            scale = scale.to(average)
            found[place] = average * scale if to_stock else average / scale
    return found


def _factors(update: PaiNNUpdate, k: float) -> Iterator[tuple[nn.Linear, Tensor, Tensor | None]]:
    """What makes the vectors of an update that are measured k times as long, and nothing else.

    Of each of its linear maps the factors on the weight, ``(out, 1)`` or ``(1, in)``, and on the
    bias, ``(out,)``, where it has one.
    """
    width = update.hidden_channels
    first, last = update.xvec_proj[0], update.xvec_proj[2]
    vectors = update.vec_proj.weight.new_ones(2 * width, 1)
    vectors[width:] = k  # the second half is measured, and multiplied with the first
    lengths = first.weight.new_ones(1, 2 * width)
    lengths[:, width:] = 1 / k  # beside the scalars
    products = last.weight.new_ones(3 * width)
    products[width : 2 * width] = 1 / k  # what their scalar products are multiplied with
    yield update.vec_proj, vectors, None
    yield first, lengths, torch.ones_like(first.bias)
    yield last, products[:, None], products


class _Scaled(nn.Linear):
    """A linear map whose parameters are stock's over a factor; elsewhere it is as stock's."""

    _weight_to_stock: Tensor
    _bias_to_stock: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        if bias is not None and self._bias_to_stock is not None:
            bias = bias * self._bias_to_stock
        return functional.linear(input, self.weight * self._weight_to_stock, bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, scale in self._scales(prefix):
            destination[key] = destination[key] * scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        for key, scale in self._scales(prefix):
            if key in state_dict:  # torch's own copy of what was given
                state_dict[key] = state_dict[key] / scale.to(state_dict[key].device)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _scales(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}weight", self._weight_to_stock
        if self.bias is not None and self._bias_to_stock is not None:
            yield f"{prefix}bias", self._bias_to_stock


def _scaled(model: nn.Module) -> Iterator[_Scaled]:
    return (module for module in model.modules() if isinstance(module, _Scaled))


def _updates(model: nn.Module) -> Iterator[PaiNNUpdate]:
    return (module for module in model.modules() if isinstance(module, PaiNNUpdate))
