"""SPO in a training loop of one's own, without a trainer.

    python examples/plain_loop.py                                       # a tiny model, made here
    python examples/plain_loop.py --model Qwen/Qwen2.5-0.5B-Instruct    # a real one

`train` is the whole loop; `SPOTrainer` does the same steps, to rounding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import tiny
import torch

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


def tokenized(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Pairs as token ids: prompt, and both responses with an eos."""

    def ids(row: dict[str, str], side: str) -> list[int]:
        whole = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
        return whole[len(tokenizer(row["prompt"])["input_ids"]) :]

    return [
        {"prompt": tokenizer(row["prompt"])["input_ids"], **{side: ids(row, side) for side in ("chosen", "rejected")}}
        for row in rows
    ]


def batch_of(rows: Sequence[dict[str, list[int]]], pad: int, max_length: int, device: torch.device) -> Pairs:
    columns = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    return Pairs.from_lists(*columns, pad=pad, max_length=max_length, device=device)


def train(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    windows: Iterable[Sequence[Pairs]],
    settings: SPOSettings,
    *,
    learning_rate: float = 1e-6,
    max_grad_norm: float = 1.0,
    kl_samples: int = 32,
    kl_every: int = 8,
    kl_max_new_tokens: int = 256,
    max_length: int = 1024,
    seed: int = 42,
) -> list[float]:
    """Train the policy, and return the loss of each step.

    Args:
        policy: a Hugging Face causal language model; trained in place. The reference is a copy of it.
        tokenizer: of the policy.
        prompts: token ids of prompts to sample from.
        windows: for each optimizer step its micro-batches, on the device of the policy.
        settings: of SPO.
        learning_rate, max_grad_norm: of AdamW, without weight decay; the norm to which gradients are clipped.
        kl_samples, kl_every, kl_max_new_tokens, max_length, seed: see `KLBuffer`.
    """
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    attach_head(policy)
    attach_head(reference)
    buffer = None
    if settings.beta:
        buffer = KLBuffer(
            prompts,
            HFSampler(policy, tokenizer),
            Reference(reference),
            SpecialTokens.of(tokenizer, policy),
            samples=kl_samples,
            every=kl_every,
            max_new_tokens=kl_max_new_tokens,
            max_length=max_length,
            seed=seed,
            device=policy.device,
        )
    spo = SPOStep(settings, buffer, device=policy.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    losses = []
    policy.train()
    for step, window in enumerate(windows):
        spo.begin(policy, window, step)
        total, metrics = 0.0, None
        for pairs in window:
            loss, sums = spo(policy, pairs)
            (loss / len(window)).backward()
            total += loss.item() / len(window)
            metrics = sums if metrics is None else metrics + sums
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step % 10 == 0 and metrics is not None:
            shown = {name: round(value, 4) for name, value in metrics.means().items()}
            print(f"step {step}: loss {total:.4f}, {shown}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; a tiny one if unset")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, of the tiny model 1e-3")
    parser.add_argument("--beta", type=float, default=0.03, help="weight of the KL (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options = parser.parse_args()
    policy, tokenizer = tiny.load(options.model)
    policy.to(options.device)
    special = SpecialTokens.of(tokenizer)
    rows = tokenized(tiny.make_rows(), tokenizer)
    order = torch.Generator().manual_seed(0)

    def windows() -> Iterable[list[Pairs]]:
        for _ in range(options.steps):
            chosen = torch.randperm(len(rows), generator=order)[: options.accumulate * options.batch_size].tolist()
            batches = (chosen[i :: options.accumulate] for i in range(options.accumulate))
            yield [batch_of([rows[i] for i in batch], special.pad, 128, policy.device) for batch in batches]

    losses = train(
        policy,
        tokenizer,
        [row["prompt"] for row in rows],
        windows(),
        SPOSettings(beta=options.beta, weighting="soft"),
        learning_rate=options.learning_rate or (1e-3 if options.model is None else 1e-6),
        kl_samples=8,
        kl_max_new_tokens=32,
        max_length=128,
    )
    tiny.check_falling(losses)


if __name__ == "__main__":
    main()
