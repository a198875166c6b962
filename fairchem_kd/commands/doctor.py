"""``fairchem-kd doctor``: what is installed, what is wrong with it, and what to do about it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.stock.plugin import check_fairchem_core, register

#: Distributions whose versions matter; the last ones are optional.
REQUIRED = (
    "torch",
    "fairchem-core",
    "torch-geometric",
    "e3nn",
    "lmdb",
    "scipy",
    "submitit",
    "numpy",
)
OPTIONAL = {"tblite": "needed for the collisions data only: pip install tblite"}


@dataclass
class Findings:
    """The lines to print, and how many of them are problems that break something."""

    lines: list[str] = field(default_factory=list)
    problems: int = 0

    def note(self, name: str, value: str) -> None:
        """Add what was found."""
        self.lines.append(f"{name:<16} {value}")

    def problem(self, name: str, what: str, mend: str) -> None:
        """Add something that is broken and how to mend it."""
        self.problems += 1
        self.lines.append(f"{name:<16} PROBLEM: {what}")
        self.lines.append(f"{'':<16} -> {mend}")


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_versions(findings: Findings) -> None:
    """Python and the distributions that this package stands on."""
    findings.note("fairchem-kd", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    findings.note("python", f"{platform.python_version()} at {sys.executable}")
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        findings.problem(
            "python",
            "fairchem-core 1.10 runs on 3.10 to 3.12",
            "make an environment with one of them",
        )
    for name in REQUIRED:
        installed = _installed(name)
        if installed is None:
            findings.problem(name, "missing", f"pip install {name}")
        else:
            findings.note(name, installed)
    for name, why in OPTIONAL.items():
        findings.note(name, _installed(name) or f"not installed ({why})")
    try:
        check_fairchem_core()
    except UserError as error:
        findings.problem("fairchem-core", str(error), "then run this again")
    scipy = _installed("scipy")
    if scipy is not None and _release(scipy) >= (1, 17):
        findings.problem(
            "scipy",
            f"{scipy} has no sph_harm, which fairchem-core imports",
            "pip install 'scipy<1.17'",
        )


def check_extensions(findings: Findings) -> None:
    """torch_scatter and torch_sparse: the real ones or the stand-ins."""
    for name in ("torch_scatter", "torch_sparse"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            findings.problem(
                name,
                "missing, and fairchem-core imports it at start",
                "install the stand-ins from a checkout of fairchem-kd: pip install ./compat",
            )
        elif "_fairchem_kd_compat" in spec.origin:
            findings.note(name, f"pure-PyTorch stand-in (fairchem-kd-compat), {spec.origin}")
        else:
            findings.note(name, f"the real one, {spec.origin}")


def check_script(findings: Findings) -> None:
    """Which `fairchem` a shell would run, and whether it is ours."""
    found = shutil.which("fairchem")
    if found is None:
        findings.note(
            "fairchem script", "not on the PATH; `python -m fairchem_kd` is the same command"
        )
    elif is_ours(Path(found)):
        findings.note("fairchem script", f"ours, {found}")
    elif Path(found).parent == scripts_folder():
        findings.problem(
            "fairchem script",
            f"{found} is another's: no leading `main`, no CPU fallback, no working --sweep-yml",
            "fairchem-kd doctor --fix, or use `python -m fairchem_kd` in its place",
        )
    else:
        findings.problem(
            "fairchem script",
            f"{found} comes first on the PATH and belongs to another environment",
            f"put {scripts_folder()} first on the PATH (activate this environment)",
        )


def check_devices(findings: Findings) -> None:
    """GPUs and the backends of torch.distributed."""
    try:
        import torch
    except ImportError as error:
        findings.problem("devices", f"torch cannot be imported: {error}", "reinstall torch")
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        findings.note("CUDA", f"{torch.version.cuda}: {', '.join(names)}")
    else:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}" if built else "torch is a CPU build"
        findings.note("CUDA", f"no device ({why}); training runs on the CPU")
    distributed = torch.distributed
    if not distributed.is_available():
        findings.problem(
            "distributed", "this torch is built without torch.distributed", "install another build"
        )
        return
    offered = {"nccl": distributed.is_nccl_available(), "gloo": distributed.is_gloo_available()}
    findings.note(
        "distributed", ", ".join(name for name, there in offered.items() if there) or "none"
    )


def check_plugin(findings: Findings) -> None:
    """Whether fairchem and this package import, and whether checkpoints can be read."""
    try:
        register()
    except UserError:
        return  # said by `check_versions`
    except Exception as error:
        findings.problem(
            "import",
            f"{type(error).__name__}: {error}",
            "mend the problems above; if there are none, please report this with its traceback "
            '(python -c "import fairchem_kd; fairchem_kd.register()")',
        )
        return
    findings.note("import", "fairchem-core and the plugin import")
    check_checkpoints(findings)


def check_checkpoints(findings: Findings) -> None:
    """Write and read back a small checkpoint, and read those in ``checkpoints/``."""
    import torch

    from fairchem_kd.models.file import read_checkpoint, write_checkpoint

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            state = {"state_dict": {"weight": torch.ones(2)}, "config": {"model": "painn"}}
            write_checkpoint(state, path)
            read_checkpoint(path)
    except Exception as error:
        findings.problem(
            "checkpoints",
            f"one that was just written cannot be read: {error}",
            "see whether the folder for temporary files is writable (TMPDIR), then reinstall torch",
        )
        return
    shipped = sorted(Path("checkpoints").glob("*.pt"))
    for path in shipped:
        try:
            read_checkpoint(path)
        except UserError as error:
            findings.problem("checkpoints", str(error), "get the file again")
    findings.note("checkpoints", f"can be read ({len(shipped)} in ./checkpoints)")


def scripts_folder() -> Path:
    """Return the folder of this environment's console scripts."""
    return Path(sysconfig.get_path("scripts"))


def is_ours(script: Path) -> bool:
    """Whether a console script calls this package."""
    try:
        return b"fairchem_kd" in script.read_bytes()
    except OSError:
        return False


def fix_script(folder: Path | None = None) -> Path | None:
    """Make the `fairchem` script of this environment ours; None where it is already.

    Raises:
        UserError: the script cannot be written here.
    """
    folder = folder or scripts_folder()
    if os.name == "nt":
        raise UserError(
            "console scripts are programs on Windows, which this command cannot write; "
            "reinstall with: pip install --force-reinstall --no-deps fairchem-kd."
        )
    script = folder / "fairchem"
    if is_ours(script):
        return None
    shebang = f"#!{sys.executable}\n"
    if " " in sys.executable or len(shebang) > 127:
        # What the kernel would cut; /bin/sh reads it, and to Python it is a string.
        shebang = f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"
    text = (
        f"{shebang}import sys\n\nfrom fairchem_kd.commands.fairchem import main\n\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    part = script.with_name(f".fairchem.{os.getpid()}")
    try:
        part.write_text(text)
        part.chmod(0o755)
        part.replace(script)
    except OSError as error:
        raise UserError(
            f"{script} cannot be written ({error.strerror}); "
            "use `python -m fairchem_kd` in its place."
        ) from error
    return script


def examine() -> Findings:
    """Look at everything."""
    findings = Findings()
    check_versions(findings)
    check_extensions(findings)
    check_script(findings)
    check_devices(findings)
    check_plugin(findings)
    return findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fairchem-kd doctor``."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="make this environment's `fairchem` script ours again, if another install replaced it",
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings; the exit code is 1 if something is broken."""
    if args.fix:
        fixed = fix_script()
        print(f"{fixed} rewritten" if fixed else "the `fairchem` script is ours already")
    findings = examine()
    print("\n".join(findings.lines))
    if findings.problems:
        print(f"{findings.problems} problem{'s' if findings.problems > 1 else ''} found")
        return 1
    print("everything is in order")
    return 0
