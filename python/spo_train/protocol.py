"""What the training loop needs of a model: logits from token ids, and sampling.

Anything with these two abilities can be aligned and evaluated. `spo_train.models.llama.Llama` has them
directly; a Hugging Face model gets them from an adapter of a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, each `bos + prompt + response (+ eos)`, right-padded to a common length.

    Attributes:
        tokens: [B, T] int64.
        prompt_lens: [B] int64, tokens before the response, bos included.
        lengths: [B] int64, tokens of prompt and response together, the response's eos included if it was reached.
    """

    tokens: Tensor
    prompt_lens: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def labels(self) -> Tensor:
        """Targets for `model(tokens[:, :-1])`: [B, T-1] int64, `IGNORE_INDEX` on the prompt and on padding."""
        position = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        is_response = (position >= self.prompt_lens[:, None]) & (position < self.lengths[:, None])
        return self.tokens[:, 1:].masked_fill(~is_response, IGNORE_INDEX)


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model, in practice also a `torch.nn.Module`.

    Attributes:
        vocab_size: V, the width of the logits.
        max_length: the most tokens a sequence may have, bos and eos included.
    """

    vocab_size: int
    max_length: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each position of tokens [B, T] int64."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Sequences:
        """Draws one continuation per prompt, without gradients and in eval mode; the training flag is restored.

        Args:
            prompts: token ids of each prompt, without bos (which the model puts in front); empty lists sample freely.
            max_length: the most tokens of a whole sequence (bos + prompt + response + eos); at most `self.max_length`.
            temperature: divides the logits; must be positive.
            generator: source of randomness; the same state and prompts give the same samples.
        """
        ...
