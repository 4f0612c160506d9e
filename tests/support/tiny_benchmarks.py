"""Benchmark commands at tiny sizes, and what they leave."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT

# One thread: at these sizes a second one only waits.
TINY = ["--repeats", "1", "--threads", "1"]


def run_python(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found
