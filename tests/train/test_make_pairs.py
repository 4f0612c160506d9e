from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_train.config import PairsConfig
from spo_train.judges import Judge
from spo_train.models.llama import Llama
from spo_train.protocol import Sequences
from spo_train.sampling import read_prompts
from spo_train.tokenizer import Tokenizer
from spo_train.toy.grammar import stories, story
from spo_train.toy.judge import StoryJudge
from spo_train.toy.make_pairs import PairsSummary, make_pairs

PROMPTS = ("Once upon a time", "", "In a quiet town")


class Storyteller:
    """A language model that answers any prompt with a random story of the grammar; every tenth is cut off."""

    max_length = 400

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.vocab_size, self.told = tokenizer, tokenizer.vocab_size, 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Sequences:
        rows = []
        for prompt in prompts:
            rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
            end = [self.tokenizer.eos_id] if self.told % 10 else []
            rows.append(([1, *prompt], self.tokenizer.encode(" " + story(rng)) + end))
            self.told += 1
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
        tokens = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_id)
        for row, (prompt, response) in zip(tokens, rows, strict=True):
            row[: len(prompt) + len(response)] = torch.tensor(prompt + response)
        return Sequences(tokens, torch.tensor([len(prompt) for prompt, _ in rows]), lengths)


@pytest.fixture
def make(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., tuple[list[dict], PairsSummary]]:
    def make(
        prompts: Sequence[str] = ("",), judge: Judge | None = None, **settings: Any
    ) -> tuple[list[dict], PairsSummary]:
        path = tmp_path / "pairs.jsonl"
        summary = make_pairs(
            Storyteller(tokenizer),
            tokenizer,
            path,
            PairsConfig(**settings),
            judge=judge,
            prompts=prompts,
            progress=False,
        )
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], summary

    return make


def test_lines_and_summary_agree(make: Callable) -> None:
    rows, summary = make(pairs=200, repairings=2)
    assert summary.sampled == 200
    assert summary.kept + summary.repaired_kept == len(rows) > 40
    assert summary.repaired_kept > 0
    assert summary.keep_rate == summary.kept / 200
    assert {tuple(row) for row in rows} == {("prompt", "chosen", "rejected", "score_chosen", "score_rejected")}
    right = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert summary.agreement == pytest.approx(right / len(rows))
    assert summary.agreement > 0.9
    judge = StoryJudge()
    ended = [row for row in rows if row["score_chosen"] == round(judge.assess(row["chosen"]).quality, 3)]
    # Stories that were cut off have a lower score than the same text with its end.
    assert 0.8 * len(rows) < len(ended) < len(rows)


def test_noise_free_judge_keeps_exactly_the_clear_pairs(make: Callable) -> None:
    rows, summary = make(pairs=100, repairings=0, noise=0.0, bias=0.0)
    assert summary.agreement == 1
    assert summary.kept == len(rows) > 0
    assert all(row["score_chosen"] - row["score_rejected"] >= 2 for row in rows)


def test_given_judge_decides(make: Callable) -> None:
    rows, summary = make(pairs=200, judge=lambda text, finished: {"score": 2.0 * text.count("y")}, noise=0.0, bias=0.0)
    assert summary.kept > 10
    assert all(row["score_chosen"] == 2.0 * row["chosen"].count("y") for row in rows)
    assert all(min(10, row["chosen"].count("y") * 2) > 2 * row["rejected"].count("y") for row in rows)


def test_nothing_passes_a_judge_that_only_sees_the_order(make: Callable) -> None:
    rows, summary = make(pairs=20, bias=20.0)
    assert rows == []
    assert (summary.kept, summary.keep_rate) == (0, 0.0)
    assert summary.agreement != summary.agreement


def test_seed_decides_everything(make: Callable) -> None:
    first, again, other = (make(pairs=60, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_batch_size_changes_no_judgement(make: Callable) -> None:
    # The storyteller draws row by row, so its stories do not depend on the batches either.
    assert make(pairs=50, batch_size=7)[0] == make(pairs=50, batch_size=100)[0]


def test_repairing_adds_only_new_pairs_of_the_same_prompt(make: Callable) -> None:
    without, _ = make(PROMPTS, pairs=90, repairings=0)
    rows, _ = make(PROMPTS, pairs=90, repairings=8)
    assert rows[: len(without)] == without
    assert len(rows) > 2 * len(without)
    # Each pair once, in one direction.
    counted = Counter(frozenset((row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])) for row in rows)
    assert set(counted.values()) == {1}
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    told: dict[str, set[str]] = {prompt: set() for prompt in PROMPTS}
    for row in rows:
        told[row["prompt"]] |= {row["chosen"], row["rejected"]}
    assert not told[PROMPTS[0]] & told[PROMPTS[1]]


def test_repairing_of_a_single_pair_adds_nothing(make: Callable) -> None:
    rows, summary = make(pairs=1, repairings=5, noise=5.0)
    assert summary.repaired_kept == 0
    assert len(rows) == summary.kept


def test_judge_sees_the_prompt_too(make: Callable) -> None:
    rows, _ = make(("Tom was sad.",), pairs=60, noise=0.0)
    judge = StoryJudge()
    whole = [
        row for row in rows if row["score_chosen"] == round(judge.assess("Tom was sad." + row["chosen"]).quality, 3)
    ]
    alone = [row for row in rows if row["score_chosen"] == round(judge.assess(row["chosen"]).quality, 3)]
    assert len(whole) > 0.8 * len(rows) > len(alone)


def test_pairs_of_a_real_model(make_model: Callable[..., Llama], tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pairs.jsonl"
    summary = make_pairs(
        make_model(),
        tokenizer,
        path,
        PairsConfig(pairs=5, batch_size=4, max_length=20),
        prompts=["Tom"],
        progress=False,
    )
    assert summary.sampled == 5
    assert len(path.read_text().splitlines()) == summary.kept + summary.repaired_kept


def test_errors_leave_an_old_file_alone(make_model: Callable[..., Llama], tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("old\n")
    model, config = make_model(), PairsConfig(pairs=2)
    with pytest.raises(ValueError, match=r"prompt 2 has \d+ tokens, .*max_length=48: 'Tom Tom"):
        make_pairs(model, tokenizer, path, config, prompts=["ok", "Tom " * 60])
    with pytest.raises(ValueError, match="at least one prompt"):
        make_pairs(model, tokenizer, path, config, prompts=[])
    with pytest.raises(ValueError, match="does not fit"):
        make_pairs(model, Tokenizer.train(stories(50, seed=0), vocab_size=390), path, config)
    assert path.read_text() == "old\n"


def test_read_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOnce upon\r\n\n  \nÉté \n".encode())
    assert read_prompts(path) == ["Once upon", "Été "]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts.txt has no prompts"):
        read_prompts(path)
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(ValueError, match=r"prompts.txt is not UTF-8 at byte 5"):
        read_prompts(path)


@pytest.mark.parametrize(
    "settings",
    [{"pairs": 0}, {"repairings": -1}, {"batch_size": 0}, {"temperature": 0.0}, {"noise": -1.0}, {"max_length": 1}],
)
def test_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PairsConfig(**settings)
