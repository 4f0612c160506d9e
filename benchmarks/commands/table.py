"""``table``: measured results as markdown tables, on the terminal or on their pages."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.commands.arguments import add_out
from benchmarks.harness.bench import Environment, machine_line
from benchmarks.harness.results import Record, markdown_table, read_csv, replace_results

HELP = "print results as markdown tables, or update the pages of results"
RESULTS = ROOT / "benchmarks" / "results"
# Commands with a page under `RESULTS`, in the order of the tables. The tables of `ops` are made from its CSV. The other
# commands write their tables themselves, on a page. "models" is `head --models`.
KINDS = ("ops", "step", "head", "models", "growth", "levels", "bars")

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
DTYPE_LABELS = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
PASS_LABELS = {
    "fwd": "Forward",
    "fwd_bwd": "Forward + backward",
    "fwd_bwd_scaled": "Forward + backward, upstream gradient other than 1",
}
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument(
        "--update",
        type=Path,
        nargs="*",
        metavar="PAGE",
        help="put the tables between the result markers of these pages "
        "(without names: each table on its own page of benchmarks/results)",
    )


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="CSVs of ops, pages of the other commands (default: the newest of each under --out)",
    )
    add_out(parser, "folder of the newest results (default: out/benchmarks)")


def run(options: argparse.Namespace) -> int:
    blocks = _blocks(*measured(options.files, options.out))
    text = "\n\n".join(block for found in blocks.values() for block in found)
    if options.update is None:
        print(text)
        return 0
    pages = dict.fromkeys(options.update, text) or {
        RESULTS / f"{kind}.md": "\n\n".join(found) for kind, found in blocks.items()
    }
    for page, block in pages.items():
        replace_results(page, block)
        print(page)
    return 0


def measured(files: Sequence[Path], out: Path) -> tuple[list[Record], list[Path]]:
    """Rows of the CSVs of `ops`, and pages of the other commands. Without files, the newest of each under out."""
    if not files:
        patterns = [f"{kind}-*.{'csv' if kind == 'ops' else 'md'}" for kind in KINDS]
        files = [found[-1] for pattern in patterns if (found := sorted(out.glob(pattern)))]
    tables, pages = ([file for file in files if file.suffix == suffix] for suffix in (".csv", ".md"))
    records = [record for table in tables for record in read_csv(table)]
    if any("provider" not in record or "op" not in record for record in records):
        raise ValueError(
            "files must be CSVs of `python -m benchmarks ops` or pages of the other commands, got a CSV without the "
            "column op or provider"
        )
    if not any(record["status"] == "ok" for record in records):
        raise ValueError(f"no timed op in {', '.join(map(str, tables)) or out}: run `python -m benchmarks ops`")
    return records, pages


def _blocks(records: list[Record], pages: list[Path]) -> dict[str, list[str]]:
    """Blocks of markdown, by command."""
    blocks = {"ops": [ops_markdown(records)]}
    for page in pages:
        kind = page.name.split("-")[0]
        if kind not in KINDS:
            raise ValueError(f"{page.name} must begin with the command that wrote it: {', '.join(KINDS[1:])}")
        blocks.setdefault(kind, []).append(page.read_text().strip())
    return blocks


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


def summarize(records: Iterable[Record]) -> list[Summary]:
    grouped: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            key = tuple(record[name] for name in ("op", "pass_name", "shape", "dtype", "scale", "provider"))
            grouped.setdefault(key, []).append(record)
    summaries = []
    for key, group in grouped.items():
        columns = {name: [float(record[name]) for record in group if record[name]] for name in _SUMMARIZED}
        values = {name: statistics.median(numbers) for name, numbers in columns.items() if numbers}
        op, pass_name, shape, dtype, scale, provider = key
        summaries.append(Summary(op, pass_name, shape, dtype, scale, provider, values))
    return summaries


def ops_markdown(records: Sequence[Record]) -> str:
    """A table for each pass: our time, and each peer's time as a multiple of ours. The faster eager variant is bold."""
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
                label = DTYPE_LABELS.get(dtype, dtype) + ("" if float(scale) == 1 else f" x{float(scale):g}")
                cells = [f"`{op}`", shape.replace("x", " x "), label, PROVIDER_LABELS[variant]]
                rows.append([*cells, *_our_cells(found[variant].values), *_peer_cells(found, variant, peers)])
        blocks.append(f"**{title}**\n\n" + markdown_table([*header, *(PROVIDER_LABELS[p] for p in peers)], rows, 4))
    return "\n\n".join(blocks)


def _our_cells(values: dict[str, float]) -> list[str]:
    return [
        f"{digits(values['wall_ms'])} ({digits(values['wall_p20_ms'])}-{digits(values['wall_p80_ms'])})",
        f"{values['gb_per_s']:.1f}",
        f"{values['limit_share']:.2f}" if "limit_share" in values else "",
        digits(values["extra_mib"]) if "extra_mib" in values else "",
    ]


def _peer_cells(found: dict[str, Summary], variant: str, peers: Sequence[str]) -> list[str]:
    """Multiples of the variant's time. The fastest eager variant is bold."""
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


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"


def environment_line(records: Sequence[Record]) -> str:
    """The machine of one CSV's rows, and the bandwidth limits measured in its rounds."""
    values: dict[str, Any] = {field.name: records[0][f"env_{field.name}"] for field in fields(Environment)}
    env = Environment(**values)
    limits = [(float(r["read_gb_per_s"]), float(r["update_gb_per_s"])) for r in records if r.get("read_gb_per_s")]
    reached = ""
    if limits:
        read, update = (f"{min(column):.0f} to {max(column):.0f}" for column in zip(*limits, strict=True))
        reached = f" Limits measured beside: read {read} GB/s, read and write {update} GB/s."
    return machine_line(env) + reached
