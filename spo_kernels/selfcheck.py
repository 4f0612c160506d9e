"""``python -m spo_kernels.selfcheck``: every backend that runs on this machine against the float64 reference.

Each row is one op, dtype and backend (each SIMD level on the CPU): the largest error against the reference, the budget
it must stay in (twice the error of eager torch in float32, and rounding), and the speed with its share of the copy
bandwidth measured here. Exits 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import backends, reference
from spo_kernels.functional import LOGITS_DTYPES

COMPARED_ROWS = 64


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
    """Log-probs ``[n]``, KL ``[n]`` and the gradient of their sum ``[n, V]``."""

    logps: Tensor
    kl: Tensor
    dlogits: Tensor

    def errors(self, truth: Values) -> tuple[float, float]:
        """Largest error of the outputs and of the gradient."""
        return max(_worst(self.logps, truth.logps), _worst(self.kl, truth.kl)), _worst(self.dlogits, truth.dlogits)


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

    def head(self, dtype: torch.dtype) -> Problem:
        """The rows that are compared, in another dtype."""
        logits, labels, ref_logits = (tensor[:COMPARED_ROWS] for tensor in self)
        return Problem(logits.to(dtype), labels, ref_logits.to(dtype))

    def forward(self, backend: backends.Backend) -> tuple[Tensor, Tensor, Tensor]:
        return backend.token_stats_fwd(self.logits, self.labels, self.ref_logits, None, -100)

    def backward(self, backend: backends.Backend, kl: Tensor, stats: Tensor) -> Tensor:
        ones = torch.ones_like(kl)
        return backend.token_stats_bwd(
            ones, ones, self.logits, self.labels, self.ref_logits, None, kl, stats, -100, False
        )

    def values(self, backend: backends.Backend) -> Values:
        logps, kl, stats = self.forward(backend)
        return Values(*(x[:COMPARED_ROWS] for x in (logps, kl, self.backward(backend, kl, stats))))


def _worst(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative where the truth exceeds 1."""
    return ((value.double() - truth).abs() / truth.abs().clamp(min=1)).max().item()


def _targets(device: torch.device) -> Iterator[tuple[str, backends.Backend, Callable[[], object]]]:
    """``(label, backend, prepare)`` for what can run on the device."""
    name = backends.active(device)
    if name != "cpu":
        yield name, backends.get(name), lambda: None
        return
    control = backends.cpu.load()
    before = control.simd_level()
    for level in control.simd_levels():
        yield f"cpu {level}", backends.get("cpu"), partial(control.set_simd_level, level)
    control.set_simd_level(before)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by ``Tensor.copy_`` of 256 MiB."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats)


def check(dtype: torch.dtype, device: torch.device, rows: int, vocab: int, repeats: int) -> Iterator[Result]:
    """Compare and time the ops on ``[rows, vocab]`` logits of a dtype."""
    problem = Problem.random(rows, vocab, dtype, device)
    acc = reference.accumulate_dtype(dtype)
    truth = problem.head(torch.float64).values(reference)
    # float64 is its own truth: what is left there is the order of the sums.
    slack = 4 * torch.finfo(acc).eps if acc != torch.float64 else 1e-12
    budget, grad_budget = (2 * error + slack for error in problem.head(acc).values(reference).errors(truth))
    if dtype in (torch.bfloat16, torch.float16):
        grad_budget += torch.finfo(dtype).eps
    name = str(dtype).removeprefix("torch.")
    for label, backend, prepare in _targets(device):
        prepare()
        error, grad_error = problem.values(backend).errors(truth)
        _, kl, stats = problem.forward(backend)
        forward = _seconds(partial(problem.forward, backend), device, repeats)
        backward = _seconds(partial(problem.backward, backend, kl, stats), device, repeats)
        gigabytes = problem.logits.nbytes / 1e9
        yield Result("token_stats_fwd", name, label, error, budget, 2 * gigabytes / forward)
        yield Result("token_stats_bwd", name, label, grad_error, grad_budget, 3 * gigabytes / backward)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spo_kernels.selfcheck",
        description="Every backend on this machine against the float64 reference, with its speed.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls an op, of which the median counts")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device, args.repeats) / 1e9
    print(f"{device}, [{args.rows}, {args.vocab}], copy bandwidth {bandwidth:.1f} GB/s")
    print(f"{'op':<16} {'dtype':<9} {'backend':<14} {'error':>9} {'budget':>9} {'GB/s':>7} {'of copy':>8}")
    wrong = 0
    for dtype in LOGITS_DTYPES:
        for result in check(dtype, device, args.rows, args.vocab, args.repeats):
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
