"""``python -m benchmarks.models.coverage``: lines of csrc/cuda that the emulated backend runs. Takes minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks import ROOT

SOURCES = ROOT / "csrc" / "cuda"


def counts(folder: Path) -> dict[str, dict[int, int]]:
    """How often each line of each file ran, in the instantiation that ran it most."""
    most: dict[str, dict[int, int]] = defaultdict(dict)
    for data in sorted(folder.rglob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", data.name]
        report = subprocess.run(command, cwd=data.parent, check=True, capture_output=True, text=True).stdout
        for document in report.splitlines():
            for file in json.loads(document)["files"]:
                path = (data.parent / file["file"]).resolve()
                if path.is_relative_to(SOURCES):
                    lines = most[path.name]
                    for line in file["lines"]:
                        number = line["line_number"]
                        lines[number] = max(lines.get(number, 0), line["count"])
    return most


def main() -> int:
    if shutil.which("gcov") is None:
        sys.exit("gcov, which comes with g++, is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        # -O0, because an optimizing compiler merges lines.
        environment = os.environ | {"SPO_EMULATOR_FLAGS": "--coverage -O0"}
        chosen = ["-k", "emulated_cuda or split", "tests/test_ops.py", "tests/cuda/test_cuda_emulator.py"]
        command = [sys.executable, "-m", "pytest", "-q", f"--basetemp={folder}/tests", *chosen]
        tests = subprocess.run(command, cwd=ROOT, env=environment)
        found = counts(Path(folder))
    for name, lines in sorted(item for item in found.items() if item[1]):
        missed = sorted(number for number, count in lines.items() if count == 0)
        ran = len(lines) - len(missed)
        print(f"{name:<22}{ran:>5} of {len(lines):>4} lines{ran / len(lines):>7.1%}   missed: {missed or 'none'}")
    total = sum(map(len, found.values()))
    ran = sum(count > 0 for lines in found.values() for count in lines.values())
    print(f"{'all':<22}{ran:>5} of {total:>4} lines{ran / max(total, 1):>7.1%}")
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
