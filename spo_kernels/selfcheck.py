"""``python -m spo_kernels.selfcheck``: every backend that runs on this machine against the float64 reference.

Each row is one op, dtype and backend (each SIMD level on the CPU): the largest error against the reference, the budget it must
stay in (twice the error of eager torch in float32, and rounding), and the speed with its share of the copy bandwidth measured here. Exits 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import backends, reference
from spo_kernels.functional import LOGITS_DTYPES


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


def _targets(device: torch.device) -> Iterator[tuple[str, backends.Backend, Callable[[], None]]]:
    """``(label, backend, prepare)`` for what can run on the device."""
    name = backends.active(device)
    if name != "cpu":
        yield name, backends.get(name), lambda: None
        return
    control = backends.cpu.load()
    for level in control.simd_levels():
        yield f"cpu {level}", backends.get("cpu"), lambda level=level: control.set_simd_level(level)


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
    return 2 * source.numel() * source.element_size() / _seconds(lambda: target.copy_(source), device, repeats)


def _worst(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative where the truth exceeds 1."""
    return ((value.double() - truth).abs() / truth.abs().clamp(min=1)).max().item()


def _few_rows(logits: Tensor, labels: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, KL and the gradient of their sum by the reference, in the dtype of the logits."""
    logps, kl, stats = reference.token_stats_fwd(logits, labels, ref_logits, None, -100)
    ones = torch.ones_like(kl)
    grad = reference.token_stats_bwd(ones, ones, logits, labels, ref_logits, None, kl, stats, -100, False)
    return logps, kl, grad


def check(device: torch.device, rows: int, vocab: int, repeats: int) -> Iterator[Result]:
    """Compare and time every op on the device; `rows` rows of `vocab` logits, of which 64 are compared."""
    generator = torch.Generator().manual_seed(0)
    for dtype in LOGITS_DTYPES:
        acc = reference.accumulate_dtype(dtype)
        logits, ref_logits = (torch.randn(rows, vocab, generator=generator).mul(4).to(device, dtype) for _ in range(2))
        labels = torch.randint(vocab, (rows,), generator=generator).to(device)
        ones = torch.ones(rows, dtype=acc, device=device)
        few = slice(0, 64)
        truth = _few_rows(logits[few].double(), labels[few], ref_logits[few].double())
        eager = _few_rows(logits[few].to(acc), labels[few], ref_logits[few].to(acc))
        # Twice what eager torch is off by, and a few units in the last place of the output.
        slack = 4 * torch.finfo(acc).eps
        budget = 2 * max(_worst(eager[0], truth[0]), _worst(eager[1], truth[1])) + slack
        half = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
        grad_budget = 2 * _worst(eager[2], truth[2]) + slack + half
        size = logits.numel() * logits.element_size()
        for label, backend, prepare in _targets(device):
            prepare()
            logps, kl, stats = backend.token_stats_fwd(logits, labels, ref_logits, None, -100)
            error = max(_worst(logps[few], truth[0]), _worst(kl[few], truth[1]))
            args = (labels, ref_logits, None, kl, stats, -100, False)
            grad = backend.token_stats_bwd(ones, ones, logits, *args)
            grad_error = _worst(grad[few], truth[2])
            forward = _seconds(lambda: backend.token_stats_fwd(logits, labels, ref_logits, None, -100), device, repeats)
            backward = _seconds(lambda: backend.token_stats_bwd(ones, ones, logits, *args), device, repeats)
            name = str(dtype).removeprefix("torch.")
            yield Result("token_stats_fwd", name, label, error, budget, 2 * size / forward / 1e9)
            yield Result("token_stats_bwd", name, label, grad_error, grad_budget, 3 * size / backward / 1e9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spo_kernels.selfcheck", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device, args.repeats) / 1e9
    print(f"{device}, [{args.rows}, {args.vocab}], copy bandwidth {bandwidth:.1f} GB/s")
    print(f"{'op':<16} {'dtype':<9} {'backend':<14} {'error':>9} {'budget':>9} {'GB/s':>7} {'of copy':>8}")
    wrong = 0
    for result in check(device, args.rows, args.vocab, args.repeats):
        wrong += not result.right
        share = result.gigabytes_per_second / bandwidth
        print(
            f"{result.op:<16} {result.dtype:<9} {result.backend:<14} {result.error:>9.1e} {result.budget:>9.1e} "
            f"{result.gigabytes_per_second:>7.1f} {share:>8.0%}{'' if result.right else '  WRONG'}",
            flush=True,
        )
    print("all results right" if not wrong else f"{wrong} results WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
