"""Which implementations the tests run: the CPU's backend at every SIMD level of this machine, the emulated CUDA
kernels, and, where there is a GPU, the backends that serve it.

The suite tests the compiled kernels. Where they are missing, importing the package or asking for its backend fails, and
so does the suite, unless SPO_BACKEND selects another backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Waiting threads sleep. Threads that spin make the tests many times slower while compilers use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Caches of the compiler may hold code that calls an op with an earlier schema.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import emulated
import torch
from background import Work, background, waits_for
from on_device import OnDevice
from oracle import ACTIVE, LEVELS
from repository import import_benchmarks

from spo_kernels import backends
from spo_kernels.backends import cpu, cuda

import_benchmarks()

# The oracle has its own tests. It is among the implementations only if it serves the CPU.
IMPLEMENTATIONS = [f"cpu-{level}" for level in LEVELS] if ACTIVE == "cpu" else [ACTIVE]
NO_CUDA_HEADERS = pytest.mark.skipif(emulated.cuda_include() is None, reason="needs the headers of a CUDA toolkit")
GPU_BACKENDS = [name for name in ("cuda", "triton") if torch.cuda.is_available() and name in backends.available()]
ON_GPU = [pytest.param(f"gpu-{name}", marks=pytest.mark.gpu) for name in GPU_BACKENDS]
LEVELS_OR_SKIP: list[Any] = [*LEVELS] or [pytest.param("", marks=pytest.mark.skip(reason=f"SPO_BACKEND={ACTIVE}"))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that wait for background work last."""
    items.sort(key=lambda item: bool(waits_for(item)))


@pytest.fixture(scope="session", autouse=True)
def background_work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    work = Work(request.session.items, tmp_path_factory)
    yield work
    work.close()


@background
def emulated_library(out: Path) -> Path:
    """The CUDA kernels' source, compiled for the CPU."""
    return emulated.build_library(out)


@pytest.fixture(scope="session")
def emulated_cuda(emulated_library: Path) -> backends.Backend:
    return cuda.CompiledOps("spo_kernels_emulated", emulated_library)


@pytest.fixture(params=[*IMPLEMENTATIONS, pytest.param("emulated_cuda", marks=NO_CUDA_HEADERS), *ON_GPU])
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """The functions of one implementation. A test of a SIMD level fails if rows ran at another level."""
    if request.param == "emulated_cuda":
        yield request.getfixturevalue("emulated_cuda")
        return
    name, _, level = request.param.partition("-")
    if name == "gpu":
        yield OnDevice(backends.get(level), level, "cuda")
        return
    if not level:
        yield backends.get(name)
        return
    control = cpu.load()
    before = control.simd_level()
    control.set_simd_level(level)
    control.reset_rows_executed()
    try:
        yield backends.get(name)
        others = {other: rows for other, rows in control.rows_executed().items() if other != level and rows}
        assert not others, f"at SIMD level {level} rows ran at {others}"
    finally:
        control.set_simd_level(before)


@pytest.fixture(params=LEVELS_OR_SKIP)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A SIMD level of the compiled kernels, selected, with the counters of rows at zero."""
    control = cpu.load()
    before = control.simd_level()
    control.set_simd_level(request.param)
    control.reset_rows_executed()
    yield request.param
    control.set_simd_level(before)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Two threads, so that work is split over rows, and the same seed for every test."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
