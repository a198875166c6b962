"""What each term does to the student, beside what the labels do: their gradients compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairchem_kd.schema import option
from fairchem_kd.training.ranks import all_sum, world_size

#: What follows the name of a term in logs and records.
NORM, COSINE = "grad_norm", "grad_cosine"


@dataclass
class DiagnosticOptions:
    """A look at the gradients, from time to time."""

    every: int = option(
        0, ge=0, help="steps from one look at each term's gradient to the next; 0: none"
    )

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


def compared_gradients(
    terms: Mapping[str, Tensor],
    labels: tuple[str, Tensor],
    parameters: Sequence[nn.Parameter],
) -> dict[str, Tensor]:
    """Norms of gradients, and their cosines with the gradient of the labels' loss.

    A cosine below 0 means that a term pulls the student away from its labels. Each takes a backward
    of its own; the graph stays, and no ``grad`` is written. A collective.

    Args:
        terms: by name, their weighted losses ``()`` of this rank, times the number of ranks, as
            they are run backward.
        labels: name and weighted loss ``()`` of the labels.
        parameters: the student's.

    Returns:
        ``()`` each: ``NAME_grad_norm`` of terms and labels, ``NAME_grad_cosine`` of terms (0 where
        one of the gradients is 0).
    """
    name, loss = labels
    own = _gradient(loss, parameters)
    length = own.norm()
    found = {f"{name}_{NORM}": length}
    for term, value in terms.items():
        gradient = _gradient(value, parameters)
        norm = gradient.norm()
        scale = norm * length
        found[f"{term}_{NORM}"] = norm
        found[f"{term}_{COSINE}"] = torch.where(
            scale > 0, gradient @ own / scale.where(scale > 0, torch.ones_like(scale)), 0.0
        )
    return found


def gradients_of_terms(
    losses: Mapping[str, Tensor], labels: tuple[str, Tensor], student: nn.Module
) -> dict[str, Tensor]:
    """`compared_gradients` of terms, all parts of each together.

    Args:
        losses: by part, ``TERM`` or ``TERM.PART``, weighted.
        labels: name and weighted loss of the labels.
    """
    terms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        term = name.partition(".")[0]
        terms[term] = terms[term] + loss if term in terms else loss
    parameters = [p for p in student.parameters() if p.requires_grad]
    return compared_gradients(terms, labels, parameters)


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``(P,)``: averaged over ranks, as the student's optimiser sees it."""
    zeros = [torch.zeros_like(p) for p in parameters]
    found: Sequence[Tensor | None] = zeros
    if loss.requires_grad:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = torch.cat(
        [(z if g is None else g).reshape(-1) for g, z in zip(found, zeros, strict=True)]
    )
    return all_sum(flat.double()) / world_size()
