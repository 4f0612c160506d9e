"""How good a model is: its win rate against the reference, as judged, and its KL to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from spo_train.config import EvaluateConfig
from spo_train.heads import KLToReference
from spo_train.judges import Judge
from spo_train.pair_data import PairDataset
from spo_train.protocol import IGNORE_INDEX, LanguageModel, Sequences, TextTokenizer
from spo_train.sampling import Prompts, Text, sample_texts

# Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964
# Sequences whose logits are held at once for the KL: [64, 128, 150k] float32 would be 5 GB, [64, 128, 1500] is 50 MB.
KL_BATCH = 64


@dataclass(frozen=True)
class WinRate:
    """Chance that a text of the model beats one of the reference, with its 95 % band; a tie counts half.

    The band is sampling error only. It says how much the rate would vary with other texts of the same two models. Other
    training seeds, other data or another judge vary it further.
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
    """Return the win rate over all comparisons of a score with a reference score of the same prompt.

    The band is the normal approximation with DeLong's variance, `var(V) / S + var(U) / R`: V holds the mean
    comparison of each of the S scores, U the mean comparison of each of the R reference scores.

    Args:
        scores, reference_scores: [S] and [R], at least two each.
        prompts, reference_prompts: the prompt of each score; None for one prompt.

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
        tokenizer: TextTokenizer,
        config: EvaluateConfig,
        *,
        judge: Judge,
        prompts: Sequence[str] | Prompts = ("",),
        reference_texts: Sequence[Text] | None = None,
    ) -> None:
        """
        Args:
            reference: the model to compare with, and the one that the KL is taken to.
            tokenizer: of both models.
            config: numbers and seeds.
            judge: scores the texts.
            prompts: used in turn, by model and reference alike; texts are compared within their prompt. No more than
                `config.samples` and `config.reference_samples` are used, so that every prompt has texts of both.
            reference_texts: texts of the reference from an earlier evaluator with the same settings; None samples them.

        Raises:
            ValueError: no prompts, one too long for the reference, or a tokenizer that does not fit the reference.
        """
        tokenizer.check_fits(reference, "the reference")
        self.reference, self.tokenizer, self.config, self.judge = reference, tokenizer, config, judge
        most = min(config.samples, config.reference_samples)
        self.prompts = (
            prompts.first(most)
            if isinstance(prompts, Prompts)
            else Prompts.encode(prompts[:most], tokenizer, reference.max_length)
        )
        if reference_texts is None:
            reference_texts = self._sample(reference, config.reference_samples, config.seed)[0]
        self.reference_texts = list(reference_texts)

    @classmethod
    def on_prompts_of(
        cls,
        pairs: PairDataset,
        reference: LanguageModel,
        tokenizer: TextTokenizer,
        config: EvaluateConfig,
        *,
        judge: Judge,
    ) -> Evaluator:
        """Return an evaluator on the prompts of the first `config.samples` pairs, each prompt once."""
        prompts = Prompts.of_ids(pairs.prompts(range(min(len(pairs), config.samples))), tokenizer)
        return cls(reference, tokenizer, config, judge=judge, prompts=prompts)

    def evaluate(self, policy: LanguageModel, step: int = 0) -> Evaluation:
        """Sample from `policy`, judge the texts, and measure.

        Args:
            policy: the model; its vocabulary is the reference's.
            step: part of the sampling's seed, so that the evaluations of one run are independent of each other.

        Returns:
            Metrics: `win_rate` with its 95 % band `win_rate_low`, `win_rate_high` (sampling error only); `kl` to the
            reference (mean over texts of the exact token KL summed over the response, nats) and `kl_error`, its
            standard error; `length` (mean tokens of the response); `finished` (share of texts that reached their eos);
            `distinct_2` (share of distinct ones among all word bigrams of all texts); `unique` (share of distinct
            texts); and the mean of each feature that the judge returns, `score` among them.
        """
        config = self.config
        texts, batches = self._sample(policy, config.samples, config.seed + 1 + step)
        kl = self._kl(policy, batches)
        wins = win_rate(
            [text.score for text in texts],
            [text.score for text in self.reference_texts],
            [text.prompt for text in texts],
            [text.prompt for text in self.reference_texts],
        )
        bigrams = [pair for text in texts for pair in pairwise(text.text.split())]
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
        """Return `evaluate` in the form that `spo_train.run.run` calls."""
        return lambda step: self.evaluate(policy, step).metrics

    def before_and_after(self, policy: LanguageModel, count: int) -> list[tuple[Text, Text]]:
        """Return `count` texts of the reference, each with the policy's from the same prompt and random numbers."""
        before, _ = self._sample(self.reference, count, self.config.seed)
        after, _ = self._sample(policy, count, self.config.seed)
        return list(zip(before, after, strict=True))

    def _sample(self, model: LanguageModel, count: int, seed: int) -> tuple[list[Text], list[Sequences]]:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
        batches = list(
            sample_texts(
                model,
                self.tokenizer,
                self.judge,
                self.prompts,
                self.prompts.turns(count),
                max_length=min(model.max_length, self.reference.max_length),
                temperature=self.config.temperature,
                batch_size=self.config.batch_size,
                generator=torch.Generator(device).manual_seed(seed),
            )
        )
        return [text for texts, _ in batches for text in texts], [drawn for _, drawn in batches]

    @torch.no_grad()
    def _kl(self, policy: LanguageModel, batches: Sequence[Sequences]) -> np.ndarray:
        """Return the exact token KL summed over each response, [S], nats."""
        sums, kl = [], KLToReference(policy, self.reference)
        with _eval_mode(policy), _eval_mode(self.reference):
            for batch in batches:
                labels = batch.labels()
                for rows in torch.arange(len(batch), device=labels.device).split(KL_BATCH):
                    length = int(batch.lengths[rows].max())
                    tokens, is_response = batch.tokens[rows, : length - 1], labels[rows, : length - 1] != IGNORE_INDEX
                    sums.append(kl.of_tokens(tokens, is_response).sum(1).double().cpu())
        return torch.cat(sums).numpy()


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
