from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spo_train.config import EvaluateConfig
from spo_train.evaluate import Evaluator, win_rate
from spo_train.judges import load_judge
from spo_train.models.llama import Llama
from spo_train.sampling import Text
from spo_train.tokenizer import Tokenizer
from spo_train.toy.judge import story_judge

SMALL = EvaluateConfig(samples=10, reference_samples=12, batch_size=6)


def count_e(text: str, _finished: bool = True) -> dict[str, float]:
    return {"score": float(text.count("e")), "letters": float(len(text))}


def test_win_rate_is_the_share_of_comparisons_won_with_ties_half() -> None:
    # 1 loses to 2 and 3; 2 ties one and loses one; 5 wins twice: 0 + 0.5 + 2 of 6.
    wins = win_rate([1, 2, 5], [2, 3])
    assert wins.rate == pytest.approx(2.5 / 6)
    assert 0 <= wins.low < wins.rate < wins.high <= 1
    assert win_rate([4, 4], [4, 4]).rate == 0.5
    assert win_rate([2, 3], [0, 1]).rate == 1.0


def test_win_rate_band_covers_the_truth_at_its_level() -> None:
    # Means of normal scores one apart: the true rate is Phi(1 / sqrt 2) = 0.760. About 380 of 400 bands hold it. 360
    # and 396 are more than three standard deviations away.
    rng = np.random.default_rng(0)
    bands = [win_rate(rng.normal(1, 1, 80), rng.normal(0, 1, 120)) for _ in range(400)]
    assert 360 <= sum(band.low <= 0.7602 <= band.high for band in bands) <= 396


def test_win_rate_compares_within_a_prompt() -> None:
    # Prompt 0 is won, prompt 1 is lost, whatever the scores of the other prompt.
    wins = win_rate([10, 0], [9, 1], [0, 1], [0, 1])
    assert wins.rate == 0.5
    assert win_rate([10, 0], [9, 1]).rate == 0.5
    assert win_rate([10, 2], [9, 1], [0, 1], [0, 1]).rate == 1.0
    assert win_rate([10, 2], [9, 1]).rate == 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1, 2]), "scores must be at least two"),
        (([1, 2], [1, float("nan")]), "reference_scores must be at least two numbers, none NaN"),
        (([1, 2], [1, 2], [0, 1], [0, 0]), "must hold the same prompts"),
    ],
)
def test_win_rate_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(*arguments)


@pytest.fixture
def evaluator(make_model: Callable[..., Llama], tokenizer: Tokenizer) -> Evaluator:
    return Evaluator(make_model(1), tokenizer, SMALL, judge=count_e)


def test_metrics_are_those_of_the_texts(
    evaluator: Evaluator, make_model: Callable[..., Llama], tokenizer: Tokenizer
) -> None:
    policy = make_model(0)
    result = evaluator.evaluate(policy, step=5)
    metrics, texts = result.metrics, result.texts
    assert len(texts) == 10
    assert len(evaluator.reference_texts) == 12
    ours, theirs = ([text.features["score"] for text in side] for side in (texts, evaluator.reference_texts))
    assert metrics["win_rate"] == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a in ours for b in theirs]))
    assert metrics["score"] == pytest.approx(np.mean(ours))
    assert metrics["letters"] == pytest.approx(np.mean([len(text.text) for text in texts]))
    assert metrics["length"] == pytest.approx(np.mean([text.tokens for text in texts]))
    assert metrics["finished"] == np.mean([text.finished for text in texts])
    assert metrics["unique"] == len({text.text for text in texts}) / 10
    assert 0 < metrics["distinct_2"] <= 1
    json.dumps(metrics)


def test_kl_is_the_exact_token_kl_of_the_responses(
    evaluator: Evaluator, make_model: Callable[..., Llama], tokenizer: Tokenizer
) -> None:
    policy = make_model(0)
    got = evaluator.evaluate(policy, step=3).metrics
    generator = torch.Generator().manual_seed(SMALL.seed + 1 + 3)
    sums = []
    for count in (6, 4):
        samples = policy.sample([[]] * count, max_length=policy.max_length, generator=generator)
        with torch.no_grad():
            p = F.log_softmax(policy(samples.tokens[:, :-1]).double(), -1)
            q = F.log_softmax(evaluator.reference(samples.tokens[:, :-1]).double(), -1)
        kl = (p.exp() * (p - q)).sum(-1)
        sums += [kl[row, : samples.lengths[row] - 1].sum().item() for row in range(count)]
    assert got["kl"] == pytest.approx(np.mean(sums), rel=1e-5)
    assert got["kl_error"] == pytest.approx(np.std(sums, ddof=1) / 10**0.5, rel=1e-4)


def test_the_reference_has_no_kl_to_itself_and_evaluation_repeats(
    evaluator: Evaluator, make_model: Callable[..., Llama]
) -> None:
    state = torch.get_rng_state()
    same = evaluator.evaluate(make_model(1), step=0)
    assert same.metrics["kl"] == 0.0
    assert same.texts == evaluator.evaluate(make_model(1), step=0).texts
    assert same.texts != evaluator.evaluate(make_model(1), step=1).texts
    assert same.texts != evaluator.reference_texts[:10]
    assert torch.equal(torch.get_rng_state(), state)


def test_training_mode_is_restored(evaluator: Evaluator, make_model: Callable[..., Llama]) -> None:
    policy = make_model(0).train()
    evaluator.evaluate(policy)
    assert policy.training


def test_prompts_are_used_in_turn(make_model: Callable[..., Llama], tokenizer: Tokenizer) -> None:
    prompts = ["Lily ", "Tom ", "", "never used " * 10]
    config = EvaluateConfig(samples=3, reference_samples=5, batch_size=2)
    evaluator = Evaluator(make_model(1), tokenizer, config, judge=count_e, prompts=prompts)
    texts = evaluator.evaluate(make_model(0)).texts
    assert [text.prompt for text in texts] == [0, 1, 2]
    assert [text.prompt for text in evaluator.reference_texts] == [0, 1, 2, 0, 1]
    assert texts[0].text.startswith("Lily ")
    assert texts[1].text.startswith("Tom ")
    with pytest.raises(ValueError, match="at least one prompt"):
        Evaluator(make_model(1), tokenizer, config, judge=count_e, prompts=[])


def test_before_and_after_share_their_random_numbers(evaluator: Evaluator, make_model: Callable[..., Llama]) -> None:
    for before, after in evaluator.before_and_after(make_model(1), 3):
        assert before == after
        assert Text.from_record(json.loads(json.dumps(before.record()))) == before


def test_reference_texts_can_be_given(
    evaluator: Evaluator, make_model: Callable[..., Llama], tokenizer: Tokenizer
) -> None:
    again = Evaluator(make_model(1), tokenizer, SMALL, judge=count_e, reference_texts=evaluator.reference_texts)
    assert again.evaluate(make_model(0)).metrics == evaluator.evaluate(make_model(0)).metrics


def test_a_tokenizer_of_another_size_is_refused(make_model: Callable[..., Llama], tokenizer: Tokenizer) -> None:
    model = make_model()
    model.vocab_size += 5
    with pytest.raises(ValueError, match="does not fit the reference"):
        Evaluator(model, tokenizer, SMALL, judge=count_e)


def test_judges_by_name(story_texts: list[str]) -> None:
    stories = load_judge("stories")
    good, bad = stories(story_texts[0], True), stories("tom tom tom tom tom tom", True)
    assert good["score"] > bad["score"]
    assert good == story_judge()(story_texts[0], True)
    assert stories(story_texts[0], False)["score"] < good["score"]
    assert {"score", "fluency", "coherence", "readability"} == set(good)
    assert load_judge("builtins:len")("four", True) == {"score": 4.0}
    for name in ("nowhere_at_all:score", "builtins:nothing", "builtins", "", ":"):
        with pytest.raises(ValueError, match="judge must be"):
            load_judge(name)
