"""The documentation: it builds without a warning, is generated from the code, and quotes it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
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


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


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
    assert len(messages) > 70
    strange = [message for message in messages if not occurs(message, texts)]
    assert not strange
    assert not occurs("a message that ... nobody prints", texts)
