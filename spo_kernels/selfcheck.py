"""``python -m spo_kernels.selfcheck``: every backend that runs on this machine against the float64 reference.

Each row is one op, dtype and backend: each SIMD level on a CPU, the CUDA kernels and Triton on a GPU. It shows the
largest error against the reference, the budget for that error (twice the error of eager torch in float32, plus
rounding), and the speed, also as a share of the copy bandwidth measured here. Exits 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import backends, reference
from spo_kernels.precision import LOGITS_DTYPES, accumulate_dtype
from spo_kernels.reference import RowOptions

COMPARED_ROWS = 64
FEW_ROWS = 2  # a GPU splits so few rows over several blocks
# More than the caches hold: on a CPU all tensors together, on a GPU each tensor.
DEFAULT_ROWS = {"cpu": 512, "cuda": 4096}
KERNELS = ("token_stats_fwd", "token_stats_bwd", "mixture_kl", "kl_loss_fwd", "scale_")
JSD = RowOptions(mixture=0.5)


class Result(NamedTuple):
    op: str
    dtype: str
    backend: str
    error: float
    budget: float
    gigabytes_per_second: float

    @property
    def right(self) -> bool:
        return self.error <= self.budget  # False for NaN


class Values(NamedTuple):
    """The results of every kernel for n rows."""

    logps: Tensor  # [n]
    kl: Tensor  # [n]
    dlogits: Tensor  # [n, V] gradient of the sum of log-probs and KL
    mixture_kls: Tensor  # [n, 2] the two parts of a JSD
    kl_dlogits: Tensor  # [n, V] gradient of the sum of the KL alone, from one sweep
    scaled: Tensor  # [n, V] kl_dlogits times .5

    def errors(self, truth: Values) -> dict[str, float]:
        """Largest error of each kernel of `KERNELS`."""
        logps, kl, *others = (_worst(mine, true) for mine, true in zip(self, truth, strict=True))
        return dict(zip(KERNELS, (_larger(logps, kl), *others), strict=True))


class Problem(NamedTuple):
    logits: Tensor
    labels: Tensor
    ref_logits: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(0)
        logits, ref_logits = (4 * torch.randn(rows, vocab, generator=generator) for _ in range(2))
        labels = torch.randint(vocab, (rows,), generator=generator)
        return cls(logits.to(device, dtype), labels.to(device), ref_logits.to(device, dtype))

    def first_rows(self, rows: int, dtype: torch.dtype) -> Problem:
        """The first rows, in another dtype."""
        logits, labels, ref_logits = (tensor[:rows] for tensor in self)
        return Problem(logits.to(dtype), labels, ref_logits.to(dtype))

    def forward(self, backend: backends.Backend) -> tuple[Tensor, Tensor, Tensor]:
        return backend.token_stats_fwd(self.logits, self.labels, self.ref_logits, None, -100)

    def backward(self, backend: backends.Backend, kl: Tensor, stats: Tensor) -> Tensor:
        ones = torch.ones_like(kl)
        return backend.token_stats_bwd(
            ones, ones, self.logits, self.labels, self.ref_logits, None, kl, stats, -100, False
        )

    def mixture_kl(self, backend: backends.Backend, stats: Tensor) -> Tensor:
        return backend.mixture_kl(self.logits, self.ref_logits, None, stats, JSD)

    def kl_loss(self, backend: backends.Backend) -> tuple[Tensor, Tensor]:
        return backend.kl_loss_fwd(self.logits, self.ref_logits, None, False)

    def values(self, backend: backends.Backend) -> Values:
        """Results of the rows that are compared. All rows are computed."""
        logps, kl, stats = self.forward(backend)
        dlogits = self.backward(backend, kl, stats)
        mixture_kls = self.mixture_kl(backend, stats).t()
        _, kl_dlogits = self.kl_loss(backend)
        scaled = kl_dlogits.clone()
        backend.scale_(scaled, torch.full((), 0.5, dtype=kl.dtype, device=kl.device))
        return Values(*(x[:COMPARED_ROWS] for x in (logps, kl, dlogits, mixture_kls, kl_dlogits, scaled)))


def _worst(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative where the truth exceeds 1."""
    return ((value.double() - truth).abs() / truth.abs().clamp(min=1)).max().item()


def _larger(a: float, b: float) -> float:
    """The larger error; NaN, which max() may drop, is the largest."""
    return max(a, b, key=lambda error: (math.isnan(error), error))


def _targets(device: torch.device) -> Iterator[tuple[str, backends.Backend, Callable[[], object]]]:
    """``(label, backend, prepare)`` of each backend that runs on the device; the oracle only if it was asked for."""
    for name in backends.available(device):
        if name == "cpu" and backends.active("cpu") == "cpu":
            control = backends.cpu.load()
            before = control.simd_level()
            for level in control.simd_levels():
                yield f"cpu {level}", backends.get("cpu"), partial(control.set_simd_level, level)
            control.set_simd_level(before)
        elif name == backends.active(device) or (device.type != "cpu" and name != "reference"):
            yield name, backends.get(name), lambda: None


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call: wall time on a CPU, the time between events on a GPU."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by ``Tensor.copy_`` of 256 MiB."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats)


def _calls(problem: Problem, backend: backends.Backend) -> dict[str, tuple[Callable[[], object], int]]:
    """The call to time for each kernel, and how many tensors of the logits' size it reads or writes."""
    _, kl, stats = problem.forward(backend)
    factor = torch.full((), -1.0, dtype=kl.dtype, device=kl.device)  # repeated, it leaves magnitudes as they are
    target = problem.logits.clone()
    return {
        "token_stats_fwd": (partial(problem.forward, backend), 2),
        "token_stats_bwd": (partial(problem.backward, backend, kl, stats), 3),
        "mixture_kl": (partial(problem.mixture_kl, backend, stats), 2),
        "kl_loss_fwd": (partial(problem.kl_loss, backend), 3),
        "scale_": (partial(backend.scale_, target, factor), 2),
    }


def check(dtype: torch.dtype, device: torch.device, rows: int, vocab: int, repeats: int) -> Iterator[Result]:
    """Compare and time the ops on ``[rows, vocab]`` logits of a dtype."""
    problem = Problem.random(rows, vocab, dtype, device)
    acc = accumulate_dtype(dtype)
    truth = problem.first_rows(COMPARED_ROWS, torch.float64).values(reference)
    # float64 is compared with itself, so only the order of sums can differ.
    slack = 4 * torch.finfo(acc).eps if acc != torch.float64 else 1e-12
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # of results in half precision
    budgets = {
        kernel: 2 * error + slack + (rounding if kernel not in ("token_stats_fwd", "mixture_kl") else 0)
        for kernel, error in problem.first_rows(COMPARED_ROWS, acc).values(reference).errors(truth).items()
    }
    few = problem.first_rows(FEW_ROWS, dtype)
    few_truth = Values(*(values[:FEW_ROWS] for values in truth))
    name = str(dtype).removeprefix("torch.")
    for label, backend, prepare in _targets(device):
        prepare()
        errors, few_errors = problem.values(backend).errors(truth), few.values(backend).errors(few_truth)
        for kernel, (call, tensors) in _calls(problem, backend).items():
            error = _larger(errors[kernel], few_errors[kernel])
            speed = tensors * problem.logits.nbytes / 1e9 / _seconds(call, device, repeats)
            yield Result(kernel, name, label, error, budgets[kernel], speed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spo_kernels.selfcheck",
        description="Every backend on this machine against the float64 reference, with its speed.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="default: 512 on a CPU, 4096 on a GPU")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per op; the median is reported")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that this torch can use")
        device = torch.device("cuda", device.index or 0)  # set_device needs an index
        torch.cuda.set_device(device)  # events and streams are those of the current device
    rows = args.rows or DEFAULT_ROWS[device.type]
    bandwidth = copy_bandwidth(device, args.repeats) / 1e9
    print(f"{device}, [{rows}, {args.vocab}], copy bandwidth {bandwidth:.1f} GB/s")
    print(f"{'op':<16} {'dtype':<9} {'backend':<14} {'error':>9} {'budget':>9} {'GB/s':>7} {'of copy':>8}")
    wrong = 0
    for dtype in LOGITS_DTYPES:
        for result in check(dtype, device, rows, args.vocab, args.repeats):
            wrong += not result.right
            print(
                f"{result.op:<16} {result.dtype:<9} {result.backend:<14} {result.error:>9.1e} {result.budget:>9.1e} "
                f"{result.gigabytes_per_second:>7.1f} {result.gigabytes_per_second / bandwidth:>8.0%}"
                f"{'' if result.right else '  WRONG'}",
                flush=True,
            )
    print("all results right" if not wrong else f"{wrong} results WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
