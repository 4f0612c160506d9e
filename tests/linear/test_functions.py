"""The head's functions: every option against float64 formulas, every layout and dtype, and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    CHUNKS,
    FUNCTIONS,
    OPTIONS,
    WITH_OPTIONS,
    Inputs,
    Options,
    all_near,
    differentiate,
    entropy_of,
    kl_of,
    logits_of,
    logps_of,
    near,
    set_tile_sizes,
)
from oracle import HALF_DTYPES, IGNORE, assert_close, assert_same
from torch import Tensor

from spo_kernels import (
    LinearSPOLoss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)


@CHUNKS
@WITH_OPTIONS
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_token_logps_is_its_formula(
    with_bias: bool, options: Options, chunk_size: int | None, small_tiles: None
) -> None:
    x = Inputs(3, 7)
    inputs = x.policy if with_bias else x.policy[:2]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_token_logps(hidden, weight, x.labels, bias, chunk_size=chunk_size, **options)

    def formula(*head: Tensor) -> Tensor:
        return logps_of(logits_of(*head, **options), x.labels)

    all_near(differentiate(ours, inputs, x.upstream), differentiate(formula, inputs, x.upstream))


@WITH_OPTIONS
def test_entropy_comes_with_its_gradient(options: Options, small_tiles: None) -> None:
    x = Inputs(3, 7)
    valid = x.labels != IGNORE

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack(linear_token_logps(hidden, weight, x.labels, bias, return_entropy=True, **options))

    def formula(*head: Tensor) -> Tensor:
        z = logits_of(*head, **options)
        return torch.stack([logps_of(z, x.labels), entropy_of(z).where(valid, 0)])

    for weights in ((1.0, -2.0), (1.0, 0.0), (0.0, 1.0)):
        upstream = torch.stack([weight * x.upstream for weight in weights])
        all_near(differentiate(ours, x.policy, upstream), differentiate(formula, x.policy, upstream))
    # One output alone: the other has no upstream gradient at all.
    for index in (0, 1):
        got = differentiate(lambda *policy, i=index: ours(*policy)[i], x.policy, x.upstream)
        all_near(got, differentiate(lambda *policy, i=index: formula(*policy)[i], x.policy, x.upstream))


@CHUNKS
@WITH_OPTIONS
@pytest.mark.parametrize("masked", [False, True])
def test_linear_token_kl_is_its_formula(
    masked: bool, options: Options, chunk_size: int | None, small_tiles: None
) -> None:
    """Heads of different hidden size, only one of them with a bias."""
    x = Inputs(3, 7)
    mask = x.mask if masked else None

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reference = (x.ref_hidden, x.ref_weight)
        return linear_token_kl(hidden, weight, *reference, mask, bias, chunk_size=chunk_size, **options)

    def formula(*head: Tensor) -> Tensor:
        kl = kl_of(logits_of(*head, **options), logits_of(x.ref_hidden, x.ref_weight, **options))
        return kl if mask is None else kl.where(mask, 0)

    all_near(differentiate(ours, x.policy, x.upstream), differentiate(formula, x.policy, x.upstream))


@CHUNKS
@WITH_OPTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_linear_kl_loss_is_its_formula(
    upstream: float, masked: bool, weighted: bool, options: Options, chunk_size: int | None, small_tiles: None
) -> None:
    x = Inputs(3, 7)
    mask, row_weight = x.mask if masked else None, x.upstream.float() if weighted else None
    reference = (x.ref_hidden, x.ref_weight)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options_and_tile = {**options, "chunk_size": chunk_size}
        return linear_kl_loss(hidden, weight, *reference, mask, bias, row_weight=row_weight, **options_and_tile)

    def formula(*head: Tensor) -> Tensor:
        kl = kl_of(logits_of(*head, **options), logits_of(*reference, **options))
        kl = kl if row_weight is None else kl * row_weight
        return (kl if mask is None else kl.where(mask, 0)).sum()

    want = differentiate(formula, x.policy, upstream)
    all_near(differentiate(ours, x.policy, upstream), want)
    with torch.no_grad():
        near(ours(*x.policy), want[0])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("leading", [None, (), (1,)], ids=["padded", "packed", "packed in a batch of 1"])
def test_linear_sequence_logps(leading: tuple[int, ...] | None, average: bool) -> None:
    x = Inputs(5, 6)
    lengths = torch.tensor([3, 0, 6, 0, 1])
    keep = torch.arange(6) < lengths[:, None]
    x.labels[2] = IGNORE
    padded = x.labels.where(keep, IGNORE)

    def formula(*head: Tensor) -> Tensor:
        sums = logps_of(logits_of(*head), padded).sum(-1)
        return sums / (padded != IGNORE).sum(-1).clamp(min=1) if average else sums

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if leading is None:
            return linear_sequence_logps(hidden, weight, padded, bias, average=average)
        rows, labels = hidden[keep].view(*leading, -1, 8), x.labels[keep].view(*leading, -1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        return linear_sequence_logps(rows, weight, labels, bias, cu_seqlens=cu_seqlens, average=average)

    upstream = torch.linspace(-1, 2, 5)
    all_near(differentiate(ours, x.policy, upstream), differentiate(formula, x.policy, upstream))


@pytest.mark.parametrize("function", ["logps", "kl"])
def test_gradcheck(function: str, small_tiles: None) -> None:
    x = Inputs(2, 3, h=3, v=13)
    leaves = tuple(tensor.requires_grad_() for tensor in x.policy)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        options = OPTIONS["all"]
        if function == "kl":
            return linear_token_kl(hidden, weight, x.ref_hidden, x.ref_weight, x.mask, bias, **options)
        return linear_token_logps(hidden, weight, x.labels, bias, return_entropy=True, **options)

    assert torch.autograd.gradcheck(ours, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_within_the_budget(
    chunk_size: int | None, options: str, name: str, dtype: torch.dtype, native: bool, small_tiles: None
) -> None:
    """Compared with float64 of the same rounded inputs.

    The yardstick is eager PyTorch on float32 logits. Its products are in the inputs' dtype if native products are
    selected, else in float32.
    """
    if dtype == torch.float32 and native:
        pytest.skip("the choice is of half precision alone")
    x = Inputs(48, h=32, v=211, dtype=dtype)
    ours, formula = FUNCTIONS[name]
    kw = OPTIONS[options]

    def by_formula(wide: torch.dtype, products: torch.dtype) -> list[Tensor]:
        def value(*policy: Tensor) -> Tensor:
            ref_z = logits_of(*(tensor.to(products) for tensor in x.reference), **kw, wide=wide)
            return formula(x, logits_of(*policy, **kw, wide=wide), ref_z)

        return differentiate(value, tuple(tensor.to(products) for tensor in x.policy), x.upstream)

    got = differentiate(lambda *policy: ours(x, policy, chunk_size=chunk_size, **kw), x.policy, x.upstream)
    truth = by_formula(torch.float64, torch.float64)
    yardstick = by_formula(torch.float32, dtype if native else torch.float32)
    assert got[0].dtype == torch.float32
    for label, actual, true, eager in zip((name, "hidden", "weight", "bias"), got, truth, yardstick, strict=True):
        assert label == name or actual.dtype == dtype
        assert_close(actual, true, eager, label)


def test_the_weight_is_summed_in_float32_over_tiles(native: bool) -> None:
    """The tiles are many and equal, so a sum in bfloat16 would stop growing at 256 times its terms."""
    rows = 2048
    hidden = torch.ones(rows, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16)
    labels = torch.zeros(rows, dtype=torch.int64)
    _, _, dweight, dbias = differentiate(
        lambda h, w, b: linear_token_logps(h, w, labels, b, chunk_size=1), (hidden, weight, bias)
    )
    for gradient in (dweight, dbias[:, None]):
        torch.testing.assert_close(
            gradient[0].float(), torch.full_like(gradient[0], rows * 2 / 3).float(), rtol=0.01, atol=0
        )
        torch.testing.assert_close(
            gradient[1].float(), torch.full_like(gradient[1], -rows / 3).float(), rtol=0.01, atol=0
        )


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_gradients_are_rounded_once_or_twice(native: bool, dtype: torch.dtype) -> None:
    """The gradients are rounded when they are stored. Native products on a CPU also round each tile's share."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 64).to(dtype), (torch.randn(501, 64) / 8).to(dtype)
    labels = torch.randint(501, (1024,))

    def gradients(to: torch.dtype, chunk_size: int | None) -> list[Tensor]:
        head = (hidden.to(to), weight.to(to))
        return differentiate(lambda h, w: linear_token_logps(h, w, labels, chunk_size=chunk_size), head)[1:]

    for true, got in zip(gradients(torch.float64, None), gradients(dtype, 64), strict=True):
        once = (true.to(dtype).double() - true).norm()
        assert (got.double() - true).norm() < (1.6 if native else 1.05) * once


def test_equal_heads_have_a_kl_of_exactly_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs(70, h=24, v=3000, dtype=dtype)
        for chunk_size in (None, 9):
            kl = linear_token_kl(*x.policy[:2], *x.policy[:2], None, x.bias, x.bias, chunk_size=chunk_size)
            assert not kl.any()


def test_minus_infinity_in_the_bias_masks_tokens(small_tiles: None) -> None:
    """Whole blocks of the vocabulary have no probability, also the first and the last; logits are near 1e4."""
    x = Inputs(6)
    hidden, weight, bias = (tensor.float() for tensor in x.policy)
    labels = torch.full((6,), 15)
    for offset in (0.0, 1e4, -1e4):
        masked = bias + offset
        masked[:13] = masked[22:] = -torch.inf
        got = differentiate(lambda h, w, b=masked: linear_token_logps(h, w, labels, b), (hidden, weight))
        cut = (hidden.double(), weight[13:22].double())
        want = differentiate(lambda h, w, b=masked: logps_of(logits_of(h, w, b[13:22].double()), labels - 13), cut)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 + 2e-7 * abs(offset)}
        torch.testing.assert_close(got[0].double(), want[0], **tolerance)
        torch.testing.assert_close(got[1].double(), want[1], **tolerance)
        torch.testing.assert_close(got[2][13:22].double(), want[2], **tolerance)
        assert not got[2][:13].any()
        assert not got[2][22:].any()
        kl, *gradients = differentiate(
            lambda h, w, b=masked: linear_token_kl(h, w, hidden, weight, None, b, b), (hidden, weight)
        )
        assert not kl.any()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_reference_without_some_token_has_infinite_kl(small_tiles: None) -> None:
    x = Inputs(6)
    ref_bias = x.ref_bias.clone()
    ref_bias[20] = -torch.inf
    kl, *gradients = differentiate(
        lambda *policy: linear_token_kl(*policy[:2], x.ref_hidden, x.ref_weight, None, policy[2], ref_bias), x.policy
    )
    assert torch.equal(kl, torch.full_like(kl, torch.inf))
    assert gradients[0].isnan().all()


# Layouts: values and gradients are those of the contiguous copies.
def test_layouts_of_hidden_and_weight(small_tiles: None) -> None:
    x = Inputs(3, 7)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_token_logps(hidden, weight, x.labels, x.bias)

    want = differentiate(ours, x.policy[:2], x.upstream)
    wide = torch.stack([x.hidden, x.hidden], -1)
    sliced = differentiate(lambda h, w: ours(h[..., 0], w), (wide, x.weight), x.upstream)
    near(sliced[1][..., 0], want[1])
    all_near([sliced[0], sliced[2]], [want[0], want[2]])
    transposed = differentiate(lambda h, w: ours(h, w.t()), (x.hidden, x.weight.t().contiguous()), x.upstream)
    all_near([*transposed[:2], transposed[2].t()], want)
    shifted = differentiate(
        lambda h, w: linear_token_logps(h[:, :-1], w, x.labels[:, 1:], x.bias), x.policy[:2], x.upstream[:, 1:]
    )
    formula = differentiate(
        lambda h, w: logps_of(logits_of(h[:, :-1], w, x.bias), x.labels[:, 1:]), x.policy[:2], x.upstream[:, 1:]
    )
    all_near(shifted, formula)


def test_a_weight_tied_to_the_embedding_gets_both_gradients() -> None:
    x = Inputs(3, 7)
    ids = x.labels.clamp(min=0)

    def ours(table: Tensor) -> Tensor:
        return linear_token_logps(F.embedding(ids, table), table, x.labels)

    def formula(table: Tensor) -> Tensor:
        return logps_of(logits_of(F.embedding(ids, table), table), x.labels)

    all_near(differentiate(ours, (x.weight,), x.upstream), differentiate(formula, (x.weight,), x.upstream))


def test_whole_rows_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, options = Inputs(4, 6), OPTIONS["all"]
    set_tile_sizes(monkeypatch, bytes=5 * 37 * 8, least_forward_rows=2)
    logits, ref_logits = logits_of(*x.policy, **options), logits_of(*x.reference, **options)
    logps, entropy = linear_token_logps(x.hidden, x.weight, x.labels, x.bias, return_entropy=True, **options)
    near(logps, logps_of(logits, x.labels))
    near(entropy, entropy_of(logits).where(x.labels != IGNORE, 0))
    kl = linear_token_kl(
        x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.mask, x.bias, x.ref_bias, chunk_size=7, **options
    )
    near(kl, kl_of(logits, ref_logits).where(x.mask, 0))


def test_zero_rows_are_zero_and_connected() -> None:
    x = Inputs(3, 7)
    ignored, masked = torch.full_like(x.labels, IGNORE), torch.zeros_like(x.mask)
    empty = x.hidden[:, :0]
    for ours in (
        lambda h, w, b: linear_token_logps(h, w, ignored, b),
        lambda h, w, b: linear_token_logps(h, w, ignored, b, return_entropy=True)[1],
        lambda h, w, b: linear_sequence_logps(h, w, ignored, b, average=True),
        lambda h, w, b: linear_token_kl(h, w, x.ref_hidden, x.ref_weight, masked, b),
        lambda h, w, b: linear_token_logps(h[:, :0], w, ignored[:, :0], b),
        lambda h, w, b: linear_token_kl(h[:, :0], w, empty, x.weight, None, b),
        lambda h, w, b: linear_kl_loss(h, w, x.ref_hidden, x.ref_weight, masked, b),
        lambda h, w, b: linear_kl_loss(h[:, :0], w, empty, x.weight, None, b),
        lambda h, w, b: LinearSPOLoss(route="recompute", center=True)(h[:2], w, ignored[:2], b)[0],
        lambda h, w, b: LinearSPOLoss(route="recompute_free", center=True, nll_weight=1.0)(h[:2], w, ignored[:2], b)[0],
        lambda h, w, b: LinearSPOLoss(route="recompute")(h[:0], w, ignored[:0], b)[0],
        lambda h, w, b: LinearSPOLoss(route="recompute_free")(h[:0], w, ignored[:0], b)[0],
    ):
        out, *gradients = differentiate(ours, x.policy)
        near(out, torch.zeros_like(out) + (out if out.numel() == 0 else 0))
        assert not any(gradient.any() for gradient in gradients)


def test_double_backward_raises() -> None:
    x = Inputs(3, 7)
    leaf = x.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_token_logps(leaf, x.weight, x.labels).sum() * 2, leaf, retain_graph=True)
    assert grad.any()
    with pytest.raises(RuntimeError, match="double backward|differentiated again"):
        torch.autograd.grad(linear_token_logps(leaf, x.weight, x.labels).sum(), leaf, create_graph=True)


def test_a_changed_weight_is_noticed() -> None:
    x = Inputs(3, 7)
    weight = x.weight.requires_grad_() * 1
    out = linear_token_logps(x.hidden, weight, x.labels).sum()
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_casts_as_linear_does(name: str, native: bool) -> None:
    """Results equal those of inputs cast by hand. Gradients have the dtype of the parameters."""
    x = Inputs(3, 7, dtype=torch.float32)
    ours, _ = FUNCTIONS[name]

    def cast_by_hand(*policy: Tensor) -> Tensor:
        cast = Inputs(3, 7, dtype=torch.float32)
        cast.ref_hidden, cast.ref_weight, cast.ref_bias = (tensor.bfloat16() for tensor in x.reference)
        return ours(cast, tuple(tensor.bfloat16() for tensor in policy))

    want = differentiate(cast_by_hand, x.policy, x.upstream)
    leaves = [tensor.clone().requires_grad_() for tensor in x.policy]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, leaves)
        loss = (out * x.upstream.float()).sum()
        loss.backward()
    assert out.dtype == torch.float32
    assert_same(out.detach(), want[0])
    for leaf, gradient in zip(leaves, want[1:], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert_same(leaf.grad, gradient)
