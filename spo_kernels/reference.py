"""The oracle: every op in plain torch, with its equation. Any device, any floating dtype; float64 in gives float64 out.

Notation, for one row (one token position) with policy logits z [V], reference logits r [V] and label y:

    p = softmax(z)    q = softmax(r)    lse(z) = log sum_v exp z_v
    logp   = z_y - lse(z)                                                    (log-probability of the label)
    kl     = sum_v p_v (log p_v - log q_v)                                   (exact token KL, nats)
    dz_v   = g_logp (1[v = y] - p_v) + g_kl p_v (log p_v - log q_v - kl)     (gradient of g_logp logp + g_kl kl)

A term with p_v = 0 contributes nothing, whatever r_v; r_v = -inf where p_v > 0 makes the KL +inf and its gradient NaN.

`RowOptions.mixture`, w below, puts another divergence in the place of kl. w = 1 is the reverse KL, 0 < w < 1 the
generalized Jensen-Shannon divergence (Agarwal et al. 2024, "On-Policy Distillation of Language Models", section 2):

    reverse_kl = sum_v q_v (log q_v - log p_v)           dz_v = g_kl (p_v - q_v)
    jsd        = w KL(p || m) + (1 - w) KL(q || m)       dz_v = g_kl w p_v (log p_v - log m_v - KL(p || m))
    m          = w p + (1 - w) q

jsd / w tends to kl where w tends to 0, and jsd / (1 - w) to reverse_kl where w tends to 1. The JSD is finite for all
logits. The gradient of an infinite reverse KL is finite.

`RowOptions` say how z comes from the numbers x in memory. The gradient is that of x:

    z = a x              dx = a dz
    z = b tanh(a x)      dx = a b (1 - tanh(a x)^2) dz
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.op_library import Size
from spo_kernels.precision import accumulate_dtype

# Label of a row whose token lies in another block of columns. Such a row has log-prob -inf, and its gradient has no
# one-hot term. The value is not the lowest int64: NaN cast to int64 gives that, and must stay an
# illegal label.
LABEL_ELSEWHERE = -(2**62) - 1


class RowOptions(NamedTuple):
    """How the logits of the equations come from the tensors of logits.

    A transform is ``[1, n]``, the factor a, or ``[2, n]``, the factors a and b of a softcap (module docstring), in the
    accumulation dtype. n is 1 or the number of rows N.
    """

    vocab_size: Size | None = None  # columns that are read; None for all. The gradient of the other columns is 0
    transform: Tensor | None = None  # of the policy's logits; None for z = x
    ref_transform: Tensor | None = None  # of the reference's logits
    mixture: float = 0.0  # which divergence: 0 is the KL, see the module docstring


def is_jsd(mixture: float) -> bool:
    """Whether a divergence is a JSD. Its statistics have a fifth row."""
    return 0 < mixture < 1


PLAIN = RowOptions()


def transformed(x: Tensor, transform: Tensor | None) -> Tensor:
    """z ``[..., V]`` of x in the accumulation dtype, or in a wider one."""
    if transform is None:
        return x
    a, *b = _factors(x, transform)
    return b[0] * (a * x).tanh() if b else a * x


def _factors(logits: Tensor, transform: Tensor) -> list[Tensor]:
    """a, or a and b, in a shape that broadcasts with logits ``[..., V]``."""
    return [factor.view(() if factor.shape[0] == 1 else logits.shape[:-1])[..., None] for factor in transform]


def transformed_logits(raw: Tensor, vocab_size: int | None, transform: Tensor | None) -> Tensor:
    """z ``[..., V]`` in the accumulation dtype."""
    return transformed(raw[..., :vocab_size].to(accumulate_dtype(raw.dtype)), transform)


def raw_gradient(dz: Tensor, logits: Tensor, options: RowOptions) -> Tensor:
    """dx like logits from dz ``[..., V]``, 0 in the padding, by differentiable functions."""
    dx = dz if options.transform is None else dz * _slope(logits, options.vocab_size, options.transform)
    return torch.nn.functional.pad(dx, (0, logits.shape[-1] - dz.shape[-1])).to(logits.dtype)


def _slope(logits: Tensor, vocab_size: int | None, transform: Tensor) -> Tensor:
    """dz / dx, in a shape that broadcasts with logits ``[..., V]``."""
    a, *b = _factors(logits, transform)
    if not b:
        return a
    x = logits[..., :vocab_size].to(accumulate_dtype(logits.dtype))
    return a * b[0] * (1 - (a * x).tanh().square())


def _log_softmax_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(shift, logsum)`` with ``lse = shift + logsum``, shift the row's maximum; each ``logits.shape[:-1]``."""
    shift = logits.amax(-1)
    # A row of only -inf gets shift 0: exp() is then 0 and logsum -inf. With shift -inf every term would be NaN.
    shift = torch.where(shift == -torch.inf, 0, shift)
    return shift, (logits - shift[..., None]).exp().sum(-1).log()


def _log_probs(logits: Tensor, shift: Tensor, logsum: Tensor) -> Tensor:
    # In this order: shift + logsum rounded to float32 near 1e4 would cost 5e-4 of every probability.
    return (logits - shift[..., None]) - logsum[..., None]


def _log_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """``(p, log p - log q)``, the latter 0 where p is 0 (0 log 0 = 0, and -inf - -inf never arises)."""
    p = log_p.exp()
    return p, torch.where(p > 0, log_p - log_q, torch.where(p.isnan(), p, 0))


def log_shares(log_p: Tensor, log_q: Tensor, mixture: float) -> tuple[Tensor, Tensor]:
    """``(log p - log m, log q - log m)``. A share of a token with p or q of 0 may be infinite or NaN."""
    gap = log_p - log_q
    far = (-gap.abs()).exp()
    log_sum = torch.where(gap < 0, (1 - mixture) + mixture * far, mixture + (1 - mixture) * far).log()
    return gap.clamp(max=0) - log_sum, -gap.clamp(min=0) - log_sum


def mixture_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, options: RowOptions = PLAIN
) -> Tensor:
    """``KL(p || m)`` and ``KL(q || m)`` of each row, 0 where masked: ``[2, *rows]``.

    stats: ``[4 or 5, *rows]``, as `token_stats_fwd` returns them. If they are statistics over more columns than logits
    has, the result is this block's share of both sums.
    """
    log_p = _log_probs(transformed_logits(logits, options.vocab_size, options.transform), stats[0], stats[1])
    log_q = _log_probs(transformed_logits(ref_logits, options.vocab_size, options.ref_transform), stats[2], stats[3])
    sums = [
        torch.where(p == 0, 0, p * share).sum(-1)
        for p, share in zip((log_p.exp(), log_q.exp()), log_shares(log_p, log_q, options.mixture), strict=True)
    ]
    return torch.stack(sums if mask is None else [torch.where(mask, total, 0) for total in sums])


def token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    options: RowOptions = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, token KL (or the divergence of `RowOptions.mixture`), and what the backward needs.

    Args: logits ``[N, V]`` or ``[B, T, V]``; labels the same without V, int64
    (`LABEL_ELSEWHERE` included), or None; ref_logits like logits or None (with a vocab_size, of any width that holds
    it); mask like labels, bool, False where the KL is not wanted, or None for all rows.

    Returns ``(logps, kl, stats)``: logps and kl are ``logits.shape[:-1]`` (``[0]`` without labels or ref_logits) and
    are 0 on ignored and masked rows; stats is ``[2, 4 or 5, *rows]``: shift and logsum of the policy, then of the
    reference, then KL(p || m) if the divergence is a JSD.
    """
    z = transformed_logits(logits, options.vocab_size, options.transform)
    shift, logsum = _log_softmax_stats(z)
    stats = [shift, logsum]
    log_p = _log_probs(z, shift, logsum)
    logps = kl = z.new_empty(0)
    if labels is not None:
        valid = labels != ignore_index
        held = (labels >= 0) & (labels < z.shape[-1])
        legal = held | ~valid | (labels == LABEL_ELSEWHERE)
        if not bool(legal.all()):
            bad = labels[~legal][0].item()
            raise RuntimeError(f"labels must be in [0, {z.shape[-1]}) or ignore_index {ignore_index}, got {bad}")
        picked = log_p.gather(-1, torch.where(held, labels, 0)[..., None])[..., 0]
        logps = torch.where(valid, torch.where(held, picked, -torch.inf), 0)
    if ref_logits is not None:
        r = transformed_logits(ref_logits, options.vocab_size, options.ref_transform)
        ref_shift, ref_logsum = _log_softmax_stats(r)
        stats += [ref_shift, ref_logsum]
        log_q = _log_probs(r, ref_shift, ref_logsum)
        if is_jsd(options.mixture):
            of_policy, of_ref = mixture_kl(logits, ref_logits, mask, torch.stack(stats), options)
            stats.append(of_policy)
            kl = options.mixture * of_policy + (1 - options.mixture) * of_ref
        else:
            p, ratio = _log_ratio(log_q, log_p) if options.mixture else _log_ratio(log_p, log_q)
            kl = (p * ratio).sum(-1)
        if mask is not None:
            kl = torch.where(mask, kl, 0)
    return logps, kl, torch.stack(stats)


def _divergence_slope(log_p: Tensor, log_q: Tensor, kl: Tensor, stats: Tensor, mixture: float) -> Tensor:
    """The gradient of the divergence with respect to z."""
    p = log_p.exp()
    if mixture == 1:
        return p - log_q.exp()
    if mixture == 0:
        return p * (_log_ratio(log_p, log_q)[1] - kl[..., None])
    share = log_shares(log_p, log_q, mixture)[0] - stats[4, ..., None]
    return mixture * torch.where(p == 0, 0, p * share)


def token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    inplace: bool,
    dlse: Tensor | None = None,
    options: RowOptions = PLAIN,
) -> Tensor:
    """``dx`` (module docstring) for upstream gradients dlogps, dkl and dlse, each ``logits.shape[:-1]``. inplace: write
    it into logits.

    dlse adds ``dlse p`` to dz: the gradient of the log-sum-exp, shift + logsum of the policy. kl and stats are what the
    forward returned. The gradient has the logits' dtype and shape. Rows that are ignored, masked or have upstream
    gradients of 0 are not read: their gradient is exactly 0, even where their logits are NaN.
    """
    z = transformed_logits(logits, options.vocab_size, options.transform)
    log_p = _log_probs(z, stats[0], stats[1])
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if dlogps is not None and labels is not None:
        valid = (labels != ignore_index) & (dlogps != 0)
        g = torch.where(valid, dlogps.to(p.dtype), 0)[..., None]
        held = valid & (labels != LABEL_ELSEWHERE)
        onehot = torch.zeros_like(p).scatter_(-1, torch.where(held, labels, 0)[..., None], held[..., None].to(p.dtype))
        grad += torch.where(valid[..., None], g * (onehot - p), 0)
    if dkl is not None and ref_logits is not None:
        wanted = dkl != 0 if mask is None else mask & (dkl != 0)
        r = transformed_logits(ref_logits, options.vocab_size, options.ref_transform)
        log_q = _log_probs(r, stats[2], stats[3])
        g = torch.where(wanted, dkl.to(p.dtype), 0)[..., None]
        grad += torch.where(wanted[..., None], g * _divergence_slope(log_p, log_q, kl, stats, options.mixture), 0)
    if dlse is not None:
        wanted = dlse != 0
        g = torch.where(wanted, dlse.to(p.dtype), 0)[..., None]
        grad += torch.where(wanted[..., None], g * p, 0)
    if options.transform is not None:
        slope = _slope(logits, options.vocab_size, options.transform)
        grad = torch.where(grad == 0, 0, grad * slope)  # rows that are not read have NaN as their slope
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    dlogits[..., : z.shape[-1]] = grad
    dlogits[..., z.shape[-1] :] = 0
    return dlogits


def kl_loss_fwd(
    logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, inplace: bool, options: RowOptions = PLAIN
) -> tuple[Tensor, Tensor]:
    """``sum_i row_weight_i kl_i`` (0-d) and its gradient with respect to logits; in place: written into logits.

    Rows of weight 0 are skipped: no KL and a zero gradient. None weighs every row 1.
    """
    mask = None if row_weight is None else row_weight != 0
    _, kl, stats = token_stats_fwd(logits, None, ref_logits, mask, -100, options)
    weight = torch.ones_like(kl) if row_weight is None else row_weight.to(kl.dtype)
    dlogits = token_stats_bwd(None, weight, logits, None, ref_logits, mask, kl, stats, -100, inplace, options=options)
    return torch.where(weight != 0, weight * kl, 0).sum(), dlogits


def scale_(tensor: Tensor, scale: Tensor) -> None:
    """``tensor *= scale`` for a 0-d scale. Backends may skip the write at a scale of 1."""
    tensor.mul_(scale)
