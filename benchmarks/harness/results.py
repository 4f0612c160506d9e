"""The results of a command: a CSV with the machine on every row, a markdown page, and the exit status."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.harness.bench import Bench, Environment, machine_line
from benchmarks.harness.rows import Result, cells, column_names, failures_of_ours

RESULTS_BEGIN, RESULTS_END = "<!-- results:begin -->", "<!-- results:end -->"

Record = dict[str, str]  # a row of a CSV that was read


class CsvWriter:
    """Appends rows as they come, so that an interrupted run keeps the rows that it measured."""

    def __init__(self, path: Path, row_type: type, environment: Environment) -> None:
        self.path = path
        self._environment = {f"env_{name}": value for name, value in asdict(environment).items()}
        self._columns = [*column_names(row_type), *self._environment]
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self._columns)

    def write(self, rows: Iterable[Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            for row in rows:
                writer.writerow({key: _cell(value) for key, value in (cells(row) | self._environment).items()})


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class Report:
    """The CSV of one command, and the page beside it."""

    def __init__(self, bench: Bench, kind: str, row_type: type) -> None:
        self._bench = bench
        self._csv = CsvWriter(output_path(bench.out, kind), row_type, bench.environment)
        self._rows: list[Result] = []

    @property
    def page(self) -> Path:
        return self.path.with_suffix(".md")

    @property
    def path(self) -> Path:
        """The CSV."""
        return self._csv.path

    def add(self, rows: Sequence[Result]) -> None:
        self._csv.write(rows)
        self._rows += rows

    def write_page(self, title: str, body: str) -> None:
        """Write and print the page: title, machine, body."""
        text = f"{heading(title, self._bench.environment)} {body}"
        self.page.write_text(text + "\n")
        print("", text, "", self.path, self.page, sep="\n", flush=True)

    def append(self, text: str) -> None:
        """Add to the page a part that is ready only after the results."""
        self.page.write_text(f"{self.page.read_text()}\n{text}\n")
        print("", text, sep="\n", flush=True)

    def exit_status(self) -> int:
        """1 if a result of ours is wrong or failed. Writes the names of such results to stderr."""
        failures = failures_of_ours(self._rows)
        for row in failures:
            case = [str(value) for name, value in cells(row).items() if name in _leading_columns(type(row))]
            print(f"{' '.join(case)}: {row.provider} {row.status}", file=sys.stderr)
        return 1 if failures else 0


def _leading_columns(row_type: type) -> set[str]:
    """Columns that say what was measured: all before the status, except the provider."""
    names = column_names(row_type)
    return set(names[: names.index("status")]) - {"provider"}


def heading(title: str, environment: Environment) -> str:
    """How a page begins: its title and the machine, in one line."""
    return f"**{title}.** {machine_line(environment)}"


def output_path(folder: Path, kind: str, suffix: str = ".csv") -> Path:
    """A new file of a kind, such as ops, step, bars or plot; names sort by time."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{kind}-{datetime.now(timezone.utc).strftime('%Y%m%d-%H%M%S')}{suffix}"


def read_csv(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on are right-aligned."""
    ruler = ["---" if index < numbers_from else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def replace_results(page: Path, block: str) -> None:
    """Put a block between the result markers of a markdown page; ValueError where the page has none."""
    text = page.read_text()
    before, begin, rest = text.partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ValueError(f"{page} must hold {RESULTS_BEGIN} and, after it, {RESULTS_END}")
    page.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}")
