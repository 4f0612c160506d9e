"""A tokenizer and models small enough that a training step takes milliseconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spo_train.models.llama import Llama, ModelConfig
from spo_train.pair_data import PairDataset, load_pairs
from spo_train.tokenizer import Tokenizer
from spo_train.toy.grammar import stories

MAX_LENGTH = 48


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small that threads cost more than they save, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def story_texts() -> list[str]:
    return list(stories(120, seed=5))


@pytest.fixture(scope="session")
def tokenizer(story_texts: list[str]) -> Tokenizer:
    return Tokenizer.train(story_texts, vocab_size=400)


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> Callable[..., Llama]:
    def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Llama:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = ModelConfig(
                tokenizer.vocab_size, dim=32, layers=2, heads=2, ffn_dim=48, max_length=MAX_LENGTH, bos_id=1, eos_id=2
            )
            model = Llama(config).to(dtype)
            # A new model is almost uniform. Larger weights make log-probs differ from token to token.
            for parameter in model.parameters():
                parameter.data *= 3 if parameter.dim() > 1 else 1
        return model

    return make


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, story_texts: list[str]) -> Path:
    """40 pairs of stories' beginnings, half of them with a prompt; some are longer than `MAX_LENGTH`."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(40):
            chosen, rejected = (" ".join(text.split()[: rng.randint(3, 30)]) for text in story_texts[2 * i : 2 * i + 2])
            prompt = "Tell me a story. " if i % 2 else ""
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": i}) + "\n")
    return path


@pytest.fixture(scope="session")
def pairs(pairs_file: Path, tokenizer: Tokenizer) -> PairDataset:
    return load_pairs(pairs_file, tokenizer, max_length=MAX_LENGTH)[0]
