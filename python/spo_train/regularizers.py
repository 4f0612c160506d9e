"""Regularizers of SPO by name: what keeps the policy near the reference, on sequences drawn from the policy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spo_kernels import kl_loss
from spo_train.config import REGULARIZERS
from spo_train.judges import load_function

# Takes the policy's logits [S, T, V], the reference's logits [S, T, V], and row weights [S, T], which are beta / S on
# response tokens and 0 elsewhere. Returns beta times the mean over sequences, 0-d.
Regularizer = Callable[[Tensor, Tensor, Tensor], Tensor]


def load_regularizer(name: str, beta: float) -> Regularizer:
    """The regularizer called `name`, with its factor beta.

    Args:
        name: one of `config.REGULARIZERS`, or "module:function". The function takes the policy's logits [S, T, V], the
            reference's logits [S, T, V] without gradient, and a mask [S, T] that is True on response tokens. It returns
            one value for each sequence, [S], with a gradient to the policy's logits.

    Raises:
        ValueError: there is no such module or function.
    """
    if name in REGULARIZERS:
        divergence = name.replace("-", "_")
        return lambda logits, ref_logits, row_weight: kl_loss(
            logits, ref_logits, row_weight=row_weight, overwrite_logits=True, divergence=divergence
        )
    function = load_function(name, "regularizer", REGULARIZERS)

    def weighted(logits: Tensor, ref_logits: Tensor, row_weight: Tensor) -> Tensor:
        values = function(logits, ref_logits, row_weight != 0)
        if not isinstance(values, Tensor) or values.shape != row_weight.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"regularizer {name} must return a Tensor [{row_weight.shape[0]}], got {got}")
        return beta * values.mean()

    return weighted
