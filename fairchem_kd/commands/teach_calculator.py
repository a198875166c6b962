"""``fairchem-kd teach --calculator``, ``--structures`` and ``--writer``: teachers from anywhere."""

from __future__ import annotations

import argparse
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.store import Card


def write_writer(path: Path) -> int:
    """Write the file that fills a store without fairchem-kd."""
    from fairchem_kd.calculators.bundle import bundled
    from fairchem_kd.files import write_text

    if path.suffix != ".py" or path.is_dir():
        raise UserError(f"--writer {path}: name a python file that is to be written, NAME.py.")
    write_text(path, bundled(path.name))
    print(
        f"wrote {path}; where the calculator is (numpy and ASE beside it):\n"
        f"  python {path.name} STRUCTURES --calculator PACKAGE.MODULE:FACTORY --out STORE"
    )
    return 0


def write_structures(args: argparse.Namespace) -> int:
    """Write what would be asked about, for another environment."""
    from fairchem_kd.distillation.asking import write_samples, write_wanted

    out = Path(args.structures)
    if out.suffix != ".npz" or out.is_dir():
        raise UserError(f"--structures {out}: name a file that is to be written, NAME.npz.")
    logging.getLogger().setLevel(logging.WARNING)
    if is_config(args):
        number = write_wanted(Path(args.what[0]), out)
    else:
        number = write_samples(_samples(args), out)
    print(
        f"wrote {number} structures to {out}; `fairchem-kd teach --writer FILE.py` writes what "
        "asks about them elsewhere"
    )
    return 0


def is_config(args: argparse.Namespace) -> bool:
    """Whether a training's config is given, and not data.

    Raises:
        UserError: a config with more beside it.
    """
    first, *more = args.what
    if Path(first).suffix not in (".yml", ".yaml"):
        return False
    if more:
        raise UserError("A training's config says what is to be asked: give it alone.")
    return True


def store_of(args: argparse.Namespace) -> Path:
    """The store that is filled: ``--out``, or the config's.

    Raises:
        UserError: neither names a folder, or the config names a checkpoint.
    """
    from fairchem_kd.distillation.config import named_in

    named = args.out
    if is_config(args):
        teacher = _teacher_of(Path(args.what[0]))
        if teacher.get("checkpoint") is not None:
            raise UserError(
                f"{args.what[0]} names a checkpoint in task.distillation.teacher, and --calculator "
                "is another teacher: give `teacher: {store: FOLDER}` there, or leave --calculator "
                "out."
            )
        named = named or teacher.get("store")
        if named_in(named) is not None:
            raise UserError(
                f"{args.what[0]}: task.distillation.teacher.store names several stores: say with "
                "--out which of them this calculator fills."
            )
    if named is None or str(named).strip().lower() in ("auto", "off", ""):
        raise UserError(
            "--calculator needs --out STORE, the folder of a store (or a config with "
            "task.distillation.teacher.store: FOLDER)."
        )
    return Path(named)


def _teacher_of(path: Path) -> dict[str, Any]:
    from fairchem_kd.stock.configs import training_config

    block = (training_config(path).get("task") or {}).get("distillation")
    teacher = block.get("teacher") if isinstance(block, dict) else None
    return dict(teacher) if isinstance(teacher, dict) else {}


def ask(args: argparse.Namespace, part: tuple[int, int] | None) -> Path:
    """Fill a store with what a calculator says; returns it.

    Raises:
        UserError: see :mod:`fairchem_kd.distillation.asking`.
    """
    from fairchem_kd.calculators.given import calculator_of
    from fairchem_kd.distillation.asking import Asking, ask_for_samples, ask_for_training

    logging.getLogger().setLevel(logging.INFO)
    asking = Asking(
        store_of(args),
        calculator_of(args),
        part=part,
        max_gb=args.max_gb or 20.0,
        retry=args.retry,
    )
    if is_config(args):
        ask_for_training(Path(args.what[0]), asking)
    else:
        ask_for_samples(_samples(args), asking)
    return asking.out


def _samples(args: argparse.Namespace) -> dict[str, list[Any]]:
    from fairchem_kd.analysis.subjects.structures import open_structures

    with ExitStack() as stack:
        opened = [
            stack.enter_context(open_structures(Path(path), labels=True)) for path in args.what
        ]
        samples = {structures.path: list(structures.samples()) for structures in opened}
    for name, held in samples.items():
        if not held:
            raise UserError(f"{name} holds no structure; name a file that does.")
    return samples


def verify(store: Path, card: Card, samples: int) -> None:
    """Ask a calculator again about some of what its store keeps.

    Raises:
        UserError: it says something else, or cannot be made here.
    """
    from fairchem_kd.calculators.asking import Calculator
    from fairchem_kd.calculators.factory import Factory
    from fairchem_kd.distillation.asking import verify_calculator

    assert card.calculator is not None
    calculator = Calculator(Factory.of_card(card.calculator), card.calculator.get("features"))
    print("\n".join(verify_calculator(store, card, calculator, samples)))
