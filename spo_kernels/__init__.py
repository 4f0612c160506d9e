"""Fused kernels for preference alignment: per-sequence log-probs, the SPO loss, exact token KL. See README.md."""

from spo_kernels import backends
from spo_kernels.cringe import cringe_loss
from spo_kernels.distributed import GatheredHead, gather_head
from spo_kernels.functional import (
    get_batch_logps,
    kl_loss,
    sequence_logps,
    token_kl,
    token_logps,
    token_logps_kl,
)
from spo_kernels.huggingface import head_options
from spo_kernels.linear import linear_kl_loss, linear_sequence_logps, linear_token_kl, linear_token_logps
from spo_kernels.losses import PowerImportance, SoftImportance, preference_loss, reward_model_loss, spo_loss
from spo_kernels.modules import LinearSPOLoss, SPOLoss
from spo_kernels.ranking import spo_ranking_loss

__all__ = [
    "GatheredHead",
    "LinearSPOLoss",
    "PowerImportance",
    "SPOLoss",
    "SoftImportance",
    "backends",
    "cringe_loss",
    "gather_head",
    "get_batch_logps",
    "head_options",
    "kl_loss",
    "linear_kl_loss",
    "linear_sequence_logps",
    "linear_token_kl",
    "linear_token_logps",
    "preference_loss",
    "reward_model_loss",
    "sequence_logps",
    "spo_loss",
    "spo_ranking_loss",
    "token_kl",
    "token_logps",
    "token_logps_kl",
]

__version__ = "0.1.0"
