"""For tests of heads: two heads over one vocabulary, the formulas in plain torch, and counters of work and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import IGNORE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spo_kernels import (
    SPOLoss,
    linear_kl_loss,
    linear_token_kl,
    linear_token_logps,
)
from spo_kernels.linear import tiles

Options = dict[str, Any]


# Each option alone, then all. Gemma 2 has a softcap, Cohere a logit scale, and sampling a temperature.
OPTIONS: dict[str, Options] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": -0.5},
    "all": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.6},
}


WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    wide: torch.dtype | None = None,
) -> Tensor:
    """What the options mean: a product in the dtype of the operands, and the rest in a wide dtype if one is given."""
    product = F.linear(hidden, weight, bias)
    z = logit_scale * (product if wide is None else product.to(wide))
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORE
    return logits.log_softmax(-1).gather(-1, labels.where(valid, 0)[..., None])[..., 0].where(valid, 0)


def entropy_of(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def kl_of(logits: Tensor, ref_logits: Tensor, divergence: str = "kl", mixture: float = 0.5) -> Tensor:
    """The KL, or what the options of the same names make of it."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if divergence != "jsd":
        return kl(log_p, log_q) if divergence == "kl" else kl(log_q, log_p)
    log_m = (mixture * log_p.exp() + (1 - mixture) * log_q.exp()).log()
    return mixture * kl(log_p, log_m) + (1 - mixture) * kl(log_q, log_m)


class Inputs:
    """Two heads over one vocabulary with labels and a mask; every fourth row ignored, every third masked."""

    def __init__(self, *rows: int, h: int = 8, v: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = noise(*rows, h), noise(v, h), noise(v)
        self.ref_hidden, self.ref_weight, self.ref_bias = noise(*rows, h + 3), noise(v, h + 3), noise(v)
        self.labels = torch.randint(0, v, rows, generator=generator)
        self.labels.view(-1)[::4] = IGNORE
        self.mask = torch.ones(rows, dtype=torch.bool)
        self.mask.view(-1)[1::3] = False
        self.upstream = torch.linspace(-1, 2, self.labels.numel(), dtype=torch.float64).view(rows)
        self.options: Options = {}  # what a test calls with, for formulas that depend on them

    @property
    def policy(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    @property
    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ref_hidden, self.ref_weight, self.ref_bias


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Any = 1.0) -> list[Tensor]:
    """The function's value, and the gradient of ``(value * upstream).sum()`` by each input."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*leaves)
    loss = (out * torch.as_tensor(upstream, dtype=out.dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def all_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        near(got, want)


def set_tile_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int | None) -> None:
    monkeypatch.setitem(tiles.TILE_SIZES, "cpu", tiles.TILE_SIZES["cpu"]._replace(**sizes))


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 3, 1000])


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "logps": (
        lambda x, policy, **kw: linear_token_logps(policy[0], policy[1], x.labels, policy[2], **kw),
        lambda x, z, ref_z: logps_of(z, x.labels),
    ),
    "entropy": (
        lambda x, policy, **kw: linear_token_logps(
            policy[0], policy[1], x.labels, policy[2], return_entropy=True, **kw
        )[1],
        lambda x, z, ref_z: entropy_of(z).where(x.labels != IGNORE, 0),
    ),
    "kl": (
        lambda x, policy, **kw: linear_token_kl(
            policy[0], policy[1], x.ref_hidden, x.ref_weight, x.mask, policy[2], x.ref_bias, **kw
        ),
        lambda x, z, ref_z: kl_of(z, ref_z).where(x.mask, 0),
    ),
    "kl_loss": (
        lambda x, policy, **kw: linear_kl_loss(
            policy[0], policy[1], x.ref_hidden, x.ref_weight, x.mask, policy[2], x.ref_bias, row_weight=x.upstream, **kw
        ),
        lambda x, z, ref_z: (kl_of(z, ref_z).where(x.mask, 0) * x.upstream).sum(),
    ),
}


def pair_inputs(average_rows: int = 6, **kwargs: Any) -> Inputs:
    """Three pairs: 6 sequences of ``average_rows`` tokens."""
    return Inputs(6, average_rows, **kwargs)


def objective_of(
    x: Inputs,
    policy: tuple[Tensor, ...],
    *,
    alpha: float = 0.1,
    weight: Any = None,
    pair_weight: Tensor | None = None,
    center: bool = False,
    average: bool = False,
    nll_weight: float = 0.0,
    beta: float = 0.0,
    wide: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """`SPOLoss` of the logits, cast to ``wide`` if given, plus the NLL term."""
    z, ref_z = (logits_of(*of, **options).to(wide or of[0].dtype) for of in (policy, x.reference))
    importance = (lambda *_: pair_weight) if pair_weight is not None else weight
    loss = SPOLoss(alpha, beta, importance, center=center, average=average)
    kl = {}
    if beta:
        kl = {"kl_logits": z, "kl_ref_logits": ref_z, "kl_mask": x.mask}
    objective, _ = loss(z, x.labels, **kl)
    chosen = x.labels[: len(x.labels) // 2]
    return objective - nll_weight * logps_of(z[: len(chosen)], chosen).sum() / (chosen != IGNORE).sum()


def kl_arguments(x: Inputs) -> Options:
    names = ("kl_ref_hidden", "kl_ref_weight", "kl_ref_bias")
    return {**dict(zip(names, x.reference, strict=True)), "kl_mask": x.mask}


ROUTE = pytest.mark.parametrize("route", ["recompute", "recompute_free", "auto"])


class Calls(TorchDispatchMode):
    """Records the names of operations, the largest tensor they return, and the rows of each matrix product.

    Also the names of the operations, views aside, that take or return a matrix of at least `width` columns.
    """

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        self.rows_of_products: list[int] = []
        self.wide: list[str] = []
        self._width = width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        self.names.append(name)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if name in ("addmm", "mm", "addmm_"):
            self.rows_of_products.append(args[-2].shape[0])
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not func.is_view and any(x.dim() > 1 and x.shape[-1] >= self._width for x in touched):
            self.wide.append(name)
        return out


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of live allocations during a call, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
