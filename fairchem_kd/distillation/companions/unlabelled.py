"""Structures for which only the teacher speaks: a data set whose labels nobody reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, Subset
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.schema import option
from fairchem_kd.stock.datasets import open_in_order

WHERE = "task.distillation.unlabelled"
CHECKED = 256  # samples that are looked at before training starts


@dataclass
class UnlabelledOptions:
    """Structures without labels, mixed into every step; the teacher speaks for them."""

    dataset: dict[str, Any] = option(help="a data set, as under dataset.train; labels are not read")
    share: float = option(0.5, gt=0, le=0.99, help="of the structures of a step, copies aside")
    weight: float | None = option(
        None,
        gt=0,
        help="mix as the paper does: labels for the labelled, the teacher's outputs for the others "
        "alone, each of which counts so much beside a labelled one; null: it speaks of all",
    )
    skip: int = option(0, ge=0, help="leave out its first samples: those that are labelled")

    def per_step(self, labelled: int) -> int:
        """How many go with ``labelled`` structures, at least one."""
        return max(1, round(labelled * self.share / (1 - self.share)))

    def mixing(self, labelled: int) -> tuple[float, float]:
        """With ``weight`` q: factor on the labels' loss, and weight of a structure without labels.

        Of a step with the share r of such structures, and the mean over all of it, they are
        ``(1 - r) w`` and ``q w`` with ``w = 1 / (1 - r + q r)`` (arXiv 2306.14818 and its code).

        Args:
            labelled: structures of a step.
        """
        assert self.weight is not None
        number = self.per_step(labelled)
        share = number / (labelled + number)
        scale = 1.0 / (1.0 - share + self.weight * share)
        return (1.0 - share) * scale, self.weight * scale


class UnlabelledLoader:
    """Deals a data set out, step by step and rank by rank, shuffled anew on every pass.

    What a step gets is a function of the seed and the step alone: a resumed run goes on where it
    was, and any number of ranks gets the same structures, divided among them.

    Args:
        options: what the config gave.
        labelled: labelled structures of a step, on each rank.
        seed: of the run.
        rank: of this process, of ``ranks``.
        make_loader: the trainer's, from data set and batch sampler.
        keep: the trainer's, from data set to one whose samples may be kept once read.

    Raises:
        UserError: nothing is left after ``skip``.
    """

    def __init__(
        self,
        options: UnlabelledOptions,
        *,
        labelled: int,
        seed: int,
        rank: int,
        ranks: int,
        make_loader: Callable[[Any, Any], DataLoader],
        keep: Callable[[Any], Any] = lambda dataset: dataset,
    ) -> None:
        self.options = options
        #: see `UnlabelledOptions.mixing`; None where the teacher speaks of all structures
        self.mixing = None if options.weight is None else options.mixing(labelled)
        ordered = open_in_order(options.dataset, "train")
        if options.skip >= len(ordered):
            raise UserError(
                f"{WHERE}.skip is {options.skip}, but the data set has {len(ordered)} samples: "
                "choose a smaller one."
            )
        self.dataset = Subset(ordered, range(options.skip, len(ordered)))
        self.samples = keep(self.dataset)  #: as the training itself reads them
        self._sampler = _Dealer(
            len(self.dataset), options.per_step(labelled), seed=seed, rank=rank, ranks=ranks
        )
        self._make_loader = make_loader
        self._batches: Iterator[Batch] = iter(())
        self._next_step = -1

    def check(self, check_elements: Callable[[torch.Tensor], None]) -> None:
        """Look at evenly spread samples before training starts.

        Raises:
            UserError: an element that the teacher does not know.
        """
        size = len(self.dataset)
        number = min(CHECKED, size)
        try:
            for index in range(number):
                check_elements(torch.as_tensor(self.samples[index * size // number].atomic_numbers))
        except UserError as error:
            raise UserError(f"{WHERE}.dataset: {error}") from None

    def __call__(self, step: int) -> Batch:
        """The structures of a step (from 1) on this rank, in host memory."""
        if step != self._next_step:
            self._sampler.first_step = step
            with isolated_random_state():  # a loader draws a seed for its workers
                self._batches = iter(self._make_loader(self.samples, self._sampler))
        self._next_step = step + 1
        return next(self._batches)


class _Dealer(Sampler[list[int]]):
    """Endless batches of indices, from ``first_step`` on."""

    def __init__(self, size: int, number: int, *, seed: int, rank: int, ranks: int) -> None:
        self.size, self.number = size, number
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.first_step = 1

    def __iter__(self) -> Iterator[list[int]]:
        start = ((self.first_step - 1) * self.ranks + self.rank) * self.number
        order: tuple[int, list[int]] = (-1, [])
        while True:
            indices = []
            for position in range(start, start + self.number):
                turn, place = divmod(position, self.size)
                if order[0] != turn:
                    order = turn, self._permutation(turn)
                indices.append(order[1][place])
            yield indices
            start += self.ranks * self.number

    def _permutation(self, turn: int) -> list[int]:
        # torch's generator takes the lower 32 bits of what it is seeded with
        digest = hashlib.sha256(f"{self.seed} {turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(self.size, generator=generator).tolist()
