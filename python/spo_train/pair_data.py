"""Preference pairs: tokenizing, and batches. Seed and step alone decide the order of the pairs."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from spo_train.errors import DataError, RowError
from spo_train.files import StrPath
from spo_train.pair_files import STRINGS, Pair, open_pairs
from spo_train.protocol import Sequences, TextTokenizer


@dataclass
class LoadReport:
    """What was read from a file of pairs, and what was left out.

    Attributes:
        source: the file.
        format: its format.
        unit: what numbers count, "line" or "row".
        used: pairs that can be trained on.
        problems: `(number, reason)` of every line or row left out, in the file's order.
        truncated: responses cut to the model's length (they then have no eos).
        inside_token: prompts that end inside a token. The response then begins with that token.
        kinds: how many pairs of each kind, with the way in which the tokenizer reads it.
    """

    source: str
    format: str = "JSON lines"
    unit: str = "line"
    used: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0
    inside_token: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def summary(self, most: int = 5) -> str:
        """Return a line of counts, then the first `most` lines or rows left out, one a line."""
        counts = [f"{self.used} pairs", f"{self.unit}s left out: {len(self.problems)}"]
        if self.truncated:
            counts.append(f"responses truncated: {self.truncated}")
        if self.inside_token:
            counts.append(f"prompts that end inside a token: {self.inside_token}")
        kinds = "; ".join(f"{count} of {kind}" for kind, count in self.kinds.items())
        lines = [f"{self.source} ({self.format}): {', '.join(counts)}" + (f"; {kinds}" if kinds else "")]
        lines += [f"  {self.unit} {number}: {reason}" for number, reason in self.problems[:most]]
        if len(self.problems) > most:
            rest = Counter(reason.split(":")[0] for _, reason in self.problems[most:])
            lines.append("  and " + ", ".join(f"{count} x {reason}" for reason, count in rest.most_common()))
        return "\n".join(lines)


class NoPairsError(DataError):
    """There are no pairs."""


class PairDataset:
    """Tokenized preference pairs, packed in one array.

    Attributes:
        fingerprint: CRC of all token ids. A resumed run compares it to check that the data is still the same.
    """

    def __init__(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]], *, bos_id: int | None, pad_id: int
    ) -> None:
        """
        Args:
            pairs: `(prompt, chosen, rejected)` ids each, prompts without bos, responses with their eos.
            bos_id: put in front of every sequence, unless it is None.
            pad_id: fills the rows of a batch.

        Raises:
            NoPairsError: there are no pairs.
        """
        # Packed as they come: lists of Python integers would take ten times the memory.
        ids, starts = array("i"), array("q", [0])
        for pair in pairs:
            for part in pair:
                ids.extend(part)
                starts.append(len(ids))
        if len(starts) == 1:
            raise NoPairsError("there are no pairs")
        self._ids, self._starts = np.frombuffer(ids, dtype=np.int32), np.frombuffer(starts, dtype=np.int64)
        self._start, self._pad_id = [] if bos_id is None else [bos_id], pad_id
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
        before = len(self._start)
        prompt_lens = np.array([before + len(prompt) for prompt in prompts])
        lengths = prompt_lens + [len(response) for response in responses]
        tokens = np.full((len(prompts), lengths.max()), self._pad_id, dtype=np.int64)
        tokens[:, :before] = self._start
        for row, prompt, response in zip(tokens, prompts, responses, strict=True):
            middle = before + len(prompt)
            row[before:middle] = prompt
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


def load_pairs(
    source: StrPath,
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    too_long: Literal["truncate", "drop"] = "truncate",
    split: str = "train",
) -> tuple[PairDataset, LoadReport]:
    """Read and tokenize a file of preference pairs.

    Every sequence becomes `bos + prompt + response + eos`, as the tokenizer has them. Unusable lines or rows are left
    out and listed in the report: not UTF-8, not JSON, no pair or one of two possible readings, refused by the
    tokenizer's chat template, chosen and rejected the same, too long.

    Args:
        source, split: see `open_pairs`; docs/data.md has the formats.
        tokenizer: turns the texts into ids.
        max_length: tokens a sequence may have, bos and eos included.
        too_long: "truncate" cuts a response that does not fit, which then ends without eos; "drop" leaves out the pair.
            A pair whose prompt leaves no room for a response is always left out.

    Raises:
        OSError: the file cannot be read.
        DataError: no line is usable, the file as a whole cannot be read, or its prompts are in the responses too.
        MissingPackageError: the format needs a package that is not installed.
        ValueError: the tokenizer cannot read this kind of pairs.
    """
    report = LoadReport(str(source))
    longest_sequence = max_length - (tokenizer.bos_id is not None)
    # Pairs of strings with a prompt, and those whose responses both begin with it.
    prompted = repeated = 0

    def usable(rows: Iterable[tuple[int, Pair | str]]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        nonlocal prompted, repeated
        for number, pair in rows:
            if isinstance(pair, str):
                report.problems.append((number, pair))
                continue
            if pair.kind == STRINGS and pair.prompt:
                prompted += 1
                repeated += pair.repeats_prompt()
            try:
                ids = tokenizer.encode_pair(pair.prompt, pair.chosen, pair.rejected)
            except RowError as error:
                report.problems.append((number, str(error)))
                continue
            prompt, chosen, rejected = ids.prompt, ids.chosen, ids.rejected
            room = longest_sequence - len(prompt)
            longest = max(len(chosen), len(rejected))
            if room < 1:
                problem = f"prompt too long: {len(prompt)} tokens, at most {longest_sequence - 1} fit"
            elif longest > room and too_long == "drop":
                problem = f"response too long: {longest} tokens with eos, {room} fit after the prompt"
            elif chosen[:room] == rejected[:room]:
                problem = "chosen and rejected are the same" + (": as far as they fit" if chosen != rejected else "")
            else:
                report.used += 1
                report.truncated += (len(chosen) > room) + (len(rejected) > room)
                report.inside_token += ids.inside_token
                report.kinds[f"{pair.kind} {ids.read_as}"] += 1
                yield prompt, chosen[:room], rejected[:room]
                continue
            report.problems.append((number, problem))

    with open_pairs(source, split=split) as file:
        report.format, report.unit = file.format, file.unit
        try:
            dataset = PairDataset(usable(file.rows), bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)
        except NoPairsError:
            reasons = report.summary() if report.problems else f"{source}: the file is empty"
            if report.problems and all(reason.startswith("not JSON") for _, reason in report.problems):
                reasons += "\nThe file is neither JSON lines, nor an array, nor CSV with columns chosen and rejected"
            raise DataError(f"no usable pairs; {reasons}") from None
    if repeated == prompted > 1:
        raise DataError(f"{source}: each response begins with its prompt: take the prompts out of chosen and rejected")
    return dataset, report
