"""SPO's preference loss as a module that trainers call with four log-probabilities, the base of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import SoftImportance, spo_loss

__all__ = ["PairLoss"]


class PairLoss(nn.Module):
    """SPO's preference loss (eq. 8 to 12) with its options fixed at construction.

    A loss of this form sees no samples of the policy, so it has no KL: this is SPO without its regularizer.

    Args:
        alpha: softness, >= 0; see `spo_kernels.spo_loss`.
        weight: importance of pairs: None for uniform weights, a number gamma for `SoftImportance(gamma)`, or a
            `SoftImportance` (or any callable from two [P] to [P]). Its state goes to the device of the log-probs. A
            call without gradients leaves a running average alone. Trainers do not save the state of a loss, so after a
            resume a running average starts anew.
        center: leave out the constant log(2)/alpha, so that the loss is 0 where the policy has no preference.

    Raises:
        ValueError: alpha or gamma negative or not finite.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        weight: float | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        center: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.importance = weight if weight is None or callable(weight) else SoftImportance(weight)
        self.center = center
        empty = Tensor()
        spo_loss(empty, empty, alpha=alpha)  # refuses a wrong alpha here, not in the first step

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, center={self.center}"

    def pair_losses(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, chosen_rewards, rejected_rewards) of `spo_kernels.spo_loss`, which takes the options."""
        self.to(policy_chosen_logps.device)
        self.train(torch.is_grad_enabled())  # an evaluation does not move a running average
        return spo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            alpha=self.alpha,
            weight=self.importance,
            center=self.center,
            **options,
        )
