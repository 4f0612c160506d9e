"""``all``: every measuring command for a CPU, each in a process of its own, then their tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ROOT
from benchmarks.commands.arguments import add_out

HELP = "run ops, step, head, growth, levels and bars, and update their tables and figure"
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
# Sizes small enough to try all commands in a minute. `models` is left out, since real models are not small.
_QUICK = {
    "ops": "--repeats 1 --shapes 16x150 --providers ours ours_inplace eager",
    "step": "--repeats 1 --pairs 1 --tokens 8 --vocabulary 130 --hidden 64 --layers 1 --providers ours eager",
    "head": "--repeats 1 --pairs 1 --tokens 8 --vocabulary 130 --hidden 64 --providers recompute eager",
    "growth": "--repeats 1 --rows 8 16 --vocabulary 64 128 --hidden 16",
    "levels": "--repeats 1 --shapes 16x150",
    "bars": "--repeats 1 --runs 1 --shapes 16x150 --providers ours ours_inplace eager --head-shape 16x8x130",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs ops, step, head, head --models, growth, levels and bars in turn. Then puts their results on the pages of "
        "benchmarks/results, in place of what stands between the pages' result markers. "
        "Goes on if a command fails, and then exits with 1. The results of the other commands are kept."
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try the command itself; needs --page and --figure"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="one page for everything (default: those of benchmarks/results)"
    )
    parser.add_argument(
        "--figure", type=Path, default=FIGURE, metavar="FILE", help="default: benchmarks/figures/growth.png"
    )
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    if options.quick and (options.page is None or options.figure == FIGURE):
        raise ValueError(
            "--quick needs --page and --figure: its results do not belong on the pages of benchmarks/results"
        )
    failed = []
    for arguments in _commands(options.out.resolve(), options.page, options.figure.resolve(), quick=options.quick):
        print(f"== {arguments[0]}", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT).returncode:
            failed.append(arguments[0])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _commands(out: Path, page: Path | None, figure: Path, *, quick: bool) -> Iterator[list[str]]:
    """Arguments of `python -m benchmarks`, in the order in which they run."""
    to = ["--out", str(out)]
    for name, command in _RUNS.items():
        if quick and name not in _QUICK:
            continue
        save = ["--save", str(figure)] if name == "growth" else []
        yield [*command.split(), *to, *save, *(_QUICK[name].split() if quick else [])]
    yield ["table", *to, "--update", *([] if page is None else [str(page.resolve())])]
