"""The head's ops: tile loops (`loops`) behind torch's dispatcher, the same for every device.

For each op: its schema with its implementation, its output shapes, its gradient. Rows are ``[N]``. Calling an op passes
torch's dispatcher (`op_library.Op`); the function below then runs with the same records.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spo_kernels import shards
from spo_kernels.checks import savable
from spo_kernels.linear import loops
from spo_kernels.linear.records import Head, HeadOptions, Needs, PairObjective, PairWeights, Uniform
from spo_kernels.losses import SoftImportance, mean_or_zero, pair_error, pair_preference
from spo_kernels.op_library import (
    Op,
    is_transforming,
    mark_written,
    op,
    refuse_double_backward,
    refuse_second_backward,
)
from spo_kernels.precision import accumulate_dtype
from spo_kernels.reference import is_jsd

_INSTEAD = "compute the logits and call the function that takes them"


def _calls_of(labels: Tensor | None) -> str:
    """The public functions that call the ops of token statistics."""
    if labels is None:
        return "linear_token_kl, linear_kl_loss and LinearSPOLoss"
    return "linear_token_logps, linear_sequence_logps and LinearSPOLoss"


def _empty_gradients(head: Head, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized dhidden, dweight, dbias: ``[0]`` where not wanted."""
    hidden, weight, bias = head
    return (
        hidden.new_empty(hidden.shape if needs.hidden else (0,), dtype=needs.dtype),
        hidden.new_empty(weight.shape if needs.weight else (0,), dtype=needs.dtype),
        hidden.new_empty(weight.shape[:1] if needs.bias and bias is not None else (0,), dtype=needs.dtype),
    )


def _flops(head: Head, products: int) -> int:
    """Of so many matrix products of all rows with the head. Rows that are dropped count too: their number is data."""
    return 2 * products * head.hidden.shape[0] * head.weight.numel()


def _flops_of_gradients(head: Head, ref_head: Head | None, needs: Needs) -> int:
    """Of the products for both heads' logits and for the gradients of hidden and weight."""
    flops = _flops(head, 1 + needs.hidden + needs.weight)
    return flops if ref_head is None else flops + _flops(ref_head, 1)


def _kept(labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """``[N]`` bool, the rows that are wanted; None for all rows."""
    valid = None if labels is None else labels != ignore_index
    return valid if mask is None else mask if valid is None else valid & mask


@op
def linear_token_stats_fwd(
    head: Head,
    labels: Tensor | None,
    ref_head: Head | None,
    mask: Tensor | None,
    ignore_index: int,
    uniform: bool,  # compute the KL to the uniform distribution; ref_head is then None
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` of each row, 0 on rows that are ignored or masked. Gradients as in the row op."""
    columns = options.columns
    if columns.group is not None and (labels is not None or mask is not None):
        columns.check_same(labels=labels, mask=mask)
    if labels is not None:
        shards.check_labels(labels, columns.vocab_size, ignore_index)
    kept = _kept(labels, mask, ignore_index)
    return loops.token_stats_fwd(head, labels, Uniform() if uniform else ref_head, kept, options)


@linear_token_stats_fwd.fake
def _empty_stats(
    head: Head, labels: Tensor | None, ref_head: Head | None, uniform: bool, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = head.hidden.shape[0], accumulate_dtype(head.hidden.dtype)
    with_kl = uniform or ref_head is not None
    logps = head.hidden.new_empty(0 if labels is None else rows, dtype=dtype)
    kl = head.hidden.new_empty(rows if with_kl else 0, dtype=dtype)
    stats = 2 if not with_kl else 4 + (ref_head is not None and is_jsd(options.mixture))
    return logps, kl, head.hidden.new_empty((stats, rows), dtype=dtype)


@linear_token_stats_fwd.flops
def _flops_of_stats(head: Head, ref_head: Head | None) -> int:
    return _flops_of_gradients(head, ref_head, Needs(False, False, False, head.hidden.dtype))


@op
def linear_token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    dlse: Tensor | None,
    head: Head,
    labels: Tensor | None,
    ref_head: Head | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    uniform: bool,
    needs: Needs,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)``, ``[0]`` where not wanted."""
    # A row with an upstream gradient of 0 is not read: its hidden states may be NaN.
    upstream = loops.RowGradients(dlogps, dkl, dlse)
    kept = functools.reduce(operator.or_, (gradient != 0 for gradient in upstream if gradient is not None))
    in_forward = _kept(labels, mask, ignore_index)
    return loops.token_stats_bwd(
        upstream,
        head,
        labels,
        Uniform() if uniform else ref_head,
        kept if in_forward is None else kept & in_forward,
        loops.RowStats(kl[:0], kl, stats),
        needs,
        options,
    )


@linear_token_stats_bwd.fake
def _empty_gradients_of_stats(head: Head, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(head, needs)


linear_token_stats_bwd.flops(_flops_of_gradients)


def _save_token_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    given = linear_token_stats_fwd.records(inputs)
    options: HeadOptions = given["options"]
    ctx.call = _calls_of(given["labels"])
    ctx.ignore_index, ctx.uniform = given["ignore_index"], given["uniform"]
    ctx.chunk_size, ctx.columns, ctx.mixture = options.chunk_size, options.columns, options.mixture
    ctx.dtype = given["head"].hidden.dtype
    logps, kl, stats = output
    not_asked = [logps] if given["labels"] is None else []
    not_asked += [kl] if given["ref_head"] is None and not ctx.uniform else []
    ctx.mark_non_differentiable(*not_asked)
    ctx.set_materialize_grads(False)
    ref_head = given["ref_head"] or (None, None, None)
    transforms = options.transform, options.ref_transform
    saved = (*map(savable, (*given["head"], given["labels"], *ref_head, given["mask"])), kl, stats, *transforms)
    ctx.save_for_backward(*saved)
    if is_transforming():
        ctx.save_for_forward(*saved)


def _token_stats_backward(
    ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, dstats: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dlogps is None and dkl is None and dstats is None:
        return None, None, None
    if not is_transforming():  # there a second derivative asks for the gradient of `linear_token_stats_bwd`
        refuse_double_backward(ctx.call, _INSTEAD)
    hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, mask, kl, stats, transform, ref_transform = (
        ctx.saved_tensors
    )
    wanted = ctx.needs_input_grad[:3]  # of hidden, weight and bias
    gradients = linear_token_stats_bwd(
        dlogps,
        dkl,
        None if dstats is None else dstats[1],
        Head(hidden, weight, bias),
        labels,
        None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias),
        mask,
        kl,
        stats,
        ctx.ignore_index,
        ctx.uniform,
        Needs(wanted[0], wanted[1], wanted[2], ctx.dtype),
        HeadOptions(ctx.chunk_size, ctx.columns, transform, ref_transform, ctx.mixture),
    )
    dhidden, dweight, dbias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dhidden, dweight, dbias


@op
def linear_token_stats_jvp(
    hidden_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    head: Head,
    labels: Tensor | None,
    ref_head: Head | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    uniform: bool,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents ``(logps, kl, log-sum-exp)`` of each row, ``[0]`` where not asked for."""
    return loops.token_stats_jvp(
        (hidden_tangent, weight_tangent, bias_tangent),
        head,
        labels,
        Uniform() if uniform else ref_head,
        _kept(labels, mask, ignore_index),
        loops.RowStats(kl[:0], kl, stats),
        options,
    )


@linear_token_stats_jvp.fake
def _empty_tangents(labels: Tensor | None, kl: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logps = stats[0] if labels is not None else stats.new_empty(0)
    return torch.empty_like(logps), torch.empty_like(kl), torch.empty_like(stats[0])


def _token_stats_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
    if any(tangent is not None for tangent in tangents[3:]):
        raise RuntimeError(
            "spo_kernels: the policy's head alone has a derivative, but the reference logits or a temperature have a "
            "tangent of forward-mode AD: use .detach()"
        )
    saved = ctx.saved_tensors
    if not torch._C._are_functorch_transforms_active():  # they are dual tensors
        saved = [None if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in saved]
    hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, mask, kl, stats, transform, ref_transform = saved
    logps, kl_tangent, lse = linear_token_stats_jvp(
        *tangents[:3],
        Head(hidden, weight, bias),
        labels,
        None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias),
        mask,
        kl,
        stats,
        ctx.ignore_index,
        ctx.uniform,
        HeadOptions(ctx.chunk_size, ctx.columns, transform, ref_transform, ctx.mixture),
    )
    # The shift is a constant, so the log-sum-exp's tangent is that of logsum.
    zeros = [torch.zeros_like(lse) for _ in range(stats.shape[0] - 1)]
    of_stats = torch.stack([zeros[0], lse, *zeros[1:]])
    with_kl = ctx.uniform or ref_hidden is not None
    return None if labels is None else logps, kl_tangent if with_kl else None, of_stats


def _saves_names(of: Op) -> Callable[..., None]:
    def save_names(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = _calls_of(of.records(inputs)["labels"])

    return save_names


def _refuse_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    raise RuntimeError(
        f"spo_kernels: the gradients of {ctx.call} cannot be differentiated again (double backward): {_INSTEAD}"
    )


linear_token_stats_fwd.gradient(_save_token_stats, _token_stats_backward, of="head")
linear_token_stats_fwd.transform_with_loops(_token_stats_jvp)
for _op in (linear_token_stats_bwd, linear_token_stats_jvp):
    _op.gradient(_saves_names(_op), _refuse_backward, of="head")
    _op.transform_with_loops(_refuse_backward)


@op
def linear_kl_loss_fwd(
    head: Head,
    ref_head: Head,
    row_weight: Tensor,
    needs: Needs,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss [], dhidden, dweight, dbias)``: gradients for an upstream scalar of 1, ``[0]`` where not wanted."""
    if options.columns.group is not None:
        options.columns.check_same(row_weight=row_weight)  # 0 where masked
    return loops.kl_loss_fwd(head, ref_head, row_weight, needs, options)


@linear_kl_loss_fwd.fake
def _empty_kl_loss(head: Head, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = head.hidden.new_empty((), dtype=accumulate_dtype(head.hidden.dtype))
    return loss, *_empty_gradients(head, needs)


linear_kl_loss_fwd.flops(_flops_of_gradients)


@op
def linear_spo_loss_fwd(
    head: Head,
    labels: Tensor,  # [N]
    bounds: Tensor,  # [2P + 1], first row of each sequence, and N
    counts: Tensor,  # [2P] unignored rows of each sequence, floating
    weights: PairWeights,
    objective: PairObjective,
    ignore_index: int,
    strict: bool,  # refuse a pair with more rows than a tile
    needs: Needs,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss [], sums of log-probs [2P], dhidden, dweight, dbias)``, the gradients as in `linear_kl_loss_fwd`."""
    pairs = counts.shape[0] // 2
    if options.columns.group is not None:
        options.columns.check_same(labels=labels, cu_seqlens=bounds, pair_weight=weights.given)
    shards.check_labels(labels, options.columns.vocab_size, ignore_index)
    alpha, nll_weight = objective.alpha.item(), objective.nll_weight.item()
    center, average = objective.center, objective.average
    importance = None if weights.normalizer is None else SoftImportance(weights.gamma.item(), weights.normalizer)
    losses = counts.new_zeros(pairs)
    divisor = counts.clamp(min=1) if average else torch.ones_like(counts)
    nll_share = nll_weight / counts[:pairs].sum().clamp(min=1)

    def coefficients(first: int, end: int, sums_w: Tensor, sums_l: Tensor) -> tuple[Tensor, Tensor]:
        divisor_w, divisor_l = divisor[first:end], divisor[pairs + first : pairs + end]
        logp_w, logp_l = sums_w / divisor_w, sums_l / divisor_l
        mu = torch.ones_like(logp_w)
        if weights.given is not None:
            mu = weights.given[first:end]
        elif importance is not None:
            mu = importance(logp_w, logp_l)
        margin = torch.where(mu == 0, 0, logp_w - logp_l)
        losses[first:end] = torch.where(mu == 0, 0, mu * pair_preference(margin, alpha, center))
        slope = mu * pair_error(margin, alpha) / pairs
        return -slope / divisor_w - nll_share, slope / divisor_l

    sums, dhidden, dweight, dbias = loops.pair_gradients(
        head, labels, labels != ignore_index, bounds, coefficients, needs, options, strict=strict
    )
    loss = mean_or_zero(losses) - (nll_share * sums[:pairs].sum() if nll_weight else 0)
    return loss, sums, dhidden, dweight, dbias


@linear_spo_loss_fwd.fake
def _empty_spo_loss(head: Head, counts: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return counts.new_empty(()), torch.empty_like(counts), *_empty_gradients(head, needs)


@linear_spo_loss_fwd.flops
def _flops_of_spo_loss(head: Head, needs: Needs) -> int:
    return _flops_of_gradients(head, None, needs)


def _save_unit_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradients of an op that returns ``(loss, ..., dhidden, dweight, dbias)``."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[-3:])


def _scaled_gradients(call: str, message: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Backward of the ops that use `_save_unit_gradients`: the saved gradients times the upstream scalar.

    The gradients are scaled in place, so this can run only once; a second backward raises the message.
    """

    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return None, None, None
        refuse_double_backward(call, _INSTEAD)
        refuse_second_backward(ctx, message)
        gradients: list[Tensor | None] = []
        for gradient, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True):
            if need:
                rows = gradient if gradient.dim() > 1 else gradient[None]
                torch.ops.spo_kernels.scale_(rows, dloss)
                mark_written(gradient)
            gradients.append(gradient.to(ctx.dtype) if need else None)
        return tuple(gradients)

    return backward


linear_kl_loss_fwd.gradient(
    _save_unit_gradients,
    _scaled_gradients(
        "linear_kl_loss and LinearSPOLoss",
        "linear_kl_loss can run backward only once: its gradients were computed in the forward and scaled in place by "
        "the first backward; use (row_weight * spo_kernels.linear_token_kl(...)).sum(), or in LinearSPOLoss route "
        '"recompute"',
    ),
    of="head",
)
linear_spo_loss_fwd.gradient(
    _save_unit_gradients,
    _scaled_gradients(
        "LinearSPOLoss",
        'LinearSPOLoss with route "auto" or "recompute_free" can run backward only once: its gradients were computed '
        'in the forward and scaled in place by the first backward; use route "recompute"',
    ),
    of="head",
)
