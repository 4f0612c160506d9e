"""Measures one case of a workload. Each contender's gate, memory and interleaved time fill the columns of its row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import measure
from benchmarks.harness.bench import Settings
from benchmarks.harness.gate import Verdict, failure, judge
from benchmarks.harness.rows import Memory, Row, Timing


@dataclass(frozen=True)
class Contender:
    """One implementation: the row to fill, and what is called."""

    row: Row
    entry: measure.Entry
    check: Callable[[], Verdict]  # the gate
    memory: measure.Entry | None  # what is called to measure memory; None leaves memory out
    result_bytes: int = 0  # bytes of a call's results, which do not count as extra memory


def contest(
    contenders: Iterable[Contender],
    settings: Settings,
    *,
    over: Mapping[str, Sequence[str]],
    beside: Mapping[str, measure.Entry] | None = None,
    every_round: Callable[[], None] = measure.nothing,
) -> dict[str, measure.Samples]:
    """Fill the columns of every row; returns the samples by provider and by name in `beside`.

    A result of ours that is wrong is not timed. A wrong peer is timed, because its users want to see the time, but its
    status stays "wrong": ratios and rankings take rows whose status is "ok".

    over: maps the name of a ratio to its bases, providers or entries in `beside`. The ratio is over the fastest base.
    beside: entries that are timed in the same rounds, as a yardstick.
    """
    timed = {contender.row.provider: contender for contender in contenders if _enter(contender, settings.device)}
    if not timed:
        return {}
    beside = beside or {}
    entries = {**{name: contender.entry for name, contender in timed.items()}, **beside}
    samples = measure.interleave(entries, settings.device, settings.repeats, every_round)
    for name, contender in timed.items():
        contender.row.timing = Timing.of(samples[name])
        contender.row.status = contender.row.status or "ok"
    right = {name: contender.row for name, contender in timed.items() if contender.row.status == "ok"}
    for ratio, names in over.items():
        bases = [samples[name] for name in names if name in right or name in beside]
        if bases:
            base = min(bases, key=lambda times: statistics.median(times.wall))
            for name, row in right.items():
                row.over[ratio] = measure.paired_ratio(samples[name].wall, base.wall)
                row.over[f"{ratio}_cpu"] = measure.paired_ratio(samples[name].cpu, base.cpu)
    return samples


def _enter(contender: Contender, device: torch.device) -> bool:
    """Gate and memory; whether the contender is timed."""
    row = contender.row
    verdict = judge(contender.check)
    row.error, row.status = verdict.errors, verdict.problem
    if not verdict.failed and contender.memory is not None:
        try:
            _call(contender.entry)  # warm-up: caches that the first call fills do not count as a call's memory
            row.memory = Memory.of(measure.peak_memory(contender.memory, device), contender.result_bytes)
        except RuntimeError as error:
            row.status = failure(error)
    if row.status.startswith("failed"):
        contender.entry.finish()
        return False
    return not (row.status and row.ours)


def _call(entry: measure.Entry) -> None:
    entry.prepare()
    entry.call()
    entry.finish()
