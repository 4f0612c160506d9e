"""Sequences of rows, padded ``[B, T]`` or packed ``[N]`` with ``cu_seqlens [B + 1]``, and the sums over them.

A sequence's sum is the same from run to run and depends on its own values alone. Sums are taken in float64, so neither
padding nor the layout changes a float32 result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels.checks import check_sequences, differentiated_eagerly, savable
from spo_kernels.op_library import Dims, fold, is_transforming, op, register_vmap, vmap_by_loop


def padded_bounds(values: Tensor) -> Tensor:
    """``[B + 1]`` int64: where each sequence of ``[B, T]`` starts in the flattened rows, and B T."""
    return torch.arange(values.shape[0] + 1, device=values.device) * values.shape[1]


def check_bounds(bounds: Tensor, rows: int) -> None:
    """RuntimeError for bounds that do not rise from 0 to the number of rows; on a GPU a device-side assertion."""
    legal = (bounds[0] == 0) & (bounds[-1] == rows) & (bounds.diff() >= 0).all()
    torch._assert_async(legal, "cu_seqlens must rise from 0 to the number of rows N")


def of_rows(bounds: Tensor, rows: int) -> Tensor:
    """The index of each row's sequence: ``[N]`` int64."""
    row = torch.arange(rows, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), row, right=True)


def sums(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum ``[B]`` of float64 values ``[N]`` from each of the bounds ``[B + 1]`` to the next; 0 for an empty sequence.

    The bounds need not begin with the first row, nor end with the last. A GPU adds in a fixed order, without atomics.
    """
    return torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True)  # unsafe: bounds are not read by the host


# An op with its own gradient: on a GPU, torch.segment_reduce's gradient uses one thread per sequence.
@op
def sequence_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums ``[B]`` of values ``[B, T]``, or ``[N]`` with cu_seqlens ``[B + 1]``, in their dtype."""
    if cu_seqlens is None:
        bounds = padded_bounds(values)
    else:
        bounds = cu_seqlens.contiguous()
        check_bounds(bounds, values.shape[0])
    return sums(values.flatten().double(), bounds).to(values.dtype)


@sequence_sums.fake
def _empty_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def _save_bounds(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    values, cu_seqlens = inputs
    ctx.shape = values.shape
    ctx.save_for_backward(savable(cu_seqlens))


def _sums_gradient(dsums: Tensor, cu_seqlens: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of values of this shape."""
    return dsums[:, None].expand(shape) if cu_seqlens is None else dsums[of_rows(cu_seqlens, shape[0])]


def _sums_backward(ctx: Any, dsums: Tensor) -> Tensor:
    (cu_seqlens,) = ctx.saved_tensors
    return _sums_gradient(dsums, cu_seqlens, ctx.shape)


sequence_sums.gradient(_save_bounds, _sums_backward, of="values")
_SequenceSums = sequence_sums.eager_function()


def _vmap_sums(info: Any, dims: Dims, values: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    if cu_seqlens is not None:
        return vmap_by_loop(sequence_sums.packet)(info, dims, values, cu_seqlens)
    folded = fold(values, dims[0], info.batch_size)
    return sequence_sums.packet(folded, None).unflatten(0, (info.batch_size, -1)), 0


register_vmap(sequence_sums, _vmap_sums)


class _TransformableSums(torch.autograd.Function):
    """`sequence_sums` under torch.func and forward-mode AD. Dynamo cannot trace a function with a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return sequence_sums.packet(values, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        values, cu_seqlens = inputs
        ctx.shape = values.shape
        ctx.save_for_backward(savable(cu_seqlens))
        ctx.save_for_forward(cu_seqlens)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return _sums_gradient(dsums, cu_seqlens, ctx.shape).clone(), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return _TransformableSums.apply(tangent, *ctx.saved_tensors)


def checked_sums(values: Tensor, cu_seqlens: Tensor | None, name: str, like: str = "logits") -> Tensor:
    """Sums ``[B]`` of values ``[B, T]``, or of ``[N]`` or ``[1, N]`` with cu_seqlens ``[B + 1]``.

    Raises ValueError for any other layout; the text calls the values `name`.
    """
    check_sequences(values, cu_seqlens, name, like)
    if cu_seqlens is not None:
        values = values.flatten()
    if is_transforming():
        return _TransformableSums.apply(values, cu_seqlens)
    if differentiated_eagerly(values):
        return _SequenceSums.apply(values, cu_seqlens)
    return sequence_sums.packet(values, cu_seqlens)
