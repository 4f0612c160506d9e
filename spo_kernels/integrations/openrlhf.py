"""SPO in OpenRLHF: a loss for its `DPOTrainer`. Importing this does not import openrlhf.

OpenRLHF builds its loss from its own options. This script trains with SPO and takes the options of
`openrlhf.cli.train_dpo`:

    import runpy
    import openrlhf.trainer.dpo_trainer as dpo_trainer
    from spo_kernels.integrations.openrlhf import SPOLoss

    dpo_trainer.DPOLoss = lambda beta, label_smoothing, ipo: SPOLoss(alpha=0.1)
    runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")

`--model.beta` and `--model.label_smoothing` then have no effect. OpenRLHF runs the reference on every pair; SPO uses it
for the rewards only.
"""

from __future__ import annotations

from torch import Tensor

from spo_kernels.integrations.pair_loss import PairLoss

__all__ = ["SPOLoss"]


class SPOLoss(PairLoss):
    """`PairLoss` in the form of `openrlhf.models.DPOLoss`: the loss is the mean over pairs."""

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss [], and the rewards of chosen and rejected responses, each [P] and detached.

        Args:
            policy_chosen_logps: summed log-probs [P], nats.
            policy_rejected_logps: [P], same dtype and device.
            reference_chosen_logps: [P] or None; enters the rewards only.
            reference_rejected_logps: [P] or None; given together with the above.
        """
        references = (reference_chosen_logps, reference_rejected_logps)
        return self.pair_losses(policy_chosen_logps, policy_rejected_logps, *references, reduction="mean")
