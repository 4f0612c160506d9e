"""The options of the logits in the functions of a head, tile by tile, against eager PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from heads import Inputs, differentiate, entropy_of, kl_arguments, kl_of, logps_of, near
from options import (
    DIVERGENCES,
    EVERY,
    NUMBERS,
    PADDING,
    POLICY,
    REF_PADDING,
    Options,
    both_transformed,
    divergence_of,
    filled,
    transformed,
)
from oracle import IGNORE, assert_close, poisoned_memory
from torch import Tensor

from spo_kernels import (
    LinearSPOLoss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)

V, ALPHA, BETA, NLL = 37, 0.4, 0.3, 0.2


class Function(NamedTuple):
    ours: Callable[..., Tensor]  # (x, policy's head, options)
    formula: Callable[..., Tensor]  # (x, z, ref_z)


def valid(x: Inputs, values: Tensor) -> Tensor:
    return values.where(x.labels != IGNORE, 0)


def masked_kl(x: Inputs, z: Tensor, r: Tensor) -> Tensor:
    return kl_of(z, r, **divergence_of(x.options)).where(x.mask, 0)


def logps(x: Inputs, policy: tuple[Tensor, ...], **options: Any) -> Any:
    return linear_token_logps(policy[0], policy[1], x.labels, policy[2], **options)


def kl_inputs(x: Inputs, policy: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (policy[0], policy[1], x.ref_hidden, x.ref_weight, x.mask, policy[2], x.ref_bias)


OF_LOGPS: dict[str, Function] = {
    "linear_token_logps": Function(logps, lambda x, z, r: logps_of(z, x.labels)),
    "z-loss": Function(
        lambda x, policy, **kw: logps(x, policy, return_lse=True, **kw)[1].square().mean(),
        lambda x, z, r: valid(x, z.logsumexp(-1)).square().mean(),
    ),
    "entropy and lse": Function(
        lambda x, policy, **kw: torch.stack(logps(x, policy, return_entropy=True, return_lse=True, **kw)),
        lambda x, z, r: torch.stack([logps_of(z, x.labels), valid(x, entropy_of(z)), valid(x, z.logsumexp(-1))]),
    ),
    "linear_sequence_logps": Function(
        lambda x, policy, **kw: linear_sequence_logps(policy[0], policy[1], x.labels, policy[2], average=True, **kw),
        lambda x, z, r: logps_of(z, x.labels).sum(-1) / (x.labels != IGNORE).sum(-1).clamp(min=1),
    ),
    "packed": Function(
        lambda x, policy, **kw: linear_sequence_logps(
            policy[0].flatten(0, 1),
            policy[1],
            x.labels.flatten(),
            policy[2],
            cu_seqlens=torch.tensor([0, 5, 5, x.labels.numel()]),
            **{name: v.flatten() if isinstance(v, Tensor) and v.dim() else v for name, v in kw.items()},
        ),
        lambda x, z, r: torch.stack(
            [part.sum() for part in logps_of(z, x.labels).flatten().split([5, 0, x.labels.numel() - 5])]
        ),
    ),
}
OF_KL: dict[str, Function] = {
    "linear_token_kl": Function(lambda x, policy, **kw: linear_token_kl(*kl_inputs(x, policy), **kw), masked_kl),
    "linear_kl_loss": Function(
        lambda x, policy, **kw: linear_kl_loss(*kl_inputs(x, policy), row_weight=x.upstream, **kw),
        lambda x, z, r: (masked_kl(x, z, r) * x.upstream).sum(),
    ),
}


def objective(x: Inputs, z: Tensor, r: Tensor) -> Tensor:
    pairs = len(x.labels) // 2
    sums = logps_of(z, x.labels).sum(-1)
    preference = -F.logsigmoid(ALPHA * (sums[:pairs] - sums[pairs:])).mean() / ALPHA
    nll = -sums[:pairs].sum() / (x.labels[:pairs] != IGNORE).sum()
    return preference + NLL * nll + BETA * masked_kl(x, z, r).sum() / len(x.labels)


def spo_objective(route: str) -> Function:
    def ours(x: Inputs, policy: tuple[Tensor, ...], **options: Any) -> Tensor:
        loss = LinearSPOLoss(ALPHA, BETA, nll_weight=NLL, route=route, **options)
        return loss(policy[0], policy[1], x.labels, policy[2], kl_hidden=policy[0], **kl_arguments(x))[0]

    return Function(ours, objective)


MODULES = {route: spo_objective(route) for route in ("recompute", "recompute_free", "auto")}
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 3])


def check(function: Function, x: Inputs, options: Options) -> None:
    """Values and gradients.

    NaN for the functions: rows that are both ignored and masked, and rows of the weights after the vocabulary.
    """
    temperature = torch.linspace(0.5, 2, x.labels.numel()).view(x.labels.shape)
    options = x.options = filled(options, V, temperature, temperature.flip(-1))
    exact = (x.policy, x.reference)

    def formula(*policy: Tensor) -> Tensor:
        return function.formula(x, *both_transformed(F.linear(*policy), F.linear(*exact[1]), options))

    unread = ((x.labels == IGNORE) & ~x.mask)[..., None]
    assert unread.any()
    padding = (PADDING, REF_PADDING) if "vocab_size" in options else (0, 0)
    given = []
    for (hidden, weight, bias), rows in zip(exact, padding, strict=True):
        padded = (F.pad(weight, (0, 0, 0, rows), value=math.nan), F.pad(bias, (0, rows), value=math.nan))
        given.append((hidden.masked_fill(unread, math.nan), *padded))
    policy, (x.ref_hidden, x.ref_weight, x.ref_bias) = given

    upstream = torch.linspace(-1, 2, function.ours(x, policy, **options).numel(), dtype=torch.float64)
    upstream = upstream.view_as(function.ours(x, policy, **options))
    with poisoned_memory():
        got = differentiate(lambda *head: function.ours(x, head, **options), policy, upstream)
    want = differentiate(formula, exact[0], upstream)
    for actual, expected in zip(got[:2], want[:2], strict=True):
        near(actual, expected)
    for actual, expected in zip(got[2:], want[2:], strict=True):
        near(actual[:V], expected)
        assert not actual[V:].any()


@CHUNKS
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, options) for name in OF_LOGPS for options in POLICY), *((n, o) for n in OF_KL for o in EVERY)],
)
def test_options_of_functions(name: str, options: str, chunk_size: int | None, small_tiles: None) -> None:
    function = {**OF_LOGPS, **OF_KL}[name]
    check(function, Inputs(3, 7), {**EVERY[options], "chunk_size": chunk_size})


@pytest.mark.parametrize(
    ("name", "options"),
    [("entropy and lse", "all"), *((name, options) for name in OF_KL for options in ("all of both", *DIVERGENCES))],
)
def test_options_in_one_tile(name: str, options: str) -> None:
    check({**OF_LOGPS, **OF_KL}[name], Inputs(3, 7), EVERY[options])


@pytest.mark.parametrize("route", MODULES)
@pytest.mark.parametrize("options", NUMBERS)
@pytest.mark.parametrize("chunk_size", [None, 20])  # 20 rows hold every pair, which "recompute_free" needs
def test_options_of_linear_spo_loss(chunk_size: int | None, options: str, route: str) -> None:
    check(MODULES[route], Inputs(6, 6), {**NUMBERS[options], "chunk_size": chunk_size})


def test_options_of_pairs_longer_than_a_tile(small_tiles: None) -> None:
    check(MODULES["auto"], Inputs(6, 6), {**NUMBERS["all numbers"], "chunk_size": 4})


@pytest.mark.parametrize("rows", [(), (5,), (2, 3, 2)], ids=str)
def test_temperatures_of_rows_have_the_leading_dimensions_of_hidden(rows: tuple[int, ...]) -> None:
    x = Inputs(*rows)
    x.labels.clamp_(min=0)
    temperature = torch.linspace(0.5, 2, x.labels.numel()).view(rows)
    got = logps(x, x.policy, temperature=temperature)
    near(got, logps_of(transformed(F.linear(*x.policy), temperature), x.labels))


@pytest.mark.parametrize("index", [1, 2])
def test_entropy_and_lse_alone_have_their_gradient(index: int, small_tiles: None) -> None:
    """The other outputs have no upstream gradient at all; ignored rows have no value and no gradient."""
    x, options = Inputs(3, 7), {"temperature": 0.7, "softcap": 4.0}
    formula = [entropy_of, lambda z: z.logsumexp(-1)][index - 1]
    got = differentiate(
        lambda *policy: logps(x, policy, return_entropy=True, return_lse=True, **options)[index], x.policy, x.upstream
    )
    want = differentiate(
        lambda *policy: valid(x, formula(transformed(F.linear(*policy), **options))), x.policy, x.upstream
    )
    assert not got[0][x.labels == IGNORE].any()
    assert not got[1][x.labels == IGNORE].any()
    for actual, expected in zip(got, want, strict=True):
        near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["entropy and lse", "linear_token_kl", "linear_kl_loss"])
def test_options_of_half_precision_heads(name: str, dtype: torch.dtype, native: bool, small_tiles: None) -> None:
    """Within the error of the same formula in eager PyTorch, whose logits are products in the same dtype."""
    function = {**OF_LOGPS, **OF_KL}[name]
    x = Inputs(3, 7, h=16, dtype=dtype)
    temperature = torch.tensor([0.5, 2.0, 1.0]).repeat(7).view(3, 7)
    options: Options = {"temperature": temperature, "softcap": 4.0, "logit_scale": -0.75, "vocab_size": V - 3}
    if "kl" in name:
        options |= {"ref_temperature": 0.5, "ref_softcap": math.inf, "ref_logit_scale": 1.5}
    x.labels.clamp_(max=V - 4)
    upstream = torch.linspace(-1, 2, function.ours(x, x.policy, **options).numel(), dtype=torch.float64)
    upstream = upstream.view_as(function.ours(x, x.policy, **options))

    def eager(products: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        def formula(*policy: Tensor) -> Tensor:
            raw, ref_raw = (F.linear(*of).to(wide)[..., : V - 3] for of in (policy, reference))
            return function.formula(x, *both_transformed(raw, ref_raw, options))

        reference = tuple(tensor.to(products) for tensor in x.reference)
        return differentiate(formula, tuple(tensor.to(products) for tensor in x.policy), upstream)

    true, yardstick = eager(torch.float64, torch.float64), eager(dtype if native else torch.float32, torch.float32)
    got = differentiate(lambda *head: function.ours(x, head, **options), x.policy, upstream)
    for label, actual, want, rounded in zip(("value", "hidden", "weight", "bias"), got, true, yardstick, strict=True):
        assert_close(actual, want, rounded, label)
