"""SPO in Lightning: a LightningModule around a Hugging Face model.

    python examples/lightning_spo.py
    python examples/lightning_spo.py --model Qwen/Qwen3-0.6B --pairs pairs.jsonl --steps 500

The first makes a tiny model, and checks that its loss falls. It needs lightning and transformers. One process; with
`accumulate_grad_batches` every micro-batch takes all samples of a draw, which gives the same gradient and costs more.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from word_pairs import Row, arguments, check_that_it_fell, load

from spo_kernels.integrations.core import (
    HFSampler,
    KLBuffer,
    Pairs,
    Reference,
    SpecialTokens,
    SPOSettings,
    SPOStep,
    attach_head,
)


class SPOModule(lightning.LightningModule):
    """A policy that SPO trains. `parts`: policy, reference, tokenizer and rows, as `word_pairs.load` returns them."""

    def __init__(self, parts: tuple[Any, Any, Any, list[Row]], learning_rate: float, max_new_tokens: int) -> None:
        super().__init__()
        self.model, reference, self.tokenizer, rows = parts
        self.reference = [reference]  # in a list, so that it is no part of this module and its checkpoints
        self.prompts = [row["prompt_ids"] for row in rows]
        self.learning_rate, self.max_new_tokens = learning_rate, max_new_tokens
        self.losses: list[float] = []
        self.restored: dict[str, Any] | None = None
        attach_head(self.model)
        attach_head(reference)

    def on_fit_start(self) -> None:
        special = SpecialTokens.of(self.tokenizer, self.model)
        buffer = KLBuffer(
            self.prompts,
            HFSampler(self.model, self.tokenizer),
            Reference(self.reference[0].to(self.device)),
            special,
            samples=16,
            every=8,
            max_new_tokens=self.max_new_tokens,
            device=self.device,
        )
        self.pad = special.pad
        self.spo = SPOStep(SPOSettings(alpha=0.1, beta=0.03), buffer, device=self.device)
        if self.restored is not None:
            self.spo.load_state_dict(self.restored)

    def training_step(self, batch: list[Row], index: int) -> Tensor:
        columns = ([row[name] for row in batch] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        pairs = Pairs.from_lists(*columns, pad=self.pad, device=self.device)
        self.spo.begin(self.model, [pairs], self.global_step)  # draws samples every 8 steps
        loss, metrics = self.spo(self.model, pairs)
        self.losses.append(loss.item())
        means = metrics.means()
        print(
            f"step {self.global_step + 1}: loss {loss.item():.3f}, KL {means['spo/kl']:.3f} nats, "
            f"accuracy {means['rewards/accuracies']:.2f}"
        )
        self.log_dict(means, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), self.learning_rate, weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spo"] = self.spo.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint["spo"]


def main() -> None:
    options = arguments("SPO in Lightning")
    parts = load(options)
    module = SPOModule(parts, options.learning_rate, max_new_tokens=12 if options.model is None else 256)
    loader = torch.utils.data.DataLoader(parts[3], options.batch_size, shuffle=True, drop_last=True, collate_fn=list)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=10.0,
        accelerator="cpu" if options.model is None else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=options.model is not None,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    if options.model is None:
        check_that_it_fell(module.losses)


if __name__ == "__main__":
    main()
