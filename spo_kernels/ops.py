"""The operators: schemas, shapes (fake kernels) and gradients (autograd), once for every backend.

``torch.ops.spo_kernels.*`` are the row ops beneath the public functions. What they compute, and what each argument
means, is in `spo_kernels.reference`; here is what torch needs to know about them. Logits are ``[N, V]`` or
``[B, T, V]`` with a unit last stride and any other strides; rows are everything but the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels.reference import accumulate_dtype

library = torch.library.Library("spo_kernels", "DEF")

_BWD_ARGS = "Tensor? labels, Tensor? ref_logits, Tensor? mask, Tensor kl, Tensor stats, int ignore_index"

SCHEMAS = {
    # inplace_backward is read by the gradient formula alone.
    "token_stats_fwd": "(Tensor logits, Tensor? labels, Tensor? ref_logits, Tensor? mask, int ignore_index, "
    "bool inplace_backward) -> (Tensor logps, Tensor kl, Tensor stats)",
    "token_stats_bwd": f"(Tensor? dlogps, Tensor? dkl, Tensor logits, {_BWD_ARGS}) -> Tensor",
    "token_stats_bwd_": f"(Tensor? dlogps, Tensor? dkl, Tensor(a!) logits, {_BWD_ARGS}) -> ()",
    "kl_loss_fwd": "(Tensor logits, Tensor ref_logits, Tensor? row_weight) -> (Tensor loss, Tensor dlogits)",
    "kl_loss_fwd_": "(Tensor(a!) logits, Tensor ref_logits, Tensor? row_weight) -> Tensor",
    "scale_": "(Tensor(a!) tensor, Tensor scale) -> ()",
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"spo_kernels::{name}", lib=library)


@_fake("token_stats_fwd")
def _(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[:-1]
    logps = logits.new_empty(rows if labels is not None else (0,), dtype=dtype)
    kl = logits.new_empty(rows if ref_logits is not None else (0,), dtype=dtype)
    return logps, kl, logits.new_empty((2 if ref_logits is None else 4, *rows), dtype=dtype)


@_fake("token_stats_bwd")
def _(dlogps: Tensor | None, dkl: Tensor | None, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("token_stats_bwd_")
def _(dlogps: Tensor | None, dkl: Tensor | None, logits: Tensor, *args: Any) -> None:
    return None


@_fake("kl_loss_fwd")
def _(logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulate_dtype(logits.dtype))
    return loss, torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("kl_loss_fwd_")
def _(logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> Tensor:
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype))


@_fake("scale_")
def _(tensor: Tensor, scale: Tensor) -> None:
    return None


def _autograd(name: str, backward: Any, setup_context: Any = None) -> None:
    torch.library.register_autograd(f"spo_kernels::{name}", backward, setup_context=setup_context, lib=library)


def _written(tensor: Tensor) -> None:
    """Count an op's write in the tensor's version, so that whatever saved the tensor raises when it needs it."""
    if not torch.compiler.is_compiling():  # functionalized there: nothing was written
        torch.autograd.graph.increment_version(tensor)


def _refuse_double_backward() -> None:
    # Grad mode is on in a backward only under create_graph. Without this the gradient would come back as a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("spo_kernels: these gradients cannot be differentiated again (double backward)")


def _token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ref_logits, mask, ctx.ignore_index, ctx.inplace_backward = inputs
    logps, kl, stats = output
    not_asked = [out for out, source in ((logps, labels), (kl, ref_logits)) if source is None]
    ctx.mark_non_differentiable(stats, *not_asked)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, ref_logits, mask, kl, stats)


def _token_stats_backward(ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dlogps is None and dkl is None:
        return (None,) * 6
    _refuse_double_backward()
    logits, *rest = ctx.saved_tensors
    # While compiling, memory is the compiler's business: functionalization does not see that a second function saved
    # the same logits (in eager mode the version counter does), and would hand it gradients in their place.
    if ctx.inplace_backward and not torch.compiler.is_compiling():
        dlogits = logits.detach()
        torch.ops.spo_kernels.token_stats_bwd_(dlogps, dkl, dlogits, *rest, ctx.ignore_index)
        _written(dlogits)
    else:
        dlogits = torch.ops.spo_kernels.token_stats_bwd(dlogps, dkl, logits, *rest, ctx.ignore_index)
    return dlogits, None, None, None, None, None


def _kl_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # or torch would fill a dlogits-sized tensor with zeros for the output nobody uses
    ctx.save_for_backward(dlogits)


def _kl_loss_backward(ctx: Any, dloss: Tensor, _: Any = None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    (dlogits,) = ctx.saved_tensors
    torch.ops.spo_kernels.scale_(dlogits, dloss)
    _written(dlogits)
    return dlogits, None, None


class KlLossOverwrite(torch.autograd.Function):
    """``kl_loss_fwd_`` with its gradient: the unit gradient has replaced the logits when forward returns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> Tensor:
        dlogits = logits.detach()
        loss = torch.ops.spo_kernels.kl_loss_fwd_(dlogits, ref_logits, row_weight)
        _written(dlogits)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _kl_loss_backward(ctx, dloss)


_autograd("token_stats_fwd", _token_stats_backward, _token_stats_setup)
_autograd("kl_loss_fwd", _kl_loss_backward, _kl_loss_setup)
