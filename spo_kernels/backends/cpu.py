"""The compiled CPU backend: loads the op library and exposes its control surface (build facts, SIMD level)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from spo_kernels.reference import PLAIN, RowOptions


def library_path() -> Path | None:
    """The op library next to the package, or None where it was not built."""
    path = Path(__file__).parent.parent / "libspo_kernels.so"
    return path if path.exists() else None


@cache
def load() -> ModuleType:
    """Load the op library, which registers its kernels with torch, and return the control module.

    ``SPO_SIMD=avx512|avx2|portable`` lowers the SIMD level; a level this CPU lacks is an error.
    """
    path = library_path()
    if path is None:
        raise ImportError("spo_kernels was imported from a tree in which its kernels were never built")
    torch.ops.load_library(path)
    from spo_kernels import _control

    if level := os.environ.get("SPO_SIMD"):
        _control.set_simd_level(level)
    return _control


def token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    options: RowOptions = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return torch.ops.spo_kernels.token_stats_fwd(logits, labels, ref_logits, mask, ignore_index, False, *options)


def token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    inplace: bool,
    dlse: Tensor | None = None,
    options: RowOptions = PLAIN,
) -> Tensor:
    args = (dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index, *options)
    with torch.no_grad():
        if not inplace:
            return torch.ops.spo_kernels.token_stats_bwd(*args)
        torch.ops.spo_kernels.token_stats_bwd_(*args)
        return logits


def mixture_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, options: RowOptions = PLAIN
) -> Tensor:
    with torch.no_grad():
        return torch.ops.spo_kernels.mixture_kl(logits, ref_logits, mask, stats, *options)


def kl_loss_fwd(
    logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, inplace: bool, options: RowOptions = PLAIN
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if not inplace:
            return torch.ops.spo_kernels.kl_loss_fwd(logits, ref_logits, row_weight, *options)
        return torch.ops.spo_kernels.kl_loss_fwd_(logits, ref_logits, row_weight, *options), logits


def scale_(tensor: Tensor, scale: Tensor) -> None:
    torch.ops.spo_kernels.scale_(tensor, scale)
