"""SPO with TRL and LoRA: the reference is the model with the adapter off, so no second model is in memory.

    python examples/trl_spo_lora.py                                       # a tiny model, made here
    python examples/trl_spo_lora.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

Needs ``pip install "spo_kernels[trl]"``.
"""

from __future__ import annotations

from peft import LoraConfig
from trl_spo import run

if __name__ == "__main__":
    run(__doc__, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
