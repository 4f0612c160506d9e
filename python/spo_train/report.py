"""The report of one or more runs: win rate against steps as in Figure 1 of the paper, a table, and stories."""

from __future__ import annotations

import csv
import io
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from spo_train.files import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    RUN_FILE,
    STORIES_FILE,
    StrPath,
    read_json,
    read_jsonl,
    write_atomically,
)

FIGURE_FILE, TABLE_FILE, CSV_FILE, TEXTS_FILE = "win_rate.png", "results.md", "results.csv", "stories.md"

# Okabe and Ito's colours: readers with any colour vision tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
INK, FAINT = "#333333", "#8a8a8a"
BAND_NOTE = "Bands: 95 %, sampling error of the evaluation only (not of training seeds, data or judge)."

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One alignment run as read from its folder.

    Attributes:
        label: its name in figure and table.
        about: content of `run.json`.
        evaluations: records of `evaluations.jsonl`, in the order of their steps.
        stories: records of `stories.jsonl`: texts before and after alignment, from the same random numbers.
        step_seconds: median wall time of a training step, without evaluations.
    """

    label: str
    about: dict[str, Any]
    evaluations: list[Row]
    stories: list[dict[str, Any]]
    step_seconds: float

    @property
    def best(self) -> Row:
        """The evaluation with the highest win rate, without the one before the first step unless it is the only one."""
        return max(self.evaluations[1:] or self.evaluations, key=lambda record: record["win_rate"])

    @property
    def last(self) -> Row:
        return self.evaluations[-1]


# Columns of the table.
COLUMNS: dict[str, Callable[[Run], str]] = {
    "best win rate": lambda run: _rate(run.best),
    "at step": lambda run: str(run.best["step"]),
    "final win rate": lambda run: _rate(run.last),
    "KL at best": lambda run: f"{run.best['kl']:.1f}",
    "final KL": lambda run: f"{run.last['kl']:.1f}",
    "score": lambda run: _number(run.last, "score", 2),
    "fluency": lambda run: _number(run.last, "fluency", 3),
    "distinct-2": lambda run: _number(run.last, "distinct_2", 3),
    "unique": lambda run: f"{run.last['unique']:.0%}",
    "length": lambda run: _number(run.last, "length", 0),
    "s a step": lambda run: f"{run.step_seconds:.2f}",
}

# The columns that fit a terminal.
MAIN_COLUMNS = ("best win rate", "at step", "final win rate", "final KL", "fluency")


def label(config: dict[str, Any]) -> str:
    """Return a short name for a run, from the record of its `AlignConfig`."""
    if config["method"] == "dpo":
        return f"DPO, β = {config['beta']:g}"
    return f"SPO, α = {config['alpha']:g}, β = {config['beta']:g}"  # noqa: RUF001 (the paper's letter)


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: it holds no run.
        ValueError: the run has no evaluations, or a file is damaged.
    """
    about_file = folder / RUN_FILE
    if not about_file.is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no {RUN_FILE}")
    about = read_json(about_file)
    evaluations = read_jsonl(folder / EVALUATIONS_FILE)
    if not evaluations:
        raise ValueError(f"{folder} has no evaluations yet; align with a judge")
    seconds = [record["seconds"] for record in read_jsonl(folder / METRICS_FILE)]
    return Run(
        label(about["config"]),
        about,
        evaluations,
        read_jsonl(folder / STORIES_FILE),
        statistics.median(seconds) if seconds else math.nan,
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; the names of their folders tell runs of the same label apart."""
    runs = [read_run(folder) for folder in folders]
    labels = Counter(run.label for run in runs)
    return [
        replace(run, label=f"{run.label} ({folder.name})") if labels[run.label] > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def write_report(runs: Sequence[Run], out: StrPath, *, stories: int = 3) -> list[Path]:
    """Write figure (PNG), table (Markdown and CSV) and before-and-after stories (Markdown) of all runs to `out`.

    Returns:
        The files written.
    """
    figure, table, sheet, texts = (Path(out) / name for name in (FIGURE_FILE, TABLE_FILE, CSV_FILE, TEXTS_FILE))
    write_atomically(figure, draw_figure(runs))
    write_atomically(table, (markdown_table(runs) + "\n").encode())
    write_atomically(sheet, csv_table(runs).encode())
    if not any(run.stories for run in runs):
        return [figure, table, sheet]
    write_atomically(texts, before_and_after(runs, stories).encode())
    return [figure, table, sheet, texts]


def draw_figure(runs: Sequence[Run]) -> bytes:
    """Return a PNG: win rate against steps, with bands, and beside it KL and fluency (or the judge's score)."""
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 5.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
        main, upper, lower = (figure.add_subplot(part) for part in (grid[:, 0], grid[0, 1], grid[1, 1]))
        quality = "fluency" if all("fluency" in run.last for run in runs) else "score"
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            _curve(main, run, colour, "win_rate", run.label)
            _curve(upper, run, colour, "kl")
            _curve(lower, run, colour, quality)
        main.axhline(0.5, color=FAINT, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
        main.annotate(
            "reference: 50 %",
            (0.5, 0.5),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            color=FAINT,
        )
        lows = [record["win_rate_low"] for run in runs for record in run.evaluations]
        main.set_ylim(max(0.0, min(0.4, min(lows) - 0.03)), 1.0)
        main.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        main.set_xlabel("training step")
        figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=1.6, borderaxespad=0.6)
        _title(main, "Win rate against the reference")
        _title(upper, "KL to the reference (nats a text)")
        _title(lower, "Fluency" if quality == "fluency" else "Judge's score")
        upper.set_ylim(bottom=0)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("training step")
        for axes in (main, upper, lower):
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.margins(x=0.02)
        figure.supxlabel(_note(runs), fontsize=8, color=FAINT, x=0.01, ha="left")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160)
        plt.close(figure)
    return image.getvalue()


def markdown_table(runs: Sequence[Run], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Return a table with a row for each run and notes below it. The win rates have 95 % bands."""
    heads = ["run", *columns]
    rows = [[run.label, *(COLUMNS[column](run) for column in columns)] for run in runs]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [heads, *rows]
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    points = max(len(run.evaluations) - 1 for run in runs)
    notes = [BAND_NOTE, f"The best of {points} noisy evaluations flatters every run a little."]
    if set(columns) == set(COLUMNS):
        notes.append("Score, fluency, distinct-2, unique and length are of the last evaluation; KL is in nats a text.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes)


def csv_table(runs: Sequence[Run]) -> str:
    """Return a line for every evaluation of every run, with all metrics."""
    keys = list(dict.fromkeys(key for run in runs for record in run.evaluations for key in record))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *keys])
    for run in runs:
        for record in run.evaluations:
            writer.writerow([run.label, *(record.get(key, "") for key in keys)])
    return out.getvalue()


def before_and_after(runs: Sequence[Run], count: int) -> str:
    """Return the first `count` stories of the reference, each with every run's story from the same random numbers."""
    parts = [
        "# Before and after\n",
        "These are the first texts sampled; none was chosen. Each group shares its random numbers.\n",
    ]
    told = [run for run in runs if run.stories]
    for i in range(min(count, *(len(run.stories) for run in told))):
        parts.append(f"## {i + 1}\n")
        parts.append(_story("reference", told[0].stories[i]["before"]))
        parts += [_story(run.label, run.stories[i]["after"]) for run in told]
    return "\n".join(parts)


def _story(name: str, story: dict[str, Any]) -> str:
    quoted = "\n".join(
        textwrap.fill(line, 110, initial_indent="> ", subsequent_indent="> ") or ">"
        for line in story["text"].split("\n")
    )
    return f"**{name}** (score {story['features']['score']:.1f})\n\n{quoted}\n"


def _curve(axes: Axes, run: Run, colour: str, metric: str, name: str | None = None) -> None:
    steps = [record["step"] for record in run.evaluations]
    values = [record[metric] for record in run.evaluations]
    axes.plot(steps, values, color=colour, label=name, linewidth=2, marker="o", markersize=4, zorder=3)
    if metric == "win_rate":
        low, high = ([record[f"win_rate_{end}"] for record in run.evaluations] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _note(runs: Sequence[Run]) -> str:
    evaluate = runs[0].about.get("evaluate") or {}
    counts = (
        f"{evaluate['samples']} texts a point against {evaluate['reference_samples']} of the reference. "
        if evaluate
        else ""
    )
    return counts + BAND_NOTE


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _rate(record: Row) -> str:
    return f"{record['win_rate']:.1%} ({100 * record['win_rate_low']:.1f} to {100 * record['win_rate_high']:.1f})"


def _number(record: Row, key: str, decimals: int) -> str:
    return f"{record[key]:.{decimals}f}" if key in record else ""
