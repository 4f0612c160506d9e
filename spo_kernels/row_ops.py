"""The row ops: for each op its schema and output shapes, its gradient, and its function for eager mode.

What the ops compute, and what each argument means, is in `spo_kernels.reference`. Backends implement them. Logits are
``[N, V]`` or ``[B, T, V]`` with a unit last stride and any other strides; rows are everything but the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels.checks import savable
from spo_kernels.op_library import (
    Op,
    backend_op,
    is_differentiated_again,
    mark_written,
    refuse_double_backward,
    refuse_second_backward,
    register_vmap,
)
from spo_kernels.precision import accumulate_dtype
from spo_kernels.reference import RowOptions, is_jsd
from spo_kernels.row_transforms import TokenStatsGradient, vmap_token_stats_bwd, vmap_token_stats_fwd


def empty_token_stats(
    logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized ``(logps, kl, stats)`` of rows of logits; ``[0]`` for what has no input."""
    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[:-1]
    logps = logits.new_empty(rows if labels is not None else (0,), dtype=dtype)
    kl = logits.new_empty(rows if ref_logits is not None else (0,), dtype=dtype)
    return logps, kl, logits.new_empty((2 if ref_logits is None else 4 + is_jsd(options.mixture), *rows), dtype=dtype)


@backend_op()
def token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,  # read by the gradient alone
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` of each row.

    The backward takes the upstream gradient of stats[1], the logsum, for that of the log-sum-exp, and ignores those of
    the other stats.
    """
    return empty_token_stats(logits, labels, ref_logits, options)


@backend_op()
def token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    options: RowOptions,
) -> Tensor:
    """The gradient of the logits, contiguous."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@backend_op(mutates="logits")
def token_stats_bwd_(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    options: RowOptions,
) -> None:
    """The gradient of the logits, written over the logits."""


def save_token_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.inplace_backward, ctx.vocab_size, transform, ref_transform, ctx.mixture = inputs
    logits, labels, ref_logits, mask = tensors
    logps, kl, stats = output
    ctx.mark_non_differentiable(*[out for out, source in ((logps, labels), (kl, ref_logits)) if source is None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        logits, savable(labels), savable(ref_logits), savable(mask), kl, stats, transform, ref_transform
    )


def token_stats_backward(ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, dstats: Tensor | None) -> Tensor | None:
    if dlogps is None and dkl is None and dstats is None:
        return None
    upstream = dlogps, dkl, None if dstats is None else dstats[1]
    # Under torch.compile the backward does not overwrite: functionalization does not see that a second
    # function saved the same logits, and that function would read gradients instead. In eager mode the version counter
    # catches this.
    if not ctx.inplace_backward or torch.compiler.is_compiling():
        *saved, transform, ref_transform = ctx.saved_tensors
        arguments = (*upstream, *saved, ctx.ignore_index, ctx.vocab_size, transform, ref_transform, ctx.mixture)
        if is_differentiated_again():
            return TokenStatsGradient.apply(*arguments)
        return torch.ops.spo_kernels.token_stats_bwd(*arguments)
    refuse_double_backward("the functions with inplace_backward=True", "leave the option out")
    refuse_second_backward(
        ctx,
        "functional: with inplace_backward=True (of kl_loss: overwrite_logits=True) backward can run only once: "
        "the first has replaced the logits by their gradient; leave the option out",
    )
    logits, *saved, transform, ref_transform = ctx.saved_tensors
    dlogits = logits.detach()
    torch.ops.spo_kernels.token_stats_bwd_(
        *upstream, dlogits, *saved, ctx.ignore_index, ctx.vocab_size, transform, ref_transform, ctx.mixture
    )
    mark_written(dlogits)
    return dlogits


register_vmap(token_stats_fwd, vmap_token_stats_fwd)
register_vmap(token_stats_bwd, vmap_token_stats_bwd)
token_stats_fwd.gradient(save_token_stats, token_stats_backward, of="logits")
TokenStatsFunction = token_stats_fwd.eager_function()


def entropy_and_lse(
    kl: Tensor, stats: Tensor, labels: Tensor, ignore_index: int, *, entropy: bool, lse: bool
) -> list[Tensor]:
    """Entropy and log-sum-exp of each row, those asked for; 0 where ignored.

    Args:
        kl: of the rows, to the uniform distribution, if the entropy is asked for.
        stats: of the rows, ``[2 or 4, ...]``.
    """
    wanted = labels != ignore_index
    outputs = []
    if entropy:
        log_size = stats[2:].detach().sum(0)  # log V over all shards
        outputs.append(log_size.view(labels.shape) - kl.view(labels.shape))
    if lse:
        outputs.append((stats[0].detach() + stats[1]).view(labels.shape))  # see `token_stats_fwd`
    return [torch.where(wanted, output, 0) for output in outputs]


@backend_op()
def mixture_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, options: RowOptions) -> Tensor:
    """``KL(p || m)`` and ``KL(q || m)`` of each row, ``[2, *rows]``, from statistics of the whole vocabulary."""
    return torch.empty_like(stats[:2])


@backend_op()
def kl_loss_fwd(
    logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """``(loss [], dlogits)``; dlogits is for an upstream scalar of 1."""
    loss = logits.new_empty((), dtype=accumulate_dtype(logits.dtype))
    return loss, torch.empty_like(logits, memory_format=torch.contiguous_format)


@backend_op(mutates="logits")
def kl_loss_fwd_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, options: RowOptions) -> Tensor:
    """``loss []``; the gradient is written over the logits."""
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype))


@backend_op(mutates="tensor")
def scale_(tensor: Tensor, scale: Tensor) -> None:
    """Multiply by a 0-d scale, in place."""


def _save_kl_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # or torch would fill a dlogits-sized tensor with zeros for the output nobody uses
    ctx.save_for_backward(dlogits)


def _kl_loss_backward(ctx: Any, dloss: Tensor, _: Any = None) -> Tensor:
    refuse_double_backward("kl_loss", "use (row_weight * spo_kernels.token_kl(...)).sum()")
    refuse_second_backward(
        ctx,
        "kl_loss can run backward only once: its gradient was computed in the forward and scaled in place by the first "
        "backward; use (row_weight * spo_kernels.token_kl(...)).sum()",
    )
    (dlogits,) = ctx.saved_tensors
    torch.ops.spo_kernels.scale_(dlogits, dloss)
    mark_written(dlogits)
    return dlogits


kl_loss_fwd.gradient(_save_kl_loss, _kl_loss_backward, of="logits")


class KLLossFunction(torch.autograd.Function):
    """`kl_loss_fwd` with its gradient, for eager mode. The gradient is not an output: that saves marking it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, *options: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, dlogits = torch.ops.spo_kernels.kl_loss_fwd(logits, ref_logits, row_weight, *options)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _kl_loss_backward(ctx, dloss), *(None,) * (2 + len(RowOptions._fields))


class KLLossOverwriteFunction(torch.autograd.Function):
    """``kl_loss_fwd_`` with its gradient: the unit gradient has replaced the logits when forward returns.

    `Overwritten` then marks the logits. This function cannot: autograd refuses to mark a view in a function with a
    second output.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, *options: Any) -> Tensor:
        dlogits = logits.detach()
        loss = torch.ops.spo_kernels.kl_loss_fwd_(dlogits, ref_logits, row_weight, *options)
        mark_written(dlogits)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _kl_loss_backward(ctx, dloss), *(None,) * (2 + len(RowOptions._fields))


class Overwritten(torch.autograd.Function):
    """Marks logits that `KLLossOverwriteFunction` has overwritten: asking autograd for their gradient is an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.is_view = logits._is_view()
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        # If the logits are part of a tensor, a use of its other parts sends zeros here. Reading them syncs a GPU.
        if not ctx.is_view or dlogits.any():
            raise RuntimeError(
                "spo_kernels.kl_loss with overwrite_logits=True has replaced the logits by their gradient, but "
                "something used them afterwards; leave the option out"
            )
        return dlogits  # zeros; with None autograd would drop the gradient of the other parts


def overwriting_kl_loss(
    logits: Tensor, rows: Tensor, ref_rows: Tensor, row_weight: Tensor | None, options: RowOptions
) -> Tensor:
    """Apply `KLLossOverwriteFunction` to rows, a view of logits; then tell autograd that logits are overwritten."""
    loss: Tensor = KLLossOverwriteFunction.apply(rows, ref_rows, row_weight, *options)
    # `Overwritten` bumps the version although it writes nothing. The gradient saved above would then look stale, so the
    # version is preserved.
    with torch.autograd._unsafe_preserve_version_counter(logits):
        Overwritten.apply(logits)
    return loss


# What a backend registers with the dispatcher.
OPS: dict[str, Op] = {
    op.name: op
    for op in (token_stats_fwd, token_stats_bwd, token_stats_bwd_, mixture_kl, kl_loss_fwd, kl_loss_fwd_, scale_)
}
