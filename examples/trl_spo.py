"""SPO with TRL: all weights are trained.

    python examples/trl_spo.py                                       # a tiny model, made here
    python examples/trl_spo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

Needs ``pip install "spo_kernels[trl]"``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import tiny
from datasets import Dataset, load_dataset

from spo_kernels.integrations.trl import SPOConfig, SPOTrainer


def run(description: str | None, peft_config: Any = None) -> SPOTrainer:
    """Train by the options of the command line, and return the trainer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; a tiny one if unset")
    parser.add_argument("--dataset", help="dataset with prompt, chosen and rejected; toy pairs if unset")
    parser.add_argument("--output", help="folder of the run; a temporary one if unset")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    small = options.model is None
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model
        if small:  # TRL loads the reference from the folder of the model
            model = str(Path(temporary) / "tiny")
            for part in tiny.load(None):
                part.save_pretrained(model)
        rows = load_dataset(options.dataset, split="train") if options.dataset else Dataset.from_list(tiny.make_rows())
        args = SPOConfig(
            options.output or f"{temporary}/out",
            alpha=0.1,
            beta=0.03,
            weighting="soft",
            kl_samples=8 if small else 32,
            kl_max_new_tokens=32 if small else 256,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=(1e-3 if peft_config is None else 1e-2) if small else 1e-6,
            max_length=128 if small else 1024,
            max_steps=options.steps,
            logging_steps=1,
            bf16=not small,
            report_to="none",
            save_strategy="no",
        )
        trainer = SPOTrainer(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tiny.make_tokenizer() if small else None,
            peft_config=peft_config,
        )
        trainer.train()
        if options.output:
            trainer.save_model()
    tiny.check_falling([log["loss"] for log in trainer.state.log_history if "loss" in log])
    return trainer


if __name__ == "__main__":
    run(__doc__)
