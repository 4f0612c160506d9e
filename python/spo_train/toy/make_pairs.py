"""Preference pairs: two samples of a model for the same prompt, judged in both orders and filtered."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from spo_train.evaluate import Judge, story_judge
from spo_train.files import write_atomically
from spo_train.protocol import LanguageModel
from spo_train.source_config import PairsConfig
from spo_train.tokenizer import Tokenizer
from spo_train.toy.judge import StoryJudge


@dataclass(frozen=True)
class PairsSummary:
    """What came of it.

    Attributes:
        sampled: pairs of new samples.
        kept: of these, how many the judge's filter kept.
        keep_rate: kept / sampled.
        repaired_kept: further pairs kept from re-pairing the samples.
        agreement: share of all kept pairs whose chosen side is better without the judge's noise too; NaN if none.
        mean_quality: mean noise-free score of the samples.
    """

    sampled: int
    kept: int
    keep_rate: float
    repaired_kept: int
    agreement: float
    mean_quality: float


@dataclass(frozen=True)
class _Sample:
    prompt: str
    response: str
    quality: float


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file that are not blank.

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


def make_pairs(
    model: LanguageModel,
    tokenizer: Tokenizer,
    out_file: str | os.PathLike[str],
    config: PairsConfig | None = None,
    *,
    judge: Judge | None = None,
    prompts: Sequence[str] = ("",),
    progress: bool = True,
) -> PairsSummary:
    """Samples pairs, has them judged, and writes those that pass the filter as JSONL, all or nothing.

    A line is `{"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}`. The scores are the judge's without
    noise, for reading and checking; the choice was made by the noisy ones. `prompt + chosen` is the whole text.

    Args:
        model: what to sample from.
        tokenizer: of the model.
        out_file: JSONL file to create or replace.
        config: numbers and seeds; None takes the defaults.
        judge: its "score", from 0 to 10, is how good a text is; None takes the judge of stories. The comparison is the
            same for every judge: the noise and bias of `config`, both orders, and the margins of `StoryJudge.prefer`.
        prompts: used in turn; the empty prompt samples freely.
        progress: whether to show a progress bar, when standard error is a terminal.

    Raises:
        ValueError: no prompts, a prompt too long for `max_length`, a tokenizer that does not fit the model.
    """
    config = config or PairsConfig()
    rater = StoryJudge(noise=config.noise, bias=config.bias)
    tokenizer.check_fits(model)
    samples = _sample(model, tokenizer, config, judge or story_judge(), prompts, progress)
    rng = random.Random(config.seed)
    fresh = [(i, i + 1) for i in range(0, len(samples), 2)]
    kept = _judged(fresh, samples, rater, rng)
    fresh_kept = len(kept)
    seen = set(fresh)
    for _ in range(config.repairings):
        again = [pair for pair in _random_pairs(samples, rng) if pair not in seen]
        seen.update(again)
        kept += _judged(again, samples, rater, rng)

    def write(file: IO[bytes]) -> None:
        for chosen, rejected in kept:
            row = {
                "prompt": samples[chosen].prompt,
                "chosen": samples[chosen].response,
                "rejected": samples[rejected].response,
                "score_chosen": round(samples[chosen].quality, 3),
                "score_rejected": round(samples[rejected].quality, 3),
            }
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    write_atomically(Path(out_file), write)
    right = sum(samples[chosen].quality > samples[rejected].quality for chosen, rejected in kept)
    return PairsSummary(
        sampled=len(fresh),
        kept=fresh_kept,
        keep_rate=fresh_kept / len(fresh),
        repaired_kept=len(kept) - fresh_kept,
        agreement=right / len(kept) if kept else float("nan"),
        mean_quality=sum(sample.quality for sample in samples) / len(samples),
    )


def _sample(
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: PairsConfig,
    judge: Judge,
    prompts: Sequence[str],
    progress: bool,
) -> list[_Sample]:
    """Two samples a pair, one after the other; the pairs take the prompts in turn."""
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt (an empty text samples freely), got none")
    max_length = config.max_length or model.max_length
    encoded = tokenizer.encode(list(prompts))
    for i, ids in enumerate(encoded):
        if len(ids) > max_length - 2:
            raise ValueError(
                f"prompt {i + 1} has {len(ids)} tokens, which leaves no room for a response within "
                f"max_length={max_length}: {prompts[i]!r}"
            )
    turns = [i % len(prompts) for pair in range(config.pairs) for i in (pair, pair)]
    generator = torch.Generator().manual_seed(config.seed)
    samples: list[_Sample] = []
    with tqdm(total=len(turns), desc="sample and judge", unit="text", disable=None if progress else True) as bar:
        for start in range(0, len(turns), config.batch_size):
            chunk = turns[start : start + config.batch_size]
            drawn = model.sample(
                [encoded[i] for i in chunk],
                max_length=max_length,
                temperature=config.temperature,
                generator=generator,
            )
            rows = zip(chunk, drawn.tokens.tolist(), drawn.prompt_lens.tolist(), drawn.lengths.tolist(), strict=True)
            for i, tokens, prompt_len, length in rows:
                response = tokenizer.decode(tokens[prompt_len:length])
                finished = tokens[length - 1] == tokenizer.eos_id
                quality = judge(prompts[i] + response, finished)["score"]
                samples.append(_Sample(prompts[i], response, quality))
            bar.update(len(chunk))
    return samples


def _random_pairs(samples: Sequence[_Sample], rng: random.Random) -> list[tuple[int, int]]:
    """All samples paired at random with another of the same prompt; one of an odd number is left out."""
    by_prompt: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt, []).append(i)
    pairs = []
    for members in by_prompt.values():
        rng.shuffle(members)
        pairs += [(min(pair), max(pair)) for pair in zip(members[::2], members[1::2], strict=False)]
    return pairs


def _judged(
    pairs: Sequence[tuple[int, int]], samples: Sequence[_Sample], rater: StoryJudge, rng: random.Random
) -> list[tuple[int, int]]:
    """(chosen, rejected) of the pairs that pass the filter; equal texts are no pair."""
    kept = []
    for first, second in pairs:
        if samples[first].response == samples[second].response:
            continue
        winner = rater.prefer(samples[first].quality, samples[second].quality, rng)
        if winner:
            kept.append((first, second) if winner > 0 else (second, first))
    return kept
