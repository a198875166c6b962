"""``fairchem-kd report``: one page, complete in itself, that a browser shows without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import config, inside, trainer, write_home

from fairchem_kd.commands import main as cli
from fairchem_kd.errors import UserError
from fairchem_kd.report.page import Section, page
from fairchem_kd.report.study import Study, read_tables
from fairchem_kd.report.tables import Table

SIZES = {"train": 12, "val": 4, "test": 9, "test_ood": 6}
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

#: Appended to a copy of the page: what a browser made of it, for --dump-dom to show.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.alt)), true);
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.found = JSON.stringify({
    errors,
    images: images.length,
    broken: images.filter(image => !image.complete || image.naturalWidth < 50).length,
    tables: [...document.querySelectorAll("table")].filter(t => t.offsetHeight > 20).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    dead: [...document.querySelectorAll("nav a")].filter(
      a => !document.getElementById(decodeURIComponent(a.hash.slice(1)))).length,
    mode: document.compatMode,
  });
});
</script>"""


class Page(HTMLParser):
    """What a page refers to, and the tags that were opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a card, a teacher, a plain and a distilled student, and the page on them."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home(SIZES)
        Path("data/card.json").write_text('{"options": {"recipe": "slabs"}, "by": "<me & you>"}')
        for name, losses in (("plain", None), ("n2n", {"n2n": {}})):
            run = config(
                Path("."), Path("data"), losses=losses, teacher=Path("teacher.pt"), max_epochs=1
            )
            run["dataset"]["test"] = {"format": "lmdb", "src": "data/test"}
            with trainer(run, identifier=name) as built:
                built.train(disable_eval_tqdm=True)
        argv = ["report", "plain=checkpoints/*-plain", "n2n=checkpoints/*-n2n", "--cpu"]
        cost = ["cost", "n2n.pt", "--no-training", "--no-md", "--repeats", "1", "--batch-sizes"]
        shutil.copy(next(Path("checkpoints").glob("*-n2n/best_checkpoint.pt")), "n2n.pt")
        try:
            assert cli.main([*cost, "1,2", "--warm-up", "0", "--cpu", "--out", "costs"]) == 0
            assert cli.main([*argv, "--cost", "costs", "--with", "cka", "-o", "report.html"]) == 0
        finally:
            torch.set_flush_denormal(False)
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = Path("report.html").read_text()
    found = Page(text)
    assert found.open == []
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in found.links)
    assert "<script" not in text
    for title in (
        "What distillation gained",
        "Errors",
        "Similarity of layers: n2n",
        "What it costs",
        "Configs",
        "Data cards",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "n2n against plain on test: energy" in text
    assert "n2n against plain on test_ood: energy" in text
    assert "<td>student</td>" in text  # of the table of costs
    assert "&quot;&lt;me &amp; you&gt;&quot;" in text  # the card
    assert re.search(r"# seed 3: checkpoints/\S+-n2n/best_checkpoint.pt", text)
    assert "coefficient" in text
    # errors, Pareto, learning curves, two parities; two maps of either form; the cost
    assert text.count("<img") == 6 + 4 + 1


def test_a_study_that_was_written_is_read_back(tmp_path: Path) -> None:
    table = Table("A title, of 3", ["model", "E | F (meV)"], notes=["A note.", "- another"])
    table.add("a|b", "10 [9, 11]")
    table.add("-", "")
    tables = [table, Table("Second", ["x"], [["1"]])]
    study = Study("cost", lambda: tables, dict, lambda: {"format": 1})
    written = study.write(tmp_path)
    assert [path.name for path in written] == ["cost.md", "cost.json"]
    assert read_tables(tmp_path, "cost") == tables
    assert json.loads((tmp_path / "cost.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        "null",
        '{"tables": 3}',
        '{"tables": [3]}',
        '{"tables": [{"title": 1, "header": [], "rows": [], "notes": []}]}',
        '{"tables": [{"title": "t", "header": "ab", "rows": [], "notes": []}]}',
        '{"tables": [{"title": "t", "header": ["a"], "rows": [["b", "c"]], "notes": []}]}',
        '{"tables": [{"title": "t", "header": ["a"], "rows": [[1]], "notes": []}]}',
    ],
)
def test_a_file_that_is_no_study_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "cka.json").write_text(text)
    with pytest.raises(UserError, match=r"cka\.json (cannot be read|holds no tables)"):
        read_tables(tmp_path, "cka")


def test_what_users_wrote_is_text() -> None:
    section = Section("A <b> & c")
    section.add_table(Table("<script>", ["<i>"], [["<u>"]], ["&"]))
    section.add_sentences(["<em>"])
    section.add_folded("<p>", "</pre>")
    section.add_picture(b"<svg/>", '">')
    text = page("<title>", [section])
    assert Page(text).open == []
    assert not re.search("<(b|script|i|u|em|p)>", text)


@pytest.mark.parametrize("size", ["1280,900", "500,900"])
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_a_browser_shows_it(size: str, tmp_path: Path) -> None:
    """Every picture and table, within the window, without a message on the console."""
    assert BROWSER is not None
    probed = tmp_path / "probed.html"
    probed.write_text(Path("report.html").read_text().replace("<body>", f"<body>{PROBE}"))

    def browse(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"),
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)

    done = browse("--dump-dom", probed.as_uri())
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr
    found = json.loads(match[1].replace("&quot;", '"'))
    assert found.pop("tables") >= 8
    assert found.pop("width") == int(size.partition(",")[0])
    assert found.pop("overflow") <= 0
    assert found == {"errors": [], "images": 11, "broken": 0, "dead": 0, "mode": "CSS1Compat"}
    assert "CONSOLE" not in done.stderr, done.stderr
    done = browse(f"--screenshot={tmp_path / 'page.png'}", Path("report.html").resolve().as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["teacher.pt", "--cka", "data"], "--cka data: there is no cka.json in it"),
        (["teacher.pt", "-o", "data"], "--out data is a folder"),
        (["nothing.pt"], "nothing.pt does not exist"),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *argv, "--cpu"]) == 2
    assert re.search(f"^error: .*{sentence}", capsys.readouterr().err)
