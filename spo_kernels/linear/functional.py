"""The public functions from hidden states and the head's weight: `spo_kernels.functional` without the logits.

A head is hidden ``[..., H]``, weight ``[V, H]`` and, if it has one, bias ``[V]``, all of one dtype: float32, bfloat16,
float16 or float64. Its logits are

    softcap(logit_scale (hidden weight^T + bias)) / temperature,    softcap(x) = softcap tanh(x / softcap)

Only a tile of them, some rows by some columns, exists at a time. Ignored and masked rows are dropped before the matrix
product. Dropping reads the number of kept rows back to the host. The backward also drops rows with an upstream gradient
of 0. Rows that are dropped are not read: they may be NaN. The forward takes one matrix product for each head. The
backward takes one for each head, for its logits, and two for dhidden and dweight. `linear_kl_loss` skips the
recomputation. No product is made for a gradient that is not wanted. Outputs are float32 (float64 for float64), in nats.
Gradients have the dtype of their tensor and are accumulated in float32 across tiles. On a CPU whose matrix products are
half precision, each tile's share of a half-precision gradient is rounded too: the error is then up to 1.6 times that of
one rounding. Under autocast hidden, weight and bias are cast as `torch.nn.functional.linear` would cast them.

With a ``process_group`` the head is split over the processes, as Megatron splits it: weight and bias are the rows that
this process holds, in the order of ranks. Shards may be uneven. Labels index the whole vocabulary. Pass the same hidden
states, labels and upstream gradients in every process; every process gets the same results, bit for bit. The forward
all-gathers a few numbers a row. The backward sums the gradient of the hidden states over the processes, in float32; the
gradients of weight and bias stay where they are. All processes must call. All raise ValueError if labels or masks
differ between processes, or row weights where the forward computes gradients (on a GPU, a device-side assertion); the
check is an all-reduce of a few numbers a call.

DTensors are taken where all are replicated, or where the head is sharded along the vocabulary over one dimension of
its mesh; see `spo_kernels.distributed.takes_dtensors`. For a head that FSDP shards, use `gather_head`.

Options. Those that begin with ref_ belong to the functions with a reference's head:
    temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size, divergence, mixture:
        as in `spo_kernels.functional`. Rows of the weight after vocab_size are padding. A JSD needs no matrix product
        more: its tiles hold whole rows, as those of `linear_kl_loss` do.
    chunk_size: rows of a tile, at most, >= 1. None: rows and columns are chosen by size in bytes.
    process_group: the group that holds the vocabulary, or None: this process has all of it.
    vocab_shards: columns of each process, in the order of ranks; None: all have as many as this one.

Errors are as in `spo_kernels.functional`: ValueError where a shape, dtype, device or option is wrong, RuntimeError
for a label out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from spo_kernels.checks import IGNORE_INDEX, check_rows, checked_row_weight
from spo_kernels.distributed import takes_dtensors
from spo_kernels.divergences import checked_mixture
from spo_kernels.linear.checks import checked_head, checked_options, checked_ref_head
from spo_kernels.linear.ops import linear_kl_loss_fwd, linear_token_stats_fwd
from spo_kernels.linear.records import Head, HeadOptions, Needs
from spo_kernels.logit_options import AS_POLICY, LogitOptions, RefLogitOptions
from spo_kernels.op_library import is_transforming
from spo_kernels.precision import accumulate_dtype, can_precompute_gradient, precomputed_gradient_dtype
from spo_kernels.row_ops import entropy_and_lse
from spo_kernels.sequences import checked_sums
from spo_kernels.shards import Columns, padded_columns_read

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: Literal[False] = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]: ...


@takes_dtensors(weight=0, bias=0)
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`token_logps` of a head's logits: ``log softmax(logits)[label]`` of each row.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, in any layout (tied to an embedding, or a transposed view).
        labels: ``[...]`` int64, aligned with hidden; rows labelled ``ignore_index`` are dropped before the product.
        bias: ``[V]`` or None.
        chunk_size, temperature, softcap, logit_scale, vocab_size, process_group, vocab_shards: see the module.
        return_entropy: also the entropy of each row's distribution, from the same pass. Its gradient flows too.
        return_lse: also the log-sum-exp of each row's logits, from the same pass, for a z-loss. Its gradient flows too.

    Returns:
        ``labels.shape``; 0 where ignored. With return_entropy or return_lse a tuple: the log-probs, then the entropy
        (nats) if asked for, then the log-sum-exp if asked for.
    """
    head = checked_head(hidden, weight, bias)
    columns = Columns.checked(process_group, vocab_shards, weight.shape[0], vocab_size)
    policy = LogitOptions(temperature, softcap, logit_scale)
    options = checked_options(head, hidden, policy, AS_POLICY, chunk_size, columns)
    check_rows(labels, "labels", torch.int64, hidden, "hidden")
    rows = labels.reshape(-1)
    logps, kl, stats = linear_token_stats_fwd(head, rows, None, None, ignore_index, return_entropy, options)
    logps = logps.view(labels.shape)
    if not (return_entropy or return_lse):
        return logps
    return logps, *entropy_and_lse(kl, stats, labels, ignore_index, entropy=return_entropy, lse=return_lse)


@takes_dtensors(weight=0, bias=0)
def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    chunk_size: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
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
        chunk_size, temperature, softcap, logit_scale, vocab_size, process_group, vocab_shards: see the module.

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
        vocab_size=vocab_size,
        process_group=process_group,
        vocab_shards=vocab_shards,
    )
    sums = checked_sums(logps, cu_seqlens, "labels", "hidden")
    if not average:
        return sums
    counts = checked_sums((labels != ignore_index).to(logps.dtype), cu_seqlens, "labels", "hidden")
    return sums / counts.clamp(min=1)


@takes_dtensors(weight=0, bias=0, ref_weight=0, ref_bias=0)
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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_temperature: float | Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    divergence: str = "kl",
    mixture: float | None = None,
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
        chunk_size, temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size,
            divergence, mixture, process_group, vocab_shards: see the module.

    Returns:
        ``hidden.shape[:-1]``; 0 where masked.
    """
    head = checked_head(hidden, weight, bias)
    columns = Columns.checked(process_group, vocab_shards, weight.shape[0], vocab_size)
    read = padded_columns_read(vocab_size, columns, weight.shape[0])
    ref_head = checked_ref_head(ref_hidden, ref_weight, ref_bias, hidden, head, read)
    policy = LogitOptions(temperature, softcap, logit_scale)
    reference = RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale)
    share = checked_mixture(divergence, mixture)
    options = checked_options(head, hidden, policy, reference, chunk_size, columns, share)
    if mask is not None:
        check_rows(mask, "mask", torch.bool, hidden, "hidden")
    return kl_of(head, ref_head, mask, options).view(hidden.shape[:-1])


def kl_of(head: Head, ref_head: Head, mask: Tensor | None, options: HeadOptions) -> Tensor:
    """`linear_token_kl` for checked arguments: ``[N]``."""
    rows = None if mask is None else mask.reshape(-1)
    _, kl, _ = linear_token_stats_fwd(head, None, ref_head, rows, 0, False, options)
    return kl


@takes_dtensors(weight=0, bias=0, ref_weight=0, ref_bias=0)
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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_temperature: float | Tensor | None = None,
    ref_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
    divergence: str = "kl",
    mixture: float | None = None,
    process_group: ProcessGroup | None = None,
    vocab_shards: Sequence[int] | None = None,
) -> Tensor:
    """`kl_loss` of two heads' logits: ``sum_i row_weight_i KL_i``, computing the gradient in the forward.

    Forward and backward take four matrix products where ``(row_weight * linear_token_kl(...)).sum()`` takes six,
    because a row's gradient is computed while its logits are still there. That takes more memory: tiles are as wide as
    the vocabulary (on a CPU two of 32 MiB, or of 256 rows where that is more), and the gradients are kept in float32
    (in bfloat16 where matrix products are bfloat16). The backward multiplies the gradients by the upstream scalar and
    can run only once: a second is refused. Without gradients, and for float16 (see `kl_loss`), it computes
    ``(row_weight * linear_token_kl(...)).sum()``.

    Args:
        hidden, weight, ref_hidden, ref_weight, mask, bias, ref_bias: as in `linear_token_kl`.
        row_weight: ``[...]`` floating, no gradient flows to it; 1 when None. For a mean over S sequences of token sums
            pass ``1 / S`` in every row. Rows of weight 0 are dropped before the matrix products.
        chunk_size, temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size,
            divergence, mixture, process_group, vocab_shards: see the module.

    Returns:
        0-d, float32 (float64 for float64 hidden states).
    """
    head = checked_head(hidden, weight, bias)
    columns = Columns.checked(process_group, vocab_shards, weight.shape[0], vocab_size)
    read = padded_columns_read(vocab_size, columns, weight.shape[0])
    ref_head = checked_ref_head(ref_hidden, ref_weight, ref_bias, hidden, head, read)
    policy = LogitOptions(temperature, softcap, logit_scale)
    reference = RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale)
    share = checked_mixture(divergence, mixture)
    options = checked_options(head, hidden, policy, reference, chunk_size, columns, share)
    weights = checked_row_weight(mask, row_weight, hidden, "hidden")
    return kl_loss_of(head, ref_head, None if weights is None else weights.reshape(-1), options)


def kl_loss_of(head: Head, ref_head: Head, row_weight: Tensor | None, options: HeadOptions) -> Tensor:
    """`linear_kl_loss` for checked arguments. row_weight: ``[N]``, 0 where masked, or None if all are 1."""
    needs = precomputed_needs(head)
    precompute = torch.is_grad_enabled() and any(needs[:3]) and can_precompute_gradient(head.hidden.dtype)
    if not precompute or is_transforming():
        kl = kl_of(head, ref_head, None if row_weight is None else row_weight != 0, options)
        return kl.sum() if row_weight is None else (kl * row_weight).sum()
    if row_weight is None:
        row_weight = head.hidden.new_ones(head.hidden.shape[0], dtype=accumulate_dtype(head.hidden.dtype))
    loss, *_ = linear_kl_loss_fwd(head, ref_head, row_weight, needs, options)
    return loss


def precomputed_needs(head: Head) -> Needs:
    """The gradients that autograd wants, if it is on, in the dtype in which a forward keeps them."""
    hidden = head.hidden
    dtype = precomputed_gradient_dtype(hidden.device.type, hidden.dtype)
    hidden_wanted, weight_wanted, bias_wanted = (tensor is not None and tensor.requires_grad for tensor in head)
    return Needs(hidden_wanted, weight_wanted, bias_wanted, dtype)
