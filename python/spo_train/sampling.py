"""Sampling of texts: tokens drawn from a model, decoded, and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spo_train.files import StrPath
from spo_train.judges import Judge
from spo_train.protocol import LanguageModel, Sequences, TextTokenizer


@dataclass(frozen=True)
class Text:
    """One sampled text with the judge's view of it.

    Attributes:
        prompt: index of its prompt.
        text: prompt and response.
        tokens: tokens of the response, its eos included.
        finished: whether it reached its eos.
        features: what the judge returned, "score" among them.
    """

    prompt: int
    text: str
    tokens: int
    finished: bool
    features: Mapping[str, float]

    @property
    def score(self) -> float:
        return self.features["score"]

    def record(self) -> dict[str, Any]:
        """Return the text as an object for a JSON line."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Text:
        """Undo `record`."""
        return cls(**record)


@dataclass(frozen=True)
class Prompts:
    """Prompts of samples.

    Attributes:
        texts: as the model and a judge see them, with the markers of a chat template.
        ids: their token ids, without a bos that the model puts in front.
        given: as they were given.
    """

    texts: list[str]
    ids: list[list[int]]
    given: list[str]

    @classmethod
    def encode(cls, texts: Sequence[str], tokenizer: TextTokenizer, max_length: int) -> Prompts:
        """Tokenize prompts.

        Raises:
            ValueError: there is no prompt, or one leaves no room for a response within `max_length` tokens.
        """
        if len(texts) == 0:
            raise ValueError("prompts must hold at least one prompt (an empty text samples freely), got none")
        ids = tokenizer.encode_prompts(texts)
        prompts = cls([tokenizer.decode_prompt(prompt) for prompt in ids], ids, list(texts))
        most = max_length - 1 - (tokenizer.bos_id is not None)
        for number, (text, prompt) in enumerate(zip(texts, ids, strict=True), start=1):
            if len(prompt) > most:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, which leaves no room for a response within "
                    f"max_length={max_length}: {text!r}"
                )
        return prompts

    @classmethod
    def of_ids(cls, ids: Sequence[Sequence[int]], tokenizer: TextTokenizer) -> Prompts:
        """Return prompts that are token ids already, each once."""
        distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, ids))]
        texts = [tokenizer.decode_prompt(prompt) for prompt in distinct]
        return cls(texts, distinct, texts)

    def first(self, count: int) -> Prompts:
        """Return the first `count` prompts."""
        return Prompts(self.texts[:count], self.ids[:count], self.given[:count])

    def turns(self, count: int) -> list[int]:
        """Return the index of the prompt of each of `count` texts: the prompts take turns."""
        return [i % len(self.texts) for i in range(count)]


def read_prompts(path: StrPath) -> list[str]:
    """Read the lines of a UTF-8 file that are not blank.

    Raises:
        ValueError: the file is not UTF-8, or has no such line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts: one a line is expected")
    return prompts


def sample_texts(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    judge: Judge,
    prompts: Prompts,
    turns: Sequence[int],
    *,
    max_length: int,
    temperature: float,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[tuple[list[Text], Sequences]]:
    """Draw texts from a model, decode them and have them judged; yield one batch at a time.

    Args:
        model: what to sample from.
        tokenizer: of the model.
        judge: sees each whole text, prompt and response.
        prompts: the prompts.
        turns: indices of prompts; each gets one text.
        max_length, temperature, generator: see `LanguageModel.sample`.
        batch_size: texts drawn at a time.
    """
    for first in range(0, len(turns), batch_size):
        chunk = turns[first : first + batch_size]
        drawn = model.sample(
            [prompts.ids[turn] for turn in chunk], max_length=max_length, temperature=temperature, generator=generator
        )
        texts = []
        rows = zip(chunk, drawn.tokens.tolist(), drawn.prompt_lens.tolist(), drawn.lengths.tolist(), strict=True)
        for turn, ids, start, end in rows:
            text = prompts.texts[turn] + tokenizer.decode_response(ids[:start], ids[start:end])
            finished = ids[end - 1] in tokenizer.end_ids
            texts.append(Text(turn, text, end - start, finished, dict(judge(text, finished))))
        yield texts, drawn
