"""The rooms of the package, and which way imports run: here alone stands their order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from configs import ROOT

#: From the top down: a room imports from itself and from the rooms after it.
ROOMS = (
    "commands",  # a file a subcommand; nothing imports it
    "demo",
    "testing",  # what others call in their tests
    "sweep",
    "explore",  # new structures, and rounds of training with them
    "analysis",
    "launch",
    "distillation",
    "training",  # knows no teacher
    "teachers",
    "md",
    "calculators",  # numpy and ASE alone
    "store",  # numpy alone
    "losses",
    "models",
    "features",
    "ops",
    "data",
    "report",
    "stock",
)
#: What every room stands on.
GROUND = (
    "_version",
    "digest",
    "entry_points",
    "errors",
    "files",
    "json_file",
    "machine",
    "processes",
    "npz",
    "random_state",
    "reading",
    "schema",
    "text",
    "weights_only",
)
#: The public face of the package: its names are looked up when they are used.
FACE = ("", "__main__", "moved")
#: Where fairchem-core itself is imported.
STOCK_IN = ("stock", "launch", "models", "features", "training")
#: Places that still import fairchem-core elsewhere; the list may only get shorter.
STOCK_ELSEWHERE = {
    "analysis.compare.evaluation",
    "analysis.cost.training",
    "analysis.subjects.calculators",
    "analysis.subjects.structures",
}

PACKAGE = ROOT / "fairchem_kd"


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name inside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every import in it, wherever it stands, as a dotted name with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def targets(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """The modules of ours that a module imports."""
    for imported, line in imports(ast.parse(path.read_text())):
        if imported.partition(".")[0] != "fairchem_kd":
            continue
        inside = imported.partition(".")[2]
        while inside not in known:  # a name in a module rather than a module
            inside = inside.rpartition(".")[0]
        if inside != name:
            yield inside, line


def floor(name: str) -> int:
    """How far down a module stands."""
    room = name.partition(".")[0]
    return len(ROOMS) if room in GROUND else ROOMS.index(room)


def upward(sources: dict[str, Path]) -> list[str]:
    known = set(sources)
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {target or 'fairchem_kd'}"
        for name, path in sources.items()
        if name not in FACE
        for target, line in targets(name, path, known)
        if target not in FACE and floor(target) < floor(name)
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or not (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def import_graph(sources: dict[str, Path]) -> dict[str, set[str]]:
    # A package that gathers the names of its files is one with them.
    packages = {name for name, path in sources.items() if path.name == "__init__.py"}
    return {
        name: {t for t, _ in targets(name, path, set(sources)) if t not in packages}
        for name, path in sources.items()
        if name not in packages
    }


def test_every_module_stands_in_a_room() -> None:
    homeless = [
        name for name in modules() if name.partition(".")[0] not in (*ROOMS, *GROUND, *FACE)
    ]
    assert not homeless, f"in no room of {ROOMS}: {homeless}"
    empty = [room for room in ROOMS if not (PACKAGE / room).is_dir()]
    assert not empty, f"rooms without a folder: {empty}"


def test_imports_run_down() -> None:
    assert not upward(modules())


def test_the_ground_stands_on_itself() -> None:
    sources = modules()
    for name in GROUND:
        used = {target for target, _ in targets(name, sources[name], set(sources))}
        assert used <= {*GROUND, ""}, f"{name} imports {used}"


def test_no_module_imports_itself_through_others() -> None:
    assert not circles(import_graph(modules()))


def test_fairchem_core_is_imported_in_few_rooms() -> None:
    elsewhere = {
        name
        for name, path in modules().items()
        for imported, _ in imports(ast.parse(path.read_text()))
        if imported.startswith("fairchem.") and name.partition(".")[0] not in STOCK_IN
    }
    assert elsewhere == STOCK_ELSEWHERE


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("training", "from fairchem_kd.distillation.terms import Distillation"),
        ("stock", "def f():\n    from fairchem_kd.commands import main"),
        ("ops", "import fairchem_kd.losses.base"),
    ],
)
def test_an_import_that_runs_up_is_seen(tmp_path: Path, room: str, line: str) -> None:
    sources = modules()
    intruder = tmp_path / "intruder.py"
    intruder.write_text(f"{line}\n")
    known = {*sources, f"{room}.intruder"}
    seen = [target for target, _ in targets(f"{room}.intruder", intruder, known)]
    assert any(floor(target) < floor(f"{room}.intruder") for target in seen)


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c"]]
