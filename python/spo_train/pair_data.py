"""Preference pairs: reading JSONL, tokenizing, and batches. Seed and step alone decide the order of the pairs."""

from __future__ import annotations

import json
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from spo_train.files import StrPath
from spo_train.metrics import progress_bar
from spo_train.protocol import Sequences
from spo_train.tokenizer import Tokenizer

FIELDS = ("prompt", "chosen", "rejected")


class DataError(ValueError):
    """A data file holds nothing usable."""


@dataclass
class LoadReport:
    """What was read from a file of pairs, and what was left out.

    Attributes:
        path: the file.
        used: pairs that can be trained on.
        problems: `(line number, reason)` of every line left out, in the file's order.
        truncated: responses cut to the model's length (they then have no eos).
    """

    path: Path
    used: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0

    def summary(self, most: int = 5) -> str:
        """Return a line of counts, then the first `most` lines left out, one a line."""
        lines = [f"{self.path}: {self.used} pairs, lines left out: {len(self.problems)}"]
        if self.truncated:
            lines[0] += f", responses truncated: {self.truncated}"
        lines += [f"  line {number}: {reason}" for number, reason in self.problems[:most]]
        if len(self.problems) > most:
            rest = Counter(reason.split(":")[0] for _, reason in self.problems[most:])
            lines.append("  and " + ", ".join(f"{count} x {reason}" for reason, count in rest.most_common()))
        return "\n".join(lines)


class PairDataset:
    """Tokenized preference pairs, packed in one array.

    Attributes:
        fingerprint: CRC of all token ids. A resumed run compares it to check that the data is still the same.
    """

    def __init__(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]], *, bos_id: int, pad_id: int
    ) -> None:
        """
        Args:
            pairs: `(prompt, chosen, rejected)` ids each, prompts without bos, responses with their eos.
            bos_id: put in front of every sequence.
            pad_id: fills the rows of a batch.

        Raises:
            DataError: there are no pairs.
        """
        # Packed as they come: lists of Python integers would take ten times the memory.
        ids, starts = array("i"), array("q", [0])
        for pair in pairs:
            for part in pair:
                ids.extend(part)
                starts.append(len(ids))
        if len(starts) == 1:
            raise DataError("there are no pairs")
        self._ids, self._starts = np.frombuffer(ids, dtype=np.int32), np.frombuffer(starts, dtype=np.int64)
        self._bos_id, self._pad_id = bos_id, pad_id
        self.fingerprint = zlib.crc32(self._ids.data, zlib.crc32(self._starts.data))

    def __len__(self) -> int:
        return (len(self._starts) - 1) // 3

    def prompts(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Return the prompt ids, without bos, of the given pairs."""
        return [self._part(3 * i).tolist() for i in indices]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Sequences:
        """Return P pairs as 2P sequences: the chosen ones in rows `[0:P]`, the rejected ones in `[P:2P]`."""
        prompts = [self._part(3 * i) for i in indices] * 2
        responses = [self._part(3 * i + k) for k in (1, 2) for i in indices]
        prompt_lens = np.array([1 + len(prompt) for prompt in prompts])
        lengths = prompt_lens + [len(response) for response in responses]
        tokens = np.full((len(prompts), lengths.max()), self._pad_id, dtype=np.int64)
        tokens[:, 0] = self._bos_id
        for row, prompt, response in zip(tokens, prompts, responses, strict=True):
            middle = 1 + len(prompt)
            row[1:middle] = prompt
            row[middle : middle + len(response)] = response
        return Sequences(torch.from_numpy(tokens), torch.from_numpy(prompt_lens), torch.from_numpy(lengths))

    def _part(self, i: int) -> np.ndarray:
        return self._ids[self._starts[i] : self._starts[i + 1]]


class BatchOrder:
    """Endless shuffled epochs, cut into batches of `batch_size`. The step gives the position; there is no other state.

    Each epoch is a fresh permutation of all indices. A batch may span two epochs, so every index is used equally often.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be positive, got {size} and {batch_size}")
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> np.ndarray:
        """Return the indices [batch_size] int64 of the batch at `step`, counted from 0."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, places = np.divmod(positions, self._size)
        needed = range(epochs[0], epochs[-1] + 1)
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in needed}
        return np.array([self._epochs[e][place] for e, place in zip(epochs, places, strict=True)])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._size)


def read_pairs(path: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield `(line number, pair)` for every line of a JSONL file that is not blank, lazily.

    The pair is a dict of `prompt`, `chosen` and `rejected`. For a bad line it is a string with the reason. Other fields
    are ignored.
    """
    with (
        open(path, "rb") as file,
        progress_bar(total=path.stat().st_size, desc="reading pairs", unit="B", unit_scale=True) as bar,
    ):
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if line.strip():
                yield number, _parse(line)


def load_pairs(
    path: StrPath, tokenizer: Tokenizer, *, max_length: int, too_long: Literal["truncate", "drop"] = "truncate"
) -> tuple[PairDataset, LoadReport]:
    """Read and tokenize a JSONL file of preference pairs.

    Every sequence becomes `bos + prompt + response + eos`. Unusable lines are left out and listed in the report: not
    UTF-8, not JSON, a field missing or not a string, chosen and rejected the same, too long.

    Args:
        path: one JSON object a line, with string fields `prompt` (may be empty), `chosen` and `rejected`.
        tokenizer: turns the texts into ids.
        max_length: tokens a sequence may have, bos and eos included.
        too_long: "truncate" cuts a response that does not fit, which then ends without eos; "drop" leaves out the pair.
            A pair whose prompt leaves no room for a response is always left out.

    Raises:
        OSError: the file cannot be read.
        DataError: no line is usable.
    """
    path = Path(path)
    report = LoadReport(path)

    def usable() -> Iterator[tuple[list[int], list[int], list[int]]]:
        for number, pair in read_pairs(path):
            if isinstance(pair, str):
                report.problems.append((number, pair))
                continue
            prompt, chosen, rejected = (tokenizer.encode(pair[name]) for name in FIELDS)
            chosen, rejected = [*chosen, tokenizer.eos_id], [*rejected, tokenizer.eos_id]
            room = max_length - 1 - len(prompt)
            longest = max(len(chosen), len(rejected))
            if room < 1:
                problem = f"prompt too long: {len(prompt)} tokens, at most {max_length - 2} fit"
            elif longest > room and too_long == "drop":
                problem = f"response too long: {longest} tokens with eos, {room} fit after the prompt"
            elif chosen[:room] == rejected[:room]:
                problem = "chosen and rejected are the same" + (": as far as they fit" if chosen != rejected else "")
            else:
                report.used += 1
                report.truncated += (len(chosen) > room) + (len(rejected) > room)
                yield prompt, chosen[:room], rejected[:room]
                continue
            report.problems.append((number, problem))

    try:
        return PairDataset(usable(), bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id), report
    except DataError:
        reasons = report.summary() if report.problems else f"{path}: the file is empty"
        raise DataError(f"no usable pairs; {reasons}") from None


def _parse(line: bytes) -> dict[str, str] | str:
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {error.object[error.start]:#04x} at column {error.start + 1}"
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(record, dict):
        return f"not an object: {type(record).__name__}"
    for name in FIELDS:
        if name not in record:
            return f'no field "{name}"'
        if not isinstance(record[name], str):
            return f'field "{name}" must be a string: got {type(record[name]).__name__}'
        # JSON can escape half of a surrogate pair. That is no character and has no UTF-8 form.
        if not record[name].isascii() and any("\ud800" <= c <= "\udfff" for c in record[name]):
            return f'field "{name}" has a lone surrogate'
    return {name: record[name] for name in FIELDS}
