from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable

import pytest

from spo_train.toy import grammar
from spo_train.toy.grammar import ENDING, OPENING, PLOTS, REGISTERS, stories, story
from spo_train.toy.judge import Assessment, StoryJudge

FIRST = (
    "One day, a little boy named Tom was at the park. Tom had a big red kite. He loved the kite a lot. "
    "But then Tom lost the kite. He was very sad. His friend Mia came to help. Mia saw the kite by a tree! "
    "Tom hugged Mia. They were so glad. Tom learned to ask a friend for help. The end."
)


@pytest.fixture(scope="module")
def judge() -> StoryJudge:
    return StoryJudge()


def exact(bias: float = 0.0) -> StoryJudge:
    return StoryJudge(noise=0.0, bias=bias)


def test_grammar_is_frozen() -> None:
    # The shipped model, the judge's trigrams and all measured results depend on exactly these stories.
    digest = hashlib.sha256("\n".join(stories(1000, seed=1)).encode()).hexdigest()
    assert digest == "d06a5defee66da18be43c1fbacbd79d86397109a4f733052a7cbe2e38f051a7f"


def test_stories_are_distinct_and_a_longer_run_extends_a_shorter_one() -> None:
    few, many = stories(200, seed=3), stories(400, seed=3)
    assert many[:200] == few
    assert len(set(many)) == 400
    assert not set(few) & set(stories(200, seed=4))


def test_templates_are_complete() -> None:
    known = {"hero", "friend", "child", "place", "object", "animal", "parent", "adjective", "glad", "unhappy"}
    known |= grammar.PRONOUNS["girl"].keys()
    for beat in (OPENING, ENDING, *(beat for plot in PLOTS.values() for beat in plot.values())):
        assert tuple(beat) == REGISTERS
        for template in (template for register in REGISTERS for template in beat[register]):
            assert {name for _, name, _, _ in string.Formatter().parse(template) if name} <= known


def test_every_story_is_finished_english(judge: StoryJudge) -> None:
    for text in stories(500, seed=6):
        assert not re.search(r"[{}]|  |\ba [aeiou]", text)
        assessment = judge.assess(text)
        assert assessment.finished
        assert assessment.coherence == 1
        assert assessment.fluency > 0.9


def test_maturity_chooses_the_register() -> None:
    rng = random.Random(0)
    childish = {"mom", "dad", "grandma", "learned", "very"}
    for maturity, expected in ((0.0, True), (1.0, False)):
        words = {word for _ in range(50) for word in re.findall(r"\w+", story(rng, maturity))}
        assert (words >= childish) is expected
        assert bool(words & childish) is expected


def test_judge_is_frozen(judge: StoryJudge) -> None:
    assessment = judge.assess(FIRST)
    assert assessment.quality == pytest.approx(5.142857, abs=1e-6)
    assert assessment.readability == pytest.approx(-0.432554, abs=1e-6)
    texts = stories(300, seed=8)
    assert sum(judge.assess(text).quality for text in texts) / len(texts) == pytest.approx(7.177472, abs=1e-6)


def test_readability_is_the_flesch_kincaid_grade(judge: StoryJudge) -> None:
    # 9 words in 2 sentences; syllables 1+1+1+1+1 and 1+2+1+3.
    text = "The dog saw the cat. The lady was beautiful."
    assert judge.assess(text).readability == pytest.approx(0.39 * 9 / 2 + 11.8 * 12 / 9 - 15.59)


def test_maturer_stories_score_higher(judge: StoryJudge) -> None:
    rng = random.Random(1)
    means = [sum(judge.assess(story(rng, maturity)).quality for _ in range(100)) / 100 for maturity in (0.0, 0.5, 1.0)]
    assert means[0] + 1 < means[1] < means[2] - 1


def test_fluency_falls_when_words_are_shuffled(judge: StoryJudge) -> None:
    words = FIRST.split()
    random.Random(0).shuffle(words)
    assert judge.assess(FIRST).fluency > 0.95
    assert judge.assess(" ".join(words)).fluency < 0.2


@pytest.mark.parametrize(
    ("change", "coherence"),
    [
        (lambda text: text, 1.0),
        # 2 of 3 pronouns (he, he, his) become wrong.
        (lambda text: text.replace("He", "She"), 1 - 0.6 * 2 / 3),
        (lambda text: text.replace("Tom learned", "Ben learned"), 1 - 0.4),
        (lambda text: text[: text.index("Tom hugged")] + "Mia hugged Mia. Mia was so glad.", 1 - 0.4),
        (lambda text: text.replace("Tom", "They").replace("Mia", "they"), 0.0),
    ],
    ids=["as told", "wrong pronouns", "a third name", "hero dropped", "nobody named"],
)
def test_coherence(judge: StoryJudge, change: Callable[[str], str], coherence: float) -> None:
    assert judge.assess(change(FIRST)).coherence == pytest.approx(coherence)


def test_repetition_costs_points(judge: StoryJudge) -> None:
    repeated = judge.assess(FIRST.replace("The end.", "Tom had a big red kite."))
    assert repeated.repetition == pytest.approx(1 / 11)
    assert repeated.quality < judge.assess(FIRST).quality


def test_unfinished_costs_a_point_and_a_half(judge: StoryJudge) -> None:
    told = judge.assess(FIRST)
    assert told.quality - judge.assess(FIRST, finished=False).quality == pytest.approx(1.5)
    assert not judge.assess(FIRST.removesuffix(".")).finished


def test_stories_of_fewer_than_five_words_score_zero() -> None:
    judge = StoryJudge()
    assert judge.assess(FIRST).words >= 45
    for text, words in (("", 0), ("?!", 0), ("Tom had a kite.", 4)):
        assert judge.assess(text) == Assessment(0.0, 0.0, 0.0, 0.0, 1.0, False, words)


def test_quality_stays_in_range(judge: StoryJudge) -> None:
    pieces = [*FIRST.split(), "Extraordinarily", "incomprehensible", "Tom.", "Mia!", "he", "she", '"', "..."]
    rng = random.Random(2)
    for _ in range(300):
        text = " ".join(rng.choices(pieces, k=rng.randint(0, 120)))
        assert 0 <= judge.assess(text, finished=rng.random() < 0.5).quality <= 10


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    # Without noise and bias. The better story is shown second in one of the two orders, so it must lead by 3.
    [(8, 5, 1), (5, 8, -1), (7, 5, 0), (5, 7, 0), (5, 5, 0), (10, 0, 1), (7.6, 5.4, 1), (7.4, 4.6, 0)],
)
def test_filter_needs_the_margin_in_both_orders(first: float, second: float, kept: int) -> None:
    assert exact().prefer(first, second, random.Random(0)) == kept


def test_bias_favours_the_story_shown_second() -> None:
    judge = exact(bias=2.0)
    assert judge.scores(5, 5, random.Random(0)) == (5, 7)
    # Where the better story is shown first, the bias makes its lead of 3 a lead of 1: the pair is dropped.
    assert exact().prefer(8, 5, random.Random(0)) == 1
    assert judge.prefer(8, 5, random.Random(0)) == 0
    assert judge.prefer(9, 5, random.Random(0)) == 1


def test_scores_are_whole_noisy_and_clipped() -> None:
    rng = random.Random(0)
    judge = StoryJudge(noise=1.0, bias=0.5)
    drawn = [judge.scores(5.0, 5.0, rng) for _ in range(4000)]
    assert {type(score) for pair in drawn for score in pair} == {int}
    for side, mean in ((0, 5.0), (1, 5.5)):
        scores = [pair[side] for pair in drawn]
        average = sum(scores) / len(scores)
        # Five standard errors; rounding adds 1/12 to the variance.
        assert average == pytest.approx(mean, abs=5 * (13 / 12 / len(scores)) ** 0.5)
        variance = sum((score - average) ** 2 for score in scores) / len(scores)
        assert variance == pytest.approx(13 / 12, rel=0.12)
    edges = [judge.scores(0.0, 10.0, rng) for _ in range(200)]
    assert {min(edges)[0], max(edges)[1]} == {0, 10}


def test_filter_is_symmetric() -> None:
    judge, rng = StoryJudge(), random.Random(0)
    kept = [(judge.prefer(7, 5, rng), judge.prefer(5, 7, rng)) for _ in range(3000)]
    first, second = (sum(winners) for winners in zip(*kept, strict=True))
    assert first > 300
    assert second == pytest.approx(-first, abs=5 * (2 * 3000 * 0.25) ** 0.5)


@pytest.mark.parametrize("options", [{"noise": -1.0}, {"noise": float("nan")}, {"bias": float("inf")}])
def test_judge_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        StoryJudge(**options)
