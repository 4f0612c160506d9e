"""The runs in `earlier_runs`, which earlier code wrote (8efd150), can still be read, reported and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_train.align import Aligner
from spo_train.checkpoint import load_checkpoint
from spo_train.config import AlignConfig, PretrainConfig
from spo_train.files import CHECKPOINT_FILE, METRICS_FILE, read_jsonl
from spo_train.models.llama import Llama, ModelConfig
from spo_train.pair_data import PairDataset
from spo_train.pretrain import Pretrainer
from spo_train.report import read_run
from spo_train.run import run
from spo_train.text_data import TokenSequences

EARLIER = Path(__file__).parent / "earlier_runs"
SHAPE = ModelConfig(12, dim=4, layers=1, heads=1, ffn_dim=4, max_length=12)
PAIRS = [([4], [5, 6, 2], [7, 2]), ([], [8, 2], [9, 10, 2]), ([11], [4, 2], [5, 5, 2])]
ALIGN = {"batch_size": 2, "kl_samples": 2, "kl_every": 2, "warmup_steps": 2, "lr": 1e-2}
METHODS: dict[str, dict[str, Any]] = {"spo": {"normalizer": "ema"}, "dpo": {"method": "dpo"}}
# The loss of each step. The runs stopped after 3 steps (alignments) and 4 steps (pretraining); the later losses are
# those with which the earlier code continued.
LOSSES = {
    "spo": [3.8100211918354034, 2.888922220095992, 3.6385719296088285, 2.795130642130971, 3.678213946521282],
    "dpo": [0.6683401465415955, 0.7177990674972534, 0.7122385501861572, 0.6955453157424927, 0.6397653818130493],
    "pretrain": [
        2.5071380138397217, 2.50652813911438, 2.4854736328125, 2.4823901653289795, 2.4953722953796387,
        2.469930410385132,
    ],
}  # fmt: skip


def make_model(seed: int) -> Llama:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Llama(SHAPE)
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.dim() > 1 else 1
    return model


def make_aligner(method: str, steps: int) -> Aligner:
    pairs = PairDataset(PAIRS, bos_id=1, pad_id=3)
    return Aligner(make_model(0), make_model(1), pairs, AlignConfig(**ALIGN, **METHODS[method], steps=steps))


class Letters:
    """A stand-in for a tokenizer: each character is one id."""

    bos_id, eos_id = 1, 2

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[4 + ord(letter) % 8 for letter in text] for text in texts]


def make_pretrainer(**changes: Any) -> Pretrainer:
    texts = ["abc" * (i % 3 + 1) + "de" * (i % 2) for i in range(20)]
    settings = {"steps": 6, "batch_size": 2, "evaluate_every": 2, "checkpoint_every": 4, "warmup_steps": 2, "seed": 3}
    config = PretrainConfig(dim=4, layers=1, heads=1, ffn_dim=4, max_length=12, **settings | changes)
    return Pretrainer(make_model(5), TokenSequences.encode(texts, Letters(), 12), config)


def copied(name: str, folder: Path) -> Path:
    return shutil.copytree(EARLIER / name, folder / name)


@pytest.mark.parametrize("name", ["spo", "dpo", "pretrain"])
def test_goes_on_from_an_earlier_checkpoint(name: str, tmp_path: Path) -> None:
    trainer = make_pretrainer() if name == "pretrain" else make_aligner(name, steps=5)
    folder = copied(name, tmp_path)
    run(trainer, folder, resume=True, progress=False)
    records = read_jsonl(folder / METRICS_FILE)
    assert [record["step"] for record in records] == list(range(1, trainer.steps + 1))
    # Another machine may round differently.
    assert [record["loss"] for record in records] == pytest.approx(LOSSES[name], rel=1e-4)


@pytest.mark.parametrize("name", ["spo", "dpo", "pretrain"])
def test_an_earlier_checkpoint_is_taken_over_whole(name: str, tmp_path: Path) -> None:
    trainer = make_pretrainer() if name == "pretrain" else make_aligner(name, steps=3)
    trainer.restore(EARLIER / name / CHECKPOINT_FILE)
    trainer.save(tmp_path / CHECKPOINT_FILE)
    before, state = load_checkpoint(EARLIER / name / CHECKPOINT_FILE)
    after, _ = load_checkpoint(tmp_path / CHECKPOINT_FILE)
    assert trainer.step == state["step"]
    # The earlier checkpoints of pretraining hold no generator.
    assert after.keys() - before.keys() == ({"rng/torch"} if name == "pretrain" else set())
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0, equal_nan=True)


def test_other_settings_are_refused_under_their_new_names(tmp_path: Path) -> None:
    checkpoint = EARLIER / "pretrain" / CHECKPOINT_FILE
    with pytest.raises(ValueError, match=r"belongs to another run \(evaluate_every was 2, is 3\)"):
        make_pretrainer(evaluate_every=3).restore(checkpoint)
    with pytest.raises(ValueError, match=r"method was None, is 'spo'"):
        make_aligner("spo", steps=3).restore(checkpoint)


@pytest.mark.parametrize("name", ["spo", "dpo"])
def test_the_report_reads_an_earlier_run(name: str) -> None:
    told = read_run(EARLIER / name)
    assert told.label.startswith(name.upper())
    assert told.about["finished"]
    assert [record["step"] for record in told.evaluations] == [0, 2, 3]
    assert len(told.stories) == 1
    assert told.step_seconds > 0
    assert "tokens_per_s" in json.loads((EARLIER / name / METRICS_FILE).read_text().splitlines()[0])
