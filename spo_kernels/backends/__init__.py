"""Backend selection: which implementation of the row ops serves which device, and why. The one place that decides it.

A backend implements the row functions of `spo_kernels.reference`.
torch's dispatcher is the device switch: importing this module puts one backend behind each device type.

=====================  ===========================  =========================================================
backend                device types                 what it is
=====================  ===========================  =========================================================
``cpu``                cpu                          compiled C++, SIMD level chosen at run time; the default there
``cuda``               cuda                         compiled CUDA C++; the default where it was built
``triton``             cuda (CUDA and ROCm), cpu*   Triton kernels; the default on cuda where ``cuda`` was not built
``reference``          cpu, cuda                    plain torch, the oracle; only when asked for
=====================  ===========================  =========================================================

\\* under ``TRITON_INTERPRET=1`` only, for tests.

``SPO_BACKEND=<name>`` puts that backend behind every device type it serves. Asking for a backend that is not available
is an error: nothing falls back to something slower on its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from spo_kernels import row_ops
from spo_kernels.backends import cpu, cuda
from spo_kernels.reference import PLAIN, RowOptions

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


class Backend(Protocol):
    """The functions of a backend. `spo_kernels.reference` says what they compute."""

    def token_stats_fwd(
        self,
        logits: Tensor,
        labels: Tensor | None,
        ref_logits: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        options: RowOptions = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def token_stats_bwd(
        self,
        dlogps: Tensor | None,
        dkl: Tensor | None,
        logits: Tensor,
        labels: Tensor | None,
        ref_logits: Tensor | None,
        mask: Tensor | None,
        kl: Tensor,
        stats: Tensor,
        ignore_index: int,
        inplace: bool,
        dlse: Tensor | None = None,
        options: RowOptions = PLAIN,
    ) -> Tensor: ...

    def mixture_kl(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        stats: Tensor,
        options: RowOptions = PLAIN,
    ) -> Tensor: ...

    def kl_loss_fwd(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        row_weight: Tensor | None,
        inplace: bool,
        options: RowOptions = PLAIN,
    ) -> tuple[Tensor, Tensor]: ...

    def scale_(self, tensor: Tensor, scale: Tensor) -> None: ...


class Selection(NamedTuple):
    """The backend of a device type, and why it was chosen. The name is None if no backend serves the device."""

    backend: str | None
    reason: str


class _Entry(NamedTuple):
    module: str
    device_types: tuple[str, ...]
    missing: Callable[[], str | None]  # why it is not available on this machine; None if it is


def _cpu_missing() -> str | None:
    return None if cpu.library_path() else "the compiled kernels are not part of this installation"


def _cuda_missing() -> str | None:
    if cuda.library_path() is None:
        return "the CUDA kernels are not part of this installation (they are built where nvcc is found)"
    return None if torch.version.cuda else "this torch was built without CUDA"


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def _triton_device_types() -> tuple[str, ...]:
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


_ENTRIES = {
    "cpu": _Entry("spo_kernels.backends.cpu", ("cpu",), _cpu_missing),
    "cuda": _Entry("spo_kernels.backends.cuda", ("cuda",), _cuda_missing),
    "triton": _Entry("spo_kernels.backends.triton", _triton_device_types(), _triton_missing),
    "reference": _Entry("spo_kernels.reference", ("cpu", "cuda"), lambda: None),
}
_DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the first that is available


def available(device: torch.device | str | None = None) -> tuple[str, ...]:
    """Names of the available backends, selected or not. With a device, only backends that serve it."""
    wanted = None if device is None else torch.device(device).type
    return tuple(
        name
        for name, entry in _ENTRIES.items()
        if entry.missing() is None and (wanted is None or wanted in entry.device_types)
    )


def _select(device_type: str, asked: str | None) -> Selection:
    if asked is not None and device_type in _ENTRIES[asked].device_types:
        return Selection(asked, f"SPO_BACKEND={asked}")
    reasons: list[str] = []
    for name in _DEFAULTS[device_type]:
        missing = _ENTRIES[name].missing()
        if missing is None:
            return Selection(name, "; ".join([f"the default on {device_type}", *reasons]))
        reasons.append(f"{name}: {missing}")
    return Selection(None, "; ".join(reasons))


def _asked() -> str | None:
    asked = os.environ.get("SPO_BACKEND") or None
    if asked is None:
        return None
    if asked not in _ENTRIES:
        raise ImportError(f"SPO_BACKEND must be one of {', '.join(_ENTRIES)}, got {asked!r}")
    if missing := _ENTRIES[asked].missing():
        raise ImportError(f"SPO_BACKEND={asked} was asked for, but {missing}")
    return asked


_ASKED = _asked()
_SELECTED = {device_type: _select(device_type, _ASKED) for device_type in _DEFAULTS}
if _SELECTED["cpu"].backend is None:
    raise ImportError(
        f"the compiled kernels of spo_kernels were never built in {Path(__file__).parent.parent}: pip install the "
        "package and import it from outside its source tree, or install it with pip install -e"
    )


def selection(device_type: str) -> Selection:
    """The backend behind a device type and the reason, e.g. ``selection("cpu")``."""
    return _SELECTED.get(device_type, Selection(None, f"no backend serves {device_type}"))


def active(device: torch.device | str = "cpu") -> str:
    """Name of the backend that serves tensors on this device; RuntimeError when none does."""
    chosen = selection(torch.device(device).type)
    if chosen.backend is None:
        raise RuntimeError(f"spo_kernels has no backend for {torch.device(device)}: {chosen.reason}")
    return chosen.backend


@cache
def get(name: str) -> Backend:
    """The functions of a backend, to be called directly, without autograd.

    Cached, because every op call of a backend other than cpu passes here, and looking for a backend reads the file
    system.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not available.
    """
    if name not in _ENTRIES:
        raise ValueError(f"name must be one of {', '.join(_ENTRIES)}, got {name!r}")
    entry = _ENTRIES[name]
    if missing := entry.missing():
        raise RuntimeError(f"backend {name} is not available: {missing}")
    if name == "cpu" and _SELECTED["cpu"].backend != "cpu":
        raise RuntimeError(f"backend cpu is not loaded: {_SELECTED['cpu'].reason}")
    return cuda.load() if name == "cuda" else cast(Backend, importlib.import_module(entry.module))


def _register(device_type: str) -> None:
    """Put the selected backend behind the dispatcher key of its device type."""
    name, reason = _SELECTED[device_type]
    if name == "cpu":
        cpu.load()  # registers its kernels itself, without Python between the dispatcher and them
        return

    def backend() -> Any:  # looked up at each call: importing Triton takes seconds
        if name is None:
            raise RuntimeError(f"spo_kernels has no backend for {device_type} tensors: {reason}")
        return get(name)

    def token_stats_fwd(inplace_backward: bool, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backend().token_stats_fwd(**arguments)

    def token_stats_bwd_(**arguments: Any) -> None:
        backend().token_stats_bwd(**arguments, inplace=True)

    implementations: dict[str, Callable[..., Any]] = {
        "token_stats_fwd": token_stats_fwd,
        "token_stats_bwd": lambda **arguments: backend().token_stats_bwd(**arguments, inplace=False),
        "token_stats_bwd_": token_stats_bwd_,
        "mixture_kl": lambda **arguments: backend().mixture_kl(**arguments),
        "kl_loss_fwd": lambda **arguments: backend().kl_loss_fwd(**arguments, inplace=False),
        "kl_loss_fwd_": lambda **arguments: backend().kl_loss_fwd(**arguments, inplace=True)[0],
        "scale_": lambda **arguments: backend().scale_(**arguments),
    }
    for op_name, op in row_ops.OPS.items():
        op.on_device(DISPATCH_KEYS[device_type], implementations[op_name])


for _device_type in _SELECTED:
    _register(_device_type)
