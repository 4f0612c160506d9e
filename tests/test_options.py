"""The options of the logits, in every function and module: values and gradients against eager PyTorch in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from heads import Calls, Inputs, differentiate, entropy_of, kl_of, logps_of, near, peak_bytes, set_tile_sizes
from options import EVERY, NUMBERS, PADDING, POLICY, REF_PADDING, Options, both_transformed, filled, transformed
from oracle import (
    ACTIVE,
    IGNORE,
    Result,
    assert_rounded,
    assert_within_budget,
    loss_rounding,
    make_case,
    rounding,
    truth,
    ulp,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    kl_loss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
    sequence_logps,
    spo_loss,
    token_kl,
    token_logps,
    token_logps_kl,
)
from spo_kernels.linear import loops
from spo_kernels.linear.checks import checked_head, checked_options
from spo_kernels.losses import dpo_loss
from spo_kernels.reference import RowOptions
from spo_kernels.shards import Columns

V = 9


class Rows:
    """Logits of policy and reference ``[..., V]`` in float64, labels and a mask.

    Rows that are both ignored and masked are NaN for the functions, and so are the columns after V, which exist if the
    options have a vocab_size.
    """

    def __init__(self, *rows: int) -> None:
        self.raw, self.ref_raw = 3 * torch.randn(2, *rows, V, dtype=torch.float64)
        self.labels = torch.randint(0, V, rows)
        self.labels.view(-1)[1::4] = IGNORE
        self.mask = torch.ones(rows, dtype=torch.bool)
        self.mask.view(-1)[1::3] = False
        self.temperature = torch.linspace(0.5, 2, self.labels.numel()).view(rows)
        self.ref_temperature = self.temperature.flip(-1) if rows else self.temperature / 3
        self.row_weight = torch.linspace(-1, 2, self.labels.numel(), dtype=torch.float64).view(rows)
        self.bounds = torch.tensor([0, 2, 2, self.labels.numel()])

    def given(self, logits: Tensor, padding: int, options: Options) -> Tensor:
        """What a function gets for these logits."""
        logits = logits.clone()
        logits[(self.labels == IGNORE) & ~self.mask] = math.nan
        return F.pad(logits, (0, padding), value=math.nan) if "vocab_size" in options else logits

    def filled(self, options: Options) -> Options:
        return filled(options, V, self.temperature, self.ref_temperature)


class Function(NamedTuple):
    ours: Callable[..., Tensor]  # (x, logits, ref_logits, options)
    formula: Callable[..., Tensor]  # (x, z, ref_z)
    inplace: str = "inplace_backward"


def packed(value: Any) -> Any:
    return value.flatten() if isinstance(value, Tensor) and value.dim() else value


def stacked(*outputs: Tensor) -> Tensor:
    return torch.stack(outputs)


def valid(x: Any, values: Tensor) -> Tensor:
    return values.where(x.labels != IGNORE, 0)


def masked_kl(x: Any, z: Tensor, r: Tensor) -> Tensor:
    return kl_of(z, r).where(x.mask, 0)


OF_LOGPS: dict[str, Function] = {
    "token_logps": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, **kw), lambda x, z, r: logps_of(z, x.labels)
    ),
    "entropy": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, return_entropy=True, **kw)[1],
        lambda x, z, r: valid(x, entropy_of(z)),
    ),
    "z-loss": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, return_lse=True, **kw)[1].square().mean(),
        lambda x, z, r: valid(x, z.logsumexp(-1)).square().mean(),
    ),
    "entropy and lse": Function(
        lambda x, z, r, **kw: stacked(*token_logps(z, x.labels, return_entropy=True, return_lse=True, **kw)),
        lambda x, z, r: stacked(logps_of(z, x.labels), valid(x, entropy_of(z)), valid(x, z.logsumexp(-1))),
    ),
}
OF_KL: dict[str, Function] = {
    "token_kl": Function(lambda x, z, r, **kw: token_kl(z, r, x.mask, **kw), masked_kl),
    "token_logps_kl": Function(
        lambda x, z, r, **kw: stacked(*token_logps_kl(z, x.labels, r, x.mask, **kw)),
        lambda x, z, r: stacked(logps_of(z, x.labels), masked_kl(x, z, r)),
    ),
    "kl_loss": Function(
        lambda x, z, r, **kw: kl_loss(z, r, x.mask, row_weight=x.row_weight, **kw),
        lambda x, z, r: (masked_kl(x, z, r) * x.row_weight).sum(),
        "overwrite_logits",
    ),
}
OF_SEQUENCES: dict[str, Function] = {
    "sequence_logps": Function(
        lambda x, z, r, **kw: sequence_logps(z, x.labels, average=True, **kw),
        lambda x, z, r: logps_of(z, x.labels).sum(-1) / (x.labels != IGNORE).sum(-1).clamp(min=1),
    ),
    "packed": Function(
        lambda x, z, r, **kw: sequence_logps(
            z.flatten(0, 1),
            x.labels.flatten(),
            cu_seqlens=x.bounds,
            **{name: packed(value) for name, value in kw.items()},
        ),
        lambda x, z, r: stacked(*(part.sum() for part in logps_of(z, x.labels).flatten().split([2, 0, 10]))),
    ),
}

INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])


def check(function: Function, x: Rows, options: Options, inplace: bool) -> None:
    """Values and gradients; in place, the gradient and the zeros of its padding lie in the memory of the logits."""
    options = x.filled(options)
    raw, ref_logits = x.given(x.raw, PADDING, options), x.given(x.ref_raw, REF_PADDING, options)
    memory: list[Tensor] = []

    def ours(logits: Tensor) -> Tensor:
        intermediate = logits * 1
        memory.append(intermediate.detach())
        return function.ours(x, intermediate, ref_logits, **options, **({function.inplace: True} if inplace else {}))

    def formula(logits: Tensor) -> Tensor:
        return function.formula(x, *both_transformed(logits, x.ref_raw, options))

    upstream = torch.linspace(-1, 2, ours(raw).numel(), dtype=torch.float64).view(ours(raw).shape)
    got, gradient = differentiate(ours, (raw,), upstream)
    want, true_gradient = differentiate(formula, (x.raw,), upstream)
    near(got, want)
    near(gradient[..., :V], true_gradient)
    assert not gradient[..., V:].any()
    if inplace:
        assert torch.equal(memory[-1], gradient)


@INPLACE
@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in OF_LOGPS for options in POLICY]
    + [(name, options) for name in OF_KL for options in EVERY],
)
def test_options_of_token_functions(name: str, options: str, shape: tuple[int, ...], inplace: bool) -> None:
    check({**OF_LOGPS, **OF_KL}[name], Rows(*shape), EVERY[options], inplace)


@INPLACE
@pytest.mark.parametrize("options", POLICY)
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_options_of_sequence_functions(name: str, options: str, inplace: bool) -> None:
    check(OF_SEQUENCES[name], Rows(3, 4), POLICY[options], inplace)


@pytest.mark.parametrize("temperature", ["number", "rows"])
@INPLACE
def test_options_of_strided_slices(inplace: bool, temperature: str) -> None:
    """``logits[:, :-1]`` beside a slice of the temperatures; the rest of the logits has no gradient."""
    x = Rows(3, 5)
    by_row = torch.stack([x.temperature, -x.temperature], -1)[:, 1:, 0]  # not contiguous either
    options: Options = {"temperature": by_row if temperature == "rows" else 0.7, "softcap": 5.0}
    labels, r = x.labels[:, 1:], x.ref_raw[:, :-1]
    option = {"inplace_backward": inplace}

    def ours(z: Tensor) -> Tensor:
        return stacked(*token_logps_kl((z * 1)[:, :-1], labels, r, **options, **option))

    def formula(raw: Tensor) -> Tensor:
        z, ref_z = both_transformed(raw[:, :-1], r, options)
        return stacked(logps_of(z, labels), kl_of(z, ref_z))

    upstream = torch.linspace(-1, 2, 24, dtype=torch.float64).view(2, 3, 4)
    for got, want in zip(
        differentiate(ours, (x.raw,), upstream), differentiate(formula, (x.raw,), upstream), strict=True
    ):
        near(got, want)


@pytest.mark.parametrize("outputs", [(True, False), (False, True), (True, True)], ids=["entropy", "lse", "both"])
def test_each_output_of_token_logps_alone_has_its_gradient(outputs: tuple[bool, bool]) -> None:
    """The other outputs have no upstream gradient at all."""
    x, options = Rows(3, 4), {"temperature": 0.7, "softcap": 4.0}
    formulas = (
        lambda z: logps_of(z, x.labels),
        lambda z: valid(x, entropy_of(z)),
        lambda z: valid(x, z.logsumexp(-1)),
    )
    wanted = [formula for formula, given in zip(formulas, (True, *outputs), strict=True) if given]
    asked = {"return_entropy": outputs[0], "return_lse": outputs[1]}
    for index, formula in enumerate(wanted):
        got = differentiate(lambda z, i=index: token_logps(z, x.labels, **options, **asked)[i], (x.raw,), x.row_weight)
        want = differentiate(lambda z, f=formula: f(transformed(z, **options)), (x.raw,), x.row_weight)
        assert not got[0][x.labels == IGNORE].any()
        assert not got[1][x.labels == IGNORE].any()
        for actual, expected in zip(got, want, strict=True):
            near(actual, expected)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_options_of_kl_loss_with_and_without_rows_left_out(gradients: bool, weighted: bool, mask: bool) -> None:
    x = Rows(3, 4)
    options = x.filled(EVERY["all of both"])
    wanted, weight = x.mask if mask else None, x.row_weight if weighted else None
    logits, ref_logits = (F.pad(raw, (0, 2), value=math.nan) for raw in (x.raw, x.ref_raw))
    got = kl_loss(logits.requires_grad_(gradients), ref_logits, wanted, row_weight=weight, **options)
    kl = kl_of(*both_transformed(x.raw, x.ref_raw, options)) * (1 if weight is None else weight)
    near(got.detach(), (kl if wanted is None else kl.where(wanted, 0)).sum())


# Factors that float32 holds exactly, so that the float64 truth has the same ones.
EXACT: dict[str, tuple[Options, list[float], list[float]]] = {
    "temperature": ({"temperature": 0.5}, [2.0], [2.0]),
    "softcap": ({"softcap": 4.0}, [0.25, 4.0], [0.25, 4.0]),
    "both": (
        {"temperature": 2.0, "softcap": 4.0, "logit_scale": -0.75, "ref_temperature": 0.5, "ref_softcap": math.inf},
        [-0.1875, 2.0],
        [-1.5],
    ),
}


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", EXACT)
def test_options_within_the_budget(options: str, dtype: torch.dtype, inplace: bool) -> None:
    given, factors, ref_factors = EXACT[options]
    transforms = [torch.tensor(values)[:, None] for values in (factors, ref_factors)]
    case = make_case(48, 1000, dtype)
    case = replace(
        case,
        logits=F.pad(3 * case.logits, (0, 8), value=math.nan),
        ref_logits=F.pad(3 * case.ref_logits, (0, 24), value=math.nan),
        options=RowOptions(1000, *transforms),
    )
    leaf = case.logits.clone().requires_grad_()
    rows = (case.ref_logits, case.mask)
    logps, kl = token_logps_kl(leaf * 1, case.labels, *rows, vocab_size=1000, inplace_backward=inplace, **given)
    torch.autograd.backward((logps, kl), (case.dlogps, case.dkl))
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_within_budget(Result(logps.detach(), kl.detach(), leaf.grad), truth(case), rounding(case))

    # float16 takes two sweeps, the others one.
    case, weight = case.only("kl"), case.dkl.where(case.mask, 0)
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    leaf = case.logits.clone().requires_grad_()
    loss = kl_loss(leaf * 1, *rows, row_weight=case.dkl, vocab_size=1000, overwrite_logits=inplace, **given)
    loss.backward()
    assert leaf.grad is not None
    assert_rounded(loss.detach(), (true.kl * weight).sum(), loss_rounding(rounded, true, weight), "loss")
    assert_rounded(leaf.grad, true.dlogits, rounded.dlogits, "dlogits")


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entropy_and_lse_within_the_budget(dtype: torch.dtype, inplace: bool) -> None:
    """The entropy is log V minus the KL to the uniform distribution, and has the error of log V besides."""
    case = make_case(48, 1000, dtype)
    wanted = case.labels != IGNORE
    case = replace(
        case,
        logits=3 * case.logits,
        ref_logits=torch.zeros_like(case.logits),
        mask=wanted,
        dlse=torch.linspace(-1.5, 0.8, 48).where(wanted, 0),
        options=RowOptions(None, torch.tensor([[0.25], [4.0]]), None),
    )
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    leaf = case.logits.clone().requires_grad_()
    outputs = token_logps(
        leaf * 1, case.labels, softcap=4.0, return_entropy=True, return_lse=True, inplace_backward=inplace
    )
    torch.autograd.backward(outputs, (case.dlogps, -case.dkl, case.dlse))
    logps, entropy, lse = (output.detach() for output in outputs)
    assert_rounded(logps, true.logps, rounded.logps, "logps")
    log_v = torch.full_like(true.kl, math.log(1000))
    assert_rounded(entropy, (log_v - true.kl).where(wanted, 0), rounded.kl + ulp(log_v, torch.float32), "entropy")
    true_lse = transformed(case.logits.double(), softcap=4.0).logsumexp(-1).where(wanted, 0)
    assert_rounded(lse, true_lse, rounded.logps, "lse")  # the rounding of a log-prob is that of its lse and of z_y
    assert leaf.grad is not None
    assert_rounded(leaf.grad, true.dlogits, rounded.dlogits, "dlogits")
