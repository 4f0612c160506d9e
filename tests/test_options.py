"""The options of the logits, in every function and module: values and gradients against eager PyTorch in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from heads import Calls, differentiate, entropy_of, kl_of, logps_of, near, peak_bytes
from options import (
    DIVERGENCES,
    EVERY,
    NUMBERS,
    PADDING,
    POLICY,
    REF_PADDING,
    Options,
    both_transformed,
    divergence_of,
    filled,
    transformed,
)
from oracle import (
    ACTIVE,
    IGNORE,
    Result,
    assert_rounded,
    assert_within_budget,
    loss_rounding,
    make_case,
    poisoned_memory,
    rounding,
    truth,
    ulp,
)
from torch import Tensor

from spo_kernels import (
    LinearSPOLoss,
    SPOLoss,
    kl_loss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
    sequence_logps,
    token_kl,
    token_logps,
    token_logps_kl,
)
from spo_kernels.logit_options import LogitOptions, checked_transform
from spo_kernels.reference import RowOptions

V = 9


class Rows:
    """Logits of policy and reference ``[..., V]`` in float64, labels and a mask.

    Rows that are both ignored and masked are NaN for the functions, and so are the columns after V, which exist if the
    options have a vocab_size.
    """

    def __init__(self, *rows: int) -> None:
        self.raw, self.ref_raw = 3 * torch.randn(2, *rows, V, dtype=torch.float64)
        self.labels = torch.randint(0, V, rows)
        self.labels.view(-1)[1::4] = IGNORE
        self.mask = torch.ones(rows, dtype=torch.bool)
        self.mask.view(-1)[1::3] = False
        self.temperature = torch.linspace(0.5, 2, self.labels.numel()).view(rows)
        self.ref_temperature = self.temperature.flip(-1) if rows else self.temperature / 3
        self.row_weight = torch.linspace(-1, 2, self.labels.numel(), dtype=torch.float64).view(rows)
        self.bounds = torch.tensor([0, 2, 2, self.labels.numel()])

    def given(self, logits: Tensor, padding: int, options: Options) -> Tensor:
        """What a function gets for these logits."""
        logits = logits.clone()
        logits[(self.labels == IGNORE) & ~self.mask] = math.nan
        return F.pad(logits, (0, padding), value=math.nan) if "vocab_size" in options else logits

    def filled(self, options: Options) -> Options:
        self.options = filled(options, V, self.temperature, self.ref_temperature)
        return self.options


class Function(NamedTuple):
    ours: Callable[..., Tensor]  # (x, logits, ref_logits, options)
    formula: Callable[..., Tensor]  # (x, z, ref_z)
    inplace: str = "inplace_backward"


def packed(value: Any) -> Any:
    return value.flatten() if isinstance(value, Tensor) and value.dim() else value


def stacked(*outputs: Tensor) -> Tensor:
    return torch.stack(outputs)


def valid(x: Any, values: Tensor) -> Tensor:
    return values.where(x.labels != IGNORE, 0)


def masked_kl(x: Any, z: Tensor, r: Tensor) -> Tensor:
    return kl_of(z, r, **divergence_of(x.options)).where(x.mask, 0)


OF_LOGPS: dict[str, Function] = {
    "token_logps": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, **kw), lambda x, z, r: logps_of(z, x.labels)
    ),
    "entropy": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, return_entropy=True, **kw)[1],
        lambda x, z, r: valid(x, entropy_of(z)),
    ),
    "z-loss": Function(
        lambda x, z, r, **kw: token_logps(z, x.labels, return_lse=True, **kw)[1].square().mean(),
        lambda x, z, r: valid(x, z.logsumexp(-1)).square().mean(),
    ),
    "entropy and lse": Function(
        lambda x, z, r, **kw: stacked(*token_logps(z, x.labels, return_entropy=True, return_lse=True, **kw)),
        lambda x, z, r: stacked(logps_of(z, x.labels), valid(x, entropy_of(z)), valid(x, z.logsumexp(-1))),
    ),
}
OF_KL: dict[str, Function] = {
    "token_kl": Function(lambda x, z, r, **kw: token_kl(z, r, x.mask, **kw), masked_kl),
    "token_logps_kl": Function(
        lambda x, z, r, **kw: stacked(*token_logps_kl(z, x.labels, r, x.mask, **kw)),
        lambda x, z, r: stacked(logps_of(z, x.labels), masked_kl(x, z, r)),
    ),
    "kl_loss": Function(
        lambda x, z, r, **kw: kl_loss(z, r, x.mask, row_weight=x.row_weight, **kw),
        lambda x, z, r: (masked_kl(x, z, r) * x.row_weight).sum(),
        "overwrite_logits",
    ),
}
OF_SEQUENCES: dict[str, Function] = {
    "sequence_logps": Function(
        lambda x, z, r, **kw: sequence_logps(z, x.labels, average=True, **kw),
        lambda x, z, r: logps_of(z, x.labels).sum(-1) / (x.labels != IGNORE).sum(-1).clamp(min=1),
    ),
    "packed": Function(
        lambda x, z, r, **kw: sequence_logps(
            z.flatten(0, 1),
            x.labels.flatten(),
            cu_seqlens=x.bounds,
            **{name: packed(value) for name, value in kw.items()},
        ),
        lambda x, z, r: stacked(*(part.sum() for part in logps_of(z, x.labels).flatten().split([2, 0, 10]))),
    ),
}

INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])


def check(function: Function, x: Rows, options: Options, inplace: bool) -> None:
    """Values and gradients; in place, the gradient and the zeros of its padding lie in the memory of the logits."""
    options = x.filled(options)
    raw, ref_logits = x.given(x.raw, PADDING, options), x.given(x.ref_raw, REF_PADDING, options)
    memory: list[Tensor] = []

    def ours(logits: Tensor) -> Tensor:
        intermediate = logits * 1
        memory.append(intermediate.detach())
        return function.ours(x, intermediate, ref_logits, **options, **({function.inplace: True} if inplace else {}))

    def formula(logits: Tensor) -> Tensor:
        return function.formula(x, *both_transformed(logits, x.ref_raw, options))

    upstream = torch.linspace(-1, 2, ours(raw).numel(), dtype=torch.float64).view(ours(raw).shape)
    with poisoned_memory():
        got, gradient = differentiate(ours, (raw,), upstream)
    want, true_gradient = differentiate(formula, (x.raw,), upstream)
    near(got, want)
    near(gradient[..., :V], true_gradient)
    assert not gradient[..., V:].any()
    if inplace:
        assert torch.equal(memory[-1], gradient)


@INPLACE
@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in OF_LOGPS for options in POLICY]
    + [(name, options) for name in OF_KL for options in EVERY],
)
def test_options_of_token_functions(name: str, options: str, shape: tuple[int, ...], inplace: bool) -> None:
    check({**OF_LOGPS, **OF_KL}[name], Rows(*shape), EVERY[options], inplace)


@INPLACE
@pytest.mark.parametrize("options", POLICY)
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_options_of_sequence_functions(name: str, options: str, inplace: bool) -> None:
    check(OF_SEQUENCES[name], Rows(3, 4), POLICY[options], inplace)


@pytest.mark.parametrize("temperature", ["number", "rows"])
@INPLACE
def test_options_of_strided_slices(inplace: bool, temperature: str) -> None:
    """``logits[:, :-1]`` beside a slice of the temperatures; the rest of the logits has no gradient."""
    x = Rows(3, 5)
    by_row = torch.stack([x.temperature, -x.temperature], -1)[:, 1:, 0]  # not contiguous either
    options: Options = {"temperature": by_row if temperature == "rows" else 0.7, "softcap": 5.0}
    labels, r = x.labels[:, 1:], x.ref_raw[:, :-1]
    option = {"inplace_backward": inplace}

    def ours(z: Tensor) -> Tensor:
        return stacked(*token_logps_kl((z * 1)[:, :-1], labels, r, **options, **option))

    def formula(raw: Tensor) -> Tensor:
        z, ref_z = both_transformed(raw[:, :-1], r, options)
        return stacked(logps_of(z, labels), kl_of(z, ref_z))

    upstream = torch.linspace(-1, 2, 24, dtype=torch.float64).view(2, 3, 4)
    for got, want in zip(
        differentiate(ours, (x.raw,), upstream), differentiate(formula, (x.raw,), upstream), strict=True
    ):
        near(got, want)


@pytest.mark.parametrize("outputs", [(True, False), (False, True), (True, True)], ids=["entropy", "lse", "both"])
def test_each_output_of_token_logps_alone_has_its_gradient(outputs: tuple[bool, bool]) -> None:
    """The other outputs have no upstream gradient at all."""
    x, options = Rows(3, 4), {"temperature": 0.7, "softcap": 4.0}
    formulas = (
        lambda z: logps_of(z, x.labels),
        lambda z: valid(x, entropy_of(z)),
        lambda z: valid(x, z.logsumexp(-1)),
    )
    wanted = [formula for formula, given in zip(formulas, (True, *outputs), strict=True) if given]
    asked = {"return_entropy": outputs[0], "return_lse": outputs[1]}
    for index, formula in enumerate(wanted):
        got = differentiate(lambda z, i=index: token_logps(z, x.labels, **options, **asked)[i], (x.raw,), x.row_weight)
        want = differentiate(lambda z, f=formula: f(transformed(z, **options)), (x.raw,), x.row_weight)
        assert not got[0][x.labels == IGNORE].any()
        assert not got[1][x.labels == IGNORE].any()
        for actual, expected in zip(got, want, strict=True):
            near(actual, expected)


@pytest.mark.parametrize("options", ["all of both", *DIVERGENCES])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_options_of_kl_loss_with_and_without_rows_left_out(
    gradients: bool, weighted: bool, mask: bool, options: Any
) -> None:
    x = Rows(3, 4)
    options = x.filled(EVERY[options])
    wanted, weight = x.mask if mask else None, x.row_weight if weighted else None
    padding = (0, 2 if "vocab_size" in options else 0)
    logits, ref_logits = (F.pad(raw, padding, value=math.nan) for raw in (x.raw, x.ref_raw))
    got = kl_loss(logits.requires_grad_(gradients), ref_logits, wanted, row_weight=weight, **options)
    kl = kl_of(*both_transformed(x.raw, x.ref_raw, options), **divergence_of(options))
    kl = kl * (1 if weight is None else weight)
    near(got.detach(), (kl if wanted is None else kl.where(wanted, 0)).sum())


# Factors that float32 holds exactly, so that the float64 truth has the same ones.
EXACT: dict[str, tuple[Options, list[float], list[float]]] = {
    "temperature": ({"temperature": 0.5}, [2.0], [2.0]),
    "softcap": ({"softcap": 4.0}, [0.25, 4.0], [0.25, 4.0]),
    "both": (
        {"temperature": 2.0, "softcap": 4.0, "logit_scale": -0.75, "ref_temperature": 0.5, "ref_softcap": math.inf},
        [-0.1875, 2.0],
        [-1.5],
    ),
}


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", EXACT)
def test_options_within_the_budget(options: str, dtype: torch.dtype, inplace: bool) -> None:
    given, factors, ref_factors = EXACT[options]
    transforms = [torch.tensor(values)[:, None] for values in (factors, ref_factors)]
    case = make_case(48, 1000, dtype)
    case = replace(
        case,
        logits=F.pad(3 * case.logits, (0, 8), value=math.nan),
        ref_logits=F.pad(3 * case.ref_logits, (0, 24), value=math.nan),
        options=RowOptions(1000, *transforms),
    )
    leaf = case.logits.clone().requires_grad_()
    rows = (case.ref_logits, case.mask)
    logps, kl = token_logps_kl(leaf * 1, case.labels, *rows, vocab_size=1000, inplace_backward=inplace, **given)
    torch.autograd.backward((logps, kl), (case.dlogps, case.dkl))
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_within_budget(Result(logps.detach(), kl.detach(), leaf.grad), truth(case), rounding(case))

    # float16 takes two sweeps, the others one.
    case, weight = case.only("kl"), case.dkl.where(case.mask, 0)
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    leaf = case.logits.clone().requires_grad_()
    loss = kl_loss(leaf * 1, *rows, row_weight=case.dkl, vocab_size=1000, overwrite_logits=inplace, **given)
    loss.backward()
    assert leaf.grad is not None
    assert_rounded(loss.detach(), (true.kl * weight).sum(), loss_rounding(rounded, true, weight), "loss")
    assert_rounded(leaf.grad, true.dlogits, rounded.dlogits, "dlogits")


@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entropy_and_lse_within_the_budget(dtype: torch.dtype, inplace: bool) -> None:
    """The entropy is log V minus the KL to the uniform distribution, and has the error of log V besides."""
    case = make_case(48, 1000, dtype)
    wanted = case.labels != IGNORE
    case = replace(
        case,
        logits=3 * case.logits,
        ref_logits=torch.zeros_like(case.logits),
        mask=wanted,
        dlse=torch.linspace(-1.5, 0.8, 48).where(wanted, 0),
        options=RowOptions(None, torch.tensor([[0.25], [4.0]]), None),
    )
    true, rounded = truth(case), rounding(case)
    assert rounded is not None
    leaf = case.logits.clone().requires_grad_()
    outputs = token_logps(
        leaf * 1, case.labels, softcap=4.0, return_entropy=True, return_lse=True, inplace_backward=inplace
    )
    torch.autograd.backward(outputs, (case.dlogps, -case.dkl, case.dlse))
    logps, entropy, lse = (output.detach() for output in outputs)
    assert_rounded(logps, true.logps, rounded.logps, "logps")
    log_v = torch.full_like(true.kl, math.log(1000))
    assert_rounded(entropy, (log_v - true.kl).where(wanted, 0), rounded.kl + ulp(log_v, torch.float32), "entropy")
    true_lse = transformed(case.logits.double(), softcap=4.0).logsumexp(-1).where(wanted, 0)
    assert_rounded(lse, true_lse, rounded.logps, "lse")  # the rounding of a log-prob is that of its lse and of z_y
    assert leaf.grad is not None
    assert_rounded(leaf.grad, true.dlogits, rounded.dlogits, "dlogits")


ALPHA, BETA = 0.4, 0.3


@INPLACE
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("options", NUMBERS)
def test_options_of_spo_loss(options: str, layout: str, inplace: bool) -> None:
    x = Rows(4, 3)
    given = x.filled(NUMBERS[options])
    loss = SPOLoss(ALPHA, BETA, inplace_backward=inplace, **given)
    raw, kl_raw = (x.given(logits, PADDING, given) for logits in (x.raw, x.raw / 2))
    ref_logits = x.given(x.ref_raw, REF_PADDING, given)

    def ours(logits: Tensor, kl_logits: Tensor) -> Tensor:
        tensors = {"logits": logits * 1, "labels": x.labels}
        tensors |= {"kl_logits": kl_logits * 1, "kl_ref_logits": ref_logits, "kl_mask": x.mask}
        if layout == "padded":
            return loss(**tensors)[0]
        bounds = torch.arange(5) * 3
        return loss(**{n: t.flatten(0, 1) for n, t in tensors.items()}, cu_seqlens=bounds, kl_cu_seqlens=bounds)[0]

    def formula(logits: Tensor, kl_logits: Tensor) -> Tensor:
        z, _ = both_transformed(logits, x.ref_raw, given)
        sums = logps_of(z, x.labels).sum(-1)
        preference = -F.logsigmoid(ALPHA * (sums[:2] - sums[2:])).mean() / ALPHA
        return preference + BETA * masked_kl(x, *both_transformed(kl_logits, x.ref_raw, given)).sum() / 4

    got, want = differentiate(ours, (raw, kl_raw)), differentiate(formula, (x.raw, x.raw / 2))
    near(got[0], want[0])
    for gradient, expected in zip(got[1:], want[1:], strict=True):
        near(gradient[..., :V], expected)
        assert not gradient[..., V:].any()


# What the options refuse. Z and H have the rows [2, 3].
Z, R, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
H, W, RW = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(7, 4)
ONES = torch.ones(2, 3)
POSITIVE = "temperature must be > 0 and finite"
IN_EVERY_ROW = "temperature must be > 0 and finite in every row"
FORM = "temperature must be a number, or floating [2, 3] or [], got"
VOCAB_SIZE = "vocab_size must be a whole number of columns >= 1, or None, got"
REFUSED: dict[str, tuple[Options, type[Exception], str]] = {
    "temperature 0": ({"temperature": 0}, ValueError, f"{POSITIVE}, got 0"),
    "temperature inf": ({"temperature": math.inf}, ValueError, f"{POSITIVE}, got inf"),
    "temperature nan": ({"temperature": math.nan}, ValueError, f"{POSITIVE}, got nan"),
    "temperature str": ({"temperature": "1"}, TypeError, "temperature must be a Python number, got str"),
    "temperature of other rows": ({"temperature": torch.ones(3)}, ValueError, f"{FORM} [3] float32"),
    "temperature of one": ({"temperature": torch.ones(1)}, ValueError, f"{FORM} [1] float32"),
    "temperature of columns": ({"temperature": torch.ones(2, 3, 5)}, ValueError, f"{FORM} [2, 3, 5] float32"),
    "temperature of integers": ({"temperature": Y + 1}, ValueError, f"{FORM} [2, 3] int64"),
    "temperature device": (
        {"temperature": ONES.to("meta")},
        ValueError,
        "temperature must be on cpu like (logits|hidden), got meta",
    ),
    "temperature grad": (
        {"temperature": ONES.clone().requires_grad_()},
        ValueError,
        "temperature must not require grad: no gradient flows to it (use .detach())",
    ),
    "temperature of a row 0": (
        {"temperature": ONES - Y.new_ones(3).cumsum(0).eq(2).float()},
        RuntimeError,
        IN_EVERY_ROW,
    ),
    "temperature of a row nan": ({"temperature": ONES * math.nan}, RuntimeError, IN_EVERY_ROW),
    "temperature of a row inf": ({"temperature": ONES / 0}, RuntimeError, IN_EVERY_ROW),
    "0-d temperature": ({"temperature": torch.tensor(-1.0)}, RuntimeError, IN_EVERY_ROW),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap must be > 0 and finite, or None, got 0.0"),
    "softcap -1": ({"softcap": -1}, ValueError, "softcap must be > 0 and finite, or None, got -1"),
    "softcap inf": ({"softcap": math.inf}, ValueError, "softcap must be > 0 and finite, or None, got inf"),
    "softcap nan": ({"softcap": math.nan}, ValueError, "softcap must be > 0 and finite, or None, got nan"),
    "softcap tensor": ({"softcap": torch.ones(())}, TypeError, "softcap must be a Python number, got Tensor"),
    "logit_scale 0": ({"logit_scale": 0}, ValueError, "logit_scale must be finite and not 0, got 0"),
    "logit_scale -inf": ({"logit_scale": -math.inf}, ValueError, "logit_scale must be finite and not 0, got -inf"),
    "logit_scale nan": ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite and not 0, got nan"),
    "logit_scale tensor": (
        {"logit_scale": torch.ones(())},
        TypeError,
        "logit_scale must be a Python number, got Tensor",
    ),
}
VOCAB_SIZES_REFUSED: dict[str, tuple[Options, type[Exception], str]] = {
    "vocab_size too large": ({"vocab_size": 6}, ValueError, "vocab_size must be at most the 5 columns, got 6"),
    "vocab_size 0": ({"vocab_size": 0}, ValueError, f"{VOCAB_SIZE} 0"),
    "vocab_size negative": ({"vocab_size": -1}, ValueError, f"{VOCAB_SIZE} -1"),
    "vocab_size bool": ({"vocab_size": True}, ValueError, f"{VOCAB_SIZE} True"),
    "vocab_size float": ({"vocab_size": 5.0}, ValueError, f"{VOCAB_SIZE} 5.0"),
}
KL_CALLS: dict[str, Callable[..., object]] = {
    "token_kl": lambda **kw: token_kl(Z, Z, **kw),
    "token_logps_kl": lambda **kw: token_logps_kl(Z, Y, Z, **kw),
    "kl_loss": lambda **kw: kl_loss(Z, Z, **kw),
    "linear_token_kl": lambda **kw: linear_token_kl(H, W, H, W, **kw),
    "linear_kl_loss": lambda **kw: linear_kl_loss(H, W, H, W, **kw),
}
CALLS: dict[str, Callable[..., object]] = {
    "token_logps": lambda **kw: token_logps(Z, Y, **kw),
    "sequence_logps": lambda **kw: sequence_logps(Z, Y, **kw),
    "linear_token_logps": lambda **kw: linear_token_logps(H, W, Y, **kw),
    "linear_sequence_logps": lambda **kw: linear_sequence_logps(H, W, Y, **kw),
    **KL_CALLS,
}


def refuses(call: Callable[..., object], options: Options, error: type[Exception], message: str) -> None:
    pattern = re.escape(message).replace(re.escape("(logits|hidden)"), "(logits|hidden)")
    with pytest.raises(error, match=f"^{pattern}"):
        call(**options)


@pytest.mark.parametrize("what", [*REFUSED, *VOCAB_SIZES_REFUSED])
def test_bad_options_are_named(what: str) -> None:
    options, error, message = {**REFUSED, **VOCAB_SIZES_REFUSED}[what]
    for call in CALLS.values():
        refuses(call, options, error, message)
    if what not in REFUSED or what == "softcap inf":  # a ref_softcap of inf stands for none
        return
    for call in KL_CALLS.values():
        refuses(call, {f"ref_{name}": value for name, value in options.items()}, error, f"ref_{message}")


@pytest.mark.parametrize("module", [SPOLoss, LinearSPOLoss])
@pytest.mark.parametrize("what", [*REFUSED, *VOCAB_SIZES_REFUSED])
def test_bad_options_of_modules_are_named(what: str, module: Callable[..., object]) -> None:
    """A module is built before the rows are known: it takes numbers."""
    options, error, message = {**REFUSED, **VOCAB_SIZES_REFUSED}[what]
    (name, value), *_ = options.items()
    if isinstance(value, Tensor):
        error, message = TypeError, f"{name} must be a Python number, got Tensor"
    if what == "vocab_size too large":
        loss = module(vocab_size=6)
        call: Callable[..., object] = (lambda: loss(Z, Y)) if module is SPOLoss else (lambda: loss(H, W, Y))
        refuses(call, {}, error, message)
        return
    refuses(module, options, error, message)
    if what in REFUSED and what != "softcap inf":
        refuses(module, {f"ref_{name}": value}, error, f"ref_{message}")


SPO, LINEAR_SPO = SPOLoss(0.1, 0.2, vocab_size=6), LinearSPOLoss(0.1, 0.2, vocab_size=6)
NARROW = "ref_logits must be [2, 3, V] like logits, with V >= 6, got [2, 3, 5]"
NARROW_HEAD = "ref_weight must have at least the 6 rows of weight that are read, got 5"
REFERENCES_REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "token_kl": (lambda: token_kl(R, Z, vocab_size=6), NARROW),
    "token_logps_kl": (lambda: token_logps_kl(R, Y, Z, vocab_size=6), NARROW),
    "kl_loss": (lambda: kl_loss(R, Z, vocab_size=6), NARROW),
    "SPOLoss": (lambda: SPO(R, Y, kl_logits=R, kl_ref_logits=Z), NARROW),
    "linear_token_kl": (lambda: linear_token_kl(H, RW, H, W, vocab_size=6), NARROW_HEAD),
    "linear_kl_loss": (lambda: linear_kl_loss(H, RW, H, W, vocab_size=6), NARROW_HEAD),
    "LinearSPOLoss": (lambda: LINEAR_SPO(H, RW, Y, kl_hidden=H, kl_ref_hidden=H, kl_ref_weight=W), NARROW_HEAD),
    "other rows": (
        lambda: token_kl(R, R[:1], vocab_size=6),
        "ref_logits must be [2, 3, V] like logits, with V >= 6, got [1, 3, 7]",
    ),
    "no vocab_size": (
        lambda: token_kl(R, Z),
        "ref_logits must be [2, 3, 7] like logits, got [2, 3, 5]; give vocab_size where the vocabularies are padded "
        "differently",
    ),
    "no vocab_size of heads": (
        lambda: linear_token_kl(H, RW, H, W),
        "ref_weight must have V = 7 rows like weight, got 5; give vocab_size where the vocabularies are padded "
        "differently",
    ),
}


@pytest.mark.parametrize("what", REFERENCES_REFUSED)
def test_references_narrower_than_the_vocabulary_are_refused(what: str) -> None:
    call, message = REFERENCES_REFUSED[what]
    refuses(call, {}, ValueError, message)


@pytest.mark.parametrize("label", [4, 5])
@pytest.mark.parametrize(
    "call",
    [
        lambda y: token_logps(Z, y, vocab_size=4),
        lambda y: sequence_logps(Z, y, vocab_size=4),
        lambda y: token_logps_kl(Z, y, R, vocab_size=4),
        lambda y: SPOLoss(vocab_size=4)(Z, y),
        lambda y: linear_token_logps(H, W, y, vocab_size=4),
        lambda y: linear_sequence_logps(H, W, y, vocab_size=4),
        lambda y: LinearSPOLoss(vocab_size=4, route="recompute")(H, W, y),
        lambda y: LinearSPOLoss(vocab_size=4)(H, W.clone().requires_grad_(), y),
    ],
)
def test_labels_in_the_padding_are_errors(call: Callable[[Tensor], object], label: int) -> None:
    with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 4\) or ignore_index -100, got {label}\b"):
        call(torch.full((2, 3), label))


WIDE = 4096


def test_integers_of_1_are_no_options() -> None:
    rows = torch.zeros(3, V)
    assert checked_transform(LogitOptions(1, None, 1), rows, "logits", rows.dtype) is None
    assert checked_transform(LogitOptions(2, None, 1), rows, "logits", rows.dtype) is not None


def wide_operations(logits: Tensor, call: Callable[[], Tensor]) -> list[str]:
    """Operations of forward and backward that take or return logits, views aside."""
    with Calls(width=WIDE) as calls:
        torch.autograd.grad(call().sum(), logits)
    return calls.wide


class WideRows:
    def __init__(self, padding: int = 0) -> None:
        self.labels = torch.randint(0, WIDE, (4, 3))
        self.mask = torch.rand(4, 3) > 0.3
        self.row_weight = torch.rand(4, 3)
        self.bounds = torch.tensor([0, 2, 2, 12])
        self.logits = torch.randn(4, 3, WIDE + padding, requires_grad=True)
        self.ref_logits = torch.randn(4, 3, WIDE + padding)


WIDE_OPTIONS: dict[str, Options] = {
    "numbers": {"temperature": 0.7, "softcap": 4.0, "logit_scale": -0.5},
    "rows": {"temperature": torch.linspace(0.5, 2, 12).view(4, 3), "softcap": 4.0},
    "vocab_size": {"vocab_size": WIDE - 7},
}


@pytest.mark.parametrize("options", WIDE_OPTIONS)
@pytest.mark.parametrize("name", [*OF_KL, *OF_SEQUENCES, "token_logps"])
def test_options_make_no_operation_on_logits(name: str, options: str) -> None:
    x, function = WideRows(), {**OF_LOGPS, **OF_KL, **OF_SEQUENCES}[name]
    x.labels.clamp_(max=WIDE - 8)
    given = dict(WIDE_OPTIONS[options])
    if name in OF_KL and options != "vocab_size":
        given |= {"ref_temperature": 1.3, "ref_softcap": math.inf}
    plain = wide_operations(x.logits, lambda: function.ours(x, x.logits, x.ref_logits))
    ours = {"token_stats_fwd", "token_stats_bwd"} if name != "kl_loss" else {"kl_loss_fwd", "scale_"}
    assert ours <= set(plain)
    assert wide_operations(x.logits, lambda: function.ours(x, x.logits, x.ref_logits, **given)) == plain


@pytest.mark.parametrize("vocab_size", [None, WIDE - 7])
def test_entropy_and_lse_make_no_operation_on_logits(vocab_size: int | None) -> None:
    """The entropy needs one row of zeros, which the row op reads for every row."""
    x = WideRows()
    x.labels.clamp_(max=WIDE - 8)

    def call(**outputs: bool) -> Callable[[], Tensor]:
        return lambda: stacked(
            *token_logps(x.logits, x.labels, vocab_size=vocab_size, softcap=4.0, return_lse=True, **outputs)
        )

    plain = wide_operations(x.logits, lambda: token_logps(x.logits, x.labels))
    assert wide_operations(x.logits, call()) == plain
    assert wide_operations(x.logits, call(return_entropy=True)) == ["new_zeros", *plain]
    if ACTIVE != "reference":
        plain_peak, peak = (peak_bytes(call(return_entropy=entropy)) for entropy in (False, True))
        assert peak <= plain_peak + 4 * WIDE + 4096
    with Calls() as calls, torch.no_grad():
        call()()
    assert calls.largest < 100


@pytest.mark.skipif(ACTIVE == "reference", reason="plain torch makes temporaries of its own")
@INPLACE
@pytest.mark.parametrize("name", [*OF_KL, "sequence_logps", "z-loss", "token_logps"])
def test_options_take_no_memory(name: str, inplace: bool) -> None:
    """Logits are 192 KiB. Options take a few numbers a row."""
    x, function = WideRows(), {**OF_LOGPS, **OF_KL, **OF_SEQUENCES}[name]
    x.labels.clamp_(max=WIDE - 8)
    option = {function.inplace: True} if inplace else {}

    def peak(**options: Any) -> int:
        x.logits.grad = None
        return peak_bytes(lambda: function.ours(x, x.logits * 1, x.ref_logits, **options, **option).sum().backward())

    plain = peak()
    assert plain >= x.logits.nbytes
    for options in WIDE_OPTIONS.values():
        assert peak(**options) <= plain + 4096
