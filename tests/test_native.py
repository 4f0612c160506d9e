"""The compiled library itself: what it links against, and its kernels under the sanitizers."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from background import background

from spo_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc/cpu"

# torch only through its stable C interface; the rest is what every Linux with a C++ runtime has.
ALLOWED_SYMBOLS = re.compile(
    r"aoti_torch_\w+|torch_\w+"  # torch's stable shim
    r"|_Z(NK?[RO]?S|S|T[ISV]|nwm|dlPv|na|da)\w*|_ZTVN10__cxxabiv1\w+|__cxa_\w+|__gxx_personality_v0"  # libstdc++
    r"|_Unwind_Resume"
    r"|(exp|exp2|log|log2|fmax)f?|mem(cpy|move|set)|strcmp|strlen|pthread_\w+|__libc_single_threaded|__stack_chk_fail"
    r"|__gmon_start__|_ITM_\w+|__cpu_model|__cpu_indicator_init|clock_gettime|abort"
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


def setup_constant(name: str) -> dict[str, str]:
    """A literal of setup.py, so that the flags stand in one place."""
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
    # A weak function outside a level's own namespace is one copy for all levels, compiled for whichever the linker met.
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
