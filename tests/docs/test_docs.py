"""The documentation: it builds without a warning, is generated from the code, and quotes it."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fairchem_kd.commands.main import COMMANDS
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.launch.config import make_parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GAP = "\0"  # where an f-string has a value


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs sphinx: pip install '.[docs]'")
    pytest.importorskip("myst_parser", reason="needs myst-parser: pip install '.[docs]'")
    pytest.importorskip("furo", reason="needs furo: pip install '.[docs]'")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")} - {"README"}
    assert pages <= {path.stem for path in (tmp_path / "html").glob("*.html")}
    for page in (tmp_path / "html").glob("*.html"):  # nothing is loaded from elsewhere
        loaded = re.findall(
            r'<(?:script|img|link|iframe)[^>]*(?:src|href)="([^"]+)"', page.read_text()
        )
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page.name


def test_the_page_of_commands_is_that_of_the_code() -> None:
    module = load(DOCS / "make_commands.py")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run: python docs/make_commands.py"
    )
    prose = "Models are asked through\nfairchem_kd.StudentCalculator.\nfairchem-kd physics RUN"
    [said, command] = module._text(prose).strip().split("\n\n")
    assert said == "Models are asked through fairchem_kd.StudentCalculator."
    assert command == "```\nfairchem-kd physics RUN\n```"


def test_every_page_can_be_reached_on_github() -> None:
    title = (DOCS / "README.md").read_text()
    contents = (DOCS / "index.rst").read_text()
    for page in DOCS.glob("*.md"):
        if page.stem != "README":
            assert f"({page.name})" in title, f"docs/README.md has no link to {page.name}"
            assert re.search(rf"^   {page.stem}$", contents, re.M), f"index.rst lacks {page.stem}"


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_on_the_pages_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairchem_kd"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configs_on_the_pages_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        found = given.get("task", {}).get("distillation") or given
        if "losses" in found and page.stem != "extending":  # which has tests of its own
            teacher = {"checkpoint": "teacher.pt", **found.get("teacher", {})}
            assert parse_distillation({"distillation": {**found, "teacher": teacher}}).terms


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `fairchem` or `fairchem-kd` command in a page's code."""
    text = page.read_text().replace("\\\n", " ")
    blocks = r"^( *)```.*?^ *```|^ {4,}.*?$"  # fenced, or indented
    code = [match[0] for match in re.finditer(blocks, text, re.S | re.M)]
    found = [line.strip().removeprefix("$ ") for block in code for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(blocks, "", text, flags=re.S | re.M))
    messages = set(quoted_messages(page))
    found += [" ".join(span.split()) for span in spans if span not in messages]
    for line in found:
        line = re.sub(r"^PYTHONPATH=\. ", "", line).replace("python -m fairchem_kd", "fairchem")
        if re.match(r"fairchem(-kd)? [a-z-]", line):
            yield shlex.split(line, comments=True)


def options_of(words: list[str]) -> set[str]:
    """The options of the command with which a line begins."""
    if words[0] == "fairchem":
        return {flag for action in make_parser()._actions for flag in action.option_strings}
    parser = argparse.ArgumentParser()
    if words[1] == "--help":
        return {"--help"}
    assert words[1] in COMMANDS, " ".join(words)
    importlib.import_module(COMMANDS[words[1]].module).add_arguments(parser)
    known: set[str] = set()
    rest = words[2:]
    while True:
        known |= {flag for action in parser._actions for flag in action.option_strings}
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not below or not rest or rest[0] not in below[0].choices:
            return known
        parser = below[0].choices[rest.pop(0)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_on_the_pages_are_the_packages_own(page: Path) -> None:
    for words in commands(page):
        known = options_of(words)
        for word in words[1:]:
            flag = word.partition("=")[0]
            if flag.startswith("--") and "." not in flag and flag != "--KEY":
                assert flag in known, f"{page.name}: {' '.join(words)}"
            if re.fullmatch(r"yaml_configs/[\w/]+\.yml", word):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


def said_by_the_package() -> list[str]:
    """Every text in its source, adjacent pieces and f-strings put together."""
    texts = []
    for path in (ROOT / "fairchem_kd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values
                    )
                )
    return texts


def quoted_messages(page: Path) -> Iterator[str]:
    """What stands in backticks in the first column of a page's tables of messages."""
    in_table = False
    for line in page.read_text().splitlines():
        if line.startswith(("| message ", "| what you see ")):
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("| ---"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


def occurs(message: str, texts: list[str]) -> bool:
    """Whether one text has all parts of a message in their order, values between them."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(f"[^{GAP}]*{GAP}.*?".join(parts), re.S)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_are_the_packages_own() -> None:
    texts = said_by_the_package()
    messages = [*quoted_messages(DOCS / "troubleshooting.md"), *quoted_messages(ROOT / "README.md")]
    assert len(messages) > 120
    strange = [message for message in messages if not occurs(message, texts)]
    assert not strange
    assert not occurs("a message that ... nobody prints", texts)
