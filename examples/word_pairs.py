"""What the examples train: a tiny model and pairs of words, made here, or a real model and a file of pairs."""

from __future__ import annotations

import argparse
import copy
import json
import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Row = dict[str, list[int]]


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder or hub name of a Hugging Face model; without it a tiny one is made")
    parser.add_argument("--pairs", help='JSONL file of {"prompt", "chosen", "rejected"}; needed with --model')
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: 0.003, with --model 1e-6")
    options = parser.parse_args()
    if (options.model is None) != (options.pairs is None):
        parser.error("--model and --pairs come together")
    options.learning_rate = options.learning_rate or (1e-6 if options.model else 3e-3)
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any, Any, list[Row]]:
    """The policy, its frozen copy as the reference, the tokenizer, and rows of prompt_ids, chosen_ids, rejected_ids."""
    torch.manual_seed(0)
    if options.model is None:
        tokenizer, texts = _words()
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **size))
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        with open(options.pairs, encoding="utf-8") as file:
            texts = [json.loads(line) for line in file if line.strip()]
    model.train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    rows = [
        {
            "prompt_ids": ids(text["prompt"]),
            "chosen_ids": ids(text["chosen"]) + end,
            "rejected_ids": ids(text["rejected"]) + end,
        }
        for text in texts
    ]
    return model, reference, tokenizer, rows


def check_that_it_fell(losses: list[float]) -> None:
    """The mean loss of the last third of the steps must be below that of the first third."""
    third = max(len(losses) // 3, 1)
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    print(f"mean loss of the first {third} steps {first:.3f}, of the last {last:.3f}")
    if not last < first:
        raise SystemExit("the loss did not fall")


def _words(count: int = 60) -> tuple[Any, list[dict[str, str]]]:
    """A tokenizer of words, and pairs whose chosen responses use the first half of the words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(count))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    chance = random.Random(0)

    def text(first: int, last: int, least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(first, last)}" for _ in range(chance.randint(least, most)))

    half = count // 2
    columns = {"prompt": (0, count, 2, 5), "chosen": (0, half, 5, 10), "rejected": (half, count, 5, 10)}
    return tokenizer, [{name: text(*spec) for name, spec in columns.items()} for _ in range(128)]
