"""Plain text: reading files, tokenizing, and batches of sequences of similar length."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from spo_train.files import StrPath
from spo_train.metrics import progress_bar
from spo_train.protocol import Sequences
from spo_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents of plain text.

    Attributes:
        documents: the texts.
        skipped: the files that could not be used, each with the reason.
    """

    documents: list[str]
    skipped: list[str] = field(default_factory=list)


def read_corpus(paths: Sequence[StrPath], *, per_line: bool = False) -> Corpus:
    """Read UTF-8 text files, and the `.txt` files of folders and their subfolders in the order of their names.

    Args:
        paths: files and folders.
        per_line: whether each line is a document, instead of each file.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: none of the files holds usable text.
    """
    documents: list[str] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                skipped.append(f"{file}: not UTF-8 at byte {error.start}")
                continue
            except OSError as error:
                skipped.append(f"{file}: {error.strerror}")
                continue
            found = [part.strip() for part in (text.splitlines() if per_line else [text])]
            found = [part for part in found if part]
            if not found:
                skipped.append(f"{file}: empty")
            documents += found
    if not documents:
        where = ", ".join(map(str, paths))
        reasons = "; ".join(skipped) if skipped else "no .txt files"
        raise ValueError(f"no usable text in {where} ({reasons})")
    return Corpus(documents, skipped)


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of at least 2 and at most `max_length` tokens, as windows of one flat array.

    Attributes:
        flat: [tokens] int32, all documents one after the other, each `bos ids eos`.
        starts, lengths: [S] int64, the window of each sequence in `flat`.
    """

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def encode(
        cls,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        max_length: int,
        *,
        progress: bool = False,
        chunk: int = 1000,
    ) -> TokenSequences:
        """Tokenize documents, `chunk` at a time, and cut those of more than `max_length` tokens into windows."""
        if len(documents) == 0:
            raise ValueError("documents must hold at least one text, got none")
        parts, starts, lengths, offset = [], [], [], 0
        with progress_bar(total=len(documents), desc="tokenize", unit="doc", shown=progress) as bar:
            for first in range(0, len(documents), chunk):
                encoded = tokenizer.encode(list(documents[first : first + chunk]))
                for ids in encoded:
                    parts.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.int32))
                    # Windows overlap by one token, so that every token but bos is a target exactly once.
                    for start in range(0, len(parts[-1]) - 1, max_length - 1):
                        starts.append(offset + start)
                        lengths.append(min(max_length, len(parts[-1]) - start))
                    offset += len(parts[-1])
                bar.update(len(encoded))
        return cls(np.concatenate(parts), np.array(starts), np.array(lengths))

    def split(self, held_out: int, seed: int) -> tuple[TokenSequences, TokenSequences]:
        """Return the sequences to train on, and `held_out` random ones (at most a tenth) kept from training."""
        count = min(held_out, len(self) // 10)
        if count == 0:
            raise ValueError(f"too little text: it makes {len(self)} sequences, and at least 10 are needed")
        order = np.random.default_rng((seed, 0)).permutation(len(self))
        kept, held = np.sort(order[count:]), np.sort(order[:count])
        return (
            TokenSequences(self.flat, self.starts[kept], self.lengths[kept]),
            TokenSequences(self.flat, self.starts[held], self.lengths[held]),
        )

    def by_length(self, seed: int, jitter: float = 6.0) -> np.ndarray:
        """Return an order in which neighbours have similar lengths, so that batches need little padding.

        The jitter, in tokens, mixes sequences of similar length. Without it, those of equal length would stand in the
        order of the text.
        """
        noise = np.random.default_rng((seed, 1)).normal(0.0, jitter, len(self))
        return np.argsort(self.lengths + noise, kind="stable")

    def batch(self, indices: np.ndarray, pad_id: int, device: str | torch.device) -> Sequences:
        """Return the given sequences, padded to the longest; the prompt of each is its first token."""
        lengths = self.lengths[indices]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        tokens = np.where(inside, self.flat[np.where(inside, self.starts[indices, None] + columns, 0)], pad_id)
        return Sequences(
            torch.from_numpy(tokens.astype(np.int64)).to(device),
            torch.ones(len(indices), dtype=torch.int64, device=device),
            torch.from_numpy(lengths.astype(np.int64)).to(device),
        )

    def fingerprint(self) -> str:
        """Return the number of sequences and the CRC of their tokens."""
        crc = zlib.crc32(self.starts.tobytes(), zlib.crc32(self.flat.tobytes()))
        return f"{len(self)} sequences, crc {crc:08x}"
