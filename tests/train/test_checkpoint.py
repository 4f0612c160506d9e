from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spo_train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"step": 7, "loss": 0.1 + 0.2, "none": None, "inf": float("inf"), "nested": {"list": [1, 2.5, "x"]}}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 4, generator=generator)
    return {
        "float": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), float("-inf")]),
        "rng": generator.get_state(),
        "transposed": shared.T,
        "slice": shared[2:4],
        "tied": shared,
    }


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_checkpoint(tmp_path / "run" / "checkpoint.safetensors", tensors=tensors, state=STATE)
    loaded, state = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert state == STATE
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_replaces_the_previous_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        save_checkpoint(path, tensors={"x": torch.full((3,), float(step))}, state={"step": step})
    assert load_checkpoint(path)[1] == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_checkpoint(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_file_is_an_error(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, tensors=some_tensors(), state=STATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
        load_checkpoint(path)


def test_a_flipped_bit_anywhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, tensors={"x": torch.arange(8.0), "y": torch.ones(3, dtype=torch.int64)}, state={"step": 31})
    good = path.read_bytes()
    # Spaces only pad the header. Every other byte of header and data counts.
    for position in [i for i, byte in enumerate(good) if byte != ord(" ")]:
        bad = bytearray(good)
        bad[position] ^= 0x02
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
            load_checkpoint(path)


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(2)}, str(path))
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(path)


def test_state_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "c", tensors={}, state={"generator": torch.Generator()})
    assert not list(tmp_path.iterdir())


def limit_file_size() -> None:
    # A file-size limit makes the kernel refuse the write half way, as a full disk does.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, tensors={"x": torch.ones(8)}, state={"step": 1})
    code = (
        "import sys, torch; from pathlib import Path; from spo_train.checkpoint import *\n"
        "try: save_checkpoint(Path(sys.argv[1]), tensors={'x': torch.ones(100_000)}, state={'step': 2})\n"
        "except CheckpointError as error: print(error); sys.exit(7)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limit_file_size, check=False
    )
    assert run.returncode == 7, run.stderr
    assert str(path) in run.stdout
    assert "previous checkpoint is untouched" in run.stdout
    assert load_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_kill_before_the_rename_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, tensors={"x": torch.ones(8)}, state={"step": 1})

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, tensors={"x": torch.zeros(8)}, state={"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)[1] == {"step": 1}
    save_checkpoint(path, tensors={"x": torch.zeros(8)}, state={"step": 3})
    assert load_checkpoint(path)[1] == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
