"""Every Triton kernel compiles for every GPU, in every configuration: without spills, and with loops within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from background import background
from repository import ROOT

from benchmarks.models.machine_code import GPUS, Loop

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# One process a group, since a test machine has two cores. cuda:90 compiles more than the others.
GROUPS = (("cuda:90", "cuda:80"), ("cuda:100", "cuda:120", "hip:gfx942"))

# Upper limits of the busiest pipe's time, as shares of the memory's time. Two steps a tile cost more instructions than
# four or eight, but an H100 is up to twice as fast with two (`row_config`). Nothing was measured on a B200. There the
# exponentials take 97 % of the memory's time, and the KL's instructions 118 %. The CUDA kernels are below that, because
# they compute a quarter of the exponentials by a polynomial.
SHARES = {"A100": 0.6, "H100": 0.65, "B200": 1.2}


@background
def compiled(out: Path) -> list[dict[str, Any]]:
    """The results of cross_compile.py for every target, from an empty cache."""
    command = [sys.executable, "-m", "benchmarks.models.cross_compile"]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(out),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    with ThreadPoolExecutor() as pool:
        runs = pool.map(
            lambda targets: subprocess.run(
                [*command, *targets], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
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
    of_rows = {"token_stats_fwd_kernel", "token_stats_bwd_kernel", "kl_loss_fwd_kernel", "mixture_kl_kernel"}
    assert kernels == of_rows | {"scale_kernel"}
    assert {result["factors"] for result in results} >= {0, 2}
    spilling = [result for result in results if result["spills"]]
    assert not spilling


def test_quotients_are_rounded_once(compiled: list[dict[str, Any]]) -> None:
    """If x / x is not 1, the KL of equal rows is not 0. The interpreter cannot show that: it divides exactly."""
    # The tanh of a softcap has a quotient of its own, which need not be rounded once.
    kl = [
        result
        for result in compiled
        if result["target"].startswith("cuda") and result["ref_dtype"] and result["factors"] < 2
    ]
    kinds = {kind for result in kl for kind in result["divisions"]}
    assert kinds == {"div.rn.f32", "div.rn.f64"}


def shares(compiled: list[dict[str, Any]], gpu: str, *, planted: bool) -> dict[tuple[str, bool, bool], float]:
    """The share of the memory's time that each loop over bfloat16 vectors needs, by kernel, reference and stores.

    Without transforms and other divergences. Beside the tanh of a softcap an element takes three special functions, 1.3
    to 2.9 times the memory's time.
    """
    target = f"cuda:{GPUS[gpu].arch.removeprefix('sm_')}"
    found: dict[tuple[str, bool, bool], float] = {}
    for result in compiled:
        is_planted = result["constants"].get("STEPS") == 1
        if result["factors"] or result["mixture"]:
            continue
        if result["target"] == target and result["dtype"] == "bf16" and is_planted == planted:
            for fields in result["loops"]:
                loop = Loop(**fields)
                key = (result["kernel"], result["ref_dtype"] is not None, loop.stores > 0)
                found[key] = max(found.get(key, 0), loop.share(GPUS[gpu])[0])
    return found


@pytest.mark.parametrize(("gpu", "most"), SHARES.items())
def test_loops_over_vectors_stay_within_their_share(compiled: list[dict[str, Any]], gpu: str, most: float) -> None:
    found = shares(compiled, gpu, planted=False)
    loops = {("token_stats_fwd_kernel", False, False), ("token_stats_fwd_kernel", True, False)}
    assert set(found) == loops | {("kl_loss_fwd_kernel", True, stores) for stores in (False, True)}
    assert {key: share for key, share in found.items() if share > most} == {}


def test_the_limit_of_loops_can_be_missed(compiled: list[dict[str, Any]]) -> None:
    (share,) = shares(compiled, "H100", planted=True).values()
    assert share > SHARES["H100"]
