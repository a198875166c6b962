"""What models and trainings cost, measured under conditions that are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairchem_kd.analysis.cost.inference import Speed
from fairchem_kd.analysis.cost.timing import Timing
from fairchem_kd.analysis.cost.training import TrainingCost

FORMAT = 1


@dataclass
class Costs:
    """What was measured; models by label, the teacher first."""

    circumstances: dict[str, Any]
    data: str
    parameters: dict[str, int]
    inference: dict[str, list[Speed]] = field(default_factory=dict)
    md: dict[str, Timing] = field(default_factory=dict)
    md_atoms: int = 0
    training: dict[str, TrainingCost] = field(default_factory=dict)


def conditions(costs: Costs) -> str:
    """Device, threads and the rest, in one sentence."""
    known = costs.circumstances
    words = [str(known["device"])]
    if "cuda" not in str(known.get("kind", "")):
        words.append(f"{known['threads']} thread(s)")
        if known["flush_denormal"]:
            words.append("denormals flushed to zero")
    words.append(f"PyTorch {known['torch']}")
    return f"On {', '.join(words)}."
