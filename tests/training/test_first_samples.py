"""What does not fit in a data set is said before the first step, with the sample's number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import small_model
from torch_geometric.data import Data

from fairchem_kd.errors import UserError
from fairchem_kd.stock.neighbours import cutoff_of
from fairchem_kd.stock.samples import collate
from fairchem_kd.training.first_samples import MOST, check_neighbours, check_samples

OUTPUTS = {"energy": {"level": "system"}, "forces": {"level": "atom"}}


def sample(index: int = 0, **changes: Any) -> Data:
    values: dict[str, Any] = {
        "pos": 0.8 * torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        "atomic_numbers": torch.ones(4, dtype=torch.long),
        "natoms": 4,
        "cell": 9 * torch.eye(3)[None],
        "fixed": torch.zeros(4),
        "energy": 1.0,
        "forces": torch.rand(4, 3),
        "sid": index,
    }
    values |= changes
    return Data(**{key: value for key, value in values.items() if value is not GONE})


GONE = "(not given)"


def check(dataset: Any, *, named: bool = False) -> None:
    targets = ["energy", "forces"]
    check_samples(dataset, "dataset.val", OUTPUTS, targets, named=named, elements=82)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pos": GONE}, "has no 'pos'"),
        ({"cell": GONE}, "has no 'cell'"),
        ({"pos": torch.rand(3, 3)}, r"'pos' of shape \(3, 3\), and 4 atoms need \(4, 3\)"),
        ({"atomic_numbers": torch.ones(5)}, r"'atomic_numbers' of shape \(5,\)"),
        ({"cell": torch.rand(2, 3)}, r"'cell' of shape \(2, 3\)"),
        ({"fixed": torch.tensor([0, 2])}, r"'fixed' of shape \(2,\)"),
        ({"energy": None}, "no label 'energy'"),
        ({"energy": GONE}, "no label 'energy'"),
        ({"forces": GONE}, "no label 'forces'"),
        ({"forces": torch.rand(3, 3)}, "label 'forces' with 9 numbers|forces of 9 numbers"),
        ({"forces": torch.rand(4)}, "forces of 4 numbers, and 4 atoms need 12"),
        ({"energy": torch.zeros(0)}, "label 'energy' with 0 numbers"),
        ({"energy": torch.zeros(2)}, "label 'energy' with 2 numbers, and a structure has one"),
        ({"energy": "1.0"}, "'energy' of the type str, and not as a tensor"),
        ({"energy": True}, "'energy' of the type bool"),
        ({"energy": [1.0]}, "'energy' of the type list"),
        ({"energy": math.nan}, "an energy label that is not finite"),
        ({"energy": 1e20}, "labels of energy of 2.5e[+]19 eV an atom, which cannot be"),
        ({"forces": torch.rand(12)}, r"'forces' of shape \(12,\), and not a row for each"),
        ({"forces": torch.rand(3, 4)}, r"'forces' of shape \(3, 4\), and not a row for each"),
        ({"forces": torch.rand(4, 3).numpy()}, "'forces' of the type ndarray"),
        ({"forces": torch.full((4, 3), math.inf)}, "a forces label that is not finite"),
        ({"forces": torch.full((4, 3), 2e6)}, "labels of forces of 2e[+]06 eV/Å, which cannot be"),
        ({"pos": torch.full((4, 3), math.nan)}, "positions that are not finite"),
        ({"pos": [[0.0, 0.0, 0.0]] * 4}, "'pos' of the type list"),
        ({"pos": torch.zeros(4, 3)}, r"two atoms at one place \(0 Å apart\)"),
        ({"cell": torch.full((1, 3, 3), math.nan)}, "a cell that is not finite"),
        ({"atomic_numbers": torch.tensor([1, 0, 1, 1])}, "atomic number 0, which no element has"),
        ({"atomic_numbers": torch.tensor([1, -2, 1, 1])}, "atomic number -2, which no element"),
        ({"atomic_numbers": torch.tensor([1, 1, 1, 119])}, "atomic number 119, which no element"),
        ({"atomic_numbers": torch.tensor([1, 1, 1, 83])}, "83, and the model knows .* 1 to 82"),
        ({"atomic_numbers": torch.tensor([1.0, 1.5, 1, 1])}, "atomic number 1.5, and they are"),
        ({"tags": torch.zeros(3)}, r"'tags' of shape \(3,\), not \(4,\)"),
        ({"tags": [0, 0, 0, 0]}, "'tags' of the type list"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    dataset = [sample(0), sample(1), sample(2, **changes), sample(3)]
    with pytest.raises(UserError, match=rf"dataset\.val: sample 2 \(sid 2\) .*({said})"):
        check(dataset)


@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (1 / 0.529, True), (0.1, True)])
def test_positions_that_are_not_in_angstroms_are_told(
    factor: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Of most samples: one that is otherwise is a matter of its own."""
    numbers = torch.tensor([29, 29, 8, 1])
    pos = torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [1.2, 0, 1.5], [1.2, 0, 2.5]])
    dataset = [sample(i, pos=factor * pos, atomic_numbers=numbers) for i in range(3)]
    check([*dataset, sample(4, pos=7 * pos)])
    assert ("positions and cells have to be in Å" in caplog.text) is told


def test_samples_that_fit_pass() -> None:
    check([sample(0), sample(1, fixed=GONE), sample(2, energy=torch.tensor([1.0]))], named=True)


def test_predictions_need_a_name() -> None:
    with pytest.raises(UserError, match="sample 1 has no 'sid'"):
        check([sample(0), sample(1, sid=GONE)], named=True)


ALONE = {"pos": 10.0 * torch.eye(4, 3), "cell": 100 * torch.eye(3)[None]}


@pytest.mark.parametrize("name", ["painn", "gemnet_oc"])
def test_a_sample_without_neighbours_is_named(name: str) -> None:
    model = small_model(name)
    dataset = [sample(0), sample(1), sample(2, **ALONE, pbc=torch.ones(1, 3, dtype=torch.bool))]
    check_neighbours(dataset[:2], "dataset.val", model, "cpu")
    cutoff = cutoff_of(model)
    said = rf"dataset\.val: sample 2 \(sid 2\) has no two atoms within {cutoff:g} Å"
    with pytest.raises(UserError, match=said):
        check_neighbours(dataset, "dataset.val", model, "cpu")
    assert model.training


def test_a_model_that_allows_it_takes_a_sample_without_neighbours() -> None:
    check_neighbours([sample(0), sample(1, **ALONE)], "dataset.val", small_model("schnet"), "cpu")


class Long:
    """A set of which few samples can be looked at."""

    def __init__(self, count: int, bad: int) -> None:
        self.count, self.bad, self.read = count, bad, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Data:
        self.read += 1
        if index == self.bad:
            raise KeyError("pos")
        return sample(index)


def test_of_a_large_set_few_samples_are_read() -> None:
    large = Long(100_000, bad=-1)
    check(large)
    assert large.read == MOST
    with pytest.raises(UserError, match="sample 5 cannot be read"):
        check(Long(100_000, bad=5))


def test_what_can_be_put_right_is() -> None:
    """Double precision, a cell of 3 x 3 and no word about fixed atoms."""
    odd = sample(0, pos=torch.rand(4, 3).double(), cell=9 * torch.eye(3), fixed=GONE, tags=GONE)
    batch = collate([odd, sample(1, tags=torch.ones(4, dtype=torch.long))], otf_graph=True)
    assert batch.pos.dtype == torch.float32
    assert batch.cell.shape == (2, 3, 3)
    assert batch.fixed.tolist() == [0.0] * 8
    assert "fixed" not in odd
