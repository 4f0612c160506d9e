"""What `SPOTrainer` and a loop with accelerate compute on a tiny model, in one process or in each of several.

`accelerate launch ... trainer_runs.py FOLDER` takes the model in ``FOLDER/model``, and writes what its processes
compute to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sharded
import torch
from accelerate import Accelerator
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from spo_kernels.integrations.core import attach_head
from spo_kernels.integrations.trl import SPOConfig, SPOTrainer

PAIRS = 8  # of an optimizer step, over all processes
SETTINGS = {"weighting": "soft", "nll_weight": 0.3, "beta": 0.05}
LAUNCHED: dict[str, dict[str, Any]] = {"step": {}, "ema": {"importance_normalizer": "ema"}}
LOOP_SETTINGS = SETTINGS | {"normalizer": "step"}


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.gradients.append({_plain(n): g for n, g in sharded.gradients(model).items()})


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def train(
    model: Path, out: Path, *, lora: bool = False, resume: Path | None = None, **settings: Any
) -> tuple[SPOTrainer, dict[str, Any]]:
    """Two optimizer steps of two micro-steps. Returns gradients, metrics and weights."""
    disable_progress_bars()
    world = Accelerator().num_processes
    policy = AutoModelForCausalLM.from_pretrained(model)
    config = None
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    else:
        sharded.perturb(policy)
    given = SETTINGS | {
        "output_dir": str(out),
        "per_device_train_batch_size": PAIRS // 2 // world,
        "per_device_eval_batch_size": PAIRS // world,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "kl_samples": 8,
        "kl_max_new_tokens": 8,
        "kl_every": 1,
        "max_length": 64,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    kept = KeepGradients()
    trainer = SPOTrainer(
        policy,
        args=SPOConfig(**(given | settings)),
        train_dataset=Dataset.from_list(sharded.ROWS),
        processing_class=sharded.TOKENIZER,
        sampler=sharded.SamplerByPrompt(),
        callbacks=[kept],
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    result = {
        "gradients": kept.gradients,
        "metrics": [_comparable(log) for log in trainer.state.log_history if "spo/loss" in log],
        "weights": {_plain(n): sharded.whole(p).detach().clone() for n, p in trainer.model.named_parameters()},
    }
    return trainer, result


def evaluated(trainer: SPOTrainer) -> dict[str, float]:
    """Metrics of an evaluation. FSDP may leave parameters whole after it."""
    return _comparable(trainer.evaluate(eval_dataset=trainer.train_dataset.select(range(PAIRS))))


def _comparable(log: dict[str, float]) -> dict[str, float]:
    """Metrics that do not depend on the clock."""
    return {name: value for name, value in log.items() if "/" in name and "draw_seconds" not in name}


def loop() -> dict[str, Any]:
    """Two steps of a loop with accelerate: `accelerator.prepare` wraps the policy in DDP."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    rank, world = accelerator.process_index, accelerator.num_processes
    policy, reference = sharded.models("llama")
    for model in (policy, reference):
        attach_head(model)
    group = torch.distributed.group.WORLD if world > 1 else None
    step = sharded.step_of(reference, LOOP_SETTINGS, group=group, rank=rank, world=world)
    wrapped, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.01))
    wrapped.train()
    result: dict[str, Any] = {"gradients": [], "metrics": []}
    for number in range(2):
        rows = range(8 * number, 8 * number + 8)
        # Rank 0 has three pairs of the first four, rank 1 one of them.
        window = [rows[:4], rows[4:]]
        if world > 1:
            window = [rows[0:3] if rank == 0 else rows[3:4], rows[4 + rank :: world]]
        pairs = [sharded.pairs_of(micro) for micro in window]
        step.begin(wrapped, pairs, number)
        sums = None
        for micro in pairs:
            with accelerator.accumulate(wrapped):
                loss, metrics = step(wrapped, micro)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    result["gradients"].append(sharded.gradients(policy))
                optimizer.step()
                optimizer.zero_grad()
            sums = metrics if sums is None else sums + metrics
        sums.values = accelerator.reduce(sums.values)
        result["metrics"].append(_comparable(sums.means()))
    result["weights"] = {n: p.detach().clone() for n, p in policy.named_parameters()}
    return result


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank = Accelerator().process_index
    results = {"loop": loop()}
    for name, settings in LAUNCHED.items():
        trainer, results[name] = train(folder / "model", folder / name, **settings)
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        results[name]["metrics"].append(evaluated(trainer))
    torch.save(results, folder / f"{rank}.pt")
