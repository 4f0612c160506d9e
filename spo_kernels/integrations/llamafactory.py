"""SPO in LLaMA-Factory: `patch()` makes `stage: dpo` train with SPO. Importing this does not import llamafactory.

This script takes the YAML file that `llamafactory-cli train` takes, and runs under torchrun:

    from spo_kernels.integrations import llamafactory
    from llamafactory.train.tuner import run_exp

    llamafactory.patch(alpha=0.1)
    run_exp()

| field of the YAML file | with SPO |
| --- | --- |
| `pref_loss: sigmoid` | sums of token log-probs |
| `pref_loss: simpo` | means of token log-probs; LLaMA-Factory then loads no reference model |
| `pref_loss`, any other | refused |
| `pref_ftx`, `ld_alpha` | as with DPO |
| `pref_beta`, `simpo_gamma` | no effect |
| `pref_bco_weight`, `dpo_label_smoothing` | refused unless 0 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spo_kernels import sequence_logps
from spo_kernels.integrations.pair_loss import PairLoss

__all__ = ["SPOMixin", "patch"]


class SPOMixin:
    """What `patch` puts before `llamafactory.train.dpo.trainer.CustomDPOTrainer`."""

    spo_loss: PairLoss
    log_reference_rewards: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.loss_type not in ("sigmoid", "simpo"):
            raise ValueError(
                "pref_loss must be sigmoid (sums of log-probs) or simpo (their means, no reference model) with SPO, "
                f"got {trainer.loss_type}"
            )
        for field, value in (
            ("pref_bco_weight", trainer.bco_gemma),
            ("dpo_label_smoothing", trainer.label_smoothing),
        ):
            if value > 1e-6:  # below this, LLaMA-Factory takes a field for 0
                raise ValueError(f"{field} must be 0 with SPO, which has no such term, got {value}")

    def compute_preference_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None,
        reference_rejected_logps: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, chosen_rewards, rejected_rewards), each [P], as `spo_kernels.spo_loss` returns them."""
        return self.spo_loss.pair_losses(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        )

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Tensor]) -> tuple[Any, Any]:
        """The reference's log-probs of chosen and rejected responses, each [P], or None for both."""
        if not self.log_reference_rewards:
            return None, None
        trainer: Any = super()
        return trainer.compute_reference_log_probs(model, batch)


def patch(
    alpha: float = 0.1,
    weight: float | Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    center: bool = True,
    log_reference_rewards: bool = False,
) -> None:
    """Make LLaMA-Factory's DPO trainer, in this process, use SPO's loss and this library's log-probs.

    LLaMA-Factory's loss sees no samples of the policy, so this is SPO without its KL. Call it before training starts.
    A second call replaces the first.

    Args:
        alpha, weight, center: see `spo_kernels.integrations.pair_loss.PairLoss`. With means of log-probs, alpha
            multiplies a difference per token, which is smaller by the length of a response.
        log_reference_rewards: run the reference on the pairs, as DPO does. The logged rewards are then
            alpha * (log pi - log pi_ref). Without it they are alpha * log pi, and no step runs the reference.

    Raises:
        ImportError: llamafactory, or a package that its trainer imports, is not installed.
        ValueError: alpha or weight is out of its range. The trainer raises it for a field of the YAML file that SPO
            cannot follow.
    """
    try:
        from llamafactory.train import trainer_utils
        from llamafactory.train.dpo import trainer as dpo_trainer
        from llamafactory.train.dpo import workflow
    except ImportError as error:
        raise ImportError(f"patch needs LLaMA-Factory: pip install llamafactory ({error})") from error

    def get_batch_logps(logits: Tensor, labels: Tensor, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
        """Summed log-probs [2P], and counts of response tokens [2P]."""
        if ld_alpha is not None:  # weights tokens within a response
            return trainer_utils.get_batch_logps(logits=logits, labels=labels, ld_alpha=ld_alpha)
        following = labels[:, 1:]
        return sequence_logps(logits[:, :-1], following), (following != -100).sum(-1)

    unpatched = next(base for base in dpo_trainer.CustomDPOTrainer.__mro__ if not issubclass(base, SPOMixin))
    options = {"spo_loss": PairLoss(alpha, weight, center=center), "log_reference_rewards": log_reference_rewards}
    patched = type(unpatched.__name__, (SPOMixin, unpatched), options)
    for module in (dpo_trainer, workflow):  # the workflow has taken the trainer's name up to 0.9.3
        if hasattr(module, "CustomDPOTrainer"):
            module.CustomDPOTrainer = patched
    dpo_trainer.get_batch_logps = get_batch_logps
