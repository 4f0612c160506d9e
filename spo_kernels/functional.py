"""The public functions from logits: what they accept and refuse. `spo_kernels.row_ops` does the work.

Shapes: logits ``[..., V]``, with any number of leading dimensions. A slice of rows such as ``logits[:, :-1]`` of
``[B, T, V]`` is not copied. Logits with a non-unit last stride are copied. Dtypes: float32, bfloat16, float16 or
float64; outputs and accumulation are float32, float64 for float64 logits. Log-probabilities and KL are in nats.
Gradients have the logits' dtype. Labels arrive aligned with the logits: only `get_batch_logps` shifts.

A vocabulary may be split over the processes of a ``process_group``, as Megatron's parallel output layer splits it. Each
process has the logits ``[..., V_r]`` of its own columns, in the order of ranks. Labels (of the whole vocabulary), masks
and upstream gradients are the same in every process. Every process gets the same result, bit for bit, and the gradient
of its own logits. The forward is one all-gather of a few numbers a row; the backward has no communication. All
processes must call. Labels and masks that differ between them are a ValueError in all (a device-side assertion on a
GPU).

DTensors are taken where all are replicated, or where logits are sharded along the vocabulary over one dimension of
their mesh; see `spo_kernels.distributed.takes_dtensors`. In place (inplace_backward, overwrite_logits) they are
refused.

Options. `get_batch_logps` takes none; those that begin with ref_ belong to the functions with ref_logits:
    temperature: > 0; divides the logits. A number, or a Tensor ``[...]`` with one for each row (or ``[]``), without
        gradient.
    softcap: > 0 or None; logits become ``softcap tanh(logits / softcap)`` before the temperature, as in Gemma 2.
    logit_scale: not 0; multiplies the logits first, as in Cohere's models.
    ref_temperature, ref_softcap, ref_logit_scale: the same of the reference's logits. None: as the policy's. A
        ref_softcap of inf: no softcap.
    vocab_size: columns of the whole vocabulary, if the logits have more: the columns after it are padding. They are not
        read, and their gradient is 0. Policy and reference may have different numbers of padding columns. With a
        process_group the vocabulary must end in the last process's columns.
    divergence, mixture: of the functions with ref_logits. "kl" is KL(policy || reference), as SPO's objective has it.
        "reverse_kl" is KL(reference || policy). "jsd" is the generalized Jensen-Shannon divergence
        ``mixture KL(p || m) + (1 - mixture) KL(q || m)``, where ``m = mixture p + (1 - mixture) q``; mixture is > 0 and
        < 1, and None stands for 0.5. A JSD reads each row twice in the forward, since its terms need p and q.

All act within the one pass, except a JSD. None makes a ``[..., V]`` tensor.

Every function raises ValueError where a shape, dtype or device is wrong, naming the argument, what it must be and what
came. A label outside ``[0, V)`` that is not ``ignore_index`` is a RuntimeError (a device-side assertion on a GPU). NaN
logits give NaN for their own row and affect no other. Rows that are ignored, masked or of weight 0 are not read: their
outputs and gradients are exactly 0 even where their logits are NaN. The same holds for gradients of rows with an
upstream gradient of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from spo_kernels import row_ops
from spo_kernels.checks import (
    IGNORE_INDEX,
    check_inplace,
    check_logits,
    check_markable,
    check_ref_logits,
    check_rows,
    check_sequences,
    checked_row_weight,
    differentiated_eagerly,
)
from spo_kernels.distributed import takes_dtensors
from spo_kernels.divergences import checked_mixture
from spo_kernels.logit_options import LogitOptions, RefLogitOptions, checked_transform, checked_transforms
from spo_kernels.op_library import is_transforming, refuse_transforms
from spo_kernels.precision import can_precompute_gradient
from spo_kernels.reference import RowOptions
from spo_kernels.row_transforms import TokenStats
from spo_kernels.sequences import checked_sums
from spo_kernels.shards import Columns, padded_columns_read, sharded_token_stats_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    return_entropy: Literal[False] = False,
    return_lse: Literal[False] = False,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor: ...


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, ...]: ...


@takes_dtensors(logits=-1)
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label: ``log softmax(logits)[label]``, in one pass and without storing a softmax.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` int64, aligned with logits; ``ignore_index`` marks rows that are not wanted.
        temperature, softcap, logit_scale, vocab_size: see the module.
        return_entropy: also the entropy of each row's distribution, from the same pass. Its gradient flows too.
        return_lse: also the log-sum-exp of each row's logits, from the same pass, for a z-loss. Its gradient flows too.
        inplace_backward: let the backward overwrite ``logits`` with its gradient, so that no second ``[..., V]`` tensor
            is needed. Use it when nothing else needs the logits. Caught: a second backward raises. If another function
            saved the logits, its later backward raises too. Not caught: code that reads the logits after the backward
            gets the gradient's numbers. Logits are refused if they are a leaf or a view of one, if their last stride is
            not 1, or if their elements share memory. Under ``torch.compile`` the result is the same and memory is left
            to the compiler.
        process_group: the group that holds the vocabulary, or None: this process has all of it. See the module.
        vocab_shards: columns of each process, in the order of ranks; None: all have as many as this one.

    Returns:
        ``labels.shape``, float32 (float64 for float64 logits); 0 where ignored. With return_entropy or return_lse a
        tuple: the log-probs, then the entropy (nats) if asked for, then the log-sum-exp if asked for.
    """
    check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    if inplace_backward:
        check_inplace(logits, "inplace_backward")
    columns = Columns.checked(process_group, vocab_shards, logits.shape[-1], vocab_size)
    read = padded_columns_read(vocab_size, columns, logits.shape[-1])
    policy = LogitOptions(temperature, softcap, logit_scale)
    options = RowOptions(read, checked_transform(policy, logits, "logits", logits.dtype), None)
    uniform = _uniform_like(logits, options) if return_entropy else None
    logps, kl, stats = _row_stats(logits, labels, uniform, None, ignore_index, inplace_backward, columns, options)
    if not (return_entropy or return_lse):
        return logps
    return logps, *row_ops.entropy_and_lse(kl, stats, labels, ignore_index, entropy=return_entropy, lse=return_lse)


@takes_dtensors(logits=-1)
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """Log-probability of each sequence: the sum of `token_logps` over its unignored tokens.

    Sums are taken in float64 in both layouts, in an order that does not change, and rounded once.

    Args:
        logits: ``[B, T, V]``; packed with ``cu_seqlens``: ``[N, V]`` or ``[1, N, V]``.
        labels: ``[B, T]``, or ``[N]`` or ``[1, N]``, int64, aligned with logits.
        cu_seqlens: ``[B + 1]`` int32 or int64, on the logits' device: sequence s is rows ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, from 0 to N.
        average: divide by the number of unignored tokens; a sequence without any gives 0.
        temperature, softcap, logit_scale, vocab_size: see the module.
        inplace_backward, process_group, vocab_shards: see `token_logps`.

    Returns:
        ``[B]``, float32 (float64 for float64 logits).
    """
    check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    check_sequences(labels, cu_seqlens, "labels")
    if inplace_backward:
        check_inplace(logits, "inplace_backward")
    columns = Columns.checked(process_group, vocab_shards, logits.shape[-1], vocab_size)
    read = padded_columns_read(vocab_size, columns, logits.shape[-1])
    policy = LogitOptions(temperature, softcap, logit_scale)
    options = RowOptions(read, checked_transform(policy, logits, "logits", logits.dtype), None)
    logps, _, _ = _row_stats(logits, labels, None, None, ignore_index, inplace_backward, columns, options)
    counts = (labels != ignore_index).to(logps.dtype) if average else None
    sums = checked_sums(logps, cu_seqlens, "labels")
    return sums if counts is None else sums / checked_sums(counts, cu_seqlens, "labels").clamp(min=1)


@takes_dtensors(logits=-1, ref_logits=-1)
def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_temperature: float | Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    divergence: str = "kl",
    mixture: float | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """Exact KL(policy || reference) of each token's distribution over the whole vocabulary (SPO, Appendix B).

    ``sum_v p_v (log p_v - log q_v)`` with ``p = softmax(logits)``, ``q = softmax(ref_logits)``. The gradient flows to
    ``logits`` only. Equal logits of equal dtype give exactly 0. A reference probability of 0 where the policy has some
    makes the KL +inf and its gradient NaN; where the policy has none, the term is 0. A reverse KL is +inf where the
    reference has probability and the policy has none. A JSD is always finite.

    Args:
        logits: policy logits ``[..., V]``.
        ref_logits: reference logits of the same shape, without gradient; the dtype may differ.
        mask: ``[...]`` bool, False on rows that are not wanted.
        temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size, divergence,
            mixture: see the module.
        inplace_backward, process_group, vocab_shards: see `token_logps`. Both logits must hold the same columns.

    Returns:
        ``logits.shape[:-1]``, float32 (float64 for float64 logits); 0 where masked.
    """
    check_logits(logits, "logits")
    columns = Columns.checked(process_group, vocab_shards, logits.shape[-1], vocab_size)
    read = padded_columns_read(vocab_size, columns, logits.shape[-1])
    check_ref_logits(ref_logits, logits, read)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, logits)
    if inplace_backward:
        check_inplace(logits, "inplace_backward")
    policy = LogitOptions(temperature, softcap, logit_scale)
    reference = RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale)
    transforms = checked_transforms(policy, reference, logits, "logits", logits.dtype)
    options = RowOptions(read, *transforms, checked_mixture(divergence, mixture))
    _, kl, _ = _row_stats(logits, None, ref_logits, mask, IGNORE_INDEX, inplace_backward, columns, options)
    return kl


@takes_dtensors(logits=-1, ref_logits=-1)
def token_logps_kl(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_temperature: float | Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    divergence: str = "kl",
    mixture: float | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logps` and `token_kl` of the same logits in one pass, forward and backward.

    ``ignore_index`` in labels and False in mask are independent: one batch may hold both kinds of row.

    Returns:
        ``(logps, kl)``, each ``logits.shape[:-1]``.
    """
    check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    columns = Columns.checked(process_group, vocab_shards, logits.shape[-1], vocab_size)
    read = padded_columns_read(vocab_size, columns, logits.shape[-1])
    check_ref_logits(ref_logits, logits, read)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, logits)
    if inplace_backward:
        check_inplace(logits, "inplace_backward")
    policy = LogitOptions(temperature, softcap, logit_scale)
    reference = RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale)
    transforms = checked_transforms(policy, reference, logits, "logits", logits.dtype)
    options = RowOptions(read, *transforms, checked_mixture(divergence, mixture))
    logps, kl, _ = _row_stats(logits, labels, ref_logits, mask, ignore_index, inplace_backward, columns, options)
    return logps, kl


@takes_dtensors(logits=-1, ref_logits=-1)
def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_temperature: float | Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    divergence: str = "kl",
    mixture: float | None = None,
    overwrite_logits: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """``sum_i row_weight_i KL_i``, computing the gradient in the forward, while each row is still in cache.

    One sweep over the logits instead of two: cheaper than ``(row_weight * token_kl(...)).sum()`` when a backward will
    follow. The backward multiplies the stored gradient by the upstream scalar and can run only once: a second is
    refused. float16 logits still take two sweeps: the loss scale arrives only with the backward, and without it most of
    the gradient is below float16's range.

    Args:
        logits, ref_logits, mask: as in `token_kl`.
        row_weight: ``[...]`` floating, no gradient flows to it; 1 when None. For a mean over S sequences of token sums
            pass ``1 / S`` in every row. Rows of weight 0 are skipped.
        temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size, divergence,
            mixture: see the module.
        overwrite_logits: the stored gradient takes the logits' memory: their values are gone when this returns. Caught:
            the backward raises if another function saved the logits before this call. It also raises if a
            differentiable function uses the logits, or a tensor that shares their memory, after this call. Not caught:
            code that reads the logits afterwards without a gradient (a metric, ``logits.detach()``) gets the gradient's
            numbers. Refuses the logits that ``inplace_backward`` refuses, and views that autograd forbids to change in
            place (of ``chunk``, ``split``, ``unbind``, or made under ``no_grad``); a slice is accepted.
            ``torch.autograd.grad`` of the logits themselves needs their edge of the graph, taken before the call with
            ``torch.autograd.graph.get_gradient_edge``. The option changes nothing without gradients or under
            ``torch.compile``: the logits stay. For float16, overwrite_logits acts as ``inplace_backward``.
        process_group, vocab_shards: see `token_logps`. With a process_group the function computes
            ``(row_weight * token_kl(...)).sum()``, because the gradient has to wait for the other columns;
            overwrite_logits then acts as ``inplace_backward``.

    Returns:
        0-d, float32 (float64 for float64 logits).
    """
    check_logits(logits, "logits")
    columns = Columns.checked(process_group, vocab_shards, logits.shape[-1], vocab_size)
    read = padded_columns_read(vocab_size, columns, logits.shape[-1])
    check_ref_logits(ref_logits, logits, read)
    weight = checked_row_weight(mask, row_weight, logits, "logits")
    if overwrite_logits:
        check_inplace(logits, "overwrite_logits")
        check_markable(logits)
    policy = LogitOptions(temperature, softcap, logit_scale)
    reference = RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale)
    transforms = checked_transforms(policy, reference, logits, "logits", logits.dtype)
    options = RowOptions(read, *transforms, checked_mixture(divergence, mixture))

    precompute = torch.is_grad_enabled() and logits.requires_grad and can_precompute_gradient(logits.dtype)
    if columns.group is not None or not precompute or is_transforming():
        wanted = None if weight is None else weight != 0
        _, kl, _ = _row_stats(logits, None, ref_logits, wanted, IGNORE_INDEX, overwrite_logits, columns, options)
        return kl.sum() if weight is None else (kl * weight).sum()

    rows, ref_rows = _as_rows(logits), _as_rows(ref_logits)
    weight = _like_rows(weight, rows)
    if torch.compiler.is_compiling():
        return torch.ops.spo_kernels.kl_loss_fwd(rows, ref_rows, weight, *options)[0]
    if not overwrite_logits:
        return row_ops.KLLossFunction.apply(rows, ref_rows, weight, *options)
    return row_ops.overwriting_kl_loss(logits, rows, ref_rows, weight, options)


def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """`sequence_logps` with the labels shifted by one inside, as ``_get_batch_logps`` of the DPO reference code does.

    Args:
        logits: ``[B, T, V]``, as the model returned them.
        labels: ``[B, T]`` int64: the input ids with prompt and padding set to -100; row t is scored by logits t - 1.
        average_log_prob: mean over the unignored tokens instead of their sum.

    Returns:
        ``[B]``, float32 (float64 for float64 logits).
    """
    check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    check_sequences(labels, None, "labels")
    # Shifting labels rather than slicing logits: the gradient then needs no padding pass over [B, T, V].
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[..., :-1] = labels[..., 1:]
    return sequence_logps(logits, shifted, average=average_log_prob)


def _uniform_like(logits: Tensor, options: RowOptions) -> Tensor:
    """Reference logits of the uniform distribution: a view of one row."""
    width = logits.shape[-1] if options.vocab_size is None else options.vocab_size
    return logits.new_zeros(width).expand(*logits.shape[:-1], width)


def _row_stats(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    columns: Columns,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` for checked arguments, logps and kl as ``logits.shape[:-1]``; ``[0]`` without labels or
    reference."""
    rows = _as_rows(logits)
    inputs = (
        rows,
        _like_rows(labels, rows),
        None if ref_logits is None else _as_rows(ref_logits),
        _like_rows(mask, rows),
        ignore_index,
        inplace_backward,
    )
    if is_transforming():
        if inplace_backward:
            refuse_transforms("inplace_backward or overwrite_logits")
        logps, kl, stats = TokenStats.apply(*inputs, *options)
    elif columns.group is not None:
        logps, kl, stats = sharded_token_stats_fwd(*inputs, columns, options)
    elif differentiated_eagerly(logits):
        logps, kl, stats = row_ops.TokenStatsFunction.apply(*inputs, *options)
    else:
        logps, kl, stats = torch.ops.spo_kernels.token_stats_fwd(*inputs, *options)
    shape = logits.shape[:-1]
    return (
        logps if labels is None else _shaped(logps, shape),
        kl if ref_logits is None else _shaped(kl, shape),
        stats,
    )


def _as_rows(logits: Tensor) -> Tensor:
    """Logits as the ops take them: ``[N, V]`` or ``[B, T, V]`` with a unit last stride, copied only where needed."""
    if logits.dim() == 1:
        logits = logits[None]
    elif logits.dim() > 3:
        logits = logits.flatten(0, -3)
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _like_rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else _shaped(values, rows.shape[:-1])


def _shaped(values: Tensor, shape: torch.Size) -> Tensor:
    """reshape, skipped where the shape fits: a view costs a small call 12 % of its time."""
    return values if values.shape == shape else values.reshape(shape)
