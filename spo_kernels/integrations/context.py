"""Sequences split over processes (context parallel): sums over a sequence from the sums over its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _ContextSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        ctx.size = torch.distributed.get_world_size(group)
        total = partial.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


def context_sums(partial: Tensor, group: ProcessGroup) -> Tensor:
    """L_s or K_s of whole sequences, from the sums over the tokens that this process holds.

        logps = context_sums(sequence_logps(logits, labels), group)  # of this process's tokens
        kl = context_sums(token_kl(kl_logits, ref_logits, mask).sum(1), group)
        chosen, rejected = logps.chunk(2)
        loss = spo_loss(chosen, rejected, kl=kl, beta=0.03)[0].mean()

    Every process of the group then has the same sums and the same loss. The gradient is right where the processes'
    gradients are averaged, as DDP and FSDP do over all their processes, those of a group among them: it has the factor
    of the group's size, and no further communication. Where gradients of the group are summed, divide the loss by the
    size of the group.

    Labels are aligned before the sequences are split: the label of a part's last token is the first token of the next
    part. `SPOStep` and `SPOTrainer` need whole sequences in each process; this function is for losses of one's own.

    Args:
        partial: [S] (or any shape), the same sequences in the same order in every process; 0 for a sequence without a
            token here.
        group: the processes that hold the parts of the sequences. All must call, and run the backward.
    """
    return _ContextSums.apply(partial, group)
