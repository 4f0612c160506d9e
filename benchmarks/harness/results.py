"""What comes out: rows of a CSV with the machine they were measured on, markdown tables, a plot."""

from __future__ import annotations

import csv
import platform
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

RESULTS_BEGIN, RESULTS_END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass
class Row:
    """One provider at one op, pass and case in one run; empty cells were not measured. Times are of a call."""

    run: int
    op: str
    pass_name: str
    shape: str
    dtype: str
    scale: float
    cache: str  # warm: inputs read just before the call; cold: larger than the last-level cache
    provider: str
    status: str = ""  # ok, or why it was not timed
    rounds: int | None = None
    wall_ms: float | None = None
    wall_p20_ms: float | None = None
    wall_p80_ms: float | None = None
    cpu_ms: float | None = None  # CPU time of the process, all threads
    cpu_p20_ms: float | None = None
    cpu_p80_ms: float | None = None
    model_mb: float | None = None  # the byte model: the least the op must move
    gb_per_s: float | None = None  # of the byte model
    limit_share: float | None = None  # time the byte model takes at the limits of the same round, over the call's
    read_gb_per_s: float | None = None  # measured limit of read-only loops, median over rounds
    update_gb_per_s: float | None = None  # and of read-and-write loops
    limit_source: str = ""
    extra_mib: float | None = None  # peak of torch's allocations beyond the inputs
    extra_resident_mib: float | None = None  # the same from the process's resident pages
    error_out: float | None = None
    error_grad: float | None = None
    over_ours: float | None = None  # median ratio to ours of the same round
    over_ours_cpu: float | None = None
    over_ours_inplace: float | None = None
    over_ours_inplace_cpu: float | None = None


@dataclass(frozen=True)
class Environment:
    """What the numbers belong to; the last columns of every row."""

    date: str
    commit: str
    command: str
    device: str
    cpu: str
    threads: int
    backend: str
    simd: str
    python: str
    torch: str
    spo_kernels: str
    system: str


def environment(arguments: Sequence[str], device: torch.device, simd: str) -> Environment:
    from spo_kernels import __version__, backends

    # Where results went says nothing about them, and pages are for others to read.
    said = [now for before, now in pairwise(["", *arguments]) if "--out" not in (before, now.partition("=")[0])]

    return Environment(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        command=shlex.join(["python", "-m", "benchmarks", *said]),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        backend=backends.active(device),
        simd=simd,
        python=platform.python_version(),
        torch=metadata.version("torch"),
        spo_kernels=__version__,
        system=f"{platform.system()} {platform.machine()}",
    )


def _commit() -> str:
    """Short hash of the source tree, with ``-dirty`` where tracked files differ from it; ``unknown`` outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class CsvWriter:
    """Appends rows as they come, so that an interrupted run keeps what it measured."""

    def __init__(self, path: Path, row_type: type, environment: Environment) -> None:
        self.path = path
        self._environment = {f"env_{name}": value for name, value in asdict(environment).items()}
        self._columns = [*(field.name for field in fields(row_type)), *self._environment]
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self._columns)

    def write(self, rows: Iterable[Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            for row in rows:
                writer.writerow({key: _cell(value) for key, value in (asdict(row) | self._environment).items()})


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def output_path(folder: Path, kind: str, suffix: str = ".csv") -> Path:
    """A new file of a kind (ops, step, bars, plot); names sort by time."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{kind}-{datetime.now(timezone.utc).strftime('%Y%m%d-%H%M%S')}{suffix}"


Record = dict[str, str]


def read_csv(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Summary:
    """Medians over the runs of one provider at one op, pass and case."""

    op: str
    pass_name: str
    shape: str
    dtype: str
    scale: str
    provider: str
    values: dict[str, float]  # numeric columns that were measured

    @property
    def case(self) -> tuple[str, ...]:
        return self.op, self.pass_name, self.shape, self.dtype, self.scale


_SUMMARIZED = (
    "wall_ms",
    "wall_p20_ms",
    "wall_p80_ms",
    "gb_per_s",
    "limit_share",
    "extra_mib",
    "over_ours",
    "over_ours_inplace",
)


def summarize(records: Iterable[Record]) -> list[Summary]:
    grouped: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            key = tuple(record[name] for name in ("op", "pass_name", "shape", "dtype", "scale", "provider"))
            grouped.setdefault(key, []).append(record)
    summaries = []
    for key, group in grouped.items():
        measured = {name: [float(record[name]) for record in group if record[name]] for name in _SUMMARIZED}
        values = {name: statistics.median(numbers) for name, numbers in measured.items() if numbers}
        op, pass_name, shape, dtype, scale, provider = key
        summaries.append(Summary(op, pass_name, shape, dtype, scale, provider, values))
    return summaries


PROVIDER_LABELS = {
    "ours": "ours",
    "ours_inplace": "ours, in place",
    "ours_avx2": "ours, AVX2",
    "ours_avx2_inplace": "ours, AVX2, in place",
    "ours_portable": "ours, portable",
    "ours_portable_inplace": "ours, portable, in place",
    "eager": "eager",
    "eager_float": "eager `.float()`",
    "eager_lse": "eager logsumexp",
    "compile": "compile",
    "compile_float": "compile `.float()`",
    "cross_entropy": "cross_entropy",
    "trl": "TRL",
    "liger": "Liger",
    "quack": "quack",
}
_DTYPE_LABELS = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
PASS_LABELS = {
    "fwd": "Forward",
    "fwd_bwd": "Forward + backward",
    "fwd_bwd_scaled": "Forward + backward, upstream gradient other than 1",
}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on are right-aligned."""
    ruler = ["---" if index < numbers_from else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def ops_markdown(records: Sequence[Record]) -> str:
    """One table a pass: our time, and each peer's as a multiple of it; the faster eager variant is bold."""
    summaries = summarize(records)
    by_case: dict[tuple[str, ...], dict[str, Summary]] = {}
    for summary in summaries:
        by_case.setdefault(summary.case, {})[summary.provider] = summary
    by_run: dict[str, list[Record]] = {}
    for record in records:
        by_run.setdefault(record["env_date"] + record["env_command"], []).append(record)
    blocks = [environment_line(group) for group in by_run.values()]
    for pass_name, title in PASS_LABELS.items():
        cases = {case: found for case, found in by_case.items() if case[1] == pass_name}
        measured = {provider for found in cases.values() for provider in found}
        ours = [name for name in measured if name.startswith("ours")]
        peers = [name for name in PROVIDER_LABELS if name in measured and name not in ours]
        if not ours:
            continue
        header = ["op", "shape", "dtype", "variant", "ms (p20-p80)", "GB/s", "of limit", "extra MiB"]
        rows = []
        for (op, _, shape, dtype, scale), found in cases.items():
            for variant in (name for name in PROVIDER_LABELS if name in found and name in ours):
                label = _DTYPE_LABELS.get(dtype, dtype) + ("" if float(scale) == 1 else f" x{float(scale):g}")
                cells = [f"`{op}`", shape.replace("x", " x "), label, PROVIDER_LABELS[variant]]
                rows.append([*cells, *_our_cells(found[variant].values), *_peer_cells(found, variant, peers)])
        blocks.append(f"**{title}**\n\n" + markdown_table([*header, *(PROVIDER_LABELS[p] for p in peers)], rows, 4))
    return "\n\n".join(blocks)


def _our_cells(values: dict[str, float]) -> list[str]:
    return [
        f"{_digits(values['wall_ms'])} ({_digits(values['wall_p20_ms'])}-{_digits(values['wall_p80_ms'])})",
        f"{values['gb_per_s']:.1f}",
        f"{values['limit_share']:.2f}" if "limit_share" in values else "",
        _digits(values["extra_mib"]) if "extra_mib" in values else "",
    ]


def _peer_cells(found: dict[str, Summary], variant: str, peers: Sequence[str]) -> list[str]:
    """Multiples of the variant's time. Of the eager variants the fastest, the headline, is bold."""
    times = {name: found[name].values["wall_ms"] for name in peers if name in found}
    eager = [name for name in times if name.startswith("eager")]
    headline = min(eager, key=times.__getitem__) if eager else None
    column = f"over_{variant}"
    cells = []
    for name in peers:
        if name not in times:
            cells.append("")
            continue
        ratio = found[name].values.get(column, times[name] / found[variant].values["wall_ms"])
        cells.append(f"**{ratio:.1f}x**" if name == headline else f"{ratio:.1f}x")
    return cells


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"


def environment_line(records: Sequence[Record]) -> str:
    """Where the rows of one CSV come from, with the bandwidths that were the limits."""
    values: dict[str, Any] = {field.name: records[0][f"env_{field.name}"] for field in fields(Environment)}
    env = Environment(**values)
    limits = [(float(r["read_gb_per_s"]), float(r["update_gb_per_s"])) for r in records if r.get("read_gb_per_s")]
    reached = ""
    if limits:
        read, update = (f"{min(column):.0f} to {max(column):.0f}" for column in zip(*limits, strict=True))
        reached = f" Limits measured beside: read {read} GB/s, read and write {update} GB/s."
    return machine_line(env) + reached


def machine_line(env: Environment) -> str:
    device = env.cpu if env.device == "cpu" else f"{env.device} ({env.cpu})"
    simd = f", SIMD level {env.simd}" if env.simd else ""
    return (
        f"{device}, {env.threads} threads, backend `{env.backend}`{simd}; torch {env.torch}, Python {env.python}; "
        f"commit `{env.commit}`, {env.date[:10]}; `{env.command}`."
    )


def replace_results(page: Path, block: str) -> None:
    """Put a block between the result markers of a markdown page; ValueError where the page has none."""
    text = page.read_text()
    before, begin, rest = text.partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ValueError(f"{page} must hold {RESULTS_BEGIN} and, after it, {RESULTS_END}")
    page.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}")


_COLOURS = {
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


def plot(records: Sequence[Record], path: Path) -> None:
    """Two panels a pass: how many times longer each peer takes, and everyone's share of the bandwidth limit.

    Forward and backward is shown in place: what a trainer that wants the memory gets. Everything else is in the CSV.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    # Cases too small for a share of the bandwidth are for the tables.
    summaries = [s for s in summarize(records) if float(s.scale) == 1 and "limit_share" in s.values]
    panels = []
    for pass_name, ours in (("fwd", "ours"), ("fwd_bwd", "ours_inplace")):
        cases: dict[tuple[str, ...], dict[str, Summary]] = {}
        for summary in summaries:
            if summary.pass_name == pass_name and summary.provider in _COLOURS:
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
    names = [name for name in _COLOURS if any(name in found for _, _, cases in panels for found in cases.values())]
    handles = [Patch(color=_COLOURS[name]) for name in names]
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
    """A group of horizontal bars a case, a bar a provider, labelled with its number.

    With a baseline the numbers are multiples of its time, bars start at 1, and in its place stands its time.
    """
    position, ticks, labels = 0.0, [], []
    start = 0.0 if baseline is None else 1.0
    for (op, _, shape, dtype, _), found in cases.items():
        names = [name for name in _COLOURS if name in found]
        ticks.append(position + (len(names) - 1) / 2)
        labels.append(f"{op}\n[{shape.replace('x', ', ')}] {_DTYPE_LABELS.get(dtype, dtype)}")
        for name in names:
            number = found[name].values[column]
            if name == baseline:
                text = f"{_digits(found[name].values['wall_ms'])} ms"
            else:
                axis.barh(position, number - start, left=start, height=0.86, color=_COLOURS[name])
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
