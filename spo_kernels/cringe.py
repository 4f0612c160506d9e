"""The Cringe loss, which reads rows of logits: each token of a rejected response against a likely alternative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.checks import IGNORE_INDEX, check_logits, check_number, check_rows
from spo_kernels.distributed import takes_dtensors
from spo_kernels.functional import token_logps
from spo_kernels.losses import REDUCTIONS
from spo_kernels.precision import upcast

__all__ = ["cringe_loss"]


@takes_dtensors()
def cringe_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    k: int = 1,
    weight: float = 1.0,
    gate: Tensor | None = None,
    alternatives: Tensor | None = None,
    generator: torch.Generator | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """The Cringe loss of pairs (Adolphs et al. 2022, arXiv:2211.05826), with a gate for its pairwise form.

        gate (CE + weight Cr),    CE = mean over the tokens of the chosen response of -log pi(token),
                                  Cr = mean over the tokens of the rejected response of -log sigmoid(z_alt - z_token)

    z are logits. The alternative is drawn from the softmax over the k most likely tokens other than the label. The
    gradient of Cr by a row has two entries that are not 0. With k = 1 nothing is drawn.

    ParlAI's code has the losses of tokens, not of pairs, and k = 1 by default. For a pairwise form, let
    ``gate=torch.sigmoid((b - margin) / tau)`` with margin = L_w - L_l [P]. No official code of pairwise Cringe (Xu et
    al. 2023, arXiv:2312.16682) is known. Whether a gradient flows through the gate is up to the caller.

    Args:
        logits: [2P, T, V], chosen responses first, as they enter the softmax.
        labels: [2P, T] int64, aligned with logits; ``ignore_index`` marks rows that are not read.
        k: number of alternatives, >= 1 and < V.
        weight: alpha of the paper, >= 0.
        gate: [P] floating point, the factor of each pair; None: 1.
        alternatives: [P, T] int64, the alternative of each row of the rejected responses, in the place of a draw.
            Entries of rows that are not read must be legal, and have no effect.
        generator: of the draw; None: torch's own for the device.
        reduction: "mean" over pairs or "sum", [], or "none".

    Returns:
        losses [P], or [] with a reduction; float32 (float64 for float64 logits). A response without tokens adds 0.

    Raises:
        ValueError: a Tensor of another shape, dtype or device; an option out of its range; k, generator and
            alternatives together.
    """
    check_logits(logits, "logits")
    if logits.dim() != 3 or len(logits) % 2:
        raise ValueError(f"logits must be [2P, T, V], P chosen and then P rejected responses, got {list(logits.shape)}")
    check_rows(labels, "labels", torch.int64, logits)
    check_number("weight", weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    pairs = len(logits) // 2
    rejected, label = logits[pairs:], labels[pairs:]
    if alternatives is not None:
        check_rows(alternatives, "alternatives", torch.int64, rejected)
        if k != 1 or generator is not None:
            raise ValueError("k and generator must be left out with alternatives: they would have no effect")
    elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < logits.shape[-1]:
        raise ValueError(f"k must be an integer >= 1 and < V = {logits.shape[-1]}, got {k!r}")
    else:
        alternatives = _alternatives(rejected.detach(), label, k, generator)
    if gate is not None and (gate.shape != (pairs,) or not gate.is_floating_point() or gate.device != logits.device):
        raise ValueError(
            f"gate must be floating [P] = [{pairs}] on {logits.device}, got {list(gate.shape)} {gate.dtype} on "
            f"{gate.device}"
        )

    read = label != ignore_index
    both = upcast(rejected.gather(-1, torch.stack((torch.where(read, label, 0), alternatives), -1)))
    contrast = -F.logsigmoid(torch.where(read, both[..., 1] - both[..., 0], 0))
    counts = (labels != ignore_index).sum(1).clamp(min=1)
    losses = -token_logps(logits[:pairs], labels[:pairs], ignore_index=ignore_index).sum(1) / counts[:pairs]
    losses = losses + weight * torch.where(read, contrast, 0).sum(1) / counts[pairs:]
    if gate is not None:
        losses = gate.to(losses.dtype) * losses
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(pairs, 1)


def _alternatives(logits: Tensor, labels: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """One of the k most likely tokens other than the label, [P, T] int64."""
    values, tokens = logits.topk(k + 1, -1)
    is_label = tokens == labels[..., None]
    last = torch.arange(k + 1, device=tokens.device) == k
    left_out = torch.where(is_label.any(-1, keepdim=True), is_label, last)
    scores = torch.where(left_out, -torch.inf, upcast(values))
    if k > 1:  # the largest of scores with Gumbel noise is a draw from their softmax
        scores = scores - torch.empty_like(scores).exponential_(generator=generator).log()
    return tokens.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
