"""One command for the page: every measurement in a process of its own, then the tables and figures."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ROOT

PAGE = ROOT / "benchmarks" / "README.md"
FIGURE = ROOT / "benchmarks" / "figures" / "growth.png"

# In the order in which they run.
_RUNS = {
    "ops": "ops",
    "step": "step",
    "head": "head",
    "models": "head --models --repeats 3",
    "growth": "growth",
    "levels": "levels",
    "bars": "bars",
}
# Small enough to try all of it in a minute; the models have the sizes they have.
_QUICK = {
    "ops": "--repeats 1 --shapes 16x150 --providers ours ours_inplace eager",
    "step": "--repeats 1 --pairs 1 --tokens 8 --vocabulary 130 --hidden 64 --layers 1 --providers ours eager",
    "head": "--repeats 1 --pairs 1 --tokens 8 --vocabulary 130 --hidden 64 --providers recompute eager",
    "growth": "--repeats 1 --rows 8 16 --vocabulary 64 128 --hidden 16",
    "levels": "--repeats 1 --shapes 16x150",
    "bars": "--repeats 1 --runs 1 --shapes 16x150 --providers ours ours_inplace eager --head-shape 16x8x130",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try the command itself; needs --page and --figure"
    )
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="default: benchmarks/README.md")
    parser.add_argument(
        "--figure", type=Path, default=FIGURE, metavar="FILE", help="default: benchmarks/figures/growth.png"
    )


def commands(options: argparse.Namespace) -> Iterator[list[str]]:
    """Arguments of `python -m benchmarks`, in the order in which they run."""
    out = ["--out", str(options.out.resolve())]
    for name, run in _RUNS.items():
        if options.quick and name not in _QUICK:
            continue
        save = ["--save", str(options.figure.resolve())] if name == "growth" else []
        yield [*run.split(), *out, *save, *(_QUICK[name].split() if options.quick else [])]
    yield ["table", *out, "--update", str(options.page.resolve())]


def run_all(options: argparse.Namespace) -> int:
    if options.quick and (options.page == PAGE or options.figure == FIGURE):
        raise ValueError("--quick needs --page and --figure: its results are no results for benchmarks/README.md")
    failed = []
    for arguments in commands(options):
        print(f"== {arguments[0]}", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT).returncode:
            failed.append(arguments[0])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
