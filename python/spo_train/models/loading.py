"""Loading a model with its tokenizer: one that spo-train wrote, or one of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from spo_train.errors import MissingPackageError
from spo_train.files import CONFIG_FILE, MODEL_FOLDER, RUN_FILE, StrPath, is_hub_name, read_json
from spo_train.models import llama
from spo_train.protocol import TextTokenizer, TrainableModel


def load_pretrained(
    source: StrPath,
    device: str | torch.device = "cpu",
    *,
    max_length: int | None = None,
    strings: Literal["text", "chat"] | None = None,
) -> tuple[TrainableModel, TextTokenizer]:
    """Read a model and its tokenizer.

    Args:
        source: the folder of a model or of an alignment run; or "owner/name" of a model of the Hugging Face hub, if
            there is no such folder.
        device: where the model goes.
        max_length: the most tokens of a sequence; None takes the model's own, of Hugging Face models at most 1024.
        strings: how to read string prompts, see `spo_train.models.huggingface.HuggingFaceTokenizer`.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: model or tokenizer cannot be read, or `max_length` or `strings` is not possible for them.
        MissingPackageError: the model needs transformers, which is not installed.
    """
    folder = Path(source)
    if (folder / RUN_FILE).exists():
        folder = folder / MODEL_FOLDER
    if _is_of_transformers(folder):
        return _load_huggingface(str(folder), device, max_length=max_length, strings=strings)
    model, tokenizer = llama.load_pretrained(folder, device)
    if strings == "chat":
        raise ValueError(f"strings must be text for {folder}, which has no chat template, got chat")
    if max_length is not None:
        if not 2 <= max_length <= model.max_length:
            raise ValueError(f"max_length must be in [2, {model.max_length}] for {folder}, got {max_length}")
        model.max_length = max_length
    return model, tokenizer


def _is_of_transformers(folder: Path) -> bool:
    if not folder.exists():
        if is_hub_name(folder):
            return True
        raise FileNotFoundError(f"{folder} does not exist")
    if not (folder / CONFIG_FILE).exists():
        return (folder / "adapter_config.json").exists()
    return not read_json(folder / CONFIG_FILE).keys().isdisjoint({"architectures", "model_type"})


def _load_huggingface(source: str, device: str | torch.device, **options: Any) -> tuple[TrainableModel, TextTokenizer]:
    try:
        from spo_train.models import huggingface
    except ImportError as error:
        what = "is a model of transformers, which" if Path(source).exists() else "does not exist; a model of the hub"
        raise MissingPackageError(f'{source} {what} needs pip install "spo_kernels[hf]" ({error})') from error
    return huggingface.load_pretrained(source, device, **options)
