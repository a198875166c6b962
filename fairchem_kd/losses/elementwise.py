"""The functions that compare two tensors element by element."""

from __future__ import annotations

import torch
from torch import Tensor

FUNCTIONS = ("mse", "mae", "huber")


def elementwise(fn: str, student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    """Squared, absolute or Huber difference of two tensors of one shape, element by element.

    Huber is ``d**2 / 2`` up to ``abs(d) = delta`` and ``delta * (abs(d) - delta / 2)`` beyond.
    Half types are compared in fp32.

    Raises:
        ValueError: shapes that differ (they are never broadcast), or an unknown ``fn``.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if fn == "mse":
        return torch.nn.functional.mse_loss(student, teacher, reduction="none")
    if fn == "mae":
        return torch.nn.functional.l1_loss(student, teacher, reduction="none")
    if fn == "huber":
        return torch.nn.functional.huber_loss(student, teacher, reduction="none", delta=delta)
    raise ValueError(f"fn must be one of {', '.join(FUNCTIONS)}, not {fn!r}")


def vectorwise(fn: str, student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    """The same of vectors ``(N, 3, ...)``, in a way that does not depend on how they are turned.

    Squares are taken of x, y and z, ``(N, 3, ...)``, for they add up to a length's; ``mae`` and
    ``huber`` of the length of the difference, ``(N, ...)``, without a gradient where that is 0. So
    fairchem's ``l2mae`` is to its ``mae``.

    Raises:
        ValueError: as of `elementwise`.
    """
    if fn == "mse":
        return elementwise(fn, student, teacher)
    if student.shape != teacher.shape:
        return elementwise(fn, student, teacher)  # refuses them
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    length = torch.linalg.vector_norm(student.to(dtype) - teacher.to(dtype), dim=1)
    return elementwise(fn, length, torch.zeros_like(length), delta)
