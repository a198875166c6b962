"""One python file out of modules of ours, of those that ask a calculator: nothing is written twice.

The modules are joined in an order in which each stands after those that it imports; imports of
fairchem-kd's own go, all others are gathered at the top. Names at the top of modules must differ.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from fairchem_kd._version import __version__

#: In the order in which they stand in the file.
MODULES = (
    "_version",
    "text",
    "digest",
    "errors",
    "json_file",
    "npz",
    "stock.periodicity",
    "store.format",
    "store.names",
    "store.failures",
    "store.card",
    "store.reader",
    "calculators.factory",
    "calculators.asking",
    "calculators.checks",
    "calculators.filling",
    "calculators.structures_file",
    "calculators.ase_files",
    "calculators.options",
    "calculators.given",
    "calculators.parts",
    "calculators.standalone",
)
_HEAD = '''\
#!/usr/bin/env python3
"""Fill a store of fairchem-kd with what an ASE calculator says.

    python {name} STRUCTURES --calculator PACKAGE.MODULE:FACTORY --out STORE

Needs numpy, ASE and the calculator; no torch, no fairchem-core, no fairchem-kd. STRUCTURES is a
file that `fairchem-kd teach CONFIG.yml --structures FILE` wrote, or any that ASE reads. It can be
stopped at any moment and goes on where it was; --help lists its options.

Written by fairchem-kd {version} out of its own modules; write it anew rather than change it.
"""

from __future__ import annotations

'''
_FOOT = """

if __name__ == "__main__":
    sys.exit(standalone())
"""
_PACKAGE = Path(__file__).resolve().parent.parent


def bundled(
    name: str = "teach.py",
    modules: Sequence[str] = MODULES,
    head: str = _HEAD,
    foot: str = _FOOT,
) -> str:
    """The text of the file.

    Args:
        name: what it will be called.
        modules: of ours, in the order in which they stand in the file.
        head: what stands above them, up to the imports; it may have ``{name}`` and ``{version}``.
        foot: what stands below them.
    """
    imports: dict[str, set[str]] = {}  # by module, what is taken of it; "": the module itself
    bodies = []
    for module in modules:
        text = (_PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        own, body = _parts(text)
        for source, imported in own:
            imports.setdefault(source, set()).add(imported)
        rule = "-" * (96 - len(module))
        bodies.append(f"# {module} {rule}\n\n{body.strip()}\n")
    plain = [f"import {name}" for name in sorted(imports.get("", ()))]
    some = [
        f"from {source} import {', '.join(sorted(names, key=str.lower))}"
        for source, names in sorted(imports.items())
        if source
    ]
    gathered = "\n".join([*plain, *some])
    joined = "\n\n".join(bodies)
    return f"{head.format(name=name, version=__version__)}{gathered}\n\n\n{joined}{foot}"


def _parts(text: str) -> tuple[list[tuple[str, str]], str]:
    """Its imports from elsewhere, each a module (empty: one itself) and a name; and the rest."""
    lines = text.splitlines(keepends=True)
    imports: list[tuple[str, str]] = []
    dropped: list[tuple[int, int]] = []
    for number, node in enumerate(ast.parse(text).body):
        span = (node.lineno - 1, node.end_lineno or node.lineno)
        if isinstance(node, ast.Import):
            imports += [("", _alias(one)) for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if source.partition(".")[0] not in ("fairchem_kd", "__future__"):
                imports += [(source, _alias(one)) for one in node.names]
        elif number == 0 and isinstance(node, ast.Expr):  # the module's docstring
            pass
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        dropped.append(span)
    for start, stop in reversed(dropped):
        del lines[start:stop]
    return imports, _without_own("".join(lines))


def _alias(one: ast.alias) -> str:
    return one.name if one.asname is None else f"{one.name} as {one.asname}"


def _without_own(body: str) -> str:
    """Without what stood around imports: blank lines without end."""
    while "\n\n\n\n" in body:
        body = body.replace("\n\n\n\n", "\n\n\n")
    return body


def names_at_the_top(texts: Sequence[str]) -> list[str]:
    """Every name that modules define at their top, as often as they do."""
    found: list[str] = []
    for text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(node.name)
            elif isinstance(node, ast.Assign):
                found += [t.id for t in node.targets if isinstance(t, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.append(node.target.id)
    return found
