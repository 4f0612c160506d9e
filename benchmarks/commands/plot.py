"""``plot``: draws speed-ups and bandwidth shares of ops CSVs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands.table import (
    DTYPE_LABELS,
    PASS_LABELS,
    PROVIDER_LABELS,
    Summary,
    add_files,
    digits,
    measured,
    summarize,
)
from benchmarks.harness.results import Record, output_path

HELP = "draw speed-ups and bandwidth shares of ops CSVs"

COLOURS = {
    "ours": "#1b6ca8",
    "ours_inplace": "#0b3c5d",
    "eager": "#c8553d",
    "eager_float": "#e8a598",
    "eager_lse": "#9c6644",
    "compile": "#e09f3e",
    "compile_float": "#f3d7a2",
    "cross_entropy": "#7a9e7e",
    "trl": "#8367c7",
    "liger": "#5b5b5b",
    "quack": "#a8a8a8",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--save", type=Path, metavar="FILE", help="image to write (default: a new one under --out)")


def run(options: argparse.Namespace) -> int:
    records, _ = measured(options.files, options.out)
    target = options.save or output_path(options.out, "plot", ".png")
    draw(records, target)
    print(target)
    return 0


def draw(records: Sequence[Record], path: Path) -> None:
    """Two panels a pass: how many times longer each peer takes, and everyone's share of the bandwidth limit.

    Forward and backward is drawn for the variant in place, which a trainer uses to save memory. The CSV holds the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    # Cases too small for a share of the bandwidth are in the tables alone.
    summaries = [s for s in summarize(records) if float(s.scale) == 1 and "limit_share" in s.values]
    panels = []
    for pass_name, ours in (("fwd", "ours"), ("fwd_bwd", "ours_inplace")):
        cases: dict[tuple[str, ...], dict[str, Summary]] = {}
        for summary in summaries:
            if summary.pass_name == pass_name and summary.provider in COLOURS:
                cases.setdefault(summary.case, {})[summary.provider] = summary
        cases = {case: found for case, found in cases.items() if ours in found}
        if cases:
            panels.append((PASS_LABELS[pass_name], ours, cases))
    if not panels:
        raise ValueError("nothing to plot: ours was not measured at a size that has a share of the bandwidth")
    heights = [sum(len(found) + 1 for found in cases.values()) for _, _, cases in panels]
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(12, 1.6 + 0.17 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": (3, 2)},
    )
    for (title, ours, cases), (left, right) in zip(panels, axes, strict=True):
        _bars(left, cases, f"over_{ours}", baseline=ours)
        left.set_xscale("log")
        left.axvline(1, color="#222222", linewidth=1)
        variant = " in place" if ours == "ours_inplace" else ""
        left.set_title(f"{title}: peer's time ÷ ours{variant}", loc="left", fontsize=10, fontweight="bold")
        _ticks_as_multiples(left)
        _bars(right, cases, "limit_share")
        right.set_xlim(0, 1.12)
        right.axvline(1, color="#222222", linewidth=1)
        right.set_yticklabels([])
        right.set_title("Share of the bandwidth limit", loc="left", fontsize=10, fontweight="bold")
    names = [name for name in COLOURS if any(name in found for _, _, cases in panels for found in cases.values())]
    handles = [Patch(color=COLOURS[name]) for name in names]
    labels = [PROVIDER_LABELS[name].replace("`", "") for name in names]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    env = records[0]
    caption = f"{env['env_cpu']}, {env['env_threads']} threads, torch {env['env_torch']}, commit {env['env_commit']}"
    figure.supxlabel(caption, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(
    axis: Any, cases: dict[tuple[str, ...], dict[str, Summary]], column: str, baseline: str | None = None
) -> None:
    """A group of horizontal bars for each case, with a bar for each provider, labelled with its number.

    With a baseline the numbers are multiples of the baseline's time, and bars start at 1. The baseline's own label is
    its time.
    """
    position, ticks, labels = 0.0, [], []
    start = 0.0 if baseline is None else 1.0
    for (op, _, shape, dtype, _), found in cases.items():
        names = [name for name in COLOURS if name in found]
        ticks.append(position + (len(names) - 1) / 2)
        labels.append(f"{op}\n[{shape.replace('x', ', ')}] {DTYPE_LABELS.get(dtype, dtype)}")
        for name in names:
            number = found[name].values[column]
            if name == baseline:
                text = f"{digits(found[name].values['wall_ms'])} ms"
            else:
                axis.barh(position, number - start, left=start, height=0.86, color=COLOURS[name])
                text = f"{number:.2f}" if baseline is None else f"{number:.1f}x"
            axis.text(max(number, start), position, f" {text}", va="center", fontsize=6.5, color="#333333")
            position += 1
        position += 1
    axis.set_yticks(ticks, labels, fontsize=7.5)
    axis.set_ylim(position - 0.5, -1)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _ticks_as_multiples(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axis.xaxis.set_minor_locator(LogLocator(subs=()))
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.8), high * 1.25)
