"""Tiny models of transformers, with tokenizers trained on a few words, in folders that `from_pretrained` loads."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

WORDS = ["the", "a", "dog", "cat", "story", "tell", "me", "about", "and", "then", "ran", "was", "happy", "Lily", "Tom"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=12)) + "." for i in range(200)]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_tokenizer(special: list[str], *, template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. `special` begins with pad and eos; with `bos` its third token stands before texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"pad_token": special[0], "eos_token": special[1]}
    if bos:
        names["bos_token"] = special[2]
        start = [(special[2], bpe.token_to_id(special[2]))]
        bpe.post_processor = processors.TemplateProcessing(single=f"{special[2]} $A", special_tokens=start)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = template
    return tokenizer


def save(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, **generation: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(folder: Path) -> Path:
    """Untied, a bos before texts, no chat template."""
    tokenizer = make_tokenizer(["<pad>", "</s>", "<s>"], bos=True)
    config = LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False
    )
    return save(folder, config, tokenizer)


def make_qwen2(folder: Path) -> Path:
    """Tied, no bos, a padded vocabulary; the template ends a turn with a token that is not the model's eos."""
    tokenizer = make_tokenizer(["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], template=CHATML)
    config = Qwen2Config(
        **SHAPE,
        vocab_size=len(tokenizer) + 14,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return save(folder, config, tokenizer, repetition_penalty=5.0, top_k=1, do_sample=True)


def make_gemma2(folder: Path) -> Path:
    """Tied, a softcap that matters, a template that begins with bos and refuses the system role."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = make_tokenizer(special, template=GEMMA, bos=True)
    config = Gemma2Config(
        **SHAPE,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=[1, 4],
        bos_token_id=2,
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        sliding_window=16,
    )
    return save(folder, config, tokenizer)


MAKERS: dict[str, Callable[[Path], Path]] = {"llama": make_llama, "qwen2": make_qwen2, "gemma2": make_gemma2}
