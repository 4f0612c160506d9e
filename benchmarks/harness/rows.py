"""Rows of results: the columns that every workload shares, and how a row becomes the cells of a CSV.

A workload's row is a dataclass whose fields become columns in their order. A plain field is one column. A field marked
`part` becomes the columns of another dataclass. A field marked `keyed` becomes a column ``name_key`` for each key.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from benchmarks.harness import measure

_MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, over the rounds."""

    rounds: int
    wall_ms: float  # median
    wall_p20_ms: float
    wall_p80_ms: float
    cpu_ms: float  # median CPU time of the process, all threads

    @staticmethod
    def of(samples: measure.Samples) -> Timing:
        wall, cpu = (1e3 * statistics.median(seconds) for seconds in (samples.wall, samples.cpu))
        p20, p80 = (1e3 * measure.quantile(samples.wall, q) for q in (0.2, 0.8))
        return Timing(len(samples.wall), wall, p20, p80, cpu)

    def with_spread(self, digits: str) -> str:
        """Median and percentiles, such as ``1.23 (1.20-1.31)``; digits: a format such as ``.2f``."""
        return f"{self.wall_ms:{digits}} ({self.wall_p20_ms:{digits}}-{self.wall_p80_ms:{digits}})"


@dataclass(frozen=True)
class Memory:
    """Peak of a call beyond its inputs and beyond the bytes of its results, which the workload states."""

    extra_mib: float  # torch's allocations
    extra_resident_mib: float | None  # the same of the process's resident memory, by any allocator

    @staticmethod
    def of(peak: measure.PeakMemory, result_bytes: int) -> Memory:
        resident = None if peak.resident is None else (peak.resident - result_bytes) / _MIB
        return Memory((peak.allocator - result_bytes) / _MIB, resident)


class Row(Protocol):
    """The attributes of a workload's row that the harness reads and fills."""

    provider: str
    status: str  # "ok"; or "wrong: ...", "failed: ...", "skipped: ..."
    timing: Timing | None
    memory: Memory | None
    error: dict[str, float]  # largest errors against the truth
    over: dict[str, float]  # wall and CPU time over another provider's, by ratio; medians over rounds

    @property
    def ours(self) -> bool:
        """Whether this project is at fault if the result is wrong: then the command fails."""


class Result(Protocol):
    """The attributes of a row that a report reads."""

    provider: str
    status: str

    @property
    def ours(self) -> bool: ...


def part(columns: type) -> dict[str, Any]:
    """Metadata of a field that holds a dataclass of columns, or None where nothing was measured."""
    return {"part": columns}


def keyed(*keys: str) -> dict[str, Any]:
    """Metadata of a field that holds a dict, with a column for each of these keys."""
    return {"keys": keys}


def column_names(row_type: Any) -> list[str]:
    names: list[str] = []
    for column in fields(row_type):
        if "part" in column.metadata:
            names += column_names(column.metadata["part"])
        elif "keys" in column.metadata:
            names += [f"{column.name}_{key}" for key in column.metadata["keys"]]
        else:
            names.append(column.name)
    return names


def cells(row: Any) -> dict[str, Any]:
    """The values of a row by column. A column that was not measured is missing or None."""
    found: dict[str, Any] = {}
    for column in fields(row):
        value = getattr(row, column.name)
        if "part" in column.metadata:
            found |= {} if value is None else cells(value)
        elif "keys" in column.metadata:
            found |= {f"{column.name}_{key}": value[key] for key in column.metadata["keys"] if key in value}
        else:
            found[column.name] = value
    return found


def failures_of_ours(rows: Sequence[Result]) -> list[Result]:
    return [row for row in rows if row.ours and row.status.startswith(("wrong", "failed"))]
