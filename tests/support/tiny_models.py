"""Tiny Hugging Face models with random weights, a tokenizer of words, and pairs: made here, nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

WORDS = 60
VOCAB = WORDS + 4
ARCHITECTURES = ("llama", "qwen2", "gemma2", "cohere")


def make_tokenizer(words: int = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(architecture: str = "llama", *, vocab: int = VOCAB, seed: int = 0) -> Any:
    """Llama; Qwen2 with tied embeddings; Gemma2, tied, with a softcap; Cohere, tied, with a logit scale."""
    import transformers

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": architecture != "llama",
    }
    if architecture == "gemma2":
        common |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "final_logit_softcapping": 3.0}
    if architecture == "cohere":
        common |= {"logit_scale": 0.25}
    name = {"llama": "Llama", "qwen2": "Qwen2", "gemma2": "Gemma2", "cohere": "Cohere"}[architecture]
    config = getattr(transformers, f"{name}Config")(**common)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def save_model(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    """A folder with model and tokenizer, as ``from_pretrained`` reads it."""
    make_model(architecture, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(count: int = 16, *, seed: int = 0, words: int = WORDS, tokens: int = 10) -> list[dict[str, str]]:
    """Chosen responses are of the first half of the words, rejected ones of the second half."""
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
