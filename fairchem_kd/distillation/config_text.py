"""The config of a distillation as text, as a person would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairchem_kd.distillation.pairing import Choice


@dataclass(frozen=True)
class More:
    """What is written beside teacher and losses."""

    unlabelled: dict[str, Any] | None = None  #: the block, with ``optim`` beside it
    scales: str | None = None  #: a file of scale factors
    scale_key: str = "model.scale_file"


def distillation_yaml(
    student: Path,
    teacher: Path,
    choices: Sequence[Choice],
    *,
    trust: bool = False,
    zero: str | None = None,
    more: More | None = None,
) -> str:
    """The config as text, with the shapes as comments."""
    lines = [
        f"# {teacher} -> {student}, {', '.join(choice.kind for choice in choices)}.",
        f"includes: [{_quoted(student)}]",
        "trainer: fairchem_kd.DistillationTrainer",
        "task:",
        "  distillation:",
        "    teacher:",
        f"      checkpoint: {_quoted(teacher)}",
    ]
    if trust:
        lines.append("      trust_checkpoint: true")
    if zero is not None:
        lines.append(f"      energy_zero: {zero}  # not the labels' own: it is fitted to them")
    lines.append("    losses:")
    for choice in choices:
        lines.append(f"      {choice.kind}:")
        for name, value in choice.options.items():
            comment = f"  # {choice.comments[name]}" if name in choice.comments else ""
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"        {name}: {shown}{comment}")
    unlabelled = (more or More()).unlabelled
    if unlabelled is not None:
        src = _quoted(Path(unlabelled["dataset"]["src"]))
        lines += [
            "    unlabelled:",
            f"      dataset: {{format: lmdb, src: {src}}}",
            f"      share: {unlabelled['share']}  # of the structures of a step",
            "optim:  # as many structures a step, and as many steps, as without",
            *(f"  {name}: {value}" for name, value in unlabelled["optim"].items()),
        ]
    return "\n".join([*lines, *_scales_yaml(more)]) + "\n"


def plain_yaml(student: Path, more: More | None = None) -> str:
    """The config of the baseline as text: our trainer, so that it keeps the same records."""
    lines = [
        f"# {student}, without a teacher: what a distilled student is compared with.",
        f"includes: [{_quoted(student)}]",
        "trainer: fairchem_kd.DistillationTrainer",
        "task:",
        "  distillation:",
        "    losses: null",
    ]
    return "\n".join([*lines, *_scales_yaml(more)]) + "\n"


def _scales_yaml(more: More | None) -> list[str]:
    if more is None or more.scales is None:
        return []
    *blocks, last = more.scale_key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(blocks)]
    return [*lines, f"{'  ' * len(blocks)}{last}: {_quoted(Path(more.scales))}"]


def _quoted(path: Path) -> str:
    """A path as a YAML string."""
    text = str(path)
    return text if text.replace("/", "").replace("_", "").replace(".", "").isalnum() else repr(text)
