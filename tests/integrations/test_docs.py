"""The pages: their Python compiles and, where TRL is installed, runs; their tables name what the code has."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

import spo_kernels

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRL_PAGE = ROOT / "docs/trl.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("|")]
    assert set("".join(rows[1])) <= set("-: ")
    return rows[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page: Path) -> None:
    for block in python_blocks(page):
        compile(block, str(page), "exec")


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    listed = {name for members in re.findall(r"members: \[(.*)\]", pages) for name in members.split(", ")}
    modules = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE))
    listed |= {module.rpartition(".")[2] for module in modules}
    assert set(spo_kernels.__all__) - {"backends"} <= listed
    adapters = {path.stem for path in (ROOT / "spo_kernels/integrations").glob("*.py")} - {"__init__"}
    assert {f"spo_kernels.integrations.{name}" for name in adapters} <= modules


def test_install_page_runs() -> None:
    for block in python_blocks(ROOT / "docs/install.md"):
        exec(compile(block, "docs/install.md", "exec"), {})
