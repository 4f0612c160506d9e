"""What the package needs of a model: logits from token ids and sampling; for training also parameters and saving.

`spo_train.models.llama.Llama` has these methods. A Hugging Face model needs an adapter of a few lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

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
        """Return targets for `model(tokens[:, :-1])`: [B, T-1] int64, `IGNORE_INDEX` on the prompt and on padding."""
        position = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        is_response = (position >= self.prompt_lens[:, None]) & (position < self.lengths[:, None])
        return self.tokens[:, 1:].masked_fill(~is_response, IGNORE_INDEX)

    def to(self, device: torch.device) -> Sequences:
        return Sequences(self.tokens.to(device), self.prompt_lens.to(device), self.lengths.to(device))


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model that can be evaluated; in practice also a `torch.nn.Module`.

    Attributes:
        vocab_size: V, the width of the logits.
        max_length: the most tokens a sequence may have, bos and eos included.
    """

    vocab_size: int
    max_length: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the token that follows each position of tokens [B, T] int64."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Sequences:
        """Draw one continuation per prompt, without gradients and in eval mode; restore the training flag.

        Args:
            prompts: token ids of each prompt, without bos (the model puts it in front); an empty prompt samples freely.
            max_length: the most tokens of a whole sequence (bos + prompt + response + eos); at most `self.max_length`.
            temperature: divides the logits; must be positive.
            generator: source of randomness; the same state and prompts give the same sequences.
        """
        ...


class TrainableModel(LanguageModel, Protocol):
    """A `LanguageModel` that is a `torch.nn.Module` and can save itself."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...

    def save(self, folder: Path) -> None:
        """Write the model to a folder."""
        ...
