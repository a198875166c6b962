"""``fairchem-kd report``: a whole study on one page that can be handed on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_kd.commands.compare import add_comparison_arguments, comparison_options
from fairchem_kd.errors import UserError
from fairchem_kd.reading import read_json

if TYPE_CHECKING:
    from fairchem_kd.analysis.compare.comparison import Comparison
    from fairchem_kd.report.page import Section
    from fairchem_kd.report.study import Study

EPILOG = """\
The page has what `fairchem-kd compare RUNS` says and draws, the runs' configs and the cards of data
and teacher. What cka, cost and physics wrote with --out is added with a flag each; --with has it
measured now, as those commands do it by default.

  fairchem-kd report checkpoints/*-plain-s? checkpoints/*-e2n-s? -o report.html
  fairchem-kd report runs/demo/*-s0-* --cka similarity --cost cost --physics physics -o report.html
  fairchem-kd report runs/demo/plain-s0-* runs/demo/e2n-s0-* --with cost --with physics -o all.html
"""

TITLES = {
    "cka": "Similarity of layers",
    "cost": "What it costs",
    "physics": "As a potential",
}
_CAPTIONS = {
    "errors": "Errors of every model; small marks are seeds, dotted lines the teacher.",
    "front": "Force errors against energy errors.",
    "pareto": "Error against throughput.",
    "learning_curves": "Validation errors during training.",
    "gradients": "Each term's gradient beside the labels': below 0 it pulls away from them (the "
    "first seed with such records).",
    "cka_node": "Similarity of layers; framed pairs are those that a loss compared.",
    "cka_vector": "The same of vectors.",
    "cka_node_student": "The student's layers without distillation (rows) and with it (columns).",
    "cka_vector_student": "The same of vectors.",
    "cost_inference": "Throughput and memory against the batch size.",
    "cost_training": "Where the time of a training step goes.",
    "physics_summary": "Models as potentials, with 95 % intervals over structures.",
    "physics_dynamics": "Total energy in NVE dynamics (first seed of each model).",
    "physics_drift": "How far the total energy goes in NVE dynamics, median and quartiles.",
    "physics_relaxations": "Where relaxations end, by the labels' method.",
    "physics_scans": "Energy along a bond (first seed of each model).",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd report``."""
    parser.description = (
        "Write one self-contained HTML page with the tables, plots, configs and data cards of any "
        "number of runs."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_comparison_arguments(parser)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="the page (report.html)"
    )
    parser.add_argument("--title", default="Knowledge distillation: a study", help="of the page")
    for name in TITLES:
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            type=Path,
            metavar="DIR",
            help=f"what `fairchem-kd {name} --out DIR` wrote, any number of times",
        )
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="measured",
        choices=tuple(TITLES),
        help="measure it now, any number of times",
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")


def run(args: argparse.Namespace) -> int:
    """Compare, collect and write; returns the exit code.

    Raises:
        UserError: runs that cannot be compared, or folders without results.
    """
    from fairchem_kd.analysis.compare.runs import as_study, compare_runs
    from fairchem_kd.files import write_text
    from fairchem_kd.report.figures import check_matplotlib
    from fairchem_kd.report.page import page

    check_matplotlib()
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; name a file, such as report.html.")
    added = {name: [_written(name, folder) for folder in getattr(args, name)] for name in TITLES}
    comparison, notes = compare_runs(args.runs, comparison_options(args))
    sections = _compared(as_study(comparison, notes))
    for name in dict.fromkeys(args.measured):
        added[name] += _measure(name, comparison, args)
    sections += [one for name in TITLES for one in added[name]]
    _distinguish(sections)
    sections += [_configs(comparison), _cards(comparison)]
    text = page(args.title, [section for section in sections if section.pieces])
    write_text(args.out, text)
    print(f"wrote {args.out} ({len(text.encode()) / 1e6:.1f} MB)", file=sys.stderr)
    return 0


def _compared(study: Study) -> list[Section]:
    """Verdicts and tables, then the plots."""
    from fairchem_kd.report.page import Section

    verdicts, tables = Section("What distillation gained"), Section("Errors")
    if study.sentences:
        verdicts.add_sentences(study.sentences)
    for table in study.tables():
        section = verdicts if table.title.startswith("Gap closed") else tables
        section.add_table(table)
    _add_figures(tables, study)
    return [verdicts, tables]


def _embedded(title: str, study: Study) -> Section:
    """A study, as a section."""
    from fairchem_kd.report.page import Section

    section = Section(title)
    for table in study.tables():
        section.add_table(table)
    _add_figures(section, study)
    return section


def _add_figures(section: Section, study: Study) -> None:
    from fairchem_kd.report.page import as_svg

    for name, figure in study.figures().items():
        section.add_picture(as_svg(figure), caption(name))


def caption(name: str) -> str:
    """What a plot with this file name shows."""
    if name in _CAPTIONS:
        return _CAPTIONS[name]
    if name.startswith("parity_"):
        split = name.removeprefix("parity_")
        return f"Predictions against labels on {split} (first seed of each model)."
    return f"{name.replace('_', ' ')}."


def _written(name: str, folder: Path) -> Section:
    """What a command wrote into a folder, as a section.

    Raises:
        UserError: it did not.
    """
    from fairchem_kd.report.page import Section
    from fairchem_kd.report.study import read_tables

    section = Section(TITLES[name])
    for table in read_tables(folder, name):
        section.add_table(table)
    for picture in sorted(folder.glob(f"{name}*.svg")):
        section.add_picture(picture.read_bytes(), caption(picture.stem))
    return section


def _measure(name: str, comparison: Comparison, args: argparse.Namespace) -> Iterable[Section]:
    """Sections of what an analysis finds out about the models, by default."""
    from fairchem_kd.analysis.cka import runs as cka
    from fairchem_kd.analysis.compare.comparison import BASELINE, TEACHER
    from fairchem_kd.analysis.cost import runs as cost
    from fairchem_kd.analysis.physics import runs as physics

    students = {g.label: g for g in comparison.groups if g.role != TEACHER}
    distilled = {label: g.files[0].path for label, g in students.items() if g.files[0].losses}
    teacher = next((g.files[0].path for g in comparison.groups if g.role == TEACHER), None)
    if name == "cka":
        for label, path in distilled.items():
            baseline = comparison.baselines.get(label)
            before = None if baseline is None else students[baseline].files[0].path
            study = cka.study(path, teacher=teacher, before=before, cpu=args.cpu, trust=args.trust)
            yield _embedded(f"{TITLES[name]}: {label}", study)
    elif name == "cost" and distilled:
        paths = list(distilled.values())
        study = cost.study(paths, teacher=teacher, cpu=args.cpu, trust=args.trust)
        yield _embedded(TITLES[name], study)
    elif name == "physics" and students:
        order = sorted(students.values(), key=lambda g: g.role != BASELINE)
        named = [f"{g.label}={file.path}" for g in order for file in g.files]
        study = physics.study(named, teacher=teacher, cpu=args.cpu, trust=args.trust)
        yield _embedded(TITLES[name], study)


def _distinguish(sections: list[Section]) -> None:
    """Sections of one title get numbers, since links go by titles."""
    titles = [section.title for section in sections]
    for number, section in enumerate(sections):
        if titles.count(section.title) > 1:
            section.title += f" ({titles[: number + 1].count(titles[number])})"


def _configs(comparison: Comparison) -> Section:
    """The config of every model, the first seed's, and where each seed's checkpoint is."""
    import yaml

    from fairchem_kd.files import plain
    from fairchem_kd.report.page import Section

    section = Section("Configs")
    for group in comparison.groups:
        seeds = [f"# seed {file.seed}: {file.path}" for file in group.files]
        text = yaml.safe_dump(plain(group.files[0].config), sort_keys=False, allow_unicode=True)
        section.add_folded(f"{group.label} ({group.role})", "\n".join([*seeds, text]))
    return section


def _cards(comparison: Comparison) -> Section:
    """The cards of the data that were trained and compared on, and of checkpoints."""
    from fairchem_kd.report.page import Section

    section = Section("Data cards")
    files = [file for group in comparison.groups for file in group.files]
    datasets = [str(file.labels_from) for file in files if file.labels_from]
    datasets += [split.path for split in comparison.splits]
    paths = [Path(path).parent / "card.json" for path in datasets]
    paths += [file.path.with_suffix(".json") for file in files]
    for path in dict.fromkeys(paths):
        try:
            card = read_json(path)
        except (OSError, ValueError):  # not all data have one
            continue
        section.add_folded(str(path), json.dumps(card, indent=2, ensure_ascii=False))
    return section
