"""``fairchem-kd init``: from the config that one would train a student with, to a distillation.

Without a strategy, one is proposed: the teacher's outputs, and the pair of features that are most
alike. Features and layers are chosen from what both models offer, what differs between them is
reported, and one batch is tried before anything is written. The config of the baseline, the same
student without its teacher, is written too.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.errors import UserError
from fairchem_kd.stock.noise import quiet

if TYPE_CHECKING:
    from fairchem_kd.distillation.dry_run import DryRun

#: Without these a config trains nothing.
_NEEDED = ("model", "dataset", "optim", "loss_functions", "outputs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd init``."""
    parser.description = (
        "Write the config of a distillation: the student's own config, a teacher, and losses on "
        "features that both models have."
    )
    parser.add_argument(
        "--student", type=Path, required=True, metavar="CONFIG", help="a config for training"
    )
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="CHECKPOINT", help="of fairchem 1.x or OCP"
    )
    parser.add_argument(
        "--strategy", metavar="KIND[,KIND]",
        help="losses such as n2n, e2n, v2v, vanilla (default: what models and data suggest)",
    )  # fmt: skip
    parser.add_argument(
        "--unlabelled", type=Path, metavar="LMDB",
        help="structures without labels, for which the teacher speaks: where it helps most",
    )  # fmt: skip
    parser.add_argument(
        "--fit-scales", action="store_true",
        help="fit the student's scale factors where its config has none, to STUDENT_scales.json",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path,
        help="file to write (default: STUDENT_kd.yml, or STUDENT_STRATEGY.yml, here); the "
        "baseline's is beside it, as ..._plain.yml",
    )  # fmt: skip
    parser.add_argument("--no-dry-run", action="store_true", help="do not try a batch")
    parser.add_argument("--trust", action="store_true", help="unpickle a file that may run code")
    parser.add_argument("--force", action="store_true", help="overwrite --out")


def run(args: argparse.Namespace) -> int:
    """Choose, report, try and write; returns the exit code.

    Raises:
        UserError: the two do not fit, the config trains nothing, or the file exists.
    """
    kinds = None
    if args.strategy is not None:
        kinds = [kind.strip() for kind in args.strategy.split(",") if kind.strip()]
        if not kinds:
            raise UserError("--strategy is empty; give for example e2n, or n2n,vanilla.")
    out = args.out or Path(f"{args.student.stem}_{'_'.join(kinds or ['kd'])}.yml")
    plain = out.with_name(f"{args.student.stem}_plain.yml")
    scales = out.with_name(f"{args.student.stem}_scales.json")
    for path in (out, *([scales] if args.fit_scales else [])):
        if path.exists() and not args.force:
            raise UserError(f"{path} exists; give --force to overwrite it, or another --out.")
    import yaml

    from fairchem_kd.analysis.proposal import propose, unlabelled_block
    from fairchem_kd.commands.fit_scales import fit, write_scales
    from fairchem_kd.distillation.config_text import More, distillation_yaml, plain_yaml
    from fairchem_kd.distillation.dry_run import dry_run
    from fairchem_kd.distillation.pairing import (
        check_targets,
        choose,
        compare_normalizers,
        differences,
    )
    from fairchem_kd.features.facts import facts
    from fairchem_kd.files import write_text
    from fairchem_kd.models.build import build
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.models.legacy import predicts_relaxed_energy
    from fairchem_kd.random_state import isolated_random_state
    from fairchem_kd.stock.scales import scale_file_key, set_scale_file

    config = read_training_config(args.student)
    teacher = Teacher.from_checkpoint(args.teacher, trust=args.trust, where="--teacher")
    with isolated_random_state():
        student = build(config["model"], args.student)
    notes = check_targets(config.get("outputs") or ("energy", "forces"), teacher)
    extra = More(
        unlabelled=unlabelled_block(args.unlabelled, config),
        scales=str(scales) if args.fit_scales and _unfitted(config, student) else None,
        scale_key=scale_file_key(config["model"]),
    )
    ours, theirs = facts(student), facts(teacher.model)
    for role, name, fact in (("teacher", args.teacher, theirs), ("student", args.student, ours)):
        print(f"{role} {name}: {_described(fact)}")
    lines, strange = compare_normalizers(
        _normalizer(config),
        {
            name: {"mean": normalizer.mean.item(), "rmsd": normalizer.rmsd.item()}
            for name, normalizer in teacher.units.normalizers.items()
        },
    )
    print("\n".join(["normalisers, in eV and eV/Å:", *(lines or ["  none in either"])]))
    notes += differences(ours, theirs) + strange
    factors = _unfitted(config, student)
    if extra.scales is not None:
        with _quiet():
            write_scales(fit(config, args.student), scales)
        print(f"fitted {factors} scale factors, and wrote them to {scales}")
        set_scale_file(config["model"], str(scales))
        with isolated_random_state():
            student = build(config["model"], args.student)
    elif factors:
        notes.append(
            f"The student has {factors} scale factors and no {extra.scale_key}: give --fit-scales, "
            f"or fit them with `fairchem-kd fit-scales --config-yml {args.student} --out "
            "scales.json`."
        )
    if predicts_relaxed_energy({**config, "dataset": config["dataset"]["train"]}):
        notes.append(
            "The student's labels are energies of relaxed structures (IS2RE): the energies of a "
            "teacher of another task are not what it is to learn; features are."
        )
    if kinds is None:
        choices = propose(
            config, student, teacher, args.student, more=extra.unlabelled is not None, say=print
        )
    else:
        choices = [choose(kind, student, teacher) for kind in kinds]
    for choice in choices:
        for side, comment in choice.comments.items():
            print(f"{choice.kind}: {side} {choice.options[side]}, {comment}")
    for note in notes:
        print(f"note: {note}")

    def written(zero: str | None = None) -> str:
        return distillation_yaml(
            args.student, args.teacher, choices, trust=args.trust, zero=zero, more=extra
        )

    text = written()
    if args.no_dry_run:
        print("note: without a dry run, the teacher's errors on the labels are not looked at.")
    else:
        config.setdefault("task", {})
        made = yaml.safe_load(text)
        config["task"]["distillation"] = made["task"]["distillation"]
        config["optim"] |= made.get("optim") or {}
        with _quiet():
            found = dry_run(config, args.student)
        print(_reported(found))
        if found.zero:
            text = written("labels")
    write_text(out, text)
    print(f"wrote {out}; train with: fairchem main --mode train --config-yml {out}")
    if plain.exists() and not args.force:
        print(f"{plain}, the baseline, is there already and was left as it is")
    else:
        write_text(plain, plain_yaml(args.student, extra))
        print(f"wrote {plain}, the same student without its teacher, to compare with")
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """fairchem logs its whole config on the way; warnings stay, but for an idle one."""

    def tells(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Disabled BalancedBatchSampler")

    logging.root.addFilter(tells)
    try:
        with quiet(logging.INFO):
            yield
    finally:
        logging.root.removeFilter(tells)


def read_training_config(path: Path) -> dict[str, Any]:
    """A stock config with its includes.

    Raises:
        UserError: it cannot be read, is not for training, or distils already.
    """
    from fairchem_kd.data.build import ensure_built
    from fairchem_kd.models.legacy import modern_training_config
    from fairchem_kd.stock.configs import load_config

    if not path.is_file():
        raise UserError(f"--student {path} does not exist; give the config of a plain training.")
    try:
        config, _, conflicts = load_config(path)
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"--student {path} cannot be read as a config: {error}") from error
    if conflicts:
        raise UserError(f"--student {path}: its includes give a key twice: {', '.join(conflicts)}.")
    config = modern_training_config(config, f"--student {path}")
    missing = [key for key in _NEEDED if not config.get(key)]
    dataset = config.get("dataset")
    if "dataset" not in missing and not (isinstance(dataset, dict) and dataset.get("train")):
        missing.append("dataset.train")
    if missing:
        raise UserError(
            f"--student {path} is not a config for training: it has no {' and no '.join(missing)}; "
            "give the one with which you would train the student without a teacher."
        )
    if not isinstance(config["model"], dict) or "name" not in config["model"]:
        raise UserError(f"--student {path} has no model.name.")
    if ((config.get("task") or {}).get("distillation") or {}).get("losses"):
        raise UserError(
            f"--student {path} distils already (task.distillation.losses); give the student's "
            "plain config, or edit the losses in this one."
        )
    ensure_built(config)  # also those splits that the dry run does not open are there
    return config


def _normalizer(config: dict[str, Any]) -> dict[str, Any]:
    """``normalizer`` of the training set's transforms, by output; ``{}`` where it is fitted."""
    transforms = config["dataset"]["train"].get("transforms") or {}
    found = dict(transforms.get("normalizer") or {})
    fitted = (found.pop("fit", None) or {}).get("targets") or {}
    given = {name: values for name, values in found.items() if isinstance(values, dict)}
    return {**{name: {} for name in fitted}, **given}


def _unfitted(config: dict[str, Any], student: Any) -> int:
    """How many scale factors of the student have no values."""
    from fairchem_kd.stock.scales import scale_factors, scale_file_of

    return 0 if scale_file_of(config["model"]) else len(scale_factors(student))


def _described(fact: dict[str, Any]) -> str:
    forces = "as a gradient" if fact["forces"] == "gradient" else fact["forces"]
    return (
        f"{fact['model']}, {fact['parameters']:,} parameters, cutoff {fact['cutoff']} Å, at most "
        f"{fact['neighbours']} neighbours, use_pbc {str(fact['use_pbc']).lower()}, forces "
        f"{forces}"
    )


def _reported(found: DryRun) -> str:
    terms = ", ".join(
        f"{name} {value:.4g} (weighted {found.terms[f'{name}_weighted']:.4g})"
        for name, value in found.terms.items()
        if f"{name}_weighted" in found.terms
    )
    labels = "" if found.agreement is None else _on_labels(found) + "\n"
    return labels + (
        f"dry run on {found.systems} structures, {found.atoms} atoms: loss {found.loss:.4g}; "
        f"{terms}\n"
        f"step: {found.seconds_of_step:.3g} s on one {found.device}, {found.plain_seconds:.3g} s "
        f"without the teacher; {found.steps} steps take about "
        f"{_length(found.seconds_of_step * found.steps)} and evaluations{_before(found)}; memory "
        f"at most {found.memory / 2**30:.1f} GiB"
    )


def _before(found: DryRun) -> str:
    """What comes before the first step."""
    if not found.ahead:
        return ""
    return (
        f", and before them the teacher is asked once about {found.ahead} structures, for about "
        f"{_length(found.seconds_ahead)} where none of its answers is kept yet"
    )


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def _on_labels(found: DryRun) -> str:
    """How the teacher does on the student's labels, and what another zero asks for."""
    agreement = found.agreement
    assert agreement is not None
    line = f"the teacher on the student's own labels: {agreement}"
    if not agreement.other_zero:
        return line
    line += (
        "\nnote: the zeros of the teacher's energies and of the student's labels differ: "
        f"{agreement.zeros}"
    )
    if found.zero:
        return (
            f"{line}. So teacher.energy_zero: labels is written, which shifts the teacher's "
            "energies by a fit to the labels; labels with the teacher's references are the other "
            "way."
        )
    return f"{line}. No loss here compares energies, so that this does no harm."
