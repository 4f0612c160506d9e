"""SPO in a loop of your own with accelerate: gradient accumulation, any number of processes.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --model Qwen/Qwen3-0.6B --pairs pairs.jsonl --steps 500

The first makes a tiny model, and checks that its loss falls. It needs accelerate and transformers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from plain_loop import batch_of, tokenized

from spo_kernels.integrations.core import (
    HFSampler,
    KLBuffer,
    MetricSums,
    Pairs,
    Reference,
    SpecialTokens,
    SPOSettings,
    SPOStep,
    attach_head,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; a tiny one on the CPU if unset")
    parser.add_argument("--pairs", type=Path, help='JSONL of {"prompt", "chosen", "rejected"}; toy pairs if unset')
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    options = parser.parse_args()
    small = options.model is None
    accelerator = Accelerator(cpu=small)
    model, tokenizer = tiny.load(options.model)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    attach_head(model.train())
    attach_head(reference)
    rows = tokenized(tiny.load_rows(options.pairs), tokenizer)
    special = SpecialTokens.of(tokenizer, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if small else 1e-6, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(rows, options.batch_size, shuffle=True, drop_last=True, collate_fn=list)
    sampler = HFSampler(model, tokenizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ranks = accelerator.num_processes
    buffer = KLBuffer(
        [row["prompt"] for row in rows],
        sampler,
        Reference(accelerator.prepare_model(reference, evaluation_mode=True)),
        special,
        samples=16 * ranks,
        max_new_tokens=32 if small else 256,
        max_length=128 if small else 1024,
        rank=accelerator.process_index,
        world_size=ranks,
        device=accelerator.device,
    )
    spo = SPOStep(
        SPOSettings(alpha=0.1, beta=0.03, weighting="soft"),
        buffer,
        process_group=torch.distributed.group.WORLD if ranks > 1 else None,
        device=accelerator.device,
    )

    def batches() -> Iterator[Pairs]:
        while True:
            for batch in loader:
                yield batch_of(batch, special.pad, 128 if small else 1024, accelerator.device)

    pairs_of_all_steps, losses = batches(), []
    for step in range(options.steps):
        window = list(itertools.islice(pairs_of_all_steps, options.accumulate))
        spo.begin(model, window, step)  # draws samples every 8 steps
        loss_of_step = torch.zeros((), device=accelerator.device)
        metrics = None
        for micro, pairs in enumerate(window):
            is_last = micro == len(window) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss, sums = spo(model, pairs)
                accelerator.backward(loss / len(window))
            loss_of_step += loss.detach() / len(window)
            metrics = sums if metrics is None else metrics + sums
        accelerator.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss_of_step, "mean").item())
        means = MetricSums(metrics.names, accelerator.reduce(metrics.values, "sum")).means()
        shown = ", ".join(f"{name} {means[name]:.3f}" for name in ("spo/kl", "rewards/accuracies", "logps/chosen"))
        accelerator.print(f"step {step + 1}: loss {losses[-1]:.3f}, {shown}")
    if small and accelerator.is_main_process:
        tiny.check_falling(losses)


if __name__ == "__main__":
    main()
