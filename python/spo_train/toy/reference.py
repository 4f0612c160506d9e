"""The reference model that the package ships: loading it, and training it again from the story grammar."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import torch

from spo_train.config import PretrainConfig
from spo_train.files import StrPath, write_json
from spo_train.models.llama import Llama, load_pretrained
from spo_train.pretrain import PretrainResult, pretrain
from spo_train.tokenizer import Tokenizer
from spo_train.toy.grammar import stories

RECIPE_FILE = "recipe.json"
# 79 of these stories exceed the model's 128 tokens and make two sequences each. Of all sequences 512 are held out.
REFERENCE_STORIES, STORIES_SEED = 60_512, 1


def reference_folder() -> AbstractContextManager[Path]:
    """Give the folder of the shipped reference model."""
    return resources.as_file(resources.files("spo_train.toy") / "assets")


def load_reference(device: str | torch.device = "cpu") -> tuple[Llama, Tokenizer]:
    """Read the shipped reference model and its tokenizer."""
    with reference_folder() as folder:
        return load_pretrained(folder, device)


def train_reference(
    out: StrPath,
    config: PretrainConfig | None = None,
    *,
    story_count: int = REFERENCE_STORIES,
    device: str | torch.device = "cpu",
    resume: bool = True,
    restart: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Pretrain a reference model on the story grammar; the defaults remake the model in `spo_train/toy/assets`.

    Besides the files of `pretrain`, `recipe.json` in `out` says how the model was made, with its measured NLL. The
    package ships config.json, model.safetensors, tokenizer.model and recipe.json.
    """
    config = config or PretrainConfig()
    result = pretrain(
        stories(story_count, seed=STORIES_SEED),
        out,
        config,
        device=device,
        resume=resume,
        restart=restart,
        progress=progress,
    )
    recipe = {
        "made_by": "spo_train.toy.reference.train_reference",
        "stories": {"grammar": "spo_train.toy.grammar", "count": story_count, "seed": STORIES_SEED},
        "tokenizer": {"kind": "sentencepiece BPE", "vocab_size": result.tokenizer.vocab_size},
        "pretrain": config.record(),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_sequences": result.train_sequences,
        "held_out_sequences": result.held_out_sequences,
        "held_out_nll_per_token": round(result.nll_per_token, 4),
        "held_out_nll_per_sequence": round(result.nll_per_sequence, 2),
    }
    write_json(Path(out) / RECIPE_FILE, recipe)
    return result
