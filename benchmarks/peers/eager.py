"""The formulas in eager PyTorch, once for everyone: peers, `torch.compile`, and in float64 the truth of losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """``[..., V], [...] -> [...]``."""
    return F.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


def token_logps_lse(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)


def kl_terms(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The summand of the KL for each token of the vocabulary, ``[..., V]``."""
    logps, ref_logps = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return logps.exp() * (logps - ref_logps)


def token_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """``[..., V], [..., V] -> [...]``."""
    return kl_terms(logits, ref_logits).sum(-1)


def token_logps_kl(logits: Tensor, labels: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    logps, ref_logps = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return logps.gather(-1, labels[..., None]).squeeze(-1), (logps.exp() * (logps - ref_logps)).sum(-1)


def kl_loss(logits: Tensor, ref_logits: Tensor, row_weight: Tensor) -> Tensor:
    return (token_kl(logits, ref_logits) * row_weight).sum()


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, as trainers cast them; others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
