"""The providers of the row ops. An entry of `PROVIDERS` holds one implementation's functions, by op.

A function takes the op's arguments and returns its outputs, one Tensor or a tuple. The harness runs the backward, in
the same way for every provider.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks.peers import eager

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]

_HALF = (torch.bfloat16, torch.float16)
_FLOATING = (torch.float32, torch.float64, *_HALF)


@dataclass(frozen=True)
class Provider:
    functions: Mapping[str, Function]
    dtypes: tuple[torch.dtype, ...] = _FLOATING
    native: bool = False  # computes in the logits' dtype; the gate's budgets are wider for it in half precision
    backward_only: bool = False  # without gradients it is the same as another provider
    inplace: bool = False  # overwrites the logits, which are restored outside the timed region
    compiled: bool = False
    simd: str | None = None  # SIMD level of our CPU kernels; None: the level in use
    missing: Callable[[torch.device], str | None] = lambda device: None  # why it cannot be measured; None if it can

    def function(self, op: str) -> Function:
        """The function to call at one shape; compiled functions are compiled for that shape alone."""
        function = self.functions[op]
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function


def cross_entropy_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels, reduction="none")


def trl_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    # TRL takes [B, T, V] and works on one sequence at a time. The rows become eight sequences if eight divides N.
    sequences = 8 if logits.shape[0] % 8 == 0 else 1
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return selective_log_softmax(logits.unflatten(0, (sequences, -1)), labels.unflatten(0, (sequences, -1))).flatten()


def liger_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(reduction="none")
    return -loss(logits, labels)


def quack_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    cross_entropy = importlib.import_module("quack.cross_entropy").cross_entropy
    return -cross_entropy(logits, labels, reduction="none", inplace_backward=True)


_EAGER: dict[str, Function] = {
    "token_logps": eager.token_logps,
    "token_kl": eager.token_kl,
    "token_logps_kl": eager.token_logps_kl,
    "kl_loss": eager.kl_loss,
}


def _upcast(function: Function) -> Function:
    """The function on ``.float()`` logits, as trainers call it on half-precision logits. Row weights are float32."""
    return lambda *args: function(*(x.float() if x.is_floating_point() else x for x in args))


_EAGER_FLOAT = {op: _upcast(function) for op, function in _EAGER.items()}


def _ours(*, inplace: bool) -> dict[str, Function]:
    functions: dict[str, Any] = {name: getattr(spo_kernels, name) for name in _EAGER}
    if inplace:
        functions = {
            name: partial(function, **{"overwrite_logits" if name == "kl_loss" else "inplace_backward": True})
            for name, function in functions.items()
        }
    # The third positional argument of spo_kernels.kl_loss is a mask.
    kl_loss = functions["kl_loss"]
    functions["kl_loss"] = lambda logits, ref_logits, row_weight: kl_loss(logits, ref_logits, row_weight=row_weight)
    return functions


def _no_simd_level(level: str, device: torch.device) -> str | None:
    if device.type != "cpu" or spo_kernels.backends.active("cpu") != "cpu":
        return "SIMD levels belong to the compiled cpu backend"
    from spo_kernels.backends import cpu

    return None if level in cpu.load().simd_levels() else f"this CPU has no {level}"


def _not_installed(package: str, device: torch.device) -> str | None:
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def _no_gpu_or_not_installed(package: str, device: torch.device) -> str | None:
    return "it needs a GPU" if device.type != "cuda" else _not_installed(package, device)


PROVIDERS: dict[str, Provider] = {
    "ours": Provider(_ours(inplace=False)),
    "ours_inplace": Provider(_ours(inplace=True), backward_only=True, inplace=True),
    "eager": Provider(_EAGER, native=True),
    "eager_float": Provider(_EAGER_FLOAT, dtypes=_HALF),
    "eager_lse": Provider({"token_logps": eager.token_logps_lse}, native=True),
    "compile": Provider(_EAGER, native=True, compiled=True),
    "compile_float": Provider(_EAGER_FLOAT, dtypes=_HALF, compiled=True),
    "cross_entropy": Provider({"token_logps": cross_entropy_token_logps}, native=True),
    "trl": Provider({"token_logps": trl_token_logps}, native=True, missing=partial(_not_installed, "trl")),
    # Liger and quack write the gradient over the logits, Liger in its forward.
    "liger": Provider(
        {"token_logps": liger_token_logps},
        dtypes=(torch.float32, *_HALF),
        native=True,
        inplace=True,
        missing=partial(_no_gpu_or_not_installed, "liger_kernel"),
    ),
    "quack": Provider(
        {"token_logps": quack_token_logps},
        dtypes=(torch.float32, *_HALF),
        inplace=True,
        missing=partial(_no_gpu_or_not_installed, "quack"),
    ),
}
# Measured by `bars` and `levels`, and by `ops` where --providers names them.
OPTIONAL_PROVIDERS = tuple(f"ours_{level}{inplace}" for level in ("avx2", "portable") for inplace in ("", "_inplace"))
for _name in OPTIONAL_PROVIDERS:
    _, _level, *_inplace = _name.split("_")
    _best = PROVIDERS["ours_inplace" if _inplace else "ours"]
    PROVIDERS[_name] = replace(_best, simd=_level, missing=partial(_no_simd_level, _level))
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name not in OPTIONAL_PROVIDERS)


def is_ours(name: str) -> bool:
    """Whether this project is at fault if the result is wrong: then the run fails."""
    return name.startswith("ours")
