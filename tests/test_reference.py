"""The oracle against torch's formulas in float64, its rules at the edges, and the error budget against faults."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    IGNORE,
    Case,
    Result,
    assert_same,
    assert_same_bits,
    assert_stats_within_budget,
    assert_within_budget,
    make_case,
    rounding,
    run,
    truth,
)
from torch import Tensor

from spo_kernels import reference

INF, NAN = math.inf, math.nan


def stats_fwd(logits: Tensor, labels: Tensor | None = None, ref_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logps, kl, _ = reference.token_stats_fwd(logits, labels, ref_logits, None, IGNORE)
    return logps, kl


@pytest.mark.parametrize("shape", [(6, 1), (6, 50), (2, 3, 50), (0, 50), (2, 0, 50)])
def test_token_stats_are_torch_formulas(shape: tuple[int, ...]) -> None:
    logits, ref_logits = torch.randn(2, *shape, dtype=torch.float64) * 5
    labels = torch.randint(0, shape[-1], shape[:-1])
    logps, kl, stats = reference.token_stats_fwd(logits, labels, ref_logits, None, IGNORE)
    expected = -F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(shape[:-1])
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    lse = torch.stack([logits.logsumexp(-1), ref_logits.logsumexp(-1)])
    torch.testing.assert_close(stats[0::2] + stats[1::2], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_token_stats_bwd_is_autograd_through_the_formulas(inplace: bool) -> None:
    case = make_case(12, 40, torch.float64)
    logits = case.logits.clone().requires_grad_()
    logps = -F.cross_entropy(logits, case.labels, reduction="none", ignore_index=IGNORE)
    log_q = F.log_softmax(case.ref_logits, -1)
    kl = F.kl_div(log_q, F.log_softmax(logits, -1), reduction="none", log_target=True).sum(-1) * case.mask
    (expected,) = torch.autograd.grad((logps, kl), logits, (case.dlogps, case.dkl))
    actual = run(reference, case, inplace=inplace)
    torch.testing.assert_close(actual.dlogits, expected, rtol=1e-12, atol=1e-12)
    assert (actual.dlogits.data_ptr() == case.logits.data_ptr()) == inplace


def test_outputs_not_asked_for_are_empty() -> None:
    logits = torch.randn(4, 9)
    logps, kl, stats = reference.token_stats_fwd(logits, None, logits, None, IGNORE)
    assert logps.shape == (0,)
    assert kl.shape == (4,)
    assert stats.shape == (4, 4)
    logps, kl, stats = reference.token_stats_fwd(logits, torch.zeros(4, dtype=torch.int64), None, None, IGNORE)
    assert logps.shape == (4,)
    assert kl.shape == (0,)
    assert stats.shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_outputs_and_gradients(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = run(reference, make_case(4, 9, dtype))
    assert (result.logps.dtype, result.kl.dtype, result.dlogits.dtype) == (wide, wide, dtype)


def test_kl_of_equal_logits_is_zero_and_a_shift_changes_nothing() -> None:
    logits = torch.randn(5, 30, dtype=torch.float64)
    assert_same(stats_fwd(logits, None, logits.clone())[1], torch.zeros(5, dtype=torch.float64))
    shifted = stats_fwd(logits + 1e3, None, logits)[1]
    torch.testing.assert_close(shifted, torch.zeros_like(shifted), rtol=0, atol=1e-11)


def test_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0]], dtype=torch.float64)
    on, off = torch.tensor([0]), torch.tensor([1])
    assert stats_fwd(logits, on)[0].item() == pytest.approx(-math.log(2))
    assert stats_fwd(logits, off)[0].item() == -INF
    # A token with p = 0 contributes nothing, whatever its q. One with p > 0 and q = 0 makes the KL infinite.
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    assert stats_fwd(logits, None, uniform)[1].item() == pytest.approx(math.log(3 / 2))
    assert stats_fwd(logits, None, logits)[1].item() == 0
    assert stats_fwd(uniform, None, logits)[1].item() == INF


def test_gradient_of_an_infinite_kl_is_not_finite() -> None:
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    ref_logits = torch.tensor([[0.0, -INF, 0.0]], dtype=torch.float64)
    _, kl, stats = reference.token_stats_fwd(uniform, None, ref_logits, None, IGNORE)
    one = torch.ones(1, dtype=torch.float64)
    dlogits = reference.token_stats_bwd(None, one, uniform, None, ref_logits, None, kl, stats, IGNORE, False)
    assert not dlogits.isfinite().any()
    assert dlogits[0, 1].isnan()


def test_rows_without_a_softmax_are_nan() -> None:
    logits = torch.tensor([[-INF, -INF], [INF, 0.0], [NAN, 0.0], [0.0, 0.0]], dtype=torch.float64)
    logps, kl = stats_fwd(logits, torch.zeros(4, dtype=torch.int64), torch.zeros_like(logits))
    assert logps.isnan().tolist() == kl.isnan().tolist() == [True, True, True, False]


def test_unwanted_rows_are_exactly_zero_even_where_logits_are_nan() -> None:
    case = make_case(12, 7, torch.float64)
    ignored, masked = case.labels == IGNORE, ~case.mask
    case.logits[ignored & masked] = NAN
    result = run(reference, case)
    assert not result.logps[ignored].any()
    assert not result.kl[masked].any()
    assert (ignored & masked).any()
    assert not result.dlogits[ignored & masked].any()


@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**63)])
def test_label_out_of_range_is_named(label: int) -> None:
    labels = torch.tensor([0, IGNORE, label])
    with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 5\) or ignore_index -100, got {label}$"):
        stats_fwd(torch.randn(3, 5), labels)


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_loss_is_the_weighted_sum(weighted: bool) -> None:
    case = make_case(12, 40, torch.float64)
    weight = torch.rand(12, dtype=torch.float64) * case.mask if weighted else None
    logits = case.logits.clone().requires_grad_()
    log_q = F.log_softmax(case.ref_logits, -1)
    kl = F.kl_div(log_q, F.log_softmax(logits, -1), reduction="none", log_target=True).sum(-1)
    expected = kl.sum() if weight is None else (kl * weight).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    loss, dlogits = reference.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dlogits, gradient, rtol=1e-12, atol=1e-12)
    reference.scale_(dlogits, torch.tensor(-3.0))
    torch.testing.assert_close(dlogits, -3 * gradient, rtol=1e-12, atol=1e-12)


def test_kl_loss_skips_rows_of_weight_zero() -> None:
    logits, ref_logits = torch.randn(2, 2, 5, dtype=torch.float64)
    logits[1] = NAN
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss, dlogits = reference.kl_loss_fwd(logits, ref_logits, weight, False)
    assert loss.isfinite()
    assert dlogits[0].isfinite().all()
    assert not dlogits[1].any()


@pytest.mark.parametrize("mode", ["logps", "kl", "both"])
def test_float64_oracle_does_not_depend_on_the_batch(mode: str) -> None:
    case = make_case(9, 33, torch.float64, mode=mode)
    whole = run(reference, case)
    for row in range(9):
        alone = run(reference, case.map(itemgetter(slice(row, row + 1))))
        assert_same_bits(alone, whole.map(itemgetter(slice(row, row + 1))))


# Faults of a float32 kernel, planted in the oracle's float32 arithmetic. Without a fault it is within the budget.
FLOAT32_STATS, BACKWARD, EXP = reference._log_softmax_stats, reference.token_stats_bwd, Tensor.exp
EPS = torch.finfo(torch.float32).eps


def without_the_last_token(logits: Tensor) -> tuple[Tensor, Tensor]:
    shift, _ = FLOAT32_STATS(logits)
    return shift, FLOAT32_STATS(logits[..., :-1])[1]


def two_ulp_off(logits: Tensor) -> tuple[Tensor, Tensor]:
    shift, logsum = FLOAT32_STATS(logits)
    for _ in range(2):
        logsum = logsum.nextafter(torch.tensor(INF))
    return shift, logsum


def in_one_number(logits: Tensor) -> tuple[Tensor, Tensor]:
    shift, logsum = FLOAT32_STATS(logits)
    return torch.zeros_like(shift), shift + logsum


def rough_exp(x: Tensor) -> Tensor:
    """exp with four times the error, up or down, of a float32 exponential that multiplies by log2(e)."""
    return EXP(x) * (1 + 4 * EPS * (1 + x.abs()) * torch.randint(0, 2, x.shape).mul(2).sub(1))


def without_the_mean(*args: Any, **options: Any) -> Tensor:
    return BACKWARD(*args[:6], torch.zeros_like(args[6]), *args[7:], **options)


FAULTS: dict[str, tuple[object, str, object]] = {
    "a token too few": (reference, "_log_softmax_stats", without_the_last_token),
    "logsum two ulp off": (reference, "_log_softmax_stats", two_ulp_off),
    "log-sum-exp in one number": (reference, "_log_softmax_stats", in_one_number),
    "a rough exponential": (Tensor, "exp", rough_exp),
    "a gradient without its label": (Tensor, "scatter_", lambda self, *_: self),
    "a gradient without the KL's mean": (reference, "token_stats_bwd", without_the_mean),
}


def judge(case: Case, fault: str = "") -> list[str]:
    """The names of the results that are over the budget, in float32 arithmetic with a fault."""
    true, rounded = truth(case), rounding(case)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(*FAULTS[fault])
        result = run(reference, case)
        stats = reference.token_stats_fwd(case.logits, case.labels, case.ref_logits, case.mask, IGNORE)[2]
    over = []
    for name in Result._fields:
        try:  # this field alone
            assert_within_budget(true._replace(**{name: getattr(result, name)}), true, rounded)
        except AssertionError:
            over.append(name)
    try:
        assert_stats_within_budget(stats, case)
    except AssertionError:
        over.append("stats")
    return over


@pytest.mark.parametrize(
    ("fault", "over"),
    [
        ("", []),
        ("a token too few", ["logps", "kl", "dlogits", "stats"]),
        ("logsum two ulp off", ["stats"]),
        ("log-sum-exp in one number", ["logps", "kl", "dlogits", "stats"]),
        ("a rough exponential", ["dlogits"]),
        ("a gradient without its label", ["dlogits"]),
        ("a gradient without the KL's mean", ["dlogits"]),
    ],
)
def test_planted_faults_are_over_the_budget(fault: str, over: list[str]) -> None:
    found = judge(make_case(48, 1000, rows="offset"), fault)
    assert set(found) >= set(over)
    assert bool(found) == bool(fault)
