"""A teacher of whom there is a store and nothing else: it says what it has said, and no more."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.features import FeatureSpec, Request
from fairchem_kd.features.address import parse_address
from fairchem_kd.store import Card, Column
from fairchem_kd.store.failures import failures
from fairchem_kd.store.names import atom_energy_column, output_column
from fairchem_kd.teachers.answers import EDGES, feature_column, structures_of, taught
from fairchem_kd.teachers.base import Taught
from fairchem_kd.teachers.stored import requests_in

if TYPE_CHECKING:
    from torch_geometric.data import Batch

KEY = "task.distillation.teacher.store"


class RecordedTeacher:
    """What the card and the shards of a store say of the teacher that filled it.

    Args:
        folder: the store's.
        where: the key of a config that names it.

    Raises:
        UserError: there is no store, or one that holds no answers.
    """

    is_here = False

    def __init__(self, folder: Path, where: str = KEY) -> None:
        card = Card.read(folder, where)
        if card is None:
            raise UserError(
                f"{where}: there is no store {folder}, and without teacher.checkpoint nobody else "
                f"can be asked: fill it with `fairchem-kd teach CONFIG.yml --out {folder} "
                "--calculator MODULE:FACTORY` (or --teacher FILE), or name another folder."
            )
        self.folder = folder
        self.where = where
        self.card = card
        requests, columns = requests_in(folder)
        self.held = {column.name: column for column in columns}
        self.features = set(requests)
        self.levels = {
            name.removeprefix(output_column("")): "atom" if column.per == "atom" else "system"
            for name, column in self.held.items()
            if name.startswith(output_column(""))
        }
        if not self.levels:
            raise UserError(
                f"{where}: {folder} holds no answers: {self.mend} fills it; or name another folder."
            )
        self._failed: dict[bytes, object] | None = None

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def digest(self) -> str:
        return self.card.teacher

    @property
    def identity(self) -> str:
        return f"store of {self.card.teacher}"

    @property
    def precision(self) -> str:
        return self.card.precision

    @property
    def energy_name(self) -> str | None:
        own = [name for name in self.levels if atom_energy_column(name) in self.held]
        return own[0] if len(own) == 1 else None

    @property
    def mend(self) -> str:
        """The command that fills what is missing."""
        return f"`{shlex.join(['fairchem-kd', 'teach', 'CONFIG.yml', *self.words])}`"

    @property
    def words(self) -> list[str]:
        """The options of the command, for this teacher and this store."""
        told = self.card.calculator
        if told is None:
            return ["--teacher", self.card.name, "--out", str(self.folder)]
        words = ["--calculator", told["factory"]]
        if told["arguments"]:
            words += ["--calculator-args", json.dumps(told["arguments"])]
        if told.get("label"):
            words += ["--teacher-name", str(told["label"])]
        return [*words, "--out", str(self.folder)]

    def spread(self, output: str) -> float | None:
        return None

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        specs = {}
        for request in requests:
            for address in parse_address(request.address):
                if request not in self.features:
                    known = sorted(one.address for one in self.features)
                    raise UserError(
                        f"the store {self.folder} holds no feature '{address}' of {self.name} as "
                        f"{request.form}{did_you_mean(address, known)}; {self._mend_feature()}"
                    )
            column = self.held[feature_column(request)]
            specs[request] = FeatureSpec(
                request.address, request.form, column.shape[-1], f"kept in {self.folder}"
            )
        return specs

    def _mend_feature(self) -> str:
        if self.card.calculator is None:
            return f"{self.mend} fills it"
        return (
            f"if the calculator gives it in its results, {self.mend} with --features ADDRESS=KEY "
            "fills it; or leave that loss out"
        )

    def require_outputs(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.levels:
                raise UserError(
                    f"the store {self.folder} holds no '{name}' of {self.name}"
                    f"{did_you_mean(name, self.levels)}; take a loss that does not need it."
                )

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Nothing to check: what is in the store has been answered."""

    def columns(self, requests: Sequence[Request]) -> list[Column]:
        """What a record holds of all outputs and of these features.

        Raises:
            UserError: a feature that the store does not have.
        """
        self.specs(requests)
        wanted = [feature_column(request) for request in requests]
        outputs = [name for name in self.held if name.startswith(output_column(""))]
        shares = [name for name in self.held if name.startswith(atom_energy_column("energy"))]
        if not any(request.address.startswith("atom_energy") for request in requests):
            shares = []
        return [self.held[name] for name in dict.fromkeys([*outputs, *shares, *wanted])]

    @property
    def failed(self) -> Mapping[bytes, object]:
        """The structures of which the teacher could say nothing, by key."""
        if self._failed is None:
            self._failed = dict(failures(self.folder))
        return self._failed

    def teach(self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        """NaN of structures of which the teacher could say nothing, so that they do not count.

        Raises:
            UserError: a structure that it was never asked about.
        """
        strange = [one for one in structures_of(batch.clone().to("cpu"))
                   if one.key() not in self.failed]  # fmt: skip
        if strange:
            raise UserError(
                f"{self.where}: {self.folder} does not hold {len(strange)} of {len(batch.natoms)} "
                f"structures of a batch, and nobody can be asked about them: {self.mend} fills it."
            )
        rows = {"structure": len(batch.natoms), "atom": len(batch.pos), "edge": 0}
        types = {"<f8": torch.float64, "<i4": torch.long}  # edges, of which there are none
        nothing = {
            column.name: torch.full(
                (rows[column.per], *column.shape), 0 if column.name == EDGES else torch.nan,
                device=batch.pos.device, dtype=types.get(column.dtype, torch.float32),
            )
            for column in self.columns(requests)
        }  # fmt: skip
        return taught(nothing, batch.natoms, list(requests), self.name)
