"""A checkpoint's card says which file it is of, and stands before the file does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attacks
import pytest
from configs import ROOT

from fairchem_kd.commands import main as cli
from fairchem_kd.digest import sha256_of
from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint

SHIPPED = sorted((ROOT / "checkpoints").glob("*.pt"))
EXPORT = ["export", "model.pt", "small.pt"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model with its card."""
    for suffix in (".pt", ".json"):
        shutil.copy(SHIPPED[-1].with_suffix(suffix), tmp_path / f"model{suffix}")
    return tmp_path


def card(place: Path, name: str = "model.json") -> dict[str, Any]:
    return json.loads((place / name).read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_ones_are_those_of_their_cards(path: Path) -> None:
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == sha256_of(path)
    assert path.name == json.loads(path.with_suffix(".json").read_text())["checkpoint"]


def test_another_file_is_refused_with_what_to_do(place: Path) -> None:
    assert read_checkpoint(place / "model.pt")
    shutil.copy(SHIPPED[0], place / "model.pt")  # whole, and another model
    with pytest.raises(UserError, match=r"model\.pt is not the file .*model\.json.*on purpose"):
        read_checkpoint(place / "model.pt")
    with pytest.raises(UserError, match="is not the file"):
        read_checkpoint(place / "model.pt", trust=True)
    told = card(place)
    del told["sha256"]
    (place / "model.json").write_text(json.dumps(told))
    assert read_checkpoint(place / "model.pt")


@pytest.mark.parametrize("digest", ["", "abc", 3, ["a" * 64], "A" * 64, "g" * 64, True])
def test_a_digest_that_is_none(place: Path, digest: Any) -> None:
    (place / "model.json").write_text(json.dumps({"sha256": digest}))
    with pytest.raises(UserError, match=r"model\.json has a sha256 that is none"):
        read_checkpoint(place / "model.pt")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": null}', '{"a": 1}', "[" * 9999])
def test_what_is_no_card_says_nothing_of_the_file(place: Path, text: str) -> None:
    (place / "model.json").write_text(text)
    assert read_checkpoint(place / "model.pt")


def killed(argv: Sequence[str]) -> int:
    """The export, which ends where the file would get its place."""
    replace = os.replace

    def last(source: Any, dest: Any) -> None:
        if str(dest).endswith("small.pt"):
            os._exit(9)
        replace(source, dest)

    os.replace = last
    return cli.main(list(argv))


def test_an_export_that_was_killed_can_be_run_again(place: Path) -> None:
    assert attacks.run(EXPORT, place, killed).code == 9
    assert not (place / "small.pt").exists()
    assert card(place, "small.json")["checkpoint"] == "small.pt"
    attacks.run(EXPORT, place).went_on()
    assert card(place, "small.json")["sha256"] == sha256_of(place / "small.pt")
    assert read_checkpoint(place / "small.pt")
    attacks.run(EXPORT, place).sentence("small.pt", "--force")


def test_over_an_older_one_no_card_is_taken_for_that_of_another_file(place: Path) -> None:
    attacks.run(EXPORT, place).went_on()
    (place / "small.pt").write_bytes(SHIPPED[0].read_bytes())
    assert attacks.run([*EXPORT, "--force"], place, killed).code == 9
    with pytest.raises(UserError, match="is not the file"):
        read_checkpoint(place / "small.pt")
    attacks.run([*EXPORT, "--force"], place).went_on()
    assert read_checkpoint(place / "small.pt")


def test_data_that_are_refused_leave_neither_file_nor_card(place: Path) -> None:
    said = attacks.run([*EXPORT, "--data", "nowhere"], place)
    said.sentence("nowhere")
    assert sorted(path.name for path in place.iterdir()) == ["model.json", "model.pt"]
