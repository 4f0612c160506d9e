from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spo_train import pretrain as pretrain_module
from spo_train.checkpoint import load_checkpoint
from spo_train.config import PretrainConfig
from spo_train.errors import NonFiniteLossError, RunInterruptedError
from spo_train.files import CHECKPOINT_FILE, METRICS_FILE, TOKENIZER_FILE
from spo_train.models.llama import Llama, load_pretrained
from spo_train.pretrain import PretrainResult, held_out_nll, nll_loss, pretrain
from spo_train.protocol import Sequences
from spo_train.text_data import TokenSequences
from spo_train.tokenizer import Tokenizer

TINY: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "ffn_dim": 24,
    "max_length": 40,
    "batch_size": 4,
    "steps": 12,
    "evaluate_every": 5,
    "checkpoint_every": 5,
    "warmup_steps": 3,
}


def train(
    texts: list[str], folder: Path, tokenizer: Tokenizer, *, device: str = "cpu", **changes: Any
) -> PretrainResult:
    options = {key: changes.pop(key) for key in ("resume", "restart") if key in changes}
    config = PretrainConfig(**(TINY | changes))
    return pretrain(texts, folder, config, tokenizer=tokenizer, device=device, progress=False, **options)


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def weights(result: PretrainResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same(a: PretrainResult, b: PretrainResult) -> bool:
    return all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


class KilledError(Exception):
    """Stands for anything that ends a process."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(steps))

    def loss(*args: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise KilledError
        return nll_loss(*args)

    monkeypatch.setattr(pretrain_module, "nll_loss", loss)


def test_training_learns_and_writes_everything(story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = train(story_texts, tmp_path / "run", tokenizer, steps=60, lr=1e-2)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    assert result.nll_per_token < rows[4]["nll_per_token"] - 1
    assert rows[-1]["nll_per_token"] == result.nll_per_token
    assert [row["step"] for row in rows if "nll_per_token" in row] == list(range(5, 61, 5))
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()
    model, loaded_tokenizer = load_pretrained(tmp_path / "run")
    assert all(torch.equal(tensor, weights(result)[name]) for name, tensor in model.state_dict().items())
    assert loaded_tokenizer.encode(story_texts[0]) == tokenizer.encode(story_texts[0])
    assert not result.model.training


def test_tokenizer_is_trained_if_none_is_given(story_texts: list[str], tmp_path: Path) -> None:
    config = PretrainConfig(**(TINY | {"steps": 1, "vocab_size": 350}))
    result = pretrain(story_texts, tmp_path, config, progress=False)
    assert result.tokenizer.vocab_size == result.model.vocab_size == 350
    assert Tokenizer.load(tmp_path / TOKENIZER_FILE).vocab_size == 350


def test_same_seed_same_weights(story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    runs = [train(story_texts, tmp_path / str(i), tokenizer, seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


# 7: between two checkpoints. 5: at a checkpoint. 3: before the first.
@pytest.mark.parametrize("killed_after", [3, 5, 7])
def test_resumed_run_ends_with_the_same_bits(
    story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    whole = train(story_texts, tmp_path / "whole", tokenizer)
    kill_after(killed_after, monkeypatch)
    with pytest.raises(KilledError):
        train(story_texts, tmp_path / "parts", tokenizer)
    monkeypatch.undo()
    assert len(metrics(tmp_path / "parts")) == killed_after
    assert (tmp_path / "parts" / CHECKPOINT_FILE).exists() is (killed_after >= 5)
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another process has another global state
        resumed = train(story_texts, tmp_path / "parts", tokenizer)
    assert same(whole, resumed)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert resumed.nll_per_sequence == whole.nll_per_sequence


def test_a_signal_ends_pretraining_with_a_checkpoint(
    story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(3))

    def loss(*args: Any) -> torch.Tensor:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return nll_loss(*args)

    monkeypatch.setattr(pretrain_module, "nll_loss", loss)
    with pytest.raises(RunInterruptedError, match="after step 4"):
        train(story_texts, tmp_path / "parts", tokenizer)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts" / CHECKPOINT_FILE)[1]["step"] == 4
    resumed = train(story_texts, tmp_path / "parts", tokenizer)
    assert same(resumed, train(story_texts, tmp_path / "whole", tokenizer))


def test_another_run_is_refused_and_restart_replaces_it(
    story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(7, monkeypatch)
    with pytest.raises(KilledError):
        train(story_texts, tmp_path, tokenizer, seed=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"{CHECKPOINT_FILE} belongs to another run \(seed was 1, is 0\)"):
        train(story_texts, tmp_path, tokenizer)
    with pytest.raises(ValueError, match="data was"):
        train(story_texts[:-1], tmp_path, tokenizer, seed=1)
    train(story_texts, tmp_path, tokenizer, restart=True)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 13))


def test_finished_model_is_not_overwritten_by_mistake(
    story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = train(story_texts, tmp_path, tokenizer, steps=1)
    with pytest.raises(ValueError, match="already holds a model"):
        train(story_texts, tmp_path, tokenizer, steps=2)
    assert torch.equal(load_pretrained(tmp_path)[0].embedding.weight, first.model.embedding.weight)
    train(story_texts, tmp_path, tokenizer, steps=2, restart=True)
    assert len(metrics(tmp_path)) == 2


def test_divergence_stops_the_run_and_keeps_the_checkpoint(
    story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(8))

    def loss(*args: Any) -> torch.Tensor:
        return nll_loss(*args) * (1 if next(calls, None) is not None else math.nan)

    monkeypatch.setattr(pretrain_module, "nll_loss", loss)
    with pytest.raises(NonFiniteLossError, match="step 9: loss is nan"):
        train(story_texts, tmp_path, tokenizer)
    monkeypatch.undo()
    assert len(metrics(tmp_path)) == 8
    assert (tmp_path / CHECKPOINT_FILE).exists()
    train(story_texts, tmp_path, tokenizer)
    assert len(metrics(tmp_path)) == 12


def test_loss_is_the_mean_over_tokens_of_the_cross_entropy(
    make_model: Callable[..., Llama], tokenizer: Tokenizer
) -> None:
    model = make_model()
    batch = Sequences(torch.tensor([[1, 9, 8, 2], [1, 7, 2, 3]]), torch.tensor([1, 1]), torch.tensor([4, 3]))
    loss = nll_loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    logits = model(batch.tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), torch.tensor([9, 8, 2, 7, 2, -100]))
    (expected_gradient,) = torch.autograd.grad(expected, model.embedding.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_held_out_nll_counts_every_token_once(
    make_model: Callable[..., Llama], story_texts: list[str], tokenizer: Tokenizer
) -> None:
    model = make_model()
    data = TokenSequences.encode(story_texts[:9], tokenizer, 30)
    total = count = 0.0
    for start, length in zip(data.starts, data.lengths, strict=True):
        row = torch.from_numpy(data.flat[start : start + length].astype(np.int64))
        total += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
        count += length - 1
    per_token, per_sequence = held_out_nll(model, data, tokenizer.pad_id, batch_size=4)
    assert per_token == pytest.approx(total / count, rel=1e-5)
    assert per_sequence == pytest.approx(total / len(data), rel=1e-5)
    assert model.training


def test_learning_rate_warms_up_and_decays() -> None:
    config = PretrainConfig(steps=100, warmup_steps=10, lr=1.0, final_lr_ratio=0.1)
    rates = [pretrain_module._learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] or max(rates) == rates[10]
    assert rates[50] == pytest.approx(0.55)
    assert 0.1 < rates[99] < 0.101


def test_too_little_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it makes 3 sequences, and at least 10 are needed"):
        train(["a", "b", "c"], tmp_path, tokenizer)
    with pytest.raises(ValueError, match="at least one text"):
        train([], tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_one_long_document_is_split(story_texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = train(["\n".join(story_texts[:20])], tmp_path, tokenizer, steps=2)
    assert result.train_sequences > 20
    assert result.held_out_sequences == (result.train_sequences + result.held_out_sequences) // 10


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"lr": float("nan")}, {"clip": 0.0}, {"beta2": 1.0}, {"max_length": 1}, {"final_lr_ratio": 2.0}],
)
def test_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PretrainConfig(**settings)
