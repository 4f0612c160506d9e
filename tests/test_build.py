"""The build: architectures of the CUDA kernels, paths with a space, contents of libraries and sdist, versions.

Most tests import setup.py instead of running it, and so need no nvcc.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import spo_kernels
from spo_kernels.backends import cpu, cuda

ROOT = Path(__file__).resolve().parent.parent


def imported_setup(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_under_test", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    return imported_setup(ROOT / "setup.py", monkeypatch)


@pytest.mark.parametrize(
    ("value", "architectures"),
    [
        ("9.0", ["9.0"]),
        ("90", ["9.0"]),
        ("9.0a", ["9.0a"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 9.0", ["8.0", "9.0"]),
        ("8.0, 9.0,", ["8.0", "9.0"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("Ampere;8.0", ["8.0", "8.6+PTX"]),
        ("Ampere+Tegra", ["8.7"]),
        ("Ada", ["8.9+PTX"]),
        ("Hopper", ["9.0+PTX"]),
        ("Hopper+PTX", ["9.0+PTX"]),
        ("Ampere+Tegra+PTX", ["8.7+PTX"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"]),
        ("Blackwell+Tegra", ["11.0"]),
        ("8.0 Hopper", ["8.0", "9.0+PTX"]),
        ("", ["8.0", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_architectures(setup: Any, value: str, architectures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert setup.cuda_architectures() == architectures


@pytest.mark.parametrize(
    "value", ["8.0;9.0+PTX", "8.0 9.0a", "Ampere", "Ada", "Hopper", "Ampere+Tegra", "Ampere Hopper"]
)
def test_architectures_are_those_that_torch_reads(setup: Any, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert sorted(setup.gencode_flags()) == sorted(cpp_extension._get_cuda_arch_flags())


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        ("7.5", "7.5"),
        ("75", "75"),
        ("7.5+PTX", "7.5+PTX"),
        ("5.2 6.0 7.0 7.5 8.0 9.0+PTX", "5.2"),  # exported by images of NVIDIA and of computing clusters
        ("8.0;7.5", "7.5"),
        ("Hopper,Turing", "Turing"),
        ("Volta+Tegra", "Volta+Tegra"),
    ],
)
def test_architectures_before_8_0_are_one_clear_line(
    setup: Any, value: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    with pytest.raises(SystemExit) as refused:
        setup.gencode_flags()
    message = str(refused.value)
    assert message.startswith(f"TORCH_CUDA_ARCH_LIST must hold 8.0 or newer only, got {entry!r}")
    assert "SPO_CUDA=0" in message and "\n" not in message


@pytest.mark.parametrize("entry", ["9", "sm_90", "9.0+ptx", "hopper", "9.0b", "Rubin"])
def test_an_unreadable_architecture_is_named(setup: Any, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    with pytest.raises(
        SystemExit, match=rf"^TORCH_CUDA_ARCH_LIST must hold numbers .* Hopper.*, got {re.escape(repr(entry))}$"
    ):
        setup.gencode_flags()


def test_a_list_of_separators_holds_no_architecture(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ; ")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST holds no architecture, got ' ; '"):
        setup.gencode_flags()


@pytest.mark.parametrize(
    ("capabilities", "architectures"), [([(9, 0), (8, 0), (9, 0)], ["8.0", "9.0"]), ([(7, 5)], None), ([], None)]
)
def test_native_architectures(
    setup: Any,
    capabilities: list[tuple[int, int]],
    architectures: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    if architectures is not None:
        assert setup.cuda_architectures() == architectures
        return
    with pytest.raises(SystemExit, match=r"got '7\.5'" if capabilities else "needs a GPU that torch sees"):
        setup.cuda_architectures()


@pytest.mark.slow
def test_error_messages_are_complete_with_a_static_libstdcxx(tmp_path: Path) -> None:
    """Some compilers link libstdc++ statically. The loader must not mix that copy with the copy that torch loads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "spo_kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = {"CXXFLAGS": "-static-libstdc++", "SPO_CUDA": "0", "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=os.environ | flags, check=True, capture_output=True, timeout=600)
    program = (
        "import torch, spo_kernels\n"
        "print(spo_kernels.__file__)\n"
        "logits = torch.randn(2, 5)\n"
        "try:\n"
        "    inputs = logits, logits[:, 0].int(), None, None, -100, False, None, None, None, 0.0\n"
        "    torch.ops.spo_kernels.token_stats_fwd(*inputs)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(str(tmp_path)), done
    assert re.search(r"tensor_args\.h:\d+, labels must be int64, got int32", done.stdout), done


@pytest.fixture
def spaced_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ninja file of a build in which every path has spaces, with a fake CUDA toolkit."""
    root, build, toolkit = (tmp_path / name for name in ("a tree b", "a build b", "a toolkit b"))
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    build.mkdir()
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").touch()
    nvcc = toolkit / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("SPO_CUDA", "1")
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    for name in ("TORCH_CUDA_ARCH_LIST", "CXX", "CXXFLAGS", "SPO_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    module = imported_setup(root / "setup.py", monkeypatch)
    module.NinjaBuild(setuptools.Distribution()).write_ninja_file(build / "build.ninja", root / "spo_kernels")
    return build


def ninja(build: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ninja", "-C", str(build), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_a_path_with_a_space_is_one_word_of_every_command(spaced_build: Path) -> None:
    root, toolkit = (spaced_build.parent / name for name in ("a tree b", "a toolkit b"))
    lines = [line for line in ninja(spaced_build, "-t", "commands").splitlines() if not line.startswith("ninja: ")]
    commands = [shlex.split(line) for line in lines]
    words = {word for command in commands for word in command}
    assert not [word for word in words if re.match(r"(tree|build|toolkit|b)\b", word)], "a path is cut at its space"
    sources = [
        "cpu/row_ops.cpp",
        "torch/ops_cpu.cpp",
        "cuda/row_ops_f32.cu",
        "torch/ops_cuda.cpp",
        "python/control.cpp",
    ]
    assert {str(root / "csrc" / source) for source in sources} <= words
    assert {f"-L{root / 'spo_kernels'}", f"-L{toolkit / 'lib64'}", str(toolkit / "include")} <= words
    assert {str(toolkit / "bin/nvcc"), f'-Xcompiler="-ffile-prefix-map={root}/="'} <= words
    assert str(root / "spo_kernels/libspo_kernels_cuda.so") in words
    assert "-Wl,-rpath,$ORIGIN" in words


def test_a_build_in_a_folder_with_a_space_is_incremental(spaced_build: Path) -> None:
    target = "csrc_cpu_simd_level.cpp.o"
    ninja(spaced_build, target)
    assert (spaced_build / target).stat().st_size > 0
    assert "no work to do" in ninja(spaced_build, target)
    (spaced_build.parent / "a tree b/csrc/cpu/simd_level.h").touch()
    assert "no work to do" not in ninja(spaced_build, "-n", target), "the header is not among what ninja tracks"


LIBRARIES = [path for path in (cpu.library_path(), cuda.library_path()) if path is not None]
if LIBRARIES:
    LIBRARIES.append(Path(str(cpu.load().__file__)))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_libraries_do_not_name_folders_of_the_build_machine(library: Path) -> None:
    content = library.read_bytes()
    assert str(ROOT).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    sources = set(re.findall(rb"[\w./+ -]*\.(?:cpp|cuh|cu|h)\b", content))
    assert not [path for path in sources if path.startswith(b"/")]
    if library.stem == "libspo_kernels":
        assert b"csrc/torch/ops_cpu.cpp" in content


@pytest.mark.skipif(not LIBRARIES, reason="the compiled kernels were not built")
def test_the_stub_has_the_functions_of_the_control_module() -> None:
    control = cpu.load()
    stub = ast.parse((ROOT / "spo_kernels/_control.pyi").read_text())
    declared = {
        node.name: [argument.arg for argument in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    signatures = {name: getattr(control, name).__doc__.splitlines()[0] for name in dir(control) if name[0] != "_"}
    assert declared == {name: re.findall(r"(\w+): ", signature) for name, signature in signatures.items()}


@pytest.mark.skipif(not LIBRARIES, reason="the compiled kernels were not built")
def test_a_label_error_names_the_source_file_alone() -> None:
    with pytest.raises(RuntimeError, match="labels must be in") as refused:
        cpu.token_stats_fwd(torch.zeros(1, 4), torch.tensor([4]), None, None, -100)
    assert re.search(r"(^|[ ,(])csrc/torch/ops_cpu\.cpp:\d+", str(refused.value)), refused.value


def test_the_version_stands_in_one_place() -> None:
    assert importlib.metadata.version("spo_kernels") == spo_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", spo_kernels.__version__)
    assert not re.search(
        r"^version\b", (ROOT / "pyproject.toml").read_text().split("[project.optional")[0], re.MULTILINE
    )
    assert "version=" not in (ROOT / "setup.py").read_text()
    assert f"\nversion: {spo_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_ci_and_pre_commit_have_the_same_versions_of_the_formatters() -> None:
    ci = dict(re.findall(r'"(ruff|clang-format)==([\d.]+)"', (ROOT / ".ci/run").read_text()))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pre_commit = dict(re.findall(r"/(?:mirrors-)?(ruff|clang-format)(?:-pre-commit)?\n +rev: v([\d.]+)\n", hooks))
    assert ci.keys() == {"ruff", "clang-format"}
    assert pre_commit == ci


def test_the_sdist_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "*.so", "__pycache__", "build", "dist", "out", "venv*")
    shutil.copytree(ROOT, tree, ignore=left_out)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert archive.name == f"spo_kernels-{spo_kernels.__version__}.tar.gz"
    for folder in ("csrc", "tests", "spo_kernels", "python"):
        needed = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
        needed -= {name for name in needed if ".egg-info/" in name}
        assert needed <= held, needed - held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "benchmarks/__main__.py"} <= held
    assert not [name for name in held if name.endswith((".png", ".so", ".pyc"))]
