"""The build: the architectures of the CUDA kernels.

setup.py is imported, not run: no test here needs nvcc or builds a whole library.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

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
        ("5.2 6.0 7.0 7.5 8.0 9.0+PTX", "5.2"),  # as images of NVIDIA and of clusters export it
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
