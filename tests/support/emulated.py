"""Builds csrc/cuda with g++ and the emulator, as torch ops on CPU tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from repository import ROOT

CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests/cuda"  # cuda_emulator.h

# The kernels call fma where they want it, so the compiler must not contract. Vectors alias their elements, which nvcc
# allows.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{EMULATOR}"]
FLAGS += ["-DSPO_CUDA_EMULATOR", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]


def cuda_include() -> Path | None:
    """The toolkit's headers, which declare vector types and half precision for the host too; None without a toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    found = (Path(home) / "include" for home in homes if home)
    return next((path for path in found if (path / "cuda_runtime.h").exists()), None)


def compile_objects(out: Path, flags: list[str]) -> list[str]:
    """Compile the kernels and launches, without torch, and the ops; return the object files."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    include = cuda_include()
    assert include is not None and kernels
    of_torch = ["-isystem", str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]

    def compile_object(source: Path) -> str:
        target = out / f"{source.stem}.o"
        more = ["-x", "c++"] if source in kernels else of_torch
        command = ["g++", *FLAGS, "-isystem", include, *flags, *more, "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_object, [*kernels, CSRC / "torch/ops_cuda.cpp"]))


def build_library(out: Path) -> Path:
    """A library with the ops of `spo_kernels.backends.cuda.SCHEMAS` in the namespace spo_kernels_emulated.

    SPO_EMULATOR_FLAGS adds to the compiler's flags; coverage.py sets it.
    """
    extra = os.environ.get("SPO_EMULATOR_FLAGS", "").split()
    flags = ["-O2", "-DSPO_POLYNOMIAL_EXP=1", *extra]
    objects = compile_objects(out, flags)
    torch_libraries = Path(torch.__file__).parent / "lib"
    library = out / "libspo_kernels_emulated.so"
    link = ["g++", "-shared", *extra, *objects, f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-o", library]
    subprocess.run(link, check=True)
    return library
