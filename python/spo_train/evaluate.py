"""How good a model is: its win rate against the reference as judged, and how far it moved to get there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from spo_kernels import token_kl
from spo_train.config import EvaluateConfig
from spo_train.protocol import IGNORE_INDEX, LanguageModel, Sequences
from spo_train.tokenizer import Tokenizer
from spo_train.toy.judge import StoryJudge

# Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964
# Sequences whose logits are held at once for the KL: [64, 128, 150k] float32 would be 5 GB, [64, 128, 1500] is 50 MB.
KL_BATCH = 64

# Text and whether its author ended it (as opposed to a length limit), to features; "score" is the one that wins.
Judge = Callable[[str, bool], Mapping[str, float]]


def story_judge() -> Judge:
    """The embedded judge of stories: score in 0..10, fluency, coherence, readability, all without noise."""
    judge = StoryJudge()

    def assess(text: str, finished: bool) -> dict[str, float]:
        seen = judge.assess(text, finished=finished)
        return {
            "score": seen.quality,
            "fluency": seen.fluency,
            "coherence": seen.coherence,
            "readability": seen.readability,
        }

    return assess


def load_judge(name: str) -> Judge:
    """The judge called `name`: "stories" (`story_judge`), or "module:function" for a function from text to a score.

    Raises:
        ValueError: there is no such module or function.
    """
    if name == "stories":
        return story_judge()
    module_name, _, function_name = name.partition(":")
    try:
        score = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'judge must be "stories" or an importable "module:function", got {name!r}: {error}'
        ) from error
    return lambda text, _finished: {"score": float(score(text))}


@dataclass(frozen=True)
class Text:
    """One sampled text with what the judge saw in it.

    Attributes:
        prompt: index of its prompt.
        text: prompt and response.
        tokens: tokens of the response, its eos included.
        finished: whether it reached its eos.
        features: the judge's, "score" among them.
    """

    prompt: int
    text: str
    tokens: int
    finished: bool
    features: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        """For a JSON line; `from_record` undoes it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Text:
        return cls(**record)


@dataclass(frozen=True)
class WinRate:
    """Chance that a text of the model beats one of the reference, ties counting half, with its 95 % band.

    The band is sampling error only: it says how much the rate would vary with other texts from the same two models,
    not with other training seeds, other data or another judge.
    """

    rate: float
    low: float
    high: float


def win_rate(
    scores: Sequence[float],
    reference_scores: Sequence[float],
    prompts: Sequence[int] | None = None,
    reference_prompts: Sequence[int] | None = None,
) -> WinRate:
    """Win rate over all comparisons of a score with a reference score of the same prompt.

    The band is the normal approximation with DeLong's variance, `var(V) / S + var(U) / R`, where V are the mean
    comparisons of each of the S scores and U those of each of the R reference scores.

    Args:
        scores, reference_scores: [S] and [R], at least two each.
        prompts, reference_prompts: which prompt each belongs to; None for one prompt.

    Raises:
        ValueError: fewer than two scores, a score that is NaN, or a prompt that only one side has.
    """
    ours, theirs = np.asarray(scores, dtype=np.float64), np.asarray(reference_scores, dtype=np.float64)
    for name, values in (("scores", ours), ("reference_scores", theirs)):
        if len(values) < 2 or np.isnan(values).any():
            raise ValueError(f"{name} must be at least two numbers, none NaN, got {values.tolist()[:8]}")
    same = np.ones((len(ours), len(theirs)), dtype=bool)
    if prompts is not None and reference_prompts is not None:
        same = np.equal.outer(np.asarray(prompts), np.asarray(reference_prompts))
        if not (same.any(0).all() and same.any(1).all()):
            raise ValueError("prompts and reference_prompts must hold the same prompts")
    wins = np.where(same, (np.sign(ours[:, None] - theirs) + 1) / 2, 0)
    by_score, by_reference = wins.sum(1) / same.sum(1), wins.sum(0) / same.sum(0)
    rate = float(by_score.mean())
    error = Z95 * math.sqrt(by_score.var(ddof=1) / len(ours) + by_reference.var(ddof=1) / len(theirs))
    return WinRate(rate, max(0.0, rate - error), min(1.0, rate + error))


@dataclass(frozen=True)
class Evaluation:
    """Result of `Evaluator.evaluate`.

    Attributes:
        metrics: means and bands, see `Evaluator.evaluate`.
        texts: what was sampled.
    """

    metrics: dict[str, float]
    texts: list[Text]


class Evaluator:
    """Compares a model with a reference whose texts are sampled and judged once."""

    def __init__(
        self,
        reference: LanguageModel,
        tokenizer: Tokenizer,
        config: EvaluateConfig,
        *,
        judge: Judge,
        prompts: Sequence[str] = ("",),
        reference_texts: Sequence[Text] | None = None,
    ) -> None:
        """
        Args:
            reference: what to compare with; also what the KL is taken to.
            tokenizer: of both models.
            config: numbers and seeds.
            judge: scores the texts.
            prompts: used in turn, by model and reference alike; texts are compared within their prompt.
            reference_texts: texts of the reference from an earlier evaluator with the same settings; None samples them.

        Raises:
            ValueError: no prompts, or one too long for the model.
        """
        if not prompts:
            raise ValueError("prompts must hold at least one prompt (an empty one samples freely), got none")
        tokenizer.check_fits(reference, "the reference")
        self.reference, self.tokenizer, self.config, self.judge = reference, tokenizer, config, judge
        # No more prompts than each side samples: every prompt has texts of both.
        self.prompts = list(prompts[: min(config.samples, config.reference_samples)])
        self._prompt_ids = tokenizer.encode(self.prompts)
        if reference_texts is None:
            reference_texts = self._sample(reference, config.reference_samples, config.seed)[0]
        self.reference_texts = list(reference_texts)

    def evaluate(self, policy: LanguageModel, step: int = 0) -> Evaluation:
        """Samples from `policy`, judges, and measures.

        Args:
            policy: the model; of the reference's vocabulary.
            step: makes the seed of the sampling, so that evaluations of one run are independent of each other.

        Returns:
            Metrics `win_rate` with its 95 % band `win_rate_low`, `win_rate_high` (sampling error only); `kl` to the
            reference (mean over texts of the exact token KL summed over the response, nats) and `kl_error`, its
            standard error; `length` (mean tokens of the response); `finished` (share of texts that reached their eos);
            `distinct_2` (share of distinct ones among all word bigrams of all texts); `unique` (share of distinct
            texts); and the mean of each of the judge's features, `score` among them.
        """
        config = self.config
        texts, batches = self._sample(policy, config.samples, config.seed + 1 + step)
        kl = self._kl(policy, batches)
        wins = win_rate(
            [text.features["score"] for text in texts],
            [text.features["score"] for text in self.reference_texts],
            [text.prompt for text in texts],
            [text.prompt for text in self.reference_texts],
        )
        bigrams = [pair for text in texts for pair in _bigrams(text.text)]
        features = texts[0].features.keys()
        metrics = {
            "win_rate": wins.rate,
            "win_rate_low": wins.low,
            "win_rate_high": wins.high,
            "kl": float(kl.mean()),
            "kl_error": float(kl.std(ddof=1) / math.sqrt(len(kl))),
            **{name: float(np.mean([text.features[name] for text in texts])) for name in features},
            "length": float(np.mean([text.tokens for text in texts])),
            "finished": float(np.mean([text.finished for text in texts])),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
            "unique": len({text.text for text in texts}) / len(texts),
        }
        return Evaluation(metrics, texts)

    def hook(self, policy: LanguageModel) -> Callable[[int], dict[str, Any]]:
        """`evaluate` in the form that `spo_train.align.run` calls."""
        return lambda step: self.evaluate(policy, step).metrics

    def before_and_after(self, policy: LanguageModel, count: int) -> list[tuple[Text, Text]]:
        """`count` texts of the reference, each with the policy's text from the same prompt and random numbers."""
        before, _ = self._sample(self.reference, count, self.config.seed)
        after, _ = self._sample(policy, count, self.config.seed)
        return list(zip(before, after, strict=True))

    def _sample(self, model: LanguageModel, count: int, seed: int) -> tuple[list[Text], list[Sequences]]:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
        generator = torch.Generator(device).manual_seed(seed)
        texts, batches = [], []
        for first in range(0, count, self.config.batch_size):
            turns = [i % len(self.prompts) for i in range(first, min(count, first + self.config.batch_size))]
            samples = model.sample(
                [self._prompt_ids[turn] for turn in turns],
                max_length=min(model.max_length, self.reference.max_length),
                temperature=self.config.temperature,
                generator=generator,
            )
            batches.append(samples)
            for turn, ids, start, end in zip(
                turns, samples.tokens.tolist(), samples.prompt_lens.tolist(), samples.lengths.tolist(), strict=True
            ):
                text = self.prompts[turn] + self.tokenizer.decode(ids[start:end])
                finished = ids[end - 1] == self.tokenizer.eos_id
                texts.append(Text(turn, text, end - start, finished, dict(self.judge(text, finished))))
        return texts, batches

    @torch.no_grad()
    def _kl(self, policy: LanguageModel, batches: Sequence[Sequences]) -> np.ndarray:
        """Exact token KL summed over each response, [S], nats."""
        parts = []
        with _eval_mode(policy), _eval_mode(self.reference):
            for batch in batches:
                labels = batch.labels()
                for rows in torch.arange(len(batch), device=labels.device).split(KL_BATCH):
                    length = int(batch.lengths[rows].max())
                    tokens, is_response = batch.tokens[rows, : length - 1], labels[rows, : length - 1] != IGNORE_INDEX
                    parts.append(token_kl(policy(tokens), self.reference(tokens), is_response).sum(1).double().cpu())
        return torch.cat(parts).numpy()


@contextmanager
def _eval_mode(model: LanguageModel) -> Iterator[None]:
    if not isinstance(model, torch.nn.Module):
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = text.split()
    return list(pairwise(words))
