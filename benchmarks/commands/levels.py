"""The SIMD levels of the CPU kernels, in every dtype, beyond the caches and within them."""

from __future__ import annotations

import argparse

from benchmarks.harness import results as report
from benchmarks.harness.case import CaseRunner, Settings, failures_of_ours
from benchmarks.harness.results import Row
from benchmarks.peers.row_ops import OPTIONAL_PROVIDERS, PROVIDERS
from benchmarks.workloads.row_ops import Case, Workload

_WORKLOADS = (
    Workload("token_logps", "fwd"),
    Workload("token_logps", "fwd_bwd"),
    Workload("token_kl", "fwd"),
    Workload("token_kl", "fwd_bwd"),
    Workload("kl_loss", "fwd_bwd"),
)
SHAPES = ((4096, 32000), (256, 32000))
DTYPES = ("float32", "bfloat16", "float16")


def run_levels(
    options: argparse.Namespace, cases: list[Case], environment: report.Environment, settings: Settings
) -> int:
    writer = report.CsvWriter(report.output_path(options.out, "levels"), Row, environment)
    names = ("ours", "ours_inplace", *OPTIONAL_PROVIDERS, "eager", "eager_float")
    rows: list[Row] = []
    lines = []
    for case in cases:
        runner = CaseRunner(case, settings, names)
        for workload in _WORKLOADS:
            print(f"{workload} {case}", flush=True)
            measured = runner.run(workload)
            writer.write(measured)
            rows += measured
            lines.append([f"`{workload}`", str(case), *_cells({row.provider: row for row in measured}, workload)])
    header = ["op and pass", "case", f"{environment.simd or 'best level'}, ms", "of limit", "AVX2", "portable", "eager"]
    text = (
        f"**SIMD levels.** {report.machine_line(environment)} Backward in place. Times of the lower levels and of the "
        f"faster eager variant as multiples.\n\n{report.markdown_table(header, lines, 2)}"
    )
    page = writer.path.with_suffix(".md")
    page.write_text(text + "\n")
    print("", text, "", writer.path, page, sep="\n")
    return 1 if failures_of_ours(rows) else 0


def _cells(rows: dict[str, Row], workload: Workload) -> list[str]:
    inplace = "" if workload.pass_name == "fwd" else "_inplace"
    times = {name: row.wall_ms for name, row in rows.items() if row.wall_ms is not None}
    best = rows[f"ours{inplace}"]
    if best.wall_ms is None:
        return [best.status, *[""] * 4]
    eager = min((times[name] for name in times if not PROVIDERS[name].inplace and "eager" in name), default=None)
    others = [times.get(f"ours_avx2{inplace}"), times.get(f"ours_portable{inplace}"), eager]
    return [
        f"{best.wall_ms:.3g} ({best.wall_p20_ms:.3g}-{best.wall_p80_ms:.3g})",
        "" if best.limit_share is None else f"{best.limit_share:.2f}",
        *("" if time is None else f"{time / best.wall_ms:.2f}x" for time in others),
    ]
