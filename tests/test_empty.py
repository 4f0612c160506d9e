"""Every public function where an axis has no entry: no token, no row, no sequence, no pair, no sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spo_kernels
from spo_kernels import LinearSPOLoss, PowerImportance, SoftImportance, SPOLoss, preference_loss, spo_loss
from spo_kernels.losses import LOSSES

V, H = 5, 4
ROWS = [(0,), (0, 3), (2, 0), (0, 0), (2, 0, 3)]
BATCHES = [(0, 3), (2, 0), (0, 0)]
BOUNDS = [[0], [0, 0, 0]]  # no sequence, and two sequences without rows


def logits(*rows: int) -> Tensor:
    return torch.zeros(*rows, V, requires_grad=True) * 1


def hidden(*rows: int) -> Tensor:
    return torch.zeros(*rows, H, requires_grad=True) * 1


def weight() -> Tensor:
    return nn.Parameter(torch.ones(V, H))


def labels(*rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def packed(bounds: list[int]) -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor(bounds)}


def reference(*rows: int) -> tuple[Tensor, Tensor]:
    return hidden(*rows).detach(), weight().detach()


def mask(*rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def samples_of_logits(*rows: int) -> dict[str, Tensor]:
    return {"kl_logits": logits(*rows), "kl_ref_logits": logits(*rows).detach()}


def samples_of_hidden(*rows: int) -> dict[str, Tensor]:
    names = ("kl_hidden", "kl_ref_hidden", "kl_ref_weight")
    return dict(zip(names, (hidden(*rows), *reference(*rows)), strict=True))


def no_pair() -> Tensor:
    return torch.zeros(0, requires_grad=True)


def of_modules(shape: tuple[int, ...], options: dict[str, Tensor]) -> list[Callable[[], Any]]:
    """Both modules by every route and with every kind of weight."""
    weights = (None, 0.1, SoftImportance(0.1, "ema"), SoftImportance(0.1, -1.0))
    calls: list[Callable[[], Any]] = []
    for mu in weights:
        calls += [lambda mu=mu: SPOLoss(weight=mu)(logits(*shape), labels(*shape), **options)]
        for route in ("auto", "recompute"):
            loss = LinearSPOLoss(weight=mu, nll_weight=0.1, route=route)
            calls += [lambda loss=loss: loss(hidden(*shape), weight(), labels(*shape), **options)]
    return calls


kernels: Any = spo_kernels
CALLS: dict[str, list[Callable[[], Any]]] = {
    "token_logps": [
        lambda s=s, i=i: kernels.token_logps(logits(*s), labels(*s), inplace_backward=i)
        for s in ROWS
        for i in (False, True)
    ],
    "token_kl": [
        lambda s=s, m=m: kernels.token_kl(logits(*s), logits(*s).detach(), m) for s in ROWS for m in (None, mask(*s))
    ],
    "token_logps_kl": [lambda s=s: kernels.token_logps_kl(logits(*s), labels(*s), logits(*s).detach()) for s in ROWS],
    "kl_loss": [
        lambda s=s, kw=kw: kernels.kl_loss(logits(*s), logits(*s).detach(), **kw)
        for s in ROWS
        for kw in ({}, {"overwrite_logits": True}, {"mask": mask(*s)}, {"row_weight": torch.ones(s)})
    ],
    "sequence_logps": [
        *(lambda s=s, a=a: kernels.sequence_logps(logits(*s), labels(*s), average=a) for s in BATCHES for a in (0, 1)),
        *(lambda b=b: kernels.sequence_logps(logits(0), labels(0), **packed(b)) for b in BOUNDS),
    ],
    "get_batch_logps": [
        lambda s=s, a=a: kernels.get_batch_logps(logits(*s), labels(*s), a) for s in BATCHES for a in (False, True)
    ],
    "linear_token_logps": [
        lambda s=s, e=e: kernels.linear_token_logps(hidden(*s), weight(), labels(*s), return_entropy=e)
        for s in ROWS
        for e in (False, True)
    ],
    "linear_token_kl": [
        lambda s=s, m=m: kernels.linear_token_kl(hidden(*s), weight(), *reference(*s), m)
        for s in ROWS
        for m in (None, mask(*s))
    ],
    "linear_kl_loss": [
        lambda s=s, m=m: kernels.linear_kl_loss(hidden(*s), weight(), *reference(*s), m)
        for s in ROWS
        for m in (None, mask(*s))
    ],
    "linear_sequence_logps": [
        *(lambda s=s: kernels.linear_sequence_logps(hidden(*s), weight(), labels(*s), average=True) for s in BATCHES),
        *(lambda b=b: kernels.linear_sequence_logps(hidden(0), weight(), labels(0), **packed(b)) for b in BOUNDS),
    ],
    "spo_loss": [
        lambda: spo_loss(no_pair(), no_pair()),
        lambda: spo_loss(no_pair(), no_pair(), no_pair(), no_pair(), weight=SoftImportance(0.1)),
        lambda: spo_loss(no_pair(), no_pair(), weight=torch.zeros(0)),
    ],
    "preference_loss": [
        lambda n=n, row=row: preference_loss(
            n,
            *(no_pair() for _ in range(4)),
            **{key: torch.zeros(0, 0) if key == "similarity" else torch.zeros(2, 0) for key in row.inputs},
        )
        for n, row in LOSSES.items()
    ],
    "spo_ranking_loss": [
        lambda k=k, g=g: kernels.spo_ranking_loss(no_pair(), kind=k, **g)
        for k in ("ranking", "best_of_n")
        for g in (
            {"cu_groups": torch.zeros(1, dtype=torch.int64)},
            {"cu_groups": torch.zeros(4, dtype=torch.int32)},
            {"group_ids": torch.zeros(0, dtype=torch.int64), "num_groups": 2},
        )
    ],
    "cringe_loss": [lambda s=s: kernels.cringe_loss(logits(*s), labels(*s)) for s in BATCHES],
    "reward_model_loss": [lambda: kernels.reward_model_loss(no_pair(), no_pair())],
    **{
        importance.__name__: [
            lambda of=importance, n=n: of(0.1, n)(no_pair(), no_pair())
            for n in ("batch", "ema", 0.0, torch.tensor(0.0))
        ]
        for importance in (SoftImportance, PowerImportance)
    },
    "SPOLoss": [
        *(call for s in BATCHES for call in of_modules(s, {})[::3]),
        *(call for b in BOUNDS for call in of_modules((0,), packed(b))[::3]),
        lambda: SPOLoss(beta=0.1)(logits(2, 3), labels(2, 3), **samples_of_logits(2, 0)),
    ],
    "LinearSPOLoss": [
        *(call for s in BATCHES for i, call in enumerate(of_modules(s, {})) if i % 3),
        *(call for b in BOUNDS for i, call in enumerate(of_modules((0,), packed(b))) if i % 3),
        *(
            lambda r=r: LinearSPOLoss(route=r)(hidden(0, 3), weight(), labels(0, 3), pair_weight=torch.zeros(0))
            for r in ("auto", "recompute")
        ),
        lambda: LinearSPOLoss(beta=0.1)(hidden(2, 3), weight(), labels(2, 3), **samples_of_hidden(2, 0)),
    ],
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "KL of no sample": (
        lambda: spo_loss(no_pair(), no_pair(), kl=no_pair(), beta=0.1),
        r"kl must be \[S\] with S >= 1",
    ),
    "no sampled logits": (
        lambda: SPOLoss(beta=0.1)(logits(2, 3), labels(2, 3), **samples_of_logits(0, 3)),
        "kl_logits must hold at least one sequence",
    ),
    "no sampled hidden states": (
        lambda: LinearSPOLoss(beta=0.1)(hidden(2, 3), weight(), labels(2, 3), **samples_of_hidden(0, 3)),
        "kl_hidden must hold at least one sequence",
    ),
}


def test_every_public_function_is_here() -> None:
    without_rows = {"GatheredHead", "backends", "gather_head", "head_options"}
    assert set(CALLS) == set(spo_kernels.__all__) - without_rows


@pytest.mark.parametrize("name", CALLS)
def test_nothing_gives_nothing(name: str) -> None:
    """Finite outputs, with a backward where they have one, and the same without gradients."""
    for call in CALLS[name]:
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = [x for out in outputs for x in (out if isinstance(out, tuple) else (out,))]
        assert all(x.isfinite().all() for x in tensors)
        differentiable = [x.sum() for x in tensors if x.requires_grad]
        if differentiable:
            torch.stack(differentiable).sum().backward()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_an_entry_says_so(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()
