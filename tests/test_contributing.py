"""CONTRIBUTING names every file that adding an op touches, and no other; the paths in all pages exist."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}
# Files that call an op do not change with a new one.
CALLERS = {"spo_kernels/backends/mixtures.py", "spo_kernels/linear/loops.py", "spo_kernels/linear/ops.py"}


def listed(beginning: str) -> set[str]:
    """Paths in the numbered list below the paragraph that starts with ``beginning``."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    _, found, rest = text.partition(beginning)
    assert found, f"CONTRIBUTING.md has no paragraph that begins {beginning!r}"
    items = re.match(r"[^\n]*\n\n((?:(?:\d+\.|  ) .*\n)+)", rest)
    assert items is not None
    return {path for path in re.findall(r"`([\w/.]+)`", items[1]) if "/" in path}


def files_naming(stem: str, *folders: str) -> set[str]:
    """Files in which an op's name occurs, with or without underscores, whatever its case."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    pattern = re.compile(stem.replace("_", "_?"), re.IGNORECASE)
    return {str(path.relative_to(ROOT)) for path in paths if pattern.search(path.read_text())}


def test_places_of_a_row_op() -> None:
    touched = files_naming("token_stats_bwd", "spo_kernels", "csrc") - CALLERS
    assert listed("A row op touches these files") == touched | {"tests/support/oracle.py", "tests/test_ops.py"}


def test_places_of_an_op_of_the_head() -> None:
    assert listed("An op of the head needs no kernel") == files_naming("linear_kl_loss", "spo_kernels")


def test_every_path_exists() -> None:
    """Every path and link in the pages of the root, of docs and of benchmarks."""
    if not (ROOT / ".git").exists():
        pytest.skip("the sdist has no figures")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    missing = {}
    for page in pages:
        text = page.read_text()
        links = {page.parent / link for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)}
        folders = ("spo_kernels", "csrc", "tests", "benchmarks", "python", "docs")
        paths = {ROOT / path for path in re.findall(r"`([\w.]+/[\w/.]+\.\w+)`", text) if path.split("/")[0] in folders}
        if gone := sorted(str(path) for path in links | paths if not path.exists()):
            missing[page.name] = gone
    assert not missing
