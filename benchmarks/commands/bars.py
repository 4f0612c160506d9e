"""``bars``: the project's speed bars, measured over several runs on the machine at hand.

Three groups: the row ops, the head, and the time that a call adds to the ops that it calls.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import spo_kernels
from benchmarks.commands.arguments import add_common, count, open_bench, shape
from benchmarks.commands.head import DEFAULT_PAIRS
from benchmarks.harness import measure
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import CsvWriter, heading, markdown_table, output_path
from benchmarks.harness.rows import failures_of_ours
from benchmarks.peers.row_ops import PROVIDERS
from benchmarks.workloads.head import HeadRow, LossRunner, Size
from benchmarks.workloads.row_case import CaseRunner, RowOpRow, WrongResultError, denormal_ratio
from benchmarks.workloads.row_ops import Case, Workload
from spo_kernels.reference import PLAIN

HELP = "measure the project's speed bars, pass or miss"

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
# (op and pass, ours, most extra memory in logits-sized tensors): room for per-row values alone
_MEMORY = ((_LOGPS_FWD_BWD, "ours_inplace", 0.01),)
# (op and pass, ours, most time on denormal-heavy rows over time on normal rows)
_DENORMAL = (
    (_LOGPS_FWD, "ours", 1.3),
    (_LOGPS_FWD_BWD, "ours_inplace", 1.3),
    (_KL_FWD, "ours", 1.3),
)
# The head's pair loss, forward and backward: (provider, dtype) -> (most time over eager's, most MiB beside inputs and
# gradients, whether a float32 sum of the weight's gradient may come on top).
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


@dataclass(frozen=True)
class _Plan:
    """What to measure, from the command's arguments."""

    runs: int
    clock: str  # wall or cpu
    shapes: list[tuple[int, ...]] | None  # None: the bars' own cases
    providers: list[str] | None  # None: all
    groups: list[str]
    head_shape: tuple[int, ...]  # N, H, V


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The speed bars of the project: median and spread over runs, pass or miss."
    add_common(parser)
    parser.add_argument(
        "--runs", type=count, default=5, help="number of runs, of which median and spread are shown (default: 5)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="the time that ratios compare (default: wall)"
    )
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="NxV", help="measure these shapes in place of the bars' own"
    )
    parser.add_argument(
        "--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="measure only these (default: all)"
    )
    parser.add_argument(
        "--groups",
        choices=GROUPS,
        nargs="+",
        default=[*GROUPS],
        metavar="GROUP",
        help="ops, head, calls (default: all)",
    )
    parser.add_argument(
        "--head-shape",
        type=_head_shape,
        default=(4096, 768, 32000),
        metavar="NxHxV",
        help="size of the head (default: 4096x768x32000)",
    )


def _head_shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be NxHxV, such as 4096x768x32000, got {text!r}")
    rows, hidden, vocabulary = map(int, parts)
    if rows % (2 * DEFAULT_PAIRS):
        raise argparse.ArgumentTypeError(f"N must be a multiple of {2 * DEFAULT_PAIRS}, got {text!r}")
    return rows, hidden, vocabulary


def run(options: argparse.Namespace) -> int:
    plan = _Plan(
        runs=options.runs,
        clock=options.clock,
        shapes=options.shapes,
        providers=options.providers,
        groups=options.groups,
        head_shape=options.head_shape,
    )
    bench = open_bench(options)
    measurements = {"ops": _OpBars, "head": _HeadBars, "calls": _CallBars}
    groups = [measurements[name](plan, bench) for name in plan.groups]
    for index in range(plan.runs):
        for group in groups:
            group.run(index)
    bars = [(bar, values) for group in groups for bar, values in group.values.items()]
    notes = [note for group in groups for note in group.notes()]
    page = output_path(bench.out, "bars", ".md")
    text = f"{heading('Bars', bench.environment)}\n\n{_markdown(bars, plan, notes)}"
    page.write_text(text + "\n")
    problems = sorted({problem for group in groups for problem in group.problems})
    print("", text, *problems, "", page, sep="\n")
    return 1 if any(group.wrong for group in groups) else 0


class _Bars:
    """Bars of one group, with a value for each run."""

    def __init__(self, plan: _Plan, bench: Bench) -> None:
        self._plan = plan
        self._bench = bench
        self.values: dict[Bar, list[float]] = {}
        self.problems: set[str] = set()  # every status other than "ok", of any provider
        self.wrong = False  # whether a result of ours was wrong or failed

    def run(self, run: int) -> None:
        raise NotImplementedError

    def notes(self) -> list[str]:
        return []

    def _add(self, bar: Bar, value: float | None) -> None:
        self.values.setdefault(bar, []).extend([] if value is None else [value])


Rows = Mapping[tuple[Workload, str], RowOpRow]  # by workload and provider


class _OpBars(_Bars):
    def __init__(self, plan: _Plan, bench: Bench) -> None:
        super().__init__(plan, bench)
        allowed = plan.providers or PROVIDERS
        needed = ("ours", "ours_inplace", "ours_avx2", "eager", "compile")
        self._providers = [name for name in needed if name in allowed]
        self._cases = [Case(size, dtype) for dtype in (_F32, _BF16) for size in plan.shapes] if plan.shapes else _CASES
        self._writer = CsvWriter(output_path(bench.out, "bars"), RowOpRow, bench.environment)
        self._limits: set[tuple[float, str]] = set()

    def run(self, run: int) -> None:
        for case in self._cases:
            print(f"run {run + 1} of {self._plan.runs}: {case}", flush=True)
            by_key = self._run_case(case, run)
            rows = list(by_key.values())
            self._writer.write(rows)
            self._limits |= {(row.read_gb_per_s or 0, row.limit_source) for row in rows if row.limit_source}
            self.problems |= {f"{row.provider}: {row.status}" for row in rows if row.status != "ok"}
            self.wrong |= bool(failures_of_ours(rows))
            for bar, value in self._measured(case, by_key):
                self._add(bar, value)
            for workload, ours, most in _DENORMAL:
                if ours in self._providers:
                    bar = Bar(f"{workload}: {ours}, randn x 40 over randn", str(case), most, at_least=False)
                    self._add(bar, self._denormal_ratio(workload, ours, case))

    def _denormal_ratio(self, workload: Workload, provider: str, case: Case) -> float | None:
        """The time on denormal-heavy rows over the time on normal rows, or None if a result is wrong."""
        try:
            wall, cpu = denormal_ratio(workload, provider, case, self._bench.settings)
        except WrongResultError as error:
            self.problems.add(str(error))
            self.wrong = True
            return None
        return wall if self._plan.clock == "wall" else cpu

    def _run_case(self, case: Case, run: int) -> Rows:
        runner = CaseRunner(case, self._bench.settings, self._providers)
        barred = [workload for workload, _, _, needed in _RATIOS if case.dtype in needed]
        workloads = dict.fromkeys([*barred, *(workload for workload, *_ in (*_SHARES, *_MEMORY))])
        return {(workload, row.provider): row for workload in workloads for row in runner.run(workload, run)}

    def _measured(self, case: Case, rows: Rows) -> Iterator[tuple[Bar, float | None]]:
        """Every bar that one run of a case decides, and its value. None if a row that it needs was not timed."""
        for workload, ours, peer, needed in _RATIOS:
            if case.dtype in needed:
                bar = Bar(f"{workload}: {peer}'s time / {ours}", str(case), needed[case.dtype], at_least=True)
                yield bar, self._ratio(rows.get((workload, peer)), rows.get((workload, ours)))
        for workload, ours, shares in _SHARES:
            row = rows.get((workload, ours))
            bar = Bar(f"{workload}: {ours}, share of read bandwidth", str(case), shares[case.dtype], at_least=True)
            yield bar, row.limit_share if row else None
        for workload, ours, most in _MEMORY:
            row = rows.get((workload, ours))
            tensor_mib = torch.Size(case.shape).numel() * case.dtype.itemsize / (1 << 20)
            bar = Bar(f"{workload}: {ours}, extra memory in [N, V] tensors", str(case), most, at_least=False)
            yield bar, row.memory.extra_mib / tensor_mib if row and row.memory else None

    def _ratio(self, peer: RowOpRow | None, ours: RowOpRow | None) -> float | None:
        """The peer's time over ours: a quotient of two ratios with one base, ours at the best SIMD level.

        Rows hold ratios to ours at the best level only, not to ours at lower levels.
        """
        if peer is None or ours is None:
            return None
        base = ours.provider if ours.provider in ("ours", "ours_inplace") else "ours"
        key = base if self._plan.clock == "wall" else f"{base}_cpu"
        return peer.over[key] / ours.over[key] if key in peer.over and key in ours.over else None

    def notes(self) -> list[str]:
        if not self._limits:
            return ["Read limit: not measured."]
        least, most = min(self._limits), max(self._limits)
        return [f"Read limit {least[0]:.0f} to {most[0]:.0f} GB/s ({most[1]})."]


class _HeadBars(_Bars):
    def __init__(self, plan: _Plan, bench: Bench) -> None:
        super().__init__(plan, bench)
        self._writer = CsvWriter(output_path(bench.out, "bars_head"), HeadRow, bench.environment)
        self._products: dict[str, list[float]] = {}  # by dtype: time of the products alone over eager's

    def notes(self) -> list[str]:
        return [
            f"The head's products alone take {statistics.median(ratios):.2f} of eager's time in {dtype}."
            for dtype, ratios in self._products.items()
            if ratios
        ]

    def run(self, run: int) -> None:
        n, hidden, vocabulary = self._plan.head_shape
        size = Size(DEFAULT_PAIRS, n // (2 * DEFAULT_PAIRS), hidden, vocabulary)
        names = ("recompute_free", "recompute", "eager", "eager_float")
        for dtype in ("float32", "bfloat16"):
            case = f"[{n}, {hidden}] x [{vocabulary}, {hidden}] {dtype}"
            print(f"run {run + 1} of {self._plan.runs}: head {case}", flush=True)
            rows = LossRunner(size, dtype, "pairs", self._bench.settings, names).run("fwd_bwd")
            self._writer.write(rows)
            self.problems |= {f"head {row.provider} {dtype}: {row.status}" for row in rows if row.status != "ok"}
            self.wrong |= bool(failures_of_ours(rows))
            self._products.setdefault(dtype, []).extend(
                row.over["eager"] / row.over["products"] for row in rows if row.over.keys() >= {"eager", "products"}
            )
            for row in rows:
                if (row.provider, dtype) in _HEAD:
                    self._add_bars(row, case)

    def _add_bars(self, row: HeadRow, case: str) -> None:
        most_time, most_mib, with_sum = _HEAD[row.provider, row.dtype]
        most_mib += row.vocabulary * row.hidden * 4 / (1 << 20) if with_sum else 0
        name = row.provider
        peer = "eager" if row.dtype == "float32" else "eager_float"  # eager in bfloat16 fails the gate
        extra_mib = None if row.memory is None else row.memory.extra_mib
        self._add(Bar(f"head: {name}'s time / {peer}", case, most_time, at_least=False), row.over.get("eager"))
        self._add(Bar(f"head: {name}, share of the products' peak", case, _HEAD_PEAK_SHARE, True), row.peak_share)
        self._add(Bar(f"head: {name}, extra MiB", case, most_mib, at_least=False), extra_mib)


class _Nothing(torch.autograd.Function):
    """An autograd.Function that does nothing: its time is what torch takes for any autograd.Function in Python."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return logits.new_empty(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dlogps: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _CallBars(_Bars):
    """Microseconds of a small call, less the time of its ops and of an autograd.Function that does nothing."""

    def __init__(self, plan: _Plan, bench: Bench) -> None:
        super().__init__(plan, bench)
        self._nothing: list[float] = []
        self._both: list[float] = []

    def notes(self) -> list[str]:
        nothing, both = statistics.median(self._nothing), statistics.median(self._both)
        return [
            f"A torch.autograd.Function that does nothing takes {nothing:.0f} us, forward and backward. A call takes "
            f"{both:.0f} us in addition to its ops."
        ]

    def run(self, run: int) -> None:
        print(f"run {run + 1} of {self._plan.runs}: calls", flush=True)
        device = self._bench.settings.device
        logits = torch.randn(_CALL_SHAPE, device=device, requires_grad=True)
        labels = torch.zeros(_CALL_SHAPE[:1], dtype=torch.int64, device=device)
        upstream = torch.rand(_CALL_SHAPE[:1], device=device)
        plain, ops = logits.detach(), torch.ops.spo_kernels
        _, kl, stats = ops.token_stats_fwd(plain, labels, None, None, -100, False, *PLAIN)

        def forward() -> torch.Tensor:
            return spo_kernels.token_logps(logits, labels)

        calls = {
            "op forward": lambda: ops.token_stats_fwd(plain, labels, None, None, -100, False, *PLAIN),
            "op backward": lambda: ops.token_stats_bwd(
                upstream, None, None, plain, labels, None, None, kl, stats, -100, *PLAIN
            ),
            "forward": forward,
            "both": lambda: torch.autograd.grad(forward(), logits, upstream),
            "nothing": lambda: torch.autograd.grad(_Nothing.apply(logits, plain), logits, upstream),
        }
        entries = {name: measure.Entry(call) for name, call in calls.items()}
        samples = measure.interleave(entries, device, self._bench.settings.repeats)
        us = {name: 1e6 * statistics.median(times.wall) for name, times in samples.items()}
        self._nothing.append(us["nothing"])
        self._both.append(us["both"] - us["op forward"] - us["op backward"])
        for title, value in (
            ("a forward beside its op, us", us["forward"] - us["op forward"]),
            ("forward and backward beside their ops and an empty Function, us", self._both[-1] - us["nothing"]),
        ):
            self._add(Bar(f"token_logps: {title}", str(Case(_CALL_SHAPE, _F32)), _CALL_MICROSECONDS, False), value)


def _markdown(bars: list[tuple[Bar, list[float]]], plan: _Plan, notes: list[str]) -> str:
    lines = []
    for bar, measured in bars:
        sign = "≥" if bar.at_least else "≤"
        spread = f"{min(measured):.3g}-{max(measured):.3g}" if measured else ""
        median = f"{statistics.median(measured):.3g}" if measured else ""
        lines.append([bar.title, bar.case, f"{sign} {bar.needed:.3g}", median, spread, bar.verdict(measured)])
    held = sum("pass" in line[-1] for line in lines)
    summary = f"{held} of {len(lines)} bars hold; medians of {plan.runs} runs, {plan.clock} time."
    table = markdown_table(["bar", "case", "needed", "median", "runs", "result"], lines, 2)
    return f"{table}\n\n{' '.join([summary, *notes])}"
