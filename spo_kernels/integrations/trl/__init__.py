"""SPO for TRL: `SPOTrainer` and `SPOConfig` take the places of ``DPOTrainer`` and ``DPOConfig``.

Needs TRL: ``pip install "spo_kernels[trl]"``.
"""

try:
    import peft as _peft  # noqa: F401
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'spo_kernels.integrations.trl needs TRL and PEFT ({error}): pip install "spo_kernels[trl]"'
    ) from error

from spo_kernels.integrations.trl.config import SPOConfig
from spo_kernels.integrations.trl.sampler import TRLVLLMSampler
from spo_kernels.integrations.trl.trainer import SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer", "TRLVLLMSampler"]
