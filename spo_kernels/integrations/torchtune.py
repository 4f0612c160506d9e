"""SPO in torchtune 0.6.1: a loss for its DPO recipes. Importing this does not import torchtune.

In the recipe's configuration, in place of torchtune's own loss:

    loss:
      _component_: spo_kernels.integrations.torchtune.SPOLoss
      alpha: 0.1

The recipes run the reference on every pair; SPO uses it for the rewards only.
"""

from __future__ import annotations

from torch import Tensor

from spo_kernels.integrations.pair_loss import PairLoss

__all__ = ["SPOLoss"]


class SPOLoss(PairLoss):
    """`PairLoss` in the form of `torchtune.rlhf.loss.DPOLoss`: the recipe takes the mean of the losses."""

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses, and the rewards of chosen and rejected responses, each [P]; the rewards are detached.

        Args:
            policy_chosen_logps: summed log-probs [P], nats.
            policy_rejected_logps: [P], same dtype and device.
            reference_chosen_logps: [P] or None; enters the rewards only.
            reference_rejected_logps: [P] or None; given together with the above.
        """
        return self.pair_losses(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        )
