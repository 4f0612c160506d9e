"""What the numerical tests share: the float64 truth, the error budget, and the rows that bite.

Each output and each element of a gradient has its own budget, which is the same for all kernels and on every machine.
The budget is `FACTOR` times the rounding error that float32 arithmetic cannot avoid on the way to this number
(`rounding`). It is derived from the float64 result of the same rounded inputs, not from another implementation.
Half-precision gradients may also have the error of their final rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels import backends, precision, reference
from spo_kernels.backends import Backend, cpu
from spo_kernels.reference import PLAIN, RowOptions

ACTIVE = backends.active("cpu")
LEVELS: list[str] = cpu.load().simd_levels() if ACTIVE == "cpu" else []

IGNORE = -100
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)
MODES = ("logps", "kl", "both")

# The budget over the unavoidable rounding error of float32. The kernels need up to 1.2, with exponentials within two
# ulp and sums in float32. Plain torch needs 2.3: it rounds log p, and with float16 logits, which have few distinct
# values, the error is the same in most of a row.
FACTOR = 3.0 if ACTIVE == "reference" else 1.5
# A half-precision gradient is rounded once. Up to 1/64 of its ulp may be lost before.
HALF_ULPS = 0.5 + 1 / 64

# A float64 result has no wider truth to compare with. Two float64 computations, which may sum V terms in another order,
# must agree to this many ulp of the largest value.
FLOAT64_ULPS = 256
# The error of the float64 truth itself, in which log(1 + 1e-30) is 0.
TRUTH_ERROR = 16 * torch.finfo(torch.float64).eps


class Result(NamedTuple):
    """Outputs of rows and the gradient. logps or kl is None if it was not asked for."""

    logps: Any
    kl: Any
    dlogits: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Result:
        """A result with a function applied to every tensor."""
        return Result(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """Inputs of the row ops: logits ``[N, V]``; reference logits and values of each row, or None if unused."""

    logits: Tensor
    labels: Any
    ref_logits: Any
    mask: Any
    dlogps: Any
    dkl: Any
    dlse: Any = None
    options: RowOptions = PLAIN

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """A case with a function applied to every tensor but the transforms."""
        rows = {name: value for name, value in vars(self).items() if name != "options"}
        return replace(self, **{name: None if x is None else function(x) for name, x in rows.items()})

    def only(self, mode: str) -> Case:
        """The inputs that one of `MODES` needs."""
        if mode == "logps":
            return replace(self, ref_logits=None, mask=None, dkl=None)
        if mode == "kl":
            return replace(self, labels=None, dlogps=None)
        return self

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers, which are rounded already, in a wider dtype."""
        transforms = {name: getattr(self.options, name) for name in ("transform", "ref_transform")}
        wide = {name: None if x is None else x.to(dtype) for name, x in transforms.items()}
        rows = self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        return replace(rows, options=self.options._replace(**wide))


def run(backend: Backend, case: Case, *, inplace: bool = False, deterministic: bool = True) -> Result:
    """Forward and backward of a case through the functions of a backend.

    With ``deterministic`` every new output holds NaN before a kernel writes it. Without, a GPU may split a row over
    several blocks.
    """
    with poisoned_memory() if deterministic else nullcontext():
        rows = (case.logits, case.labels, case.ref_logits, case.mask)
        logps, kl, stats = backend.token_stats_fwd(*rows, IGNORE, case.options)
        dlogits = backend.token_stats_bwd(
            case.dlogps, case.dkl, *rows, kl, stats, IGNORE, inplace, case.dlse, case.options
        )
    return Result(logps if case.labels is not None else None, kl if case.ref_logits is not None else None, dlogits)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within this block ``torch.empty`` returns NaN, so that an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def truth(case: Case) -> Result:
    """The oracle in float64 on the same rounded inputs."""
    return run(reference, case.to(torch.float64))


class TransformRounding(NamedTuple):
    """Logits z and their slope dz/dx in float64, and what float32 rounds of both.

    With ``w = a x`` and ``t = tanh(w)``, in the first order:

    - ``z = a x``: by the rounding of the product. The slope a is exact.
    - t: by two ulp, which the CUDA library promises, and by the rounding of w times ``1 - t^2``.
    - ``z = b t``: by b times the error of t, and by the rounding of the product.
    - ``a b (1 - t^2)``: by ``a b`` times ``2 t`` times the error of t, by the rounding of ``1 - t^2``, and by the
      roundings of the two products, an ulp and a half of the slope together.
    """

    z: Tensor
    error: Tensor
    slope: Tensor
    slope_error: Tensor

    @classmethod
    def of(cls, x: Tensor, vocab_size: Any, transform: Tensor | None) -> TransformRounding:
        x = x[..., :vocab_size].double()
        if transform is None:
            return cls(x, torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x))
        a, *b = (row.double().view(x.shape[:-1] if row.shape[0] > 1 else ())[..., None] for row in transform)
        w = a * x
        if not b:
            return cls(w, half_ulp(w).where(w.isfinite(), 0), a.expand_as(x), torch.zeros_like(x))
        t = w.tanh()
        z, rest = b[0] * t, 1 - t.square()
        t_error = 2 * ulp(t, torch.float32) + (rest * half_ulp(w)).where(w.isfinite(), 0)
        slope = a * b[0] * rest
        slope_error = (a * b[0]).abs() * (2 * t.abs() * t_error + half_ulp(rest)) + 1.5 * ulp(slope, torch.float32)
        return cls(z, b[0].abs() * t_error + half_ulp(z), slope, slope_error)


class SoftmaxRounding(NamedTuple):
    """``s = z - shift``, ``logsum``, ``log p`` and p of rows of logits in float64, with the errors of float32."""

    s: Tensor
    logsum: Tensor
    log_p: Tensor
    p: Tensor
    p_error: Tensor  # relative
    sum_error: Tensor  # relative, of the sum of exponentials whose logarithm is logsum
    z_error: Tensor  # of the logits
    lse_error: Tensor  # what z_error adds to the log-sum-exp

    @property
    def logsum_error(self) -> Tensor:
        return self.sum_error + ulp(self.logsum, torch.float32)

    @property
    def normalized_error(self) -> Tensor:
        """Of p, relative, with the errors of the logits and of the log-sum-exp."""
        return self.p_error + self.z_error + (self.logsum_error + self.lse_error)[..., None]

    @classmethod
    def of(cls, transformed: TransformRounding) -> SoftmaxRounding:
        logits = transformed.z
        shift = logits.amax(-1)
        s = logits - torch.where(shift == -torch.inf, 0, shift)[..., None]
        logsum = s.exp().sum(-1).log()
        log_p = s - logsum[..., None]
        p = log_p.exp()
        p_error = torch.where(p > 0, torch.finfo(torch.float32).eps * (1 + log_p.abs()), 0)
        lse_error = (p * transformed.error).sum(-1)
        return cls(s, logsum, log_p, p, p_error, _norm(p * p_error), transformed.error, lse_error)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def rounding(case: Case) -> Result | None:
    """The rounding error of float32 in each output and in each element of the gradient; None for float64.

    ``s = z - shift`` and ``t = r - ref_shift``. Errors are of the first order. A rounding is half an ulp of the rounded
    number. These are the errors of each quantity:

    - An exponential: ``eps (1 + |log p|)``, relative. The roundings of s and of ``s log2(e)`` become relative errors of
      ``eps |s| / 2``, and the exponential itself is off by an ulp.
    - A sum over the vocabulary: the root of the sum of the squared errors of its terms, which are independent.
    - logsum: the error of its sum, and an ulp, which the C and the CUDA library promise for a logarithm.
    - ``logp = s_y - logsum``: the rounding of s_y, and the error of logsum.
    - ``kl = E_p[s - t] + (ref_logsum - logsum)``: in each element the roundings of s, of t and of ``s - t``, and the
      error of p times the distance of the log-ratio from its mean; the errors of the two logsums; the rounding of the
      two terms.
    - ``g (1[v = y] - p)``: the error of p, which includes the error of logsum as a relative one, and the roundings of
      the difference and of the product.
    - ``g p (log p - log q - kl)``: the same error of p times the parenthesis; p times the error of the parenthesis (the
      roundings of s, t, ``s - t`` and of the parenthesis, the errors of the logsums and of kl); the rounding of the
      product.
    - ``g_lse p``: the error of p, and the rounding of the product. ``g_logp - g_lse``: its rounding.
    - The reverse KL: as the KL, with policy and reference exchanged. ``g (p - q)``: the errors of p and q, and the
      roundings of the difference and of the product.
    - The JSD: see `_jsd_rounding`.
    - Errors of transformed logits (`TransformRounding`) move each result by its derivative: ``log p_v`` by the error of
      z_v and the mean under p of all errors; kl by ``p (log p - log q - kl)`` and ``q - p`` times the errors of policy
      and reference. Equal numbers have equal errors, so these are sums, not roots of sums of squares.
    - ``dx = slope dz``: the slope times the error of dz, and the error of the slope times dz.

    The final rounding of a result is not counted here.
    """
    if case.logits.dtype == torch.float64:
        return None
    wide = case.to(torch.float64)
    vocab_size, transform, ref_transform, mixture = wide.options
    transformed = TransformRounding.of(wide.logits, vocab_size, transform)
    policy = SoftmaxRounding.of(transformed)
    p, p_error = policy.p, policy.normalized_error
    logps = kl = None
    dz, error = torch.zeros_like(p), torch.zeros_like(p)  # error: of dz
    g_logp = g_lse = torch.zeros_like(p[..., :1])
    if wide.labels is not None:
        at = wide.labels.clamp(0, p.shape[-1] - 1)[..., None]  # a label that is not in the row has an exact result
        logps = half_ulp(policy.s.gather(-1, at)[..., 0]) + policy.logsum_error
        logps += policy.z_error.gather(-1, at)[..., 0] + policy.lse_error
        if wide.dlogps is not None:
            g_logp = wide.dlogps.where(wide.labels != IGNORE, 0)[..., None]
            to_label = (torch.arange(p.shape[-1]) == wide.labels[..., None]).double() - p
            dz += g_logp * to_label
            error += g_logp.abs() * (p * p_error + half_ulp(to_label)) + half_ulp(g_logp * to_label)
    if wide.dlse is not None:
        g_lse = wide.dlse[..., None]
        dz += g_lse * p
        error += g_lse.abs() * p * p_error + half_ulp(g_lse * p) + half_ulp(g_logp - g_lse) * p
    if wide.ref_logits is not None:
        ref = SoftmaxRounding.of(TransformRounding.of(wide.ref_logits, vocab_size, ref_transform))
        of_divergence = _kl_rounding if mixture == 0 else _reverse_kl_rounding if mixture == 1 else _jsd_rounding
        kl, slope, slope_error = of_divergence(policy, ref, mixture)
        if wide.dkl is not None:
            g = (wide.dkl if wide.mask is None else wide.dkl.where(wide.mask, 0))[..., None]
            dz += g * slope
            error += g.abs() * slope_error + half_ulp(g * slope)
    dlogits = transformed.slope.abs() * error + dz.abs() * transformed.slope_error
    dlogits = torch.nn.functional.pad(dlogits, (0, wide.logits.shape[-1] - p.shape[-1]))
    return Result(logps, kl, dlogits).map(lambda x: x.nan_to_num(0, 0, 0))  # 0 where the truth is not finite


# Each returns the error of a divergence, its gradient with respect to z, and the error of that.
DivergenceRounding = tuple[Tensor, Tensor, Tensor]


def _kl_rounding(policy: SoftmaxRounding, ref: SoftmaxRounding, mixture: float) -> DivergenceRounding:
    p, possible = policy.p, policy.p > 0
    gap = torch.where(possible, policy.s - ref.s, 0)
    ratio = torch.where(possible, policy.log_p - ref.log_p, 0)
    off_mean = torch.where(possible, ratio - (p * ratio).sum(-1, keepdim=True), 0)
    gap_error = torch.where(possible, half_ulp(policy.s) + half_ulp(ref.s) + half_ulp(gap), 0)
    logsums_error = policy.logsum_error + ref.logsum_error
    kl = (_norm(p * off_mean * policy.p_error).square() + _norm(p * gap_error).square()).sqrt()
    kl += logsums_error + half_ulp((p * gap).sum(-1)) + half_ulp(ref.logsum - policy.logsum)
    kl += (p * off_mean.abs() * policy.z_error + (ref.p - p).abs() * ref.z_error).sum(-1)
    lse_errors = policy.lse_error + ref.lse_error
    ratio_error = gap_error + policy.z_error + ref.z_error + half_ulp(off_mean)
    ratio_error += (logsums_error + lse_errors + kl)[..., None]
    return kl, p * off_mean, p * (off_mean.abs() * policy.normalized_error + ratio_error)


def _reverse_kl_rounding(policy: SoftmaxRounding, ref: SoftmaxRounding, mixture: float) -> DivergenceRounding:
    kl, _, _ = _kl_rounding(ref, policy, 0.0)
    slope = policy.p - ref.p
    return kl, slope, policy.p * policy.normalized_error + ref.p * ref.normalized_error + half_ulp(slope)


def _jsd_rounding(policy: SoftmaxRounding, ref: SoftmaxRounding, mixture: float) -> DivergenceRounding:
    """Of ``w A + (1 - w) B`` with ``A = E_p[a]``, ``a = log p - log m``, ``B = E_q[b]``, ``b = log q - log m``.

    a and b come from ``gap = log p - log q``: ``a = min(gap, 0) - L``, ``b = min(-gap, 0) - L``, and L is the logarithm
    of a sum of two terms, of which one has the factor ``exp(-|gap|)``.

    - gap: the roundings of s, t, ``s - t`` and gap, the errors of logits and logsums. It moves a by ``(1 - w) q / m``
      and b by ``w p / m`` times its error.
    - L: the error ``eps (1 + |gap|)`` of the exponential times the share of its term, the roundings of the sum and of
      its two terms, and an ulp of the logarithm.
    - A: in each element ``p a`` times the error of p, and p times the error of a.
    - ``w p (a - A)``: the error of p times ``a - A``, p times the errors of a and A, and the roundings of the
      difference and of the product with w.
    """
    p, q, rest = policy.p, ref.p, 1 - mixture
    m = mixture * p + rest * q
    either = m > 0
    gap = policy.log_p - ref.log_p
    to_policy, to_ref = (torch.where(either, x / m, 0) for x in (rest * q, mixture * p))
    gap_error = half_ulp(policy.s) + half_ulp(ref.s) + half_ulp(policy.s - ref.s) + half_ulp(gap)
    gap_error += policy.z_error + ref.z_error
    logsums = policy.logsum_error + ref.logsum_error + half_ulp(policy.logsum - ref.logsum)
    gap_error = (gap_error + (logsums + policy.lse_error + ref.lse_error)[..., None]).nan_to_num(0, 0, 0)
    eps = torch.finfo(torch.float32).eps
    log_error = eps * (1 + gap.abs()).nan_to_num(0, 0, 0) * torch.where(gap < 0, to_ref, to_policy) + 1.5 * eps

    def side(of: SoftmaxRounding, moved_by: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share = torch.where(of.p > 0, of.log_p - m.log(), 0)
        error = moved_by * gap_error + log_error + ulp(share, torch.float32)
        mean = (of.p * share).sum(-1)
        independent = _norm(of.p * share.abs() * of.p_error).square() + _norm(of.p * error).square()
        mean_error = independent.sqrt() + (of.p * share.abs() * of.z_error).sum(-1) + half_ulp(mean)
        mean_error += mean.abs() * (of.logsum_error + of.lse_error)
        return share, error, mean, mean_error + (of.p * moved_by).sum(-1) * logsums

    a, a_error, of_policy, policy_error = side(policy, to_policy)
    _, _, of_ref, ref_error = side(ref, to_ref)
    jsd = mixture * policy_error + rest * ref_error + half_ulp(mixture * of_policy) + half_ulp(rest * of_ref)
    off_mean = torch.where(p > 0, a - of_policy[..., None], 0)
    error = off_mean.abs() * policy.normalized_error + a_error + policy_error[..., None] + half_ulp(off_mean)
    slope = mixture * p * off_mean
    return jsd, slope, mixture * p * error + 2 * half_ulp(slope)


def loss_rounding(rounded: Result | None, true: Result, weight: Tensor) -> Tensor | None:
    """The rounding error of float32 in ``sum_i weight_i kl_i``: of each KL, of each product, and of the sum."""
    if rounded is None:
        return None
    terms = (weight * true.kl).abs()
    return (weight.abs() * rounded.kl + half_ulp(terms)).sum() + half_ulp(terms.sum())


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of a dtype at ``|x|``, or at the smallest normal number if that is larger."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().double().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def half_ulp(x: Tensor) -> Tensor:
    """The largest error of rounding ``x`` to float32."""
    return 0.5 * ulp(x, torch.float32)


def assert_within_budget(actual: Result, true: Result, rounded: Result | None) -> None:
    """Every field of ``actual`` against float64. ``rounded`` is from `rounding`, or None for a float64 computation."""
    for name in Result._fields:
        got, want = getattr(actual, name), getattr(true, name)
        if want is None:
            assert got is None, f"{name} was not asked for"
            continue
        assert_rounded(got, want, None if rounded is None else getattr(rounded, name), name)


def assert_stats_within_budget(stats: Tensor, case: Case) -> None:
    """``shift + logsum`` of the policy and of the reference against their log-sum-exp.

    A backend's shift may lie below the maximum. Its logsum is then larger, and has a larger rounding error.
    """
    vocab_size, transform, ref_transform, _ = case.options
    tensors = ((case.logits, transform, stats[:2]), (case.ref_logits, ref_transform, stats[2:]))
    for logits, of_logits, (shift, logsum) in [tensor for tensor in tensors if tensor[0] is not None]:
        transformed = TransformRounding.of(logits, vocab_size, of_logits)
        true = transformed.z.logsumexp(-1)
        assert ((transformed.z.amax(-1) - shift).abs() < 10).all(), "shift is too far from the maximum"
        if case.logits.dtype == torch.float64:
            budget = _float64_budget(true)
        else:
            softmax = SoftmaxRounding.of(transformed)
            budget = FACTOR * (softmax.sum_error + softmax.lse_error + ulp(logsum, torch.float32))
        _assert_within(shift.double() + logsum.double(), true, budget, "lse")


def assert_rounded(actual: Tensor, true: Tensor, rounded: Tensor | None, name: str = "value") -> None:
    """``actual`` within the budget of ``true``. ``rounded`` is the error of float32; None if computed in float64."""
    if rounded is None:
        _assert_within(actual, true, _float64_budget(true), name)
        return
    budget = FACTOR * (rounded + half_ulp(true)) + TRUTH_ERROR
    if actual.dtype in HALF_DTYPES:
        budget = budget + HALF_ULPS * ulp(true, actual.dtype)
    _assert_within(actual, true, budget, name)


def assert_close(actual: Tensor, true: Tensor, yardstick: Tensor | None, name: str = "value") -> None:
    """The error of ``actual`` is at most two ulp more than twice the largest error of ``yardstick``.

    For results of matrix products, whose order of sums is not known. ``yardstick`` is None if computed in float64.
    """
    if yardstick is None:
        _assert_within(actual, true, _float64_budget(true), name)
        return
    both = true.isfinite() & yardstick.isfinite()
    worst = (yardstick.double() - true)[both].abs().max() if both.any() else true.new_zeros(())
    budget = 2 * worst + 2 * ulp(true, torch.float32) + TRUTH_ERROR
    if actual.dtype in HALF_DTYPES:
        budget = budget + 0.5 * ulp(true, actual.dtype)
    _assert_within(actual, true, budget, name)


def _float64_budget(true: Tensor) -> Tensor:
    finite = true[true.isfinite()]
    scale = finite.abs().max().clamp(min=1) if finite.numel() else torch.ones((), dtype=torch.float64)
    return FLOAT64_ULPS * ulp(scale, torch.float64).expand_as(true)


def _assert_within(actual: Tensor, true: Tensor, budget: Tensor, name: str) -> None:
    """Errors within the budget. Where the truth is not finite, ``actual`` must be the same NaN or infinity."""
    assert actual.shape == true.shape, f"{name}: {list(actual.shape)} is not {list(true.shape)}"
    got, finite = actual.double(), true.isfinite()
    odd = ~(got == true) & ~(got.isnan() & true.isnan()) & ~finite
    assert not odd.any(), f"{name}: {got[odd][:4].tolist()} where the truth is {true[odd][:4].tolist()}"
    error = (got - true).abs()
    over = finite & ~(error <= budget)  # written so that NaN is over
    if over.any():
        worst = torch.where(over, error / budget, 0).nan_to_num(torch.inf).argmax()
        at = [int(i) for i in torch.unravel_index(worst, true.shape)]
        raise AssertionError(
            f"{name}: {int(over.sum())} of {true.numel()} over budget, worst at {at}: got {got.flatten()[worst]:.9g}, "
            f"truth {true.flatten()[worst]:.9g}, error {error.flatten()[worst]:.3g}, "
            f"budget {budget.flatten()[worst]:.3g}"
        )


def assert_labels_may_lie_elsewhere(backend: Backend, case: Case) -> None:
    """Rows whose label is in another shard give what they give with one more column of -inf that has the label."""
    v = case.logits.shape[-1]
    elsewhere = (torch.arange(case.logits.shape[0]) % 2 == 0) & (case.labels != IGNORE)
    assert elsewhere.any() and not elsewhere.all()
    narrow = replace(case, labels=case.labels.where(~elsewhere, reference.LABEL_ELSEWHERE))
    column = torch.full_like(case.logits[:, :1], -torch.inf)
    wide = replace(case, logits=torch.cat([case.logits, column], -1), labels=case.labels.where(~elsewhere, v))
    if case.ref_logits is not None:
        wide = replace(wide, ref_logits=torch.cat([case.ref_logits, torch.full_like(column, -torch.inf)], -1))
    true, rounded = truth(wide), rounding(wide)
    assert (true.logps[elsewhere] == -torch.inf).all()
    result = run(backend, narrow)
    assert_within_budget(
        result,
        true._replace(dlogits=true.dlogits[:, :v]),
        None if rounded is None else rounded._replace(dlogits=rounded.dlogits[:, :v]),
    )
    assert_same_bits(run(backend, replace(narrow, logits=case.logits.clone()), inplace=True), result)


def assert_same_bits(actual: Result, expected: Result) -> None:
    """Equal to the last bit, NaN included."""
    for name in Result._fields:
        got, want = getattr(actual, name), getattr(expected, name)
        if want is None:
            assert got is None, f"{name} was not asked for"
        else:
            assert_same(got, want, name)


def assert_same(actual: Tensor, expected: Tensor, name: str = "value") -> None:
    """Two tensors with equal elements, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


# Rows that are hard for a kernel that keeps a running maximum and works in blocks. Each function takes noise [N, V] and
# returns logits.
def _offset(x: Tensor) -> Tensor:
    return x + 1e4


def _peaked(x: Tensor) -> Tensor:
    x[..., x.shape[-1] // 2] += 80
    return x


def _late_maximum(x: Tensor) -> Tensor:
    """The maximum is not among the first 512 elements, from which a kernel may take its shift, and would overflow."""
    x[..., -1] = 120
    x[..., : x.shape[-1] // 2] -= 30
    return x


def _ramp(x: Tensor) -> Tensor:
    """Each block of 256 raises the maximum by 50: sums taken against an old maximum overflow after two of them."""
    return x + 50 * torch.arange(x.shape[-1]).div(256, rounding_mode="floor")


def _falling(x: Tensor) -> Tensor:
    """The mirror image of `_ramp`: everything after the first blocks underflows."""
    return x - 50 * torch.arange(x.shape[-1]).div(256, rounding_mode="floor")


def _slope(x: Tensor) -> Tensor:
    """A new maximum at every element."""
    return x / 8 + torch.arange(x.shape[-1])


def _holes(value: float) -> Callable[[Tensor], Tensor]:
    """Two thirds of the vocabulary have this value, as in a masked row."""

    def fill(x: Tensor) -> Tensor:
        x[..., 1::3] = value
        x[..., 2::3] = value
        return x

    return fill


def _all_very_negative(x: Tensor) -> Tensor:
    return torch.full_like(x, -1e30)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x,
    "offset": _offset,
    "peaked": _peaked,
    "late_maximum": _late_maximum,
    "ramp": _ramp,
    "falling": _falling,
    "slope": _slope,
    "minus_1e9": _holes(-1e9),
    "minus_1e30": _holes(-1e30),
    "minus_inf": _holes(-torch.inf),
    "all_very_negative": _all_very_negative,
    "denormal": lambda x: x * 40,
}


def make_case(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "noise",
    ref_dtype: torch.dtype | None = None,
    mode: str = "both",
    seed: int = 0,
) -> Case:
    """A case in which every fourth row is ignored, every third is masked, and all upstream gradients differ from 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(n, v, generator=generator, dtype=torch.float64)

    # Finite numbers below a half-precision type's range stay finite: -inf is another case.
    def fit(x: Tensor, to: torch.dtype) -> Tensor:
        return torch.where(x.isinf(), x, x.clamp(min=torch.finfo(to).min)).to(to)

    logits = fit(ROWS[rows](noise()), dtype)
    ref_logits = fit(ROWS[rows](noise()), ref_dtype or dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[3::4] = IGNORE
    mask = torch.ones(n, dtype=torch.bool)
    mask[2::3] = False
    wide = precision.accumulate_dtype(dtype)
    dlogps, dkl = (0.5 + 1.5 * torch.rand(2, n, generator=generator)).mul(torch.tensor([[1.0], [-1.0]])).to(wide)
    return Case(logits, labels, ref_logits, mask, dlogps, dkl).only(mode)
