from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spo_train.alignment import is_finished, run_alignment
from spo_train.config import AlignConfig, EvaluateConfig
from spo_train.errors import NonFiniteLossError
from spo_train.evaluate import Evaluator
from spo_train.files import (
    EVALUATIONS_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    STORIES_FILE,
    TOKENIZER_FILE,
    read_json,
    read_jsonl,
)
from spo_train.models.llama import Llama
from spo_train.pair_data import PairDataset
from spo_train.protocol import Sequences
from spo_train.tokenizer import Tokenizer


class Bigram(nn.Module):
    """A user's model with only the methods of `TrainableModel`. Its logits depend on the last token alone."""

    max_length = 48

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Sequences:
        tokens = torch.full((len(prompts), max_length), 3)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: 1 + len(prompt)] = torch.tensor([1, *prompt])
            for position in range(1 + len(prompt), max_length):
                weights = (self.table[row[position - 1]] / temperature).softmax(-1)
                row[position] = torch.multinomial(weights, 1, generator=generator)
        prompt_lens = torch.tensor([1 + len(prompt) for prompt in prompts])
        return Sequences(tokens, prompt_lens, torch.full_like(prompt_lens, max_length))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "bigram.pt")


def test_a_model_of_the_user_is_aligned(tokenizer: Tokenizer, pairs: PairDataset, tmp_path: Path) -> None:
    policy, reference = Bigram(tokenizer.vocab_size), Bigram(tokenizer.vocab_size)
    config = EvaluateConfig(samples=3, reference_samples=3)
    evaluator = Evaluator(reference, tokenizer, config, judge=lambda text, _: {"score": float(len(text))})
    run_alignment(
        policy,
        reference,
        tokenizer,
        pairs,
        AlignConfig(steps=2, batch_size=4, kl_samples=2, warmup_steps=0, lr=1e-2),
        tmp_path,
        evaluator=evaluator,
        about={"model": "bigram"},
        progress=False,
    )
    assert policy.table.abs().sum() > 0
    assert torch.equal(torch.load(tmp_path / MODEL_FOLDER / "bigram.pt")["table"], policy.table)
    assert (tmp_path / MODEL_FOLDER / TOKENIZER_FILE).exists()
    about = read_json(tmp_path / RUN_FILE)
    assert (about["model"], about["config"]["beta"], about["evaluate"]["samples"]) == ("bigram", 0.03, 3)
    assert [record["step"] for record in read_jsonl(tmp_path / EVALUATIONS_FILE)] == [0, 2]
    assert len(read_jsonl(tmp_path / STORIES_FILE)) == 8
    assert is_finished(tmp_path)


def test_a_refused_resume_leaves_the_run_as_it_was(tokenizer: Tokenizer, pairs: PairDataset, tmp_path: Path) -> None:
    policy, reference = Bigram(tokenizer.vocab_size), Bigram(tokenizer.vocab_size)
    config = AlignConfig(method="dpo", steps=2, batch_size=4)
    run_alignment(policy, reference, tokenizer, pairs, config, tmp_path, progress=False)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    other = dataclasses.replace(config, beta=0.5)
    with pytest.raises(ValueError, match="belongs to another run"):
        run_alignment(policy, reference, tokenizer, pairs, other, tmp_path, resume=True, progress=False)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert is_finished(tmp_path)


def test_a_restart_removes_what_the_earlier_run_evaluated(
    tokenizer: Tokenizer, pairs: PairDataset, tmp_path: Path
) -> None:
    policy, reference = Bigram(tokenizer.vocab_size), Bigram(tokenizer.vocab_size)
    settings = EvaluateConfig(samples=3, reference_samples=3)
    evaluator = Evaluator(reference, tokenizer, settings, judge=lambda text, _: {"score": float(len(text))})
    config = AlignConfig(method="dpo", steps=1, batch_size=4)
    run_alignment(policy, reference, tokenizer, pairs, config, tmp_path, evaluator=evaluator, progress=False)
    results = [tmp_path / EVALUATIONS_FILE, tmp_path / STORIES_FILE]
    assert all(file.exists() for file in results)
    run_alignment(policy, reference, tokenizer, pairs, config, tmp_path, restart=True, progress=False)
    assert not any(file.exists() for file in results)


def test_a_run_that_fails_is_not_finished(
    make_model: Callable[..., Llama], tokenizer: Tokenizer, pairs: PairDataset, tmp_path: Path
) -> None:
    assert not is_finished(tmp_path)
    broken = make_model()
    broken.norm.weight.data[:] = torch.nan
    with pytest.raises(NonFiniteLossError):
        run_alignment(broken, make_model(), tokenizer, pairs, AlignConfig(method="dpo", steps=2), tmp_path)
    assert read_json(tmp_path / RUN_FILE)["finished"] is False
    assert not is_finished(tmp_path)
