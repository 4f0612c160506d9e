"""Checkpoints: one safetensors file, replaced whole or not at all, and the training state that it holds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spo_train.config import Settings
from spo_train.errors import CheckpointError
from spo_train.files import write_atomically
from spo_train.protocol import TrainableModel

FORMAT = "spo_train.checkpoint.1"

__all__ = ["CheckpointError", "TrainingState", "load_checkpoint", "save_checkpoint"]


@dataclass(frozen=True)
class TrainingState:
    """The state that every trainer keeps in its checkpoints, and the facts that identify the run.

    Attributes:
        model, optimizer: what is trained.
        config: settings of the run.
        data: fingerprint of the data.
        may_change: names of the settings that a resumed run may change.
        modules: further modules with a state, by name.
        generators: random generators by name, besides torch's global ones.
    """

    model: TrainableModel
    optimizer: torch.optim.Optimizer
    config: Settings
    data: int | str
    may_change: frozenset[str] = frozenset()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)

    def save(self, path: Path, step: int, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint.

        Args:
            path: the checkpoint file.
            step: optimizer steps done.
            extra: further tensors of the trainer; `restore` returns them.

        Raises:
            CheckpointError: see `save_checkpoint`.
        """
        tensors = dict(extra or {})
        for name, module in self._modules().items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": tensor for key, tensor in state.items()}
        for name, generator in self.generators.items():
            tensors[f"rng/{name}"] = generator.get_state()
        # A model with dropout also draws from torch's global generators.
        tensors["rng/torch"] = torch.get_rng_state()
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
        save_checkpoint(path, tensors=tensors, state={"step": step, "config": self.config.record(), "data": self.data})

    def restore(self, path: Path) -> tuple[int, dict[str, Tensor]]:
        """Load the state of a checkpoint, so that training continues with the same bits.

        Returns:
            The steps done, and the extra tensors of `save`, on the CPU.

        Raises:
            FileNotFoundError, CheckpointError: there is no checkpoint, it is damaged, or its model differs.
            ValueError: the checkpoint belongs to a run with other settings or other data.
        """
        tensors, state = load_checkpoint(path)
        # Earlier checkpoints of pretraining hold config and data one level deeper.
        state |= state.get("run", {})
        self._refuse_another_run(path, state)

        def take(prefix: str) -> dict[str, Tensor]:
            names = [name for name in tensors if name.startswith(prefix)]
            return {name.removeprefix(prefix): tensors.pop(name) for name in names}

        try:
            for name, module in self._modules().items():
                module.load_state_dict(take(f"{name}/"))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in take("optimizer/").items():
                i, key = name.split("/")
                moments.setdefault(int(i), {})[key] = tensor
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            rng = take("rng/")
            for name, generator in self.generators.items():
                generator.set_state(rng[name])
            if "torch" in rng:  # earlier checkpoints of pretraining hold no generator
                torch.set_rng_state(rng["torch"])
            device = next(self.model.parameters()).device
            if device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this model: {error}") from error
        return state["step"], tensors

    def _modules(self) -> dict[str, TrainableModel | nn.Module]:
        return {"model": self.model, **self.modules}

    def _refuse_another_run(self, path: Path, state: Mapping[str, Any]) -> None:
        # The checkpoint's settings went through JSON, which turns tuples into lists.
        ours = json.loads(json.dumps(self.config.record())) | {"data": self.data}
        theirs = {**state.get("config", {}), "data": state.get("data")}
        for own in fields(self.config):
            if own.metadata["earlier_name"] in theirs:
                theirs[own.name] = theirs[own.metadata["earlier_name"]]
            if own.metadata["added_later"]:
                theirs.setdefault(own.name, own.default)
        differing = [
            f"{name} was {theirs.get(name)!r}, is {ours[name]!r}"
            for name in ours
            if theirs.get(name) != ours[name] and name not in self.may_change
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to another run ({'; '.join(differing)}): resume with the same settings and data, "
                "start over with restart, or choose another folder"
            )


def save_checkpoint(path: Path, *, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and `state` to `path` atomically.

    An interruption at any moment leaves the previous checkpoint as it was (see `spo_train.files`).

    Args:
        path: the checkpoint file; its folder is created if needed.
        tensors: named tensors of any dtype, shape and device (saved from the CPU, bit for bit).
        state: anything that JSON can hold; non-finite floats survive, tuples come back as lists.

    Raises:
        CheckpointError: nothing was written (disk full, folder not writable, ...); a previous checkpoint still stands.
        TypeError: `state` holds something that JSON cannot hold.
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
    """Return contiguous CPU tensors that share no memory: safetensors takes neither strides nor tied weights."""
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
