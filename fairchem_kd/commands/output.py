"""What the commands of the analysis share: flags, and what is printed and written in the end.

Imported for every help text, so nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.report.study import Study


def add_output_arguments(parser: argparse.ArgumentParser, files: str, plots: str = "plots") -> None:
    """``--out``, ``--json``, ``--no-plots``, and what every command that runs models has.

    Args:
        files: that ``--out`` gets beside the plots, for the help.
        plots: what the help calls those.
    """
    parser.add_argument("--out", type=Path, help=f"a folder for {files} and {plots}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--no-plots", action="store_true", help=f"no {plots} in --out")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")


def check_output(args: argparse.Namespace) -> None:
    """Before anything is measured, make sure that what was asked for can be drawn and written.

    Raises:
        UserError: plots are asked for and matplotlib is missing, or --out can be no folder.
    """
    if args.out is None:
        return
    for path in (args.out, *args.out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {args.out}: {path} is a file; name a folder.")
    if not args.no_plots:
        from fairchem_kd.report.figures import check_matplotlib

        check_matplotlib()


def deliver(args: argparse.Namespace, study: Study) -> None:
    """Print what was found, with ``--json`` its values; with ``--out``, write the files."""
    print(json.dumps(study.values(), indent=2, ensure_ascii=False) if args.json else study.text())
    if args.out is not None:
        written = study.write(args.out, with_plots=not args.no_plots)
        print(f"wrote {', '.join(str(path) for path in written)}", file=sys.stderr)
