"""Sequences of rows, padded ``[B, T]`` or packed ``[N]`` with ``cu_seqlens [B + 1]``: their rows and their sums.

A sequence's sum is the same from run to run and depends on its own values alone. They are added up in float64, so that
neither the length nor the layout shows in a float32 result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_bounds(values: Tensor) -> Tensor:
    """``[B + 1]`` int64: where each sequence of ``[B, T]`` starts in the flattened rows, and B T."""
    return torch.arange(values.shape[0] + 1, device=values.device) * values.shape[1]


def check_bounds(bounds: Tensor, rows: int) -> None:
    """RuntimeError for bounds that do not rise from 0 to the number of rows; on a GPU a device-side assertion."""
    legal = (bounds[0] == 0) & (bounds[-1] == rows) & (bounds.diff() >= 0).all()
    torch._assert_async(legal, "cu_seqlens must rise from 0 to the number of rows N")


def of_rows(bounds: Tensor, rows: int) -> Tensor:
    """Which sequence each row belongs to: ``[N]`` int64."""
    row = torch.arange(rows, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), row, right=True)


def sums(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum ``[B]`` of float64 values ``[N]`` from each of the bounds ``[B + 1]`` to the next; 0 for an empty sequence.

    The bounds need not begin with the first row, nor end with the last. A GPU adds in a fixed order, without atomics.
    """
    return torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True)  # unsafe: bounds are not read by the host
