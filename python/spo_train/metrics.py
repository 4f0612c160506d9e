"""Metrics as JSON lines, progress bars, and the time of each part of a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spo_train.files import json_line, read_jsonl, write_jsonl


class JsonlLog:
    """Appends JSON objects to a file, one a line.

    Attributes:
        path: the file, or None.
        records: the records in the file; without a file, those that were written.
    """

    def __init__(self, path: Path | None, *, keep_to_step: int | None = None) -> None:
        """
        Args:
            path: the file; its folder is created. None keeps the records in memory only.
            keep_to_step: None starts the file anew. A resumed run keeps the records up to this `step` and drops later
                ones, because it writes those again.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is not None:
            if keep_to_step is not None:
                self.records = [r for r in read_jsonl(path) if r["step"] <= keep_to_step]
            write_jsonl(path, self.records)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the operating system. Its `step` tells a resumed run whether to keep it.

        Raises:
            OSError: the file cannot be written, for instance because the disk is full; the message names the file.
        """
        self.records.append(record)
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_line(record))
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


class PartTimer:
    """Adds up the wall time of the named parts of a step.

    A part ends when the GPU has done the part's work. So the CPU waits for the GPU at both ends of a part.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the step computes.
        """
        self._device = device
        self.start = self._now()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    def total(self) -> float:
        """Return the seconds since the timer was made."""
        return self._now() - self.start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def progress_bar(
    *, total: int, desc: str, shown: bool = True, initial: int = 0, unit: str = "it", unit_scale: bool = False
) -> tqdm:
    """Return a progress bar with rate and remaining time. It prints nothing unless standard error is a terminal."""
    return tqdm(
        total=total,
        desc=desc,
        initial=initial,
        unit=unit,
        unit_scale=unit_scale,
        file=sys.stderr,
        disable=None if shown else True,
        dynamic_ncols=True,
        leave=False,
    )
