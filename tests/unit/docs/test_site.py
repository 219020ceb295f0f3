"""The documentation site builds without a warning, its links lead somewhere, and the tutorial runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


class _Page(HTMLParser):
    """Anchors of a page, and what it links and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails the build (not with --quiet, which hides warnings from --strict as well)."""
    from mkdocs.__main__ import cli

    folder = tmp_path_factory.mktemp("site")
    config = str(ROOT / "mkdocs.yml")
    cli.main(["build", "--strict", "-f", config, "-d", str(folder)], standalone_mode=False)
    return folder


def test_every_link_of_the_site_leads_to_a_page_and_an_anchor(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in pages[target].anchors):
                broken.append((path.relative_to(site).as_posix(), link))
    assert len(pages) > 15 and not broken


def test_the_api_page_shows_the_public_functions_with_their_docstrings(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load_recipe", "train", "preprocess", "export_hf", "import_hf", "evaluate"):
        assert f'id="megatron_itt.api.{name}"' in page
    assert "Train in this process of the job" in page and "thinking_budget" in page


def test_the_site_asks_no_other_server_for_anything(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//')
    assert not [path for path in site.rglob("*.html") if loaded.search(path.read_text(encoding="utf-8"))]


def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_numbers(text: str) -> str:
        return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "0", text)

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            shown = "".join(line for output in cell["outputs"] for line in output["text"])
            assert without_numbers(printed.getvalue()) == without_numbers(shown)
