"""Making preference pairs: two samples of a model for the same prompt, judged in both orders and filtered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spo_train.config import PairsConfig
from spo_train.files import StrPath, write_jsonl
from spo_train.judges import Judge
from spo_train.metrics import progress_bar
from spo_train.protocol import LanguageModel, TextTokenizer
from spo_train.sampling import Prompts, Text, sample_texts
from spo_train.toy.judge import StoryJudge, story_judge


@dataclass(frozen=True)
class PairsSummary:
    """Counts and means of `make_pairs`.

    Attributes:
        sampled: pairs of new samples.
        kept: pairs of new samples that passed the judge's filter.
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


def make_pairs(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    out: StrPath,
    config: PairsConfig | None = None,
    *,
    judge: Judge | None = None,
    prompts: Sequence[str] = ("",),
    progress: bool = True,
) -> PairsSummary:
    """Sample pairs, have them judged, and write those that pass the filter as JSONL, all or nothing.

    A line is `{"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}`. The scores are the judge's without
    noise, for reading and checking; noisy scores made the choice.

    Args:
        model: what to sample from.
        tokenizer: of the model.
        out: JSONL file to create or replace.
        config: numbers and seeds; None takes the defaults.
        judge: its "score", from 0 to 10, is how good a text is; None takes the judge of stories. The comparison is the
            same for every judge: the noise and bias of `config`, both orders, and the margins of `StoryJudge.prefer`.
        prompts: used in turn; the empty prompt samples freely.
        progress: whether to show a progress bar, if standard error is a terminal.

    Raises:
        ValueError: no prompts, a prompt too long for `max_length`, a tokenizer that does not fit the model.
    """
    config = config or PairsConfig()
    rater = StoryJudge(noise=config.noise, bias=config.bias)
    tokenizer.check_fits(model)
    max_length = config.max_length or model.max_length
    encoded = Prompts.encode(prompts, tokenizer, max_length)
    samples: list[Text] = []
    with progress_bar(total=2 * config.pairs, desc="sample and judge", unit="text", shown=progress) as bar:
        for texts, _ in sample_texts(
            model,
            tokenizer,
            judge or story_judge(),
            encoded,
            # Two samples a pair, one after the other.
            [turn for turn in encoded.turns(config.pairs) for _ in range(2)],
            max_length=max_length,
            temperature=config.temperature,
            batch_size=config.batch_size,
            generator=torch.Generator().manual_seed(config.seed),
        ):
            samples += texts
            bar.update(len(texts))

    rng = random.Random(config.seed)
    fresh = [(i, i + 1) for i in range(0, len(samples), 2)]
    kept = _judged(fresh, samples, rater, rng)
    fresh_kept = len(kept)
    seen = set(fresh)
    for _ in range(config.repairings):
        again = [pair for pair in _random_pairs(samples, encoded, rng) if pair not in seen]
        seen.update(again)
        kept += _judged(again, samples, rater, rng)

    def response(sample: Text) -> str:
        return sample.text[len(encoded.texts[sample.prompt]) :]

    write_jsonl(
        Path(out),
        (
            {
                "prompt": encoded.given[samples[chosen].prompt],
                "chosen": response(samples[chosen]),
                "rejected": response(samples[rejected]),
                "score_chosen": round(samples[chosen].score, 3),
                "score_rejected": round(samples[rejected].score, 3),
            }
            for chosen, rejected in kept
        ),
    )
    right = sum(samples[chosen].score > samples[rejected].score for chosen, rejected in kept)
    return PairsSummary(
        sampled=len(fresh),
        kept=fresh_kept,
        keep_rate=fresh_kept / len(fresh),
        repaired_kept=len(kept) - fresh_kept,
        agreement=right / len(kept) if kept else float("nan"),
        mean_quality=sum(sample.score for sample in samples) / len(samples),
    )


def _random_pairs(samples: Sequence[Text], prompts: Prompts, rng: random.Random) -> list[tuple[int, int]]:
    """Pair each sample at random with another of the same prompt; an odd one is left out."""
    # Grouped by the prompt's text, because the same prompt may be listed twice.
    by_prompt: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_prompt.setdefault(prompts.texts[sample.prompt], []).append(i)
    pairs = []
    for members in by_prompt.values():
        rng.shuffle(members)
        pairs += [(min(pair), max(pair)) for pair in zip(members[::2], members[1::2], strict=False)]
    return pairs


def _judged(
    pairs: Sequence[tuple[int, int]], samples: Sequence[Text], rater: StoryJudge, rng: random.Random
) -> list[tuple[int, int]]:
    """Return (chosen, rejected) of the pairs that pass the filter; pairs of equal texts do not."""
    kept = []
    for first, second in pairs:
        if samples[first].text == samples[second].text:
            continue
        winner = rater.prefer(samples[first].score, samples[second].score, rng)
        if winner:
            kept.append((first, second) if winner > 0 else (second, first))
    return kept
