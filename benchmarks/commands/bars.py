"""The project's speed bars: what must hold on the machine at hand, measured over several runs.

Three groups: the row ops, the head, and what a call costs beside the ops that it calls.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import spo_kernels
from benchmarks.harness import measure
from benchmarks.harness import results as report
from benchmarks.harness.case import CaseRunner, Settings, denormal_ratio, failures_of_ours
from benchmarks.harness.results import Row
from benchmarks.peers.row_ops import PROVIDERS
from benchmarks.workloads import head
from benchmarks.workloads.row_ops import Case, Workload

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
# Of the head's pair loss, forward and backward: (provider, dtype) -> (most time over eager's, most MiB beside
# inputs and gradients, whether a float32 sum of the weight's gradient may come on top).
_HEAD = {
    ("recompute_free", "float32"): (0.85, 64.0, True),  # one tile as wide as the vocabulary
    ("recompute", "float32"): (1.05, 64.0, False),
    ("recompute_free", "bfloat16"): (0.27, 64.0, True),
    ("recompute", "bfloat16"): (0.30, 96.0, False),
}
_HEAD_PEAK_SHARE = 0.86
_CALL_SHAPE = (4, 64)
_CALL_MICROSECONDS = 30.0
GROUPS = ("ops", "head", "calls")


@dataclass(frozen=True)
class Bar:
    title: str
    case: str
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
    suffix = "" if clock == "wall" else "_cpu"
    for workload, ours, peer, needed in _RATIOS:
        if case.dtype not in needed:
            continue
        # Of other levels there is no median of ratios within a round, only that of each to ours at the best level.
        base = ours if ours in ("ours", "ours_inplace") else "ours"
        times = [getattr(rows.get((workload, name)), f"over_{base}{suffix}", None) for name in (peer, ours)]
        value = times[0] / times[1] if times[0] and times[1] else None
        yield Bar(f"{workload}: {peer}'s time / {ours}", str(case), needed[case.dtype], at_least=True), value
    for workload, ours, shares in _SHARES:
        share = getattr(rows.get((workload, ours)), "limit_share", None)
        yield Bar(f"{workload}: {ours}, share of read bandwidth", str(case), shares[case.dtype], at_least=True), share
    for workload, ours, most in _MEMORY:
        extra = getattr(rows.get((workload, ours)), "extra_mib", None)
        tensor_mib = torch.Size(case.shape).numel() * case.dtype.itemsize / (1 << 20)
        value = None if extra is None else extra / tensor_mib
        yield Bar(f"{workload}: {ours}, extra memory in [N, V] tensors", str(case), most, at_least=False), value


def run_bars(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    measurements = {"ops": _OpBars, "head": _HeadBars, "calls": _CallBars}
    groups = [measurements[name](options, environment, settings) for name in options.groups]
    for run in range(options.runs):
        for group in groups:
            group.run(run)
    bars = [(bar, values) for group in groups for bar, values in group.values.items()]
    notes = [note for group in groups for note in group.notes()]
    page = report.output_path(options.out, "bars", ".md")
    text = f"**Bars.** {report.machine_line(environment)}\n\n{_markdown(bars, options, notes)}"
    page.write_text(text + "\n")
    problems = sorted({problem for group in groups for problem in group.problems})
    print("", text, *problems, "", page, sep="\n")
    return 1 if any(group.wrong for group in groups) else 0


class _Bars:
    """Bars of one group, with a value for each run."""

    def __init__(self, options: argparse.Namespace, environment: report.Environment, settings: Settings) -> None:
        self._options = options
        self._environment = environment
        self._settings = settings
        self.values: dict[Bar, list[float]] = {}
        self.problems: set[str] = set()  # of anyone; why something was not timed
        self.wrong = False  # a result of ours

    def run(self, run: int) -> None:
        raise NotImplementedError

    def notes(self) -> list[str]:
        return []

    def _add(self, bar: Bar, value: float | None) -> None:
        self.values.setdefault(bar, []).extend([] if value is None else [value])


class _OpBars(_Bars):
    def __init__(self, options: argparse.Namespace, environment: report.Environment, settings: Settings) -> None:
        super().__init__(options, environment, settings)
        allowed = options.providers or PROVIDERS
        needed = ("ours", "ours_inplace", "ours_avx2", "eager", "compile")
        self._providers = [name for name in needed if name in allowed]
        self._cases = (
            [Case(shape, dtype) for dtype in (_F32, _BF16) for shape in options.shapes] if options.shapes else _CASES
        )
        self._writer = report.CsvWriter(report.output_path(options.out, "bars"), Row, environment)
        self._limits: set[tuple[float, str]] = set()

    def run(self, run: int) -> None:
        for case in self._cases:
            print(f"run {run + 1} of {self._options.runs}: {case}", flush=True)
            rows = _run_case(case, self._settings, self._providers, run)
            self._writer.write(rows.values())
            self._limits |= {(row.read_gb_per_s or 0, row.limit_source) for row in rows.values() if row.limit_source}
            self.problems |= {f"{row.provider}: {row.status}" for row in rows.values() if row.status != "ok"}
            self.wrong |= bool(failures_of_ours(list(rows.values())))
            for bar, value in _measured(case, rows, self._options.clock):
                self._add(bar, value)
            for workload, ours, most in _DENORMAL:
                if ours in self._providers:
                    bar = Bar(f"{workload}: {ours}, randn x 40 over randn", str(case), most, at_least=False)
                    wall, cpu = denormal_ratio(workload, ours, case, self._settings)
                    self._add(bar, wall if self._options.clock == "wall" else cpu)

    def notes(self) -> list[str]:
        if not self._limits:
            return ["Read limit: not measured."]
        least, most = min(self._limits), max(self._limits)
        return [f"Read limit {least[0]:.0f} to {most[0]:.0f} GB/s ({most[1]})."]


class _HeadBars(_Bars):
    def __init__(self, options: argparse.Namespace, environment: report.Environment, settings: Settings) -> None:
        super().__init__(options, environment, settings)
        self._writer = report.CsvWriter(report.output_path(options.out, "bars_head"), head.HeadRow, environment)
        self._products: dict[str, list[float]] = {}  # by dtype: time of the products alone over eager's

    def notes(self) -> list[str]:
        return [
            f"The head's products alone take {statistics.median(ratios):.2f} of eager's time in {dtype}."
            for dtype, ratios in self._products.items()
        ]

    def run(self, run: int) -> None:
        n, hidden, vocabulary = self._options.head_shape
        size = head.Size(head.DEFAULT_PAIRS, n // (2 * head.DEFAULT_PAIRS), hidden, vocabulary)
        names = ("recompute_free", "recompute", "eager", "eager_float")
        for dtype in ("float32", "bfloat16"):
            case = f"[{n}, {hidden}] x [{vocabulary}, {hidden}] {dtype}"
            print(f"run {run + 1} of {self._options.runs}: head {case}", flush=True)
            measured = head.LossRunner(size, dtype, "pairs", self._settings, names).run("fwd_bwd")
            rows = {row.provider: row for row in measured}
            self._writer.write(rows.values())
            self.problems |= {f"head {name} {dtype}: {row.status}" for name, row in rows.items() if row.status != "ok"}
            self.wrong |= any(row.status != "ok" for name, row in rows.items() if name in head.OURS)
            self._products.setdefault(dtype, []).extend(
                row.over_eager / row.over_products for row in rows.values() if row.over_eager and row.over_products
            )
            for (name, of_dtype), (most_time, most_mib, with_sum) in _HEAD.items():
                if of_dtype != dtype:
                    continue
                row = rows[name]
                most_mib += vocabulary * hidden * 4 / (1 << 20) if with_sum else 0
                share = f"head: {name}, share of the products' peak"
                peer = "eager" if dtype == "float32" else "eager_float"  # native bfloat16 fails the gate
                self._add(Bar(f"head: {name}'s time / {peer}", case, most_time, at_least=False), row.over_eager)
                self._add(Bar(share, case, _HEAD_PEAK_SHARE, at_least=True), row.peak_share)
                self._add(Bar(f"head: {name}, extra MiB", case, most_mib, at_least=False), row.extra_mib)


class _Nothing(torch.autograd.Function):
    """What torch charges for a function of autograd in Python, whatever it does."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return logits.new_empty(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dlogps: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _CallBars(_Bars):
    """Microseconds that a small call takes beside the ops it calls and beside what torch charges anyone's Function."""

    def __init__(self, options: argparse.Namespace, environment: report.Environment, settings: Settings) -> None:
        super().__init__(options, environment, settings)
        self._nothing: list[float] = []
        self._both: list[float] = []

    def notes(self) -> list[str]:
        nothing, both = statistics.median(self._nothing), statistics.median(self._both)
        return [
            f"A torch.autograd.Function that does nothing takes {nothing:.0f} us, forward and backward; a call beside "
            f"its ops alone {both:.0f}."
        ]

    def run(self, run: int) -> None:
        print(f"run {run + 1} of {self._options.runs}: calls", flush=True)
        device = self._settings.device
        logits = torch.randn(_CALL_SHAPE, device=device, requires_grad=True)
        labels = torch.zeros(_CALL_SHAPE[:1], dtype=torch.int64, device=device)
        upstream = torch.rand(_CALL_SHAPE[:1], device=device)
        plain, ops = logits.detach(), torch.ops.spo_kernels
        _, kl, stats = ops.token_stats_fwd(plain, labels, None, None, -100, False)

        def forward() -> torch.Tensor:
            return spo_kernels.token_logps(logits, labels)

        calls = {
            "op forward": lambda: ops.token_stats_fwd(plain, labels, None, None, -100, False),
            "op backward": lambda: ops.token_stats_bwd(upstream, None, plain, labels, None, None, kl, stats, -100),
            "forward": forward,
            "both": lambda: torch.autograd.grad(forward(), logits, upstream),
            "nothing": lambda: torch.autograd.grad(_Nothing.apply(logits, plain), logits, upstream),
        }
        entries = {name: measure.Entry(call) for name, call in calls.items()}
        samples = measure.interleave(entries, device, self._settings.repeats)
        us = {name: 1e6 * statistics.median(times.wall) for name, times in samples.items()}
        self._nothing.append(us["nothing"])
        self._both.append(us["both"] - us["op forward"] - us["op backward"])
        for title, value in (
            ("a forward beside its op, us", us["forward"] - us["op forward"]),
            ("forward and backward beside their ops and an empty Function, us", self._both[-1] - us["nothing"]),
        ):
            self._add(Bar(f"token_logps: {title}", str(Case(_CALL_SHAPE, _F32)), _CALL_MICROSECONDS, False), value)


def _run_case(case: Case, settings: Settings, providers: list[str], run: int) -> dict[tuple[Workload, str], Row]:
    runner = CaseRunner(case, settings, providers)
    barred = [workload for workload, _, _, needed in _RATIOS if case.dtype in needed]
    workloads = dict.fromkeys([*barred, *(workload for workload, *_ in (*_SHARES, *_MEMORY))])
    return {(workload, row.provider): row for workload in workloads for row in runner.run(workload, run)}


def _markdown(bars: list[tuple[Bar, list[float]]], options: argparse.Namespace, notes: list[str]) -> str:
    lines = []
    for bar, measured in bars:
        sign = "≥" if bar.at_least else "≤"
        spread = f"{min(measured):.3g}-{max(measured):.3g}" if measured else ""
        median = f"{statistics.median(measured):.3g}" if measured else ""
        lines.append([bar.title, bar.case, f"{sign} {bar.needed:.3g}", median, spread, bar.verdict(measured)])
    held = sum("pass" in line[-1] for line in lines)
    summary = f"{held} of {len(lines)} bars hold; medians of {options.runs} runs, {options.clock} time."
    table = report.markdown_table(["bar", "case", "needed", "median", "runs", "result"], lines, 2)
    return f"{table}\n\n{' '.join([summary, *notes])}"
