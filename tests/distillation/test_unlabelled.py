"""The stream of unlabelled structures: each once in a pass, on any ranks, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import write_lmdb

from fairchem_kd.distillation.companions import UnlabelledLoader, UnlabelledOptions
from fairchem_kd.errors import UserError


class _Numbers(torch.utils.data.Dataset):
    """Ten samples, as create_dataset gives them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def dealt(
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
    ranks: int = 1,
    seed: int = 0,
    **options: Any,
) -> list:
    """The samples of each step, of all ranks in their order."""
    monkeypatch.setattr(
        "fairchem_kd.distillation.companions.unlabelled.open_in_order", lambda *args: _Numbers()
    )
    loaders = [
        UnlabelledLoader(
            UnlabelledOptions(dataset={}, **options),
            labelled=6 // ranks,
            seed=seed,
            rank=rank,
            ranks=ranks,
            make_loader=lambda dataset, sampler: torch.utils.data.DataLoader(
                dataset, batch_sampler=sampler, collate_fn=list
            ),
        )
        for rank in range(ranks)
    ]
    return [[sample for loader in loaders for sample in loader(step)] for step in steps]


@pytest.mark.parametrize("settings", [{"first_n": 3}, {"splits": {"train": {"first_n": 3}}}])
def test_fairchems_own_choice_of_samples_holds(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_lmdb(tmp_path / "more", 5, seed=0)
    options = UnlabelledOptions(dataset={"src": str(tmp_path / "more"), **settings}, skip=1)
    loader = UnlabelledLoader(
        options, labelled=2, seed=0, rank=0, ranks=1, make_loader=torch.utils.data.DataLoader
    )
    assert [sample.sid for sample in loader.dataset] == [1, 2]


def test_every_pass_deals_each_structure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = dealt(monkeypatch, list(range(1, 21)), share=1 / 3, skip=4)
    assert {len(samples) for samples in steps} == {3}
    stream = [sample for samples in steps for sample in samples]
    passes = [stream[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(one) == [4, 5, 6, 7, 8, 9] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_ranks_share_what_one_rank_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [1, 2, 3, 4]
    expected = dealt(monkeypatch, steps, share=0.5)
    assert dealt(monkeypatch, steps, ranks=2, share=0.5) == expected
    assert dealt(monkeypatch, steps, ranks=3, share=0.5) == expected


def test_runs_with_other_seeds_get_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [str(dealt(monkeypatch, [1, 2, 3], share=0.5, seed=seed)) for seed in (0, 1, 2, 2**40)]
    assert len(set(orders)) == 4


def test_a_resumed_run_goes_on_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dealt(monkeypatch, [1, 2, 3, 4, 5], share=0.5)
    assert dealt(monkeypatch, [4, 5], share=0.5) == expected[3:]


def test_nothing_left_after_skip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="skip is 10, but the data set has 10 samples"):
        dealt(monkeypatch, [1], skip=10)
