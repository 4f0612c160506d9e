"""The project's speed bars: what must hold on the machine at hand, measured over several runs."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks import report
from benchmarks.ops import Case, Workload
from benchmarks.providers import PROVIDERS
from benchmarks.report import Row
from benchmarks.run import CaseRunner, Settings, denormal_ratio, failures_of_ours

_LOGPS_FWD, _LOGPS_FWD_BWD = Workload("token_logps", "fwd"), Workload("token_logps", "fwd_bwd")
_KL_FWD = Workload("token_kl", "fwd")
_KL_LOSS = Workload("kl_loss", "fwd_bwd")
_F32, _BF16 = torch.float32, torch.bfloat16

_CASES = (
    Case((4096, 32000), _F32),
    Case((1024, 151936), _F32),
    Case((4096, 32000), _BF16),
    Case((2048, 151936), _BF16),
)

# (op and pass, ours, peer in the same dtype, smallest ratio by dtype)
_RATIOS = (
    (_LOGPS_FWD, "ours", "eager", {_F32: 8.0, _BF16: 8.0}),
    (_LOGPS_FWD, "ours", "compile", {_F32: 3.3, _BF16: 3.8}),
    (_LOGPS_FWD, "ours_avx2", "eager", {_F32: 5.0, _BF16: 5.0}),
    (_LOGPS_FWD_BWD, "ours_inplace", "eager", {_F32: 15.0, _BF16: 15.0}),
    (_LOGPS_FWD_BWD, "ours_inplace", "compile", {_F32: 12.0, _BF16: 9.0}),
    (_KL_FWD, "ours", "eager", {_F32: 17.0, _BF16: 15.0}),
    (_KL_FWD, "ours", "compile", {_F32: 4.6, _BF16: 4.5}),
    (_KL_LOSS, "ours_inplace", "eager", {_F32: 24.0}),
    (_KL_LOSS, "ours_inplace", "compile", {_F32: 7.0}),
)
# (op and pass, ours, smallest share of the measured limit by dtype)
_SHARES = ((_LOGPS_FWD, "ours", {_F32: 0.85, _BF16: 0.75}),)
# (op and pass, ours, most extra memory in logits-sized tensors): per-row values alone
_MEMORY = ((_LOGPS_FWD_BWD, "ours_inplace", 0.01),)
# (op and pass, ours, most time on denormal-heavy rows over time on normal ones)
_DENORMAL = (
    (_LOGPS_FWD, "ours", 1.3),
    (_LOGPS_FWD_BWD, "ours_inplace", 1.3),
    (_KL_FWD, "ours", 1.3),
)


@dataclass(frozen=True)
class Bar:
    title: str
    case: Case
    needed: float
    at_least: bool

    def verdict(self, values: list[float]) -> str:
        if not values:
            return "not measured"
        median = statistics.median(values)
        held = median >= self.needed if self.at_least else median <= self.needed
        margin = median / self.needed - 1
        return f"{'pass' if held else 'MISS'} ({margin:+.0%})"


def _measured(case: Case, rows: Mapping[tuple[Workload, str], Row], clock: str) -> Iterator[tuple[Bar, float | None]]:
    """Every bar that rows of one run of a case decide, and its value; None where something was not timed."""
    over = "over_ours" if clock == "wall" else "over_ours_cpu"
    for workload, ours, peer, needed in _RATIOS:
        if case.dtype not in needed:
            continue
        # over_ours relates everyone to ours of the same round, so it relates any two of them
        times = [getattr(rows.get((workload, name)), over, None) for name in (peer, ours)]
        value = times[0] / times[1] if times[0] and times[1] else None
        yield Bar(f"{workload}: {ours} over {peer}", case, needed[case.dtype], at_least=True), value
    for workload, ours, shares in _SHARES:
        share = getattr(rows.get((workload, ours)), "limit_share", None)
        yield Bar(f"{workload}: {ours}, share of read bandwidth", case, shares[case.dtype], at_least=True), share
    for workload, ours, most in _MEMORY:
        extra = getattr(rows.get((workload, ours)), "extra_mib", None)
        tensor_mib = torch.Size(case.shape).numel() * case.dtype.itemsize / (1 << 20)
        value = None if extra is None else extra / tensor_mib
        yield Bar(f"{workload}: {ours}, extra memory in [N, V] tensors", case, most, at_least=False), value


def run_bars(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    allowed = options.providers or PROVIDERS
    needed = ("ours", "ours_inplace", "ours_avx2", "eager", "compile")
    providers = [name for name in needed if name in allowed]
    cases = [Case(shape, dtype) for dtype in (_F32, _BF16) for shape in options.shapes] if options.shapes else _CASES
    writer = report.CsvWriter(report.output_path(options.out, "bars"), Row, environment)
    values: dict[Bar, list[float]] = {}
    all_rows: list[Row] = []
    for run in range(options.runs):
        for case in cases:
            print(f"run {run + 1} of {options.runs}: {case}", flush=True)
            rows = _run_case(case, settings, providers, run)
            writer.write(rows.values())
            all_rows += rows.values()
            for bar, value in _measured(case, rows, options.clock):
                values.setdefault(bar, []).extend([] if value is None else [value])
            for workload, ours, most in _DENORMAL:
                if ours in providers:
                    bar = Bar(f"{workload}: {ours}, randn x 40 over randn", case, most, at_least=False)
                    wall, cpu = denormal_ratio(workload, ours, case, settings)
                    values.setdefault(bar, []).append(wall if options.clock == "wall" else cpu)
    wrong = failures_of_ours(all_rows)
    notes = {f"{row.provider}: {row.status}" for row in all_rows if row.status != "ok"}
    text = f"**Bars.** {report.machine_line(environment)}\n\n{_markdown(values, options, all_rows)}"
    writer.path.with_suffix(".md").write_text(text + "\n")
    print("", text, *sorted(notes), "", writer.path, writer.path.with_suffix(".md"), sep="\n")
    return 1 if wrong else 0


def _run_case(case: Case, settings: Settings, providers: list[str], run: int) -> dict[tuple[Workload, str], Row]:
    runner = CaseRunner(case, settings, providers)
    barred = [workload for workload, _, _, needed in _RATIOS if case.dtype in needed]
    workloads = dict.fromkeys([*barred, *(workload for workload, *_ in (*_SHARES, *_MEMORY))])
    return {(workload, row.provider): row for workload in workloads for row in runner.run(workload, run)}


def _markdown(values: Mapping[Bar, list[float]], options: argparse.Namespace, rows: list[Row]) -> str:
    lines = []
    for bar, measured in values.items():
        sign = "≥" if bar.at_least else "≤"
        spread = f"{min(measured):.3g}-{max(measured):.3g}" if measured else ""
        median = f"{statistics.median(measured):.3g}" if measured else ""
        lines.append([bar.title, str(bar.case), f"{sign} {bar.needed:g}", median, spread, bar.verdict(measured)])
    held = sum("pass" in line[-1] for line in lines)
    limits = {(row.read_gb_per_s or 0, row.limit_source) for row in rows if row.limit_source}
    best = max(limits, default=(0.0, "not measured"))
    return (
        report.markdown_table(["bar", "case", "needed", "median", "runs", "result"], lines, 2)
        + f"\n\n{held} of {len(lines)} bars hold; medians of {options.runs} runs, {options.clock} time. "
        + f"Read limit up to {best[0]:.1f} GB/s ({best[1]})."
    )
