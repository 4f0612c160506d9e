"""SPO in NeMo-RL: a loss function for its DPO loop. Importing this does not import nemo_rl.

In a copy of NeMo-RL's `examples/run_dpo.py`, between `setup(...)` and `dpo_train(...)`:

    from spo_kernels.integrations.nemo_rl import SPOLossFn

    loss_fn = SPOLossFn(alpha=0.1)

The fields of `dpo:` about the loss then have no effect. NeMo-RL runs the reference on every pair; SPO uses it for the
rewards only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spo_kernels.integrations.pair_loss import PairLoss

__all__ = ["SPOLossFn"]


class SPOLossFn(PairLoss):
    """`PairLoss` as a `nemo_rl.algorithms.loss.interfaces.LossFunction` over interleaved pairs.

    Row 2i of a batch is the chosen and row 2i + 1 the rejected response of pair i. A pair whose `sample_mask` is 0 is
    not read.

    Args:
        alpha, weight, center: see `PairLoss`.
        average_log_probs: take the mean of token log-probs in place of their sum.
        nll_weight: weight of the negative log-prob of chosen responses, >= 0, summed over tokens (their mean with
            `average_log_probs`).
        use_fused_linear_logprobs: the setting of the same name in NeMo-RL's `megatron_cfg` (`use_linear_ce_fusion` up
            to 0.7): the model returns log-probs in place of logits.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        weight: float | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        center: bool = True,
        average_log_probs: bool = False,
        nll_weight: float = 0.0,
        use_fused_linear_logprobs: bool = False,
    ) -> None:
        super().__init__(alpha, weight, center=center)
        if not 0 <= nll_weight < math.inf:
            raise ValueError(f"nll_weight must be >= 0 and finite, got {nll_weight}")
        self.average_log_probs = average_log_probs
        self.nll_weight = nll_weight
        self.use_fused_linear_logprobs = self.use_linear_ce_fusion = use_fused_linear_logprobs

    @property
    def loss_type(self) -> Any:
        """`LossType.SEQUENCE_LEVEL`."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """`LossInputType.LOGPROB`."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    def forward(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a micro-batch's valid pairs, and its metrics, as NeMo-RL's `DPOLossFn` names them.

        Args:
            next_token_logprobs: [2P, T - 1], log-prob of token t + 1 at position t, nats.
            data: `token_mask` [2P, T], 1 at response tokens; `sample_mask` [2P], 1 for a valid response; optionally
                `reference_policy_logprobs` [2P, T], whose position t belongs to token t + 1; it enters the rewards.
            global_valid_seqs: valid responses of the whole batch over all ranks, []. The loss and the metrics are sums
                over pairs, divided by half of this.
            global_valid_toks: not used.

        Returns:
            The loss [], and a dict of floats. Its two rewards are means over pairs, `num_valid_samples` counts pairs.

        Raises:
            ValueError: an odd number of rows, or shapes that do not belong together.
        """
        rows, length = next_token_logprobs.shape
        token_mask, sample_mask = data["token_mask"], data["sample_mask"]
        if rows % 2:
            raise ValueError(f"next_token_logprobs must hold interleaved pairs, got {rows} rows")
        if token_mask.shape != (rows, length + 1):
            raise ValueError(f"token_mask must be [{rows}, {length + 1}], got {list(token_mask.shape)}")
        mask = token_mask[:, 1:].bool()

        def response_logps(token_logps: Tensor) -> Tensor:
            sums = torch.where(mask, token_logps, 0).sum(-1)
            return sums / mask.sum(-1).clamp(min=1) if self.average_log_probs else sums

        logps = response_logps(next_token_logprobs)
        references: tuple[Tensor, ...] = ()
        if "reference_policy_logprobs" in data:
            reference_logps = response_logps(data["reference_policy_logprobs"][:, :-1])
            references = (reference_logps[::2], reference_logps[1::2])
        valid = sample_mask[::2].bool()
        losses, chosen_rewards, rejected_rewards = self.pair_losses(
            logps[::2], logps[1::2], *references, pair_mask=valid
        )
        # A batch without a valid pair has the loss 0.
        pairs = (global_valid_seqs / 2).clamp(min=1e-8)

        def mean(values: Tensor) -> Tensor:
            return torch.where(valid, values, 0).sum() / pairs

        preference, nll = losses.sum() / pairs, mean(-logps[::2])
        loss = preference + self.nll_weight * nll if self.nll_weight else preference
        metrics = {
            "loss": loss,
            "sft_loss": nll,
            "preference_loss": preference,
            "accuracy": mean((logps[::2] > logps[1::2]).to(losses.dtype)),
            "rewards_chosen_mean": chosen_rewards.sum() / pairs,
            "rewards_rejected_mean": rejected_rewards.sum() / pairs,
            "num_valid_samples": valid.sum(),
        }
        numbers = torch.stack([metric.detach().to(loss.dtype) for metric in metrics.values()]).tolist()
        return loss, dict(zip(metrics, numbers, strict=True))
