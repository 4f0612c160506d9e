"""The row ops of every loaded implementation against float64, on the rows, shapes and layouts that bite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from operator import itemgetter

import pytest
import torch
from on_device import OnDevice
from oracle import (
    ACTIVE,
    DTYPES,
    FACTOR,
    HALF_DTYPES,
    IGNORE,
    LEVELS,
    MODES,
    ROWS,
    Case,
    Result,
    assert_labels_may_lie_elsewhere,
    assert_rounded,
    assert_same,
    assert_same_bits,
    assert_stats_within_budget,
    assert_within_budget,
    half_ulp,
    loss_rounding,
    make_case,
    poisoned_memory,
    rounding,
    run,
    truth,
)
from torch import Tensor

from spo_kernels import precision, reference
from spo_kernels.backends import Backend, cpu
from spo_kernels.backends.cuda import CompiledOps
from spo_kernels.reference import RowOptions

INF, NAN = math.inf, math.nan
FLOAT32_DTYPES = (torch.float32, *HALF_DTYPES)  # dtypes that accumulate in float32
GPU_CODE = (CompiledOps, OnDevice)  # kernels for a GPU, also where they are emulated
needs_kernels = pytest.mark.skipif(not LEVELS, reason=f"SPO_BACKEND={ACTIVE}")

# V around each SIMD width (1, 15 .. 65), a round one, two around a block, and realistic ones (50257 = GPT-2, odd;
# 128256 = Llama 3). 8 has many rows: with few, large probabilities the error of a single exponential shows.
VOCABULARIES = (1, 8, 15, 16, 31, 33, 63, 65, 1000, 4096, 4097, 50257, 128256)


@cache
def judged(
    n: int, v: int, dtype: torch.dtype, mode: str, rows: str, ref_dtype: torch.dtype
) -> tuple[Case, Result, Result | None]:
    """A case, its truth and its rounding error, computed once for all implementations."""
    case = make_case(n, v, dtype, rows=rows, mode=mode, ref_dtype=ref_dtype)
    return case, truth(case), rounding(case)


def check(
    backend: Backend,
    n: int,
    v: int,
    dtype: torch.dtype,
    mode: str = "both",
    rows: str = "noise",
    ref_dtype: torch.dtype | None = None,
) -> None:
    """The result is within the budget, and in place it has the same bits."""
    case, true, rounded = judged(n, v, dtype, mode, rows, ref_dtype or dtype)
    own = case.logits.clone()
    result = run(backend, case)
    assert_same(case.logits, own, "logits")
    assert_within_budget(result, true, rounded)
    inplace = run(backend, replace(case, logits=own), inplace=True)
    assert inplace.dlogits.data_ptr() == own.data_ptr()
    assert_same_bits(inplace, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_token_stats_over_vocabularies(backend: Backend, v: int, mode: str, dtype: torch.dtype) -> None:
    check(backend, 1000 if v < 15 else 48 if v < 100 else 12 if v < 5000 else 3, v, dtype, mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "noise"])
def test_token_stats_over_rows(backend: Backend, rows: str, mode: str, dtype: torch.dtype) -> None:
    for n, v in ((200, 33), (48, 2051)):
        check(backend, n, v, dtype, mode, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["logps", "both"])
def test_labels_that_lie_elsewhere(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    for n, v in ((12, 1), (48, 33), (12, 1000), (5, 50257)):
        assert_labels_may_lie_elsewhere(backend, make_case(n, v, dtype, mode=mode))


@pytest.mark.parametrize("ref_dtype", FLOAT32_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT32_DTYPES, ids=str)
def test_token_stats_of_different_policy_and_reference_dtypes(
    backend: Backend, dtype: torch.dtype, ref_dtype: torch.dtype
) -> None:
    for v in (65, 1000):
        check(backend, 12, v, dtype, ref_dtype=ref_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("v", [50257, 128256])
def test_few_long_rows_that_may_be_split(backend: Backend, v: int, mode: str, dtype: torch.dtype) -> None:
    case, true, rounded = judged(5, v, dtype, mode, "noise", dtype)
    assert_within_budget(run(backend, case, deterministic=False), true, rounded)


@pytest.mark.parametrize("dtype", FLOAT32_DTYPES, ids=str)
def test_token_stats_around_the_overflow_of_a_partial_sum(backend: Backend, dtype: torch.dtype) -> None:
    """exp() overflows float32 at 88.7 above the shift, and the KL's weighted sum a little before the plain one."""
    case = make_case(200, 6145, dtype)
    case.ref_logits.mul_(20)
    case.logits[:, 1500] = torch.linspace(80, 96, 200).to(dtype)
    case.ref_logits[:, 5700] = torch.linspace(96, 80, 200).to(dtype)
    assert_within_budget(run(backend, case), truth(case), rounding(case))


@pytest.mark.parametrize("rows", ["noise", "peaked", "denormal", "falling"])
def test_small_probabilities_keep_their_relative_accuracy(backend: Backend, rows: str) -> None:
    """The gradient's absolute error says nothing of p = 1e-20: here every p is measured on its own scale."""
    case = make_case(4, 1000, torch.float32, rows=rows, mode="logps")
    case = replace(case, labels=torch.zeros(4, dtype=torch.int64))
    true, actual, rounded = truth(case).dlogits, run(backend, case).dlogits, rounding(case)
    assert rounded is not None
    tail = true.abs() > 1e-35  # below, p or its product with the upstream gradient may be flushed to zero
    tail[:, 0] = False  # the label's 1 - p cancels
    budget = FACTOR * (rounded.dlogits + half_ulp(true))
    assert ((actual.double() - true).abs() <= budget)[tail].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 33, 1000, 50257])
def test_stats_are_the_log_sum_exp_in_two_parts(backend: Backend, v: int, dtype: torch.dtype) -> None:
    case = make_case(6, v, dtype, rows="offset")  # near 1e4 the float32 sum of the parts would be off by 5e-4
    _, _, stats = backend.token_stats_fwd(case.logits, case.labels, case.ref_logits, None, IGNORE)
    assert_stats_within_budget(stats, case)


def contiguous(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def wide_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 7), 3)
    return buffer, buffer[..., : x.shape[-1]]


def off_by_one_element(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((x.numel() + 2,), 3)
    return buffer, buffer[1:-1].view(x.shape)


def all_but_the_last_token(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), 3)
    return buffer, buffer[:, :-1]


def all_but_the_first_token(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), 3)
    return buffer, buffer[:, 1:]


def every_other_token(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2]), 3)
    return buffer, buffer[:, ::2]


def time_first(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = x.new_empty((x.shape[1], x.shape[0], x.shape[2]))
    return buffer, buffer.transpose(0, 1)


Layout = Callable[[Tensor], tuple[Tensor, Tensor]]
LAYOUTS: tuple[Layout, ...] = (
    contiguous,
    wide_rows,
    off_by_one_element,
    all_but_the_last_token,
    all_but_the_first_token,
    every_other_token,
    time_first,
)


def assert_same_in_any_layout(backend: Backend, actual: Result, expected: Result, case: Case) -> None:
    """The same bits. On a GPU Triton orders a row's sums by its strides, so results are compared with the budget."""
    if isinstance(backend, OnDevice) and backend.name == "triton":
        assert_within_budget(actual, truth(case), rounding(case))
    else:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_padding_is_left_alone(
    backend: Backend, layout: Layout, v: int, dtype: torch.dtype
) -> None:
    flat = make_case(12, v, dtype)
    case = flat.map(lambda x: x.unflatten(0, (3, 4)))
    expected = run(backend, flat)

    buffer, logits = layout(case.logits.clone())
    logits.copy_(case.logits)
    ref_logits = layout(case.ref_logits.clone())[1].copy_(case.ref_logits)
    rows = [
        None if x is None else x.repeat_interleave(2, 1)[:, ::2]  # strided labels, masks and upstream gradients
        for x in (case.labels, case.mask, case.dlogps, case.dkl)
    ]
    strided = Case(logits, rows[0], ref_logits, *rows[1:])
    padded = buffer.clone()
    result = run(backend, strided)
    assert_same(buffer, padded, "logits and their padding")
    assert result.dlogits.is_contiguous()
    assert_same_in_any_layout(backend, result.map(lambda x: x.flatten(0, 1)), expected, flat)

    run(backend, strided, inplace=True)
    assert_same(logits, result.dlogits, "dlogits")
    logits.copy_(case.logits)
    assert_same(buffer, padded, "padding")


def test_expanded_logits_and_upstream_gradients(backend: Backend) -> None:
    """Elements may share memory where they are only read. ``.sum().backward()`` sends such gradients."""
    case = make_case(1, 65)
    one = torch.ones((), dtype=torch.float32)
    expanded = Case(
        case.logits.expand(6, -1),
        case.labels.expand(6),
        case.ref_logits.expand(6, -1),
        torch.ones((), dtype=torch.bool).expand(6),
        one.expand(6),
        one.expand(6),
    )
    dense = expanded.map(Tensor.contiguous)
    assert_same_in_any_layout(backend, run(backend, expanded), run(backend, dense), dense)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (0, 1)])
def test_no_rows(backend: Backend, shape: tuple[int, ...], mode: str) -> None:
    rows = shape[:-1]
    case = Case(
        torch.empty(shape),
        torch.empty(rows, dtype=torch.int64),
        torch.empty(shape),
        torch.empty(rows, dtype=torch.bool),
        torch.empty(rows),
        torch.empty(rows),
    ).only(mode)
    for inplace in (False, True):
        result = run(backend, case, inplace=inplace)
        assert result.dlogits.shape == shape
        assert all(x is None or x.shape == rows for x in result[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored_and_all_masked(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(6, 65, dtype)
    case.logits[1], case.logits[2] = NAN, INF
    labels, mask = torch.full((6,), IGNORE), torch.zeros(6, dtype=torch.bool)
    result = run(backend, replace(case, labels=labels, mask=mask))
    assert not result.logps.any()
    assert not result.kl.any()
    assert not result.dlogits.any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_unwanted_rows_are_exactly_zero_even_where_logits_are_nan(backend: Backend, mode: str, inplace: bool) -> None:
    case = make_case(24, 65, mode=mode)
    unwanted = torch.ones(24, dtype=torch.bool)
    if case.labels is not None:
        unwanted &= case.labels == IGNORE
    if case.mask is not None:
        unwanted &= ~case.mask
    clean = run(backend, case)
    poisoned = replace(case, logits=case.logits.clone())
    poisoned.logits[unwanted] = NAN
    for upstream in (poisoned.dlogps, poisoned.dkl):
        if upstream is not None:
            upstream[unwanted] = NAN
    result = run(backend, poisoned, inplace=inplace)
    assert unwanted.sum() >= 2
    assert not result.dlogits[unwanted].any()
    assert_same_bits(result, clean)


def test_another_ignore_index_may_be_a_token(backend: Backend) -> None:
    logits, labels = torch.randn(4, 9), torch.tensor([3, 1, 3, 8])
    logps = backend.token_stats_fwd(logits, labels, None, None, 3)[0]
    expected = logits.log_softmax(-1)[[1, 3], [1, 8]]
    torch.testing.assert_close(logps[[1, 3]], expected)
    assert not logps[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at", [0, 500, 999])
def test_a_bad_row_is_nan_and_touches_no_other(backend: Backend, at: int, value: float, dtype: torch.dtype) -> None:
    case = make_case(8, 1000, dtype)
    case = replace(case, mask=None, labels=torch.arange(8))
    clean = run(backend, case)
    case.logits[5, at] = value
    bad = run(backend, case)
    for name in Result._fields:
        got, want = getattr(bad, name), getattr(clean, name).clone()
        want[5] = NAN
        assert_same(got, want, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transformed", ["not", "by a factor", "by a softcap"])
@pytest.mark.parametrize("v", [33, 1000])
def test_a_nan_of_all_bits_stays_nan(backend: Backend, v: int, transformed: str, dtype: torch.dtype) -> None:
    """Rounding the bits 0x7fffffff, which is CUDA's NaN, to bfloat16 with integer additions would give -0."""
    wide = precision.accumulate_dtype(dtype)
    all_bits = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).to(wide)
    nan = all_bits.repeat(3)
    transforms = {"by a factor": torch.full((1, 1), 2, dtype=wide), "by a softcap": torch.full((2, 1), 2, dtype=wide)}
    case = make_case(3, v, dtype)
    case = replace(case, labels=torch.tensor([0, 1, v - 1]), mask=None)
    case = replace(case, options=RowOptions(None, transforms.get(transformed), None))

    assert run(backend, replace(case, dlogps=nan).only("logps")).dlogits.isnan().all()
    for changed in ({"dlogps": nan}, {"dkl": nan}, {"dlse": nan}):
        assert run(backend, replace(case, **changed)).dlogits.isnan().all(), [*changed]
    assert backend.kl_loss_fwd(case.logits, case.ref_logits, nan, False, case.options)[1].isnan().all()
    ref_logits = case.ref_logits.to(wide)
    ref_logits[:, 1] = all_bits
    assert run(backend, replace(case, ref_logits=ref_logits)).dlogits.isnan().all()
    for row, transform in enumerate(transforms.values()):
        transform[row] = all_bits  # the factor, or the softcap's limit
        options = RowOptions(None, transform, None)
        assert run(backend, replace(case, options=options).only("logps")).dlogits.isnan().all()
    scaled = case.logits.clone()
    backend.scale_(scaled, nan[0])
    assert scaled.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 33, 1000, 4097])
def test_a_row_of_only_minus_inf_is_nan(backend: Backend, v: int, dtype: torch.dtype) -> None:
    case = make_case(3, v, dtype)
    case = replace(case, mask=None, labels=torch.zeros(3, dtype=torch.int64))
    case.logits[1] = -INF
    result = run(backend, case)
    for got in result:
        assert got is not None
        assert got.isnan().flatten(1).all(1).tolist() == [False, True, False] if got.dim() > 1 else True
        assert got.isfinite().flatten(1).all(1).tolist() == [True, False, True] if got.dim() > 1 else True
    assert result.logps.isnan().tolist() == result.kl.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 1000, 4097])
def test_a_block_of_only_minus_inf(backend: Backend, v: int, dtype: torch.dtype) -> None:
    """The first elements that a kernel reads may be -inf, or the last, or all but one."""
    case = make_case(96, v, dtype)
    case.logits[0::3, : v - 2] = -INF
    case.logits[1::3, 2:] = -INF
    case.logits[2::3, : v // 2] = -INF
    case.logits[2::3, v // 2 + 1 :] = -INF
    assert_within_budget(run(backend, case), truth(case), rounding(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 1000])
def test_a_label_on_minus_inf(backend: Backend, v: int, dtype: torch.dtype) -> None:
    """logp is -inf; its gradient is the finite one-hot minus softmax."""
    case = make_case(4, v, dtype, mode="logps")
    case = replace(case, labels=torch.tensor([0, 1, v - 1, v // 2]))
    case.logits[:, [0, v - 1]] = -INF
    result = run(backend, case)
    assert (result.logps == -INF).tolist() == [True, False, True, False]
    assert_within_budget(result, truth(case), rounding(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 1000, 4097])
def test_a_reference_probability_of_zero(backend: Backend, v: int, dtype: torch.dtype) -> None:
    """Where p > 0 the KL is +inf and its gradient is not finite; where p = 0 the term is 0."""
    case = make_case(50, v, dtype, mode="kl")
    case = replace(case, mask=None)
    last = v - 1
    case.ref_logits[:, last] = -INF
    case.logits[2::2, last] = -INF
    case.logits[3::2, last] = torch.finfo(dtype).min if dtype == torch.float16 else -1e30
    result = run(backend, case)
    assert result.kl[:2].tolist() == [INF, INF]
    assert result.dlogits[:2, last].isnan().all()
    assert not result.dlogits[:2].isfinite().any()
    rest = case.map(itemgetter(slice(2, None)))
    assert_within_budget(result.map(itemgetter(slice(2, None))), truth(rest), rounding(rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*ROWS])
def test_kl_to_oneself_is_exactly_zero(backend: Backend, rows: str, dtype: torch.dtype) -> None:
    for v in (1, 33, 1000, 4097):
        case = make_case(6, v, dtype, rows=rows, mode="kl")
        # The reference has another alignment, which must not change its distribution.
        _, elsewhere = off_by_one_element(case.logits)
        result = run(backend, replace(case, mask=None, ref_logits=elsewhere.copy_(case.logits)))
        assert not result.kl.any(), f"V = {v}: {result.kl.tolist()}"
        assert not result.dlogits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [1e-1, 1e-3])
def test_kl_of_close_distributions(backend: Backend, noise: float, dtype: torch.dtype) -> None:
    """The KL is quadratic in the distance of the logits, so its terms cancel. The rest must be within the budget."""
    case = make_case(16, 1000, dtype, mode="kl")
    case = replace(case, ref_logits=(case.logits.double() + noise * case.ref_logits.double()).to(dtype))
    assert_within_budget(run(backend, case), truth(case), rounding(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_upstream_gradients(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(8, 100, dtype)
    case.dlogps[::2] = 0
    case.dkl[:4] = 0
    result = run(backend, case)
    assert not result.dlogits[[0, 2]].any()
    assert result.dlogits[1].any()
    assert_within_budget(result, truth(case), rounding(case))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_with_upstream_gradients_of_zero_are_not_read(backend: Backend, mode: str, inplace: bool) -> None:
    case = make_case(24, 65, mode=mode)
    for upstream in (case.dlogps, case.dkl):
        if upstream is not None:
            upstream[::3] = 0
    clean = run(backend, case)
    poisoned = replace(case, logits=case.logits.clone())
    poisoned.logits[::6], poisoned.logits[3::6] = NAN, -INF
    result = run(backend, poisoned, inplace=inplace)
    assert not result.dlogits[::3].any()
    assert_same(result.dlogits, clean.dlogits, "dlogits")


def test_an_upstream_gradient_of_one_output_only(backend: Backend) -> None:
    case = make_case(8, 100)
    logits, labels, ref_logits, mask, dlogps, dkl, *_ = vars(case).values()
    _, kl, stats = backend.token_stats_fwd(logits, labels, ref_logits, mask, IGNORE)
    for one in (replace(case, dkl=None), replace(case, dlogps=None)):
        with poisoned_memory():
            got = backend.token_stats_bwd(
                one.dlogps, one.dkl, logits, labels, ref_logits, mask, kl, stats, IGNORE, False
            )
        both = replace(case, dlogps=torch.zeros(8) if one.dlogps is None else dlogps)
        both = replace(both, dkl=torch.zeros(8) if one.dkl is None else dkl)
        assert_within_budget(Result(None, None, got), truth(both)._replace(logps=None, kl=None), rounding(both))


@pytest.mark.parametrize("label", [-1, -99, 65, 2**31, 2**40, -(2**63)])
def test_label_out_of_range_is_named_and_nothing_is_written(backend: Backend, label: int) -> None:
    if isinstance(backend, GPU_CODE):
        pytest.skip("a GPU kernel traps instead: tests/cuda/test_cuda_emulator.py, tests/test_gpu.py")
    case = make_case(300, 65, mode="logps")
    good = backend.token_stats_fwd(case.logits, case.labels, None, None, IGNORE)
    case.labels[299] = label  # among the rows of the last thread
    before = case.logits.clone()
    with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 65\).*got {label}\b"):
        run(backend, case)
    for inplace in (False, True):
        with pytest.raises(RuntimeError):
            backend.token_stats_bwd(
                case.dlogps, None, case.logits, case.labels, None, None, good[1], good[2], IGNORE, inplace
            )
    assert_same(case.logits, before, "logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["noise", "ramp", "denormal"])
@pytest.mark.parametrize("v", [1, 33, 1000, 4097])
def test_a_row_does_not_depend_on_its_batch(backend: Backend, v: int, rows: str, dtype: torch.dtype) -> None:
    """The same bits alone, at another place, in a batch of another size, on one thread or two."""
    case = make_case(37, v, dtype, rows=rows)
    whole = run(backend, case)
    torch.set_num_threads(1)
    assert_same_bits(run(backend, case), whole)
    torch.set_num_threads(2)
    for index in (torch.tensor([17]), torch.arange(36, -1, -1), torch.arange(5, 24), torch.tensor([7] * 9)):
        part = run(backend, case.map(itemgetter(index)))
        assert_same_bits(part, whole.map(itemgetter(index)))


PART = 16384  # kPart of csrc/cpu/row_kernels.h


def rows_of_unlike_parts(dtype: torch.dtype, v: int) -> Case:
    """Rows [7, v] whose parts differ so much that a careless sum over parts loses one of them."""
    case = make_case(7, v, dtype)
    logits, ref_logits = case.logits, case.ref_logits
    logits[0, :PART] += 40  # almost all probability in the first part
    logits[1, -9:] += 40  # in the last part, and that of the reference in the first
    ref_logits[1, :PART] += 90
    logits[2, PART : 2 * PART] = -INF
    ref_logits[2, 2 * PART :] = -INF
    logits[2, 2 * PART :] = -INF
    logits[3, :-1] = -INF  # one token has all probability
    logits[4, 5] = 200  # p = 1 in the first part, where the reference's shift is not that of its row
    ref_logits[4, -5] = 300
    ref_logits[5] = logits[5]
    logits[6] *= 40  # one block after another needs a larger shift
    case.labels[:] = torch.tensor([0, v - 1, 7, v - 1, 5, PART, 0])
    case.mask[:] = True
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_row(backend: Backend, dtype: torch.dtype) -> None:
    case = rows_of_unlike_parts(dtype, 2 * PART + 4101)
    result = run(backend, case)
    assert_within_budget(result, truth(case), rounding(case))
    assert result.kl[5] == 0


def test_a_reference_without_the_policys_heaviest_block(backend: Backend) -> None:
    case = make_case(2, 3 * PART, mode="kl")
    case.logits[:, 100] += 50
    case.ref_logits[:, 100] = -INF
    case.ref_logits[1, -100] += 60  # the row's shift of the reference is larger than the first part's
    case.mask[:] = True
    assert (run(backend, case).kl == INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [9001, 2 * PART + 9])
def test_a_reference_of_zero_where_the_policy_underflows(backend: Backend, v: int, dtype: torch.dtype) -> None:
    """The term is infinite until the kernel reads a logit that is larger by 800, and then it is 0."""
    case = make_case(4, v, dtype, mode="kl")
    case.logits[:, -5:] += 800
    case.ref_logits[:, 7] = -INF
    case.mask[:] = True
    result = run(backend, case)
    assert result.kl.isfinite().all()
    assert_within_budget(result, truth(case), rounding(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_a_policy_with_itself_is_0_where_a_block_is_summed_again(backend: Backend, dtype: torch.dtype) -> None:
    """Most of the probability is in one block, the largest logit in a later part."""
    case = make_case(16, 3 * PART, dtype, mode="kl")
    case.logits[:, :2048] += 12
    case.logits[:, 2 * PART] = 17
    case = replace(case, ref_logits=case.logits.clone())
    assert (run(backend, case).kl == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [PART + 1, 2 * PART + 4101])
def test_a_row_does_not_depend_on_who_shares_it(backend: Backend, v: int, dtype: torch.dtype) -> None:
    """The same bits whether threads take whole rows or share the parts of rows."""
    case = rows_of_unlike_parts(dtype, 2 * PART + 4101)
    case = replace(case, logits=case.logits[:, -v:], ref_logits=case.ref_logits[:, -v:], labels=case.labels % v)
    weight = torch.rand(7, dtype=precision.accumulate_dtype(dtype))
    weight[1] = 0
    torch.set_num_threads(1)
    whole, loss = run(backend, case), backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(run(backend, case), whole)
        for got, want in zip(backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False), loss, strict=True):
            assert_same(got, want, "kl_loss")
    torch.set_num_threads(2)


def denormals_work() -> bool:
    """Whether torch's own arithmetic keeps denormal numbers, on this thread and on its workers."""
    return bool((torch.full((1 << 17,), 1e-40) * 0.5).ne(0).all()) and 1e-310 * 0.5 != 0


def test_the_floating_point_environment_is_restored(backend: Backend) -> None:
    if isinstance(backend, GPU_CODE):
        pytest.skip("a GPU has no such mode")
    case = make_case(300, 100, rows="denormal")
    assert denormals_work()
    run(backend, case)
    assert denormals_work()
    case.labels[299] = 100
    with pytest.raises(RuntimeError, match="labels"):
        run(backend, case)
    assert denormals_work()


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU has no flush-to-zero mode")
def test_the_callers_floating_point_mode_changes_nothing_and_is_kept(backend: Backend) -> None:
    if isinstance(backend, GPU_CODE):
        pytest.skip("a GPU has no such mode")
    case = make_case(300, 100, rows="denormal")
    expected = run(backend, case)
    torch.set_flush_denormal(True)
    try:
        result = run(backend, case)
        kept = (torch.tensor(1e-40) * 0.5).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert kept
    if ACTIVE == "cpu" and backend is not reference:  # plain torch follows the caller's mode
        assert_same_bits(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("v", [1, 33, 1000, 4097])
def test_kl_loss(backend: Backend, v: int, weighted: bool, dtype: torch.dtype) -> None:
    case = make_case(24, v, dtype, mode="kl")
    weight = torch.rand(24, dtype=precision.accumulate_dtype(dtype)) * case.mask if weighted else None
    case = replace(case, mask=None, dkl=torch.ones(24) if weight is None else weight)
    true, rounded = truth(case), rounding(case)

    before = case.logits.clone()
    with poisoned_memory():
        loss, dlogits = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
    assert_same(case.logits, before, "logits")
    assert loss.shape == ()
    assert loss.dtype == precision.accumulate_dtype(dtype)
    assert dlogits.dtype == dtype
    assert_rounded(loss, (case.dkl * true.kl).sum(), loss_rounding(rounded, true, case.dkl), "loss")
    assert_rounded(dlogits, true.dlogits, None if rounded is None else rounded.dlogits, "dlogits")
    inplace_loss, gradient = backend.kl_loss_fwd(before, case.ref_logits, weight, True)
    assert gradient.data_ptr() == before.data_ptr()
    assert_same(gradient, dlogits, "dlogits in place")
    assert_same(inplace_loss, loss, "loss in place")
    torch.set_num_threads(1)
    alone_loss, alone = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
    assert_same(alone, dlogits, "dlogits on one thread")
    assert_same(alone_loss, loss, "loss on one thread")


# On a GPU several blocks share such a row: evenly (32000 = Llama 2), with few vectors in the last piece of a block's
# share (32776), and with a smaller share for the last block (40008).
@pytest.mark.parametrize("dtype", FLOAT32_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("v", "rows"), [(32000, "noise"), (40008, "noise"), *((32776, rows) for rows in ("noise", "offset", "ramp"))]
)
def test_kl_loss_of_long_rows(backend: Backend, v: int, rows: str, dtype: torch.dtype) -> None:
    case = make_case(7, v, dtype, rows=rows, mode="kl")
    weight = case.dkl * case.mask  # 0 in rows 2 and 5
    case = replace(case, mask=None, dkl=weight)
    case.ref_logits[4] = case.logits[4]
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    with poisoned_memory():  # which also asks for results that do not depend on the number of rows
        loss, dlogits = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False)
        assert_rounded(loss, (weight * true.kl).sum(), loss_rounding(rounded, true, weight), "loss")
        assert_rounded(dlogits, true.dlogits, rounded.dlogits, "dlogits")
        for row in range(7):
            only = slice(row, row + 1)
            own_loss, alone = backend.kl_loss_fwd(case.logits[only], case.ref_logits[only], weight[only], False)
            assert_same(alone[0], dlogits[row], "a row alone")
            assert row != 4 or own_loss == 0
        inplace_loss, inplace = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, True)
    assert_same(inplace, dlogits, "in place")
    assert_same(inplace_loss, loss, "loss in place")


@pytest.mark.parametrize("dtype", FLOAT32_DTYPES, ids=str)
def test_kl_loss_of_long_rows_with_infinities(backend: Backend, dtype: torch.dtype) -> None:
    case = replace(make_case(6, 32000, dtype, mode="kl"), mask=None, dkl=torch.ones(6))
    logits, ref_logits = case.logits, case.ref_logits
    logits[0, 1::3] = -INF
    logits[1, :20000] = ref_logits[1, :20000] = -INF
    ref_logits[2, 77] = logits[2, 31999] = -INF  # an infinite KL, and a token without probability
    logits[3, 5] = INF
    logits[4, 31998] = NAN
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    with poisoned_memory():
        for row in range(6):
            only = slice(row, row + 1)
            loss, dlogits = backend.kl_loss_fwd(logits[only], ref_logits[only], None, False)
            assert_rounded(loss, true.kl[row], rounded.kl[row], f"loss of row {row}")
            if row == 2:
                assert dlogits[0, 77].isnan()
                assert not dlogits[0, :31999].isfinite().any()
                assert dlogits[0, 31999] == 0
            else:
                assert_rounded(dlogits[0], true.dlogits[row], rounded.dlogits[row], f"dlogits of row {row}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kl_loss_layouts(backend: Backend, layout: Layout) -> None:
    logits, ref_logits = torch.randn(2, 3, 4, 33)
    weight = torch.rand(3, 4)
    loss, dlogits = backend.kl_loss_fwd(logits, ref_logits, weight, False)
    buffer, strided = layout(logits.clone())
    strided.copy_(logits)
    before = buffer.clone()
    strided_ref = layout(ref_logits.clone())[1].copy_(ref_logits)
    strided_weight = weight.repeat_interleave(2, 1)[:, ::2]
    for inplace in (False, True):
        got = backend.kl_loss_fwd(strided, strided_ref, strided_weight, inplace)
        assert_same(got[0], loss, "loss")
        assert_same(got[1], dlogits, "dlogits")
    strided.copy_(logits)
    assert_same(buffer, before, "padding")


@pytest.mark.parametrize("inplace", [False, True])
def test_kl_loss_skips_rows_of_weight_zero(backend: Backend, inplace: bool) -> None:
    logits, ref_logits = torch.randn(2, 5, 65)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0])
    expected = backend.kl_loss_fwd(logits, ref_logits, weight, False)
    logits[1], ref_logits[3] = NAN, NAN
    loss, dlogits = backend.kl_loss_fwd(logits, ref_logits, weight, inplace)
    assert_same(loss, expected[0], "loss")
    assert_same(dlogits, expected[1], "dlogits")
    assert not dlogits[[1, 3]].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_kl_loss_of_no_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    for weight in (None, torch.empty(shape[:-1])):
        loss, dlogits = backend.kl_loss_fwd(torch.empty(shape), torch.empty(shape), weight, False)
        assert loss.item() == 0
        assert dlogits.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale(backend: Backend, layout: Layout, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 33, dtype=torch.float64).to(dtype)
    wide = precision.accumulate_dtype(dtype)
    buffer, tensor = layout(values.clone())
    for scale in (0.3, -2.0, 0.0, 1.0, NAN):
        tensor.copy_(values)
        before = buffer.clone()
        by = torch.tensor(scale, dtype=wide)
        backend.scale_(tensor, by)
        assert_same(tensor, (values.to(wide) * by).to(dtype), f"times {scale}")
        tensor.copy_(values)
        assert_same(buffer, before, "padding")


@needs_kernels
def test_every_simd_level_of_this_cpu_runs_when_it_is_set(simd_level: str) -> None:
    control = cpu.load()
    assert control.simd_level() == simd_level
    assert not any(control.rows_executed().values())
    case = make_case(10, 65)
    logits, labels, ref_logits, mask, *_ = vars(case).values()
    cpu.token_stats_fwd(logits, labels, ref_logits, mask, IGNORE)
    executed = {level: rows for level, rows in control.rows_executed().items() if rows}
    assert executed == {simd_level: 10}
    control.reset_rows_executed()
    assert not any(control.rows_executed().values())


@needs_kernels
def test_the_portable_level_exists_and_the_best_comes_first() -> None:
    levels = cpu.load().simd_levels()
    assert levels[-1] == "portable"
    assert levels == sorted(levels, key=["avx512", "avx2", "portable"].index)
    assert set(cpu.load().rows_executed()) >= set(levels)


@needs_kernels
@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_simd_level_is_refused_and_changes_nothing(name: str) -> None:
    control = cpu.load()
    before = control.simd_level()
    with pytest.raises(ValueError, match=f"portable.*{name!r}|{name!r}.*portable"):
        control.set_simd_level(name)
    assert control.simd_level() == before
