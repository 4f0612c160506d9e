"""What nvcc made of the CUDA kernels: no spills, few enough registers, and loops that memory can keep busy."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import emulated
import pytest
from background import background

from benchmarks.models import machine_code
from benchmarks.models.machine_code import GPUS, Loop, Resources
from spo_kernels.backends import cuda

LIBRARY = cuda.library_path()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="built without CUDA")

ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
OF_ROWS = ["kl_loss_fwd", "token_stats_fwd", "token_stats_bwd", "merge_splits", "mixture_kl"]
KERNELS = [*OF_ROWS, "kl_loss_cluster", "scale", "sum"]
# By whether a kernel computes in float64. With 80 registers three blocks fit a multiprocessor, with 128 two.
REGISTERS = {False: 80, True: 128}
SHARED_BYTES = 4096  # of a block, 1024 of them the system's from sm_90 on; too few to limit the number of blocks

# Upper limits of the busiest pipe's time, as shares of the memory's time. The KL's forward on a B200 issues 8.7
# instructions an element, and 0.8 would allow 7.
H100_SHARE, B200_SHARE, B200_KL_FORWARD_SHARE = 0.6, 0.8, 1.02
# The loops of kl_loss in clusters (sums, and gradient) move three vectors where those of kl_loss_fwd move five. On a
# B200 the instructions take longer than the memory.
CLUSTER_SHARE = {"H100": 0.8, "B200": 1.4}


@pytest.fixture(scope="module")
def resources() -> list[Resources]:
    assert LIBRARY is not None
    return list(machine_code.resources(LIBRARY))


@cache
def hot_loops(gpu: str) -> list[Loop]:
    assert LIBRARY is not None
    kernels = r"^(token_stats|kl_loss).*<bf16, bf16, (true, |false, |[01], )?256>"
    return list(machine_code.loops(LIBRARY, GPUS[gpu].arch, kernels))


def test_device_assertions_name_the_source_file_alone(tmp_path: Path) -> None:
    assert LIBRARY is not None
    machine_code.run(machine_code.tool("cuobjdump"), "-xelf", "all", LIBRARY.resolve(), cwd=tmp_path)
    cubins = [path.read_bytes() for path in tmp_path.glob("*.cubin")]
    named = {name for cubin in cubins for name in re.findall(rb"[\w./+ -]*row_kernels\.cuh", cubin)}
    assert named == {b"csrc/cuda/row_kernels.cuh"}


def over(loops: list[Loop], gpu: str, most: float) -> list[str]:
    return [f"{loop.kernel}: {loop.share(GPUS[gpu])}" for loop in loops if loop.share(GPUS[gpu])[0] > most]


def test_every_kernel_is_built_for_every_architecture(resources: list[Resources]) -> None:
    built = {(r.arch, kernel) for r in resources for kernel in KERNELS if r.kernel.startswith(f"{kernel}_kernel")}
    assert built >= {(arch, kernel) for arch in ARCHITECTURES for kernel in KERNELS}
    transformed = {(r.arch, r.kernel.split("_kernel")[0]) for r in resources if "Transformed" in r.kernel}
    assert transformed == {(arch, kernel) for arch in ARCHITECTURES for kernel in OF_ROWS}


def test_nothing_spills_and_blocks_run_side_by_side(resources: list[Resources]) -> None:
    assert [r for r in resources if r.spilled] == []
    assert [r for r in resources if r.registers > REGISTERS["double" in r.kernel] or r.shared > SHARED_BYTES] == []


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
def test_every_hot_loop_is_found(gpu: str) -> None:
    found = {(re.split("_kernel", loop.kernel)[0], loop.loads, loop.stores) for loop in hot_loops(gpu)}
    expected = {("token_stats_fwd", 2, 0), ("token_stats_bwd", 4, 4), ("token_stats_bwd", 4, 2)}
    assert found == expected | {("kl_loss_fwd", 2, 0), ("kl_loss_fwd", 4, 2)}


@pytest.mark.slow
def test_loops_leave_the_h100_bound_by_memory() -> None:
    assert over(hot_loops("H100"), "H100", H100_SHARE) == []


@pytest.mark.slow
def test_loops_leave_the_b200_bound_by_memory_but_for_the_kl_forward() -> None:
    def is_kl_forward(loop: Loop) -> bool:
        """The KL looks for new maxima in two tensors, the log-prob in one, so the KL has more exponentials a byte."""
        return loop.stores == 0 and loop.cycles["special"] > 26

    loops = hot_loops("B200")
    assert over([loop for loop in loops if is_kl_forward(loop)], "B200", B200_KL_FORWARD_SHARE) == []
    rest = [loop for loop in loops if not is_kl_forward(loop)]
    assert len(rest) >= 5
    assert over(rest, "B200", B200_SHARE) == []


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [*CLUSTER_SHARE])
def test_the_kernel_of_clusters_is_compiled_for_devices_that_have_them(gpu: str) -> None:
    assert LIBRARY is not None
    loops = list(machine_code.cluster_loops(LIBRARY, GPUS[gpu].arch, r"^kl_loss_cluster_kernel<bf16, "))
    assert sorted(loop.kernel for loop in loops) == [f"kl_loss_cluster_kernel<bf16, {n}>" for n in (256, 512)]
    assert over(loops, gpu, CLUSTER_SHARE[gpu]) == []


def test_kernels_of_clusters_are_empty_elsewhere(resources: list[Resources]) -> None:
    """The devices of sm_80 and sm_120 load these kernels and never run them."""
    registers = {(r.arch, r.registers > 16) for r in resources if r.kernel.startswith("kl_loss_cluster")}
    assert registers == {("sm_80", False), ("sm_90", True), ("sm_100", True), ("sm_120", False)}


@background
def planted_kernels(out: Path) -> Path | None:
    """None without nvcc."""
    include = emulated.cuda_include()
    nvcc = include and include.parent / "bin/nvcc"
    if nvcc is None or not nvcc.exists():
        return None
    source, target = out / "planted.cu", out / "planted.so"
    source.write_text(PLANTED)
    flags = ["-std=c++20", "-O3", "-arch=sm_100", "-shared", "-Xcompiler=-fPIC"]
    machine_code.run(nvcc, *flags, str(source), "-o", str(target))
    return target


def test_the_gates_can_fail(planted_kernels: Path | None) -> None:
    """A kernel with a third exponential an element, and one whose array is indexed at run time, are caught."""
    if planted_kernels is None:
        pytest.skip("no nvcc")
    spilling = [r.kernel.split("(")[0] for r in machine_code.resources(planted_kernels) if r.spilled]
    assert spilling == ["local_array"]
    loops = list(machine_code.loops(planted_kernels, "sm_100", "three_exponentials"))
    assert loops
    assert over(loops, "B200", B200_SHARE) != []


PLANTED = """
#include <cstdint>
__global__ void three_exponentials(const uint4* in, float* out, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const uint4 w = __ldcs(in + i);
    for (uint32_t word : {w.x, w.y, w.z, w.w})
      for (float x : {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)})
        sum += exp2f(x) + exp2f(x - 1.5f) * exp2f(2.5f * x);
  }
  out[threadIdx.x] = sum;
}
__global__ void local_array(float* x, int n) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = x[i * n];
  for (int i = 0; i < n; ++i) held[(i * 7 + threadIdx.x) % 64] += x[i];
  for (int i = 0; i < 64; ++i) x[i] = held[(i + threadIdx.x) % 64];
}
"""
