"""A tiny Llama, a tokenizer of words and preference pairs, made here: the examples run without a download."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60


def make_tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def make_rows(count: int = 64, *, seed: int = 0, words: int = WORDS, tokens: int = 10) -> list[dict[str, str]]:
    """Pairs as texts. Chosen responses are of the first half of the words, rejected ones of the second half."""
    chance = random.Random(seed)

    def text(low: int, high: int, least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(low, high)}" for _ in range(chance.randint(least, most)))

    return [
        {
            "prompt": text(0, words, 2, 5) + " ",
            "chosen": text(0, words // 2, tokens // 2, tokens),
            "rejected": text(words // 2, words, tokens // 2, tokens),
        }
        for _ in range(count)
    ]


def load_rows(file: Path | None) -> list[dict[str, str]]:
    """Pairs of a JSONL file of prompt, chosen and rejected; None: those of `make_rows`."""
    if file is None:
        return make_rows()
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def load(name: str | None) -> tuple[Any, Any]:
    """Model and tokenizer by a name or a folder; None: the tiny ones."""
    if name is None:
        return make_model(), make_tokenizer()
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)


def check_falling(losses: list[float]) -> None:
    """The mean of the last third is below the mean of the first third."""
    third = max(1, len(losses) // 3)
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    print(f"loss: {first:.4f} in the first third, {last:.4f} in the last third")
    if not last < first:
        raise SystemExit("the loss did not fall")
