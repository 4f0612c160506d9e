"""Builds the op libraries (torch's stable ABI, no Python) and the control module (pybind11, no torch) with ninja.

Environment: ``MAX_JOBS`` limits parallel compilation, ``CXX`` names the compiler, ``CXXFLAGS`` is appended,
``SPO_SANITIZE=1`` builds with ASan and UBSan. CUDA kernels are built where a toolkit is found (``CUDA_HOME``, nvcc on
``PATH``, /usr/local/cuda), for the architectures of ``TORCH_CUDA_ARCH_LIST``; ``SPO_CUDA=0`` leaves them out, and with
``SPO_CUDA=1`` a missing toolkit is an error. No GPU is needed to build them. Nothing is downloaded and no
``-march=native`` is used: each SIMD level is an object of its own, chosen when the library is loaded.

Linux and macOS build; x86-64 has all SIMD levels, every other architecture the portable one. The op libraries depend on
neither Python's version nor torch's. The control module does depend on Python's version, so a wheel does, too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY, CUDA_LIBRARY, CONTROL = "libspo_kernels.so", "libspo_kernels_cuda.so", "_control"

# The oldest torch that the op libraries run with: major, minor.
TORCH_TARGET = (2, 10)

# The kernels write out contraction into fma where they want it. If the compiler contracted too, the difference of equal
# logits would not be 0.
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
]
MACOS = sys.platform == "darwin"
# On Linux, symbols of static archives stay inside the library. If a compiler links libstdc++ statically and the library
# exported its copy, the loader would mix it with torch's copy, and throwing an error could crash. macOS has no static
# libc++, and its linker has no such flag.
LINK_FLAGS = ["-shared"] if MACOS else ["-shared", "-Wl,--exclude-libs,ALL"]
X86_LEVELS = {
    # g++ 12's own AVX-512 headers read an undefined vector on purpose.
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -Wno-uninitialized -Wno-maybe-uninitialized",
    "avx2": "-mavx2 -mfma -mf16c",
}

# No contraction, as above, and no fast-math: the kernels write out what may be approximate.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets"]
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
OLDEST_ARCHITECTURE = (8, 0)

# Names that TORCH_CUDA_ARCH_LIST may hold, as in torch.utils.cpp_extension. OLD_NAMES are architectures before 8.0.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
OLD_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")


def cuda_home() -> Path | None:
    """Root of the CUDA toolkit to build with; None to build without CUDA kernels."""
    wanted = os.environ.get("SPO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SPO_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return Path(home)
    if wanted == "1":
        raise SystemExit("SPO_CUDA=1, but no nvcc was found in CUDA_HOME, on PATH or in /usr/local/cuda")
    return None


def cuda_architectures() -> list[str]:
    """Architectures of TORCH_CUDA_ARCH_LIST as numbers, e.g. ``["8.0", "9.0a", "12.0+PTX"]``, each once."""
    value = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    found = [item for entry in re.split(r"[;,\s]+", value) if entry for item in architectures_of_entry(entry)]
    if not found:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST holds no architecture, got {value!r}")
    return list(dict.fromkeys(found))


def architectures_of_entry(entry: str) -> list[str]:
    """The architectures of one entry of TORCH_CUDA_ARCH_LIST: a number, a name or ``native``."""
    if entry == "native":
        return native_architectures()
    for name in (entry, entry.removesuffix("+PTX")):
        if name in NAMED_ARCHITECTURES:
            *others, last = NAMED_ARCHITECTURES[name].split()
            return [*others, last if name == entry else last.removesuffix("+PTX") + "+PTX"]
    number = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
    if (number and (int(number[1]), int(number[2])) < OLDEST_ARCHITECTURE) or entry.split("+")[0] in OLD_NAMES:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST must hold 8.0 or newer only, got {entry!r}: the CUDA kernels need 8.0 (Ampere); "
            "take the entry off the list, or set SPO_CUDA=0 to build without CUDA kernels"
        )
    if number is None:
        raise SystemExit(
            "TORCH_CUDA_ARCH_LIST must hold numbers (9.0, 9.0a, 12.0+PTX), native or the names "
            f"{', '.join(NAMED_ARCHITECTURES)}, got {entry!r}"
        )
    return [f"{number[1]}.{number[2]}{number[3]}{number[4] or ''}"]


def native_architectures() -> list[str]:
    """Architectures of the GPUs that the torch in the build environment sees."""
    import torch

    seen = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    if not seen:
        raise SystemExit("TORCH_CUDA_ARCH_LIST=native needs a GPU that torch sees, got none: give numbers such as 9.0")
    return [item for major, minor in seen for item in architectures_of_entry(f"{major}.{minor}")]


def cuda_fact() -> str:
    """Compiler and architectures of the CUDA kernels, which the installed package reports."""
    home = cuda_home()
    if home is None:
        return "not built"
    version = subprocess.run([home / "bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    return f"nvcc {release[1] if release else 'of unknown version'}, for {' '.join(cuda_architectures())}"


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def build_facts() -> dict[str, str]:
    """Macros with the facts of the build, which the installed package reports."""
    import torch

    version = subprocess.run([cxx(), "--version"], check=True, capture_output=True, text=True).stdout
    return {
        "SPO_COMPILER": version.splitlines()[0],
        "SPO_TORCH_VERSION": torch.__version__,
        "SPO_TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
        "SPO_CUDA_FACT": cuda_fact(),
    }


def gencode_flags() -> list[str]:
    """``-gencode`` of every architecture."""
    flags = []
    for item in cuda_architectures():
        number, _, ptx = item.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cpu_sources() -> dict[str, list[str]]:
    """Sources of csrc/cpu, each with the flags that it alone gets."""
    sources: dict[str, list[str]]
    sources = {f"csrc/cpu/{name}.cpp": [] for name in ("row_ops", "simd_level", "row_kernels_portable")}
    if platform.machine() == "aarch64":
        # g++ 12's vectorizer ends in an internal error here. The kernels are written in vectors and lose nothing.
        sources["csrc/cpu/row_kernels_portable.cpp"] = ["-fno-tree-vectorize"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources |= {f"csrc/cpu/row_kernels_{level}.cpp": flags.split() for level, flags in X86_LEVELS.items()}
    return sources


def torch_flags() -> tuple[list[str], list[str]]:
    """Compile flags and link flags of the torch in the build environment."""
    import torch

    root = Path(torch.__file__).parent
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:016x}"
    # libtorch.so loads libtorch_cuda.so, which has the stream function that ops_cuda.cpp refers to weakly. No strong
    # symbol needs libtorch.so, and Ubuntu's linker drops such libraries by default. ld64 keeps every library.
    libraries = ["-ltorch", "-ltorch_cpu"]
    if not MACOS:
        libraries = ["-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]
    link = [f"-L{root / 'lib'}", *libraries]
    return [target, *system_headers(root / "include")], link


def shared_name(library: str) -> str:
    """The flag for the name by which the loader finds a library of this package."""
    return f"-Wl,-install_name,@rpath/{library}" if MACOS else f"-Wl,-soname,{library}"


def beside_library(package: Path) -> list[str]:
    """Link flags of the control module, which finds the op library in its own folder."""
    if MACOS:  # symbols of Python's C interface come from the interpreter
        return [str(package / LIBRARY), "-Wl,-rpath,@loader_path", "-undefined", "dynamic_lookup"]
    return [f"-L{package}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN"]


def system_headers(folder: str | Path) -> list[str]:
    """Flags for headers in this folder. Error messages name them relative to it, without paths of the build machine."""
    return ["-isystem", str(folder), f"-ffile-prefix-map={folder}/="]


def shell(words: list[str]) -> str:
    """A command line for a ninja file: quoted for the shell, and with ``$`` as ninja wants it."""
    return shlex.join(words).replace("$", "$$")


class NinjaBuild(build_ext):
    """Compile and link the op libraries and the control module; incremental, because ninja tracks the headers."""

    def run(self) -> None:
        package = ROOT / "spo_kernels" if self.inplace else Path(self.build_lib).resolve() / "spo_kernels"
        # setuptools gives an editable build a temporary folder, in which nothing would be incremental.
        build = ROOT / "build/editable" if self.inplace else Path(self.build_temp).resolve()
        # ninja does not see that a compiler or torch was replaced: each combination has a folder of its own.
        build /= f"{zlib.crc32(repr(build_facts()).encode()):08x}"
        package.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        self.write_ninja_file(build / "build.ninja", package)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), *jobs], check=True)

    def write_ninja_file(self, path: Path, package: Path) -> None:
        import pybind11
        from ninja import ninja_syntax

        compiler = cxx()
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        if os.environ.get("SPO_SANITIZE") == "1":
            extra += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
        torch_compile, torch_link = torch_flags()
        python = [f"-D{name}={c_string(value)}" for name, value in build_facts().items()]
        python += [*system_headers(sysconfig.get_paths()["include"]), *system_headers(pybind11.get_include())]
        control = package / (CONTROL + sysconfig.get_config_var("EXT_SUFFIX"))

        # Label errors and device assertions name a source file relative to the repository.
        own_sources = f"-ffile-prefix-map={ROOT}/="
        common = shell([*COMMON_FLAGS, own_sources])

        with path.open("w") as file:
            writer = ninja_syntax.Writer(file)
            writer.rule(
                "compile",
                f"{shell([compiler])} -MMD -MF $out.d {common} $flags {shell(extra)} -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            writer.rule("link", f"{shell([compiler, *LINK_FLAGS, *extra])} $in $flags -o $out")

            def compile_object(source: str, flags: list[str]) -> str:
                out = source.replace("/", "_") + ".o"
                writer.build(out, "compile", str(ROOT / source), variables={"flags": shell(flags)})
                return out

            objects = [compile_object(source, flags) for source, flags in cpu_sources().items()]
            objects.append(compile_object("csrc/torch/ops_cpu.cpp", torch_compile))
            link = [*torch_link, shared_name(LIBRARY), "-pthread"]
            writer.build(str(package / LIBRARY), "link", objects, variables={"flags": shell(link)})
            (package / CUDA_LIBRARY).unlink(missing_ok=True)  # left by an earlier build in place
            if home := cuda_home():
                nvcc = [str(home / "bin/nvcc"), "-ccbin", compiler, *NVCC_FLAGS, *gencode_flags()]
                nvcc.append(f'-Xcompiler="{own_sources}"')  # nvcc takes an unquoted comma or space as the flag's end
                writer.rule("nvcc", f"{shell(nvcc)} -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
                objects = []
                for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                    objects += writer.build(f"{source.stem}.cuda.o", "nvcc", str(source))
                include = system_headers(home / "include")
                objects.append(compile_object("csrc/torch/ops_cuda.cpp", [*torch_compile, *include]))
                link = [*torch_link, f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-pthread"]
                link.append(shared_name(CUDA_LIBRARY))
                writer.build(str(package / CUDA_LIBRARY), "link", objects, variables={"flags": shell(link)})
            objects = [compile_object(f"csrc/python/{name}.cpp", python) for name in ("control", "bandwidth_probe")]
            link = {"flags": shell([*beside_library(package), "-pthread"])}
            writer.build(str(control), "link", objects, implicit=str(package / LIBRARY), variables=link)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "spo_kernels"
        libraries = [LIBRARY, CUDA_LIBRARY] if cuda_home() else [LIBRARY]
        return [str(package / name) for name in (*libraries, CONTROL + sysconfig.get_config_var("EXT_SUFFIX"))]


def c_string(text: str) -> str:
    """A C string literal. Double quotes in the text become single quotes."""
    return '"' + text.replace('"', "'") + '"'


setuptools.setup(
    ext_modules=[setuptools.Extension("spo_kernels._control", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
