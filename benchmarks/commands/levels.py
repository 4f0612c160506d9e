"""``levels``: the SIMD levels of the CPU kernels, in every dtype, beyond the caches and within them."""

from __future__ import annotations

import argparse

from benchmarks.commands.arguments import DTYPES, add_common, open_bench, shape
from benchmarks.harness.results import Report, markdown_table
from benchmarks.peers.row_ops import OPTIONAL_PROVIDERS, PROVIDERS
from benchmarks.workloads.row_case import CaseRunner, RowOpRow
from benchmarks.workloads.row_ops import REPRESENTATIVE_WORKLOADS, Case, Workload

HELP = "compare the SIMD levels of the CPU kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Every SIMD level that this CPU has, in every dtype, beyond the caches and within them."
    add_common(parser)
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 32000), (256, 32000)], metavar="NxV")
    parser.add_argument(
        "--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16", "float16"], metavar="DTYPE"
    )


def run(options: argparse.Namespace) -> int:
    bench = open_bench(options)
    report = Report(bench, "levels", RowOpRow)
    names = ("ours", "ours_inplace", *OPTIONAL_PROVIDERS, "eager", "eager_float")
    lines = []
    for case in [Case(size, DTYPES[name]) for size in options.shapes for name in options.dtypes]:
        runner = CaseRunner(case, bench.settings, names)
        for workload in REPRESENTATIVE_WORKLOADS:
            print(f"{workload} {case}", flush=True)
            rows = runner.run(workload)
            report.add(rows)
            lines.append([f"`{workload}`", str(case), *_cells({row.provider: row for row in rows}, workload)])
    level = bench.environment.simd or "best level"
    header = ["op and pass", "case", f"{level}, ms", "of limit", "AVX2", "portable", "eager"]
    report.write_page(
        "SIMD levels",
        "Passes with a backward are in place. The lower levels and the faster eager variant are multiples of the best "
        "level's time.\n\n" + markdown_table(header, lines, 2),
    )
    return report.exit_status()


def _cells(rows: dict[str, RowOpRow], workload: Workload) -> list[str]:
    inplace = "" if workload.pass_name == "fwd" else "_inplace"
    times = {name: row.timing.wall_ms for name, row in rows.items() if row.timing is not None and row.status == "ok"}
    best = rows[f"ours{inplace}"]
    if best.timing is None:
        return [best.status, *[""] * 4]
    eager = min((times[name] for name in times if not PROVIDERS[name].inplace and "eager" in name), default=None)
    others = [times.get(f"ours_avx2{inplace}"), times.get(f"ours_portable{inplace}"), eager]
    return [
        best.timing.with_spread(".3g"),
        "" if best.limit_share is None else f"{best.limit_share:.2f}",
        *("" if time is None else f"{time / best.timing.wall_ms:.2f}x" for time in others),
    ]
