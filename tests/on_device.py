"""A backend that computes on a device and is called with CPU tensors, so that the cases of the CPU run there too."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.backends import Backend


class OnDevice:
    """Copies whole storages, so that a slice keeps strides, offset and neighbours, and copies back what was written to.

    Results are on the CPU; one that was asked for in place is the caller's own tensor, as from any backend.
    """

    def __init__(self, backend: Backend, device: str) -> None:
        self._backend = backend
        self._device = device

    def token_stats_fwd(
        self, logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, mask: Tensor | None, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        there = (self._there(x) for x in (logits, labels, ref_logits, mask))
        logps, kl, stats = self._backend.token_stats_fwd(*there, ignore_index)
        return logps.cpu(), kl.cpu(), stats.cpu()

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
    ) -> Tensor:
        first = (self._there(dlogps), self._there(dkl))
        own = self._there(logits)
        rest = (self._there(x) for x in (labels, ref_logits, mask, kl, stats))
        dlogits = self._backend.token_stats_bwd(*first, own, *rest, ignore_index, inplace)
        return self._back(logits, own, dlogits, inplace)

    def kl_loss_fwd(
        self, logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        own = self._there(logits)
        loss, dlogits = self._backend.kl_loss_fwd(own, self._there(ref_logits), self._there(row_weight), inplace)
        return loss.cpu(), self._back(logits, own, dlogits, inplace)

    def scale_(self, tensor: Tensor, scale: Tensor) -> None:
        own = self._there(tensor)
        self._backend.scale_(own, self._there(scale))
        self._back(tensor, own, own, True)

    def _there(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        storage = _storage(tensor).to(self._device, copy=True)
        return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _back(self, here: Tensor, own: Tensor, result: Tensor, inplace: bool) -> Tensor:
        """The result on the CPU; after an operation in place, everything around it is copied back as well."""
        if not inplace:
            assert result.untyped_storage().data_ptr() != own.untyped_storage().data_ptr() or not own.numel()
            return result.cpu()
        assert result.data_ptr() == own.data_ptr()
        _storage(here).copy_(_storage(own))
        return here


def _storage(tensor: Tensor) -> Tensor:
    """All elements of a tensor's memory, in a row."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
