"""Preference objectives by name. A method works on log-probabilities and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from spo_kernels import preference_loss, spo_loss
from spo_train.config import AlignConfig


@dataclass(frozen=True)
class Method:
    """A preference objective.

    Attributes:
        loss: takes `(config, importance, policy_chosen, policy_rejected, reference_chosen, reference_rejected)`, the
            last four log-probabilities [P], and returns losses [P]. The reference's are None unless `needs_reference`.
        needs_reference: the loss takes the reference's log-probabilities of the pairs.
        samples_kl: `beta` times the KL on sequences drawn from the policy is added.
    """

    loss: Callable[[AlignConfig, nn.Module | None, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    needs_reference: bool
    samples_kl: bool


def _spo(
    config: AlignConfig,
    importance: nn.Module | None,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
) -> Tensor:
    losses, _, _ = spo_loss(chosen, rejected, ref_chosen, ref_rejected, alpha=config.alpha, weight=importance)
    return losses


def _dpo(
    config: AlignConfig,
    _importance: nn.Module | None,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
) -> Tensor:
    losses, _, _ = preference_loss("dpo", chosen, rejected, ref_chosen, ref_rejected, beta=config.effective_beta)
    return losses


METHODS = {
    "spo": Method(_spo, needs_reference=False, samples_kl=True),
    "dpo": Method(_dpo, needs_reference=True, samples_kl=False),
}
