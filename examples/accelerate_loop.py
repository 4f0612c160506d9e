"""SPO in a loop of your own with accelerate: gradient accumulation, any number of processes.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --model Qwen/Qwen3-0.6B --pairs pairs.jsonl --steps 500

The first makes a tiny model, and checks that its loss falls. It needs accelerate and transformers.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
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

MICRO_BATCHES = 2  # of an optimizer step


def main() -> None:
    options = arguments("SPO in a loop with accelerate")
    accelerator = Accelerator(cpu=options.model is None)
    model, reference, tokenizer, rows = load(options)
    attach_head(model)
    attach_head(reference)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0)
    micro_batch = max(options.batch_size // MICRO_BATCHES, 1)
    loader = torch.utils.data.DataLoader(rows, micro_batch, shuffle=True, drop_last=True, collate_fn=list)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    special = SpecialTokens.of(tokenizer, accelerator.unwrap_model(model))
    buffer = KLBuffer(
        [row["prompt_ids"] for row in rows],
        HFSampler(accelerator.unwrap_model(model), tokenizer),
        Reference(accelerator.prepare_model(reference, evaluation_mode=True)),
        special,
        samples=16 * accelerator.num_processes,
        every=8,
        max_new_tokens=12 if options.model is None else 256,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    settings = SPOSettings(alpha=0.1, beta=0.03, weighting="soft")
    spo = SPOStep(settings, buffer, process_group=group, device=accelerator.device)

    def pairs_of(batch: list[Row]) -> Pairs:
        columns = ([row[name] for row in batch] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return Pairs.from_lists(*columns, pad=special.pad, device=accelerator.device)

    def windows():
        """The micro-batches of each optimizer step, epoch after epoch."""
        window = []
        while True:
            for batch in loader:
                window.append(pairs_of(batch))
                if len(window) == MICRO_BATCHES:
                    yield window
                    window = []

    losses = []
    model.train()
    for step, window in zip(range(options.steps), windows(), strict=False):
        spo.begin(model, window, step)  # draws samples every 8 steps
        sums = None
        for i, pairs in enumerate(window):
            last = i == len(window) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, metrics = spo(model, pairs)
                accelerator.backward(loss / len(window))
            sums = metrics if sums is None else sums + metrics
        accelerator.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        sums.values = accelerator.reduce(sums.values, "sum")
        means = sums.means()
        losses.append(means["spo/loss"] + settings.beta * means["spo/kl"])
        accelerator.print(
            f"step {step + 1}: loss {losses[-1]:.3f}, KL {means['spo/kl']:.3f} nats, "
            f"accuracy {means['rewards/accuracies']:.2f}"
        )
    if options.model is None and accelerator.is_main_process:
        check_that_it_fell(losses)


if __name__ == "__main__":
    main()
