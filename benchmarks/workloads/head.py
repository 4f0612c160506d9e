"""The head: losses from hidden states and a weight, ours against logits in memory and against peers.

Two losses, each forward alone and with its backward: SPO's pair loss of 2P sequences (eq. 8 with uniform weights), and
the sum of every token's exact KL to a reference head. Everyone computes the same scalar and its gradients by hidden
states and weight, with one exception that says so: PyTorch's chunked linear cross-entropy has no per-token result, so
it gets a plain sum of log-probs, the same matrix products without pairs.

Work is counted in units of one matrix product of all rows, 2 N H V operations. Forward and backward of the pair loss
are three for who keeps the logits or has the gradients in the forward, four for who recomputes; of the KL, which has
two heads of which one learns, four and six. The share of the peak is the time these products take at the peaks measured
beside (a square product of each dtype, in the same round), over the time taken. Products of other shapes have another
peak: beside everyone run the fewest products that the loss takes, alone, whole and into memory that is there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks.harness import measure
from benchmarks.harness import results as report
from benchmarks.harness.case import Settings
from spo_kernels.precision import native_products

DEFAULT_PAIRS = 8
_ALPHA = 0.1
_PEAK_SIZE = 2048
# The gate: relative to float64, by norm. Eager in bfloat16 rounds the logits, which costs it percents.
_GATE_BUDGET = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Heads of real models, (V, H).
MODELS = {
    "Llama 2 7B": (32000, 4096),
    "SmolLM 135M": (49152, 576),
    "Llama 3.2 1B": (128256, 2048),
    "Qwen2.5 0.5B": (151936, 896),
    "Gemma 3 1B": (262144, 1152),
}


class Size(NamedTuple):
    pairs: int
    tokens: int  # of a sequence
    hidden: int
    vocabulary: int

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens


class Inputs(NamedTuple):
    """hidden and weight are leaves."""

    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T]
    ref_hidden: Tensor
    ref_weight: Tensor


Loss = Callable[[Inputs], Tensor]


def _pair_loss(token_logps: Tensor) -> Tensor:
    logp_w, logp_l = token_logps.sum(-1).chunk(2)
    return -F.logsigmoid(_ALPHA * (logp_w - logp_l)).mean() / _ALPHA


def _eager(x: Inputs) -> Tensor:
    return _pair_loss(F.log_softmax(F.linear(x.hidden, x.weight), -1).gather(-1, x.labels[..., None])[..., 0])


def _eager_float(x: Inputs) -> Tensor:
    return _pair_loss(F.log_softmax(F.linear(x.hidden, x.weight).float(), -1).gather(-1, x.labels[..., None])[..., 0])


def _cross_entropy(x: Inputs) -> Tensor:
    logits = F.linear(x.hidden, x.weight).flatten(0, 1)
    return _pair_loss(-F.cross_entropy(logits, x.labels.flatten(), reduction="none").view(x.labels.shape))


def _chunked_nll(x: Inputs) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn and store the logits
        return F.linear_cross_entropy(
            x.hidden.flatten(0, 1),
            x.weight,
            x.labels.flatten(),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )


def _liger(x: Inputs) -> Tensor:
    """DPO without a reference is eq. 8 times alpha. Chunks of a pair, gradients in the forward, compiled inside."""
    dpo = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss: Tensor = dpo(beta=_ALPHA, use_ref_model=False, compute_nll_loss=False)(x.weight, x.hidden, x.labels)[0]
    return loss / _ALPHA


def _cut_cross_entropy(x: Inputs) -> Tensor:
    """Its implementation for devices without Triton: compiled, with the logits in memory."""
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    labels = x.labels.flatten()
    nll = linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, labels, impl="torch_compile", reduction="none")
    return _pair_loss(-nll.view(x.labels.shape))


def _trl(x: Inputs) -> Tensor:
    """Tiles of 4096 rows by 32768 columns, as TRL's trainers call it; recomputes."""
    chunked = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    logps = chunked.apply(x.hidden.flatten(0, 1), x.weight, None, x.labels.flatten(), 1.0, 32768, None, 1.0, ())[0]
    return _pair_loss(logps.view(x.labels.shape))


def _ours(route: str) -> Loss:
    loss = spo_kernels.LinearSPOLoss(_ALPHA, route=route)
    return lambda x: loss(x.hidden, x.weight, x.labels)[0]


def _kl_of(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logps, ref_logps = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return (logps.exp() * (logps - ref_logps)).sum()


def _eager_kl(x: Inputs) -> Tensor:
    return _kl_of(F.linear(x.hidden, x.weight), F.linear(x.ref_hidden, x.ref_weight))


def _eager_kl_float(x: Inputs) -> Tensor:
    return _kl_of(F.linear(x.hidden, x.weight).float(), F.linear(x.ref_hidden, x.ref_weight).float())


def _trl_kl(x: Inputs) -> Tensor:
    """Its generalized divergence at beta = 1, the KL from student to teacher."""
    chunked = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    student, teacher = x.hidden.flatten(0, 1), x.ref_hidden.flatten(0, 1)
    divergence: Tensor = chunked.apply(student, x.weight, None, teacher, x.ref_weight, None, 1.0)[0]
    return divergence.sum()


def _our_kl_at_once(x: Inputs) -> Tensor:
    return spo_kernels.linear_kl_loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight)


def _our_kl(x: Inputs) -> Tensor:
    return spo_kernels.linear_token_kl(x.hidden, x.weight, x.ref_hidden, x.ref_weight).sum()


@dataclass(frozen=True)
class Provider:
    loss: Loss
    units: int  # of matrix work, forward and backward
    ours: bool = False
    compiled: bool = False
    pairs: bool = True  # False: a sum over tokens
    half_only: bool = False
    backward_only: bool = False  # the same as another of ours without gradients


# By loss.
PROVIDERS: dict[str, dict[str, Provider]] = {
    "pairs": {
        "recompute_free": Provider(_ours("recompute_free"), 3, ours=True, backward_only=True),
        "recompute": Provider(_ours("recompute"), 4, ours=True),
        "eager": Provider(_eager, 3),
        "eager_float": Provider(_eager_float, 3, half_only=True),
        "cross_entropy": Provider(_cross_entropy, 3),
        "compile": Provider(_eager_float, 3, compiled=True),
        **({"chunked_nll": Provider(_chunked_nll, 3, pairs=False)} if hasattr(F, "linear_cross_entropy") else {}),
        **({"liger": Provider(_liger, 3)} if find_spec("liger_kernel") else {}),
        **({"cut_cross_entropy": Provider(_cut_cross_entropy, 3)} if find_spec("cut_cross_entropy") else {}),
        **({"trl": Provider(_trl, 4)} if find_spec("trl") else {}),
    },
    "kl": {
        "recompute_free": Provider(_our_kl_at_once, 4, ours=True, pairs=False, backward_only=True),
        "recompute": Provider(_our_kl, 6, ours=True, pairs=False),
        "eager": Provider(_eager_kl, 4, pairs=False),
        "eager_float": Provider(_eager_kl_float, 4, half_only=True, pairs=False),
        "compile": Provider(_eager_kl_float, 4, compiled=True, pairs=False),
        **({"trl": Provider(_trl_kl, 6, pairs=False)} if find_spec("trl") else {}),
    },
}
NAMES = tuple(dict.fromkeys(name for providers in PROVIDERS.values() for name in providers))
OURS = {name for providers in PROVIDERS.values() for name, provider in providers.items() if provider.ours}
FORWARD_UNITS = {"pairs": 1, "kl": 2}
PASSES = ("fwd", "fwd_bwd")


@dataclass
class HeadRow:
    """One implementation of one loss and pass at one size and dtype, in one run of the command."""

    loss: str
    pass_name: str
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
    over_products: float | None = None  # over that of the loss's fewest products alone, in the dtype


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("--pairs", type=count, help=f"pairs P (default: {DEFAULT_PAIRS}; 1 with --models)")
    parser.add_argument(
        "--tokens", type=count, help="tokens a sequence: N = 2 P tokens rows (default: 256; 128 with --models)"
    )
    parser.add_argument("--hidden", type=count, default=768)
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument(
        "--losses", choices=PROVIDERS, nargs="+", default=[*PROVIDERS], metavar="LOSS", help="pairs, kl"
    )
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=[*PASSES], metavar="PASS", help="fwd, fwd_bwd")
    parser.add_argument("--providers", choices=NAMES, nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        metavar="MODEL",
        help=f"heads of real models in place of --vocabulary and --hidden: {', '.join(MODELS)} (none named: all)",
    )


def _clear(x: Inputs) -> None:
    x.hidden.grad = x.weight.grad = None


def _leaves(x: Inputs) -> dict[str, Tensor]:
    return {"hidden": x.hidden, "weight": x.weight}


def _make_inputs(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = (2 * size.pairs, size.tokens)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # Logits of unit variance: a softmax that is neither flat nor a point.
    hidden, weight = noise(*shape, size.hidden), noise(size.vocabulary, size.hidden) / size.hidden**0.5
    labels = torch.randint(size.vocabulary, shape, generator=generator, device=device)
    # A policy that has moved from its reference.
    ref_hidden = hidden + noise(*shape, size.hidden) / 2
    ref_weight = weight + noise(*weight.shape) / (4 * size.hidden**0.5)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
        ref_hidden.to(dtype),
        ref_weight.to(dtype),
    )


Truth = dict[str, Tensor]


def _truth(loss: Loss, x: Inputs) -> Truth:
    """The loss and its gradients in float64, a pair at a time, so that the logits fit."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight))
    ref_hidden, ref_weight = x.ref_hidden.double(), x.ref_weight.double()
    pairs = len(x.labels) // 2
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for pair in range(pairs):
        both = [pair, pairs + pair]
        part = loss(Inputs(hidden[both], weight, x.labels[both], ref_hidden[both], ref_weight))
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"loss": total, "hidden": hidden.grad, "weight": weight.grad}


def _sum_of_logps(x: Inputs) -> Tensor:
    return -F.log_softmax(F.linear(x.hidden, x.weight), -1).gather(-1, x.labels[..., None]).sum()


def _truths(loss: str, providers: Iterable[Provider], x: Inputs) -> dict[bool, Truth]:
    """By whether there are pairs."""
    needed = {provider.pairs for provider in providers}
    over_tokens = _eager_kl if loss == "kl" else _sum_of_logps
    return {pairs: _truth(_eager if pairs else over_tokens, x) for pairs in needed}


def _gate(loss_of: Loss, x: Inputs, truth: Truth, scale: int) -> dict[str, float]:
    """Relative errors of loss and gradients, by norm; scale: what they are to be multiplied by."""
    _clear(x)
    loss = loss_of(x)
    loss.backward()
    got = {"loss": loss.detach(), **{name: leaf.grad for name, leaf in _leaves(x).items()}}
    errors = {}
    for name, value in got.items():
        if value is None:
            errors[name] = math.inf
            continue
        error, size = 0.0, 0.0  # some elements at a time: a weight of a large model twice more in float64 would not fit
        for part, true in zip(value.reshape(-1).split(1 << 24), truth[name].reshape(-1).split(1 << 24), strict=True):
            error += float((part.double() * scale - true).square().sum())
            size += float(true.square().sum())
        errors[name] = math.sqrt(error / size)
    _clear(x)
    return errors


def _peak_entry(dtype: torch.dtype, device: torch.device) -> measure.Entry:
    a, b, out = (torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=dtype, device=device) for _ in range(3))
    return measure.Entry(lambda: torch.mm(a, b.t(), out=out))


def _products_entry(x: Inputs, loss: str, pass_name: str) -> measure.Entry:
    hidden, weight = x.hidden.detach().flatten(0, 1), x.weight.detach()
    heads = [(hidden, weight)]
    if loss == "kl":
        heads.append((x.ref_hidden.flatten(0, 1), x.ref_weight))
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        for operand, of_vocabulary in heads:
            torch.mm(operand, of_vocabulary.t(), out=logits)
        if pass_name == "fwd_bwd":
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), hidden, out=dweight)

    return measure.Entry(call)


def _entry(loss: Loss, x: Inputs, pass_name: str) -> measure.Entry:
    def forward() -> None:
        with torch.no_grad():
            loss(x)

    def both() -> None:
        loss(x).backward()

    def clear() -> None:
        _clear(x)

    return measure.Entry(forward if pass_name == "fwd" else both, clear, clear)


class LossRunner:
    """Everyone who has a loss, at one size and dtype: compared with float64 once, then timed pass by pass."""

    def __init__(
        self, size: Size, dtype_name: str, loss: str, settings: Settings, names: Iterable[str] | None = None
    ) -> None:
        self._size, self._dtype_name, self._loss, self._settings = size, dtype_name, loss, settings
        dtype = DTYPES[dtype_name]
        self._providers = {
            name: provider
            for name, provider in PROVIDERS[loss].items()
            if name in (names or PROVIDERS[loss]) and not (provider.half_only and dtype == torch.float32)
        }
        # Compiled for this size alone, those that compile inside included.
        torch._dynamo.reset()
        self._losses = {
            name: torch.compile(provider.loss, dynamic=False, fullgraph=True) if provider.compiled else provider.loss
            for name, provider in self._providers.items()
        }
        self._inputs = _make_inputs(size, dtype, settings.device)
        truths = _truths(loss, self._providers.values(), self._inputs)
        self._errors = {
            # The truth is a sum over pairs.
            name: _gate(self._losses[name], self._inputs, truths[provider.pairs], size.pairs if provider.pairs else 1)
            for name, provider in self._providers.items()
        }

    def run(self, pass_name: str) -> list[HeadRow]:
        rows: dict[str, HeadRow] = {}
        entries: dict[str, measure.Entry] = {}
        for label, provider in self._providers.items():
            if provider.backward_only and pass_name == "fwd":
                continue
            rows[label] = self._gated_row(label, pass_name)
            if rows[label].status == "":
                entries[label] = _entry(self._losses[label], self._inputs, pass_name)
                self._measure_memory(rows[label], entries[label])
        self._measure_time(rows, entries, pass_name)
        return list(rows.values())

    def _gated_row(self, label: str, pass_name: str) -> HeadRow:
        errors, size = self._errors[label], self._size
        row = HeadRow(
            self._loss, pass_name, label, self._dtype_name, size.rows, size.hidden, size.vocabulary, size.pairs
        )
        row.units = FORWARD_UNITS[self._loss] if pass_name == "fwd" else self._providers[label].units
        row.error_loss, row.error_hidden, row.error_weight = errors.values()
        worst = max(errors.values())
        if not worst <= _GATE_BUDGET[DTYPES[self._dtype_name]]:
            row.status = f"wrong: off by {worst:.3g}, relative"
        return row

    def _measure_memory(self, row: HeadRow, entry: measure.Entry) -> None:
        entry.call()  # without gradients a compiled loss is another one
        peak = measure.peak_memory(entry, self._settings.device)
        leaves = _leaves(self._inputs).values()
        gradients = sum(leaf.nbytes for leaf in leaves) if row.pass_name == "fwd_bwd" else 0
        row.extra_mib = (peak.allocator - gradients) / (1 << 20)
        row.extra_resident_mib = None if peak.resident is None else (peak.resident - gradients) / (1 << 20)

    def _measure_time(self, rows: dict[str, HeadRow], entries: dict[str, measure.Entry], pass_name: str) -> None:
        dtype, device = DTYPES[self._dtype_name], self._settings.device
        peaks = {key: _peak_entry(key, device) for key in {torch.float32, dtype}}
        beside = {f"peak {key}": entry for key, entry in peaks.items()}
        beside["products"] = _products_entry(self._inputs, self._loss, pass_name)
        samples = measure.interleave(entries | beside, device, self._settings.repeats)
        per_s = {key: 2 * _PEAK_SIZE**3 / statistics.median(samples[f"peak {key}"].wall) for key in peaks}
        unit = 2 * self._size.rows * self._size.hidden * self._size.vocabulary
        eager_times = [samples[label].wall for label in ("eager", "eager_float") if label in entries]
        fastest = min(eager_times, key=statistics.median) if eager_times else None
        for label in entries:
            row, times = rows[label], samples[label]
            row.status, row.rounds = "ok", len(times.wall)
            row.wall_ms, row.cpu_ms = (1e3 * statistics.median(values) for values in (times.wall, times.cpu))
            row.wall_p20_ms, row.wall_p80_ms = (1e3 * measure.quantile(times.wall, q) for q in (0.2, 0.8))
            row.peak_gflop_per_s, row.native_gflop_per_s = per_s[torch.float32] / 1e9, per_s[dtype] / 1e9
            peak = samples[f"peak {_product_dtype(self._providers[label], dtype, device)}"]
            squares = (row.units or 0) * unit / (2 * _PEAK_SIZE**3)
            row.peak_share = squares * measure.paired_ratio(peak.wall, times.wall)
            row.over_products = measure.paired_ratio(times.wall, samples["products"].wall)
            if fastest is not None:
                row.over_eager = measure.paired_ratio(times.wall, fastest)


def _product_dtype(provider: Provider, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    native = not provider.ours or dtype == torch.float32 or native_products(device.type, dtype)
    return dtype if native else torch.float32


def run_head(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    names = set(options.providers or NAMES)
    for loss in options.losses:
        if not names & PROVIDERS[loss].keys():
            raise ValueError(f"none of {', '.join(sorted(names))} has the loss {loss!r}: leave it out of --losses")
    of_models = options.models is not None
    heads = {"": (options.vocabulary, options.hidden)}
    if of_models:
        heads = {name: MODELS[name] for name in options.models or MODELS}
    writer = report.CsvWriter(report.output_path(options.out, "models" if of_models else "head"), HeadRow, environment)
    page = writer.path.with_suffix(".md")
    rows: list[HeadRow] = []
    for name, (vocabulary, hidden) in heads.items():
        # A call at a large model's size takes seconds even at 256 rows, and eager gigabytes.
        pairs, tokens = (
            options.pairs or (1 if of_models else DEFAULT_PAIRS),
            options.tokens or (128 if of_models else 256),
        )
        size = Size(pairs, tokens, hidden, vocabulary)
        for dtype in options.dtypes:
            for loss in options.losses:
                print(f"{name or 'head'}: [{vocabulary}, {hidden}] {dtype}, {loss}", flush=True)
                runner = LossRunner(size, dtype, loss, settings, options.providers)
                for pass_name in options.passes:
                    done = runner.run(pass_name)
                    writer.write(done)
                    rows += done
    text = f"{report.machine_line(environment)} {_models(rows) if of_models else _markdown(rows)}"
    text = f"**{'Heads of real models' if of_models else 'The head'}.** {text}"
    page.write_text(text + "\n")
    print(text, "", writer.path, page, sep="\n")
    return 1 if any(row.provider in OURS and row.status != "ok" for row in rows) else 0


def _models(rows: list[HeadRow]) -> str:
    """A line a model, loss and pass: the fastest of ours, and the peers' times as multiples of it."""
    groups: dict[tuple[int, int, str, str, str], dict[str, HeadRow]] = {}
    for row in rows:
        key = (row.vocabulary, row.hidden, row.dtype, row.loss, row.pass_name)
        groups.setdefault(key, {})[row.provider] = row
    models = {size: name for name, size in MODELS.items()}
    peers = [name for name in NAMES if name not in OURS and any(name in group for group in groups.values())]
    lines: list[list[str]] = []
    for (vocabulary, hidden, dtype, loss, pass_name), group in groups.items():
        times = {name: row.wall_ms for name, row in group.items() if row.wall_ms is not None}
        name = min(OURS & times.keys(), key=times.__getitem__, default=None)
        if name is None:
            continue
        best = group[name]
        cells = [models[vocabulary, hidden], f"{vocabulary} x {hidden}", dtype, loss, pass_name, name]
        cells.append(f"{best.wall_ms:.0f} ({best.wall_p20_ms:.0f}-{best.wall_p80_ms:.0f})")
        cells += [f"{best.over_products:.2f}", f"{best.extra_mib:.0f}"]
        for peer in peers:
            ratio = times[peer] / times[name] if peer in times else None
            if ratio is None:
                cells.append("wrong" if peer in group else "")
            else:
                cells.append(f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**")
        lines.append(cells)
    header = ["model", "V x H", "dtype", "loss", "pass", "ours", "ms (p20-p80)", "÷ products alone", "peak MiB", *peers]
    title = (
        f"N = {rows[0].rows} rows ({rows[0].pairs} pairs). Peers' medians as multiples of the fastest of ours; bold: a "
        "peer wins. `chunked_nll` is a sum of log-probs, without pairs; wrong: beyond the correctness gate."
    )
    return f"{title}\n\n{report.markdown_table(header, lines, 6)}"


def _markdown(rows: list[HeadRow]) -> str:
    first = rows[0]
    title = (
        f"N = {first.rows} rows ({first.pairs} pairs), H = {first.hidden}, V = {first.vocabulary}. `chunked_nll` is a "
        "sum of log-probs, without pairs."
    )
    lines = []
    for row in rows:
        cells = [row.loss, row.pass_name, row.provider, row.dtype, row.status, *[""] * 7]
        if row.wall_ms is not None:
            cells[4:] = [
                f"{row.wall_ms:.0f} ({row.wall_p20_ms:.0f}-{row.wall_p80_ms:.0f})",
                "" if row.over_eager is None else f"{row.over_eager:.2f}",
                f"{row.over_products:.2f}",
                str(row.units),
                f"{row.peak_share:.2f}",
                f"{row.extra_mib:.0f}",
                f"{row.error_loss:.1e}",
                f"{max(row.error_hidden or 0.0, row.error_weight or 0.0):.1e}",
            ]
        lines.append(cells)
    header = [
        "loss",
        "pass",
        "head",
        "dtype",
        "ms (p20-p80)",
        "÷ eager",
        "÷ products alone",
        "products",
        "share of their peak",
        "peak MiB",
        "loss error",
        "gradient error",
    ]
    return f"{title}\n\n{report.markdown_table(header, lines, 4)}"
