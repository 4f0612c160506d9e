"""The correctness gate: a wrong result takes no part in any comparison.

A workload computes errors in the way that fits its results. The budgets catch a wrong formula, row or scale; tests look
at the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements compared at a time: two more float64 copies of a large model's weight would not fit.
_COMPARED = 1 << 24


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on one implementation."""

    errors: dict[str, float]
    problem: str = ""  # becomes the row's status; empty for a right result

    @property
    def failed(self) -> bool:
        return self.problem.startswith("failed")


def failure(error: RuntimeError) -> str:
    return f"failed: {str(error).strip().splitlines()[0]}"


def judge(check: Callable[[], Verdict]) -> Verdict:
    """The check's verdict. A RuntimeError counts as "failed": a machine may be unable to compile or hold a peer."""
    try:
        return check()
    except RuntimeError as error:
        return Verdict({}, failure(error))


def relative_error(got: Tensor | None, truth: Tensor, scale: float = 1.0) -> float:
    """Norm of ``scale * got - truth`` over the norm of truth, in float64. Infinite if `got` is None.

    If truth is 0, the norm itself.
    """
    if got is None:
        return math.inf
    error, size = 0.0, 0.0
    for some, true in zip(got.reshape(-1).split(_COMPARED), truth.reshape(-1).split(_COMPARED), strict=True):
        error += float((some.double() * scale - true).square().sum())
        size += float(true.square().sum())
    return math.sqrt(error / size) if size else math.sqrt(error)


def worst(errors: Iterable[float]) -> float:
    """The largest error. NaN counts as larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def by_norm(errors: dict[str, float], budget: float) -> Verdict:
    """Verdict on relative errors, all with the same budget. NaN is wrong."""
    largest = worst(errors.values())
    return Verdict(errors, "" if largest <= budget else f"wrong: off by {largest:.3g}, relative")


@dataclass(frozen=True)
class ElementBudget:
    """Largest allowed error of an element.

    An output may be off by ``out + out_relative |truth|``, a gradient by `grad` times its row's largest element.
    """

    out: float
    out_relative: float
    grad: float


def by_element(
    outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], truth: Mapping[str, Tensor], budget: ElementBudget
) -> Verdict:
    """Verdict on each element of outputs and gradients ``[rows, V]``; the errors are the largest of each kind."""
    wrong: list[str] = []
    errors: dict[str, float] = {}
    for name, output in outputs.items():
        error = (output.double() - truth[name]).abs()
        errors["out"] = worst([errors.get("out", 0.0), error.max().item()])
        if not bool((error <= budget.out + budget.out_relative * truth[name].abs()).all()):  # NaN fails this test
            wrong.append(f"{name} off by {error.max().item():.3g}")
    for name, gradient in gradients.items():
        scale = truth[name].abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        relative = ((gradient.double() - truth[name]).abs() / scale).max().item()
        errors["grad"] = worst([errors.get("grad", 0.0), relative])
        # A float16 gradient of 1e-6 consists of float16's smallest numbers: half the step between them is no error.
        numbers = torch.finfo(gradient.dtype)
        least = numbers.smallest_normal * numbers.eps / 2 if gradient.dtype == torch.float16 else 0.0
        if not relative <= budget.grad + least / scale.min().item():
            wrong.append(f"gradient of {name} off by {relative:.3g} of its largest element")
    return Verdict(errors, f"wrong: {'; '.join(wrong)}" if wrong else "")
