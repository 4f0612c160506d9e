"""The functions from hidden states and the head's weight: `spo_kernels.functional` without the logits."""

from spo_kernels.linear.functional import (
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)

__all__ = ["linear_kl_loss", "linear_sequence_logps", "linear_token_kl", "linear_token_logps"]
