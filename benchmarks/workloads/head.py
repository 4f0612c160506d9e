"""The head: losses from hidden states and a weight, against peers and against the matrix products that all need.

Work is counted in products of all rows, 2 N H V operations each. The *share of the peak* is the time that a loss's
products would take at the rate of a square product, over the time taken. Products of other shapes run at other rates,
so every provider is also compared with the fewest products that the loss needs, alone. The same library makes them,
untiled, into memory allocated beforehand. Both yardsticks are timed in the same rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.harness.bench import Settings
from benchmarks.harness.contest import Contender, contest
from benchmarks.harness.gate import Verdict, by_norm, judge, relative_error
from benchmarks.harness.rows import Memory, Timing, keyed, part
from benchmarks.peers import eager
from benchmarks.peers.head import EAGER, FORWARD_UNITS, OURS, PROVIDERS, Inputs, Loss, Provider, eager_kl, eager_pairs
from spo_kernels.precision import native_products

# Side of the square product. On a GPU the product must take longer than its launch. With 2048 a single call measured
# mostly the host's time, and shares of the "peak" came out far above 1.
_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
# Budgets of errors relative to float64, by norm. In bfloat16 eager rounds the logits, so its errors are percents.
_BUDGETS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("fwd", "fwd_bwd")

Truth = dict[str, Tensor]


class Size(NamedTuple):
    pairs: int
    tokens: int  # of a sequence
    hidden: int
    vocabulary: int

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens


@dataclass
class HeadRow:
    """One implementation of one loss and pass at one size and dtype."""

    loss: str
    pass_name: str
    provider: str
    dtype: str
    rows: int
    hidden: int
    vocabulary: int
    pairs: int
    status: str = ""
    timing: Timing | None = field(default=None, metadata=part(Timing))
    units: int | None = None
    peak_share: float | None = None
    peak_gflop_per_s: float | None = None  # of the square product in float32
    native_gflop_per_s: float | None = None  # of the square product in the row's dtype
    memory: Memory | None = field(default=None, metadata=part(Memory))  # beyond inputs and gradients
    error: dict[str, float] = field(default_factory=dict, metadata=keyed("loss", "hidden", "weight"))
    # eager: the faster of the eager variants. products: the fewest products, in the row's dtype.
    over: dict[str, float] = field(default_factory=dict, metadata=keyed("eager", "products"))

    @property
    def ours(self) -> bool:
        return self.provider in OURS


def make_inputs(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = (2 * size.pairs, size.tokens)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # The logits have unit variance, so the softmax is neither flat nor a point.
    hidden, weight = noise(*shape, size.hidden), noise(size.vocabulary, size.hidden) / size.hidden**0.5
    labels = torch.randint(size.vocabulary, shape, generator=generator, device=device)
    # The policy has moved away from its reference.
    ref_hidden = hidden + noise(*shape, size.hidden) / 2
    ref_weight = weight + noise(*weight.shape) / (4 * size.hidden**0.5)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
        ref_hidden.to(dtype),
        ref_weight.to(dtype),
    )


def _sum_of_nll(x: Inputs) -> Tensor:
    return -eager.token_logps(F.linear(x.hidden, x.weight), x.labels).sum()


def _truth(loss: Loss, x: Inputs) -> Truth:
    """The loss and its gradients in float64. They are summed pair by pair, so that the logits fit the memory."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight))
    ref_hidden, ref_weight = x.ref_hidden.double(), x.ref_weight.double()
    pairs = len(x.labels) // 2
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for pair in range(pairs):
        both = [pair, pairs + pair]
        pair_loss = loss(Inputs(hidden[both], weight, x.labels[both], ref_hidden[both], ref_weight))
        pair_loss.backward()
        total += pair_loss.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"loss": total, "hidden": hidden.grad, "weight": weight.grad}


def _gate(loss: Loss, x: Inputs, truth: Truth, scale: int) -> Verdict:
    """Errors of loss and gradients. scale: the factor from the provider's loss to the truth."""
    _clear(x)
    value = loss(x)
    value.backward()
    got = {"loss": value.detach(), "hidden": x.hidden.grad, "weight": x.weight.grad}
    errors = {name: relative_error(got[name], truth[name], scale) for name in truth}
    _clear(x)
    return by_norm(errors, _BUDGETS[x.hidden.dtype])


def _clear(x: Inputs) -> None:
    x.hidden.grad = x.weight.grad = None


def _entry(loss: Loss, x: Inputs, pass_name: str) -> measure.Entry:
    def forward() -> None:
        with torch.no_grad():
            loss(x)

    def both() -> None:
        loss(x).backward()

    def clear() -> None:
        _clear(x)

    return measure.Entry(forward if pass_name == "fwd" else both, clear, clear)


def _peak_entry(dtype: torch.dtype, device: torch.device) -> measure.Entry:
    side = _PEAK_SIZE[device.type]
    a, b, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    return measure.Entry(lambda: torch.mm(a, b.t(), out=out))


def _products_entry(x: Inputs, loss: str, pass_name: str) -> measure.Entry:
    """The fewest products that the loss takes."""
    hidden, weight = x.hidden.detach().flatten(0, 1), x.weight.detach()
    heads = [(hidden, weight)]
    if loss == "kl":
        heads.append((x.ref_hidden.flatten(0, 1), x.ref_weight))
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        for states, head_weight in heads:
            torch.mm(states, head_weight.t(), out=logits)
        if pass_name == "fwd_bwd":
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), hidden, out=dweight)

    return measure.Entry(call)


class LossRunner:
    """All providers of a loss at one size and dtype: compared with float64 once, then timed pass by pass."""

    def __init__(
        self, size: Size, dtype_name: str, loss: str, settings: Settings, names: Iterable[str] | None = None
    ) -> None:
        self._size, self._dtype_name, self._loss, self._settings = size, dtype_name, loss, settings
        self._dtype = DTYPES[dtype_name]
        self._providers = {
            name: provider
            for name, provider in PROVIDERS[loss].items()
            if name in (names or PROVIDERS[loss]) and not (provider.half_only and self._dtype == torch.float32)
        }
        # Everything is compiled for this size alone, including what a peer compiles itself.
        torch._dynamo.reset()
        self._losses = {
            name: torch.compile(provider.loss, dynamic=False, fullgraph=True) if provider.compiled else provider.loss
            for name, provider in self._providers.items()
        }
        self._inputs = make_inputs(size, self._dtype, settings.device)
        self._verdicts = self._judge()

    def _judge(self) -> dict[str, Verdict]:
        over_tokens = eager_kl if self._loss == "kl" else _sum_of_nll
        truths = {
            pairs: _truth(eager_pairs if pairs else over_tokens, self._inputs)
            for pairs in {provider.pairs for provider in self._providers.values()}
        }

        def check(name: str, provider: Provider) -> Verdict:
            # The truth is a sum over pairs. The providers' loss is the mean.
            scale = self._size.pairs if provider.pairs else 1
            return _gate(self._losses[name], self._inputs, truths[provider.pairs], scale)

        return {name: judge(partial(check, name, provider)) for name, provider in self._providers.items()}

    def run(self, pass_name: str) -> list[HeadRow]:
        names = [name for name, entry in self._providers.items() if not (entry.backward_only and pass_name == "fwd")]
        rows = {name: self._row(name, pass_name) for name in names}
        device = self._settings.device
        beside = {f"peak {dtype}": _peak_entry(dtype, device) for dtype in {torch.float32, self._dtype}}
        beside["products"] = _products_entry(self._inputs, self._loss, pass_name)
        over = {"eager": EAGER, "products": ["products"]}
        contenders = [self._contender(row, pass_name) for row in rows.values()]
        samples = contest(contenders, self._settings, over=over, beside=beside)
        for name, row in rows.items():
            if row.status == "ok":
                self._shares(row, samples[name], samples)
        return list(rows.values())

    def _row(self, name: str, pass_name: str) -> HeadRow:
        size = self._size
        return HeadRow(
            loss=self._loss,
            pass_name=pass_name,
            provider=name,
            dtype=self._dtype_name,
            rows=size.rows,
            hidden=size.hidden,
            vocabulary=size.vocabulary,
            pairs=size.pairs,
            units=FORWARD_UNITS[self._loss] if pass_name == "fwd" else self._providers[name].units,
        )

    def _contender(self, row: HeadRow, pass_name: str) -> Contender:
        entry = _entry(self._losses[row.provider], self._inputs, pass_name)
        gradients = self._inputs.hidden.nbytes + self._inputs.weight.nbytes if pass_name == "fwd_bwd" else 0
        return Contender(row, entry, lambda: self._verdicts[row.provider], entry, gradients)

    def _shares(self, row: HeadRow, times: measure.Samples, samples: Mapping[str, measure.Samples]) -> None:
        device, dtype = self._settings.device, self._dtype
        square = 2 * _PEAK_SIZE[device.type] ** 3
        float32, native = (
            square / statistics.median(samples[f"peak {key}"].wall) / 1e9 for key in (torch.float32, dtype)
        )
        row.peak_gflop_per_s, row.native_gflop_per_s = float32, native
        products = dtype if row.provider not in OURS else _product_dtype(dtype, device)
        unit = 2 * self._size.rows * self._size.hidden * self._size.vocabulary
        squares = (row.units or 0) * unit / square
        row.peak_share = squares * measure.paired_ratio(samples[f"peak {products}"].wall, times.wall)


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which our products run."""
    return dtype if dtype == torch.float32 or native_products(device.type, dtype) else torch.float32
