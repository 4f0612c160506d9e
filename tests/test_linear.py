"""The head: every option against float64 formulas, every way through autograd and the compiler, memory, refusals."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import ACTIVE, HALF_DTYPES, IGNORE, assert_close, assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import spo_kernels
from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    head,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)

OPS = torch.ops.spo_kernels
Options = dict[str, Any]

# Each option alone, then all: Gemma 2 caps, Cohere scales, a temperature is what sampling used.
OPTIONS: dict[str, Options] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": -0.5},
    "all": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.6},
}
WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """What the options mean, in the dtype of the operands."""
    z = logit_scale * F.linear(hidden, weight, bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORE
    return logits.log_softmax(-1).gather(-1, labels.where(valid, 0)[..., None])[..., 0].where(valid, 0)


def entropy_of(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def kl_of(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return F.kl_div(ref_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)


class Inputs:
    """Two heads over one vocabulary with labels and a mask; every fourth row ignored, every third masked."""

    def __init__(self, *rows: int, h: int = 8, v: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = noise(*rows, h), noise(v, h), noise(v)
        self.ref_hidden, self.ref_weight, self.ref_bias = noise(*rows, h + 3), noise(v, h + 3), noise(v)
        self.labels = torch.randint(0, v, rows, generator=generator)
        self.labels.view(-1)[::4] = IGNORE
        self.mask = torch.ones(rows, dtype=torch.bool)
        self.mask.view(-1)[1::3] = False
        self.upstream = torch.linspace(-1, 2, self.labels.numel(), dtype=torch.float64).view(rows)

    @property
    def policy(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    @property
    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ref_hidden, self.ref_weight, self.ref_bias


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Any = 1.0) -> list[Tensor]:
    """The function's value and the gradients of its product with upstream, by each input."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*leaves)
    loss = (out * torch.as_tensor(upstream, dtype=out.dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def all_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        near(got, want)


def set_tile_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int | None) -> None:
    monkeypatch.setitem(head.TILE_SIZES, "cpu", head.TILE_SIZES["cpu"]._replace(**sizes))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of so few rows and columns that small inputs take many, uneven ones at the ends included."""
    set_tile_sizes(monkeypatch, rows=5, bytes=1, least_columns=10, wide_bytes=1, least_wide_rows=8)
    monkeypatch.setattr(head, "_ALIGNED_COLUMNS", 4)
    monkeypatch.setattr(head, "_CAST_COLUMNS", 7)


@pytest.fixture(params=[False, True], ids=["float32_products", "native_products"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both of what the measurement may choose for half precision."""
    monkeypatch.setattr(head, "native_products", lambda device_type, dtype: request.param)
    return request.param


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 3, 1000])


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


def half_ulp_of_the_largest(x: Tensor, dtype: torch.dtype) -> float:
    return 0.5 * torch.finfo(dtype).eps * x.abs().max().item()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "logps": (
        lambda x, policy, **kw: linear_token_logps(policy[0], policy[1], x.labels, policy[2], **kw),
        lambda x, z, ref_z: logps_of(z, x.labels),
    ),
    "entropy": (
        lambda x, policy, **kw: linear_token_logps(
            policy[0], policy[1], x.labels, policy[2], return_entropy=True, **kw
        )[1],
        lambda x, z, ref_z: entropy_of(z).where(x.labels != IGNORE, 0),
    ),
    "kl": (
        lambda x, policy, **kw: linear_token_kl(
            policy[0], policy[1], x.ref_hidden, x.ref_weight, x.mask, policy[2], x.ref_bias, **kw
        ),
        lambda x, z, ref_z: kl_of(z, ref_z).where(x.mask, 0),
    ),
    "kl_loss": (
        lambda x, policy, **kw: linear_kl_loss(
            policy[0], policy[1], x.ref_hidden, x.ref_weight, x.mask, policy[2], x.ref_bias, row_weight=x.upstream, **kw
        ),
        lambda x, z, ref_z: (kl_of(z, ref_z).where(x.mask, 0) * x.upstream).sum(),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_within_the_budget(
    chunk_size: int | None, options: str, name: str, dtype: torch.dtype, native: bool, small_tiles: None
) -> None:
    """Against float64 of the same rounded inputs. The yardstick is eager on float32 logits: of float32 products, or of
    products in the inputs' dtype where those are native (which a softcap rules out)."""
    if dtype == torch.float32 and native:
        pytest.skip("the choice is of half precision alone")
    x = Inputs(48, h=32, v=211, dtype=dtype)
    ours, formula = FUNCTIONS[name]
    kw = OPTIONS[options]

    def by_formula(wide: torch.dtype, products: torch.dtype) -> list[Tensor]:
        def value(*policy: Tensor) -> Tensor:
            ref_z = logits_of(*(tensor.to(products) for tensor in x.reference), **kw).to(wide)
            return formula(x, logits_of(*policy, **kw).to(wide), ref_z)

        return differentiate(value, tuple(tensor.to(products) for tensor in x.policy), x.upstream)

    got = differentiate(lambda *policy: ours(x, policy, chunk_size=chunk_size, **kw), x.policy, x.upstream)
    truth = by_formula(torch.float64, torch.float64)
    yardstick = by_formula(torch.float32, dtype if native and "softcap" not in kw else torch.float32)
    assert got[0].dtype == torch.float32
    for label, actual, true, eager in zip((name, "hidden", "weight", "bias"), got, truth, yardstick, strict=True):
        assert label == name or actual.dtype == dtype
        assert_close(actual, true, eager, label)


def test_the_weight_is_summed_in_float32_over_tiles(native: bool) -> None:
    """Many tiles of equal rows: a sum in bfloat16 stops growing at 256 times its terms."""
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


def test_native_products_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head.native_products.cache_clear()
    calls = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (calls.append(a.dtype), product(a, b))[1])
    first = head.native_products("cpu", torch.bfloat16)
    assert {torch.bfloat16, torch.float32} == set(calls)
    before = len(calls)
    assert head.native_products("cpu", torch.bfloat16) == first
    assert len(calls) == before


def test_equal_heads_have_a_kl_of_exactly_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs(70, h=24, v=3000, dtype=dtype)
        for chunk_size in (None, 9):
            kl = linear_token_kl(*x.policy[:2], *x.policy[:2], None, x.bias, x.bias, chunk_size=chunk_size)
            assert not kl.any()


def test_minus_infinity_in_the_bias_masks_tokens(small_tiles: None) -> None:
    """Whole blocks of the vocabulary without probability, the first and the last among them; logits near 1e4."""
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


class Calls(TorchDispatchMode):
    """Operations with the sizes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0
        self.rows_of_products: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        self.names.append(name)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if name in ("addmm", "mm", "addmm_"):
            self.rows_of_products.append(args[-2].shape[0])
        return out


def forward_loop(policy: head.Head, labels: Tensor) -> Calls:
    """What the forward does, seen from inside: the op itself is opaque."""
    with Calls() as calls:
        head.token_stats_fwd(policy, labels, None, labels != IGNORE, False, head.LogitOptions(), None)
    return calls


def test_masked_rows_are_dropped_before_the_product() -> None:
    x = Inputs(40)
    x.hidden[x.labels == IGNORE] = torch.nan
    kept = int((x.labels != IGNORE).sum())
    assert forward_loop(head.Head(*x.policy), x.labels).rows_of_products == [kept]
    logps, dhidden, dweight, dbias = differentiate(
        lambda h, w, b: linear_token_logps(h, w, x.labels, b), x.policy, x.upstream
    )
    assert logps.isfinite().all()
    assert dweight.isfinite().all()
    assert dbias.isfinite().all()
    assert not dhidden[x.labels == IGNORE].any()


def test_a_tile_of_whole_rows_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product, a row op, and copies of the results; blocks of columns have their parts merged on top."""
    x = Inputs(96, v=1024, dtype=torch.float32)
    labels = x.labels.clamp(min=0)

    def calls(rows: int) -> int:
        set_tile_sizes(monkeypatch, bytes=rows * 1024 * 4, least_forward_rows=1)
        return len(forward_loop(head.Head(x.hidden, x.weight, None), labels).names)

    of_tile = (calls(8) - calls(16)) / 6  # 12 tiles, and 6
    assert of_tile <= 14  # six of which compute or copy; the others are views


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


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_costs_no_product(frozen: str) -> None:
    x = Inputs(40)
    policy, kept, options = head.Head(*x.policy), x.labels != IGNORE, head.LogitOptions()
    _, kl, stats = head.token_stats_fwd(policy, x.labels, None, kept, False, options, None)
    needs = head.Needs(frozen == "weight", frozen == "hidden", True)
    with Calls() as calls:
        dhidden, dweight, dbias = head.token_stats_bwd(
            x.upstream, None, policy, x.labels, None, kept, kl, stats, False, needs, options, None
        )
    assert len(calls.rows_of_products) == 1 + needs.hidden + needs.weight
    assert (dhidden.numel() > 0, dweight.numel() > 0, dbias.numel() > 0) == tuple(needs)
    # The public function asks for what requires grad, and for nothing else.
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(x.policy, needs, strict=True)]
    linear_token_logps(leaves[0], leaves[1], x.labels, leaves[2]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_without_gradients_nothing_is_saved() -> None:
    x = Inputs(3, 7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), torch.no_grad():
        assert not linear_token_logps(x.hidden.requires_grad_(), x.weight, x.labels).requires_grad
        assert not LinearSPOLoss()(x.hidden[:2], x.weight, x.labels[:2])[0].requires_grad
    assert not saved


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of live allocations during a call, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# N x V and everything else far apart: 2048 x 8192 float32 logits are 64 MiB, hidden states and weight 0.5 MiB or less.
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
    """The same as with inputs cast by hand; gradients have the dtype of the parameters."""
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


# ---- LinearSPOLoss


def pair_inputs(average_rows: int = 6, **kwargs: Any) -> Inputs:
    """Three pairs: 6 sequences."""
    return Inputs(6, average_rows, **kwargs)


def objective_of(
    x: Inputs,
    policy: tuple[Tensor, ...],
    *,
    alpha: float = 0.1,
    weight: Any = None,
    pair_weight: Tensor | None = None,
    center: bool = False,
    average: bool = False,
    nll_weight: float = 0.0,
    beta: float = 0.0,
    wide: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """`SPOLoss` on the logits, in dtype wide if given, plus the NLL term."""
    z, ref_z = (logits_of(*of, **options).to(wide or of[0].dtype) for of in (policy, x.reference))
    importance = (lambda *_: pair_weight) if pair_weight is not None else weight
    loss = SPOLoss(alpha, beta, importance, center=center, average=average)
    kl = {}
    if beta:
        kl = {"kl_logits": z, "kl_ref_logits": ref_z, "kl_mask": x.mask}
    objective, _ = loss(z, x.labels, **kl)
    chosen = x.labels[: len(x.labels) // 2]
    return objective - nll_weight * logps_of(z[: len(chosen)], chosen).sum() / (chosen != IGNORE).sum()


def kl_arguments(x: Inputs) -> Options:
    names = ("kl_ref_hidden", "kl_ref_weight", "kl_ref_bias")
    return {**dict(zip(names, x.reference, strict=True)), "kl_mask": x.mask}


OBJECTIVES: dict[str, Options] = {
    "uniform": {},
    "alpha 0": {"alpha": 0.0},
    "center": {"center": True, "alpha": 0.5},
    "average": {"average": True, "alpha": 2.0},
    "normalizer given": {"weight": SoftImportance(0.05, -1.0)},
    "normalizer tensor": {"weight": SoftImportance(0.05, torch.tensor(-1.0)), "average": True},
    "pair_weight": {"pair_weight": torch.tensor([0.3, 2.0, 1.0])},
    "nll": {"nll_weight": 0.7, "average": True},
    "kl": {"beta": 0.3},
    "options": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.6, "beta": 0.3, "nll_weight": 0.2},
}
ROUTE = pytest.mark.parametrize("route", ["recompute", "recompute_free", "auto"])


@ROUTE
@pytest.mark.parametrize("case", OBJECTIVES)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_linear_spo_loss_is_spo_loss_of_the_logits(
    upstream: float, case: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile_sizes(monkeypatch, wide_bytes=1, least_wide_rows=20)  # two pairs to a tile, then one
    x, options = pair_inputs(), dict(OBJECTIVES[case])
    pair_weight = options.pop("pair_weight", None)
    loss = LinearSPOLoss(route=route, **options)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kl = {"kl_hidden": hidden, **kl_arguments(x)} if loss.beta else {}
        return loss(hidden, weight, x.labels, bias, pair_weight=pair_weight, **kl)[0]

    def formula(*policy: Tensor) -> Tensor:
        return objective_of(x, policy, pair_weight=pair_weight, **options)

    all_near(differentiate(ours, x.policy, upstream), differentiate(formula, x.policy, upstream))


@ROUTE
def test_metrics_are_those_of_spo_loss(route: str) -> None:
    x = pair_inputs()
    references = {"reference_chosen_logps": torch.tensor([-9.0, -8, -7]), "reference_rejected_logps": torch.zeros(3)}
    loss, by_logits = LinearSPOLoss(beta=0.2, route=route), SPOLoss(beta=0.2)
    _, got = loss(
        x.hidden.requires_grad_(), x.weight, x.labels, x.bias, kl_hidden=x.hidden, **kl_arguments(x), **references
    )
    z = logits_of(*x.policy).detach()
    _, want = by_logits(z, x.labels, kl_logits=z, kl_ref_logits=logits_of(*x.reference), kl_mask=x.mask, **references)
    for name, ours, theirs in zip(want._fields, got, want, strict=True):
        assert not ours.requires_grad, name
        near(ours, theirs)


@ROUTE
def test_packed_pairs_are_the_padded_ones(route: str) -> None:
    x = pair_inputs()
    lengths = torch.tensor([3, 0, 6, 2, 6, 1])
    keep = torch.arange(6) < lengths[:, None]
    padded = x.labels.where(keep, IGNORE)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    loss = LinearSPOLoss(alpha=0.5, beta=0.2, nll_weight=0.3, route=route)
    kl = {"kl_ref_weight": x.ref_weight, "kl_ref_bias": x.ref_bias}

    def by_rows(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = hidden[keep]
        return loss(
            rows, weight, x.labels[keep], bias, cu_seqlens=cu_seqlens,
            kl_hidden=rows, kl_ref_hidden=x.ref_hidden[keep], kl_cu_seqlens=cu_seqlens, **kl,
        )[0]  # fmt: skip

    def by_batch(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(hidden, weight, padded, bias, kl_hidden=hidden, kl_ref_hidden=x.ref_hidden, kl_mask=keep, **kl)[0]

    all_near(differentiate(by_rows, x.policy), differentiate(by_batch, x.policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_both_routes_give_the_same_sums_of_the_same_token_logps(layout: str, dtype: torch.dtype) -> None:
    """Logits are rows of the weight, so that no shape of a product changes them; one pair's sums round in float32."""
    n, v = 4000, 16
    hidden = torch.eye(v, dtype=dtype)[torch.randint(0, v, (4, n))].requires_grad_()
    labels = torch.randint(0, v, (4, n))
    labels[:, ::7] = IGNORE
    labels[1, n // 2 :] = IGNORE
    arguments = (hidden, 5 * torch.randn(v, v, dtype=dtype), labels)
    packed: dict[str, Any] = {}
    if layout == "packed":
        arguments = (hidden.flatten(0, 1), arguments[1], labels.flatten())
        packed = {"cu_seqlens": torch.tensor([0, 3 * n // 2, 2 * n, 2 * n + 1, 4 * n])}
    metrics = {route: LinearSPOLoss(route=route)(*arguments, **packed)[1] for route in ("recompute", "recompute_free")}
    logps = linear_token_logps(*arguments).detach().flatten()
    bounds = packed.get("cu_seqlens", torch.arange(5) * n).tolist()
    exact = torch.stack([logps[b:e].double().sum() for b, e in itertools.pairwise(bounds)])
    for route, got in metrics.items():
        sums = torch.cat([got.chosen_logps, got.rejected_logps])
        assert torch.equal(sums, torch.cat([metrics["recompute"].chosen_logps, metrics["recompute"].rejected_logps]))
        rtol = 1e-7 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(sums, exact.to(dtype), rtol=rtol, atol=0, msg=route)


NAN_ROUTES = pytest.mark.parametrize("route", ["auto", "recompute", "recompute_free"])


@NAN_ROUTES
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_pair_of_weight_zero_is_not_read(route: str, layout: str, average: bool, poison: float) -> None:
    """Loss and gradients are those of the batch in which the pair's rows are ignored; P is still its pairs."""
    x = pair_inputs()
    pair_weight = torch.tensor([0.3, 0.0, 1.2], dtype=torch.float64)
    unread = [1, 4]
    loss = LinearSPOLoss(alpha=0.4, nll_weight=0.2, average=average, route=route)
    ignored = x.labels.clone()
    ignored[unread] = IGNORE

    def objective(labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, ids, packed = hidden, labels, {}
        if layout == "packed":
            rows, ids = hidden.flatten(0, 1), labels.flatten()
            packed = {"cu_seqlens": torch.arange(len(labels) + 1) * labels.shape[1]}
        value, metrics = loss(rows, weight, ids, bias, pair_weight=pair_weight, **packed)
        assert metrics.accuracy.isfinite()
        assert metrics.margin.isfinite()
        return value

    want = differentiate(lambda *policy: objective(ignored, *policy), x.policy)
    x.hidden[unread] = poison
    got = differentiate(lambda *policy: objective(x.labels, *policy), x.policy)
    all_near(got, want)
    assert not got[1][unread].any()


def test_a_pair_that_the_weight_leaves_out_is_not_read() -> None:
    """A callable's weights are known after the forward has read the rows; the backward does not read them."""
    x = pair_inputs()
    pair_weight = torch.tensor([0.3, 0.0, 1.2], dtype=torch.float64)
    loss = LinearSPOLoss(alpha=0.4, weight=lambda logp_w, logp_l: pair_weight)
    clean = LinearSPOLoss(alpha=0.4, route="recompute")
    x.hidden[[1, 4]] = math.nan
    got = differentiate(lambda *policy: loss(*policy[:2], x.labels, policy[2])[0], x.policy)
    want = differentiate(lambda *policy: clean(*policy[:2], x.labels, policy[2], pair_weight=pair_weight)[0], x.policy)
    all_near(got, want)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["linear_token_logps", "entropy", "linear_sequence_logps", "linear_token_kl", "linear_kl_loss"]
)
@pytest.mark.parametrize("by", ["marked", "upstream"])
def test_rows_that_are_not_wanted_are_not_read(name: str, by: str, poison: float) -> None:
    """Ignored, masked and weightless rows; and rows that were read, but whose upstream gradient is 0."""
    x = Inputs(3, 4)
    wanted = torch.ones(3, 4, dtype=torch.bool)
    wanted[1, 1:3] = wanted[2, 0] = False
    labels, mask = x.labels.where(wanted, IGNORE), wanted if by == "marked" else None
    if by == "upstream":
        labels = x.labels.where(wanted, x.labels.clamp(min=0))
        wanted = wanted & (labels != IGNORE)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if name == "linear_kl_loss":
            rows = wanted.double() * torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
            return linear_kl_loss(hidden, weight, x.ref_hidden, x.ref_weight, None, bias, x.ref_bias, row_weight=rows)
        if name == "linear_token_kl":
            out = linear_token_kl(hidden, weight, x.ref_hidden, x.ref_weight, mask, bias, x.ref_bias)
        elif name == "entropy":
            out = torch.stack(linear_token_logps(hidden, weight, labels, bias, return_entropy=True))
        elif name == "linear_token_logps":
            out = linear_token_logps(hidden, weight, labels, bias)
        else:
            sums = linear_sequence_logps(
                hidden.flatten(0, 1), weight, labels.flatten(), bias, cu_seqlens=torch.arange(13)
            )
            out = sums.view(3, 4)
        return out.where(wanted, 0)

    want = differentiate(function, x.policy)
    x.hidden[~wanted] = poison
    x.ref_hidden[~wanted] = poison
    got = differentiate(function, x.policy)
    for actual, expected in zip(got, want, strict=True):
        near(actual, expected)
    assert not got[1][~wanted].any()


def test_auto_recomputes_pairs_longer_than_a_tile_and_the_explicit_route_refuses_them() -> None:
    x = pair_inputs()
    x.labels[1:] = IGNORE
    x.labels[1, 0] = x.labels[4, 0] = 5  # the first pair has 5 rows, the second 2, the third none
    longest = int((x.labels[[0, 3]] != IGNORE).sum())

    def value(route: str, chunk_size: int) -> Callable[..., Tensor]:
        loss = LinearSPOLoss(alpha=0.5, nll_weight=0.2, softcap=5.0, chunk_size=chunk_size, route=route)
        return lambda h, w, b: loss(h, w, x.labels, b)[0]

    want = differentiate(lambda *policy: objective_of(x, policy, alpha=0.5, nll_weight=0.2, softcap=5.0), x.policy)
    for chunk_size in (1, 2, longest - 1, longest, longest + 1, 100):
        all_near(differentiate(value("auto", chunk_size), x.policy), want)
        all_near(differentiate(value("recompute", chunk_size), x.policy), want)
        if chunk_size >= longest:
            all_near(differentiate(value("recompute_free", chunk_size), x.policy), want)
            continue
        message = f"chunk_size must be at least the {longest} rows of the longest pair"
        with pytest.raises(ValueError, match=message):
            differentiate(value("recompute_free", chunk_size), x.policy)
        with torch.no_grad():
            near(value("recompute_free", chunk_size)(*x.policy), want[0])


@pytest.mark.parametrize(
    "importance", [0.05, SoftImportance(0.05, "ema"), lambda logp_w, logp_l: (logp_w + logp_l).sigmoid()], ids=str
)
def test_weights_that_need_the_whole_batch_are_recomputed_or_refused(importance: Any) -> None:
    x = pair_inputs()
    auto = LinearSPOLoss(weight=importance)
    with pytest.raises(ValueError, match='route "recompute_free" needs pair weights that a pair determines'):
        LinearSPOLoss(weight=importance, route="recompute_free")(*x.policy[:2], x.labels)
    with torch.no_grad():
        objective, _ = SPOLoss(weight=importance)(logits_of(*x.policy[:2]), x.labels)
    leaf = x.hidden.clone().requires_grad_()
    got, _ = auto.eval()(leaf, x.weight, x.labels)
    near(got.detach(), objective)
    want = x.hidden.clone().requires_grad_()
    got.backward()
    SPOLoss(weight=importance)(logits_of(want, x.weight), x.labels)[0].backward()
    assert leaf.grad is not None
    assert want.grad is not None
    near(leaf.grad, want.grad)


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Rows x columns of every product of the head, the unit of matrix work."""
    units: list[float] = []
    fill, add = head._Tile.fill, head._Gradients.add

    def counted_fill(self: Any, begin: int, end: int, **kw: Any) -> Tensor:
        tile = fill(self, begin, end, **kw)
        units.append(tile.shape[0] * (end - begin))
        return tile

    def counted_add(self: Any, tile: Any, filled: Tensor, begin: int, end: int) -> None:
        units.append(2 * filled.shape[0] * (end - begin))
        add(self, tile, filled, begin, end)

    monkeypatch.setattr(head._Tile, "fill", counted_fill)
    monkeypatch.setattr(head._Gradients, "add", counted_add)
    return units


def test_the_routes_do_the_products_they_say(units: list[float]) -> None:
    """4 with recomputation, 3 without, 1 without gradients."""
    x = pair_inputs(8)
    one = int((x.labels != IGNORE).sum()) * x.weight.shape[0]
    for route, expected in (("recompute", 4), ("recompute_free", 3), ("auto", 3)):
        units.clear()
        differentiate(lambda h, w, r=route: LinearSPOLoss(route=r)(h, w, x.labels)[0], x.policy[:2])
        assert sum(units) == expected * one
        units.clear()
        with torch.no_grad():
            LinearSPOLoss(route=route)(x.hidden.requires_grad_(), x.weight, x.labels)
        assert sum(units) == one


def test_the_kl_in_one_sweep_does_the_products_it_says(units: list[float]) -> None:
    """Four with its backward, where `linear_token_kl` needs six, of rows with a weight alone; two without gradients."""
    x = Inputs(40)
    row_weight = x.upstream.where(x.labels != IGNORE, 0)
    one = int((x.mask & (row_weight != 0)).sum()) * x.weight.shape[0]
    reference = (x.ref_hidden, x.ref_weight, x.mask)
    differentiate(lambda h, w: linear_kl_loss(h, w, *reference, row_weight=row_weight), x.policy[:2])
    assert sum(units) == 4 * one
    units.clear()
    with torch.no_grad():
        linear_kl_loss(x.hidden.requires_grad_(), x.weight, *reference, row_weight=row_weight)
    assert sum(units) == 2 * one


def test_a_second_backward_of_gradients_made_in_the_forward_raises() -> None:
    x = pair_inputs()
    leaf = x.hidden.requires_grad_()
    for loss, message in (
        (LinearSPOLoss(route="recompute_free")(leaf, x.weight, x.labels)[0], r'LinearSPOLoss .* use route "recompute"'),
        (LinearSPOLoss()(leaf, x.weight, x.labels)[0], r'LinearSPOLoss .* use route "recompute"'),
        (
            linear_kl_loss(leaf, x.weight, x.ref_hidden, x.ref_weight),
            r"linear_kl_loss .* use \(row_weight \* spo_kernels\.linear_token_kl\(\.\.\.\)\)",
        ),
    ):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=rf"^spo_kernels\.{message}"):
            loss.backward()
    recomputed = LinearSPOLoss(route="recompute")(leaf, x.weight, x.labels)[0]
    first, second = (torch.autograd.grad(recomputed, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


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
    """bfloat16 that native products have rounded stays that."""
    x = pair_inputs(dtype=dtype)
    policy = tuple(tensor.requires_grad_() for tensor in x.policy)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss(x, policy)
    waiting = [tensor for tensor in saved if tensor.shape == x.weight.shape]
    narrow = dtype == torch.bfloat16 and native
    assert [tensor.dtype for tensor in waiting] == [dtype if narrow else torch.promote_types(dtype, torch.float32)]


@pytest.mark.parametrize("route", ["recompute", "auto"])
def test_float16_gradients_get_their_loss_scale_before_they_are_rounded(route: str, native: bool) -> None:
    """As a gradient scaler calls: the gradient is far below float16's range, times the upstream scalar within."""
    x = pair_inputs(h=16, v=300, dtype=torch.float16)
    loss = LinearSPOLoss(beta=1e-5, route=route)
    pair_weight = torch.full((3,), 1e-6)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kl = {"kl_hidden": hidden, **kl_arguments(x)}
        return loss(hidden, weight, x.labels, bias, pair_weight=pair_weight, **kl)[0]

    got = differentiate(ours, x.policy, 2.0**20)
    exact = pair_inputs(h=16, v=300, dtype=torch.float16)
    exact.ref_hidden, exact.ref_weight, exact.ref_bias = (tensor.double() for tensor in exact.reference)
    want = differentiate(
        lambda *policy: objective_of(exact, policy, beta=1e-5, pair_weight=pair_weight.double()),
        tuple(tensor.double() for tensor in x.policy),
        2.0**20,
    )
    for gradient, true in zip(got[1:], want[1:], strict=True):
        assert gradient.dtype == torch.float16
        assert (gradient.double() - true).norm() < 5e-3 * true.norm()


def test_float16_refuses_the_route_that_would_lose_its_gradients() -> None:
    x = pair_inputs(dtype=torch.float16)
    with pytest.raises(ValueError, match=r'route "recompute_free" computes gradients before the loss scale'):
        LinearSPOLoss(route="recompute_free")(x.hidden.requires_grad_(), x.weight, x.labels)


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


# The gradients themselves are 2 MiB, and a sum of the weight's in float32 would be 4; a tile of 8 rows is small.
@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own, several a tile")
def test_a_single_tile_needs_no_wider_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "native_products", lambda device_type, dtype: True)
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
    monkeypatch.setattr(head, "native_products", lambda device_type, dtype: True)
    set_tile_sizes(monkeypatch, wide_bytes=1, least_wide_rows=8)
    monkeypatch.setattr(head, "_CAST_COLUMNS", 256)
    x = Inputs(4, 4, h=16, v=8192, dtype=torch.bfloat16)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    peak = peak_bytes(lambda: LinearSPOLoss(route="recompute_free")(hidden, weight, x.labels)[0])
    assert 3 * weight.nbytes <= peak < 3 * weight.nbytes + (120 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("route", ["recompute", "recompute_free"])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_both_routes_within_the_budget(upstream: float, route: str, dtype: torch.dtype, native: bool) -> None:
    if dtype == torch.float32 and native:
        pytest.skip("the choice is of half precision alone")
    route = "auto" if dtype == torch.float16 and route == "recompute_free" else route
    x = pair_inputs(h=32, v=211, dtype=dtype)
    loss = LinearSPOLoss(alpha=0.1, beta=0.2, route=route)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(hidden, weight, x.labels, bias, kl_hidden=hidden, **kl_arguments(x))[0]

    def by_formula(wide: torch.dtype, products: torch.dtype) -> list[Tensor]:
        w = pair_inputs(h=32, v=211, dtype=dtype)
        w.ref_hidden, w.ref_weight, w.ref_bias = (tensor.to(products) for tensor in w.reference)
        return differentiate(
            lambda *policy: objective_of(w, policy, alpha=0.1, beta=0.2, wide=wide),
            tuple(tensor.to(products) for tensor in x.policy),
            upstream,
        )

    got, truth, yardstick = (
        differentiate(ours, x.policy, upstream),
        by_formula(torch.float64, torch.float64),
        by_formula(torch.float32, dtype if native else torch.float32),
    )
    assert_close(got[0], truth[0], yardstick[0], "objective")
    for label, actual, true, eager in zip(("hidden", "weight", "bias"), got[1:], truth[1:], yardstick[1:], strict=True):
        assert actual.dtype == dtype
        # Two losses share these leaves: autograd adds their gradients after each was rounded to a half dtype.
        extra = 0 if dtype == torch.float32 else 2 * half_ulp_of_the_largest(true, dtype)
        off = (actual.double() - true).abs() - extra
        assert_close(true + off.clamp(min=0), true, eager, label)


@ROUTE
def test_linear_spo_loss_under_autocast(route: str) -> None:
    x = pair_inputs(dtype=torch.float32)
    loss = LinearSPOLoss(beta=0.2, route=route)
    leaves = [tensor.clone().requires_grad_() for tensor in x.policy]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective, _ = loss(leaves[0], leaves[1], x.labels, leaves[2], kl_hidden=leaves[0], **kl_arguments(x))
    objective.backward()
    assert objective.dtype == torch.float32
    want = differentiate(lambda *policy: objective_of(x, policy, beta=0.2), x.policy)
    torch.testing.assert_close(objective.detach(), want[0], rtol=0.02, atol=0.02)
    for leaf, gradient in zip(leaves, want[1:], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, gradient, rtol=0.1, atol=0.05)


# ---- the compiler


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(autocast: bool, name: str) -> None:
    x = Inputs(3, 7, dtype=torch.float32)
    ours, _ = FUNCTIONS[name]

    def call(*policy: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return ours(x, policy, **OPTIONS["all"])

    got, want = differentiate(compiled(call), x.policy, x.upstream), differentiate(call, x.policy, x.upstream)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_dynamic_shapes_compile_once() -> None:
    x = Inputs(3, 7, dtype=torch.float32)
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiles.append(len(inputs))
        return graph

    torch._dynamo.reset()
    call = torch.compile(linear_token_logps, fullgraph=True, dynamic=True, backend=backend)
    hidden, labels = x.policy[0].detach().flatten(0, 1), x.labels.flatten().clamp(max=9)
    for rows, columns in ((5, 10), (7, 12), (4, 11)):
        weight = x.policy[1].detach()[:columns]
        got = call(hidden[:rows], weight, labels[:rows])
        torch.testing.assert_close(got, linear_token_logps(hidden[:rows], weight, labels[:rows]))
    assert len(compiles) == 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Types of the operands that `native_products` measures with, not yet called."""
    head.native_products.cache_clear()
    operands: list[type] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (operands.append(type(a)), product(a, b))[1])
    return operands


def test_fake_tensors_do_not_measure(measured: list[type]) -> None:
    """They have no data and take no time: what they measured would be wrong for good."""
    x = pair_inputs(dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, weight = (mode.from_tensor(tensor).requires_grad_() for tensor in x.policy[:2])
        loss, _ = LinearSPOLoss(route="recompute_free")(hidden, weight, mode.from_tensor(x.labels))
    assert isinstance(loss, FakeTensor)
    assert measured and set(measured) == {Tensor}


def test_compile_does_not_trace_the_measurement(measured: list[type]) -> None:
    x = pair_inputs(dtype=torch.bfloat16)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        objective, _ = LinearSPOLoss(route="recompute_free")(hidden, weight, x.labels)
        return objective + linear_kl_loss(hidden, weight, x.ref_hidden, x.ref_weight)

    got, want = differentiate(compiled(call), x.policy[:2]), differentiate(call, x.policy[:2])
    assert measured and set(measured) == {Tensor}
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


@ROUTE
def test_compile_linear_spo_loss(route: str) -> None:
    x = pair_inputs(dtype=torch.float32)
    cu_seqlens = torch.arange(0, 37, 6)
    loss = LinearSPOLoss(beta=0.2, weight=SoftImportance(0.05, -1.0), nll_weight=0.1, route=route)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        packed = hidden.flatten(0, 1)
        first = loss(hidden, weight, x.labels, bias, kl_hidden=hidden * 2, **kl_arguments(x))[0]
        reference = {"kl_ref_hidden": x.ref_hidden, "kl_ref_weight": x.ref_weight}
        second = loss(packed, weight, x.labels.flatten(), cu_seqlens=cu_seqlens, kl_hidden=hidden, **reference)[0]
        return first + 3 * second

    got, want = differentiate(compiled(call), x.policy), differentiate(call, x.policy)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compile_dynamic_shapes() -> None:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        logps, entropy = linear_token_logps(hidden * 1, weight, labels, chunk_size=chunk_size, return_entropy=True)
        of_logits = SPOLoss()(hidden @ weight.T, labels)[0]
        return (logps + 0.1 * entropy).sum() + LinearSPOLoss()(hidden, weight, labels)[0] + of_logits

    function = compiled(call, dynamic=True)
    for rows, length, chunk_size in ((2, 7, 3), (6, 5, 4)):
        x = Inputs(rows, length)
        got = differentiate(lambda h, w, y=x.labels, c=chunk_size: function(h, w, y, c), x.policy[:2])
        want = differentiate(lambda h, w, y=x.labels, c=chunk_size: call(h, w, y, c), x.policy[:2])
        all_near(got, want)


def op_arguments(op: str) -> tuple[Any, ...]:
    x = Inputs(12, dtype=torch.float32)
    policy = tuple(tensor.requires_grad_() for tensor in x.policy)
    whole = (0, x.weight.shape[0], None)
    options = (1.3, 3.0, 0.6, 5, *whole)
    logps = (x.labels, None, None, None, None, IGNORE, True)
    _, kl, stats = OPS.linear_token_stats_fwd(*(tensor.detach() for tensor in policy), *logps, *options)
    bounds = torch.arange(5) * 3
    counts = torch.full((4,), 2.0)
    return {
        "linear_token_stats_fwd": (*policy, *logps, *options),
        "linear_token_stats_bwd": (
            torch.rand(12),
            torch.rand(12),
            *(tensor.detach() for tensor in policy),
            *logps[:-2],
            kl,
            stats,
            *logps[-2:],
            True,
            True,
            False,
            *options,
        ),
        "linear_kl_loss_fwd": (*policy, *x.reference, torch.rand(12), torch.float32, True, True, True, *options),
        "linear_spo_loss_fwd": (
            *policy,
            x.labels,
            bounds,
            counts,
            None,
            torch.tensor(-1.0),
            0.05,
            0.1,
            False,
            True,
            0.2,
            IGNORE,
            False,
            torch.float32,
            True,
            True,
            True,
            1.3,
            3.0,
            0.6,
            20,
            *whole,
        ),
    }[op]


@pytest.mark.parametrize(
    "op", ["linear_token_stats_fwd", "linear_token_stats_bwd", "linear_kl_loss_fwd", "linear_spo_loss_fwd"]
)
def test_opcheck(op: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "loss" not in op:  # whose backward scales an output in place; see test_functional.test_opcheck
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, op).default, op_arguments(op), test_utils=tests)


# ---- refusals

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
