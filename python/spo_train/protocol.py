"""What the package needs of a model: logits from token ids and sampling; for training also parameters and saving.

`spo_train.models.llama.Llama` and `spo_train.models.huggingface.HuggingFaceModel` have these methods. A tokenizer needs
the methods of `TextTokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100

# A message of a chat: "role" and "content", both strings, and whatever else a chat template reads.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, each `(bos +) prompt + response (+ eos)`, right-padded to a common length.

    Attributes:
        tokens: [B, T] int64.
        prompt_lens: [B] int64, tokens before the response, bos included; at least 1.
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
            prompts: token ids of each prompt. A model that puts a bos in front gets prompts without it, and samples
                freely after an empty prompt. Any other model gets prompts of at least one token.
            max_length: the most tokens of a whole sequence (bos, prompt, response and eos); at most `self.max_length`.
            temperature: divides the logits; must be positive.
            generator: source of randomness; the same state and prompts give the same sequences.

        A model may take a further keyword `rows`, a slice: it then draws for these prompts only, with the random
        numbers that they have in a call for all. Processes that share a run need it to share the work of sampling. Of a
        model without `rows`, each process draws for all prompts.
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


class Head(NamedTuple):
    """The last linear layer of a model, from hidden states to logits.

    Attributes:
        weight: [V, H]; rows after the model's `vocab_size` are padding.
        bias: [V] or None.
        softcap, logit_scale: as in the functions of `spo_kernels` that take a head.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


@runtime_checkable
class ModelWithHead(Protocol):
    """A `LanguageModel` that also gives hidden states and its head. The trainer then never stores its logits."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the inputs [B, T, H] of the head for tokens [B, T] int64."""
        ...

    def head(self) -> Head | None:
        """Return the head, or None if hidden states and a head do not give the model's logits."""
        ...


class PairIds(NamedTuple):
    """A tokenized pair.

    Attributes:
        prompt: ids before the responses, without a bos that the model puts in front.
        chosen, rejected: ids of the responses, each with an id that ends it.
        inside_token: whether the prompt's text ends inside a token. The responses then begin with that token.
        read_as: how the texts were read, for messages to the user: "as plain text", "by the chat template".
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    inside_token: bool
    read_as: str


class TextTokenizer(Protocol):
    """What the package needs of a tokenizer.

    Attributes:
        vocab_size: number of ids.
        bos_id: id that the model puts in front of every sequence; None if prompts hold all that stands before a
            response.
        eos_id: id that ends a response.
        end_ids: ids after which a response is finished, `eos_id` among them.
        pad_id: id that fills rows of a batch.
    """

    vocab_size: int
    eos_id: int
    end_ids: frozenset[int]
    pad_id: int

    @property
    def bos_id(self) -> int | None: ...

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts, as `LanguageModel.sample` takes them.

        Raises:
            ValueError: a prompt has no tokens where it needs some.
        """
        ...

    def encode_pair(self, prompt: str | Sequence[Message], chosen: str | Message, rejected: str | Message) -> PairIds:
        """Tokenize a pair: two strings that follow a string, or two assistant messages that follow messages.

        Raises:
            RowError: this pair cannot be tokenized.
            ValueError: no pair of this kind can be.
        """
        ...

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt, with the markers of a chat template, without bos."""
        ...

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Return the text of a response that stands after a prompt, without special tokens."""
        ...

    def save_in(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder of a model."""
        ...

    def pieces(self) -> Mapping[str, int]:
        """Return every token with its id."""
        ...

    def check_fits(self, model: LanguageModel, model_name: str = "the model") -> None:
        """Raise ValueError unless the model has one logit per id."""
        ...
