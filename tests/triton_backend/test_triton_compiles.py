"""Every Triton kernel compiles for every GPU family, in every configuration, without spilling a register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# One process each: a test machine has two cores, and cuda:90 compiles more than the others.
GROUPS = (("cuda:90", "cuda:80"), ("cuda:100", "cuda:120", "hip:gfx942"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What cross_compile.py says of every target, from an empty cache."""
    program = Path(__file__).with_name("cross_compile.py")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    with ThreadPoolExecutor() as pool:
        runs = pool.map(
            lambda targets: subprocess.run(
                [sys.executable, str(program), *targets], env=environment, capture_output=True, text=True, timeout=600
            ),
            GROUPS,
        )
    lines = []
    for run in runs:
        assert run.returncode == 0, run.stderr
        lines += run.stdout.splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("target", [target for group in GROUPS for target in group])
def test_kernels_compile_without_spills(compiled: list[dict[str, Any]], target: str) -> None:
    results = [result for result in compiled if result["target"] == target]
    kernels = {result["kernel"] for result in results}
    assert kernels == {"token_stats_fwd_kernel", "token_stats_bwd_kernel", "kl_loss_fwd_kernel", "scale_kernel"}
    spilling = [result for result in results if result["spills"]]
    assert not spilling
