"""The Triton kernels in the interpreter against float64. Rows are few: each program costs tens of milliseconds.

The interpreter models arithmetic and addresses. It does not model threads, alignment or out-of-bounds access.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import numpy as np
import pytest
import row_options
import torch
import triton
import triton.language as tl
from oracle import (
    DTYPES,
    FACTOR,
    IGNORE,
    ROWS,
    Case,
    Result,
    assert_labels_may_lie_elsewhere,
    assert_rounded,
    assert_same,
    assert_same_bits,
    assert_within_budget,
    half_ulp,
    loss_rounding,
    make_case,
    poisoned_memory,
    rounding,
    run,
    truth,
    ulp,
)
from row_options import Spec
from torch import Tensor

import spo_kernels
from spo_kernels import backends, precision, reference
from spo_kernels.backends import Backend, triton_kernels
from spo_kernels.reference import RowOptions

INF, NAN = math.inf, math.nan

# The interpreter uses numpy, which warns of log(0) and -inf - -inf. The kernels compute both on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def backend() -> Backend:
    return backends.get("triton")


def check(backend: Backend, case: Case) -> Result:
    """Forward and backward within the budget."""
    own = case.logits.clone()
    result = run(backend, case)
    assert_same(case.logits, own, "logits")
    assert_within_budget(result, truth(case), rounding(case))
    return result


# Of 6 rows one is ignored, two are masked, none is both. With V = 4097 the last tile of every configuration has one
# element.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 31, 33, 1000, 4097])
def test_token_stats_over_vocabularies(backend: Backend, v: int, dtype: torch.dtype) -> None:
    case = make_case(6, v, dtype)
    result = check(backend, case)
    inplace = run(backend, case, inplace=True)
    assert inplace.dlogits.data_ptr() == case.logits.data_ptr()
    assert_same_bits(inplace, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["logps", "kl"])
def test_token_stats_of_one_output(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    check(backend, make_case(4, 4097, dtype, mode=mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_stats_of_the_largest_configuration(backend: Backend, dtype: torch.dtype) -> None:
    check(backend, make_case(2, 33000, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "noise"])
def test_token_stats_over_rows(backend: Backend, rows: str, dtype: torch.dtype) -> None:
    check(backend, make_case(4, 4097, dtype, rows=rows))


@pytest.mark.parametrize("rows", ["peaked", "falling"])
def test_small_probabilities_keep_their_relative_accuracy(backend: Backend, rows: str) -> None:
    """The gradient's absolute error says nothing of p = 1e-20: here every p is measured on its own scale."""
    case = replace(make_case(4, 1000, rows=rows, mode="logps"), labels=torch.zeros(4, dtype=torch.int64))
    true, rounded = truth(case).dlogits, rounding(case)
    assert rounded is not None
    tail = true.abs() > 1e-35  # below, p may be flushed to zero
    tail[:, 0] = False  # the label's 1 - p cancels
    budget = FACTOR * (rounded.dlogits + half_ulp(true))
    assert ((run(backend, case).dlogits.double() - true).abs() <= budget)[tail].all()


@pytest.mark.parametrize(
    ("dtype", "ref_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_token_stats_of_different_dtypes(backend: Backend, dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    check(backend, make_case(5, 1000, dtype, ref_dtype=ref_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_odd_rows_are_as_in_the_reference_and_touch_no_other(backend: Backend, dtype: torch.dtype) -> None:
    v = 4097
    case = replace(make_case(8, v, dtype), mask=None, labels=torch.arange(8))
    case.logits[1, v - 1] = NAN
    case.logits[2, 7] = INF
    case.logits[3] = -INF
    case.logits[4, [4, v - 1]] = -INF  # the label's too
    case.ref_logits[4, v - 1] = -INF
    case.ref_logits[5, v - 1] = -INF
    case.ref_logits[6, 0] = NAN
    result = check(backend, case)
    assert result.logps.isnan().tolist() == [False, True, True, True, False, False, False, False]
    assert result.kl.isnan().tolist() == [False, True, True, True, False, False, True, False]
    assert result.logps[4] == -INF
    assert result.kl[5] == INF


def test_a_reference_of_minus_inf_where_p_underflows_later(backend: Backend) -> None:
    """The weight is 1 in the first tile and 0 once the row's maximum is known: infinity times 0 must not be NaN."""
    case = make_case(2, 8192, torch.float32, mode="kl")
    case.logits[0, 3], case.logits[0, 4096:] = 0, 300
    case.ref_logits[0, 3] = -INF
    result = run(backend, case)
    expected = run(reference, case)
    assert expected.kl.isfinite().all()
    torch.testing.assert_close(result.kl, expected.kl)
    torch.testing.assert_close(result.dlogits, expected.dlogits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["noise", "offset", "ramp", "minus_inf"])
def test_kl_to_oneself_is_exactly_zero(backend: Backend, rows: str, dtype: torch.dtype) -> None:
    case = make_case(2, 4097, dtype, rows=rows, mode="kl")
    elsewhere = torch.empty(case.logits.numel() + 1, dtype=dtype)[1:].view_as(case.logits).copy_(case.logits)
    result = run(backend, replace(case, ref_logits=elsewhere))
    assert not result.kl.any()
    assert not result.dlogits.any()
    _, dlogits = backend.kl_loss_fwd(case.logits, elsewhere, None, False)
    assert not dlogits.any()


def test_kl_of_close_distributions(backend: Backend) -> None:
    case = make_case(6, 1000, mode="kl")
    check(backend, replace(case, ref_logits=case.logits + 1e-3 * case.ref_logits))


def all_but_the_last_token(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), 3)
    return buffer, buffer[:, :-1]


def time_first_wide_and_misaligned(x: Tensor) -> tuple[Tensor, Tensor]:
    B, T, V = x.shape
    buffer = x.new_full((T, B, V + 5), 3)
    return buffer, buffer.transpose(0, 1)[..., 1 : V + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits_and_padding_is_left_alone(backend: Backend, dtype: torch.dtype) -> None:
    flat = make_case(6, 33, dtype)
    case = flat.map(lambda x: x.unflatten(0, (2, 3)))
    expected = run(backend, flat)
    weight = torch.rand(2, 3)
    loss, kl_dlogits = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)

    buffer, logits = all_but_the_last_token(case.logits)
    ref_logits = time_first_wide_and_misaligned(case.ref_logits)[1]
    # Labels, masks and upstream gradients are strided too.
    strided = [
        None if x is None else x.repeat_interleave(2, 1)[:, ::2]
        for x in (case.labels, case.mask, case.dlogps, case.dkl, weight)
    ]
    for case_logits, (memory, view) in (
        (case.logits, (buffer, logits)),
        (case.logits, time_first_wide_and_misaligned(case.logits)),
    ):
        view.copy_(case_logits)
        ref_logits.copy_(case.ref_logits)
        before = memory.clone()
        laid_out = Case(view, strided[0], ref_logits, *strided[1:4])
        result = run(backend, laid_out)
        assert_same(memory, before, "logits and their padding")
        assert result.dlogits.is_contiguous()
        assert_same_bits(result.map(lambda x: x.flatten(0, 1)), expected)

        run(backend, laid_out, inplace=True)
        assert_same(view.flatten(0, 1), expected.dlogits, "dlogits")
        backend.scale_(view, torch.tensor(0.3))
        assert_same(view.flatten(0, 1), (expected.dlogits.float() * 0.3).to(dtype), "scaled")
        view.copy_(case_logits)
        assert_same(memory, before, "padding")

        got = backend.kl_loss_fwd(view, ref_logits, strided[4], True)
        assert_same(got[0], loss, "loss")
        assert_same(view, kl_dlogits, "dlogits of kl_loss")
        view.copy_(case_logits)
        assert_same(memory, before, "padding")


def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    case = make_case(5, 1000, torch.bfloat16)
    whole = run(backend, case)
    for rows in ([4], [3, 1]):
        part = operator.itemgetter(torch.tensor(rows))
        assert_same_bits(run(backend, case.map(part)), whole.map(part))


def test_expanded_logits_and_upstream_gradients(backend: Backend) -> None:
    case = make_case(1, 33)
    expanded = case.map(lambda x: x[0].expand(3, *x.shape[1:]))
    assert_same_bits(run(backend, expanded), run(backend, expanded.map(torch.Tensor.contiguous)))


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_no_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    rows = shape[:-1]
    logits, ref_logits = torch.empty(2, *shape)
    labels, mask = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    case = Case(logits, labels, ref_logits, mask, torch.empty(rows), torch.empty(rows))
    for mode in ("logps", "kl", "both"):
        result = run(backend, case.only(mode))
        assert result.dlogits.shape == shape
        assert all(x is None or x.shape == rows for x in result[:2])
    loss, dlogits = backend.kl_loss_fwd(logits, ref_logits, None, False)
    assert loss == 0
    assert dlogits.shape == shape
    backend.scale_(logits, torch.tensor(0.5))


def test_outputs_not_asked_for_are_empty(backend: Backend) -> None:
    logits = torch.randn(2, 5)
    of_labels = backend.token_stats_fwd(logits, torch.zeros(2, dtype=torch.int64), None, None, IGNORE)
    assert [x.shape for x in of_labels] == [(2,), (0,), (2, 2)]
    of_reference = backend.token_stats_fwd(logits, None, logits, None, IGNORE)
    assert [x.shape for x in of_reference] == [(0,), (2,), (4, 2)]


def test_unwanted_rows_cost_no_read_and_are_exactly_zero(backend: Backend, loads: list[int]) -> None:
    v = 100
    case = make_case(4, v)
    # One row wants nothing, one the log-probability, one the KL, one both.
    case = replace(case, labels=torch.tensor([IGNORE, 1, IGNORE, 3]), mask=torch.tensor([False, False, True, True]))
    clean = run(backend, case)
    assert sum(loads) == 2 * (0 + 1 + 2 + 2) * v  # forward and backward
    case.logits[0] = case.ref_logits[:2] = NAN
    case.dlogps[[0, 2]] = case.dkl[:2] = NAN
    poisoned = run(backend, case)
    assert_same_bits(poisoned, clean)
    for zeros in (clean.logps[[0, 2]], clean.kl[:2], clean.dlogits[0]):
        assert not zeros.any()


def test_rows_with_upstream_gradients_of_zero_are_not_read(backend: Backend, loads: list[int]) -> None:
    case = replace(make_case(4, 100), labels=torch.arange(4), mask=torch.ones(4, dtype=torch.bool))
    # One row has no upstream gradient, one that of the log-probability, one that of the KL, one both.
    case.dlogps[[0, 2]] = case.dkl[:2] = 0
    clean = run(backend, case)
    assert sum(loads) == (8 + 0 + 1 + 2 + 2) * 100  # the forward reads all
    case.logits[0] = NAN
    poisoned = run(backend, case)
    assert_same(poisoned.dlogits, clean.dlogits, "dlogits")
    assert not poisoned.dlogits[0].any()


def test_an_upstream_gradient_of_one_output_only(backend: Backend) -> None:
    case = make_case(6, 100)
    _, kl, stats = backend.token_stats_fwd(case.logits, case.labels, case.ref_logits, case.mask, IGNORE)
    rest = (case.logits, case.labels, case.ref_logits, case.mask, kl, stats, IGNORE, False)
    zeros = torch.zeros(6)
    with poisoned_memory():
        of_logps = backend.token_stats_bwd(case.dlogps, None, *rest)
        of_kl = backend.token_stats_bwd(None, case.dkl, *rest)
    for got, one in ((of_logps, replace(case, dkl=zeros)), (of_kl, replace(case, dlogps=zeros))):
        rounded = rounding(one)
        assert rounded is not None
        assert_rounded(got, truth(one).dlogits, rounded.dlogits, "dlogits")


def test_labels_that_lie_elsewhere(backend: Backend) -> None:
    for dtype in DTYPES:
        for mode in ("logps", "both"):
            assert_labels_may_lie_elsewhere(backend, make_case(8, 1000, dtype, mode=mode))


def test_another_ignore_index_may_be_a_token(backend: Backend) -> None:
    logits, labels = torch.randn(4, 9), torch.tensor([3, 1, 3, 8])
    logps = backend.token_stats_fwd(logits, labels, None, None, 3)[0]
    torch.testing.assert_close(logps[[1, 3]], logits.log_softmax(-1)[[1, 3], [1, 8]])
    assert not logps[[0, 2]].any()


@pytest.mark.parametrize("label", [-1, 33, 2**40])
def test_label_out_of_range_is_named_and_nothing_is_written(backend: Backend, label: int) -> None:
    case = make_case(3, 33, mode="logps")
    _, kl, stats = backend.token_stats_fwd(case.logits, case.labels, None, None, IGNORE)
    case.labels[2] = label
    before = case.logits.clone()
    message = rf"labels must be in \[0, 33\) or ignore_index -100, got {label}"
    with pytest.raises(RuntimeError, match=message):
        run(backend, case)
    with pytest.raises(RuntimeError, match=message):
        backend.token_stats_bwd(case.dlogps, None, case.logits, case.labels, None, None, kl, stats, IGNORE, True)
    assert_same(case.logits, before, "logits")


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 4)])
def test_logits_of_other_ranks_are_refused(backend: Backend, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, V\] or \[B, T, V\] with a unit last stride"):
        backend.token_stats_fwd(torch.zeros(shape), None, None, None, IGNORE)


def test_logits_with_another_last_stride_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"ref_logits must be.*got \[3, 4\] with strides \(1, 3\)"):
        backend.kl_loss_fwd(torch.zeros(3, 4), torch.zeros(4, 3).t(), None, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 4097])
def test_kl_loss(backend: Backend, v: int, dtype: torch.dtype) -> None:
    case = make_case(5, v, dtype, mode="kl")
    weight = torch.tensor([0.3, 0.0, 1.0, -0.7, 2.0], dtype=precision.accumulate_dtype(dtype))
    case = replace(case, mask=None, dkl=weight)
    true, rounded = truth(case), rounding(case)

    own = case.logits.clone()
    with poisoned_memory():
        loss, dlogits = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
    assert_same(case.logits, own, "logits")
    assert loss.shape == ()
    assert (loss.dtype, dlogits.dtype) == (weight.dtype, dtype)
    assert_rounded(loss, (weight * true.kl).sum(), loss_rounding(rounded, true, weight), "loss")
    assert_rounded(dlogits, true.dlogits, None if rounded is None else rounded.dlogits, "dlogits")
    inplace_loss, gradient = backend.kl_loss_fwd(own, case.ref_logits, weight, True)
    assert gradient.data_ptr() == own.data_ptr()
    assert_same(gradient, dlogits, "dlogits in place")
    assert_same(inplace_loss, loss, "loss in place")


def test_kl_loss_skips_rows_of_weight_zero(backend: Backend, loads: list[int]) -> None:
    logits, ref_logits = torch.randn(2, 3, 100)
    weight = torch.tensor([0.0, 2.0, 0.0])
    expected = backend.kl_loss_fwd(logits, ref_logits, weight, False)
    assert sum(loads) == 2 * 2 * 100  # both tensors, for the statistics and for the gradient
    logits[0], ref_logits[2] = NAN, NAN
    loss, dlogits = backend.kl_loss_fwd(logits, ref_logits, weight, True)
    assert_same(loss, expected[0], "loss")
    assert_same(dlogits, expected[1], "dlogits")
    assert not dlogits[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(backend: Backend, dtype: torch.dtype, loads: list[int]) -> None:
    values = torch.randn(2, 4097, dtype=torch.float64).to(dtype)
    wide = precision.accumulate_dtype(dtype)
    for scale in (0.3, 0.0, NAN):
        tensor, by = values.clone(), torch.tensor(scale, dtype=wide)
        backend.scale_(tensor, by)
        assert_same(tensor, (values.to(wide) * by).to(dtype), f"times {scale}")
    loads.clear()
    tensor = values.clone()
    backend.scale_(tensor, torch.ones((), dtype=wide))
    assert not loads
    assert_same(tensor, values, "times 1")


# One program takes one row: longer rows and more rows add nothing but time.
ROW_OPTIONS = [spec._replace(n=min(spec.n, 12)) for spec in row_options.SPECS if spec.v < 10_000]
ROW_OPTIONS_OF_KL_LOSS = [spec for spec in row_options.KL_LOSS_SPECS if spec.v < 10_000 and not spec.mixture]
# The kernels of divergences are interpreted slowly: one dtype has long rows, the others short ones.
MIXTURES = [spec for spec in row_options.MIXTURE_SPECS if spec.v < (2000 if spec.dtype == torch.float32 else 100)]
MIXTURES_OF_KL_LOSS = [s for s in row_options.KL_LOSS_SPECS if s.mixture and s.dtype == torch.float32]


@pytest.mark.parametrize("spec", ROW_OPTIONS + MIXTURES, ids=str)
def test_row_options(backend: Backend, spec: Spec) -> None:
    row_options.check(backend, spec)


@pytest.mark.parametrize("spec", ROW_OPTIONS_OF_KL_LOSS + MIXTURES_OF_KL_LOSS, ids=str)
def test_row_options_of_kl_loss(backend: Backend, spec: Spec) -> None:
    row_options.check_kl_loss(backend, spec)


@triton.jit
def tanh_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, triton_kernels._tanh(tl.load(x + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_within_1_8_ulp(dtype: torch.dtype) -> None:
    """The bound for exponentials and quotients within an ulp; numpy's, which the interpreter takes, are."""
    sizes = torch.cat([torch.logspace(-30, 0, 1 << 14, dtype=torch.float64), torch.linspace(0.2, 30, 3 << 14).double()])
    x = torch.cat([sizes, -sizes]).to(dtype)
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, BLOCK=x.numel())
    error = out.numpy().astype(np.longdouble) - np.tanh(x.numpy().astype(np.longdouble))
    in_ulps = np.abs(error).astype(np.float64) / ulp(out, dtype).numpy()
    assert in_ulps.max() <= 1.8
    odd = torch.tensor([INF, -INF, NAN, 0.0, 88.0, -1e30, 1e-38, 1e-45], dtype=dtype)
    out = torch.empty_like(odd)
    tanh_kernel[(1,)](odd, out, BLOCK=odd.numel())
    assert_same(out, odd.tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_to_oneself_is_exactly_zero_under_a_transform(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(3, 4097, dtype, mode="kl")
    transform = torch.tensor([[0.1, -0.3, 1.0], [20.0, 3.0, 2.0]])
    for factors in (transform, transform[:1]):
        options = RowOptions(4000, factors, factors)
        elsewhere = torch.empty(case.logits.numel() + 1, dtype=dtype)[1:].view_as(case.logits).copy_(case.logits)
        result = run(backend, replace(case, ref_logits=elsewhere, options=options))
        assert not result.kl.any()
        assert not result.dlogits.any()


def test_columns_after_vocab_size_are_not_read(backend: Backend, loads: list[int]) -> None:
    case = replace(make_case(3, 100), mask=None, labels=torch.arange(3))
    transform = torch.tensor([[0.5], [30.0]])
    options = RowOptions(70, transform, transform)
    run(backend, replace(case, options=options, dlse=torch.ones(3)))
    assert sum(loads) == 3 * 2 * 70 * 2  # forward and backward, each both tensors once
    loads.clear()
    backend.kl_loss_fwd(case.logits, case.ref_logits, None, False, options)
    assert sum(loads) == 3 * 2 * 70 * 2  # both tensors, for the statistics and for the gradient


def test_the_gradient_after_vocab_size_is_zero_where_statistics_are_not_finite(backend: Backend) -> None:
    case = replace(make_case(4, 100), mask=None, labels=torch.arange(4), options=RowOptions(70))
    case.logits[0, 3], case.logits[1] = NAN, -INF
    case.ref_logits[2, 3] = -INF
    result = run(backend, case)
    assert result.kl.isfinite().tolist() == [False, False, False, True]
    _, of_kl_loss = backend.kl_loss_fwd(case.logits, case.ref_logits, None, False, case.options)
    for dlogits in (result.dlogits, of_kl_loss):
        assert dlogits[:3, :70].isnan().any(-1).all()
        assert not dlogits[:, 70:].any()


def test_a_transform_may_have_any_strides(backend: Backend) -> None:
    case = make_case(4, 33)
    transform = torch.rand(4, 2) + 0.5
    expected = run(backend, replace(case, options=RowOptions(None, transform.t().contiguous())))
    assert_same_bits(run(backend, replace(case, options=RowOptions(None, transform.t()))), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RowOptions(0), r"vocab_size must be in \[1, 9\], got 0"),
        (RowOptions(10), r"vocab_size must be in \[1, 9\], got 10"),
        (RowOptions(9), r"ref_logits must have at least 9 columns, got 8"),
        (RowOptions(), r"ref_logits must have the shape of logits \[4, 9\], got \[4, 8\]"),
        (RowOptions(8, torch.ones(3, 1)), r"transform must be \[1 or 2, 1 or 4\] torch.float32, got \[3, 1\]"),
        (RowOptions(8, torch.ones(1, 3)), r"transform must be \[1 or 2, 1 or 4\] torch.float32, got \[1, 3\]"),
        (RowOptions(8, torch.ones(4)), r"transform must be \[1 or 2, 1 or 4\] torch.float32, got \[4\]"),
        (RowOptions(8, None, torch.ones(1, 4).double()), r"ref_transform must be .* got \[1, 4\] torch.float64"),
    ],
)
def test_illegal_row_options_are_named(backend: Backend, options: RowOptions, message: str) -> None:
    logits, ref_logits = torch.zeros(4, 9), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=message):
        backend.kl_loss_fwd(logits, ref_logits, None, False, options)
    with pytest.raises(ValueError, match=message):
        backend.token_stats_fwd(logits, None, ref_logits, None, IGNORE, options)
    zeros = torch.zeros(4)
    rest = (logits, None, ref_logits, None, zeros, torch.zeros(4, 4), IGNORE, True)
    with pytest.raises(ValueError, match=message):
        backend.token_stats_bwd(None, zeros, *rest, options=options)


def test_a_label_after_vocab_size_is_out_of_range(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 8\) or ignore_index -100, got 8"):
        backend.token_stats_fwd(torch.zeros(1, 9), torch.tensor([8]), None, None, IGNORE, RowOptions(8))


@pytest.mark.parametrize("inplace", [False, True])
def test_public_functions(inplace: bool) -> None:
    assert backends.active("cpu") == "triton"
    case = make_case(6, 100)
    inputs = (case.logits, case.labels, case.ref_logits, case.mask)
    leaf, labels, ref_logits, mask = (x.unflatten(0, (2, 3)) for x in inputs)
    leaf.requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), ref_logits.log_softmax(-1)
    token = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * mask
    weight = torch.rand(2, 3)

    def agree(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        upstream = torch.linspace(0.5, 2, expected.numel()).view(expected.shape)
        (want,) = torch.autograd.grad(expected, leaf, upstream, retain_graph=True)
        (got,) = torch.autograd.grad(actual, leaf, upstream)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def logits() -> Tensor:
        return leaf * 1  # not a leaf: it may be overwritten

    agree(spo_kernels.token_logps(logits(), labels, inplace_backward=inplace), token)
    agree(spo_kernels.sequence_logps(logits(), labels, inplace_backward=inplace), token.sum(-1))
    agree(spo_kernels.token_kl(logits(), ref_logits, mask, inplace_backward=inplace), kl)
    logps_kl = spo_kernels.token_logps_kl(logits(), labels, ref_logits, mask, inplace_backward=inplace)
    agree(torch.stack(logps_kl), torch.stack([token, kl]))
    loss = spo_kernels.kl_loss(logits(), ref_logits, mask, row_weight=weight, overwrite_logits=inplace)
    agree(loss, (weight * kl).sum())
