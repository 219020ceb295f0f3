"""The field's words: home-made ones stay out of the package, the launchers, the recipes and the documentation."""

from __future__ import annotations

import re

import pytest

from tests.architecture.sources import ROOT

# Home-made word -> what to write. Only words that mean nothing else here.
HOME_MADE = {
    r"who thinks": "selected tokens",
    r"thinks? again": "routed step",
    r"full[ _-]pass": "base pass",
    r"forbidden": "attention mask",
    r"patience": "retry policy, collective timeout",
    r"cut out": "split",
    r"to be had": "available",
    r"stands?": "is",
    r"lies": "is",
    r"told": "given",
    r"knows": "has",
    r"goes on": "continues",
    r"anew": "again",
    r"nobody": "no process, no module",
    r"whoever": "the process that",
    r"for ever": "permanently",
}
FOLDERS = ("megatron_itt", "tools", "slurm", "recipes", "docs")
SUFFIXES = {".py", ".sh", ".sbatch", ".yaml", ".md", ".jinja"}
# Tables of results, and a passage of English that a figure analyses.
EXEMPT = ("docs/results/",)


def texts() -> dict[str, str]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    named = {path.relative_to(ROOT).as_posix(): path for path in [*paths, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
    return {name: path.read_text("utf-8") for name, path in named.items() if not name.startswith(EXEMPT)}


@pytest.mark.parametrize("word", HOME_MADE)
def test_a_home_made_word_does_not_occur(word: str) -> None:
    pattern = re.compile(rf"\b{word}\b", re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()} (write: {HOME_MADE[word]})"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_list_is_short() -> None:
    assert len(HOME_MADE) <= 20
