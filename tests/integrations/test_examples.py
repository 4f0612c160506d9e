"""The examples run as users run them: with the tiny model that they make, and with a model and a file of pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import make_rows, save_model

EXAMPLES = {"accelerate_loop": "accelerate", "lightning_spo": "lightning"}  # what each needs besides transformers


def run(example: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(EXAMPLES[example], reason=f"{EXAMPLES[example]} is not installed")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_loss_of_an_example_falls(example: str, tmp_path: Path) -> None:
    done = run(example, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 30: loss" in done.stdout and "in the last third" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_takes_a_model_and_pairs(example: str, tmp_path: Path) -> None:
    model, pairs = save_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    done = run(example, "--model", str(model), "--pairs", str(pairs), "--steps", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2: loss" in done.stdout and "step 3" not in done.stdout
    if example == "lightning_spo":
        (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
        options = ["--model", str(model), "--pairs", str(pairs), "--steps", "3", "--resume", str(checkpoint)]
        resumed = run(example, *options, folder=tmp_path)
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert "step 3: loss" in resumed.stdout and "step 2" not in resumed.stdout
