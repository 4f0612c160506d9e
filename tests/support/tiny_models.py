"""Tiny Hugging Face models with random weights, made here. Tokenizer and pairs come from examples/tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import WORDS, make_rows, make_tokenizer

__all__ = ["ARCHITECTURES", "make_model", "make_rows", "make_tokenizer", "save_model"]

VOCAB = WORDS + 4
ARCHITECTURES = ("llama", "qwen2", "gemma2", "cohere")


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
