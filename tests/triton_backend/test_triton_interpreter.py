"""Runs test_triton_ops.py under Triton's interpreter, in a process that selects it before anything imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from background import background

from spo_kernels import backends

pytest.importorskip("triton")


@background
def interpreted_tests(out: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "SPO_BACKEND": "triton"}
    tests = Path(__file__).with_name("test_triton_ops.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={out}", str(tests)]
    return subprocess.run(command, env=environment, cwd=tests.parents[2], capture_output=True, text=True, timeout=1200)


def test_ops_in_the_interpreter(interpreted_tests: subprocess.CompletedProcess[str]) -> None:
    assert interpreted_tests.returncode == 0, interpreted_tests.stdout + interpreted_tests.stderr
    assert "skipped" not in interpreted_tests.stdout, interpreted_tests.stdout


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor must be on a GPU.*got cpu"):
        backends.get("triton").scale_(torch.ones(2, 3), torch.ones(()))
