"""Filling a store with what an ASE calculator says: resumable, in parts, past its failures.

A structure that is there is not asked about again; each answer is on the disk before the next
question. Several processes may fill one store, each with a part of the structures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import ase

from fairchem_kd.calculators.asking import Calculator, NoAnswer, parse_features, rounded
from fairchem_kd.calculators.checks import check_forces, check_repeats, check_turning
from fairchem_kd.errors import UserError
from fairchem_kd.store.card import OWN, Card
from fairchem_kd.store.failures import FAILED, failures, note_failure
from fairchem_kd.store.format import Array, Structure, Writer
from fairchem_kd.store.reader import Reader

#: So many failures one after the other, and no answer between them, end it.
IN_A_ROW = 32
_PROBED = 16  # structures among which one is looked for that can be asked about
_LOOK = 5.0  # seconds between two looks at what other processes have added
_TELL = 30.0  # seconds between two lines


@dataclass(frozen=True)
class Item:
    """A structure to ask about, and where it comes from."""

    source: str
    number: int  #: in its source
    structure: Structure

    def __str__(self) -> str:
        formula = ase.Atoms(numbers=self.structure.numbers).get_chemical_formula()
        return f"structure {self.number} of {self.source} ({formula})"


@dataclass
class Summary:
    """What was done."""

    there: int = 0  #: structures that the store had already
    asked: int = 0  #: that were asked about now
    failed: int = 0  #: of which nothing could be said, now or before
    ended: str = ""  #: why it ended before all were there

    def __str__(self) -> str:
        words = f"{self.asked} structures asked about, {self.there} were there already"
        if self.failed:
            words += f", {self.failed} failed (named in {FAILED} of the store)"
        return words + (f"; {self.ended}" if self.ended else "")


@dataclass
class _Progress:
    """Lines of how far it is, not too often; on a terminal one line that is written over."""

    total: int
    began: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def tell(self, done: int, summary: Summary, *, last: bool = False) -> None:
        """``done`` of the structures are behind; ``last``: there is nothing more to come."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - max(self.told, self.began) < (0.5 if terminal else _TELL) and not last:
            return
        if last and not (terminal and self.told):
            return
        self.told = now
        rate = summary.asked / max(now - self.began, 1e-9)
        left = f", {(self.total - done) / rate / 60:.1f} min left" if rate and not last else ""
        failed = f", {summary.failed} failed" if summary.failed else ""
        line = f"asked about {done} of {self.total} structures ({rate:.1f}/s{left}){failed}"
        print(f"\r{line}\033[K" if terminal else line, file=sys.stderr,
              end="\n" if last or not terminal else "", flush=True)  # fmt: skip


class CalculatorFilling:
    """Asks about structures and keeps the answers.

    Args:
        store: its folder, which :func:`prepare` has made.
        calculator: is asked.
        limit: bytes that the shard written here may have.
        retry: ask again about structures of which nothing could be said before.
        quiet: tell nothing on the way.
    """

    def __init__(
        self,
        store: Path,
        calculator: Calculator,
        *,
        limit: float = float("inf"),
        retry: bool = False,
        quiet: bool = False,
    ) -> None:
        self.store = store
        self.calculator = calculator
        self.quiet = quiet
        self.reader = Reader(store)
        self._failed = {} if retry else failures(store)
        self._left = limit
        self._writer: Writer | None = None
        self._looked = time.monotonic()
        self._in_a_row = 0

    def fill(self, items: Iterable[Item], total: int) -> Summary:
        """Ask about those of the structures that the store lacks.

        Args:
            items: the structures.
            total: how many they are, or nearly.

        Raises:
            UserError: it can say nothing of many structures in a row.
            OSError: the answers cannot be written; those before are kept.
        """
        summary, progress = Summary(), _Progress(total)
        done = 0
        try:
            for done, item in enumerate(items, start=1):
                self._one(item, summary)
                if summary.ended:
                    break
                if not self.quiet:
                    progress.tell(done, summary)
            if not self.quiet:
                progress.tell(done, summary, last=True)
        finally:
            if self._writer is not None:
                self._writer.close()
            self.reader.refresh()
            self.reader.close()
        return summary

    def _one(self, item: Item, summary: Summary) -> None:
        key = item.structure.key()
        if self._there(key):
            summary.there += 1
            return
        if key in self._failed:
            summary.failed += 1
            return
        try:
            values = self.calculator.ask(item.structure)
        except NoAnswer as why:
            summary.failed += 1
            self._failed[key] = {}
            note_failure(self.store, key, {"structure": str(item), "why": str(why)})
            self._in_a_row += 1
            if self._in_a_row >= IN_A_ROW:
                raise UserError(
                    f"--calculator {self.calculator.factory.path} could say nothing of "
                    f"{self._in_a_row} structures one after the other, lastly of {item}: {why}. "
                    "Mend that, or take structures that it knows; --retry asks about these again."
                ) from None
            return
        self._in_a_row = 0
        summary.asked += 1
        if self._writer is None:
            assert self.calculator.columns is not None
            self._writer = Writer(self.store, self.calculator.columns)
        size = self._writer.size(len(item.structure.numbers))
        if size > self._left:
            summary.ended = "it has reached the size that --max-gb allows"
            return
        self._writer.append([(rounded(item.structure), values)])
        self._left -= size

    def _there(self, key: bytes) -> bool:
        now = time.monotonic()
        if now - self._looked > _LOOK:
            self._looked = now
            self.reader.refresh()
        return self.reader.has(key, self.calculator.wanted)


def prepare(store: Path, calculator: Calculator, items: Iterable[Item]) -> tuple[Card, list[str]]:
    """Make the store of a calculator, after looking at its forces; or find that it is this one's.

    One structure at least is asked about, so that the store says what its answers have.

    Args:
        store: the folder.
        calculator: whose answers it is to keep.
        items: structures that will be asked about, the first few of which are tried.

    Returns:
        The card, and what was found, in sentences.

    Raises:
        UserError: the folder is something else, or keeps what another teacher said; the calculator
            can say nothing of the first structures, or its forces are not what they are called.
        OSError: it cannot be written.
    """
    factory = calculator.factory
    card = Card.read(store, "--out")
    told: list[str] = []
    tried = list(islice(items, _PROBED))
    if not tried:
        raise UserError("There is no structure to ask about: name files that hold some.")
    if card is not None:
        card = _same(card, calculator, store)
        if _has_some(store, calculator):
            return card, told
    item, values = _first_answer(calculator, tried)
    if card is None:
        told += _look(calculator, [item.structure for item in tried])
        features = factory.told(calculator.features)
        card = Card(factory.digest, factory.name, "fp32", {}, OWN, features)
        card.write(store)
    assert calculator.columns is not None
    writer = Writer(store, calculator.columns)
    try:
        writer.append([(rounded(item.structure), values)])
    finally:
        writer.close()
    return card, told


def _look(calculator: Calculator, structures: Sequence[Structure]) -> list[str]:
    found = check_forces(calculator, structures)
    if found is None:
        said = [
            "The forces could not be compared with the energy: of the first structures none has "
            "forces, or none can be asked about."
        ]
    else:
        said = [f"Looked at {found}."]
        if not found.conservative:
            said.append(
                "Its forces are not exactly the gradient of its energy, as where a model predicts "
                "them directly: a student with conservative forces cannot have both."
            )
    said += check_repeats(calculator, structures[0])
    return said + check_turning(calculator, structures[0])


def _same(card: Card, calculator: Calculator, store: Path) -> Card:
    """The card of the store of this calculator, with features that are new to it.

    What the store has of other structures is asked of new ones too: a training that reads features
    could do nothing with records that lack them.

    Raises:
        UserError: it is another one's, or a feature is under another key of its results.
    """
    factory = calculator.factory
    if card.teacher != factory.digest:
        was = "" if card.calculator is None else f" with {card.calculator.get('versions')}"
        raise UserError(
            f"--out {store} keeps what another teacher said ({card.name}{was}), not {factory.name} "
            f"with {factory.versions}, or with other arguments: name another folder."
        )
    told = (card.calculator or {}).get("features", {})
    known = parse_features([f"{address}={key}" for address, key in told.items()])
    for address, key in calculator.features.items():
        if known.get(address, key) != key:
            raise UserError(
                f"--features {address}={key}: the store {store} has '{known[address]}' of the "
                f"results under {address}: give that, or name another folder."
            )
    calculator.features = {**known, **calculator.features}
    if calculator.features != known:
        told = factory.told(calculator.features)
        card = Card(card.teacher, card.name, card.features, card.dependence, OWN, told)
        card.write(store)
    return card


def _has_some(store: Path, calculator: Calculator) -> bool:
    wanted = set(calculator.wanted)
    reader = Reader(store)
    found = any(wanted <= shard.names and len(shard.entries) for shard in reader.shards)
    reader.close()
    return found


def _first_answer(
    calculator: Calculator, tried: Sequence[Item]
) -> tuple[Item, Mapping[str, Array]]:
    """One of these, and what is said of it.

    Raises:
        UserError: nothing can be said of any of them.
    """
    why: NoAnswer | None = None
    for item in tried:
        try:
            return item, calculator.ask(item.structure)
        except NoAnswer as error:
            why = error
    raise UserError(
        f"--calculator {calculator.factory.path} can say nothing of the first {len(tried)} "
        f"structures, lastly of {tried[-1]}: {why}. Mend that, or take structures that it knows."
    )
