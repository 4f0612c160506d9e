"""The head: SPO's pair loss from hidden states and a weight, forward and backward, ours against logits in memory.

Everyone computes the same scalar of the same 2P sequences (eq. 8 with uniform weights) and its gradients by hidden
states and weight, with one exception that says so: PyTorch's chunked linear cross-entropy has no per-token result, so
it gets a plain sum of log-probs, the same matrix products without pairs.

Work is counted in units of one matrix product of all rows, 2 N H V operations: three for who keeps the logits or has
the gradients in the forward, four for who recomputes. The share of the peak is the time these products take at the
peaks measured beside (a square product of each dtype, best of all rounds), over the time taken.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks import measure, report
from benchmarks.run import Settings
from spo_kernels.head import native_products

_ALPHA = 0.1
_PEAK_SIZE = 2048
# The gate: relative to float64, by norm. Eager in bfloat16 rounds the logits, which costs it percents.
_GATE_BUDGET = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden [2P, T, H], weight [V, H], labels [2P, T]) -> scalar


def _pair_loss(token_logps: Tensor) -> Tensor:
    logp_w, logp_l = token_logps.sum(-1).chunk(2)
    return -F.logsigmoid(_ALPHA * (logp_w - logp_l)).mean() / _ALPHA


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _pair_loss(F.log_softmax(F.linear(hidden, weight), -1).gather(-1, labels[..., None])[..., 0])


def _eager_float(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _pair_loss(F.log_softmax(F.linear(hidden, weight).float(), -1).gather(-1, labels[..., None])[..., 0])


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1)
    return _pair_loss(-F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape))


def _chunked_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn and store the logits
        return F.linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """DPO without a reference is eq. 8 times alpha. Chunks of a pair, gradients in the forward, compiled inside."""
    dpo = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss: Tensor = dpo(beta=_ALPHA, use_ref_model=False, compute_nll_loss=False)(weight, hidden, labels)[0]
    return loss / _ALPHA


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Its implementation for devices without Triton: compiled, with the logits in memory."""
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    nll = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), impl="torch_compile", reduction="none")
    return _pair_loss(-nll.view(labels.shape))


def _ours(route: str) -> Loss:
    loss = spo_kernels.LinearSPOLoss(_ALPHA, route=route)
    return lambda hidden, weight, labels: loss(hidden, weight, labels)[0]


@dataclass(frozen=True)
class Provider:
    loss: Loss
    units: int  # of matrix work
    ours: bool = False
    compiled: bool = False
    pairs: bool = True  # False: a sum of log-probs
    half_only: bool = False


PROVIDERS: dict[str, Provider] = {
    "recompute_free": Provider(_ours("recompute_free"), 3, ours=True),
    "recompute": Provider(_ours("recompute"), 4, ours=True),
    "eager": Provider(_eager, 3),
    "eager_float": Provider(_eager_float, 3, half_only=True),
    "cross_entropy": Provider(_cross_entropy, 3),
    "compile": Provider(_eager_float, 3, compiled=True),
    **({"chunked_nll": Provider(_chunked_nll, 3, pairs=False)} if hasattr(F, "linear_cross_entropy") else {}),
    **({"liger": Provider(_liger, 3)} if find_spec("liger_kernel") else {}),
    **({"cut_cross_entropy": Provider(_cut_cross_entropy, 3)} if find_spec("cut_cross_entropy") else {}),
}


@dataclass
class HeadRow:
    """One implementation at one dtype in one run of the command; forward and backward."""

    provider: str
    dtype: str
    rows: int
    hidden: int
    vocabulary: int
    pairs: int
    status: str = ""
    rounds: int | None = None
    wall_ms: float | None = None
    wall_p20_ms: float | None = None
    wall_p80_ms: float | None = None
    cpu_ms: float | None = None
    units: int | None = None
    peak_share: float | None = None
    peak_gflop_per_s: float | None = None  # of float32 products
    native_gflop_per_s: float | None = None  # of products of the dtype
    extra_mib: float | None = None  # peak of torch's allocations beyond inputs and gradients
    extra_resident_mib: float | None = None
    error_loss: float | None = None  # relative, against float64
    error_hidden: float | None = None
    error_weight: float | None = None
    over_eager: float | None = None  # its time over the faster eager's, median over rounds


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("--pairs", type=count, default=8, help="pairs P")
    parser.add_argument("--tokens", type=count, default=256, help="tokens a sequence: N = 2 P tokens rows")
    parser.add_argument("--hidden", type=count, default=768)
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="default: all")


@dataclass(frozen=True)
class _Batch:
    hidden: Tensor  # [2P, T, H], a leaf
    weight: Tensor  # [V, H], a leaf
    labels: Tensor  # [2P, T]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def leaves(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "weight": self.weight}


def _make_batch(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> _Batch:
    generator = torch.Generator(device).manual_seed(0)
    shape = (2 * options.pairs, options.tokens)
    hidden = torch.randn(*shape, options.hidden, generator=generator, device=device)
    # Logits of unit variance: a softmax that is neither flat nor a point.
    weight = torch.randn(options.vocabulary, options.hidden, generator=generator, device=device)
    weight /= options.hidden**0.5
    labels = torch.randint(options.vocabulary, shape, generator=generator, device=device)
    return _Batch(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels)


Truth = dict[str, Tensor]


def _truth(loss: Loss, batch: _Batch) -> Truth:
    """The loss and its gradients in float64, a sequence of a pair at a time, so that the logits fit."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (batch.hidden, batch.weight))
    pairs = len(batch.labels) // 2
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for pair in range(pairs):
        both = [pair, pairs + pair]
        part = loss(hidden[both], weight, batch.labels[both])
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"loss": total, "hidden": hidden.grad, "weight": weight.grad}


def _sum_of_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.log_softmax(F.linear(hidden, weight), -1).gather(-1, labels[..., None]).sum()


def _gate(row: HeadRow, provider: Provider, batch: _Batch, truth: Truth) -> None:
    batch.clear()
    loss = provider.loss(batch.hidden, batch.weight, batch.labels)
    loss.backward()
    # The truth is a sum over pairs.
    scale = len(batch.labels) // 2 if provider.pairs else 1
    got = {"loss": loss.detach(), **{name: leaf.grad for name, leaf in batch.leaves().items()}}
    for name, value in got.items():
        error = "missing" if value is None else (value.double() * scale - truth[name]).norm() / truth[name].norm()
        setattr(row, f"error_{name}", float(error))
    batch.clear()
    # In half precision one loss of a few pairs tells less than the gradients do.
    budget = _GATE_BUDGET[batch.hidden.dtype]
    worst = max(row.error_loss or 0.0, row.error_hidden or 0.0, row.error_weight or 0.0)
    if not worst <= budget:
        row.status = f"wrong: off by {worst:.3g}, relative"


def _peak_entry(dtype: torch.dtype, device: torch.device) -> measure.Entry:
    a, b, out = (torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=dtype, device=device) for _ in range(3))
    return measure.Entry(lambda: torch.mm(a, b.t(), out=out))


def run_dtype(options: argparse.Namespace, settings: Settings, name: str) -> list[HeadRow]:
    """Everyone at the size that options give (`add_arguments`), in one dtype."""
    dtype, device = DTYPES[name], settings.device
    batch = _make_batch(options, dtype, device)
    truths = {True: _truth(_eager, batch), False: _truth(_sum_of_logps, batch)}
    n = batch.labels.numel()
    rows: dict[str, HeadRow] = {}
    entries: dict[str, measure.Entry] = {}
    gradients = sum(leaf.nbytes for leaf in batch.leaves().values())
    for label in options.providers or PROVIDERS:
        provider = PROVIDERS[label]
        if provider.half_only and dtype == torch.float32:
            continue
        row = rows[label] = HeadRow(label, name, n, options.hidden, options.vocabulary, options.pairs)
        row.units = provider.units
        loss = torch.compile(provider.loss) if provider.compiled else provider.loss

        def call(loss: Loss = loss) -> None:
            loss(batch.hidden, batch.weight, batch.labels).backward()

        _gate(row, provider, batch, truths[provider.pairs])
        entry = measure.Entry(call, batch.clear, batch.clear)
        if not row.status:
            entries[label] = entry
            entry.call()  # compiles
            peak = measure.peak_memory(entry, device)
            row.extra_mib = (peak.allocator - gradients) / (1 << 20)
            row.extra_resident_mib = None if peak.resident is None else (peak.resident - gradients) / (1 << 20)
    del truths
    peaks = {key: _peak_entry(key, device) for key in {torch.float32, dtype}}
    samples = measure.interleave(
        entries | {f"peak {key}": entry for key, entry in peaks.items()}, device, settings.repeats
    )
    per_s = {key: 2 * _PEAK_SIZE**3 / min(samples[f"peak {key}"].wall) for key in peaks}
    unit = 2 * n * options.hidden * options.vocabulary
    eager_times = [samples[label].wall for label in ("eager", "eager_float") if label in entries]
    fastest = min(eager_times, key=statistics.median) if eager_times else None
    for label in entries:
        row, times = rows[label], samples[label]
        row.status, row.rounds = "ok", len(times.wall)
        row.wall_ms, row.cpu_ms = (1e3 * statistics.median(values) for values in (times.wall, times.cpu))
        row.wall_p20_ms, row.wall_p80_ms = (1e3 * measure.quantile(times.wall, q) for q in (0.2, 0.8))
        row.peak_gflop_per_s, row.native_gflop_per_s = per_s[torch.float32] / 1e9, per_s[dtype] / 1e9
        at_peak = sum(unit / per_s[key] for key in _product_dtypes(PROVIDERS[label], dtype, device))
        row.peak_share = 1e3 * at_peak / row.wall_ms
        if fastest is not None:
            row.over_eager = measure.paired_ratio(times.wall, fastest)
    return list(rows.values())


def _product_dtypes(provider: Provider, dtype: torch.dtype, device: torch.device) -> list[torch.dtype]:
    """In which dtype each unit of a provider's work runs."""
    native = not provider.ours or dtype == torch.float32 or native_products(device.type, dtype)
    return [dtype if native else torch.float32] * provider.units


def run_head(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    rows = [row for name in options.dtypes for row in run_dtype(options, settings, name)]
    writer = report.CsvWriter(report.output_path(options.out, "head"), HeadRow, environment)
    writer.write(rows)
    page = writer.path.with_suffix(".md")
    text = f"**The head.** {report.machine_line(environment)} {_markdown(rows)}"
    page.write_text(text + "\n")
    print(text, "", writer.path, page, sep="\n")
    return 1 if any(PROVIDERS[row.provider].ours and row.status != "ok" for row in rows) else 0


def _markdown(rows: list[HeadRow]) -> str:
    first = rows[0]
    title = (
        f"N = {first.rows} rows ({first.pairs} pairs), H = {first.hidden}, V = {first.vocabulary}, forward and "
        "backward. `chunked_nll` is a sum of log-probs, without pairs."
    )
    lines = []
    for row in rows:
        cells = [row.provider, row.dtype, row.status, *[""] * 6]
        if row.wall_ms is not None:
            cells[2:] = [
                f"{row.wall_ms:.0f} ({row.wall_p20_ms:.0f}-{row.wall_p80_ms:.0f})",
                "" if row.over_eager is None else f"{row.over_eager:.2f}",
                str(row.units),
                f"{row.peak_share:.2f}",
                f"{row.extra_mib:.0f}",
                f"{row.error_loss:.1e}",
                f"{max(row.error_hidden or 0.0, row.error_weight or 0.0):.1e}",
            ]
        lines.append(cells)
    header = [
        "head",
        "dtype",
        "ms (p20-p80)",
        "÷ eager",
        "products",
        "share of their peak",
        "peak MiB",
        "loss error",
        "gradient error",
    ]
    return f"{title}\n\n{report.markdown_table(header, lines, 2)}"
