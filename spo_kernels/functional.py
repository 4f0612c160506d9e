"""The public functions from logits: what they accept and what they refuse; the work is done by `spo_kernels.ops`.

Shapes: logits ``[N, V]`` or ``[B, T, V]`` (any number of leading dimensions; a slice such as ``logits[:, :-1]`` is
read where it lies, never copied). Dtypes: float32, bfloat16, float16 or float64; outputs and accumulation are float32,
float64 for float64 logits. Log-probabilities and KL are in nats. Gradients have the logits' dtype. Labels arrive
aligned with the logits: only `get_batch_logps` shifts.

A vocabulary may be split over the processes of a ``process_group``, as Megatron's parallel output layer splits it: each
has the logits ``[..., V_r]`` of its own columns, in the order of ranks, and the same labels (of the whole
vocabulary), masks and upstream gradients as the others. Every process gets the same result, bit for bit, and the
gradient of its own logits. The forward is one all-gather of a few numbers a row; the backward has no communication. All
processes must call. Labels and masks that differ between them are a ValueError in all (a device-side assertion on a
GPU).

Every function raises ValueError where a shape, dtype or device is wrong, naming the argument, what it must be and what
came; a label outside ``[0, V)`` that is not ``ignore_index`` is a RuntimeError (a device-side assertion on a GPU). NaN
logits give NaN for their own row and touch no other. Rows that are ignored, masked or of weight 0 are not read: their
outputs and gradients are exactly 0 even where their logits are NaN, and so are gradients of rows with an upstream
gradient of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_kernels import ops
from spo_kernels.vocabulary import checked_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """Log-probability of each label: ``log softmax(logits)[label]``, in one pass and without storing a softmax.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` int64, aligned with logits; ``ignore_index`` marks rows that are not wanted.
        inplace_backward: let the backward overwrite ``logits`` with its gradient, so that no second ``[..., V]`` tensor
            is needed. Use it when nothing else needs the logits. Caught: a function that saved the logits and whose
            backward runs later raises, and so does a second backward. Not caught: code that reads the logits after
            the backward gets the gradient's numbers. Logits that are a leaf, or whose elements share memory, are
            refused. Under ``torch.compile`` the result is the same and memory is left to the compiler.
        process_group: the group that holds the vocabulary, or None: this process has all of it. See the module.
        vocab_shards: columns of each process, in the order of ranks; None: all have as many as this one.

    Returns:
        ``labels.shape``, float32 (float64 for float64 logits); 0 where ignored.
    """
    _check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    if inplace_backward:
        _check_inplace(logits, "inplace_backward")
    rows = _as_rows(logits)
    logps, _, _ = _token_stats(
        rows, _like_rows(labels, rows), None, None, ignore_index, inplace_backward, process_group, vocab_shards
    )
    return _shaped(logps, labels.shape)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
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
        inplace_backward, process_group, vocab_shards: see `token_logps`.

    Returns:
        ``[B]``, float32 (float64 for float64 logits).
    """
    logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        process_group=process_group,
        vocab_shards=vocab_shards,
    )
    counts = (labels != ignore_index).to(logps.dtype) if average else None
    sums = sum_sequences(logps, cu_seqlens, "labels")
    return sums if counts is None else sums / sum_sequences(counts, cu_seqlens, "labels").clamp(min=1)


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """Exact KL(policy || reference) of each token's distribution over the whole vocabulary (SPO, Appendix B).

    ``sum_v p_v (log p_v - log q_v)`` with ``p = softmax(logits)``, ``q = softmax(ref_logits)``. The gradient flows to
    ``logits`` only. Equal logits of equal dtype give exactly 0. A reference probability of 0 where the policy has some
    makes the KL +inf and its gradient NaN; where the policy has none, the term is 0.

    Args:
        logits: policy logits ``[..., V]``.
        ref_logits: reference logits of the same shape, without gradient; the dtype may differ.
        mask: ``[...]`` bool, False on rows that are not wanted.
        inplace_backward, process_group, vocab_shards: see `token_logps`. Both logits are the same columns.

    Returns:
        ``logits.shape[:-1]``, float32 (float64 for float64 logits); 0 where masked.
    """
    _check_logits(logits, "logits")
    _check_ref_logits(ref_logits, logits)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, logits)
    if inplace_backward:
        _check_inplace(logits, "inplace_backward")
    rows = _as_rows(logits)
    _, kl, _ = _token_stats(
        rows, None, _as_rows(ref_logits), _like_rows(mask, rows), -100, inplace_backward, process_group, vocab_shards
    )
    return _shaped(kl, logits.shape[:-1])


def token_logps_kl(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logps` and `token_kl` of the same logits in one pass, forward and backward.

    ``ignore_index`` in labels and False in mask are independent: one batch may hold both kinds of row.

    Returns:
        ``(logps, kl)``, each ``logits.shape[:-1]``.
    """
    _check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    _check_ref_logits(ref_logits, logits)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, logits)
    if inplace_backward:
        _check_inplace(logits, "inplace_backward")
    rows = _as_rows(logits)
    logps, kl, _ = _token_stats(
        rows,
        _like_rows(labels, rows),
        _as_rows(ref_logits),
        _like_rows(mask, rows),
        ignore_index,
        inplace_backward,
        process_group,
        vocab_shards,
    )
    return _shaped(logps, labels.shape), _shaped(kl, labels.shape)


def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    overwrite_logits: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """``sum_i row_weight_i KL_i``, computing the gradient in the forward, while each row is still in cache.

    One sweep over the logits instead of two: cheaper than ``(row_weight * token_kl(...)).sum()`` when a backward will
    follow. The backward multiplies the stored gradient by the upstream scalar and can run only once: a second is
    refused. float16 logits take two sweeps all the same: before the loss scale that comes with the backward, most of
    their gradient is below float16's range.

    Args:
        logits, ref_logits, mask: as in `token_kl`.
        row_weight: ``[...]`` floating, no gradient flows to it; 1 when None. For a mean over S sequences of token sums
            pass ``1 / S`` in every row. Rows of weight 0 are skipped.
        overwrite_logits: the stored gradient takes the logits' memory: their values are gone when this returns. Caught:
            autograd raises in the backward where another function saved the logits before, and where anything uses
            them afterwards and is differentiated, through any tensor that shares their memory. Not caught: whatever
            reads them afterwards without a gradient (a metric, ``logits.detach()``) gets the gradient's numbers. The
            same logits are refused as by ``inplace_backward``, and so are views that autograd lets no in-place
            operation change (of ``chunk``, ``split``, ``unbind``, or made under ``no_grad``); a slice will do.
            ``torch.autograd.grad`` of the logits themselves needs their edge of the graph, taken before the call with
            ``torch.autograd.graph.get_gradient_edge``. The option changes nothing without gradients or under
            ``torch.compile``: the logits stay.
        process_group, vocab_shards: see `token_logps`. The gradient then has to wait for the other columns: this is
            ``(row_weight * token_kl(...)).sum()``, and overwrite_logits its ``inplace_backward``.

    Returns:
        0-d, float32 (float64 for float64 logits).
    """
    _check_logits(logits, "logits")
    _check_ref_logits(ref_logits, logits)
    weight = checked_row_weight(mask, row_weight, logits, "logits")
    if overwrite_logits:
        _check_inplace(logits, "overwrite_logits")
        _check_markable(logits)

    sharded = process_group is not None or vocab_shards is not None
    if sharded or not waits_for_upstream(logits.dtype) or not (torch.is_grad_enabled() and logits.requires_grad):
        kl = token_kl(
            logits,
            ref_logits,
            None if weight is None else weight != 0,
            inplace_backward=overwrite_logits,
            process_group=process_group,
            vocab_shards=vocab_shards,
        )
        return kl.sum() if weight is None else (kl * weight).sum()

    rows, ref_rows = _as_rows(logits), _as_rows(ref_logits)
    weight = _like_rows(weight, rows)
    if torch.compiler.is_compiling():
        return torch.ops.spo_kernels.kl_loss_fwd(rows, ref_rows, weight)[0]
    if not overwrite_logits:
        return ops.KlLoss.apply(rows, ref_rows, weight)
    return ops.overwriting_kl_loss(logits, rows, ref_rows, weight)


def checked_row_weight(mask: Tensor | None, row_weight: Tensor | None, rows: Tensor, name: str) -> Tensor | None:
    """Weights of the KL of each row, 0 where masked; None: 1 for all."""
    if mask is not None:
        check_rows(mask, "mask", torch.bool, rows, name)
    if row_weight is not None:
        if not row_weight.is_floating_point():
            raise ValueError(f"row_weight must be floating, got {row_weight.dtype}")
        check_rows(row_weight, "row_weight", row_weight.dtype, rows, name)
    weight = row_weight
    if mask is not None:
        weight = mask.to(output_dtype(rows)) if weight is None else torch.where(mask, weight, 0)
    return None if weight is None else weight.detach().to(output_dtype(rows))


def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """`sequence_logps` with the labels shifted by one inside, as ``_get_batch_logps`` of the DPO reference code does.

    Args:
        logits: ``[B, T, V]``, as the model returned them.
        labels: ``[B, T]`` int64: the input ids with prompt and padding set to -100; row t is scored by logits t - 1.
        average_log_prob: mean over the unignored tokens instead of their sum.

    Returns:
        ``[B]``, float32 (float64 for float64 logits).
    """
    _check_logits(logits, "logits")
    check_rows(labels, "labels", torch.int64, logits)
    # Shifting labels rather than slicing logits: the gradient then needs no padding pass over [B, T, V].
    shifted = torch.full_like(labels, -100)
    shifted[..., :-1] = labels[..., 1:]
    return sequence_logps(logits, shifted, average=average_log_prob)


def _token_stats(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    process_group: ProcessGroup | None,
    vocab_shards: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    start, size, group = checked_shard(process_group, vocab_shards, logits.shape[-1])
    if group is None:
        differentiate = torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()
        stats = ops.TokenStats.apply if differentiate else torch.ops.spo_kernels.token_stats_fwd
        return stats(logits, labels, ref_logits, mask, ignore_index, inplace_backward)
    return torch.ops.spo_kernels.sharded_token_stats_fwd(
        logits, labels, ref_logits, mask, ignore_index, inplace_backward, start, size, group
    )


def waits_for_upstream(dtype: torch.dtype) -> bool:
    """Whether a gradient in this dtype can be computed in the forward, before the upstream scalar is known.

    Not in float16: the scalar may be the loss scale that keeps gradients within its range.
    """
    return dtype != torch.float16


def output_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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
    """Values in another shape. Where it is theirs already, no view: that costs a small call an eighth of its time."""
    return values if values.shape == shape else values.reshape(shape)


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None, name: str, like: str = "logits") -> Tensor:
    """``[B, T] -> [B]``, or ``[N]`` or ``[1, N]`` with cu_seqlens ``[B + 1] -> [B]``."""
    check_sequences(values, cu_seqlens, name, like)
    if cu_seqlens is not None:
        values = values.flatten()
    differentiate = torch.is_grad_enabled() and values.requires_grad and not torch.compiler.is_compiling()
    sums = ops.SequenceSums.apply if differentiate else torch.ops.spo_kernels.sequence_sums
    return sums(values, cu_seqlens)


def check_sequences(values: Tensor, cu_seqlens: Tensor | None, name: str, like: str = "logits") -> None:
    """values must be ``[B, T]``, or ``[N]`` or ``[1, N]`` with cu_seqlens, which must be on their device."""
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(f"{name} must be [B, T] without cu_seqlens, got {list(values.shape)}")
        return
    if values.dim() != 1 and not (values.dim() == 2 and values.shape[0] == 1):
        raise ValueError(f"{name} must be [N] or [1, N] with cu_seqlens, got {list(values.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [B + 1] int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens must be on {values.device} like {like}, got {cu_seqlens.device}")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {list(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")


def check_rows(values: Tensor, name: str, dtype: torch.dtype, logits: Tensor, like: str = "logits") -> None:
    """values must be ``[...]`` for logits (or what `like` names) ``[..., V]``."""
    wanted = logits.shape[:-1]
    if values.shape != wanted or values.dtype != dtype:
        raise ValueError(f"{name} must be {list(wanted)} {str(dtype).removeprefix('torch.')}, got {describe(values)}")
    if values.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like {like}, got {values.device}")


def _check_ref_logits(ref_logits: Tensor, logits: Tensor) -> None:
    _check_logits(ref_logits, "ref_logits")
    if ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits must be {list(logits.shape)} like logits, got {list(ref_logits.shape)}")
    if (ref_logits.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise ValueError(f"ref_logits must be float64 exactly when logits are, got {ref_logits.dtype}")
    if ref_logits.device != logits.device:
        raise ValueError(f"ref_logits must be on {logits.device} like logits, got {ref_logits.device}")
    if ref_logits.requires_grad:
        raise ValueError("ref_logits must not require grad: the gradient flows to the policy only (use .detach())")


def _check_inplace(logits: Tensor, option: str) -> None:
    """Refuse logits whose memory is not free to take. Nothing is overwritten without gradients or while compiling."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return
    base = logits._base if logits._is_view() and logits._base is not None else logits
    if base.is_leaf:
        raise ValueError(f"{option}=True would overwrite a leaf tensor (or a view of one) with its gradient")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{option}=True needs logits with a unit last stride, got strides {logits.stride()}")
    extent = 0
    for size, stride in sorted(zip(logits.shape, logits.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1:
            if stride <= extent:
                raise ValueError(f"{option}=True needs logits without shared memory, got strides {logits.stride()}")
            extent += (size - 1) * stride


def _check_markable(logits: Tensor) -> None:
    """Refuse views that autograd does not track: a later use of the overwritten memory would go unseen."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad and logits._is_view()):
        return
    autograd = torch._C._autograd
    if autograd._get_creation_meta(logits) != autograd.CreationMeta.DEFAULT:
        raise ValueError(
            "overwrite_logits=True needs logits that an in-place operation may change, got a view that chunk, split, "
            "unbind or a no_grad block made; take a slice instead"
        )
