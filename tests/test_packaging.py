"""What the distributions hold: built from source archives, as a user or an index would."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from fairchem_kd import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md",
           "CITATION.cff", "Makefile", "fairchem_kd", "yaml_configs", "compat", "docs",
           "requirements", "tests")  # fmt: skip


def build(source: Path, kind: str, out: Path, backend: str) -> Path:
    """Build ``kind`` (wheel, sdist) of the tree ``source`` with an installed PEP 517 backend."""
    code = f"import sys; from {backend} import build_{kind} as b; print(b(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        # The tree's own modules, not those of the tests' interpreter.
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the tree inside it, and the wheel built from that tree."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "checkout"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build")
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    sdist = build(tree, "sdist", folder, "setuptools.build_meta")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    wheel = build(unpacked, "wheel", folder, "setuptools.build_meta")
    return {"sdist": unpacked, "wheel": wheel}


def files(folder: Path, pattern: str) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob(pattern) if p.is_file()}


def test_source_archive_is_complete(built):
    for name in SOURCES:
        assert (built["sdist"] / name).exists(), name
    for part in ("fairchem_kd/**/*.py", "yaml_configs/**/*.*", "compat/**/*.py", "compat/*.pth"):
        expected = {str(p.relative_to(ROOT)) for p in ROOT.glob(part)}
        assert expected
        assert all((built["sdist"] / name).is_file() for name in expected), part


def test_wheel_holds_every_module_and_config(built, tmp_path):
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(tmp_path)
    # a package that setup.cfg does not list would be missing here
    assert files(tmp_path / "fairchem_kd", "*.py") == files(ROOT / "fairchem_kd", "*.py")
    shipped = files(tmp_path / "fairchem_kd/yaml_configs", "*")
    assert shipped == files(ROOT / "yaml_configs", "*")
    assert (tmp_path / "fairchem_kd/py.typed").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {
        "fairchem_kd",
        f"fairchem_kd-{__version__}.dist-info",
    }
    info = tmp_path / f"fairchem_kd-{__version__}.dist-info"
    assert list(info.rglob("LICENSE"))
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {
        "fairchem": "fairchem_kd.commands.fairchem:main",
        "fairchem-kd": "fairchem_kd.commands.main:main",
    }
    # the installed package finds its configs
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "import fairchem_kd.commands.main as c; "
        f"assert c.__file__.startswith({str(tmp_path)!r}); "
        "sys.exit(c.main(['configs', '--copy', sys.argv[1]]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "copy")], check=True)
    assert files(tmp_path / "copy/yaml_configs", "*") == shipped


def test_stand_ins_wheel_holds_the_hook(tmp_path):
    wheel = build(ROOT / "compat", "wheel", tmp_path, "hatchling.build")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "fairchem_kd_compat.pth" in names
    sources = ROOT / "compat/src"
    assert {str(p.relative_to(sources)) for p in sources.rglob("*.py")} <= names
    # fairchem-core looks for these, so the real ones must be able to sit beside them
    assert not any(name.startswith(("torch_scatter/", "torch_sparse/")) for name in names)
    assert sum(name.endswith("LICENSE") for name in names) == 1


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changelog


def test_makefile_names_every_target():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    targets = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"help", "setup", "test", "train", "docs", "lint", "test-declared", "clean"} <= targets


def test_ci_runs_the_test_command_alone():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # every test, in parallel; nothing is left out
    parallel = "--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"
    assert done.stdout.rstrip().endswith(f"-m pytest {parallel}")
    script = (ROOT / ".ci/run").read_text()
    assert "exec make test </dev/null" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)
