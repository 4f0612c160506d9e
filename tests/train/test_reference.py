from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from spo_train.config import PretrainConfig
from spo_train.pretrain import held_out_nll
from spo_train.text_data import TokenSequences
from spo_train.toy.grammar import stories
from spo_train.toy.reference import RECIPE_FILE, load_reference, train_reference


def test_shipped_reference_tells_stories() -> None:
    model, tokenizer = load_reference()
    recipe = json.loads((resources.files("spo_train.toy.assets") / "recipe.json").read_text())
    assert model.vocab_size == tokenizer.vocab_size == recipe["pretrain"]["vocab_size"]

    texts = stories(128, seed=recipe["stories"]["seed"] + 1)
    _, nll = held_out_nll(model, TokenSequences.encode(texts, tokenizer, model.max_length), tokenizer.pad_id)
    # The standard error of the mean over 128 stories is about 0.6 nats.
    assert nll == pytest.approx(recipe["held_out_nll_per_sequence"], abs=3.0)
    assert F.softmax(model(torch.tensor([[tokenizer.bos_id]])), -1).isfinite().all()


def test_train_reference_writes_its_recipe(tmp_path: Path) -> None:
    shape = {"vocab_size": 400, "dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "max_length": 600}
    config = PretrainConfig(**shape, steps=2, batch_size=4)
    result = train_reference(tmp_path, config, story_count=100, progress=False)
    recipe = json.loads((tmp_path / RECIPE_FILE).read_text())
    assert recipe["held_out_nll_per_sequence"] == round(result.nll_per_sequence, 2)
    assert (recipe["train_sequences"], recipe["held_out_sequences"]) == (90, 10)
    assert recipe["pretrain"]["steps"] == 2
    assert recipe["parameters"] == sum(tensor.numel() for tensor in result.model.state_dict().values())
