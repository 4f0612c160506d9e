"""Metrics as JSON lines, progress bars, and the time of each part of a step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo_train.files import write_atomically


class JsonlLog:
    """Appends JSON objects to a file, one a line, each on the disk's way before `write` returns."""

    def __init__(self, path: Path, *, keep_to_step: int | None = None) -> None:
        """
        Args:
            path: the file; its folder is created.
            keep_to_step: for a resumed run: earlier records up to this `step` stay, later ones are dropped, since the
                run writes them again. None starts the file anew.
        """
        self.path = path
        self.records = [] if keep_to_step is None else [r for r in read_jsonl(path) if r["step"] <= keep_to_step]
        write_atomically(path, "".join(map(_line, self.records)).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; its `step` places it when the run is resumed.

        Raises:
            OSError: naming the file, for instance when the disk is full.
        """
        self.records.append(record)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a JSONL file, an unfinished last line left out; [] if there is no such file.

    Raises:
        ValueError: a line before the last is not JSON; names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A killed process leaves at most its last line incomplete, and that line has no newline.
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return records


class PartTimer:
    """Adds up the wall time of the named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def progress(*, total: int, desc: str, initial: int = 0, unit: str = "it", unit_scale: bool = False) -> tqdm:
    """A progress bar with rate and remaining time on stderr; silent where stderr is no terminal."""
    return tqdm(
        total=total,
        desc=desc,
        initial=initial,
        unit=unit,
        unit_scale=unit_scale,
        file=sys.stderr,
        disable=None,
        dynamic_ncols=True,
        leave=False,
    )
