"""Transforms, a smaller vocabulary, other divergences and gradients of the log-sum-exp, in the row ops of every loaded
implementation."""

from __future__ import annotations

from typing import Any

import pytest
from row_options import KL_LOSS_SPECS, MIXTURE_SPECS, SPECS, Spec, check, check_kl_loss

from spo_kernels.backends import Backend


def quick_or_slow(specs: list[Spec]) -> list[Any]:
    """Rows beyond 10,000 columns take most of the time. Divergences have their long rows among the slow tests too."""
    slow = [spec.v > (1000 if spec.mixture else 10_000) for spec in specs]
    marks = [pytest.mark.slow if is_slow else () for is_slow in slow]
    return [pytest.param(spec, marks=mark, id=str(spec)) for spec, mark in zip(specs, marks, strict=True)]


@pytest.mark.parametrize("spec", quick_or_slow(SPECS + MIXTURE_SPECS))
def test_token_stats(backend: Backend, spec: Spec) -> None:
    check(backend, spec)


@pytest.mark.parametrize("spec", quick_or_slow(KL_LOSS_SPECS))
def test_kl_loss(backend: Backend, spec: Spec) -> None:
    check_kl_loss(backend, spec)
