"""The compiled library: its undefined symbols and dependencies, and its kernels under the sanitizers."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from background import background

from spo_kernels.backends import cpu, cuda
from spo_kernels.reference import PLAIN

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc/cpu"

# torch's stable C interface, and symbols that every Linux with a C++ runtime has.
ALLOWED_SYMBOLS = re.compile(
    r"aoti_torch_\w+|torch_\w+"  # torch's stable shim
    r"|_Z(NK?[RO]?S|S|T[ISV]|nwm|dlPv|na|da)\w*|_ZTVN10__cxxabiv1\w+|__cxa_\w+|__gxx_personality_v0"  # libstdc++
    r"|_Unwind_Resume"
    r"|(exp|exp2|log|log2|tanh|fmax)f?|mem(cpy|move|set)|strcmp|strlen|pthread_\w+|__libc_single_threaded|__stack_chk_fail"
    r"|__tls_get_addr|__gmon_start__|_ITM_\w+|__cpu_model|__cpu_indicator_init|abort"
)


@pytest.fixture(scope="module")
def library() -> Path:
    path = cpu.library_path()
    assert path is not None, "the compiled kernels are missing"
    return path


def test_undefined_symbols_are_stable(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    symbols = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not {symbol for symbol in symbols if not ALLOWED_SYMBOLS.fullmatch(symbol)}


_Z = torch.randn(2, 5)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    {
        "dtype of labels": (
            "token_stats_fwd",
            (_Z, _Z[:, 0].int(), None, None, -100, False),
            "labels must be int64, got int32",
        ),
        "dtype of mask": ("token_stats_fwd", (_Z, None, _Z, _Z[:, 0], -100, False), "mask must be bool, got float32"),
        "dtype of weight": ("kl_loss_fwd", (_Z, _Z, _Z[:, 0].half()), "row_weight must be float32, got float16"),
        "dtype of logits": (
            "token_stats_fwd",
            (_Z.int(), None, None, None, -100, False),
            "logits must be float32, bfloat16, float16 or float64, got int32",
        ),
        "dtype of scale": (
            "scale_",
            (_Z.bfloat16(), torch.ones((), dtype=torch.float64)),
            "scale must be float32 for a tensor in bfloat16, got float64",
        ),
        "number of weights": (
            "kl_loss_fwd",
            (_Z, _Z, torch.ones(3)),
            "row_weight must have 2 elements for logits of 2 rows, got 3",
        ),
        "shape of reference": (
            "kl_loss_fwd",
            (_Z, _Z[:, 1:], None),
            "ref_logits must be [2, 5] like logits, got [2, 4]",
        ),
        "dtype of reference": (
            "kl_loss_fwd",
            (_Z, _Z.double(), None),
            "ref_logits must be float64 exactly when logits are, got float64 for logits in float32",
        ),
    }.values(),
)
def test_errors_say_what_an_argument_must_be_and_what_came(
    op: str, arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops.spo_kernels, op)(*arguments, *(() if op == "scale_" else PLAIN))


@pytest.mark.skipif(cuda.library_path() is None, reason="built without CUDA")
def test_the_cuda_library_depends_on_the_library_with_the_stream_function() -> None:
    """The stream function is a weak symbol: without libtorch.so the library links and loads, and every call fails."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    path = cuda.library_path()
    assert path is not None
    listing = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(re.findall(r"NEEDED.*\[(.+)\]", listing))


# torch's headers are the same on every platform. .ci/run names a folder with the headers of the oldest supported torch.
HEADERS = {"installed": Path(torch.__file__).parent / "include", "oldest": os.environ.get("SPO_OLDEST_TORCH_HEADERS")}


@pytest.mark.parametrize("source", ["ops_cpu.cpp", "ops_cuda.cpp"])
@pytest.mark.parametrize("torch_version", HEADERS)
def test_sources_are_legal_with_the_headers_of_torch(torch_version: str, source: str) -> None:
    """Headers before 2.13 lack TORCH_VERSION_2_13_0, which must not choose code that only 2.13 has."""
    headers, cuda_headers = HEADERS[torch_version], emulated.cuda_include()
    if headers is None:
        pytest.skip("SPO_OLDEST_TORCH_HEADERS is not set")
    if source == "ops_cuda.cpp" and cuda_headers is None:
        pytest.skip("needs the headers of a CUDA toolkit")
    include = ["-isystem", headers, *(["-isystem", cuda_headers] if cuda_headers else [])]
    flags = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(["g++", *flags, *include, ROOT / "csrc/torch" / source], check=True, timeout=300)


def setup_constant(name: str) -> dict[str, str]:
    """The value of a constant of setup.py, so that flags are written in one place."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def compile_object(source: Path, out: Path, flags: list[str]) -> str:
    subprocess.run(["g++", "-std=c++20", *flags, "-c", source, "-o", out], check=True)
    return str(out)


SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]


@background
def sanitized_levels(out: Path) -> list[str]:
    """The object of each SIMD level, with the flags of setup.py and the sanitizers."""
    levels = {"portable": ""}
    if platform.machine() == "x86_64":
        levels |= setup_constant("X86_LEVELS")
    return [
        compile_object(CSRC / f"row_kernels_{level}.cpp", out / f"{level}.o", [*SANITIZE, *extra.split()])
        for level, extra in levels.items()
    ]


@pytest.mark.slow
def test_simd_objects_share_no_code(sanitized_levels: list[str]) -> None:
    # The linker keeps one copy of a weak function. Outside a level's namespace, all levels would share that copy, which
    # may use instructions that this CPU lacks.
    for path in sanitized_levels:
        level = Path(path).stem
        listing = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True)
        weak = [line for line in listing.stdout.splitlines() if re.match(r"\w* [Wu] ", line)]
        assert weak
        assert [line for line in weak if f"spo::cpu::{level}::" not in line] == []


@pytest.mark.slow
def test_row_ops_under_sanitizers(sanitized_levels: list[str], tmp_path: Path) -> None:
    sources = [CSRC / "row_ops.cpp", CSRC / "simd_level.cpp", Path(__file__).parent / "native/row_ops_sanitized.cpp"]
    objects = [compile_object(source, tmp_path / f"{source.stem}.o", SANITIZE) for source in sources]
    program = tmp_path / "row_ops_sanitized"
    subprocess.run(["g++", *SANITIZE, *objects, *sanitized_levels, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"ok (\w+)", result.stdout) == cpu.load().simd_levels()
