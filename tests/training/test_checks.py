"""Non-finite values are refused with the structure's name, before a model sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairchem.core.datasets import data_list_collater
from torch_geometric.data import Batch, Data

from fairchem_kd.errors import UserError
from fairchem_kd.training.checks import check_finite, refuse_divergence


def batch_of_three() -> Batch:
    structures = [
        Data(
            pos=torch.rand(n, 3),
            cell=torch.eye(3)[None],
            atomic_numbers=torch.ones(n),
            natoms=n,
            energy=1.0,
            forces=torch.rand(n, 3),
            sid=10 + n,
            fid=n,
        )
        for n in (2, 3, 4)
    ]
    return data_list_collater(structures, otf_graph=True)


def test_finite_batches_and_missing_labels_pass() -> None:
    check_finite(batch_of_three(), ("energy", "forces", "stress"))


@pytest.mark.parametrize(
    ("key", "row", "words"),
    [
        ("pos", 2, "positions of structure sid 13, fid 3 "),
        ("forces", 8, "forces label of structure sid 14, fid 4 "),
        ("energy", 0, "energy label of structure sid 12, fid 2 "),
        ("cell", 1, "cell of structure sid 13, fid 3 "),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_structure_is_named(key: str, row: int, words: str, value: float) -> None:
    batch = batch_of_three()
    batch[key][row] = value
    with pytest.raises(UserError) as error:
        check_finite(batch, ("energy", "forces"))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("metrics", "wrong"),
    [
        ({"loss": {"metric": 1.0}, "energy_mae": {"metric": 2.0}}, False),
        ({"loss": {"metric": float("nan")}}, True),
        ({"loss": {"metric": 1.0}, "forces_mae": {"metric": float("inf")}}, True),
        ({"loss": {"metric": 1.0}, "forces_cosine_similarity": {"metric": float("nan")}}, False),
    ],
)
def test_a_step_of_a_training_that_diverged_is_not_taken(metrics: Any, wrong: bool) -> None:
    if not wrong:
        refuse_divergence(metrics, 3)
        return
    with pytest.raises(UserError, match=r"Step 3: .* has diverged, .*lr_initial"):
        refuse_divergence(metrics, 3)
