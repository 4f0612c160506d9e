"""The compiled CUDA backend: loads its op library and calls it.

The library's ops live in a namespace of their own, ``torch.ops.spo_kernels_cuda``. Unlike the public ops they take the
tensor for the gradient, and whether results must be deterministic.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import mixtures
from spo_kernels.reference import PLAIN, RowOptions

_ROWS = "Tensor? labels, Tensor? ref_logits, Tensor? mask"
_OPTIONS = "int? vocab_size, Tensor? transform, Tensor? ref_transform, float mixture"

SCHEMAS = {
    # Whether rows are so few that several blocks share one. Such a row's rounding depends on how many rows there are.
    "kl_loss_splits_rows": f"(Tensor logits, Tensor ref_logits, bool deterministic, {_OPTIONS}) -> bool",
    "token_stats_fwd": f"(Tensor logits, {_ROWS}, int ignore_index, bool deterministic, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    # dlogits may be logits.
    "token_stats_bwd": f"(Tensor(a!) dlogits, Tensor? dlogps, Tensor? dkl, Tensor? dlse, Tensor logits, {_ROWS}, "
    f"Tensor kl, Tensor stats, int ignore_index, {_OPTIONS}) -> ()",
    "mixture_kl": f"(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor stats, {_OPTIONS}) -> Tensor",
    "kl_loss_fwd": f"(Tensor(a!) dlogits, Tensor logits, Tensor ref_logits, Tensor? row_weight, {_OPTIONS}) -> Tensor",
    "scale_": "(Tensor(a!) tensor, Tensor scale) -> ()",
}


class CompiledOps:
    """A backend (`spo_kernels.backends.Backend`) on top of a library that implements `SCHEMAS` in a namespace."""

    def __init__(self, namespace: str, library: Path) -> None:
        self._schemas = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            self._schemas.define(name + schema)
        torch.ops.load_library(library)
        self._ops: Any = getattr(torch.ops, namespace)

    @torch.no_grad()
    def token_stats_fwd(
        self,
        logits: Tensor,
        labels: Tensor | None,
        ref_logits: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        options: RowOptions = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ref_logits is not None and options.mixture:
            return mixtures.token_stats_fwd(self, logits, labels, ref_logits, mask, ignore_index, options)
        _require_device(logits, options, labels=labels, ref_logits=ref_logits, mask=mask)
        deterministic = torch.are_deterministic_algorithms_enabled()
        return self._ops.token_stats_fwd(logits, labels, ref_logits, mask, ignore_index, deterministic, *options)

    @torch.no_grad()
    def token_stats_bwd(
        self,
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
        rows = {"labels": labels, "ref_logits": ref_logits, "mask": mask, "kl": kl, "stats": stats}
        _require_device(logits, options, **rows, dlogps=dlogps, dkl=dkl, dlse=dlse)
        dlogits = _gradient_of(logits, inplace)
        self._ops.token_stats_bwd(
            dlogits, dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index, *options
        )
        return dlogits

    @torch.no_grad()
    def mixture_kl(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        stats: Tensor,
        options: RowOptions = PLAIN,
    ) -> Tensor:
        _require_device(logits, options, ref_logits=ref_logits, mask=mask, stats=stats)
        return self._ops.mixture_kl(logits, ref_logits, mask, stats, *options)

    @torch.no_grad()
    def kl_loss_fwd(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        row_weight: Tensor | None,
        inplace: bool,
        options: RowOptions = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        _require_device(logits, options, ref_logits=ref_logits, row_weight=row_weight)
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Few long rows: in one sweep most of the GPU would idle.
        if options.mixture or self._ops.kl_loss_splits_rows(logits, ref_logits, deterministic, *options):
            return mixtures.kl_loss_fwd(self, logits, ref_logits, row_weight, inplace, options)
        dlogits = _gradient_of(logits, inplace)
        return self._ops.kl_loss_fwd(dlogits, logits, ref_logits, row_weight, *options), dlogits

    def scale_(self, tensor: Tensor, scale: Tensor) -> None:
        _require_device(tensor, PLAIN, scale=scale)
        self._ops.scale_(tensor, scale)


def _require_device(logits: Tensor, options: RowOptions, **values: Tensor | None) -> None:
    """RuntimeError for a tensor on another device: a kernel that read it would destroy the process's context."""
    device = logits.device
    transforms = {"transform": options.transform, "ref_transform": options.ref_transform}
    for name, value in (values | transforms).items():
        if value is not None and value.device != device:
            raise RuntimeError(f"{name} must be on {device} like the logits, got {value.device}")


def _gradient_of(logits: Tensor, inplace: bool) -> Tensor:
    return logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)


def library_path() -> Path | None:
    """The CUDA op library next to the package, or None where it was not built."""
    path = Path(__file__).parent.parent / "libspo_kernels_cuda.so"
    return path if path.exists() else None


@cache
def load() -> CompiledOps:
    """Load the library, which registers its kernels with torch; ImportError where it was not built."""
    path = library_path()
    if path is None:
        raise ImportError("the CUDA kernels are not part of this installation")
    return CompiledOps("spo_kernels_cuda", path)
