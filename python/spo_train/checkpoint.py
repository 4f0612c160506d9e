"""One-file checkpoints: tensors and JSON state in a safetensors file that is replaced whole or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spo_train.errors import CheckpointError
from spo_train.files import write_atomically

FORMAT = "spo_train.checkpoint.1"

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, *, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and `state` to `path` atomically.

    Whatever interrupts the writing leaves the previous checkpoint as it was (see `spo_train.files`).

    Args:
        path: the checkpoint file; its folder is created if needed.
        tensors: named tensors of any dtype, shape and device (saved from the CPU, bit for bit).
        state: anything JSON can hold; non-finite floats survive, tuples come back as lists.

    Raises:
        CheckpointError: nothing was written (disk full, folder not writable, ...); a previous checkpoint still stands.
        TypeError: `state` holds something JSON cannot.
    """
    path = Path(path)
    plain = _plain(tensors)
    text = json.dumps(state)
    metadata = {"format": FORMAT, "state": text, "crc32": str(_crc32(text, plain))}
    try:
        write_atomically(path, safetensors.torch.save(plain, metadata))
    except OSError as error:
        kept = "the previous checkpoint is untouched" if path.is_file() else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write checkpoint {path}: {error}; {kept}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Returns:
        `(tensors, state)`, the tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged (its checksum does not match) or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise CheckpointError(f"{path} is not a training checkpoint: its format is {found!r}, expected {FORMAT!r}")
    text = metadata.get("state", "")
    if metadata.get("crc32") != str(_crc32(text, tensors)):
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum does not match its content")
    return tensors, json.loads(text)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two sharing memory: safetensors takes neither strides nor tied weights."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _crc32(text: str, tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
