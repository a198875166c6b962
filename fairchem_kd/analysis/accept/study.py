"""A student held against its bars, as a study: a row a bar, met, unmet or not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fairchem_kd.analysis.accept.bars import AT_LEAST, FIGURES
from fairchem_kd.analysis.accept.measure import Subject, Value, measure
from fairchem_kd.analysis.cost.timing import circumstances
from fairchem_kd.files import plain
from fairchem_kd.report.study import Study
from fairchem_kd.report.tables import Table, significant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
MET, UNMET, NOT_MEASURED = "met", "unmet", "not measured"


@dataclass(frozen=True)
class Verdict:
    """One bar, and whether the student clears it."""

    figure: str
    limit: float
    found: Value

    @property
    def outcome(self) -> str:
        """A bar without a measurement is not met."""
        value = self.found.value
        if value is None or value != value:
            return NOT_MEASURED
        good = value >= self.limit if self.sense == AT_LEAST else value <= self.limit
        return MET if good else UNMET

    @property
    def sense(self) -> str:
        return FIGURES[self.figure].sense

    def as_dict(self) -> dict[str, Any]:
        return {
            "figure": self.figure,
            "unit": FIGURES[self.figure].unit,
            "sense": self.sense,
            "limit": self.limit,
            "outcome": self.outcome,
            **asdict(self.found),
        }


@dataclass(frozen=True)
class Acceptance:
    """What was found of one student."""

    subject: Subject
    verdicts: list[Verdict]

    @property
    def accepted(self) -> bool:
        """Whether every bar is met."""
        return all(verdict.outcome == MET for verdict in self.verdicts)

    @property
    def sentence(self) -> str:
        name, number = self.subject.student.path, len(self.verdicts)
        failed = [one.figure for one in self.verdicts if one.outcome != MET]
        if not failed:
            return f"{name} is accepted: {number} of {number} bars are met."
        return (
            f"{name} is not accepted: {number - len(failed)} of {number} bars are met, and not "
            f"{', '.join(failed)}."
        )

    def tables(self) -> list[Table]:
        """A row a bar."""
        table = Table("Acceptance", ["figure", "bar", "found", "unit", "outcome", "because"])
        for verdict in self.verdicts:
            found = verdict.found
            shown = significant(found.value)
            if found.interval is not None:
                low, high = (significant(end) for end in found.interval)
                shown = f"{shown} [{low}, {high}]"
            table.add(
                verdict.figure,
                f"{verdict.sense} {verdict.limit:g}",
                shown,
                FIGURES[verdict.figure].unit or "-",
                verdict.outcome,
                found.why or (f"on {found.where}" if found.where else "-"),
            )
        settings, subject = self.subject.settings, self.subject
        bars = {verdict.figure for verdict in self.verdicts}
        table.notes = [
            f"{FIGURES[verdict.figure].help}: {verdict.figure}." for verdict in self.verdicts
        ]
        table.notes.append(
            f"Dynamics: {settings.md_steps} steps of {settings.time_step:g} fs at "
            f"{settings.temperature:g} K; relaxations: at most {settings.relax_steps} steps to "
            f"{settings.fmax:g} eV/Å; {subject.structures} structures. In brackets 95 % intervals "
            "over structures; a bar is held against the value itself, and one that is not "
            "measured is not met." + (settings.caution if "md_drift" in bars else "")
        )
        return [table]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        subject = self.subject
        return plain(
            {
                "format": FORMAT,
                "accepted": self.accepted,
                "student": str(subject.student.path),
                "teacher": subject.teacher and str(subject.teacher.path),
                "baseline": subject.baseline and str(subject.baseline.path),
                "splits": {name: str(one["src"]) for name, one in subject.splits.items()},
                "settings": asdict(subject.settings),
                "machine": circumstances(subject.device),
                "bars": [verdict.as_dict() for verdict in self.verdicts],
            }
        )

    def study(self) -> Study:
        """As the commands show it."""
        return Study(
            "accept",
            tables=self.tables,
            figures=partial(dict[str, "Figure"]),
            as_dict=self.as_dict,
            sentences=[self.sentence],
        )


def accept(subject: Subject, bars: Mapping[str, float]) -> Acceptance:
    """Measure what the bars ask for, and hold it against them.

    Args:
        subject: the student, and what it is judged by.
        bars: limits by figure (:data:`fairchem_kd.analysis.accept.bars.FIGURES`).

    Raises:
        UserError: models or data that cannot be used.
    """
    found = measure(subject, bars)
    return Acceptance(subject, [Verdict(name, limit, found[name]) for name, limit in bars.items()])
