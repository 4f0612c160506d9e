"""What the head's loops allocate, save and multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    Calls,
    Inputs,
    differentiate,
    pair_inputs,
    peak_bytes,
    set_tile_sizes,
)
from oracle import ACTIVE, HALF_DTYPES, IGNORE
from torch import Tensor

from spo_kernels import (
    LinearSPOLoss,
    linear_kl_loss,
    linear_token_logps,
    precision,
)
from spo_kernels.linear import loops
from spo_kernels.linear.checks import checked_options
from spo_kernels.linear.records import Head, HeadOptions, Needs, Uniform
from spo_kernels.logit_options import LogitOptions, RefLogitOptions
from spo_kernels.shards import Columns


def plain_options(head: Head) -> HeadOptions:
    return HeadOptions(None, Columns(0, head.weight.shape[0], None), None, None)


def forward_loop(head: Head, labels: Tensor) -> Calls:
    """The operations inside the forward, which a call of the op would hide."""
    with Calls() as calls:
        loops.token_stats_fwd(head, labels, None, labels != IGNORE, plain_options(head))
    return calls


def test_masked_rows_are_dropped_before_the_product() -> None:
    x = Inputs(40)
    x.hidden[x.labels == IGNORE] = torch.nan
    kept = int((x.labels != IGNORE).sum())
    assert forward_loop(Head(*x.policy), x.labels).rows_of_products == [kept]
    logps, dhidden, dweight, dbias = differentiate(
        lambda h, w, b: linear_token_logps(h, w, x.labels, b), x.policy, x.upstream
    )
    assert logps.isfinite().all()
    assert dweight.isfinite().all()
    assert dbias.isfinite().all()
    assert not dhidden[x.labels == IGNORE].any()


def test_a_tile_of_whole_rows_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of whole rows takes a product, a row op, and copies of results. It needs no merge of column blocks."""
    x = Inputs(96, v=1024, dtype=torch.float32)
    labels = x.labels.clamp(min=0)

    def calls(rows: int) -> int:
        set_tile_sizes(monkeypatch, bytes=rows * 1024 * 4, least_forward_rows=1)
        return len(forward_loop(Head(x.hidden, x.weight, None), labels).names)

    of_tile = (calls(8) - calls(16)) / 6  # 12 tiles, and 6
    assert of_tile <= 14  # six of which compute or copy; the others are views


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_costs_no_product(frozen: str) -> None:
    x = Inputs(40)
    head, kept = Head(*x.policy), x.labels != IGNORE
    saved = loops.token_stats_fwd(head, x.labels, None, kept, plain_options(head))
    needs = Needs(frozen == "weight", frozen == "hidden", True, torch.float64)
    upstream = loops.RowGradients(x.upstream, None, None)
    with Calls() as calls:
        dhidden, dweight, dbias = loops.token_stats_bwd(
            upstream, head, x.labels, None, kept, saved, needs, plain_options(head)
        )
    assert len(calls.rows_of_products) == 1 + needs.hidden + needs.weight
    assert (dhidden.numel() > 0, dweight.numel() > 0, dbias.numel() > 0) == needs[:3]
    # The public function asks for what requires grad, and for nothing else.
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(x.policy, needs[:3], strict=True)]
    linear_token_logps(leaves[0], leaves[1], x.labels, leaves[2]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs[:3])


def test_without_gradients_nothing_is_saved() -> None:
    x = Inputs(3, 7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), torch.no_grad():
        assert not linear_token_logps(x.hidden.requires_grad_(), x.weight, x.labels).requires_grad
        assert not LinearSPOLoss()(x.hidden[:2], x.weight, x.labels[:2])[0].requires_grad
    assert not saved


# Logits are far larger than all else: 2048 x 8192 in float32 are 64 MiB, hidden states and weight 0.5 MiB or less.
@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own, several a tile")
@pytest.mark.parametrize("route", ["recompute", "recompute_free"])
def test_peak_memory_does_not_grow_with_the_rows(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile_sizes(monkeypatch, rows=256, bytes=1 << 20, wide_bytes=2 << 20, least_wide_rows=64)
    loss = LinearSPOLoss(route=route)
    peaks = []
    for pairs in (4, 32):
        x = Inputs(2 * pairs, 32, h=8, v=8192, dtype=torch.float32)
        hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
        peaks.append(peak_bytes(lambda h=hidden, w=weight, y=x.labels: loss(h, w, y)[0].backward()))
        stored = peak_bytes(lambda h=hidden, w=weight: F.linear(h, w))
        assert stored >= x.labels.numel() * 8192 * 4  # the instrument sees logits where there are some
    logits = 64 * 32 * 8192 * 4
    assert peaks[1] < logits / 10
    assert peaks[1] < peaks[0] + 1.5e6  # hidden states, their gradient, a few numbers a row


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply-adds of every matrix product of the head."""
    work: list[int] = []

    def counting(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*operands: Tensor, **kw: Any) -> Tensor:
            a, b = operands[-2:]
            work.append(a.shape[0] * a.shape[1] * b.shape[1])
            return product(*operands, **kw)

        return counted

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
    return work


def test_the_routes_do_the_products_they_say(work: list[int]) -> None:
    """4 products with recomputation, 3 without, 1 if there are no gradients."""
    x = pair_inputs(8)
    one = int((x.labels != IGNORE).sum()) * x.weight.numel()
    for route, expected in (("recompute", 4), ("recompute_free", 3), ("auto", 3)):
        work.clear()
        differentiate(lambda h, w, r=route: LinearSPOLoss(route=r)(h, w, x.labels)[0], x.policy[:2])
        assert sum(work) == expected * one
        work.clear()
        with torch.no_grad():
            LinearSPOLoss(route=route)(x.hidden.requires_grad_(), x.weight, x.labels)
        assert sum(work) == one


def test_the_kl_in_one_sweep_does_the_products_it_says(work: list[int]) -> None:
    """4 products with the backward (`linear_token_kl`: 6), 2 without gradients, all of rows with a weight only."""
    x = Inputs(40)
    row_weight = x.upstream.where(x.labels != IGNORE, 0)
    rows = int((x.mask & (row_weight != 0)).sum())
    policy, reference = rows * x.weight.numel(), rows * x.ref_weight.numel()
    arguments = (x.ref_hidden, x.ref_weight, x.mask)
    differentiate(lambda h, w: linear_kl_loss(h, w, *arguments, row_weight=row_weight), x.policy[:2])
    assert sum(work) == 3 * policy + reference
    work.clear()
    with torch.no_grad():
        linear_kl_loss(x.hidden.requires_grad_(), x.weight, *arguments, row_weight=row_weight)
    assert sum(work) == policy + reference


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, policy: linear_kl_loss(*policy[:2], x.ref_hidden, x.ref_weight),
        lambda x, policy: LinearSPOLoss(route="recompute_free")(*policy[:2], x.labels, policy[2])[0],
    ],
    ids=["kl_loss", "spo_loss"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_made_in_the_forward_wait_as_wide_as_they_need(
    dtype: torch.dtype, loss: Callable[..., Tensor], native: bool
) -> None:
    """At least float32, except that gradients which native products have rounded to bfloat16 stay bfloat16."""
    x = pair_inputs(dtype=dtype)
    policy = tuple(tensor.requires_grad_() for tensor in x.policy)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss(x, policy)
    waiting = [tensor for tensor in saved if tensor.shape == x.weight.shape]
    narrow = dtype == torch.bfloat16 and native
    assert [tensor.dtype for tensor in waiting] == [dtype if narrow else torch.promote_types(dtype, torch.float32)]


@pytest.mark.parametrize("rows", [0, 4, 11])  # none, one tile, two
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_gradients_do_not_read_what_their_memory_held(
    dtype: torch.dtype, rows: int, native: bool, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = Inputs(rows, dtype=dtype)
    x.labels.clamp_(min=0)
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **kw: new_empty(*a, **kw).fill_(torch.nan))
    for loss in (
        lambda h, w: linear_token_logps(h, w, x.labels).sum(),
        lambda h, w: linear_kl_loss(h, w, x.ref_hidden, x.ref_weight),
    ):
        for gradient in differentiate(loss, x.policy[:2])[1:]:
            assert gradient.isfinite().all()


# The gradient of the weight is 2 MiB. A float32 sum of it would take 4 MiB, a tile of 8 rows takes little.
@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own, several a tile")
def test_a_single_tile_needs_no_wider_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native_products", lambda device_type, dtype: True)
    x = Inputs(2, 4, h=128, v=8192, dtype=torch.bfloat16)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    for loss in (
        lambda: LinearSPOLoss(route="recompute_free")(hidden, weight, x.labels)[0],
        lambda: linear_kl_loss(hidden, weight, x.ref_hidden, x.ref_weight),
    ):
        hidden.grad = weight.grad = None
        assert weight.nbytes <= peak_bytes(lambda loss=loss: loss().backward()) < 2 * weight.nbytes


@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own, several a tile")
def test_the_tile_makes_room_for_the_cast_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 8 rows takes 128 KiB, the weight's gradient 256 KiB and its sum 512: they are never held together."""
    monkeypatch.setattr(precision, "native_products", lambda device_type, dtype: True)
    set_tile_sizes(monkeypatch, wide_bytes=1, least_wide_rows=8, cast_columns=256)
    x = Inputs(4, 4, h=16, v=8192, dtype=torch.bfloat16)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    peak = peak_bytes(lambda: LinearSPOLoss(route="recompute_free")(hidden, weight, x.labels)[0])
    assert 3 * weight.nbytes <= peak < 3 * weight.nbytes + (120 << 10)


@pytest.mark.parametrize("kl", [False, True], ids=["entropy", "kl"])
def test_options_of_the_logits_cost_no_pass_over_a_tile(kl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that take or return a tensor as wide as a tile are those of plain logits.

    A softcap, a scale and temperatures of rows are the work of the row ops, padding rows are not part of the product.
    """
    set_tile_sizes(monkeypatch, rows=8, bytes=1, least_columns=64, wide_bytes=1, least_wide_rows=8)
    x = Inputs(24, v=200)
    head, ref_head, labels = Head(*x.policy), Head(*x.reference) if kl else Uniform(), x.labels.clamp(min=0)
    temperature = torch.linspace(0.5, 2, 24)
    calls = []
    for numbers, vocab_size in (((1.0, None, 1.0), 192), ((temperature, 4.0, 0.5), 192), ((0.7, None, -1.0), 192)):
        columns = Columns(0, vocab_size, None)
        reference = RefLogitOptions(2.0 if kl else None, None, None)
        options = checked_options(head, head.hidden, LogitOptions(*numbers), reference, None, columns)
        needs = Needs(True, True, True, torch.float64)
        upstream = loops.RowGradients(x.upstream, x.upstream, x.upstream)
        with Calls(width=64) as forward:
            saved = loops.token_stats_fwd(head, labels, ref_head, None, options)
        with Calls(width=64) as backward:
            loops.token_stats_bwd(upstream, head, labels, ref_head, None, saved, needs, options)
        calls.append((forward.wide, forward.largest, backward.wide, backward.largest))
    assert calls[0][0] and calls[0][2]
    assert calls[1] == calls[2] == calls[0]


@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own, several a tile")
@pytest.mark.parametrize("route", ["recompute", "recompute_free"])
def test_options_of_the_logits_take_no_memory(route: str) -> None:
    """The gradient of the weight is 2 MiB, a tile of 32 rows 1 MiB. Options take a few numbers a row."""
    x = Inputs(4, 8, h=64, v=8192, dtype=torch.float32)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    x.labels.clamp_(max=8000)

    def peak(**options: Any) -> int:
        loss = LinearSPOLoss(route=route, **options)
        hidden.grad = weight.grad = None
        return peak_bytes(lambda: loss(hidden, weight, x.labels)[0].backward())

    plain = peak()
    assert plain > weight.nbytes
    assert peak(vocab_size=8001) <= plain + 4096
    assert peak(temperature=0.7, softcap=4.0, logit_scale=0.5) <= plain + 4096
