"""One batch in one process and in several: tiny models, pairs and settings, and FSDP2 by accelerate on CPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import make_model, make_rows, make_tokenizer
from torch import Tensor, nn

from spo_kernels.integrations.core import (
    KLBuffer,
    Pairs,
    Reference,
    SpecialTokens,
    SPOSettings,
    SPOStep,
)

TOKENIZER = make_tokenizer()
SPECIAL = SpecialTokens.of(TOKENIZER)
ROWS = make_rows(16)
PROMPTS = [TOKENIZER(row["prompt"])["input_ids"] for row in ROWS]


class SamplerByPrompt:
    """Responses that follow from the prompt alone, so that they do not depend on the number of processes."""

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        responses = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(i * token for i, token in enumerate(prompt, 1)))
            length = int(torch.randint(1, max_new_tokens + 1, (), generator=generator))
            responses.append(torch.randint(4, 60, (length,), generator=generator).tolist())
        return responses


def pairs_of(rows: Sequence[int]) -> Pairs:
    chosen, rejected = (
        [TOKENIZER(ROWS[i][side])["input_ids"] + [SPECIAL.eos[0]] for i in rows] for side in ("chosen", "rejected")
    )
    return Pairs.from_lists([PROMPTS[i] for i in rows], chosen, rejected, pad=SPECIAL.pad)


def perturb(model: nn.Module) -> None:
    """Move a policy away from its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def models(architecture: str) -> tuple[Any, Any]:
    policy, reference = make_model(architecture), make_model(architecture).requires_grad_(False)
    perturb(policy)
    return policy, reference


def step_of(
    reference: nn.Module, settings: dict[str, Any], *, group: Any = None, rank: int = 0, world: int = 1
) -> SPOStep:
    buffer = KLBuffer(
        PROMPTS,
        SamplerByPrompt(),
        Reference(reference),
        SPECIAL,
        samples=8,
        every=1,
        max_new_tokens=8,
        rank=rank,
        world_size=world,
    )
    return SPOStep(SPOSettings(**({"beta": 0.05} | settings)), buffer, process_group=group)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's whole value, anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad).double().clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative, of the parameter with the largest distance."""
    assert ours.keys() == truth.keys()
    return max(float((ours[n] - truth[n]).norm() / truth[n].norm().clamp(min=1e-12)) for n in truth)


def steps_by_sgd(
    model: Any, step: SPOStep, windows: Sequence[Sequence[Pairs]], *, deferred: bool = False
) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradient of each optimizer step by SGD. deferred: FSDP reduces gradients once a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    results = []
    model.train()
    for number, window in enumerate(windows):
        step.begin(model, window, number)
        total = 0.0
        for micro, pairs in enumerate(window):
            if deferred:
                model.set_requires_gradient_sync(micro == len(window) - 1)
            loss, _ = step(model, pairs)
            (loss / len(window)).backward()
            total += loss.item() / len(window)
        assert math.isfinite(total)
        results.append((total, gradients(model)))
        optimizer.step()
        optimizer.zero_grad()
    return results


def use_pool_in_accelerate(rank: int, world: int) -> None:
    """Tell accelerate of a process group that exists, as a launcher would, and let it forget what it did before."""
    from accelerate.state import AcceleratorState

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"})
    AcceleratorState._reset_state(reset_partial_state=True)
