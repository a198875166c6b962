"""The ``build`` key of a config: data sets that are made when they are first asked for."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ase.db
import lmdb

from fairchem_kd.data.create import check_options, create
from fairchem_kd.data.lmdb_file import check_lmdb, is_lmdb
from fairchem_kd.data.metadata import METADATA, check_metadata
from fairchem_kd.data.recipes.registry import parse_options
from fairchem_kd.data.splits import QUARTERS
from fairchem_kd.data.xyz_file import SUFFIXES, check_xyz
from fairchem_kd.errors import UserError, did_you_mean

#: fairchem's names of the format that the recipes write.
LMDB_FORMATS = ("lmdb", "single_point_lmdb", "trajectory_lmdb")
ASE_FORMATS = ("ase_db", "ase_read", "ase_read_multi")
SPLITS = ("train", "val", "test", "relax")


def _splits(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each split's key and mapping, in every form that fairchem takes under ``dataset``."""
    dataset = config.get("dataset") or {}
    if isinstance(dataset, (list, tuple)):  # an old form: train, val, test in this order
        named = {f"dataset[{number}]": split for number, split in enumerate(dataset)}
    elif isinstance(dataset, Mapping) and "src" in dataset:  # an old form: train alone
        named = {"dataset": dataset}
    elif isinstance(dataset, Mapping):
        named = {f"dataset.{name}": dataset[name] for name in SPLITS if name in dataset}
    else:
        raise UserError(f"dataset is {dataset!r}, but must be a mapping with train, val and test.")
    train: Mapping[str, Any] = {}
    for key, split in named.items():
        if not split:
            continue
        if not isinstance(split, Mapping):
            raise UserError(f"{key} is {split!r}, but must be a mapping with format and src.")
        if not train:
            train = split
        if "format" not in split and split.get("use_train_settings", True):
            split = {**split, "format": train.get("format", "lmdb")}  # as fairchem does
        yield key, split
    distillation = (config.get("task") or {}).get("distillation")
    unlabelled = distillation.get("unlabelled") if isinstance(distillation, Mapping) else None
    if isinstance(unlabelled, Mapping) and isinstance(unlabelled.get("dataset"), Mapping):
        yield "task.distillation.unlabelled.dataset", unlabelled["dataset"]


def ensure_built(config: Mapping[str, Any]) -> None:
    """Make the data sets that a config's splits ask for with ``build``, then check every split.

    ``dataset.train.build: {recipe: slabs, seed: 0}`` with ``src: data/slabs/train`` makes the whole
    data set ``data/slabs``, once, whatever the number of processes and jobs that ask for it.

    Args:
        config: fairchem's config; its ``dataset`` is read, and the unlabelled structures'.

    Raises:
        UserError: a wrong ``build``, a data set that cannot be built or was built with other
            options, a missing path, an empty split, two splits that are one LMDB.
    """
    opened: dict[Path, str] = {}
    for key, split in _splits(config):
        if split.get("build") is not None and split.get("src") is not None:
            _build_split(split, key)
        check_dataset(split, key)
        for file in _lmdb_files(split):
            other = opened.setdefault(file, key)
            if other != key:
                raise UserError(
                    f"{key}.src and {other}.src are both {split['src']}, but a process can open an "
                    "LMDB only once: give one of the two another src."
                )


def _lmdb_files(split: Mapping[str, Any]) -> set[Path]:
    """The LMDB files, also those of an ASE database (``.aselmdb``), that fairchem opens for it."""
    src = split.get("src")
    if src is None:
        return set()
    known = {"ase_db": ".aselmdb", **dict.fromkeys(LMDB_FORMATS, ".lmdb")}
    suffix = known.get(split.get("format", "lmdb"))
    if suffix is None:
        return set()
    files: set[Path] = set()
    for path in [Path(src)] if isinstance(src, (str, Path)) else map(Path, src):
        if path.is_dir():
            files.update(path.glob(f"*{suffix}"))
        elif suffix == ".lmdb" or path.suffix == suffix:
            files.add(path)
    return {file.resolve() for file in files}


def _build_split(split: Mapping[str, Any], key: str) -> None:
    options = parse_options(split["build"], f"{key}.build")
    src = split["src"]
    if not isinstance(src, str):
        raise UserError(f"{key}.src is {src!r}, but with build it must be one folder.")
    path = Path(src)
    known = [*options.sizes, *QUARTERS.values()]
    if path.name not in known:
        raise UserError(
            f"{key}.src is {src}, but its last part must be a split of the recipe "
            f"'{options.recipe.name}'{did_you_mean(path.name, known)}."
        )
    if path.parent.exists():
        check_options(path.parent, options, f"{key}.build")
    else:
        create(options, path.parent)


def check_dataset(split: Mapping[str, Any], key: str) -> None:
    """Refuse an LMDB split that is missing, not LMDB, or empty, and a missing one of ASE's formats.

    Args:
        split: the mapping under ``key``, with ``src``.
        key: where it stands in the config, such as ``dataset.train``.

    Raises:
        UserError: see above.
    """
    src = split.get("src")
    if src is not None and split.get("format") in ASE_FORMATS:
        _check_ase(split, key)
    if src is None or split.get("format", "lmdb") not in LMDB_FORMATS:
        return
    for path in [Path(src)] if isinstance(src, (str, Path)) else [Path(one) for one in src]:
        if not path.exists():
            mend = (
                "the data set was built without it; remove the data set so that it is built again"
                if split.get("build") is not None
                else "fix the path, or add 'build: {recipe: slabs}' beside it to have data made"
            )
            raise UserError(f"{key}.src: {path.absolute()} does not exist; {mend}.")
        files = [path] if path.is_file() else sorted(path.glob("*.lmdb"))
        if not files:
            raise UserError(
                f"{key}.src: the folder {path.absolute()} has no *.lmdb file; name the folder that "
                "has them, or set another format."
            )
        for file in files:
            check_lmdb(file, f"{key}.src")
        counts = [_samples(file, f"{key}.src") for file in files]
        if not any(count is None or count for count in counts):
            raise UserError(
                f"{key}.src: {path.absolute()} is empty (0 frames); name a split that has some."
            )
        if split.get("metadata_path") is None:
            folder = path.parent if path.is_file() else path
            total = None if None in counts or "total_shards" in split else sum(filter(None, counts))
            check_metadata(folder / METADATA, f"{key}.src", total)
    if split.get("metadata_path") is not None:
        check_metadata(Path(split["metadata_path"]), f"{key}.metadata_path", None)


def _check_ase(split: Mapping[str, Any], key: str) -> None:
    """Refuse what fairchem's readers of ASE files answer with a traceback."""
    src = split["src"]
    for path in [src] if isinstance(src, (str, Path)) else src:
        # a database may also be an address or a pattern; fairchem finds out
        plain = not (split["format"] == "ase_db" and re.search(r"[*?\[]|://", str(path)))
        if plain and not Path(path).exists():
            raise UserError(f"{key}.src: {Path(path).absolute()} does not exist; fix the path.")
        folder = Path(path)
        folder = folder.parent if folder.is_file() else folder
        if plain and split.get("metadata_path") is None:
            check_metadata(folder / METADATA, f"{key}.src", None)
        if plain and split["format"] == "ase_db":
            _check_database(Path(path), f"{key}.src")
        elif plain and Path(path).is_file():
            raise UserError(
                f"{key}.src: {Path(path).absolute()} is a file, and format {split['format']} takes "
                "a folder of files (with pattern): name its folder, or another format."
            )
        elif plain:
            _check_files(Path(path), split, key)
    if split["format"] == "ase_db" and any(f.suffix == ".aselmdb" for f in _lmdb_files(split)):
        try:
            import ase_db_backends  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{key}.src: {src} is an ASE database in LMDB (.aselmdb), which ASE reads with a "
                "package of its own: pip install ase-db-backends."
            ) from error


def _check_database(path: Path, where: str) -> None:
    """Refuse a ``.db`` that is no SQLite, or a damaged one."""
    files = sorted(path.glob("*.db")) if path.is_dir() else [path]
    for file in files:
        if file.suffix != ".db":
            continue
        if is_lmdb(file):
            raise UserError(
                f"{where}: {file.absolute()} is an LMDB, and a .db of ASE's is SQLite: set format: "
                "lmdb, or call it .aselmdb if it is ASE's in LMDB."
            )
        try:
            found = ase.db.connect(str(file)).count()
        except Exception as error:  # sqlite3's, or what ASE makes of rows that are none
            raise UserError(
                f"{where}: {file.absolute()} cannot be read as ASE's database "
                f"({type(error).__name__}: {error}); copy it again, or name another file."
            ) from error
        if not found and not path.is_dir():
            raise UserError(
                f"{where}: {file.absolute()} is empty (0 frames); name one that has some."
            )


def _check_files(folder: Path, split: Mapping[str, Any], key: str) -> None:
    """Refuse a folder without a file that the pattern matches, and files that lie of their size."""
    pattern = split.get("pattern", "*")
    files = [path for path in islice(folder.glob(str(pattern)), _MOST_FILES) if path.is_file()]
    if not files and split.get("index_file") is None:
        raise UserError(
            f"{key}.pattern: no file in {folder.absolute()} matches {pattern!r}; mend the pattern, "
            "or name another folder."
        )
    for file in files:
        if file.suffix in SUFFIXES:
            try:
                check_xyz(file)
            except UserError as error:
                raise UserError(f"{key}.src: {error}") from None


_MOST_FILES = 10_000  # that are looked at before fairchem reads them


def _samples(file: Path, where: str) -> int | None:
    """How many samples an LMDB file holds; None where this process has it open already.

    Raises:
        UserError: it cannot be read, or says that it has more than there are.
    """
    try:
        environment = lmdb.open(
            str(file), subdir=False, readonly=True, lock=False, readahead=False, max_readers=1
        )
    except lmdb.Error as error:
        if "already open" in str(error):  # by a data set of this process, which read it
            return None
        raise UserError(
            f"{where}: {file.absolute()} cannot be read as LMDB ({error}); it may be truncated."
        ) from error
    try:
        with environment.begin() as transaction:
            length = transaction.get(b"length")
        entries = int(environment.stat()["entries"])
    except lmdb.Error as error:
        raise UserError(
            f"{where}: {file.absolute()} is damaged ({error}); copy or build it again."
        ) from error
    finally:
        environment.close()
    if length is None:
        return entries
    claimed = _number(length)
    if claimed is not None and not 0 <= claimed < entries:
        raise UserError(
            f"{where}: {file.absolute()} says that it has {claimed:,} samples (its key 'length') "
            f"and has {entries - 1:,}; copy or build it again."
        )
    return entries - 1 if claimed is None else claimed


class _Number(pickle.Unpickler):
    """Unpickles plain numbers alone."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def _number(pickled: bytes) -> int | None:
    """The whole number that a pickle is of; None where it is of another type, as numpy's."""
    try:
        value = _Number(io.BytesIO(pickled)).load()
    except Exception:  # whatever a pickle that is none makes of it
        return None
    return value if type(value) is int else None
