"""`token_stats_fwd` under torch.func and forward-mode AD: grad, vmap, jvp, jacrev and their compositions.

Eager calls and torch.compile take the function of `row_ops`, which costs less and which Dynamo can trace. The functions
here call the same ops. A batch of vmap becomes more rows of one call. Second derivatives are those of the formulas in
plain torch (`gradient_by_formula`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spo_kernels.checks import savable
from spo_kernels.op_library import Dims, fold
from spo_kernels.reference import LABEL_ELSEWHERE, RowOptions, raw_gradient, transformed_logits


def _one(tensor: Tensor, dim: int | None) -> Tensor:
    """One of a batch of empty tensors."""
    return tensor if dim is None else tensor.select(dim, 0)


def _fold_transform(transform: Tensor | None, dim: int | None, batch: int, rows: int) -> Tensor | None:
    """A transform for the folded rows."""
    if transform is None or (dim is None and transform.shape[1] == 1):
        return transform
    per_batch = transform.expand(batch, *transform.shape) if dim is None else transform.movedim(dim, 0)
    return per_batch.expand(batch, -1, rows).transpose(0, 1).flatten(1)


def _rows_of(logits: Tensor, dim: int | None) -> torch.Size:
    return (logits if dim is None else logits.movedim(dim, 0)[0]).shape[:-1]


def vmap_token_stats_fwd(info: Any, dims: Dims, *flat: Any) -> Any:
    logits, labels, ref_logits, mask, ignore_index, inplace_backward, vocab_size, *transforms, mixture = flat
    batch, rows = info.batch_size, _rows_of(logits, dims[0])
    folded = [fold(x, dim, batch) for x, dim in zip((logits, labels, ref_logits, mask), dims, strict=False)]
    transforms = [_fold_transform(t, d, batch, rows.numel()) for t, d in zip(transforms, dims[7:9], strict=True)]
    logps, kl, stats = torch.ops.spo_kernels.token_stats_fwd(
        *folded, ignore_index, inplace_backward, vocab_size, *transforms, mixture
    )
    shape = (batch, rows[0])
    if labels is not None:
        logps = logps.unflatten(0, shape)
    if ref_logits is not None:
        kl = kl.unflatten(0, shape)
    return (logps, kl, stats.unflatten(1, shape)), (None if labels is None else 0, None if ref_logits is None else 0, 1)


def vmap_token_stats_bwd(info: Any, dims: Dims, *flat: Any) -> Any:
    *per_row, kl, stats, ignore_index, vocab_size, transform, ref_transform, mixture = flat
    logits, ref_logits = per_row[3], per_row[5]
    batch, rows = info.batch_size, _rows_of(logits, dims[3])
    folded = [fold(x, dim, batch) for x, dim in zip(per_row, dims, strict=False)]
    kl = _one(kl, dims[7]) if ref_logits is None else fold(kl, dims[7], batch)
    transforms = [
        _fold_transform(t, d, batch, rows.numel()) for t, d in zip((transform, ref_transform), dims[11:13], strict=True)
    ]
    dlogits = torch.ops.spo_kernels.token_stats_bwd(
        *folded, kl, fold(stats, dims[8], batch, 1), ignore_index, vocab_size, *transforms, mixture
    )
    return dlogits.unflatten(0, (batch, rows[0])), 0


def gradient_by_formula(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    options: RowOptions,
) -> Tensor:
    """`reference.token_stats_bwd` in torch's differentiable functions. It makes several tensors like logits."""
    dlogps = None if dlogps is None or labels is None else dlogps.where(labels != ignore_index, 0)
    dkl = dkl if dkl is None or mask is None else dkl.where(mask, 0)
    # A row with upstream gradients of 0 is not read if it holds NaN. Other such rows are read: their gradient is 0, but
    # depends on the upstream gradients.
    wanted = [upstream.detach() != 0 for upstream in (dlogps, dkl, dlse) if upstream is not None]
    nan = [x.isnan().any(-1) for x in (logits, ref_logits) if x is not None]
    read = (functools.reduce(torch.logical_or, wanted) | ~functools.reduce(torch.logical_or, nan))[..., None]
    logits = logits.where(read, 0)
    z = transformed_logits(logits, options.vocab_size, options.transform)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    dz = torch.zeros_like(p)
    if dlogps is not None and labels is not None:
        columns = torch.arange(p.shape[-1], device=p.device)
        held = (columns == labels[..., None]) & (labels != LABEL_ELSEWHERE)[..., None]
        dz = dz + dlogps[..., None] * (held.to(p.dtype) - p)
    if dkl is not None and ref_logits is not None:
        r = transformed_logits(ref_logits, options.vocab_size, options.ref_transform).where(read, 0)
        log_q = r.log_softmax(-1)
        if options.mixture == 1:
            dz = dz + dkl[..., None] * (p - log_q.exp())
        else:
            ratio = log_p - log_q
            if options.mixture:  # log(p / m), without the kinks of `reference.log_shares`
                log_w, log_rest = torch.tensor([options.mixture, 1 - options.mixture], dtype=torch.float64).log()
                ratio = -options.mixture * torch.logaddexp(log_w.to(ratio), log_rest.to(ratio) - ratio)
            ratio = ratio.where(p > 0, 0)
            dz = dz + dkl[..., None] * p * (ratio - (p * ratio).sum(-1, keepdim=True))
    if dlse is not None:
        dz = dz + dlse[..., None] * p
    return raw_gradient(dz, logits, options)


class TokenStatsGradient(torch.autograd.Function):
    """`row_ops.token_stats_bwd`, with derivatives: those of `gradient_by_formula`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> Tensor:
        return torch.ops.spo_kernels.token_stats_bwd(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, _, ctx.ignore_index, ctx.vocab_size, transform, ref_transform, ctx.mixture = inputs
        saved = (*map(savable, tensors), transform, ref_transform)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _formula(ctx: Any) -> tuple[Callable[..., Tensor], list[int], list[Tensor]]:
        """``(formula, at, given)``.

        given: those of dlogps, dkl, dlse and logits that are not None. at: their positions in that order. formula: the
        gradient as a function of them.
        """
        *differentiated, labels, ref_logits, mask, transform, ref_transform = ctx.saved_tensors
        options = RowOptions(ctx.vocab_size, transform, ref_transform, ctx.mixture)
        at = [i for i, tensor in enumerate(differentiated) if tensor is not None]

        def formula(*given: Tensor) -> Tensor:
            dlogps, dkl, dlse, logits = (given[at.index(i)] if i in at else None for i in range(4))
            assert logits is not None
            rows = (logits, labels, ref_logits, mask)
            return gradient_by_formula(dlogps, dkl, dlse, *rows, ctx.ignore_index, options)

        return formula, at, [differentiated[i] for i in at]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        formula, at, primals = TokenStatsGradient._formula(ctx)
        gradients: list[Tensor | None] = [None] * 14
        for i, gradient in zip(at, torch.func.vjp(formula, *primals)[1](upstream), strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        formula, at, primals = TokenStatsGradient._formula(ctx)
        given = []
        for i, primal in zip(at, primals, strict=True):
            tangent = tangents[i]
            given.append(torch.zeros_like(primal) if tangent is None else tangent)
        # Clones: jvp refuses tensors whose elements share memory, as those of an expanded upstream gradient do.
        pairs = [(primal.clone(), tangent.clone()) for primal, tangent in zip(primals, given, strict=True)]
        return torch.func.jvp(formula, *zip(*pairs, strict=True))[1]


class TokenStats(torch.autograd.Function):
    """`row_ops.token_stats_fwd` with its derivatives, forward and reverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.spo_kernels.token_stats_fwd(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.ignore_index, _, ctx.vocab_size, transform, ref_transform, ctx.mixture = inputs
        _, kl, stats = output
        ctx.set_materialize_grads(False)  # `jvp` tells a tangent of 0 from none
        saved = (*map(savable, tensors), kl, stats, transform, ref_transform)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _gradient(ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, dlse: Tensor | None) -> Tensor:
        logits, labels, ref_logits, mask, kl, stats, *transforms = ctx.saved_tensors
        upstream = (None if labels is None else dlogps, None if ref_logits is None else dkl, dlse)
        rows = (logits, labels, ref_logits, mask, kl, stats)
        return TokenStatsGradient.apply(*upstream, *rows, ctx.ignore_index, ctx.vocab_size, *transforms, ctx.mixture)

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, dstats: Tensor | None) -> tuple[Any, ...]:
        if dlogps is None and dkl is None and dstats is None:
            return (None,) * 10
        return TokenStats._gradient(ctx, dlogps, dkl, None if dstats is None else dstats[1]), *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_constants: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if any(constant is not None for constant in of_constants):
            raise RuntimeError(
                "spo_kernels: the logits alone have a derivative, but reference logits or a temperature have a tangent "
                "of forward-mode AD: use .detach()"
            )
        # Rows do not depend on each other, so the gradient for upstream gradients of 1 holds every row's gradient.
        _, labels, ref_logits, _, kl, stats, *_ = ctx.saved_tensors
        one, nothing = torch.ones_like(stats[0]), torch.zeros_like(kl)

        def of(*upstream: Tensor | None) -> Tensor:
            return (TokenStats._gradient(ctx, *upstream).to(stats.dtype) * tangent).sum(-1)

        logsum = of(None, None, one)
        tangents = [torch.zeros_like(logsum) for _ in range(stats.shape[0])]
        tangents[1] = logsum
        logps = stats.new_zeros(0) if labels is None else of(one, None, None)
        return logps, nothing if ref_logits is None else of(None, one, None), torch.stack(tangents)
