"""Sampling by vLLM, through TRL's ``VLLMGeneration``. Written to its signature in TRL 1.16, and never run with vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spo_kernels.integrations.sampling import SpecialTokens

# vLLM adds this to the logits of ids that must not be sampled.
_NEVER = -100.0


class TRLVLLMSampler:
    """`Sampler` by vLLM: the policy's weights go to vLLM once a draw, then all prompts are answered.

    vLLM has random states of its own: the seed of a draw does not reach it. A draw is part of a checkpoint, so a
    resumed run continues with its samples. Later draws differ from those of a run that was not interrupted.

    Args:
        model: the policy.
        accelerator: of the trainer.
        tokenizer: of the policy.
        max_new_tokens: tokens of a response at most.
        vocab_size: rows of the head; ids from the length of the tokenizer on are not sampled.
        options: further keyword arguments of ``VLLMGeneration``: mode, server_base_url and so on.
        generation: the class; None: ``trl.generation.VLLMGeneration``.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        vocab_size: int,
        options: dict[str, Any],
        generation: Callable[..., Any] | None = None,
    ) -> None:
        if generation is None:
            import trl.generation

            generation = getattr(trl.generation, "VLLMGeneration", None)
        if generation is None:
            raise ImportError('sampler="vllm" needs vLLM, which is not installed: pip install "trl[vllm]"')
        extra = range(len(tokenizer), vocab_size)
        self._eos = SpecialTokens.of(tokenizer, model).eos
        self._max_new_tokens = max_new_tokens
        self._generation = generation(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            repetition_penalty=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_completion_length=max_new_tokens,
            logprobs=0,
            generation_kwargs={"logit_bias": dict.fromkeys(extra, _NEVER)} if extra else {},
            **options,
        )

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """See `Sampler`; a draw of all ranks together. The seed is not used."""
        if max_new_tokens != self._max_new_tokens:
            raise ValueError(f"max_new_tokens must be {self._max_new_tokens} as at construction, got {max_new_tokens}")
        engine = self._generation
        if (engine.temperature, engine.top_p, engine.top_k, engine.min_p, engine.repetition_penalty) != (1, 1, 0, 0, 1):
            raise ValueError("samples must come from the policy itself (temperature 1, no top-k, no top-p)")
        with torch.random.fork_rng():
            engine.sync_weights()
            _, responses, *_ = engine.generate(prompts=prompts, images=None, num_generations=1)
        return [self._cut(list(response)) for response in responses]

    def _cut(self, response: list[int]) -> list[int]:
        """The response without what follows its first eos."""
        ends = [place for place, token in enumerate(response) if token in self._eos]
        return response[: ends[0] + 1] if ends else response
