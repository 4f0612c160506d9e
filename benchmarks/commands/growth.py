"""``growth``: time and memory against rows, vocabulary and threads, of a row op and of the head.

Each point is measured at one size with the code of `ops` and `head`, forward and backward: `token_kl`, and the head's
pair loss and KL. The exponent of a line is the slope of its points in logarithms, by least squares: 1 is linear.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.commands.arguments import add_common, count, open_bench
from benchmarks.harness.bench import Settings
from benchmarks.harness.results import Report, markdown_table
from benchmarks.harness.rows import Row
from benchmarks.workloads import head
from benchmarks.workloads.row_case import CaseRunner
from benchmarks.workloads.row_ops import Case, Workload

HELP = "measure time and memory against rows, vocabulary and threads, in one figure"

_WORKLOAD = Workload("token_kl", "fwd_bwd")
_ROW_PROVIDERS = ("ours", "ours_inplace", "eager")
_HEAD_PROVIDERS = ("recompute_free", "recompute", "eager")
# Losses of the head, by the name of their lines.
_LOSSES = {"head pair loss": "pairs", "head KL": "kl"}
_WHAT = ("token_kl", *_LOSSES)
_TOKENS = 64
_AXES = {"rows": "rows N", "vocabulary": "vocabulary V", "threads": "threads"}


class Size(NamedTuple):
    """The size at a point, and the axis of the line that the point belongs to."""

    axis: str  # one of _AXES
    rows: int
    vocabulary: int
    threads: int

    @property
    def position(self) -> int:
        """Position of the point on the axis."""
        return {"rows": self.rows, "vocabulary": self.vocabulary, "threads": self.threads}[self.axis]


@dataclass
class GrowthRow:
    """One implementation at one size; forward and backward, float32."""

    axis: str
    what: str  # one of _WHAT
    provider: str
    rows: int
    vocabulary: int
    threads: int
    status: str
    wall_ms: float | None
    wall_p20_ms: float | None
    wall_p80_ms: float | None
    extra_mib: float | None  # peak beyond the inputs, and for the head also beyond the gradients

    @property
    def position(self) -> int:
        return Size(self.axis, self.rows, self.vocabulary, self.threads).position

    @property
    def ours(self) -> bool:
        return self.provider != "eager"


@dataclass(frozen=True)
class _Axes:
    """Sizes to measure. An axis that does not vary stays at the value just before the middle of its list."""

    rows: list[int]
    vocabulary: list[int]
    hidden: int

    @property
    def tokens(self) -> int:
        """Tokens of each sequence in the head's pairs, the same at all sizes."""
        return max(min(_TOKENS, min(self.rows) // 2), 1)

    def sizes(self, threads: int) -> Iterator[Size]:
        rows, vocabulary = (axis[len(axis) // 2 - 1] for axis in (self.rows, self.vocabulary))
        for n in self.rows:
            yield Size("rows", n, vocabulary, threads)
        for v in self.vocabulary:
            yield Size("vocabulary", rows, v, threads)
        for used in range(1, threads + 1):
            yield Size("threads", rows, vocabulary, used)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "How time and memory of a row op and of the head grow with rows, vocabulary and threads."
    add_common(parser)
    parser.add_argument("--rows", type=count, nargs="+", default=[512, 1024, 2048, 4096], metavar="N")
    parser.add_argument("--vocabulary", type=count, nargs="+", default=[16000, 32000, 64000, 128000], metavar="V")
    parser.add_argument("--hidden", type=count, default=256, help="width H of the head (default: 256)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="image to write (default: a new one under --out)")


def run(options: argparse.Namespace) -> int:
    axes = _Axes(options.rows, options.vocabulary, options.hidden)
    if partial := [n for n in axes.rows if n % (2 * axes.tokens)]:
        raise ValueError(
            f"--rows must be multiples of {2 * axes.tokens}, pairs of {axes.tokens} tokens each, got {partial[0]}"
        )
    bench = open_bench(options)
    report = Report(bench, "growth", GrowthRow)
    rows: list[GrowthRow] = []
    before = torch.get_num_threads()
    try:
        for size in axes.sizes(bench.settings.threads):
            print(f"N {size.rows}, V {size.vocabulary}, {size.threads} threads", flush=True)
            measured = list(_measure(size, axes, bench.settings))
            report.add(measured)
            rows += measured
    finally:
        torch.set_num_threads(before)
    report.write_page("How cost grows", _markdown(rows, axes.hidden))
    image = options.save or report.path.with_suffix(".png")
    plot(rows, image)
    print(image)
    return report.exit_status()


def _measure(size: Size, axes: _Axes, settings: Settings) -> Iterator[GrowthRow]:
    torch.set_num_threads(size.threads)
    settings = replace(settings, threads=size.threads)
    runner = CaseRunner(Case((size.rows, size.vocabulary), torch.float32), settings, _ROW_PROVIDERS)
    for row in runner.run(_WORKLOAD):
        yield _row(size, "token_kl", row)
    del runner
    head_size = head.Size(size.rows // (2 * axes.tokens), axes.tokens, axes.hidden, size.vocabulary)
    for what, loss in _LOSSES.items():
        for head_row in head.LossRunner(head_size, "float32", loss, settings, _HEAD_PROVIDERS).run("fwd_bwd"):
            yield _row(size, what, head_row)


def _row(size: Size, what: str, row: Row) -> GrowthRow:
    time = row.timing if row.status == "ok" else None
    return GrowthRow(
        axis=size.axis,
        what=what,
        provider=row.provider,
        rows=size.rows,
        vocabulary=size.vocabulary,
        threads=size.threads,
        status=row.status,
        wall_ms=None if time is None else time.wall_ms,
        wall_p20_ms=None if time is None else time.wall_p20_ms,
        wall_p80_ms=None if time is None else time.wall_p80_ms,
        extra_mib=None if row.memory is None else row.memory.extra_mib,
    )


Line = tuple[str, str]  # what, provider
Value = Callable[[GrowthRow], float | None]


def _time(row: GrowthRow) -> float | None:
    return row.wall_ms


def _memory(row: GrowthRow) -> float | None:
    return row.extra_mib


def _lines(rows: list[GrowthRow], axis: str, value: Value) -> dict[Line, list[tuple[int, float]]]:
    """(position, value) of each line along an axis, where measured."""
    lines: dict[Line, list[tuple[int, float]]] = {}
    for row in rows:
        number = value(row)
        if row.axis == axis and number is not None:
            lines.setdefault((row.what, row.provider), []).append((row.position, number))
    return lines


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log value over log position; None for fewer than two positions or a value that is not positive."""
    if len({position for position, _ in points}) < 2 or min(value for _, value in points) <= 0:
        return None
    return statistics.linear_regression([log(x) for x, _ in points], [log(y) for _, y in points]).slope


def _markdown(rows: list[GrowthRow], hidden: int) -> str:
    time = {axis: _lines(rows, axis, _time) for axis in _AXES}
    memory = {axis: _lines(rows, axis, _memory) for axis in ("rows", "vocabulary")}

    def slope(points: list[tuple[int, float]] | None) -> str:
        value = exponent(points) if points else None
        return "" if value is None else f"{value:.2f}"

    def ends(points: list[tuple[int, float]] | None) -> str:
        return f"{points[0][1]:.0f} to {points[-1][1]:.0f}" if points else ""

    cells = [
        [
            ": ".join(line),
            slope(time["rows"].get(line)),
            slope(time["vocabulary"].get(line)),
            slope(time["threads"].get(line)),
            ends(memory["rows"].get(line)),
            ends(memory["vocabulary"].get(line)),
        ]
        for line in time["rows"]
    ]
    header = ["line", "time by N", "by V", "by threads", "peak MiB over N", "over V"]
    spans = [f"{axis} {min(found)} to {max(found)}" for axis in _AXES if (found := _positions(rows, axis))]
    return (
        f"float32, forward and backward, head with H = {hidden}; {', '.join(spans)}. Exponents: 1 is linear, -1 in "
        f"threads perfect scaling.\n\n{markdown_table(header, cells, 1)}"
    )


def _positions(rows: list[GrowthRow], axis: str) -> list[int]:
    return [row.position for row in rows if row.axis == axis]


def plot(rows: list[GrowthRow], path: Path) -> None:
    """Draw time over each axis, and memory over rows and vocabulary. Dotted lines are in place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    colours = {"eager": "#d1495b", "recompute": "#6a994e"}
    panels: list[tuple[str, Value, str]] = [(axis, _time, "ms") for axis in _AXES]
    panels += [(axis, _memory, "peak MiB beyond inputs") for axis in ("rows", "vocabulary")]
    size = (3.4 * len(panels), 3.2 * len(_WHAT))
    figure, axes = plt.subplots(len(_WHAT), len(panels), figsize=size, layout="constrained", squeeze=False)
    for what, panel_row in zip(_WHAT, axes, strict=True):
        for (axis, value, label), panel in zip(panels, panel_row, strict=True):
            for (line_of, provider), points in _lines(rows, axis, value).items():
                if line_of == what:
                    positions, values = zip(*points, strict=True)
                    style = ":" if provider == "ours_inplace" else "-"
                    colour = colours.get(provider, "#00798c")
                    panel.plot(positions, values, style, marker="o", markersize=4, color=colour, label=provider)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log" if value is _time else "linear")
            panel.set_xticks(sorted(set(_positions(rows, axis))))
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlabel(_AXES[axis])
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0 if value is _memory else None)
            panel.grid(alpha=0.3)
        panel_row[0].set_title(f"{what}, forward and backward", loc="left", fontsize=10, fontweight="bold")
        panel_row[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
