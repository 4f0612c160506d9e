"""Backend selection and its errors, and that the installed library is what runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from oracle import ACTIVE, LEVELS
from torch._subclasses.fake_tensor import FakeTensorMode

import spo_kernels
from spo_kernels import backends
from spo_kernels.backends import cpu

PACKAGE = Path(backends.__file__).parent.parent
needs_kernels = pytest.mark.skipif(not LEVELS, reason=f"SPO_BACKEND={ACTIVE}")


def python(*args: str, at: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process. No variable but those given here selects a backend; ``at`` is first on the path."""
    ours = ("SPO_BACKEND", "SPO_SIMD", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in ours} | environment
    if at is not None:
        env["PYTHONPATH"] = str(at)
    command = [sys.executable, *args]
    # Outside the repository's root, whose unbuilt tree would come before the installed package.
    cwd = at or tempfile.gettempdir()
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


CALL = "import torch, spo_kernels as s; print(s.token_logps(torch.zeros(1, 4), torch.tensor([0])).exp().item()); "


def test_the_suite_runs_on_what_was_asked_for() -> None:
    """Without SPO_BACKEND the suite runs on the compiled kernels, never silently on another backend."""
    assert backends.active("cpu") == (os.environ.get("SPO_BACKEND") or "cpu")


@needs_kernels
def test_the_installed_library_is_what_ran() -> None:
    path = cpu.library_path()
    assert path is not None
    assert path.parent == PACKAGE
    assert str(path) in {str(Path(loaded)) for loaded in torch.ops.loaded_libraries}
    control = cpu.load()
    assert Path(str(control.__file__)).parent == PACKAGE
    control.reset_rows_executed()
    spo_kernels.token_logps(torch.randn(3, 9), torch.tensor([1, 2, 3]))
    assert control.rows_executed()[control.simd_level()] == 3


def test_available_and_get() -> None:
    assert "reference" in backends.available()
    assert "cpu" in backends.available() or ACTIVE != "cpu"
    for name in ("reference", ACTIVE):
        backend = backends.get(name)
        for function in ("token_stats_fwd", "token_stats_bwd", "kl_loss_fwd", "scale_"):
            assert callable(getattr(backend, function))


def test_unknown_names_and_devices() -> None:
    with pytest.raises(ValueError, match=r"name must be one of cpu, .*reference, got 'sycl'"):
        backends.get("sycl")
    with pytest.raises(RuntimeError, match="no backend for meta"):
        backends.active("meta")
    assert backends.selection("meta").backend is None
    chosen = backends.selection("cpu")
    assert chosen.backend == ACTIVE
    assert ("SPO_BACKEND" if os.environ.get("SPO_BACKEND") else "default") in chosen.reason


def test_spo_backend_selects() -> None:
    show = CALL + "print(s.backends.active('cpu'), s.backends.active('cuda'), s.backends.selection('cpu').reason)"
    ran = python("-c", show, SPO_BACKEND="reference")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["0.25", "reference", "reference", "SPO_BACKEND=reference"]


def test_spo_backend_of_an_unknown_name_is_an_error() -> None:
    ran = python("-c", CALL, SPO_BACKEND="sycl")
    assert ran.returncode != 0
    assert "ImportError: SPO_BACKEND must be one of cpu, cuda, triton, reference, got 'sycl'" in ran.stderr


@needs_kernels
def test_an_empty_spo_backend_is_the_default() -> None:
    ran = python("-c", CALL + "print(s.backends.active('cpu'))", SPO_BACKEND="")
    assert ran.stdout.split() == ["0.25", "cpu"], ran.stderr


@needs_kernels
def test_triton_does_not_take_the_cpu_without_its_interpreter() -> None:
    ran = python("-c", CALL + "print(s.backends.active('cpu'), s.backends.active('cuda'))", SPO_BACKEND="triton")
    if "triton" in backends.available():
        assert ran.stdout.split() == ["0.25", "cpu", "triton"], ran.stderr
    else:
        assert "SPO_BACKEND=triton was asked for, but" in ran.stderr


@needs_kernels
@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_asking_for_cuda_where_it_is_not_available_is_an_error() -> None:
    ran = python("-c", CALL, SPO_BACKEND="cuda")
    assert ran.returncode != 0
    assert "ImportError: SPO_BACKEND=cuda was asked for, but " in ran.stderr
    with pytest.raises(RuntimeError, match="backend cuda is not available"):
        backends.get("cuda")


@needs_kernels
@pytest.mark.parametrize("level", ["portable", "sse9"])
def test_spo_simd(level: str) -> None:
    show = CALL + "from spo_kernels.backends import cpu; print(cpu.load().simd_level())"
    ran = python("-c", show, SPO_SIMD=level)
    if level in LEVELS:
        assert ran.stdout.split() == ["0.25", level], ran.stderr
    else:
        assert ran.returncode != 0
        assert level in ran.stderr.splitlines()[-1]
        assert "portable" in ran.stderr.splitlines()[-1], "the error should list what there is"


@pytest.fixture
def unbuilt_tree(tmp_path: Path) -> Path:
    """The package's Python files, as in a fresh checkout."""
    shutil.copytree(PACKAGE, tmp_path / "spo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_importing_an_unbuilt_tree_says_so(unbuilt_tree: Path) -> None:
    ran = python("-c", CALL, at=unbuilt_tree)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), ran.stderr
    assert "built" in last
    assert "pip install" in last, "the error should say what to do"


def test_an_unbuilt_tree_runs_the_reference_when_asked(unbuilt_tree: Path) -> None:
    ran = python("-c", CALL + "print(s.__file__)", at=unbuilt_tree, SPO_BACKEND="reference")
    assert ran.stdout.split() == ["0.25", str(unbuilt_tree / "spo_kernels" / "__init__.py")], ran.stderr


def test_asking_for_kernels_that_were_not_built_is_an_error(unbuilt_tree: Path) -> None:
    ran = python("-c", CALL, at=unbuilt_tree, SPO_BACKEND="cpu")
    assert ran.returncode != 0
    assert ran.stderr.strip().splitlines()[-1].startswith("ImportError: ")


def test_env_prints_backends_and_reasons() -> None:
    ran = python("-m", "spo_kernels.env", SPO_BACKEND=os.environ.get("SPO_BACKEND", ""))
    assert ran.returncode == 0, ran.stderr
    for name in ("cpu", "cuda", "triton", "reference"):
        assert name in ran.stdout
    assert torch.__version__ in ran.stdout
    assert backends.selection("cuda").reason in ran.stdout
    for level in LEVELS:
        assert level in ran.stdout


NO_LOOK_UP = """
import os, pathlib, torch
torch.version.cuda = "13.0"
import spo_kernels
from spo_kernels import backends, reference
backends.cuda.load = lambda: reference  # stands in for kernels that need a GPU
key = torch._C.DispatchKeySet(torch._C.DispatchKey.{key})
call = lambda: torch.ops.spo_kernels.token_stats_fwd.default.redispatch(
    key, torch.zeros(1, 4), torch.tensor([0]), None, None, -100, False, None, None, None, 0.0
)
call()
def refuse(path, *args, **kwargs):
    raise AssertionError(f"an op call looked for {{path}}")
pathlib.Path.exists = os.path.exists = os.stat = os.listdir = os.scandir = refuse
logps, _, _ = call()
print(backends.active("{key}".lower()), logps.exp().item())
"""


@needs_kernels
@pytest.mark.parametrize(("key", "selected"), [("CUDA", ""), ("CPU", "reference")])
def test_an_op_call_does_not_look_for_the_library(key: str, selected: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "spo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "spo_kernels/libspo_kernels_cuda.so").touch()
    ran = python("-c", NO_LOOK_UP.format(key=key), at=tmp_path, SPO_BACKEND=selected)
    assert ran.stdout.split() == [selected or key.lower(), "0.25"], ran.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_go_through_without_running_a_kernel(device: str) -> None:
    """Fake tensors have shapes and dtypes for a device that this machine lacks."""
    with FakeTensorMode(), torch.no_grad():
        logits = torch.empty(2, 7, 11, device=device, dtype=torch.bfloat16)
        labels = torch.empty(2, 7, device=device, dtype=torch.int64)
        for rows in spo_kernels.token_logps_kl(logits, labels, logits):
            assert rows.shape == (2, 7)
            assert rows.dtype == torch.float32
            assert rows.device.type == device
        assert spo_kernels.sequence_logps(logits, labels, average=True).shape == (2,)
        assert spo_kernels.kl_loss(logits, logits).shape == ()
