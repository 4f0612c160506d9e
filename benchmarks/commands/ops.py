"""``ops``: every row op and provider at every case. Each measurement is a CSV row and a line on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.commands.arguments import DTYPES, add_common, count, open_bench, shape
from benchmarks.harness.results import Report
from benchmarks.peers.row_ops import DEFAULT_PROVIDERS, PROVIDERS
from benchmarks.workloads.row_case import CaseRunner, RowOpRow
from benchmarks.workloads.row_ops import DEFAULT_CASES, WORKLOADS, Case, Workload

HELP = "time every op and provider"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time ops: correctness gate, then interleaved calls. Exits with 1 if a result of ours is wrong."
    )
    parser.epilog = (
        f"Ops: {', '.join(map(str, WORKLOADS))}. Providers: {', '.join(PROVIDERS)}. "
        f"Cases when --shapes is not given: {'; '.join(map(str, DEFAULT_CASES))}."
    )
    add_common(parser)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxV", help="rows x vocabulary, each in every dtype")
    parser.add_argument(
        "--dtypes",
        choices=DTYPES,
        nargs="+",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: those of the cases; float32 and bfloat16 for --shapes)",
    )
    parser.add_argument("--ops", type=_workloads, nargs="+", metavar="OP", help="op or op.pass (default: all)")
    parser.add_argument(
        "--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="default: all at the best SIMD level"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on the logits, which are normal; with 40 most of exp() is denormal",
    )
    parser.add_argument(
        "--runs", type=count, default=1, help="how often to measure everything; the CSV has a row for each run"
    )


def _workloads(text: str) -> list[Workload]:
    found = [workload for workload in WORKLOADS if text in (workload.op, str(workload))]
    if not found:
        known = ", ".join(map(str, WORKLOADS))
        raise argparse.ArgumentTypeError(f"must be an op or op.pass of {known}, got {text!r}")
    return found


def _cases(shapes: Sequence[tuple[int, ...]] | None, dtype_names: Sequence[str] | None, scale: float) -> list[Case]:
    dtypes = [DTYPES[name] for name in dtype_names or ()]
    if shapes:
        return [Case(size, dtype, scale) for size in shapes for dtype in dtypes or [torch.float32, torch.bfloat16]]
    cases = [case._replace(scale=scale) for case in DEFAULT_CASES if not dtypes or case.dtype in dtypes]
    if not cases:
        raise ValueError(f"--dtypes {' '.join(dtype_names or ())} is in no default case: give --shapes as well")
    return cases


def run(options: argparse.Namespace) -> int:
    workloads = [workload for group in options.ops or [WORKLOADS] for workload in group]
    cases = _cases(options.shapes, options.dtypes, options.scale)
    bench = open_bench(options)
    report = Report(bench, "ops", RowOpRow)
    for index in range(options.runs):
        for case in cases:
            runner = CaseRunner(case, bench.settings, options.providers or DEFAULT_PROVIDERS)
            for workload in workloads:
                run_label = f", run {index + 1} of {options.runs}" if options.runs > 1 else ""
                print(f"\n{workload} {case}{run_label}")
                rows = runner.run(workload, index)
                report.add(rows)
                for row in rows:
                    print("  " + _line(row), flush=True)
    print(f"\n{report.path}")
    return report.exit_status()


def _line(row: RowOpRow) -> str:
    provider = f"{row.provider:<14}"
    if row.timing is None:
        return f"{provider} {row.status}"
    time = row.timing
    spread = f"{time.wall_p20_ms:.3f}-{time.wall_p80_ms:.3f}"
    parts = [f"{provider} {time.wall_ms:10.3f} ms ({spread}; CPU {time.cpu_ms:.3f})", f"{row.gb_per_s:6.1f} GB/s"]
    if row.status != "ok":
        parts.append(row.status)
    if row.limit_share is not None:
        parts.append(f"{row.limit_share:.2f} of the limit")
    if row.memory is not None:
        parts.append(f"{row.memory.extra_mib:.1f} MiB extra")
    if "ours" in row.over:
        parts.append(f"{row.over['ours']:.2f}x ours")
    if "ours_inplace" in row.over:
        parts.append(f"{row.over['ours_inplace']:.2f}x in place")
    return "; ".join(parts)
