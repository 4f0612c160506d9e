"""Errors of the head's functions: what is refused, and the messages."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import (
    ROUTE,
    Inputs,
    Options,
)

import spo_kernels
from spo_kernels import (
    LinearSPOLoss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)

X = Inputs(2, 3, h=4, v=5, dtype=torch.float32)


Y = X.labels


def logps(*args: Any, **kwargs: Any) -> Callable[[], object]:
    return lambda: linear_token_logps(*args, **kwargs)


def kl(*args: Any, **kwargs: Any) -> Callable[[], object]:
    return lambda: linear_token_kl(*args, **kwargs)


def spo(*args: Any, init: Options | None = None, **kwargs: Any) -> Callable[[], object]:
    return lambda: LinearSPOLoss(**(init or {}))(*args, **kwargs)


H, W, B, RH, RW = X.hidden, X.weight, X.bias, X.ref_hidden, X.ref_weight


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "0-d hidden": (logps(H[0, 0, 0], W, Y), "hidden must be [..., H] with H >= 1, got []"),
    "no hidden size": (logps(H[..., :0], W[:, :0], Y), "hidden must be [..., H] with H >= 1, got [2, 3, 0]"),
    "integer hidden": (logps(H.int(), W, Y), "hidden must be float32, bfloat16, float16 or float64, got torch.int32"),
    "weight transposed": (logps(H, W.t(), Y), "weight must be [V, 4] with V >= 1, got [4, 5]"),
    "weight of no token": (logps(H, W[:0], Y), "weight must be [V, 4] with V >= 1, got [0, 4]"),
    "weight dtype": (logps(H, W.double(), Y), "weight must be torch.float32 like hidden, got torch.float64"),
    "weight device": (logps(H, W.to("meta"), Y), "weight must be on cpu like hidden, got meta"),
    "bias shape": (logps(H, W, Y, B[:3]), "bias must be [5], got [3] float32"),
    "bias dtype": (logps(H, W, Y, B.half()), "bias must be torch.float32 like hidden, got torch.float16"),
    "labels shape": (logps(H, W, Y[:, 1:]), "labels must be [2, 3] int64, got [2, 2] int64"),
    "labels dtype": (logps(H, W, Y.int()), "labels must be [2, 3] int64, got [2, 3] int32"),
    "labels device": (logps(H, W, Y.to("meta")), "labels must be on cpu like hidden, got meta"),
    "chunk_size 0": (logps(H, W, Y, chunk_size=0), "chunk_size must be a whole number of rows >= 1, or None, got 0"),
    "chunk_size -1": (
        kl(H, W, RH, RW, chunk_size=-1),
        "chunk_size must be a whole number of rows >= 1, or None, got -1",
    ),
    "chunk_size 1.5": (
        logps(H, W, Y, chunk_size=1.5),
        "chunk_size must be a whole number of rows >= 1, or None, got 1.5",
    ),
    "temperature": (logps(H, W, Y, temperature=0), "temperature must be > 0 and finite, got 0"),
    "temperature nan": (logps(H, W, Y, temperature=math.nan), "temperature must be > 0 and finite, got nan"),
    "softcap": (logps(H, W, Y, softcap=-1.0), "softcap must be > 0 and finite, or None, got -1.0"),
    "logit_scale": (logps(H, W, Y, logit_scale=0.0), "logit_scale must be finite and not 0, got 0.0"),
    "other V": (kl(H, W, RH, RW[:4]), "ref_weight must have V = 5 rows like weight, got 4"),
    "ref_hidden rows": (kl(H, W, RH[:1], RW), "ref_hidden must be [2, 3, H'] like hidden, got [1, 3, 7]"),
    "ref_weight H": (kl(H, W, RH, RW[:, :6]), "ref_weight must be [V, 7] with V >= 1, got [5, 6]"),
    "ref dtype": (
        kl(H, W, RH.double(), RW.double()),
        "ref_hidden must be torch.float32 like hidden, got torch.float64",
    ),
    "ref device": (kl(H, W, RH.to("meta"), RW.to("meta")), "ref_hidden must be on cpu like hidden, got meta"),
    "ref_weight grad": (
        kl(H, W, RH, RW.clone().requires_grad_()),
        "ref_weight must not require grad: the gradient flows to the policy only (use .detach())",
    ),
    "mask": (kl(H, W, RH, RW, X.mask[:1]), "mask must be [2, 3] bool, got [1, 3] bool"),
    "kl_mask": (
        spo(H, W, Y, kl_hidden=H, kl_ref_hidden=RH, kl_ref_weight=RW, kl_mask=X.mask[:1], init={"beta": 0.1}),
        "kl_mask must be [2, 3] bool, got [1, 3] bool",
    ),
    "row_weight": (
        lambda: linear_kl_loss(H, W, RH, RW, row_weight=Y),
        "row_weight must be floating, got torch.int64",
    ),
    "row_weight shape": (
        lambda: linear_kl_loss(H, W, RH, RW, row_weight=torch.ones(2)),
        "row_weight must be [2, 3] float32, got [2] float32",
    ),
    "labels of sequences": (
        lambda: linear_sequence_logps(H[0], W, Y[0]),
        "labels must be [B, T] without cu_seqlens, got [3]",
    ),
    "cu_seqlens": (
        lambda: linear_sequence_logps(H[0], W, Y[0], cu_seqlens=torch.tensor([0.0, 3.0])),
        "cu_seqlens must be [B + 1] int32 or int64, got [2] float32",
    ),
    "kl_mask without beta": (
        spo(H, W, Y, kl_mask=X.mask),
        "kl_mask must be None where beta is 0: it would have no effect; give beta > 0",
    ),
    "kl_ref_bias without beta": (spo(H, W, Y, kl_ref_bias=B), "kl_ref_bias must be None where beta is 0"),
    "kl_cu_seqlens without beta": (
        spo(H, W, Y, kl_cu_seqlens=torch.tensor([0, 3])),
        "kl_cu_seqlens must be None where beta is 0",
    ),
    "kl_cu_seqlens": (
        spo(
            *(H, W, Y),
            kl_hidden=H,
            kl_ref_hidden=RH,
            kl_ref_weight=RW,
            kl_cu_seqlens=torch.ones(50),
            init={"beta": 0.1},
        ),
        "kl_cu_seqlens must be [B + 1] int32 or int64, got [50] float32",
    ),
    "route": (spo(init={"route": "fast"}), "route must be one of auto, recompute, recompute_free, got 'fast'"),
    "nll_weight": (spo(init={"nll_weight": -1}), "nll_weight must be >= 0 and finite, got -1"),
    "module chunk_size": (
        spo(init={"chunk_size": 0}),
        "chunk_size must be a whole number of rows >= 1, or None, got 0",
    ),
    "odd": (spo(H[:1], W, Y[:1]), "hidden must hold P chosen and then P rejected sequences, got 1 in all"),
    "pair_weight": (
        spo(H.clone().requires_grad_(), W, Y, pair_weight=torch.ones(2)),
        "pair_weight must be [P] like the pairs, got [2] against [1]",
    ),
    "kl without beta": (spo(H, W, Y, kl_hidden=H), "kl_hidden must be None where beta is 0"),
    "beta without kl": (
        spo(H, W, Y, kl_hidden=H, init={"beta": 0.1}),
        "kl_ref_hidden must be given where beta is not 0, got None with beta = 0.1",
    ),
    "no samples": (
        spo(H, W, Y, kl_hidden=H[:0], kl_ref_hidden=RH[:0], kl_ref_weight=RW, init={"beta": 0.1}),
        "kl_hidden must hold at least one sequence, got [0, 3, 4]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "1"), *itertools.product(["softcap", "logit_scale"], ["1", torch.ones(())])],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_options_that_are_no_number_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a Python number, got {type(value).__name__}"):
        linear_token_logps(H, W, Y, **{name: value})


@ROUTE
@pytest.mark.parametrize("given", [{}, {"pair_weight": torch.ones(1)}], ids=["plain", "pair_weight"])
def test_bounds_that_end_before_the_rows_are_named(given: Options, route: str) -> None:
    hidden = H.flatten(0, 1).clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the number of rows N"):
        LinearSPOLoss(route=route)(hidden, W, Y.flatten(), cu_seqlens=torch.tensor([0, 3, 5]), **given)


@pytest.mark.parametrize("label", [-1, 5, -(2**62)])
@ROUTE
def test_a_label_out_of_range_is_named(route: str, label: int) -> None:
    labels = Y.clone()
    labels[1, 1] = label
    hidden = H.clone().requires_grad_()
    for call in (logps(hidden, W, labels), spo(hidden, W, labels, init={"route": route})):
        with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 5\) or ignore_index -100, got {label}\b"):
            call()


def test_every_public_name_of_the_head_is_exported() -> None:
    assert {name for name in spo_kernels.__all__ if "inear" in name} == {
        "LinearSPOLoss", "linear_kl_loss", "linear_sequence_logps", "linear_token_kl", "linear_token_logps",
    }  # fmt: skip
