"""A judge of stories: it stands in for the human or model rater of preference data.

The judge scores a story from 0 to 10. Readability (how mature the language is), fluency (how many of the word trigrams
occur in the grammar's stories) and coherence (whether the story keeps to its hero) give points. Repetition and a
missing end cost points. When the judge compares two stories, its scores are noisy and favour the story shown second, as
raters do. The paper's filter keeps a pair if the same story wins by a clear margin in both orders.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from spo_train.judges import Judge
from spo_train.toy.grammar import BOYS, GIRLS, stories

# The trigrams of these stories count as fluent. No training set has this seed.
FLUENT_STORIES, FLUENT_SEED = 20_000, 90_210

HIGHEST_SCORE = 10.0
READABILITY_POINTS, FLUENCY_POINTS, COHERENCE_POINTS = 4.5, 3.0, 2.5
REPETITION_PENALTY, UNFINISHED_PENALTY = 3.0, 1.5
FULL_GRADE = 11.0  # at this school grade and above, readability earns all its points
FLUENCY_FLOOR = 0.6  # fluency earns nothing up to this share of known trigrams, which function words alone reach
FULL_WORDS = 45  # shorter stories lose points in proportion
FEWEST_WORDS = 5  # anything shorter scores 0
MARGIN_FIRST, MARGIN_SECOND = 2, 3  # the bias favours the story shown second, so it must win by more

_NAMES = frozenset(GIRLS + BOYS)
_WORD = re.compile(r"[A-Za-z']+")
_SENTENCE_END = re.compile(r"[.!?]+\"?\s*")
_VOWELS = re.compile(r"[aeiouy]+")
_HIS, _HER = frozenset({"he", "his", "him"}), frozenset({"she", "her"})


@dataclass(frozen=True)
class Assessment:
    """The judge's view of one story, without noise.

    Attributes:
        quality: the score, in [0, 10].
        readability: Flesch-Kincaid school grade; may be negative.
        fluency: share of the story's word trigrams that occur in the grammar's stories, in [0, 1].
        coherence: 1 for a story that keeps its hero, adds at most one friend and uses the right pronouns, down to 0.
        repetition: share of sentences that repeat an earlier one, in [0, 1].
        finished: whether its author ended the story, with a full stop, an exclamation mark or a closing quote.
        words: number of words.
    """

    quality: float
    readability: float
    fluency: float
    coherence: float
    repetition: float
    finished: bool
    words: int


class StoryJudge:
    """Assesses stories and compares them.

    Args:
        noise: standard deviation of the Gaussian noise on a score, in points.
        bias: points added to the story shown second.
    """

    def __init__(self, *, noise: float = 1.0, bias: float = 0.5) -> None:
        if not (noise >= 0 and math.isfinite(noise)):
            raise ValueError(f"noise must be at least 0 and finite, got {noise}")
        if not math.isfinite(bias):
            raise ValueError(f"bias must be finite, got {bias}")
        self.noise, self.bias = noise, bias

    def assess(self, text: str, *, finished: bool = True) -> Assessment:
        """Assess one story, without noise.

        Args:
            text: the story.
            finished: whether its author ended it; False if a length limit cut it off.
        """
        words = _WORD.findall(text)
        if len(words) < FEWEST_WORDS:
            return Assessment(0.0, 0.0, 0.0, 0.0, 1.0, False, len(words))
        sentences = [part.strip().lower() for part in _SENTENCE_END.split(text) if _WORD.search(part)]
        readability = 0.39 * len(words) / len(sentences) + 11.8 * sum(map(_syllables, words)) / len(words) - 15.59
        trigrams = _trigrams(words)
        fluency = sum(trigram in _fluent_trigrams() for trigram in trigrams) / len(trigrams)
        coherence = _coherence(words)
        repetition = 1 - len(set(sentences)) / len(sentences)
        finished = finished and text.rstrip().endswith((".", "!", '"'))

        points = READABILITY_POINTS * min(1.0, max(0.0, readability / FULL_GRADE))
        points += FLUENCY_POINTS * max(0.0, (fluency - FLUENCY_FLOOR) / (1 - FLUENCY_FLOOR))
        points += COHERENCE_POINTS * coherence
        points -= REPETITION_PENALTY * repetition + UNFINISHED_PENALTY * (not finished)
        quality = min(HIGHEST_SCORE, max(0.0, points * min(1.0, len(words) / FULL_WORDS)))
        return Assessment(quality, readability, fluency, coherence, repetition, finished, len(words))

    def scores(self, first: float, second: float, rng: random.Random) -> tuple[int, int]:
        """Return noisy, biased, whole scores in 0..10 for two stories of the given qualities, shown in this order."""
        return self._noisy(first, rng), self._noisy(second + self.bias, rng)

    def prefer(self, first: float, second: float, rng: random.Random) -> int:
        """Apply the paper's filter to two stories of the given qualities.

        Both orders are judged. In each, the story shown first wins if it leads by at least 2 points, the story shown
        second if it leads by at least 3.

        Returns:
            1 if the first story wins in both orders, -1 if the second does, 0 if the pair is to be dropped.
        """
        in_order = _winner(*self.scores(first, second, rng))
        flipped = -_winner(*self.scores(second, first, rng))
        return in_order if in_order == flipped else 0

    def _noisy(self, quality: float, rng: random.Random) -> int:
        return round(min(HIGHEST_SCORE, max(0.0, quality + rng.gauss(0.0, self.noise))))


def story_judge() -> Judge:
    """Return the judge of stories for evaluations: score in 0..10, fluency, coherence, readability, without noise."""
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


def _winner(first: int, second: int) -> int:
    if first - second >= MARGIN_FIRST:
        return 1
    return -1 if second - first >= MARGIN_SECOND else 0


def _coherence(words: Sequence[str]) -> float:
    named = [word for word in words if word in _NAMES]
    if not named:
        return 0.0
    hero = named[0]
    pronouns = [word.lower() for word in words if word.lower() in _HIS | _HER]
    wrong = _HIS if hero in GIRLS else _HER
    crowd = max(0, len(set(named)) - 2)
    mistaken = sum(word in wrong for word in pronouns) / max(1, len(pronouns))
    hero_dropped = hero not in named[len(named) // 2 :]
    return max(0.0, 1.0 - 0.4 * crowd - 0.6 * mistaken - 0.4 * hero_dropped)


@lru_cache(maxsize=100_000)
def _syllables(word: str) -> int:
    """Count runs of vowels, less a silent final e; at least 1."""
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if count > 1 and word.endswith("e") and not word.endswith("le"):
        count -= 1
    return max(1, count)


def _trigrams(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return lower-cased word trigrams, with marks for the beginning and the end, and one word for all names."""
    marked = ["^", *("<name>" if word in _NAMES else word.lower() for word in words), "$"]
    return list(zip(marked, marked[1:], marked[2:], strict=False))


@lru_cache(maxsize=1)
def _fluent_trigrams() -> frozenset[tuple[str, str, str]]:
    """Return all trigrams of the grammar's stories; this takes about a second, once a process."""
    return frozenset(
        trigram for text in stories(FLUENT_STORIES, seed=FLUENT_SEED) for trigram in _trigrams(_WORD.findall(text))
    )
