"""The harness of the benchmark suite: clock, memory, gate, columns of a row, result markers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import gate, measure
from benchmarks.harness.results import RESULTS_BEGIN, RESULTS_END, replace_results
from benchmarks.harness.rows import column_names
from benchmarks.workloads.head import HeadRow
from benchmarks.workloads.row_case import RowOpRow
from benchmarks.workloads.step import StepRow
from spo_kernels import selfcheck


def test_peak_memory_counts_what_a_call_allocates() -> None:
    mib = torch.empty(1 << 18)

    def two_at_once() -> Tensor:
        first = mib + 1
        second = first * 2  # both alive: 2 MiB
        del first
        return second + 1  # still 2

    peak = measure.peak_memory(measure.Entry(two_at_once), torch.device("cpu"))
    assert peak.allocator == pytest.approx(2 << 20, rel=0.01)
    peak = measure.peak_memory(measure.Entry(lambda: mib.add_(1)), torch.device("cpu"))
    assert peak.allocator < 1 << 12


def test_interleave_takes_turns_and_leaves_preparation_out() -> None:
    calls: list[str] = []
    entries = {
        name: measure.Entry(
            lambda name=name: calls.append(name),
            lambda name=name: calls.append(f"prepare {name}"),
            lambda name=name: calls.append(f"finish {name}"),
        )
        for name in ("a", "b")
    }
    samples = measure.interleave(entries, torch.device("cpu"), 2, lambda: calls.append("round"), burst_of_short_calls=1)
    turn = [[f"prepare {name}", name, f"finish {name}"] for name in ("a", "b")]
    forwards, backwards = [*turn[0], *turn[1], "round"], [*turn[1], *turn[0], "round"]
    assert calls[:21] == [*forwards, *forwards, *backwards]  # warm-up, then the order rotates
    assert len(samples["a"].wall) == len(samples["b"].cpu) >= 2


def test_statistics() -> None:
    assert measure.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert measure.quantile([7.0], 0.8) == 7.0
    assert measure.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


class FakeEvent:
    """Stands in for torch.cuda.Event: records a counter, which the timed calls of the test advance."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_a_gpu_is_timed_between_events_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    class Flush:
        def sum(self) -> None:
            flushed.append(FakeEvent.now)
            FakeEvent.now += 1000

    def call() -> None:
        FakeEvent.now += 3

    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: Flush())
    clock = measure.Clock(torch.device("cuda"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    assert [clock.time(call)[0] for _ in range(2)] == [3e-3, 3e-3]
    assert len(flushed) == 2
    assert selfcheck._seconds(call, torch.device("cuda"), repeats=3) == 3e-3


def test_the_gate_reports_the_largest_error_of_each_kind_and_nan() -> None:
    truth = {name: torch.ones(2, 3, dtype=torch.float64) for name in ("a", "b")}
    budget = gate.ElementBudget(1e-3, 0.0, 1e-3)
    off, right = truth["a"] + 0.5, truth["a"].clone()
    verdict = gate.by_element({"a": torch.full((2, 3), torch.nan)}, {"a": off, "b": right}, truth, budget)
    assert verdict.errors["out"] != verdict.errors["out"]
    assert verdict.errors["grad"] == 0.5
    assert verdict.problem.startswith("wrong: a off by nan; gradient of a off by 0.5")


@pytest.mark.parametrize("name", selfcheck.Values._fields)
def test_selfcheck_sees_a_nan_in_any_result(name: str) -> None:
    right = selfcheck.Values(*(torch.ones(3, dtype=torch.float64) for _ in selfcheck.Values._fields))
    wrong = right._replace(**{name: torch.full((3,), torch.nan, dtype=torch.float64)})
    assert any(error != error for error in wrong.errors(right).values())
    assert not any(right.errors(right).values())


def test_on_a_gpu_the_limit_is_that_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class HalfASecond(measure.Clock):
        def time(self, call: Callable[[], object]) -> tuple[float, float]:
            call()
            return 0.5, 0.5

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=dtype))
    limit = measure.Bandwidth(4000, torch.device("cuda"), 1, HalfASecond(torch.device("cpu")))
    limit.sample()
    assert limit.source == "torch.Tensor.copy_"
    assert limit.read == limit.update == [2 * 4000 / 0.5]


def test_nothing_is_worse_than_nan() -> None:
    for errors in ([float("nan"), 1.0], [1.0, float("nan")]):
        assert gate.by_norm(dict(enumerate(errors)), budget=2.0).problem == "wrong: off by nan, relative"


TIMES = ["rounds", "wall_ms", "wall_p20_ms", "wall_p80_ms", "cpu_ms"]


MEMORY = ["extra_mib", "extra_resident_mib"]


COLUMNS = {
    RowOpRow: [
        *["run", "op", "pass_name", "shape", "dtype", "scale", "cache", "provider", "status"],
        *[*TIMES, "cpu_p20_ms", "cpu_p80_ms", "model_mb", "gb_per_s", "limit_share"],
        *["read_gb_per_s", "update_gb_per_s", "limit_source", *MEMORY, "error_out", "error_grad"],
        *["over_ours", "over_ours_cpu", "over_ours_inplace", "over_ours_inplace_cpu"],
    ],
    HeadRow: [
        *["loss", "pass_name", "provider", "dtype", "rows", "hidden", "vocabulary", "pairs", "status"],
        *[*TIMES, "units", "peak_share", "peak_gflop_per_s", "native_gflop_per_s", *MEMORY],
        *["error_loss", "error_hidden", "error_weight", "over_eager", "over_products"],
    ],
    StepRow: [
        *["provider", "pairs", "kl_samples", "kl_every", "tokens", "vocabulary", "hidden", "layers", "status"],
        *[*TIMES, "with_refresh_ms", *MEMORY, "error_loss", "error_grad", "over_ours", "over_ours_inplace"],
    ],
}


@pytest.mark.parametrize("row_type", COLUMNS)
def test_columns_are_an_interface(row_type: type) -> None:
    assert column_names(row_type) == COLUMNS[row_type]


def test_results_are_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{RESULTS_BEGIN}\nold\n{RESULTS_END}\nafter\n")
    replace_results(page, "| new |")
    assert page.read_text() == f"before\n{RESULTS_BEGIN}\n\n| new |\n\n{RESULTS_END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        replace_results(page, "| new |")
