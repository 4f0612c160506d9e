"""The public functions from hidden states and the head's weight: `spo_kernels.functional` without the logits.

A head is hidden ``[..., H]``, weight ``[V, H]`` and, if it has one, bias ``[V]``, all of one dtype: float32, bfloat16,
float16 or float64. Its logits are

    softcap(logit_scale (hidden weight^T + bias)) / temperature,    softcap(x) = softcap tanh(x / softcap)

and never exist but for a tile of some rows by some columns. Rows that are not wanted are dropped before the matrix
product, which reads their number back to the host; in the backward so are rows with an upstream gradient of 0. Rows
that are dropped are not read: they may be NaN. The forward is one matrix product, the backward three (one to have
the logits again, which `linear_kl_loss` saves); a weight or hidden states without gradient save theirs. Outputs are
float32 (float64 for float64), in nats; gradients have the dtype of what they belong to and are accumulated in float32
across tiles. Under autocast hidden, weight and bias are cast as `torch.nn.functional.linear` would cast them.

With a ``process_group`` weight and bias are the rows that this process holds of a head split over the group, in the
order of ranks, as Megatron splits it. Shards may be uneven; labels are those of the whole vocabulary; hidden states,
labels and upstream gradients are the same in every process. So are the results, bit for bit. The forward all-gathers
a few numbers a row, the backward adds up the gradient of the hidden states, in float32; those of weight and bias stay
where they are. All processes must call. Labels, masks and weights of rows that differ between them are a ValueError in
all (a device-side assertion on a GPU), which takes an all-reduce of a few numbers a call.

Options of every function:
    temperature: > 0; divides the logits last.
    softcap: > 0 or None, as Gemma 2 caps its logits.
    logit_scale: not 0; multiplies the logits first, as Cohere does.
    chunk_size: most rows of a tile, >= 1; None chooses rows and columns by bytes. More than there are rows is all.
    process_group: the group that holds the vocabulary, or None: this process has all of it.
    vocab_shards: columns of each process, in the order of ranks; None: all have as many as this one.

Errors are those of `spo_kernels.functional`: ValueError where a shape, dtype, device or option is wrong, RuntimeError
for a label out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from spo_kernels.functional import (
    LOGITS_DTYPES,
    check_rows,
    checked_row_weight,
    describe,
    output_dtype,
    sum_sequences,
    waits_for_upstream,
)
from spo_kernels.head import Head, LogitOptions, Needs, stored_dtype
from spo_kernels.vocabulary import checked_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logps` of a head's logits: ``log softmax(logits)[label]`` of each row.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, in any layout (tied to an embedding, or a transposed view).
        labels: ``[...]`` int64, aligned with hidden; rows of ``ignore_index`` are dropped before the matrix product.
        bias: ``[V]`` or None.
        chunk_size, temperature, softcap, logit_scale, process_group, vocab_shards: see the module.
        return_entropy: also the entropy of each row's distribution, ``log V - KL(p || uniform)``, from the same pass.
            Its gradient flows too.

    Returns:
        ``labels.shape``; 0 where ignored. With return_entropy ``(logps, entropy)``.
    """
    options = checked_options(temperature, softcap, logit_scale, chunk_size)
    head = checked_head(*autocast_head(hidden, weight, bias))
    check_rows(labels, "labels", torch.int64, hidden, "hidden")
    logps, kl, stats = torch.ops.spo_kernels.linear_token_stats_fwd(
        *as_rows(head),
        labels.reshape(-1),
        *(None,) * 4,
        ignore_index,
        return_entropy,
        *options,
        chunk_size,
        *checked_shard(process_group, vocab_shards, weight.shape[0]),
    )
    logps = logps.view(labels.shape)
    if not return_entropy:
        return logps
    # The log-sum-exp of the uniform reference's logits is log V, over all shards.
    entropy = (stats[2] + stats[3] - kl).view(labels.shape)
    return logps, torch.where(labels != ignore_index, entropy, 0)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """`sequence_logps` of a head's logits: the sum of `linear_token_logps` over each sequence's unignored tokens.

    Args:
        hidden: ``[B, T, H]``; packed with ``cu_seqlens``: ``[N, H]`` or ``[1, N, H]``.
        weight: ``[V, H]``.
        labels: ``[B, T]``, or ``[N]`` or ``[1, N]``, int64, aligned with hidden.
        bias: ``[V]`` or None.
        cu_seqlens: ``[B + 1]`` int32 or int64, on the device of hidden: sequence s is rows ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, from 0 to N.
        average: divide by the number of unignored tokens; a sequence without any gives 0.
        chunk_size, temperature, softcap, logit_scale, process_group, vocab_shards: see the module.

    Returns:
        ``[B]``.
    """
    logps = linear_token_logps(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        process_group=process_group,
        vocab_shards=vocab_shards,
    )
    sums = sum_sequences(logps, cu_seqlens, "labels", "hidden")
    if not average:
        return sums
    counts = sum_sequences((labels != ignore_index).to(logps.dtype), cu_seqlens, "labels", "hidden")
    return sums / counts.clamp(min=1)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """`token_kl` of two heads' logits: exact KL(policy || reference) of each row (SPO, Appendix B).

    The gradient flows to the policy's head only. Equal heads give exactly 0.

    Args:
        hidden: policy, ``[..., H]``.
        weight: ``[V, H]``.
        ref_hidden: reference, ``[..., H']`` with the leading dimensions of hidden, without gradient, in its dtype.
        ref_weight: ``[V, H']``, without gradient; the same vocabulary.
        mask: ``[...]`` bool; rows of False are dropped before the matrix products.
        bias, ref_bias: ``[V]`` or None.
        chunk_size, temperature, softcap, logit_scale, process_group, vocab_shards: see the module; they hold for
            both heads.

    Returns:
        ``hidden.shape[:-1]``; 0 where masked.
    """
    options = checked_options(temperature, softcap, logit_scale, chunk_size)
    head, ref_head = checked_heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, hidden, "hidden")
    _, kl, _ = torch.ops.spo_kernels.linear_token_stats_fwd(
        *as_rows(head),
        None,
        *as_rows(ref_head),
        None if mask is None else mask.reshape(-1),
        -100,
        False,
        *options,
        chunk_size,
        *checked_shard(process_group, vocab_shards, weight.shape[0]),
    )
    return kl.view(hidden.shape[:-1])


def linear_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """`kl_loss` of two heads' logits: ``sum_i row_weight_i KL_i``, computing the gradient in the forward.

    A tile is as wide as the vocabulary, so that a row's gradient is known while its logits are there: with its backward
    this takes four matrix products where ``(row_weight * linear_token_kl(...)).sum()`` takes six, for more memory. Two
    tiles of 32 MiB, or of 256 rows where that is more; beside them the gradients, in float32 (in bfloat16 where
    matrix products are). The backward multiplies them by the upstream scalar and can run only once: a second is
    refused. Without gradients, and for float16 (see `kl_loss`), this is that sum, and its memory.

    Args:
        hidden, weight, ref_hidden, ref_weight, mask, bias, ref_bias: as in `linear_token_kl`.
        row_weight: ``[...]`` floating, no gradient flows to it; 1 when None. For a mean over S sequences of token sums
            pass ``1 / S`` in every row. Rows of weight 0 are dropped before the matrix products.
        chunk_size, temperature, softcap, logit_scale, process_group, vocab_shards: see the module; they hold for
            both heads.

    Returns:
        0-d, float32 (float64 for float64 hidden states).
    """
    options = checked_options(temperature, softcap, logit_scale, chunk_size)
    head, ref_head = checked_heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    weights = checked_row_weight(mask, row_weight, hidden, "hidden")
    needs = needs_of(head)
    if not (torch.is_grad_enabled() and any(needs) and waits_for_upstream(head.hidden.dtype)):
        kl = linear_token_kl(
            *head[:2],
            *ref_head[:2],
            None if weights is None else weights != 0,
            head.bias,
            ref_head.bias,
            chunk_size=chunk_size,
            process_group=process_group,
            vocab_shards=vocab_shards,
            **options._asdict(),
        )
        return kl.sum() if weights is None else (kl * weights).sum()
    if weights is None:
        weights = hidden.new_ones(hidden.shape[:-1], dtype=output_dtype(hidden))
    loss, *_ = torch.ops.spo_kernels.linear_kl_loss_fwd(
        *as_rows(head),
        *as_rows(ref_head),
        weights.reshape(-1),
        gradient_dtype_of(head, options),
        *needs,
        *options,
        chunk_size,
        *checked_shard(process_group, vocab_shards, weight.shape[0]),
    )
    return loss


def checked_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
) -> tuple[Head, Head]:
    """The policy's and the reference's head, cast under autocast, with one vocabulary and the same rows."""
    head = checked_head(*autocast_head(hidden, weight, bias))
    for name, tensor in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: the gradient flows to the policy only (use .detach())")
    ref_head = checked_head(*autocast_head(ref_hidden, ref_weight, ref_bias), "ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        wanted = ", ".join(map(str, (*hidden.shape[:-1], "H'")))
        raise ValueError(f"ref_hidden must be [{wanted}] like hidden, got {list(ref_hidden.shape)}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight must have V = {weight.shape[0]} rows like weight, got {ref_weight.shape[0]}")
    if ref_head.hidden.dtype != head.hidden.dtype:
        raise ValueError(f"ref_hidden must be {head.hidden.dtype} like hidden, got {ref_hidden.dtype}")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden must be on {hidden.device} like hidden, got {ref_hidden.device}")
    return head, ref_head


def as_rows(head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head as the ops take it: hidden as ``[N, H]``, weight, bias."""
    return head.hidden.reshape(-1, head.hidden.shape[-1]), head.weight, head.bias


def needs_of(head: Head) -> Needs:
    """Whose gradients autograd wants, if it is on."""
    return Needs(*(tensor is not None and tensor.requires_grad for tensor in head[:3]))


def gradient_dtype_of(head: Head, options: LogitOptions) -> torch.dtype:
    """Dtype of the gradients that a forward computes and keeps."""
    return stored_dtype(head.hidden.device.type, head.hidden.dtype, options.softcap is not None)


def autocast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device_type = hidden.device.type
    # Not torch.amp.is_autocast_available, which Dynamo of torch 2.10 cannot trace. Other devices may know no autocast.
    if not (device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> Head:
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{prefix}hidden must be [..., H] with H >= 1, got {list(hidden.shape)}")
    if hidden.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{prefix}hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != width:
        raise ValueError(f"{prefix}weight must be [V, {width}] with V >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}], got {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{prefix}{name} must be {hidden.dtype} like {prefix}hidden, got {tensor.dtype}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{prefix}{name} must be on {hidden.device} like {prefix}hidden, got {tensor.device}")
    return Head(hidden, weight, bias)


def checked_options(
    temperature: float, softcap: float | None, logit_scale: float, chunk_size: int | None
) -> LogitOptions:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap}")
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of rows >= 1, or None, got {chunk_size!r}")
    return LogitOptions(float(temperature), None if softcap is None else float(softcap), float(logit_scale))
