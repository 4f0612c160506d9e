"""SPO in Lightning: a LightningModule around a Hugging Face model.

    python examples/lightning_spo.py
    python examples/lightning_spo.py --model Qwen/Qwen3-0.6B --pairs pairs.jsonl --steps 500

The first makes a tiny model, and checks that its loss falls. It needs lightning and transformers. One process; with
`accumulate_grad_batches` every micro-batch takes all samples of a draw, which gives the same gradient and costs more.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
from plain_loop import batch_of, tokenized
from torch import Tensor

from spo_kernels.integrations.core import (
    HFSampler,
    KLBuffer,
    Reference,
    SpecialTokens,
    SPOSettings,
    SPOStep,
    attach_head,
)


class SPOModule(lightning.LightningModule):
    """A policy that SPO trains.

    Args:
        model, tokenizer: the policy; its copy is the reference.
        rows: as `plain_loop.tokenized` gives them; their prompts are sampled from.
        learning_rate: of AdamW.
        max_new_tokens, max_length: of a sampled response; of a sequence.
    """

    def __init__(
        self, model: Any, tokenizer: Any, rows: list[Any], *, learning_rate: float, max_new_tokens: int, max_length: int
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model.train(), tokenizer
        # In a list, so that it is no part of this module and its checkpoints.
        self.reference = [copy.deepcopy(model).eval().requires_grad_(False)]
        self.prompts = [row["prompt"] for row in rows]
        self.learning_rate, self.max_new_tokens, self.max_length = learning_rate, max_new_tokens, max_length
        self.losses: list[float] = []
        self.restored: dict[str, Any] | None = None
        attach_head(self.model)
        attach_head(self.reference[0])

    def on_fit_start(self) -> None:
        self.special = SpecialTokens.of(self.tokenizer, self.model)
        buffer = KLBuffer(
            self.prompts,
            HFSampler(self.model, self.tokenizer),
            Reference(self.reference[0].to(self.device)),
            self.special,
            samples=16,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            device=self.device,
        )
        self.spo = SPOStep(SPOSettings(alpha=0.1, beta=0.03), buffer, device=self.device)
        if self.restored is not None:
            self.spo.load_state_dict(self.restored)

    def training_step(self, batch: list[Any], index: int) -> Tensor:
        pairs = batch_of(batch, self.special.pad, self.max_length, self.device)
        self.spo.begin(self.model, [pairs], self.global_step)  # draws samples every 8 steps
        loss, metrics = self.spo(self.model, pairs)
        self.losses.append(loss.item())
        means = metrics.means()
        self.log_dict(means, batch_size=len(batch))
        shown = ", ".join(f"{name} {means[name]:.3f}" for name in ("spo/kl", "rewards/accuracies", "logps/chosen"))
        print(f"step {self.global_step + 1}: loss {self.losses[-1]:.3f}, {shown}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spo"] = self.spo.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint["spo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; a tiny one on the CPU if unset")
    parser.add_argument("--pairs", type=Path, help='JSONL of {"prompt", "chosen", "rejected"}; toy pairs if unset')
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--resume", help="a checkpoint of Lightning to go on from")
    options = parser.parse_args()
    small = options.model is None
    model, tokenizer = tiny.load(options.model)
    rows = tokenized(tiny.load_rows(options.pairs), tokenizer)
    module = SPOModule(
        model,
        tokenizer,
        rows,
        learning_rate=3e-3 if small else 1e-6,
        max_new_tokens=32 if small else 256,
        max_length=128 if small else 1024,
    )
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=10.0,
        accelerator="cpu" if small else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=not small,
        enable_progress_bar=False,
    )
    loader = torch.utils.data.DataLoader(rows, options.batch_size, shuffle=True, drop_last=True, collate_fn=list)
    trainer.fit(module, loader, ckpt_path=options.resume)
    if small:
        tiny.check_falling(module.losses)


if __name__ == "__main__":
    main()
