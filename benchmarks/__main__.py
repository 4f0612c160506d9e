"""Command line of the benchmark suite: one module of `benchmarks.commands` a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from benchmarks.commands import bars, floors, gpu, growth, head, levels, measure_all, ops, plot, step, table, trl


class Command(Protocol):
    """What a module of `benchmarks.commands` has."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int:
        """Returns the exit status."""


COMMANDS: dict[str, Command] = {
    "ops": ops,
    "step": step,
    "head": head,
    "bars": bars,
    "levels": levels,
    "growth": growth,
    "all": measure_all,
    "gpu": gpu,
    "plot": plot,
    "table": table,
    "floors": floors,
    "trl": trl,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="spo_kernels against eager PyTorch, torch.compile and other peers. Method: benchmarks/README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = make_parser().parse_args(arguments)
    options.command_line = arguments
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
