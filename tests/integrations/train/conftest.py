"""Tiny models of transformers in folders, and a file of conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the three models, by name."""
    from tiny_transformers import MAKERS

    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations, half of them with the prompt in a field of its own."""
    from tiny_transformers import WORDS

    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rng = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(24):
            prompt = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=3))}]
            replies = [[{"role": "assistant", "content": " ".join(rng.choices(WORDS, k=k))}] for k in (6, 3)]
            row = {"prompt": prompt} if i % 2 else {}
            before = [] if i % 2 else prompt
            row |= {"chosen": before + replies[0], "rejected": before + replies[1]}
            file.write(json.dumps(row) + "\n")
    return path
