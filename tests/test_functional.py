"""The public functions from logits: values against formulas, autograd, the compiler, and errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    IGNORE,
    Result,
    assert_rounded,
    assert_same,
    assert_within_budget,
    loss_rounding,
    make_case,
    rounding,
    truth,
)
from torch import Tensor

from spo_kernels import get_batch_logps, kl_loss, sequence_logps, sequences, token_kl, token_logps, token_logps_kl
from spo_kernels.reference import PLAIN, RowOptions

OPS = torch.ops.spo_kernels
NAN, INF = math.nan, math.inf
Function = Callable[..., Tensor]


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula of `token_logps`, in the logits' dtype; 0 where ignored."""
    valid = labels != IGNORE
    picked = logits.log_softmax(-1).gather(-1, labels.where(valid, 0)[..., None])[..., 0]
    return picked.where(valid, 0)


def kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The formula of `token_kl`."""
    return F.kl_div(ref_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``logits, labels, ref_logits, mask`` with ignored and masked rows; shape ends in V."""
    logits, ref_logits = torch.randn(2, *shape, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels.flatten()[::4] = IGNORE
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask.view(-1)[1::3] = False
    return logits, labels, ref_logits, mask


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Gradient of a weighted sum of the outputs with respect to logits that are an intermediate result."""
    leaf = logits.clone().requires_grad_()
    out = function(leaf * 1)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
    return grad


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
SHAPES = pytest.mark.parametrize("shape", [(9,), (6, 9), (3, 4, 9), (2, 3, 2, 9), (2, 0, 9), (0, 9)], ids=str)


@INPLACE
@SHAPES
def test_token_functions_are_their_formulas(shape: tuple[int, ...], inplace: bool) -> None:
    """Any number of leading dimensions; upstream gradients other than 1, 0 and negative ones too."""
    logits, labels, ref_logits, mask = batch(*shape)
    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (lambda z: token_logps(z, labels, inplace_backward=inplace), lambda z: log_probs(z, labels)),
        (
            lambda z: token_kl(z, ref_logits, mask, inplace_backward=inplace),
            lambda z: kl(z, ref_logits).where(mask, 0),
        ),
        (lambda z: token_kl(z, ref_logits, inplace_backward=inplace), lambda z: kl(z, ref_logits)),
        (
            lambda z: torch.stack(token_logps_kl(z, labels, ref_logits, mask, inplace_backward=inplace)),
            lambda z: torch.stack([log_probs(z, labels), kl(z, ref_logits).where(mask, 0)]),
        ),
    ]
    for ours, formula in pairs:
        out = ours(logits)
        assert out.shape[-len(shape) + 1 :] == shape[:-1] or len(shape) == 1
        near(out, formula(logits))
        near(gradient(ours, logits), gradient(formula, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@INPLACE
def test_token_logps_kl_within_the_budget(dtype: torch.dtype, inplace: bool) -> None:
    case = make_case(48, 1000, dtype)
    leaf = case.logits.clone().requires_grad_()
    logps, token_kls = token_logps_kl(leaf * 1, case.labels, case.ref_logits, case.mask, inplace_backward=inplace)
    assert logps.dtype == token_kls.dtype == torch.float32
    torch.autograd.backward((logps, token_kls), (case.dlogps, case.dkl))
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert_within_budget(Result(logps.detach(), token_kls.detach(), leaf.grad), truth(case), rounding(case))


def test_labels_masks_and_references_need_not_be_contiguous() -> None:
    logits, labels, ref_logits, mask = batch(3, 5, 9)
    strided = torch.stack([labels, labels], -1)[..., 0]
    strided_mask = mask.t().contiguous().t()
    transposed = ref_logits.transpose(-1, -2).contiguous().transpose(-1, -2)  # V is not the unit stride
    for got, want in zip(
        token_logps_kl(logits[:, :-1], strided[:, 1:], transposed[:, :-1], strided_mask[:, 1:]),
        token_logps_kl(logits[:, :-1].clone(), labels[:, 1:].clone(), ref_logits[:, :-1].clone(), mask[:, 1:].clone()),
        strict=True,
    ):
        assert_same(got, want)
    near(token_logps(logits.transpose(0, 1), labels.t()), log_probs(logits, labels).t())
    by_columns = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    near(gradient(lambda z: token_logps(z, labels), by_columns), gradient(lambda z: log_probs(z, labels), logits))


@INPLACE
def test_a_slice_of_longer_logits_gets_its_gradient_in_place(inplace: bool) -> None:
    """``logits[:, :-1]`` is read without a copy, and the rest of the logits has a zero gradient."""
    logits, labels, _, _ = batch(3, 5, 9)

    def ours(z: Tensor) -> Tensor:
        return token_logps(z[:, :-1], labels[:, 1:], inplace_backward=inplace)

    near(gradient(ours, logits), gradient(lambda z: log_probs(z[:, :-1], labels[:, 1:]), logits))


@INPLACE
@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps(average: bool, inplace: bool) -> None:
    logits, labels, _, _ = batch(4, 6, 9)
    labels[2] = IGNORE

    def formula(z: Tensor) -> Tensor:
        sums = log_probs(z, labels).sum(-1)
        return sums / (labels != IGNORE).sum(-1).clamp(min=1) if average else sums

    def ours(z: Tensor) -> Tensor:
        return sequence_logps(z, labels, average=average, inplace_backward=inplace)

    near(ours(logits), formula(logits))
    assert ours(logits)[2] == 0
    near(gradient(ours, logits), gradient(formula, logits))


@INPLACE
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("leading", [(), (1,)])
def test_packed_sequences_are_the_padded_ones(
    leading: tuple[int, ...], dtype: torch.dtype, average: bool, inplace: bool
) -> None:
    lengths = [3, 0, 5, 0, 1]  # two empty sequences, each between two others
    logits, labels, _, _ = batch(5, 5, 9)
    keep = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = labels.where(keep, IGNORE)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)

    def packed(z: Tensor) -> Tensor:
        rows, ids = z[keep].view(*leading, -1, 9), labels[keep].view(*leading, -1)
        return sequence_logps(rows, ids, cu_seqlens=cu_seqlens, average=average, inplace_backward=inplace)

    near(packed(logits), sequence_logps(logits, padded, average=average))
    near(gradient(packed, logits), gradient(lambda z: sequence_logps(z, padded, average=average), logits))


def test_sums_of_long_sequences_are_exact_in_both_layouts() -> None:
    """A sum of 131072 terms, added one by one in float32, is off by nats."""
    values = -5 * torch.rand(2, 131072)
    exact = values.double().sum(1).float()
    bounds = torch.tensor([0, 3, 3, 131075, 262147])
    packed = torch.cat([torch.tensor([-1e30, 1e30, 7]), *values])
    assert torch.equal(sequences.checked_sums(values, None, "values"), exact)
    assert sequences.checked_sums(packed, bounds, "values").tolist() == [7, 0, *exact.tolist()]
    assert sequences.checked_sums(packed[None], bounds.int(), "values").tolist() == [7, 0, *exact.tolist()]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_sequence_does_not_depend_on_its_neighbours(bad: float) -> None:
    values = torch.randn(4, 50)
    sums = sequences.checked_sums(values, None, "values")
    bounds = torch.arange(5) * 50
    values[1, 7] = bad
    for got in (
        sequences.checked_sums(values, None, "values"),
        sequences.checked_sums(values.flatten(), bounds, "values"),
    ):
        assert_same(got[[0, 2, 3]], sums[[0, 2, 3]])
        assert_same(got[1], torch.tensor(bad))


def test_the_gradient_of_a_sum_is_the_upstream_gradient_of_its_sequence() -> None:
    values, upstream = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.tensor([0.1, NAN, -3.0, 0.0])
    bounds = torch.tensor([0, 2, 2, 5, 7])
    (got,) = torch.autograd.grad(sequences.checked_sums(values, bounds, "values"), values, upstream.double())
    assert torch.equal(got, upstream.double()[[0, 0, 2, 2, 2, 3, 3]])
    padded = torch.randn(3, 2, requires_grad=True)
    (got,) = torch.autograd.grad(sequences.checked_sums(padded, None, "values"), padded, torch.arange(3.0))
    assert got.tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 2, 6])], ids=["padded", "packed"])
def test_opcheck_of_sequence_sums(cu_seqlens: Tensor | None) -> None:
    shape = (2, 3) if cu_seqlens is None else (6,)
    torch.library.opcheck(OPS.sequence_sums.default, (torch.randn(shape, requires_grad=True), cu_seqlens))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["token_logps", "token_kl", "token_logps_kl", "kl_loss", "sequence_logps", "packed", "average"]
)
@INPLACE
def test_rows_that_are_not_wanted_are_not_read(name: str, inplace: bool, poison: float) -> None:
    """Ignored, masked and weightless rows, and rows whose upstream gradient is 0."""
    logits, labels, ref_logits, _ = batch(3, 4, 9)
    labels = labels.clamp(min=0)
    marked, silent = torch.zeros(2, 3, 4, dtype=torch.bool)
    marked[0, 1:3], silent[2] = True, True
    labels[marked] = IGNORE
    ends = torch.arange(4) * 4

    def rows(z: Tensor, r: Tensor) -> Tensor:
        if name == "token_logps":
            return token_logps(z, labels, inplace_backward=inplace)
        if name == "token_kl":
            return token_kl(z, r, ~marked, inplace_backward=inplace)
        if name == "token_logps_kl":
            return torch.stack(token_logps_kl(z, labels, r, ~marked, inplace_backward=inplace), -1).sum(-1)
        if name == "kl_loss":
            weight = (~(marked | silent)).double() * torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
            return kl_loss(z, r, row_weight=weight, overwrite_logits=inplace)[None]
        if name == "packed":
            return sequence_logps(z.flatten(0, 1), labels.flatten(), cu_seqlens=ends, inplace_backward=inplace)
        return sequence_logps(z, labels, average=name == "average", inplace_backward=inplace)

    def weighted(z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        out = rows(leaf * 1, r)
        weight = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        if len(out) == 3:
            weight[2] = 0
        total = (out * weight).where(weight != 0, 0).sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    want = weighted(logits, ref_logits)
    unread = marked | silent
    poisoned, poisoned_ref = logits.clone(), ref_logits.clone()
    poisoned[unread] = poisoned_ref[unread] = poison
    got = weighted(poisoned, poisoned_ref)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    assert not got[1][unread].any()


def test_packed_sequences_at_the_ends() -> None:
    logits, labels, _, _ = batch(4, 9)
    want = log_probs(logits, labels).sum()
    for bounds, expected in (([0, 0, 4], [0, want]), ([0, 4, 4, 4], [want, 0, 0]), ([0, 4], [want])):
        near(sequence_logps(logits, labels, cu_seqlens=torch.tensor(bounds)), torch.tensor(expected).to(logits))
    assert sequence_logps(logits[:0], labels[:0], cu_seqlens=torch.tensor([0])).shape == (0,)
    assert sequence_logps(logits[:0], labels[:0], cu_seqlens=torch.tensor([0, 0])).tolist() == [0]


@pytest.mark.parametrize("average", [False, True])
def test_get_batch_logps_is_the_dpo_reference_code(average: bool) -> None:
    logits, labels, _, _ = batch(3, 6, 9)

    def formula(z: Tensor) -> Tensor:
        targets, aligned = labels[:, 1:], z[:, :-1]
        wanted = targets != IGNORE
        picked = aligned.log_softmax(-1).gather(2, targets.masked_fill(~wanted, 0).unsqueeze(2)).squeeze(2)
        return (picked * wanted).sum(-1) / (wanted.sum(-1) if average else 1)

    near(get_batch_logps(logits, labels, average), formula(logits))
    near(gradient(lambda z: get_batch_logps(z, labels, average), logits), gradient(formula, logits))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
def test_kl_loss_is_the_weighted_sum_of_token_kl(
    upstream: float, weighted: bool, masked: bool, overwrite: bool
) -> None:
    logits, _, ref_logits, mask = batch(3, 4, 9)
    row_weight = torch.rand(3, 4) if weighted else None  # float32: any floating dtype will do
    wanted = mask if masked else None

    def total(z: Tensor) -> Tensor:
        return (token_kl(z, ref_logits, wanted) * (1 if row_weight is None else row_weight)).sum()

    def ours(z: Tensor) -> Tensor:
        return kl_loss(z, ref_logits, wanted, row_weight=row_weight, overwrite_logits=overwrite)

    leaf = logits.clone().requires_grad_()
    loss = ours(leaf * 1)
    near(loss, total(logits))
    loss.backward(torch.tensor(upstream, dtype=torch.float64))
    want = logits.clone().requires_grad_()
    (total(want) * upstream).backward()
    assert leaf.grad is not None
    assert want.grad is not None
    near(leaf.grad, want.grad)
    with torch.no_grad():
        near(ours(logits), total(logits))
    near(ours(logits), total(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
def test_kl_loss_within_the_budget(overwrite: bool, dtype: torch.dtype) -> None:
    case = make_case(48, 1000, dtype, mode="kl")
    weight = case.dkl.where(case.mask, 0)
    leaf = case.logits.clone().requires_grad_()
    loss = kl_loss(leaf * 1, case.ref_logits, case.mask, row_weight=case.dkl, overwrite_logits=overwrite)
    loss.backward()
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    assert leaf.grad is not None
    assert_rounded(loss.detach(), (true.kl * weight).sum(), loss_rounding(rounded, true, weight), "loss")
    assert_rounded(leaf.grad, true.dlogits, rounded.dlogits, "dlogits")


@pytest.mark.parametrize("overwrite", [False, True])
def test_kl_loss_of_float16_gets_its_loss_scale_before_it_is_rounded(overwrite: bool) -> None:
    """With a gradient scaler: the gradient is far below float16's range, but within it after the upstream scale."""
    logits, ref_logits = torch.randn(2, 4, 300, dtype=torch.float64)
    logits, ref_logits, row_weight = logits.half(), ref_logits.half(), torch.full((4,), 1e-6)
    leaf = logits.clone().requires_grad_()
    (kl_loss(leaf * 1, ref_logits, row_weight=row_weight, overwrite_logits=overwrite) * 2.0**20).backward()
    exact = logits.double().requires_grad_()
    (token_kl(exact, ref_logits.double()) * row_weight.double()).sum().mul(2.0**20).backward()
    assert leaf.grad is not None and exact.grad is not None
    assert (leaf.grad.double() - exact.grad).norm() < 1e-3 * exact.grad.norm()


def test_kl_loss_overwrites_the_logits_only_when_told() -> None:
    logits, _, ref_logits, _ = batch(4, 9)
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        z = leaf * 1
        loss = kl_loss(z, ref_logits, overwrite_logits=overwrite)
        assert torch.equal(z, logits) != overwrite
        loss.backward()
        near(z.detach(), leaf.grad if overwrite else logits)  # type: ignore[arg-type]
    z = logits.clone()
    kl_loss(z, ref_logits, overwrite_logits=True)
    assert_same(z, logits, "logits without gradients")


def test_no_gradient_flows_to_row_weight() -> None:
    logits, _, ref_logits, _ = batch(4, 9)
    row_weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    kl_loss(logits.requires_grad_(), ref_logits, row_weight=row_weight).backward()
    assert row_weight.grad is None


CALLS: dict[str, Function] = {
    "token_logps": lambda z, labels, r, mask, **kw: token_logps(z, labels, **kw),
    "token_kl": lambda z, labels, r, mask, **kw: token_kl(z, r, mask, **kw),
    "token_logps_kl": lambda z, labels, r, mask, **kw: torch.stack(token_logps_kl(z, labels, r, mask, **kw)),
    "sequence_logps": lambda z, labels, r, mask, **kw: sequence_logps(z, labels, **kw),
    "kl_loss": lambda z, labels, r, mask, **kw: kl_loss(z, r, mask, **kw),
}
OPTION = {name: "overwrite_logits" if name == "kl_loss" else "inplace_backward" for name in CALLS}
PUBLIC = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "kl_loss"])
def test_gradcheck(name: str) -> None:
    """Finite differences. kl_loss and in-place backwards are left out: they run backward once, and gradcheck twice.

    The tests above compare these with the functions that are checked here.
    """
    logits, labels, ref_logits, mask = batch(2, 3, 5)
    logits.requires_grad_()
    function = CALLS[name]
    assert torch.autograd.gradcheck(lambda z: function(z * 1, labels, ref_logits, mask), (logits,))


def test_one_output_alone_can_be_differentiated() -> None:
    logits, labels, ref_logits, mask = batch(4, 9)
    leaf = logits.requires_grad_()
    both = token_logps_kl(leaf, labels, ref_logits, mask)
    for got, want in zip(both, (log_probs(leaf, labels), kl(leaf, ref_logits).where(mask, 0)), strict=True):
        (grad,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
        near(grad, torch.autograd.grad(want.sum(), leaf)[0])


@PUBLIC
def test_the_same_bits_in_place(name: str) -> None:
    logits, labels, ref_logits, mask = batch(7, 5, 33, dtype=torch.float32)

    def with_option(on: bool) -> Callable[[Tensor], Tensor]:
        return lambda z: CALLS[name](z, labels, ref_logits, mask, **{OPTION[name]: on})

    assert_same(gradient(with_option(True), logits), gradient(with_option(False), logits))


@PUBLIC
def test_in_place_takes_no_new_memory_for_the_gradient(name: str) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    z = logits.requires_grad_() * 1
    z.retain_grad()
    seen: list[Tensor] = []
    z.register_hook(seen.append)
    CALLS[name](z, labels, ref_logits, mask, **{OPTION[name]: True}).sum().backward()
    assert seen[0].data_ptr() == z.data_ptr()


def keep_saved_tensors() -> tuple[list[Tensor], Any]:
    """A list, and a context within which autograd puts there what it saves."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    return saved, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


@PUBLIC
@INPLACE
def test_nothing_v_wide_is_kept_but_the_inputs(name: str, inplace: bool) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 64, dtype=torch.float32)
    z = logits.requires_grad_() * 1
    saved, hooks = keep_saved_tensors()
    with hooks:
        CALLS[name](z, labels, ref_logits, mask, **{OPTION[name]: inplace})
    wide = {x.data_ptr() for x in saved if x.numel() >= z.numel()} - {z.data_ptr(), ref_logits.data_ptr()}
    # kl_loss keeps one such tensor, the gradient from the forward, unless it may overwrite the logits with it.
    assert len(wide) == (name == "kl_loss" and not inplace)


@PUBLIC
def test_without_gradients_nothing_is_saved(name: str) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    saved, hooks = keep_saved_tensors()
    with hooks:
        with torch.no_grad():
            out = CALLS[name](logits.clone().requires_grad_(), labels, ref_logits, mask, **{OPTION[name]: True})
        assert not CALLS[name](logits, labels, ref_logits, mask).requires_grad
    assert not out.requires_grad
    assert not saved


AUTOGRAD_REFUSES = "modified by an inplace operation"
ONCE = r"^spo_kernels\.functional: .*backward can run only once.* leave the option out"
KL_LOSS_ONCE = (
    r"^spo_kernels\.kl_loss can run backward only once.* use \(row_weight \* spo_kernels\.token_kl\(\.\.\.\)\)"
)


@PUBLIC
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_second_backward_in_place_raises(name: str, upstream: float) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    out = CALLS[name](logits.requires_grad_() * 1, labels, ref_logits, mask, **{OPTION[name]: True}).sum() * upstream
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=KL_LOSS_ONCE if name == "kl_loss" else ONCE):
        out.backward()


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_second_backward_of_kl_loss_raises(upstream: float) -> None:
    logits, _, ref_logits, _ = batch(4, 9)
    leaf = logits.requires_grad_()
    out = kl_loss(leaf, ref_logits) * upstream
    (first,) = torch.autograd.grad(out, leaf, retain_graph=True)
    want = first.clone()
    with pytest.raises(RuntimeError, match=KL_LOSS_ONCE):
        out.backward()
    assert_same(first, want, "the first gradient")
    registered = OPS.kl_loss_fwd(leaf, ref_logits, None, *PLAIN)[0] * upstream
    registered.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=KL_LOSS_ONCE):
        registered.backward()
    half = leaf.detach().half().requires_grad_()  # in float16 the backward computes the gradient
    out = kl_loss(half * 1, ref_logits.half(), overwrite_logits=True) * upstream
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        out.backward()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "kl_loss"])  # kl_loss runs backward once
def test_a_second_backward_out_of_place_is_the_first(name: str) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    leaf = logits.requires_grad_()
    out = CALLS[name](leaf, labels, ref_logits, mask).sum()
    (first,) = torch.autograd.grad(out, leaf, retain_graph=True)
    assert_same(torch.autograd.grad(out, leaf)[0], first)


@PUBLIC
def test_two_uses_in_place_raise(name: str) -> None:
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    option = {OPTION[name]: True}
    others: list[Callable[[Tensor], Tensor]] = [
        lambda z: CALLS[name](z, labels, ref_logits, mask, **option),
        lambda z: token_logps(z, labels),
        torch.square,
    ]
    for other in others:
        z = logits.clone().requires_grad_() * 1
        out = other(z).sum()
        out = out + CALLS[name](z, labels, ref_logits, mask, **option).sum()
        with pytest.raises(RuntimeError, match=f"{AUTOGRAD_REFUSES}|{OVERWRITTEN}"):
            out.backward()


OVERWRITTEN = r"spo_kernels\.kl_loss with overwrite_logits=True has replaced the logits"
LATER_USES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda z: z.logsumexp(-1).square().mean(),
    "token_logps": lambda z: token_logps(z, torch.zeros(z.shape[:-1], dtype=torch.int64)).sum(),
    "in place": lambda z: z.mul_(2).sum(),
    "view": lambda z: z[..., 1:].square().sum(),
    "saves nothing": lambda z: z.sum(),
}


@pytest.mark.parametrize("layout", ["whole", "slice", "view of it", "rows"])
@pytest.mark.parametrize("use", LATER_USES)
def test_a_later_use_of_overwritten_logits_raises_in_the_backward(use: str, layout: str) -> None:
    """A use of the logits, of the tensor that they are a part of, and of a view made before the overwriting."""
    leaf = torch.randn(3, 5, 9, requires_grad=True)
    base = leaf * 1
    earlier = base[:2]
    logits = {"whole": base, "slice": base[:, :-1], "view of it": base.view(15, 9)[1:], "rows": base[1]}[layout]
    loss = kl_loss(logits, torch.randn_like(logits), overwrite_logits=True)
    for used in (logits, base, earlier):
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            torch.autograd.grad(loss + LATER_USES[use](used), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        torch.autograd.grad(logits.sum(), leaf)


def test_other_parts_of_overwritten_logits_may_be_used() -> None:
    """One forward gives the pairs' logits and the samples'; the latter are overwritten first."""
    leaf, ref_logits = torch.randn(5, 4, 9, requires_grad=True), torch.randn(2, 4, 9)
    labels = torch.zeros(3, 4, dtype=torch.int64)

    def objective(overwrite: bool) -> Tensor:
        logits = leaf * 1
        loss = kl_loss(logits[3:], ref_logits, overwrite_logits=overwrite)
        return loss + sequence_logps(logits[:3], labels).sum()

    (got,), (want,) = (torch.autograd.grad(objective(overwrite), leaf) for overwrite in (True, False))
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["chunk", "split", "unbind", "no_grad"])
def test_views_whose_later_use_cannot_be_seen_are_not_overwritten(kind: str) -> None:
    base = torch.randn(2, 3, 9, requires_grad=True) * 1
    if kind == "no_grad":
        with torch.no_grad():
            base = torch.randn(2, 3, 9)
            view = base[0]
        base.mul_(torch.ones(9, requires_grad=True))
    else:
        view = {"chunk": base.chunk(2)[0], "split": base.split(1)[0], "unbind": base.unbind()[0]}[kind]
    before = view.detach().clone()
    with pytest.raises(ValueError, match="overwrite_logits=True needs logits that an in-place operation may change"):
        kl_loss(view, torch.randn_like(view), overwrite_logits=True)
    assert torch.equal(view, before)


@pytest.mark.parametrize(("name", "inplace"), [*((name, True) for name in CALLS), ("kl_loss", False)])
def test_double_backward_raises(name: str, inplace: bool) -> None:
    """Where a gradient penalty cannot be right, it must not come out as a constant. test_kinds.py has the others."""
    logits, labels, ref_logits, mask = batch(4, 5, 9)
    leaf = logits.requires_grad_()
    out = CALLS[name](leaf * 1, labels, ref_logits, mask, **{OPTION[name]: inplace}).sum()

    def penalty() -> None:
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        (grad.square().sum() + leaf.sum()).backward()

    with pytest.raises(RuntimeError, match=r"double backward|differentiated again|differentiate twice"):
        penalty()


def not_free(kind: str) -> Tensor:
    """Logits whose memory must not be overwritten."""
    base = torch.randn(4, 5, 9, requires_grad=True)
    return {
        "leaf": lambda: base,
        "view of a leaf": lambda: base[:, 1:].transpose(0, 1),
        "expanded": lambda: (torch.randn(1, 5, 9, requires_grad=True) * 1).expand(4, 5, 9),
        "overlapping": lambda: (torch.randn(30, requires_grad=True) * 1).as_strided((4, 5, 9), (5, 1, 1)),
        "overlapping rows": lambda: (torch.randn(40, requires_grad=True) * 1).unfold(0, 9, 3),
        "not unit stride": lambda: (torch.randn(4, 9, 5, requires_grad=True) * 1).transpose(1, 2),
    }[kind]()


@PUBLIC
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("leaf", "leaf"),
        ("view of a leaf", "leaf"),
        ("expanded", "without shared memory"),
        ("overlapping", "without shared memory"),
        ("overlapping rows", "without shared memory"),
        ("not unit stride", "unit last stride"),
    ],
)
def test_memory_that_is_not_free_is_refused(name: str, kind: str, message: str) -> None:
    z = not_free(kind)
    if name == "sequence_logps" and z.dim() == 2:
        z = z[None]
    rows = z.shape[:-1]
    labels, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    arguments = (labels, z.detach().clone(), mask)
    with pytest.raises(ValueError, match=rf"^{OPTION[name]}=True .*{message}"):
        CALLS[name](z, *arguments, **{OPTION[name]: True})
    CALLS[name](z, *arguments)
    with torch.no_grad():
        CALLS[name](z, *arguments, **{OPTION[name]: True})


@PUBLIC
def test_autocast_changes_nothing(name: str) -> None:
    logits, labels, ref_logits, mask = batch(3, 4, 9, dtype=torch.float32)
    plain = gradient(lambda z: CALLS[name](z, labels, ref_logits, mask), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = CALLS[name](logits, labels, ref_logits, mask)
        cast = gradient(lambda z: CALLS[name](z, labels, ref_logits, mask), logits)
    assert out.dtype == torch.float32
    assert_same(out, CALLS[name](logits, labels, ref_logits, mask))
    assert_same(cast, plain)


# The compiler. aot_eager runs every stage that can fail here: tracing, fake kernels, functionalization of the in-place
# ops. It leaves out code generation, which takes seconds a graph and does not look inside these ops.
@PUBLIC
@INPLACE
@pytest.mark.parametrize("place", ["input", "intermediate"])
def test_compile_fullgraph(name: str, inplace: bool, place: str) -> None:
    torch._dynamo.reset()
    logits, labels, ref_logits, mask = batch(3, 4, 9, dtype=torch.float32)

    def call(z: Tensor) -> Tensor:
        return CALLS[name](z, labels, ref_logits, mask, **{OPTION[name]: inplace})

    compiled = torch.compile(
        (lambda z: call(z * 2)) if place == "intermediate" else call, fullgraph=True, backend="aot_eager"
    )
    scale = 1 if place == "intermediate" else 2
    got = gradient(lambda z: compiled(z * scale), logits)
    torch.testing.assert_close(got, gradient(lambda z: CALLS[name](z * 2, labels, ref_logits, mask), logits))


def everything(z: Tensor, labels: Tensor, r: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Every public function from logits, two of them in place on the same ones."""
    logps, token_kls = token_logps_kl(z, labels, r, mask, inplace_backward=True)
    return (
        logps.sum()
        + 2 * token_kls.sum()
        + token_logps(z, labels, inplace_backward=True).sum()
        + sequence_logps(z.flatten(0, 1), labels.flatten(), cu_seqlens=cu_seqlens, average=True).sum()
        + 3 * kl_loss(z, r, mask, row_weight=logps.detach(), overwrite_logits=True)
        + get_batch_logps(z, labels).sum()
        + token_kl(z, r).sum()
    )


def test_compile_dynamic_shapes_and_several_uses_in_place() -> None:
    """Two uses in place of the same logits, which raise in eager mode, are right where the compiler owns the memory."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, *rest: everything(z * 2, *rest), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((3, 4, 9), (2, 7, 33)):
        logits, labels, ref_logits, mask = batch(*shape)
        rows = labels.numel()
        rest = (labels, ref_logits, mask, torch.tensor([0, rows // 3, rows // 3, rows]))
        want = logits.clone().requires_grad_()
        expected = everything_out_of_place(want * 2, *rest)
        expected.backward()
        leaf = logits.clone().requires_grad_()
        out = compiled(leaf, *rest)
        out.backward()
        near(out, expected)
        near(leaf.grad, want.grad)  # type: ignore[arg-type]


def test_compile_with_the_default_compiler() -> None:
    torch._dynamo.reset()
    logits, labels, ref_logits, _ = batch(3, 4, 9)

    def step(z: Tensor) -> Tensor:
        return token_logps(z, labels, inplace_backward=True).sum() + 3 * kl_loss(z, ref_logits, overwrite_logits=True)

    got = gradient(lambda z: torch.compile(step, fullgraph=True)(z * 2), logits)
    near(got, gradient(lambda z: log_probs(z * 2, labels).sum() + 3 * kl(z * 2, ref_logits).sum(), logits))


def everything_out_of_place(z: Tensor, labels: Tensor, r: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    logps, token_kls = token_logps_kl(z, labels, r, mask)
    packed = sequence_logps(z.flatten(0, 1), labels.flatten(), cu_seqlens=cu_seqlens, average=True)
    weighted = (token_kl(z, r, mask) * logps.detach()).sum()
    total = logps.sum() + 2 * token_kls.sum() + token_logps(z, labels).sum() + packed.sum() + 3 * weighted
    return total + get_batch_logps(z, labels).sum() + token_kl(z, r).sum()


def op_arguments(op: str) -> tuple[Any, ...]:
    logits, labels, ref_logits, mask = batch(3, 4, 9, dtype=torch.float32)
    options = RowOptions(8, torch.rand(2, 12) + 0.5, torch.rand(1, 1) + 0.5)
    labels = labels.clamp(max=7)
    _, kls, stats = OPS.token_stats_fwd(logits, labels, ref_logits, mask, IGNORE, False, *options)
    upstream, saved = torch.rand(3, 3, 4), (labels, ref_logits, mask, kls, stats, IGNORE)
    return {
        "token_stats_fwd": (logits.clone().requires_grad_(), labels, ref_logits, mask, IGNORE, False, *options),
        "token_stats_bwd": (*upstream, logits, *saved, *options),
        "token_stats_bwd_": (*upstream, logits, *saved, *options),
        "kl_loss_fwd": (logits.clone().requires_grad_(), ref_logits, torch.rand(3, 4), *options),
        "kl_loss_fwd_": (logits, ref_logits, torch.rand(3, 4), *options),
        "scale_": (logits, torch.tensor(2.0)),
    }[op]


@pytest.mark.parametrize(
    "op", ["token_stats_fwd", "token_stats_bwd", "token_stats_bwd_", "kl_loss_fwd", "kl_loss_fwd_", "scale_"]
)
def test_opcheck(op: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op != "kl_loss_fwd":
        # kl_loss_fwd also returns the gradient, which its backward scales in place. The test left out makes every
        # output an output of the graph, which must not change in place. The public function returns the loss alone.
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, op).default, op_arguments(op), test_utils=tests)


@pytest.mark.parametrize("mode", ["logps", "kl"])
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck_of_token_stats_with_optional_arguments(mode: str, inplace: bool) -> None:
    logits, labels, ref_logits, _, index, _, *_ = op_arguments("token_stats_fwd")
    args = (
        (logits, labels, None, None, index, inplace, *PLAIN)
        if mode == "logps"
        else (logits, None, ref_logits, None, index, inplace, *PLAIN)
    )
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not inplace:  # the backward overwrites a leaf here, which the public functions refuse
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.token_stats_fwd.default, args, test_utils=tests)


Z, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
M = torch.ones(2, 3, dtype=torch.bool)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no vocabulary": (lambda: token_logps(Z[..., :0], Y), "logits must be [..., V] with V >= 1, got [2, 3, 0]"),
    "0-d logits": (lambda: token_kl(Z[0, 0, 0], Z), "logits must be [..., V] with V >= 1, got []"),
    "integer logits": (
        lambda: token_logps(Z.int(), Y),
        "logits must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "labels shape": (lambda: token_logps(Z, Y[:, 1:]), "labels must be [2, 3] int64, got [2, 2] int64"),
    "labels dtype": (lambda: token_logps_kl(Z, Y.int(), Z), "labels must be [2, 3] int64, got [2, 3] int32"),
    "labels of sequences": (lambda: sequence_logps(Z, Y[0]), "labels must be [2, 3] int64, got [3] int64"),
    "labels device": (lambda: token_logps(Z, Y.to("meta")), "labels must be on cpu like logits, got meta"),
    "mask shape": (lambda: token_kl(Z, Z, M[:1]), "mask must be [2, 3] bool, got [1, 3] bool"),
    "mask dtype": (lambda: token_logps_kl(Z, Y, Z, M.float()), "mask must be [2, 3] bool, got [2, 3] float32"),
    "mask of the loss": (lambda: kl_loss(Z, Z, M.long()), "mask must be [2, 3] bool, got [2, 3] int64"),
    "ref_logits shape": (lambda: token_kl(Z, Z[:1]), "ref_logits must be [2, 3, 5] like logits, got [1, 3, 5]"),
    "ref_logits dtype": (
        lambda: token_kl(Z, Z.double()),
        "ref_logits must be float64 exactly when logits are, got torch.float64",
    ),
    "ref_logits integer": (lambda: token_kl(Z, Z.long()), "ref_logits must be float32, bfloat16, float16 or float64"),
    "ref_logits device": (lambda: kl_loss(Z, Z.to("meta")), "ref_logits must be on cpu like logits, got meta"),
    "ref_logits grad": (
        lambda: token_logps_kl(Z, Y, Z.clone().requires_grad_()),
        "ref_logits must not require grad: the gradient flows to the policy only (use .detach())",
    ),
    "row_weight dtype": (lambda: kl_loss(Z, Z, row_weight=Y), "row_weight must be floating, got torch.int64"),
    "row_weight shape": (
        lambda: kl_loss(Z, Z, row_weight=Z[:, 0, 0]),
        "row_weight must be [2, 3] float32, got [2] float32",
    ),
    "labels not [B, T]": (lambda: sequence_logps(Z[0], Y[0]), "labels must be [B, T] without cu_seqlens, got [3]"),
    "labels not packed": (
        lambda: sequence_logps(Z, Y, cu_seqlens=torch.tensor([0, 6])),
        "labels must be [N] or [1, N] with cu_seqlens, got [2, 3]",
    ),
    "cu_seqlens shape": (
        lambda: sequence_logps(Z[0], Y[0], cu_seqlens=torch.tensor([[0, 3]])),
        "cu_seqlens must be [B + 1] int32 or int64, got [1, 2] int64",
    ),
    "cu_seqlens empty": (
        lambda: sequence_logps(Z[0], Y[0], cu_seqlens=torch.tensor([], dtype=torch.int64)),
        "cu_seqlens must be [B + 1] int32 or int64, got [0] int64",
    ),
    "cu_seqlens dtype": (
        lambda: sequence_logps(Z[0], Y[0], cu_seqlens=torch.tensor([0.0, 3.0])),
        "cu_seqlens must be [B + 1] int32 or int64, got [2] float32",
    ),
    "cu_seqlens device": (
        lambda: sequence_logps(Z[0], Y[0], cu_seqlens=torch.tensor([0, 3], device="meta")),
        "cu_seqlens must be on cpu like logits, got meta",
    ),
    "get_batch_logps labels": (lambda: get_batch_logps(Z, Y[:, 1:]), "labels must be [2, 3] int64, got [2, 2] int64"),
    "get_batch_logps logits": (lambda: get_batch_logps(Z[0], Y[0]), "labels must be [B, T]"),
    "get_batch_logps row": (lambda: get_batch_logps(Z[0, 0], Y[0, 0]), "labels must be [B, T]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("bounds", [[1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0, -1, 3], [3, 0]])
def test_cu_seqlens_that_are_not_bounds(bounds: list[int]) -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the number of rows N"):
        sequence_logps(Z[0], Y[0], cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("label", [-1, 5, -(2**62)])
def test_a_label_out_of_range_is_named(label: int) -> None:
    for function in (token_logps, sequence_logps, lambda z, y: token_logps_kl(z, y, z)):
        with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 5\) or ignore_index -100, got {label}\b"):
            function(Z, torch.full((2, 3), label))
