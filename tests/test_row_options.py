"""Transforms, a smaller vocabulary and gradients of the log-sum-exp, in the row ops of every loaded implementation."""

from __future__ import annotations

import pytest
from row_options import KL_LOSS_SPECS, SPECS, Spec, check, check_kl_loss

from spo_kernels.backends import Backend


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_token_stats(backend: Backend, spec: Spec) -> None:
    check(backend, spec)


@pytest.mark.parametrize("spec", KL_LOSS_SPECS, ids=str)
def test_kl_loss(backend: Backend, spec: Spec) -> None:
    check_kl_loss(backend, spec)
