"""Data as fairchem's and OCP's users have them, other than our own LMDBs, in a distillation."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import lmdb
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from models import structures, to_data
from torch.utils.data import DataLoader, Dataset, Subset
from torch_geometric.data import Data
from trainings import config, trainer, write_lmdb, write_teacher

from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.data.build import ensure_built
from fairchem_kd.errors import UserError
from fairchem_kd.models.export import evaluate
from fairchem_kd.stock.datasets import with_own_databases
from fairchem_kd.training.checks import check_labels

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

LABELS = {"r_energy": True, "r_forces": True}


def frames(count: int, seed: int) -> list[ase.Atoms]:
    """Slabs with EMT labels as numbers."""
    found = []
    for index in range(count):
        atoms = structures(4, seed=seed + index // 4, std=0.15)[index % 4]
        energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        atoms.info.clear()
        found.append(atoms)
    return found


def of_pyg_1(data: Data, number: int) -> Data:
    """A sample of OC20's published LMDBs: what unpickling a `Data` of PyG 1 gives."""
    sample = Data.__new__(Data)
    sample.__dict__.clear()
    sample.__dict__.update(
        x=None, edge_index=None, y=float(data.energy), pos=data.pos, cell=data.cell,
        atomic_numbers=data.atomic_numbers, natoms=data.natoms, force=data.forces,
        fixed=data.fixed, tags=data.tags, sid=f"random{number}", fid=torch.tensor([number]),
        total_frames=9,
    )  # fmt: skip
    return sample


def write_oc20_lmdb(folder: Path, count: int, seed: int) -> None:
    """Files of at most four samples, the first without the key `length`."""
    folder.mkdir(parents=True)
    slabs = frames(count, seed)
    for number, start in enumerate(range(0, count, 4)):
        file = folder / f"data.{number:04d}.lmdb"
        chosen = slabs[start : start + 4]
        env = lmdb.open(str(file), subdir=False, lock=False, map_size=2**24)
        with env, env.begin(write=True) as transaction:
            for index, atoms in enumerate(chosen):
                sample = of_pyg_1(to_data(atoms), start + index)
                transaction.put(str(index).encode(), pickle.dumps(sample, protocol=2))
            if number:
                transaction.put(b"length", pickle.dumps(len(chosen)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    write_lmdb(root / "lmdb" / "train", 4, seed=0)
    write_lmdb(root / "lmdb" / "val", 2, seed=9)
    write_teacher(root / "run", root / "lmdb", "painn").rename(root / "teacher.pt")
    for seed, (split, count) in enumerate((("train", 6), ("val", 2), ("more", 4))):
        write_oc20_lmdb(root / "oc20" / split, count, seed=20 * seed)
        slabs = frames(count, seed=20 * seed)
        (root / "files" / split).mkdir(parents=True)
        ase.io.write(root / "files" / split / "all.traj", slabs)
        for number, atoms in enumerate(slabs):
            ase.io.write(root / "files" / split / f"{number}.extxyz", atoms)
        (root / "db").mkdir(exist_ok=True)
        with ase.db.connect(root / "db" / f"{split}.db") as base:
            for atoms in slabs:
                base.write(atoms)
    return root


def settings(root: Path, name: str, split: str) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "trajectory_lmdb": {
            "src": str(root / "oc20" / split),
            "key_mapping": {"y": "energy", "force": "forces"},
        },
        "ase_db": {"src": str(root / "db" / f"{split}.db"), "a2g_args": LABELS},
        "ase_read": {
            "src": str(root / "files" / split), "pattern": "*.extxyz", "a2g_args": LABELS
        },
        "ase_read_multi": {
            "src": str(root / "files" / split), "pattern": "*.traj", "a2g_args": LABELS,
            "use_tqdm": False,
        },
    }  # fmt: skip
    return {"format": name, **kinds[name]}


@pytest.mark.parametrize("name", ["trajectory_lmdb", "ase_db", "ase_read", "ase_read_multi"])
def test_distilling_with_companions(root: Path, tmp_path: Path, name: str) -> None:
    """The labelled set, the validation set and the unlabelled one are all of that format."""
    unlabelled = {key: value for key, value in settings(root, name, "more").items()
                  if key not in ("key_mapping", "a2g_args")}  # fmt: skip
    arguments = config(
        tmp_path, root / "lmdb", teacher=root / "teacher.pt",
        losses={"n2n": {}, "vanilla": {}}, max_epochs=1,
        distillation={"rattle": {"copies": 1}, "unlabelled": {"dataset": unlabelled}},
    )  # fmt: skip
    transforms = arguments["dataset"]["train"]["transforms"]
    for split in ("train", "val"):
        arguments["dataset"][split] = settings(root, name, split)
    arguments["dataset"]["train"]["transforms"] = transforms
    with trainer(arguments) as built:
        seen = []
        joined = built._forward
        built._forward = lambda batch: seen.append(int(batch.natoms.numel())) or joined(batch)
        built.train(disable_eval_tqdm=True)
        assert built.step == 2
        assert seen[0] == 3
        assert built.distillation.teacher_requests
        assert all(torch.isfinite(p).all() for p in built.model.parameters())


def test_labels_under_another_name_are_asked_for(root: Path, tmp_path: Path) -> None:
    """Stock fails in the first step with a KeyError."""
    arguments = config(tmp_path, root / "lmdb")
    arguments["dataset"]["train"] = settings(root, "trajectory_lmdb", "train")
    del arguments["dataset"]["train"]["key_mapping"]
    del arguments["dataset"]["val"]
    mend = r"dataset\.train\.key_mapping: \{y: energy, force: forces\}"
    with trainer(arguments) as built, pytest.raises(UserError, match=mend):
        built.train()
    arguments["dataset"]["train"] = settings(root, "ase_db", "train")
    del arguments["dataset"]["train"]["a2g_args"]
    with trainer(arguments) as built, pytest.raises(UserError, match="r_energy: true"):
        built.train()
    check_labels(Data(energy=1.0, forces=torch.zeros(1, 3)), ["energy", "forces"], "here")


def test_an_exported_model_is_evaluated_as_it_was_trained(root: Path, tmp_path: Path) -> None:
    """Labels are found under the names that they have in its own data."""
    arguments = config(tmp_path, root / "lmdb")
    arguments["dataset"] = {"train": settings(root, "trajectory_lmdb", "train")}
    with trainer(arguments) as built:
        saved = built.save(checkpoint_file="best_checkpoint.pt", training_state=False)
    found = evaluate(Path(saved), root / "oc20")
    assert found["val"].keys() == {"energy_mae", "forces_mae"}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    def refused(**split: Any) -> str:
        with pytest.raises(UserError) as error:
            ensure_built({"dataset": {"train": split}})
        return str(error.value)

    nowhere = str(tmp_path / "nowhere")
    for name in ("ase_db", "ase_read", "ase_read_multi"):
        assert "nowhere does not exist" in refused(format=name, src=nowhere)
    ensure_built({"dataset": {"train": {"format": "ase_db", "src": f"{nowhere}/*.db"}}})


def test_one_aselmdb_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.aselmdb").touch()
    split = {"format": "ase_db", "src": str(tmp_path)}
    block = {"distillation": {"unlabelled": {"dataset": split}}}
    monkeypatch.setitem(sys.modules, "ase_db_backends", None)
    with pytest.raises(UserError, match="pip install ase-db-backends"):
        ensure_built({"dataset": {"train": split}})
    monkeypatch.setitem(sys.modules, "ase_db_backends", ase)
    with pytest.raises(UserError, match="can open an LMDB only once"):
        ensure_built({"dataset": {"train": split}, "task": block})


class _Base:
    """As ase-db-backends keeps an LMDB: opened anew in a process that did not open it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._env: lmdb.Environment | None = None
        self.read(0)

    def read(self, index: int) -> int:
        if self._env is None or self.pid != os.getpid():
            self._env = lmdb.open(str(self.file), subdir=False, readonly=True, lock=False)
            self.pid = os.getpid()
        with self._env.begin() as transaction:
            return int(transaction.get(str(index).encode()))


class _Numbers(Dataset):
    def __init__(self, file: Path) -> None:
        self.dbs = [_Base(file)]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.dbs[0].read(index)


def test_workers_open_ase_lmdbs_for_themselves(tmp_path: Path) -> None:
    file = tmp_path / "data.aselmdb"
    with lmdb.open(str(file), subdir=False, lock=False) as env, env.begin(write=True) as writing:
        for index in range(4):
            writing.put(str(index).encode(), str(index**2).encode())
    dataset = _Numbers(file)
    loader = DataLoader(
        Subset(Subset(dataset, range(4)), [3, 2, 1]), num_workers=2, multiprocessing_context="fork"
    )
    with_own_databases(loader)
    assert [int(value) for value in loader] == [9, 4, 1]
    assert dataset[2] == 4  # the parent's is open still


def test_a_folder_of_files_is_read_in_order(root: Path) -> None:
    """What `cka`, `features`, `physics` and `cost` take as structures."""
    with open_structures(root / "files" / "val") as found:
        held = [sample.atomic_numbers.tolist() for sample in found.samples()]
    expected = frames(2, seed=20)
    assert held == 2 * [atoms.numbers.tolist() for atoms in expected]  # 0, 1 and all.traj
    with open_structures(root / "files" / "val", limit=1) as found:
        samples = list(found.samples())
    assert [s.atomic_numbers.tolist() for s in samples] == [expected[0].numbers.tolist()]
    chosen = {"src": str(root / "lmdb" / "train"), "first_n": 2}  # as a run's config may have it
    with open_structures(chosen) as found:
        assert [sample.sid for sample in found.samples()] == [0, 1]
    empty = root / "empty"
    empty.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no file that ASE is known"), open_structures(empty):
        pass
