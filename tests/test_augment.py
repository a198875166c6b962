"""Rattled copies and unlabelled structures: noise, guards, and what each loss sees of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ase.geometry
import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from models import model_config, structures, to_data
from torch_geometric.data import Batch, Data
from trainings import config, trainer, write_lmdb, write_teacher

from fairchem_kd.augment import RattleOptions, Rattler, UnlabelledLoader, UnlabelledOptions
from fairchem_kd.augment.structures import join, pick
from fairchem_kd.errors import UserError
from fairchem_kd.records import read_records
from fairchem_kd.schema import parse

LOSSES: dict[str, Any] = {"e2n": {}, "v2v": {}, "vanilla": {}, "per_atom_energy": {}}


def samples(number: int, seed: int = 0) -> list[Data]:
    made = [*structures(4, seed=seed), *structures(4, seed=seed + 1)]
    return [to_data(atoms, index) for index, atoms in enumerate(made[:number])]


def slabs(number: int = 4, seed: int = 0) -> Batch:
    return Batch.from_data_list(samples(number, seed))


def rattler(seed: int = 0, **options: Any) -> Rattler:
    return Rattler(parse(RattleOptions, options, "task.distillation.rattle"), seed)


def one_by_one(batch: Batch) -> dict[bytes, torch.Tensor]:
    """Each copy's displacement by the bytes of the positions of the clean structure nearest it."""
    return {p.numpy().tobytes(): p for p in batch.pos.split(batch.natoms.tolist())}


# -- joining and picking --------------------------------------------------------------------------


def test_joined_structures_are_those_of_a_batch_made_at_once() -> None:
    whole = samples(5)
    joined = join([Batch.from_data_list(whole[:2]), Batch.from_data_list(whole[2:])])
    expected = Batch.from_data_list(whole)
    for key in ("pos", "atomic_numbers", "tags", "fixed", "cell", "natoms", "batch", "ptr"):
        assert torch.equal(joined[key], expected[key]), key
    assert joined.num_graphs == 5
    assert not {"energy", "forces"} & set(joined.keys())


def test_picked_structures_come_in_the_order_asked_for() -> None:
    batch = slabs()
    picked = pick(batch, [2, 0, 2])
    parts = batch.pos.split(batch.natoms.tolist())
    assert torch.equal(picked.pos, torch.cat([parts[2], parts[0], parts[2]]))
    assert picked.natoms.tolist() == [len(parts[i]) for i in (2, 0, 2)]
    assert torch.equal(picked.cell, batch.cell[[2, 0, 2]])


def test_structures_without_a_key_of_the_others_are_refused() -> None:
    bare = slabs()
    del bare.fixed
    with pytest.raises(UserError, match="'fixed': write it into both"):
        join([slabs(), bare])


# -- rattled copies -------------------------------------------------------------------------------


def test_noise_has_the_asked_for_spread_and_fixed_atoms_never_move() -> None:
    batch = slabs()
    moved = []
    for step in range(60):
        copies = rattler(copies=1, std=0.03)(batch, step)
        assert copies is not None
        shift = copies.pos - batch.pos
        assert (shift[batch.fixed == 1] == 0).all()
        moved.append(shift[batch.fixed == 0])
    noise = torch.cat(moved)
    assert noise.std().item() == pytest.approx(0.03, rel=0.03)
    assert noise.mean(dim=0).abs().max() < 3 * 0.03 / len(noise) ** 0.5


def test_noise_is_a_function_of_seed_step_structure_and_copy() -> None:
    batch = slabs()
    first = rattler(copies=2)(batch, 5)
    again = rattler(copies=2)(batch, 5)
    assert torch.equal(first.pos, again.pos)
    for other in (rattler(copies=2)(batch, 6), rattler(1, copies=2)(batch, 5)):
        assert not torch.isclose(first.pos, other.pos).all(dim=1)[first.fixed == 0].any()
    parts = first.pos.split(first.natoms.tolist())
    assert not torch.equal(parts[0], parts[1])  # two copies of one structure


def test_noise_depends_neither_on_the_rank_nor_on_the_place_in_the_batch() -> None:
    batch = slabs(6)
    whole = set(one_by_one(rattler(copies=1)(batch, 3)))
    apart: set[bytes] = set()
    for systems in ([4, 1, 5], [0, 3, 2]):  # two ranks with the same global batch
        apart |= set(one_by_one(rattler(copies=1)(pick(batch, systems), 3)))
    assert len(whole) == 6
    assert apart == whole


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    rattler()(slabs(), 1)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(("copies", "number"), [(0.5, 3), (1, 6), (0.25, 2), (2.5, 15)])
def test_the_number_of_copies_is_rounded_and_shared_out(copies: float, number: int) -> None:
    batch = slabs(6)
    chosen = []
    for step in range(4):
        made = rattler(copies=copies)(batch, step)
        assert len(made.natoms) == number
        counts = [made.sid.count(sid) for sid in batch.sid.tolist()]
        assert max(counts) - min(counts) <= 1
        chosen.append(counts)
    if number % 6:
        assert len({tuple(counts) for counts in chosen}) > 1  # not always the same ones


def test_no_copies_of_a_small_batch() -> None:
    assert rattler(copies=0.1)(slabs(2), 1) is None


def test_copies_keep_their_atoms_apart() -> None:
    batch = slabs(4)
    make = rattler(copies=8, std=0.35, min_distance=0.75)
    copies = make(batch, 1)
    closest = np.inf
    for system in range(len(copies.natoms)):
        rows = copies.batch == system
        radii = covalent_radii[copies.atomic_numbers[rows].int().numpy()]
        pos, cell = copies.pos[rows].double().numpy(), copies.cell[system].double().numpy()
        _, distances = ase.geometry.get_distances(pos, cell=cell, pbc=True)
        np.fill_diagonal(distances, np.inf)
        closest = min(closest, (distances / (radii[:, None] + radii[None])).min())
    assert 0.75 <= closest < 0.85
    assert 0 < len(copies.natoms) < 32  # the guard had something to do


def test_molecules_without_a_cell_are_not_wrapped() -> None:
    batch = slabs(2)
    batch.cell = torch.zeros_like(batch.cell)
    assert rattler(copies=1)(batch, 1) is not None


def test_a_std_that_breaks_every_distance_is_refused() -> None:
    with pytest.raises(UserError, match=r"std is 2 Å, which brings atoms closer .* smaller"):
        rattler(copies=4, std=2.0, min_distance=1.0)(slabs(4), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copies": -0.5}, "rattle.copies must be at least 0, not -0.5"),
        ({"std": 0}, "rattle.std must be greater than 0"),
        ({"copy": 1}, r"unknown key 'copy' \(did you mean 'copies'\?\)"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rattler(**given)


# -- unlabelled structures ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_lmdb(root / "train", 6, seed=0)
    write_lmdb(root / "more", 10, seed=20)
    write_lmdb(root / "val", 4, seed=50)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"), data)


class _Numbers(torch.utils.data.Dataset):
    """Ten samples, as create_dataset gives them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def dealt(
    monkeypatch: pytest.MonkeyPatch, steps: list[int], ranks: int = 1, **options: Any
) -> list:
    """The samples of each step, of all ranks in their order."""
    monkeypatch.setattr("fairchem_kd.augment.unlabelled.create_dataset", lambda *args: _Numbers())
    loaders = [
        UnlabelledLoader(
            UnlabelledOptions(dataset={}, **options),
            labelled=6 // ranks,
            seed=0,
            rank=rank,
            ranks=ranks,
            make_loader=lambda dataset, sampler: torch.utils.data.DataLoader(
                dataset, batch_sampler=sampler, collate_fn=list
            ),
        )
        for rank in range(ranks)
    ]
    return [[sample for loader in loaders for sample in loader(step)] for step in steps]


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


def test_a_resumed_run_goes_on_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dealt(monkeypatch, [1, 2, 3, 4, 5], share=0.5)
    assert dealt(monkeypatch, [4, 5], share=0.5) == expected[3:]


def test_nothing_left_after_skip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="skip is 10, but the data set has 10 samples"):
        dealt(monkeypatch, [1], skip=10)


# -- in a training --------------------------------------------------------------------------------


def distilled(root: Path, data: Path, teacher: Path, **block: Any) -> dict[str, Any]:
    return config(root, data, teacher=teacher, losses=LOSSES, distillation=block)


def first_losses(arguments: dict[str, Any]) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Label loss, raw distillation losses, gradients: all of the first step."""
    with trainer(arguments) as built:
        built.train_sampler.set_epoch_and_start_iteration(0, 0)
        built._set_up_distillation()
        built.model.train()
        built.step = 1
        batch = next(iter(built.train_loader))
        out = built._forward(batch)
        taught, built._distilled = built._distilled, None
        label = built._compute_loss(out, batch).item()
        distillation = built.distillation
        inputs = distillation._inputs(*taught)
        parts = {
            f"{name}.{part.name}": (part.total.item(), float(part.count))
            for name, term in distillation.terms.items()
            for part in term(inputs)
        }
        structures = {key: taught[0][key].clone() for key in ("pos", "natoms")}
        return label, parts, {**structures, "energy": out["energy"].detach().clone()}


UNLABELLED = {"share": 0.5, "skip": 2}


def test_the_label_loss_is_unchanged_by_companions(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, **UNLABELLED}
    plain = first_losses(distilled(tmp_path / "a", data, teacher))
    extended = first_losses(
        distilled(tmp_path / "b", data, teacher, rattle={"copies": 1}, unlabelled=more)
    )
    assert extended[0] == pytest.approx(plain[0], rel=1e-5)
    assert (len(plain[2]["natoms"]), len(extended[2]["natoms"])) == (3, 12)
    assert extended[2]["energy"].shape == plain[2]["energy"].shape
    torch.testing.assert_close(extended[2]["energy"], plain[2]["energy"])


def test_a_batch_with_copies_is_the_sum_of_its_parts(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Totals and counts of clean structures and copies add up to those of the joined batch."""
    arguments = distilled(tmp_path, data, teacher, rattle={"copies": 1})
    with trainer(arguments) as built:
        built.train_sampler.set_epoch_and_start_iteration(0, 0)
        built._set_up_distillation()
        built.model.train()
        built.step = 1
        batch = next(iter(built.train_loader))
        clean = join([batch])
        copies = built.companions.rattler(batch, 1)
        sums: dict[str, list[Any]] = {}
        for one in (join([clean, copies]), clean, copies):
            with built.distillation.tap_student() as features:
                out = super(type(built), built)._forward(one)
            for name, term in built.distillation.terms.items():
                for part in term(built.distillation._inputs(one, out, features)):
                    sums.setdefault(f"{name}.{part.name}", []).append(
                        (part.total.item(), float(part.count))
                    )
    assert len(sums) == 5
    for name, (whole, *parts) in sums.items():
        assert whole[0] == pytest.approx(sum(total for total, _ in parts), rel=1e-4), name
        assert whole[1] == sum(count for _, count in parts), name


def test_copies_above_the_teachers_force_limit_do_not_count(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    plain = first_losses(distilled(tmp_path / "a", data, teacher))
    none_kept = {"copies": 1, "max_force": 1e-9}
    kept = first_losses(distilled(tmp_path / "b", data, teacher, rattle=none_kept))
    assert len(kept[2]["natoms"]) == 6
    for name, (total, count) in plain[1].items():
        assert kept[1][name] == (pytest.approx(total, rel=1e-4), count), name


def test_unlabelled_labels_are_never_read(tmp_path: Path, data: Path, teacher: Path) -> None:
    """A run with absurd labels on the unlabelled structures is the same run, bit for bit."""
    write_lmdb(tmp_path / "absurd", 10, seed=20, energy=lambda e, i: 1e6, forces=lambda f, i: f * 0)
    final = []
    for number, src in enumerate((data / "more", tmp_path / "absurd")):
        more = {"dataset": {"format": "lmdb", "src": str(src)}, "share": 0.4}
        block = {"rattle": {"copies": 0.5}, "unlabelled": more}
        with trainer(distilled(tmp_path / f"run{number}", data, teacher, **block)) as built:
            built.train(disable_eval_tqdm=True)
            final.append(copy.deepcopy(built._unwrapped_model.state_dict()))
            records = read_records(built.config["cmd"]["checkpoint_dir"])
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())
    steps = [record["metrics"] for record in records if record["kind"] == "train"]
    assert {step["rattle"] for step in steps} == {1.0}


def test_resume_with_companions_equals_the_uninterrupted_run(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, "share": 0.4}
    block = {"rattle": {"copies": 0.5}, "unlabelled": more}
    arguments = distilled(tmp_path, data, teacher, **block)
    arguments["optimizer"] |= {"max_epochs": 4, "checkpoint_every": 3, "T_max": 8}
    with trainer(arguments, timestamp_id="whole") as built:
        built.train(disable_eval_tqdm=True)
        expected = copy.deepcopy(built._unwrapped_model.state_dict())
    with trainer(arguments, timestamp_id="broken") as built:
        built.config["optim"]["max_epochs"] = 2  # 4 of 8 steps, the last save after 3
        built.train(disable_eval_tqdm=True)
    with trainer(arguments, timestamp_id="broken") as built:
        built.train(disable_eval_tqdm=True)
        resumed = built._unwrapped_model.state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_elements_that_the_teacher_does_not_know_are_refused_before_training(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    write_lmdb(tmp_path / "gold", 4, seed=9, atomic_numbers=lambda z, i: z * 0 + 94)
    more = {"dataset": {"format": "lmdb", "src": str(tmp_path / "gold")}}
    with (
        trainer(distilled(tmp_path / "run", data, teacher, unlabelled=more)) as built,
        pytest.raises(UserError, match=r"unlabelled.dataset: The data holds Pu.*does not know"),
    ):
        built.train(disable_eval_tqdm=True)


def test_the_labelled_lmdb_cannot_be_the_unlabelled_one_too(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "train")}}
    arguments = distilled(tmp_path, data, teacher, unlabelled=more)
    with pytest.raises(UserError, match=r"unlabelled.dataset.src and dataset.train.src are both"):
        trainer(arguments).__enter__()


def test_a_hydra_student_has_companions(tmp_path: Path, data: Path, teacher: Path) -> None:
    """Its backbone makes the graph, and has the switch."""
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, **UNLABELLED}
    arguments = distilled(tmp_path, data, teacher, rattle={"copies": 1}, unlabelled=more)
    arguments["model"] = model_config("painn_hydra")
    _, _, extended = first_losses(arguments)
    assert len(extended["natoms"]) == 12
    arguments["model"]["backbone"]["otf_graph"] = False
    with trainer(arguments) as built, pytest.raises(UserError, match=r"model\.backbone\.otf_graph"):
        built._set_up_distillation()


@pytest.mark.parametrize("name", ["lmdb", "trajectory_lmdb"])
def test_one_lmdb_under_another_format_is_noticed(
    tmp_path: Path, data: Path, teacher: Path, name: str
) -> None:
    """fairchem has three names for the format."""
    more = {"dataset": {"format": name, "src": str(data / "train" / "data.0000.lmdb")}}
    arguments = distilled(tmp_path, data, teacher, unlabelled=more)
    arguments["dataset"]["train"]["format"] = "trajectory_lmdb"
    with pytest.raises(UserError, match="can open an LMDB only once"):
        trainer(arguments).__enter__()


def test_a_graph_from_the_data_set_is_refused(tmp_path: Path, data: Path, teacher: Path) -> None:
    arguments = distilled(tmp_path, data, teacher, rattle={})
    arguments["model"]["otf_graph"] = False
    with (
        trainer(arguments) as built,
        pytest.raises(UserError, match=r"need model\.otf_graph: true"),
    ):
        built._set_up_distillation()
