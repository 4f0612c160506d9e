"""The emulated CUDA kernels under the sanitizers and with planted bugs, and the errors that stop the program.

tests/test_ops.py checks the results of the kernels: ``emulated_cuda`` is a parameter of the fixture ``backend``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from background import background

from spo_kernels import backends
from spo_kernels.backends import cuda
from spo_kernels.reference import PLAIN, RowOptions

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
pytestmark = pytest.mark.skipif(emulated.cuda_include() is None, reason="needs the headers of a CUDA toolkit")

# Without optimization: these programs take longer to compile than to run.
ADDRESS = ["-O0", "-fsanitize=address"]
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run_program(out: Path, csrc: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile row_ops_emulated.cpp against ``csrc``, and run it."""
    program = out / "row_ops_emulated"
    include = ["-isystem", str(emulated.cuda_include()), f"-I{csrc}"]
    source = HERE / "row_ops_emulated.cpp"
    command = ["g++", *emulated.FLAGS, *include, *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def test_every_launch_is_legal_and_covers_each_element_once(tmp_path: Path) -> None:
    program = tmp_path / "launch_config"
    command = ["g++", "-std=c++20", "-O1", f"-I{CSRC}", str(HERE / "launch_config.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    word, _, tried = result.stdout.strip().partition(" ")
    assert (result.returncode, word) == (0, "ok"), result.stdout
    assert int(tried) > 10_000


@background
def sanitized_f32_bf16(out: Path) -> subprocess.CompletedProcess[str]:
    types = "SPO_TYPE(float,f32)SPO_TYPE(bf16,bf16)"
    return run_program(out, CSRC, *SANITIZE, f"-DSPO_TYPES={types}", "-DSPO_POLYNOMIAL_EXP=0")


@background
def sanitized_f16_f64(out: Path) -> subprocess.CompletedProcess[str]:
    types = "SPO_TYPE(f16,f16)SPO_TYPE(double,f64)"
    return run_program(out, CSRC, *SANITIZE, f"-DSPO_TYPES={types}", "-DSPO_POLYNOMIAL_EXP=0")


@pytest.mark.slow
def test_kernels_under_sanitizers(
    sanitized_f32_bf16: subprocess.CompletedProcess[str], sanitized_f16_f64: subprocess.CompletedProcess[str]
) -> None:
    for result in (sanitized_f32_bf16, sanitized_f16_f64):
        assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


CLUSTER, FIRST = "kl_loss_cluster.cuh", "mbarrier_wait(barriers + piece, 0)"
# File, text to replace, replacement, and a part of the message with which the program must then fail.
BUGS = {
    "missing barrier": (
        "online_sums.cuh",
        "    __syncthreads();\n    sum = of_warp[0];",
        "    sum = of_warp[0];",
        "off",
    ),
    "early return": (
        "online_sums.cuh",
        "    __syncthreads();\n    sum = of_warp[0];",
        "    if (threadIdx.x == 200) return sum;\n    __syncthreads();\n    sum = of_warp[0];",
        "not reached by all threads",
    ),
    "bytes not waited for": (CLUSTER, "mbarrier_wait(barriers + piece, parity);", "", "nobody waits"),
    "always the first phase": (CLUSTER, "mbarrier_wait(barriers + piece, parity)", FIRST, "deadlock"),
    "sums of blocks not waited for": (CLUSTER, "mbarrier_wait<true>(barrier, turn / 2 % 2);", "", "nobody waits"),
    "one place for the sums of blocks": (CLUSTER, "turn % 2 * kMaxCluster", "0", "off"),
    "copy before all lanes have read": (
        CLUSTER,
        "__syncwarp();  // every lane has read",
        "// every lane has read",
        "off",
    ),
    "blocks that have not begun": (CLUSTER, "cluster_sync();  // without", "// without", "has not begun"),
    "more bytes announced than copied": (CLUSTER, "2 * bytes", "3 * bytes", "deadlock"),
    "shuffle mask": ("online_sums.cuh", "0xffffffffu, s.sum", "0x0000ffffu, s.sum", "not in its mask"),
    "a softcap of the padding": (
        "row_reader.cuh",
        "        x[k] = -INFINITY;",
        "        x[k] = logit(x[k]);",
        "off",
    ),
    "padding left as it was": (
        "row_kernels.cuh",
        "  if (end == a.V) write_padding",
        "  if (false) write_padding",
        "off",
    ),
    "out of bounds": ("row_reader.cuh", "(first < E || first + 2 * E > V)", "first < E", "heap-buffer-overflow"),
    "misaligned vector": (
        "row_reader.cuh",
        "const unsigned shift = aligned ? 0 :",
        "const unsigned shift = 0 &",
        "misaligned",
    ),
}


def run_with_bug(out: Path, bug: str) -> subprocess.CompletedProcess[str]:
    name, right, wrong, _ = BUGS[bug]
    csrc = out / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / name
    text = path.read_text()
    assert text.count(right) == 1, "the line to break has changed"
    path.write_text(text.replace(right, wrong))
    return run_program(out, csrc, *ADDRESS, "-DSPO_TYPES=SPO_TYPE(float,f32)", "-w")


@background
def runs_with_bugs(out: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    return {bug: run_with_bug(out / str(i), bug) for i, bug in enumerate(BUGS)}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(runs_with_bugs: dict[str, subprocess.CompletedProcess[str]], bug: str) -> None:
    result = runs_with_bugs[bug]
    assert result.returncode != 0
    assert BUGS[bug][-1] in result.stdout + result.stderr


OUT_OF_RANGE = """
import sys, torch
from pathlib import Path
from spo_kernels.backends.cuda import CompiledOps
ops = CompiledOps("spo_kernels_emulated", Path(sys.argv[1]))
ops.token_stats_fwd(torch.randn(2, 65), torch.tensor([3, 65]), None, None, -100)
"""


def test_a_label_out_of_range_traps(emulated_library: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_RANGE, str(emulated_library)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0
    assert "labels must be in [0, V) or ignore_index" in result.stderr


def test_values_on_another_device_are_refused(emulated_cuda: backends.Backend) -> None:
    logits, elsewhere = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="labels must be on cpu like the logits, got meta"):
        emulated_cuda.token_stats_fwd(logits, elsewhere, None, None, -100)
    with pytest.raises(RuntimeError, match="row_weight must be on cpu like the logits, got meta"):
        emulated_cuda.kl_loss_fwd(logits, logits, elsewhere.float(), False)
    with pytest.raises(RuntimeError, match="dlse must be on cpu like the logits, got meta"):
        emulated_cuda.token_stats_bwd(
            None, None, logits, None, None, None, logits[:, 0], logits[:, :2], -100, False, elsewhere.float()
        )
    for options in (RowOptions(None, elsewhere.float()[:1, None]), RowOptions(None, None, elsewhere.float()[:1, None])):
        with pytest.raises(RuntimeError, match="transform must be on cpu like the logits, got meta"):
            emulated_cuda.token_stats_fwd(logits, None, None, None, -100, options)
    with pytest.raises(RuntimeError, match="scale must be on cpu like the logits, got meta"):
        emulated_cuda.scale_(logits, elsewhere[0].float())


def test_rows_are_not_split_where_results_must_be_deterministic(emulated_cuda: backends.Backend) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 40_000), torch.tensor([0, 1, 39_999])
    split = emulated_cuda.token_stats_fwd(logits[:1], labels[:1], None, None, -100)[0]
    torch.use_deterministic_algorithms(True)
    try:
        alone = emulated_cuda.token_stats_fwd(logits[:1], labels[:1], None, None, -100)[0]
        among = emulated_cuda.token_stats_fwd(logits, labels, None, None, -100)[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert alone[0] == among[0]
    torch.testing.assert_close(split, alone, rtol=0, atol=4e-6)
    splits_rows = torch.ops.spo_kernels_emulated.kl_loss_splits_rows
    odd = torch.randn(3, 40_001)  # not whole vectors, so these rows do not go to clusters
    assert splits_rows(odd, odd, False, *PLAIN)
    assert not splits_rows(odd, odd, True, *PLAIN)
    assert not splits_rows(logits, logits, False, *PLAIN)
    assert not splits_rows(logits, torch.randn(3, 40_008), False, *RowOptions(40_000))
    # Clusters take neither transforms nor columns after the vocabulary.
    factor = torch.full((1, 1), 0.5)
    for options in (RowOptions(39_992), RowOptions(None, factor), RowOptions(None, None, factor)):
        assert splits_rows(logits, logits, False, *options)


@pytest.mark.skipif(cuda.library_path() is None, reason="built without CUDA")
def test_the_cuda_library_loads_without_a_gpu_and_registers_every_op() -> None:
    cuda.load()
    for op in cuda.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spo_kernels_cuda::{op}", "CUDA")
