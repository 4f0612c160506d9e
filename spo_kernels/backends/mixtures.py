"""The divergences of `reference.RowOptions.mixture` out of a backend's kernels for the KL and for `mixture_kl`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_kernels.reference import RowOptions, is_jsd

if TYPE_CHECKING:
    from types import ModuleType

    from spo_kernels.backends import Backend


def token_stats_fwd(
    backend: Backend | ModuleType,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.token_stats_fwd` for a mixture > 0.

    The reverse KL is the KL with the roles exchanged: one sweep. A row that has a label as well is read once more. A
    JSD takes a second sweep.
    """
    kl_options = options._replace(mixture=0.0)
    if is_jsd(options.mixture):
        logps, _, stats = backend.token_stats_fwd(logits, labels, ref_logits, mask, ignore_index, kl_options)
        kls = backend.mixture_kl(logits, ref_logits, mask, stats, options)
        jsd = options.mixture * kls[0] + (1 - options.mixture) * kls[1]
        return logps, jsd, torch.cat([stats, kls[:1]])
    exchanged = RowOptions(options.vocab_size, options.ref_transform, options.transform)
    logps, kl, stats = backend.token_stats_fwd(ref_logits, None, logits, mask, ignore_index, exchanged)
    ref_stats, policy_stats = stats[:2], stats[2:]
    if labels is not None:
        of_policy = kl_options._replace(ref_transform=None)
        logps, _, of_labels = backend.token_stats_fwd(logits, labels, None, None, ignore_index, of_policy)
        policy_stats = policy_stats if mask is None else torch.where(mask, policy_stats, of_labels)
    return logps, kl, torch.cat([policy_stats, ref_stats])


def kl_loss_fwd(
    backend: Backend | ModuleType,
    logits: Tensor,
    ref_logits: Tensor,
    row_weight: Tensor | None,
    inplace: bool,
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """`reference.kl_loss_fwd` by a forward and a backward."""
    mask = None if row_weight is None else row_weight != 0
    _, kl, stats = backend.token_stats_fwd(logits, None, ref_logits, mask, 0, options)
    weight = torch.ones_like(kl) if row_weight is None else row_weight
    dlogits = backend.token_stats_bwd(
        None, weight, logits, None, ref_logits, mask, kl, stats, 0, inplace, options=options
    )
    return (weight.double() * kl).sum().to(kl.dtype), dlogits
