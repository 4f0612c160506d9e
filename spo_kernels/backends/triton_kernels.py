"""Triton kernels of the row ops: what `spo_kernels.reference` computes, in one pass over the logits.

`spo_kernels.backends.triton` launches them.

N rows, V vocabulary. Logits are ``[B, T, V]`` with a unit last stride: row i starts at
``(i // T) * stride_b + (i % T) * stride_t``. Everything per row (labels, mask, statistics, upstream gradients) is
contiguous; ``stats`` is ``[2, 4 or 5, N]``, and its dtype is the one everything is accumulated in.

The forward reads a row in tiles of ``[STEPS, LANES, VECTOR]`` and keeps a running maximum and sums per lane. A lane
belongs to one thread. A vector is what a thread loads at once: a single element where rows are not aligned. The maximum
moves at most once per tile, so an element takes ``1 + 1 / (STEPS * VECTOR)`` exponentials. No thread waits for another
before the end of the row.

V columns are read, `width` columns of the gradient are written. A transform ``[FACTORS, transform_rows]`` has the
factors of `spo_kernels.reference.RowOptions`, in the dtype of statistics. It is applied when an element is loaded.
Without a transform, FACTORS is 0. MIXTURE is that of `RowOptions` too.
"""

# Triton gives kernel parameters their types; comments name them.

from __future__ import annotations

import triton
import triton.language as tl

from spo_kernels import reference

LABEL_ELSEWHERE = tl.constexpr(reference.LABEL_ELSEWHERE)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) - float32(log2(e))

# Values that change from batch to batch are not specialized: each kind of value would compile the kernel anew.
_row_kernel = triton.jit(do_not_specialize=["N", "T", "ignore_index", "transform_rows", "ref_transform_rows"])


@triton.jit
def _row_offset(row, T, stride_b, stride_t):
    return (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t


@triton.jit
def _exp(x):
    """Relative error in float32 up to ``6e-8 |x|``, from rounding ``x log2(e)``. Sums average it out."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _quotient(a, b):
    """Correctly rounded quotient. Triton's float32 ``/`` is ``div.full.f32`` (2 ulp), where ``x / x`` need not be 1."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _origin(top):
    """The number to subtract before an exponential: the maximum, or 0 for a maximum of -inf (-inf - -inf is NaN)."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _tanh(x):
    """Max error 2.4 ulp where exponentials and quotients are within 2 ulp, 1.8 ulp where they are within 1 ulp.

    Below 1, ``1 - 2 / (exp(2 x) + 1)`` would cancel. There a convergent of Lambert's continued fraction
    ``x / (1 + x^2 / (3 + x^2 / (5 + ...)))`` is within 1e-9 of tanh, in float64 within 5e-17. It is written as x less a
    correction, whose rounding errors count a quarter at most.
    """
    # Not libdevice.tanh, which the interpreter lacks.
    y = tl.abs(x)
    u = y * y
    if x.dtype.scalar == tl.float64:
        over = u * tl.fma(u, tl.fma(u, tl.fma(u, 44.0, 12870.0), 810810.0), 11486475.0)
        under = tl.fma(u, tl.fma(u, tl.fma(u, tl.fma(u, 45.0, 13860.0), 945945.0), 16216200.0), 34459425.0)
    else:
        over = u * tl.fma(u, u + 189.0, 3465.0)
        under = tl.fma(u, tl.fma(u, u + 210.0, 4725.0), 10395.0)
    small = y < 1.0
    # One division for both: either y - y over / under or 1 - 2 / (exp(2 y) + 1).
    less = tl.where(small, y * over, 2.0) / tl.where(small, under, tl.exp2(y * (2 * LOG2E)) + 1.0)
    result = tl.where(small, y, 1.0) - less
    return tl.where(x < 0, -result, result)


@triton.jit
def _factors(transform, row, transform_rows, dtype: tl.constexpr, FACTORS: tl.constexpr):
    """``(a, b)`` of a row; 1 for a factor that the transform does not have."""
    a = tl.full([], 1.0, dtype)
    b = tl.full([], 1.0, dtype)
    if FACTORS > 0:
        transform += row % transform_rows
        a = tl.load(transform)
        if FACTORS == 2:
            b = tl.load(transform + transform_rows)
    return a, b


@triton.jit
def _transformed(x, factors, FACTORS: tl.constexpr):
    """``(z, dz/dx)`` for the numbers x in memory."""
    a, b = factors
    if FACTORS == 0:
        return x, a
    elif FACTORS == 1:
        return a * x, a
    else:
        t = _tanh(a * x)
        return b * t, (a * b) * ((1.0 - t) * (1.0 + t))


@triton.jit
def _load_logits(row_logits, columns, inside, factors, dtype: tl.constexpr, FACTORS: tl.constexpr, EVICT: tl.constexpr):
    """``(z, dz/dx)`` of these columns; z is -inf outside."""
    x = tl.load(row_logits + columns, mask=inside, other=float("-inf"), eviction_policy=EVICT).to(dtype)
    z, slope = _transformed(x, factors, FACTORS)
    if FACTORS > 0:
        z = tl.where(inside, z, float("-inf"))
    return z, slope


@triton.jit
def _load_tile(
    row_logits,
    start,
    V,
    factors,
    dtype: tl.constexpr,
    FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
):
    vectors = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    columns = start + vectors[:, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return _load_logits(row_logits, columns, columns < V, factors, dtype, FACTORS, EVICT)[0]


@triton.jit
def _lane_max(tile):
    return tl.max(tl.max(tile, 0), 1)


@triton.jit
def _lane_sum(tile):
    return tl.sum(tl.sum(tile, 0), 1)


@triton.jit
def _softmax_stats(
    row_logits,
    V,
    factors,
    dtype: tl.constexpr,
    FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``(shift, logsum)`` of one row, shift its maximum."""
    top = tl.full([LANES], float("-inf"), dtype)
    total = tl.zeros([LANES], dtype)
    for start in range(0, V, STEPS * LANES * VECTOR):
        z = _load_tile(row_logits, start, V, factors, dtype, FACTORS, STEPS, LANES, VECTOR, "evict_first")
        new_top = tl.maximum(top, _lane_max(z))
        origin = _origin(new_top)
        total = total * _exp(top - origin) + _lane_sum(_exp(z - origin[None, :, None]))
        top = new_top
    shift = _origin(tl.max(top, 0))
    return shift, tl.log(tl.sum(total * _exp(top - shift), 0))


@triton.jit
def _moved_gap(gap, total, keep, move):
    """Sum of ``weight * gap`` after the origins moved: weights shrink by `keep`, each gap grows by `move`.

    A weight that has vanished contributes 0, even if its gap or the move from an origin of -inf is infinite.
    """
    return tl.where(keep == 0, 0.0, keep * (gap + total * move))


@triton.jit
def _kl_stats(
    row_logits,
    row_ref,
    V,
    factors,
    ref_factors,
    dtype: tl.constexpr,
    FACTORS: tl.constexpr,
    REF_FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
):
    """``(shift, logsum, ref_shift, ref_logsum, kl)`` of one row.

    kl is the expected gap ``E_p[(z - shift) - (r - ref_shift)] + ref_logsum - logsum``: exactly 0 for equal logits,
    because then every gap is 0 and both sums go through the same operations in the same order.
    """
    top = tl.full([LANES], float("-inf"), dtype)
    ref_top = tl.full([LANES], float("-inf"), dtype)
    total = tl.zeros([LANES], dtype)
    ref_total = tl.zeros([LANES], dtype)
    gap = tl.zeros([LANES], dtype)
    for start in range(0, V, STEPS * LANES * VECTOR):
        z = _load_tile(row_logits, start, V, factors, dtype, FACTORS, STEPS, LANES, VECTOR, EVICT)
        r = _load_tile(row_ref, start, V, ref_factors, dtype, REF_FACTORS, STEPS, LANES, VECTOR, EVICT)
        new_top = tl.maximum(top, _lane_max(z))
        new_ref_top = tl.maximum(ref_top, _lane_max(r))
        origin = _origin(new_top)
        ref_origin = _origin(new_ref_top)
        z -= origin[None, :, None]
        r -= ref_origin[None, :, None]
        weight = _exp(z)
        # A weight of 0 contributes 0, even if both logits are -inf and their gap is NaN.
        gaps = _lane_sum(weight * tl.where(weight == 0, 0.0, z - r))
        move = top - origin
        ref_move = ref_top - ref_origin
        keep = _exp(move)
        gap = _moved_gap(gap, total, keep, move - ref_move) + gaps
        total = total * keep + _lane_sum(weight)
        ref_total = ref_total * _exp(ref_move) + _lane_sum(_exp(r))
        top = new_top
        ref_top = new_ref_top
    shift = _origin(tl.max(top, 0))
    ref_shift = _origin(tl.max(ref_top, 0))
    move = top - shift
    ref_move = ref_top - ref_shift
    keep = _exp(move)
    gap = tl.sum(_moved_gap(gap, total, keep, move - ref_move), 0)
    total = tl.sum(total * keep, 0)
    ref_total = tl.sum(ref_total * _exp(ref_move), 0)
    # One logarithm of the quotient: the stats' two logarithms are rounded, and a small KL is their difference.
    kl = _quotient(gap, total) + tl.log(_quotient(ref_total, total))
    return shift, tl.log(total), ref_shift, tl.log(ref_total), kl


@triton.jit
def _probability(z, logsum):
    """``exp(z - logsum)``; the shift is subtracted from z already. Rounded once before the exponential."""
    if z.dtype.scalar == tl.float64:
        return _exp(z - logsum)
    else:
        return tl.exp2(tl.fma(z, LOG2E, tl.fma(z, LOG2E_LOW, -logsum * LOG2E)))


@triton.jit
def _kl_grad(z, r, p, logsum, ref_logsum, kl):
    """``p (log p - log q - kl)``, with log p - log q = 0 where p is 0; shifts are subtracted from z and r already."""
    # In this order: where p is near 1, z - r and kl nearly cancel, so they must meet before anything is added.
    return p * tl.where(p == 0, -kl, ((z - r) - kl) + (ref_logsum - logsum))


@triton.jit
def _log_shares(gap, MIXTURE: tl.constexpr):
    """``(log p - log m, log q - log m)`` for gap = log p - log q, with m = MIXTURE p + (1 - MIXTURE) q."""
    share = tl.full([], MIXTURE, gap.dtype)
    rest = tl.full([], 1 - MIXTURE, gap.dtype)
    far = _exp(-tl.abs(gap))
    log_sum = tl.log(tl.where(gap < 0, rest + share * far, share + rest * far))
    return tl.where(gap < 0, gap, 0.0) - log_sum, tl.where(gap > 0, -gap, 0.0) - log_sum


@triton.jit
def _divergence_grad(z, r, p, logsum, ref_logsum, kl, MIXTURE: tl.constexpr):
    """Gradient of the divergence. kl: of the KL itself; for a JSD, KL(p || m); unused for the reverse KL."""
    if MIXTURE == 0:
        return _kl_grad(z, r, p, logsum, ref_logsum, kl)
    elif MIXTURE == 1:
        return p - _probability(r, ref_logsum)
    else:
        of_policy = _log_shares((z - r) + (ref_logsum - logsum), MIXTURE)[0]
        return tl.full([], MIXTURE, p.dtype) * p * tl.where(p == 0, 0.0, of_policy - kl)


@_row_kernel
def mixture_kl_kernel(
    logits,  # [B, T, V]
    ref_logits,  # [B, T, V]
    mask,  # [N] bool, or None: every row
    stats,  # [4 or 5, N]
    kls,  # out [2, N]: KL(p || m), KL(q || m)
    N,
    V,
    T,
    stride_b,
    stride_t,
    ref_stride_b,
    ref_stride_t,
    transform,  # [1 or 2, transform_rows], or None
    transform_rows,  # 1 or N, or None
    ref_transform,  # [1 or 2, ref_transform_rows], or None
    ref_transform_rows,  # 1 or N, or None
    FACTORS: tl.constexpr,
    REF_FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    MIXTURE: tl.constexpr,
):
    """Grid: one program per row. Masked rows are not read, and their outputs are 0."""
    row = tl.program_id(0)
    dtype: tl.constexpr = stats.dtype.element_ty
    of_policy = tl.zeros([LANES], dtype)
    of_ref = tl.zeros([LANES], dtype)
    wanted = True if mask is None else tl.load(mask + row)
    if wanted:
        logits += _row_offset(row, T, stride_b, stride_t)
        ref_logits += _row_offset(row, T, ref_stride_b, ref_stride_t)
        factors = _factors(transform, row, transform_rows, dtype, FACTORS)
        ref_factors = _factors(ref_transform, row, ref_transform_rows, dtype, REF_FACTORS)
        ref_stats = stats + N + N  # in two steps: 2 * N may not fit in 32 bits
        shift = tl.load(stats + row)
        logsum = tl.load(stats + N + row)
        ref_shift = tl.load(ref_stats + row)
        ref_logsum = tl.load(ref_stats + N + row)
        for start in range(0, V, STEPS * LANES * VECTOR):
            z = _load_tile(logits, start, V, factors, dtype, FACTORS, STEPS, LANES, VECTOR, "evict_first")
            r = _load_tile(ref_logits, start, V, ref_factors, dtype, REF_FACTORS, STEPS, LANES, VECTOR, "evict_first")
            z -= shift
            r -= ref_shift
            p = _probability(z, logsum)
            q = _probability(r, ref_logsum)
            policy_share, ref_share = _log_shares((z - r) + (ref_logsum - logsum), MIXTURE)
            of_policy += _lane_sum(p * tl.where(p == 0, 0.0, policy_share))
            of_ref += _lane_sum(q * tl.where(q == 0, 0.0, ref_share))
    tl.store(kls + row, tl.sum(of_policy, 0))
    tl.store(kls + N + row, tl.sum(of_ref, 0))


@_row_kernel
def token_stats_fwd_kernel(
    logits,  # [B, T, V]
    labels,  # [N] int64, or None: no log-probabilities
    ref_logits,  # [B, T, V], or None: no KL
    mask,  # [N] bool, or None: the KL of every row
    logps,  # out [N]; None if labels is None
    kl,  # out [N]; None if ref_logits is None
    stats,  # out [2 or 4, N]
    V,
    T,
    stride_b,
    stride_t,
    ref_stride_b,
    ref_stride_t,
    ignore_index,
    transform,  # [1 or 2, transform_rows], or None
    transform_rows,  # 1 or N, or None
    ref_transform,  # [1 or 2, ref_transform_rows], or None
    ref_transform_rows,  # 1 or N, or None
    FACTORS: tl.constexpr,
    REF_FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid: one program per row. Rows that are ignored and masked are not read, and their outputs are 0."""
    row = tl.program_id(0)
    N = tl.num_programs(0)
    dtype: tl.constexpr = stats.dtype.element_ty
    logits += _row_offset(row, T, stride_b, stride_t)
    factors = _factors(transform, row, transform_rows, dtype, FACTORS)

    if labels is not None:
        label = tl.load(labels + row)
        labelled = label != ignore_index
    else:
        labelled = ref_logits is None

    shift = tl.full([], 0.0, dtype)
    logsum = tl.full([], 0.0, dtype)
    if ref_logits is not None:
        ref_shift = tl.full([], 0.0, dtype)
        ref_logsum = tl.full([], 0.0, dtype)
        row_kl = tl.full([], 0.0, dtype)
        wanted = True if mask is None else tl.load(mask + row)
        if wanted:
            row_ref = ref_logits + _row_offset(row, T, ref_stride_b, ref_stride_t)
            ref_factors = _factors(ref_transform, row, ref_transform_rows, dtype, REF_FACTORS)
            shift, logsum, ref_shift, ref_logsum, row_kl = _kl_stats(
                logits,
                row_ref,
                V,
                factors,
                ref_factors,
                dtype,
                FACTORS,
                REF_FACTORS,
                STEPS,
                LANES,
                VECTOR,
                "evict_first",
            )
        elif labelled:
            shift, logsum = _softmax_stats(logits, V, factors, dtype, FACTORS, STEPS, LANES, VECTOR)
        tl.store(kl + row, row_kl)
        ref_stats = stats + N + N  # in two steps: 2 * N may not fit in 32 bits
        tl.store(ref_stats + row, ref_shift)
        tl.store(ref_stats + N + row, ref_logsum)
    elif labelled:
        shift, logsum = _softmax_stats(logits, V, factors, dtype, FACTORS, STEPS, LANES, VECTOR)
    tl.store(stats + row, shift)
    tl.store(stats + N + row, logsum)

    if labels is not None:
        in_range = (label >= 0) & (label < V)
        elsewhere = label == LABEL_ELSEWHERE
        tl.device_assert(in_range | elsewhere | ~labelled, "labels must be in [0, V) or ignore_index")
        # In this order: shift + logsum rounded to float32 near 1e4 would cost 5e-4 of the probability.
        picked = tl.load(logits + label, mask=labelled & in_range, other=0.0).to(dtype)
        picked = _transformed(picked, factors, FACTORS)[0]
        logp = tl.where(elsewhere, float("-inf"), (picked - shift) - logsum)
        tl.store(logps + row, tl.where(labelled, logp, 0.0))


@_row_kernel
def token_stats_bwd_kernel(
    dlogits,  # out [B, T, V]; may be logits
    dlogps,  # [N], or None
    dkl,  # [N], or None
    dlse,  # [N], or None
    logits,  # [B, T, V]
    labels,  # [N] int64; None if dlogps is None
    ref_logits,  # [B, T, V]; None if dkl is None
    mask,  # [N] bool, or None: every row
    kl,  # [N]
    stats,  # [2, 4 or 5, N]
    N,
    V,
    width,  # columns of dlogits, or None: V
    T,
    stride_b,
    stride_t,
    dlogits_stride_b,
    dlogits_stride_t,
    ref_stride_b,
    ref_stride_t,
    ignore_index,
    transform,  # [1 or 2, transform_rows], or None
    transform_rows,  # 1 or N, or None
    ref_transform,  # [1 or 2, ref_transform_rows], or None
    ref_transform_rows,  # 1 or N, or None
    FACTORS: tl.constexpr,
    REF_FACTORS: tl.constexpr,
    MIXTURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program per BLOCK of a row of dlogits. Each element is read, then written, by the same program."""
    blocks = tl.cdiv(V if width is None else width, BLOCK)
    row = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    dtype: tl.constexpr = stats.dtype.element_ty
    logits += _row_offset(row, T, stride_b, stride_t)
    dlogits += _row_offset(row, T, dlogits_stride_b, dlogits_stride_t)

    labelled = False
    wanted = False
    if dlogps is not None:
        label = tl.load(labels + row)
        labelled = (label != ignore_index) & (tl.load(dlogps + row) != 0)
    if dkl is not None:
        wanted = tl.load(dkl + row) != 0
        if mask is not None:
            wanted &= tl.load(mask + row)
    read = labelled | wanted
    if dlse is not None:
        g_lse = tl.load(dlse + row).to(dtype)
        read |= g_lse != 0

    grad = tl.zeros([BLOCK], dtype)
    if read:
        factors = _factors(transform, row, transform_rows, dtype, FACTORS)
        z, slope = _load_logits(logits, columns, inside, factors, dtype, FACTORS, "evict_first")
        z -= tl.load(stats + row)
        logsum = tl.load(stats + N + row)
        p = _probability(z, logsum)
        if dlogps is not None:
            g = tl.where(labelled, tl.load(dlogps + row).to(dtype), 0.0)
            grad += g * (tl.where(columns == label, 1.0, 0.0) - p)
        if dlse is not None:
            grad += g_lse * p
        if (dkl is not None) and wanted:
            row_ref = ref_logits + _row_offset(row, T, ref_stride_b, ref_stride_t)
            ref_factors = _factors(ref_transform, row, ref_transform_rows, dtype, REF_FACTORS)
            r = _load_logits(row_ref, columns, inside, ref_factors, dtype, REF_FACTORS, "evict_first")[0]
            ref_stats = stats + N + N
            r -= tl.load(ref_stats + row)
            ref_logsum = tl.load(ref_stats + N + row)
            g_kl = tl.load(dkl + row).to(dtype)
            if (MIXTURE > 0) and (MIXTURE < 1):
                kl = ref_stats + N + N
            grad += g_kl * _divergence_grad(z, r, p, logsum, ref_logsum, tl.load(kl + row), MIXTURE)
        if FACTORS > 0:
            grad *= slope
        if width is not None:
            # The padding is 0. Without this it would be NaN if a statistic of the row is not finite.
            grad = tl.where(inside, grad, 0.0)
    written = inside if width is None else columns < width
    tl.store(dlogits + columns, grad.to(dlogits.dtype.element_ty), mask=written)


@triton.jit
def _store_zeros(row_dlogits, start, end, BLOCK: tl.constexpr):
    for first in range(start, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(row_dlogits + columns, tl.zeros([BLOCK], row_dlogits.dtype.element_ty), mask=columns < end)


@_row_kernel
def kl_loss_fwd_kernel(
    dlogits,  # out [B, T, V]; may be logits
    losses,  # out [N]: row_weight * kl
    logits,  # [B, T, V]
    ref_logits,  # [B, T, V]
    row_weight,  # [N], or None: 1
    V,
    width,  # columns of dlogits, or None: V
    T,
    stride_b,
    stride_t,
    dlogits_stride_b,
    dlogits_stride_t,
    ref_stride_b,
    ref_stride_t,
    transform,  # [1 or 2, transform_rows], or None
    transform_rows,  # 1 or N, or None
    ref_transform,  # [1 or 2, ref_transform_rows], or None
    ref_transform_rows,  # 1 or N, or None
    FACTORS: tl.constexpr,
    REF_FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid: one program per row: its statistics, then its gradient while the row is in the cache."""
    row = tl.program_id(0)
    dtype: tl.constexpr = losses.dtype.element_ty
    logits += _row_offset(row, T, stride_b, stride_t)
    ref_logits += _row_offset(row, T, ref_stride_b, ref_stride_t)
    dlogits += _row_offset(row, T, dlogits_stride_b, dlogits_stride_t)
    weight = tl.full([], 1.0, dtype) if row_weight is None else tl.load(row_weight + row).to(dtype)

    loss = tl.full([], 0.0, dtype)
    BLOCK: tl.constexpr = STEPS * LANES * VECTOR
    if weight == 0:
        _store_zeros(dlogits, 0, V if width is None else width, BLOCK)
    else:
        factors = _factors(transform, row, transform_rows, dtype, FACTORS)
        ref_factors = _factors(ref_transform, row, ref_transform_rows, dtype, REF_FACTORS)
        shift, logsum, ref_shift, ref_logsum, kl = _kl_stats(
            logits,
            ref_logits,
            V,
            factors,
            ref_factors,
            dtype,
            FACTORS,
            REF_FACTORS,
            STEPS,
            LANES,
            VECTOR,
            "evict_last",
        )
        loss = weight * kl
        # In place the loop overwrites the logits that the statistics were read from. That is no race: each statistic is
        # a reduction over the whole row, so all threads have read their part.
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            z, slope = _load_logits(logits, columns, inside, factors, dtype, FACTORS, "evict_first")
            r = _load_logits(ref_logits, columns, inside, ref_factors, dtype, REF_FACTORS, "evict_first")[0]
            z -= shift
            grad = weight * _kl_grad(z, r - ref_shift, _probability(z, logsum), logsum, ref_logsum, kl)
            if FACTORS > 0:
                grad *= slope
            tl.store(dlogits + columns, grad.to(dlogits.dtype.element_ty), mask=inside)
        if width is not None:
            _store_zeros(dlogits, V, width, BLOCK)
    tl.store(losses + row, loss)


@_row_kernel
def scale_kernel(
    tensor,  # [B, T, V], in place
    scale,  # 0-d
    V,
    T,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
):
    """Grid: one program per BLOCK of a row. A scale of 1 leaves the memory untouched."""
    dtype: tl.constexpr = tl.float64 if tensor.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(scale).to(dtype)
    if factor != 1:
        blocks = tl.cdiv(V, BLOCK)
        row = tl.program_id(0) // blocks
        columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        elements = tensor + _row_offset(row, T, stride_b, stride_t) + columns
        x = tl.load(elements, mask=columns < V)
        tl.store(elements, (x.to(dtype) * factor).to(x.dtype), mask=columns < V)
