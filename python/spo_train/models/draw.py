"""Drawing token ids from logits with given random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a block in `draw`; divides most vocabularies.
_DRAW_BLOCK = 128


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row of logits [B, V]: invert the distribution function at uniform [B] in [0, 1).

    The search goes over blocks of tokens first, then within the block that was hit. One running sum in float64 over a
    large vocabulary would be slow, because it is serial.
    """
    probabilities = F.softmax(logits.float(), dim=-1)
    if padding := -probabilities.shape[-1] % _DRAW_BLOCK:
        probabilities = F.pad(probabilities, (0, padding))
    blocks = probabilities.unflatten(-1, (-1, _DRAW_BLOCK))
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    if not torch.isfinite(total).all():
        raise ValueError("logits must be finite or -inf to sample from them, got NaN or inf")
    target = uniform[:, None] * total
    block = _first_beyond(ends, target)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0)
    hit = blocks.gather(1, block[..., None].expand(-1, 1, _DRAW_BLOCK))[:, 0]
    within = _first_beyond(hit.cumsum(-1, dtype=torch.float64), target - before)
    return (block * _DRAW_BLOCK + within)[:, 0]


def _first_beyond(ends: Tensor, target: Tensor) -> Tensor:
    """Return the index [B, 1] of the first of the rising ends [B, n] beyond target [B, 1].

    A target at or beyond the last end counts as just below that end, so trailing tokens without probability are never
    hit.
    """
    last = ends[:, -1:]
    return torch.searchsorted(ends, torch.minimum(target, torch.nextafter(last, torch.zeros_like(last))), right=True)
