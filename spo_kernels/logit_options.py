"""The options that turn raw logits into the logits of a distribution, and the transforms that row ops take for them.

logits = softcap(logit_scale raw) / temperature,    softcap(x) = softcap tanh(x / softcap), or x without one
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.checks import LARGEST, check_is_number, check_number, describe
from spo_kernels.op_library import without_batches
from spo_kernels.precision import accumulate_dtype


class LogitOptions(NamedTuple):
    temperature: float | Tensor  # > 0; a number, or one for each row
    softcap: float | None  # > 0
    logit_scale: float  # not 0


class RefLogitOptions(NamedTuple):
    """The reference's options. None stands for the policy's, a softcap of inf for none."""

    temperature: float | Tensor | None
    softcap: float | None
    logit_scale: float | None


AS_POLICY = RefLogitOptions(None, None, None)


def check_logit_options(options: LogitOptions, rows: Tensor | None, like: str = "", prefix: str = "") -> None:
    """Refuse illegal options.

    Args:
        rows: logits or hidden states, ``[..., X]``; a temperature may be a Tensor ``[...]`` or ``[]``. None: it must be
            a number.
        like: name of rows in the error text.
        prefix: of the options' names.
    """
    temperature, softcap, logit_scale = options
    if rows is not None and isinstance(temperature, Tensor):
        _check_temperatures(temperature, rows, like, prefix)
    else:
        check_number(f"{prefix}temperature", temperature, above=True)
    check_is_number(f"{prefix}softcap", 1.0 if softcap is None else softcap)
    if softcap is not None and not 0 < softcap <= LARGEST:
        raise ValueError(f"{prefix}softcap must be > 0 and finite, or None, got {softcap}")
    check_is_number(f"{prefix}logit_scale", logit_scale)
    if not 0 < abs(logit_scale) <= LARGEST:
        raise ValueError(f"{prefix}logit_scale must be finite and not 0, got {logit_scale}")


def of_reference(options: RefLogitOptions, policy: LogitOptions) -> LogitOptions:
    temperature, softcap, logit_scale = options
    no_softcap = isinstance(softcap, float) and softcap > LARGEST
    return LogitOptions(
        policy.temperature if temperature is None else temperature,
        None if no_softcap else policy.softcap if softcap is None else softcap,
        policy.logit_scale if logit_scale is None else logit_scale,
    )


def checked_transform(
    options: LogitOptions, rows: Tensor, like: str, dtype: torch.dtype, prefix: str = ""
) -> Tensor | None:
    """`reference.RowOptions.transform` of the options of a public function. dtype: of the logits."""
    temperature, softcap, logit_scale = options
    if softcap is None and _are_one(temperature, logit_scale):
        return None  # most calls
    check_logit_options(options, rows, like, prefix)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().reshape(-1)
    # Numbers enter by multiplication and division with tensors: torch.compile specializes them in any other operation.
    one = torch.ones(1, dtype=torch.float64, device=rows.device)
    factors = one * logit_scale / temperature
    if softcap is not None:
        factors = torch.stack(torch.broadcast_tensors(one * logit_scale / softcap, one * softcap / temperature))
    return torch.atleast_2d(factors).to(accumulate_dtype(dtype))


def checked_transforms(
    policy: LogitOptions, reference: RefLogitOptions, rows: Tensor, like: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The transforms of policy and reference."""
    transform = checked_transform(policy, rows, like, dtype)
    if reference.temperature is None and reference.softcap is None and reference.logit_scale is None:
        return transform, transform
    return transform, checked_transform(of_reference(reference, policy), rows, like, dtype, "ref_")


def _are_one(*options: object) -> bool:
    """Whether all are numbers, and 1. Under torch.compile one that changes is not: comparing it would cost a graph."""
    if not all(isinstance(option, (float, int)) and not isinstance(option, bool) for option in options):
        return False
    if not torch.compiler.is_compiling():
        return all(option == 1 for option in options)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return all(statically_known_true(option == 1) for option in options)


def _check_temperatures(temperature: Tensor, rows: Tensor, like: str, prefix: str) -> None:
    name, wanted = f"{prefix}temperature", rows.shape[:-1]
    if not temperature.is_floating_point() or temperature.shape not in (wanted, ()):
        raise ValueError(f"{name} must be a number, or floating {list(wanted)} or [], got {describe(temperature)}")
    if temperature.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device} like {like}, got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError(f"{name} must not require grad: no gradient flows to it (use .detach())")
    values = without_batches(temperature)
    legal = (values > 0) & values.isfinite()
    torch._assert_async(legal.all(), f"{name} must be > 0 and finite in every row")


def transform_rows(transform: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """The transform of some rows."""
    return transform if transform is None or transform.shape[1] == 1 else transform[:, rows]
