"""A sentencepiece BPE tokenizer whose `decode` undoes `encode` exactly.

The tokenizer normalises nothing and puts no space in front. So the ids of a prompt followed by the ids of a response
decode to the prompt's text followed by the response's text. Characters that the training text lacked become their UTF-8
bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import sentencepiece

from spo_train.chat import prompt_as_lines, reply_as_line
from spo_train.files import TOKENIZER_FILE, StrPath, write_atomically
from spo_train.protocol import LanguageModel, Message, PairIds

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        name: where the tokenizer came from, for messages.
        vocab_size: number of ids.
        bos_id, eos_id: ids around a sequence; `encode` adds neither.
        end_ids: ids after which a response is finished: the eos id.
        pad_id: id that fills rows of a batch; the eos id if the sentencepiece model has no padding id.
    """

    def __init__(self, model_proto: bytes, name: str = "tokenizer") -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model_proto)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a sentencepiece model: {error}") from error
        self._model_proto = model_proto
        self.name = name
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.vocab_size == 0:
            raise ValueError(f"{name} is empty")
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name} must have bos and eos ids, got bos={self.bos_id}, eos={self.eos_id}")
        self.end_ids = frozenset({self.eos_id})
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        character_coverage: float = 1.0,
    ) -> Tokenizer:
        """Train BPE on texts, which may span several lines.

        Args:
            texts: training text; the result depends on nothing else.
            vocab_size: wanted number of ids, at least 260 (4 special ids, 256 bytes) plus the distinct characters.
                Fewer come out if the text has too few different words.
            character_coverage: share of the characters given an id of their own; the rarest use their bytes.

        Raises:
            ValueError: `vocab_size` too small for the characters of the text, or no text.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in texts for line in text.splitlines() if line),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=character_coverage,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                unk_id=UNK_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                num_threads=2,  # saved with the model, so another number would change the file
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"cannot train a tokenizer with vocab_size={vocab_size} on this text: {error}") from error
        return cls(model.getvalue(), "the trained tokenizer")

    @classmethod
    def load(cls, path: StrPath) -> Tokenizer:
        """Read a sentencepiece `.model` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a sentencepiece model, or lacks bos or eos.
        """
        return cls(Path(path).read_bytes(), str(path))

    def save(self, path: StrPath) -> None:
        """Write the sentencepiece `.model` file atomically."""
        write_atomically(Path(path), self._model_proto)

    def save_in(self, folder: StrPath) -> None:
        """Write `tokenizer.model` into the folder of a model, atomically."""
        self.save(Path(folder) / TOKENIZER_FILE)

    @overload
    def encode(self, text: str) -> list[int]: ...
    @overload
    def encode(self, text: list[str]) -> list[list[int]]: ...
    def encode(self, text: str | list[str]) -> list[int] | list[list[int]]:
        """Return the ids of one text, or of each of several, without bos and eos."""
        return self._processor.encode(text)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts, without bos."""
        return self.encode(list(texts))

    def encode_pair(self, prompt: str | Sequence[Message], chosen: str | Message, rejected: str | Message) -> PairIds:
        """Tokenize a pair; messages become lines `role: content`. See `TextTokenizer.encode_pair`."""
        read_as = "as plain text" if isinstance(prompt, str) else "as lines `role: content`"
        start = prompt if isinstance(prompt, str) else prompt_as_lines(prompt)
        replies = (reply if isinstance(reply, str) else reply_as_line(reply) for reply in (chosen, rejected))
        before, *after = self.encode([start, *replies])
        ended = [[*ids, self.eos_id] for ids in after]
        return PairIds(before, ended[0], ended[1], inside_token=False, read_as=read_as)

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt."""
        return self.decode(ids)

    def decode_response(self, _prompt: Sequence[int], response: Sequence[int]) -> str:
        """Return the text of a response."""
        return self.decode(response)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids; bos, eos and pad give no text, bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode(list(ids))

    def pieces(self) -> dict[str, int]:
        """Return every token with its id."""
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def check_fits(self, model: LanguageModel, model_name: str = "the model") -> None:
        """Raise ValueError unless the model has one logit per id and the same special ids (if it states any)."""
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.name} has {self.vocab_size} ids and does not fit {model_name}, "
                f"whose vocab_size is {model.vocab_size}"
            )
        for key in ("bos_id", "eos_id"):
            ours, theirs = getattr(self, key), getattr(model, key, None)
            if theirs is not None and theirs != ours:
                raise ValueError(f"{self.name} has {key}={ours} and does not fit {model_name}, which has {theirs}")
