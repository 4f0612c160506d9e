"""Preference objectives by name. A method works on log-probabilities and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from spo_kernels import preference_loss, spo_loss
from spo_train.config import AlignConfig


class PairLogps(NamedTuple):
    """Log-probabilities of P chosen and P rejected responses, each [P]; the reference's only where they are needed."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None


@dataclass(frozen=True)
class Method:
    """A preference objective.

    Attributes:
        loss: takes settings, the importance of pairs (None for uniform weights) and log-probabilities; returns losses
            [P].
        needs_reference: the loss takes the reference's log-probabilities of the pairs.
        samples_kl: `beta` times the KL on sequences drawn from the policy is added.
    """

    loss: Callable[[AlignConfig, nn.Module | None, PairLogps], Tensor]
    needs_reference: bool
    samples_kl: bool


def _spo(config: AlignConfig, importance: nn.Module | None, logps: PairLogps) -> Tensor:
    return spo_loss(*logps, alpha=config.alpha, weight=importance)[0]


def _dpo(config: AlignConfig, _importance: nn.Module | None, logps: PairLogps) -> Tensor:
    return preference_loss("dpo", *logps, beta=config.effective_beta)[0]


METHODS = {
    "spo": Method(_spo, needs_reference=False, samples_kl=True),
    "dpo": Method(_dpo, needs_reference=True, samples_kl=False),
}
