"""What the numerical tests share: the float64 truth, the error budget, and the rows that bite.

The budget (one for every backend, dtype and machine): outputs and float32 gradients may be off from the float64 result
of the same rounded inputs by twice the largest error that eager PyTorch on ``logits.float()`` makes on them, plus two
ulp; half-precision gradients by half an ulp of their own dtype more, which is their final rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels import backends, reference
from spo_kernels.backends import Backend, cpu

ACTIVE = backends.active("cpu")
LEVELS: list[str] = cpu.load().simd_levels() if ACTIVE == "cpu" else []

IGNORE = -100
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)
MODES = ("logps", "kl", "both")

# float64 has no wider truth to be measured against: the two float64 computations must agree to this many ulp of the
# largest value involved, a sum of V terms in another order included.
FLOAT64_ULPS = 256
# What float64 itself leaves undecided: log(1 + 1e-30) is 0 there too.
TRUTH_ERROR = 16 * torch.finfo(torch.float64).eps


class Result(NamedTuple):
    """Per-row outputs and the gradient; logps or kl is None where it was not asked for."""

    logps: Any
    kl: Any
    dlogits: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Result:
        """The same with a function applied to every tensor."""
        return Result(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """Inputs of the row ops: logits ``[N, V]``, the rest per row; Tensors, or None where a mode lacks them."""

    logits: Tensor
    labels: Any
    ref_logits: Any
    mask: Any
    dlogps: Any
    dkl: Any

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """The same with a function applied to every tensor."""
        return Case(*(None if x is None else function(x) for x in vars(self).values()))  # type: ignore[arg-type]

    def only(self, mode: str) -> Case:
        """The same rows for one of `MODES`."""
        if mode == "logps":
            return Case(self.logits, self.labels, None, None, self.dlogps, None)
        if mode == "kl":
            return Case(self.logits, None, self.ref_logits, self.mask, None, self.dkl)
        return self

    def to(self, dtype: torch.dtype) -> Case:
        """The same (already rounded) numbers in a wider dtype."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def run(backend: Backend, case: Case, *, inplace: bool = False, deterministic: bool = True) -> Result:
    """Forward and backward of a case through the functions of a backend.

    Deterministic: every fresh output is poisoned with NaN. Otherwise a GPU may split a row over several blocks.
    """
    with poisoned_memory() if deterministic else nullcontext():
        logps, kl, stats = backend.token_stats_fwd(case.logits, case.labels, case.ref_logits, case.mask, IGNORE)
        dlogits = backend.token_stats_bwd(
            case.dlogps, case.dkl, case.logits, case.labels, case.ref_logits, case.mask, kl, stats, IGNORE, inplace
        )
    return Result(logps if case.labels is not None else None, kl if case.ref_logits is not None else None, dlogits)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within this block ``torch.empty`` returns NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def truth(case: Case) -> Result:
    """The oracle in float64 on the same rounded inputs."""
    return run(reference, case.to(torch.float64))


def eager(case: Case) -> Result | None:
    """The yardstick: what an expert would write in PyTorch, on ``logits.float()``, with autograd; None for float64."""
    if case.logits.dtype == torch.float64:
        return None
    wide = case.to(torch.float32)
    logits = wide.logits.clone().requires_grad_()
    log_p = torch.log_softmax(logits, -1)
    logps = kl = None
    objective = logits.sum() * 0
    if wide.labels is not None and wide.dlogps is not None:
        valid = wide.labels != IGNORE
        logps = log_p.gather(-1, wide.labels.where(valid, 0)[..., None])[..., 0]
        logps = logps.where(valid, 0)
        objective = objective + (logps * wide.dlogps).sum()
    if wide.ref_logits is not None and wide.dkl is not None:
        log_q = torch.log_softmax(wide.ref_logits, -1)
        p = log_p.exp()
        kl = (p * (log_p - log_q).where(p > 0, 0)).sum(-1)
        kl = kl if wide.mask is None else kl.where(wide.mask, 0)
        objective = objective + (kl * wide.dkl).sum()
    (dlogits,) = torch.autograd.grad(objective, logits)
    return Result(logps, kl, dlogits).map(Tensor.detach)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of a dtype at ``|x|``, float64; the smallest normal number's below it."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().double().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


def assert_within_budget(actual: Result, true: Result, yardstick: Result | None = None) -> None:
    """Every field of ``actual`` against float64; ``yardstick`` None means the computation was float64 itself."""
    for name in Result._fields:
        got, want = getattr(actual, name), getattr(true, name)
        if want is None:
            assert got is None, f"{name} was not asked for"
            continue
        eager_value = None if yardstick is None else getattr(yardstick, name)
        assert_close(got, want, eager_value, name)


def assert_close(actual: Tensor, true: Tensor, yardstick: Tensor | None, name: str = "value") -> None:
    """``actual`` within the budget of ``true``; where the truth is not finite it must be the same NaN or infinity."""
    assert actual.shape == true.shape, f"{name}: {list(actual.shape)} is not {list(true.shape)}"
    got, finite = actual.double(), true.isfinite()
    odd = ~(got == true) & ~(got.isnan() & true.isnan()) & ~finite
    assert not odd.any(), f"{name}: {got[odd][:4].tolist()} where the truth is {true[odd][:4].tolist()}"
    if yardstick is None:
        scale = true[finite].abs().max().clamp(min=1) if finite.any() else torch.ones((), dtype=torch.float64)
        budget = FLOAT64_ULPS * ulp(scale, torch.float64).expand_as(true)
    else:
        both = finite & yardstick.isfinite()
        eager_error = (yardstick.double() - true)[both].abs().max() if both.any() else true.new_zeros(())
        budget = 2 * eager_error + 2 * ulp(true, torch.float32) + TRUTH_ERROR
        if actual.dtype in HALF_DTYPES:
            budget = budget + 0.5 * ulp(true, actual.dtype)
    error = (got - true).abs()
    over = finite & ~(error <= budget)  # written so that NaN is over
    if over.any():
        worst = torch.where(over, error / budget, 0).nan_to_num(torch.inf).argmax()
        at = [int(i) for i in torch.unravel_index(worst, true.shape)]
        raise AssertionError(
            f"{name}: {int(over.sum())} of {true.numel()} over budget, worst at {at}: got {got.flatten()[worst]:.9g}, "
            f"truth {true.flatten()[worst]:.9g}, error {error.flatten()[worst]:.3g}, "
            f"budget {budget.flatten()[worst]:.3g}"
        )


def assert_labels_may_lie_elsewhere(backend: Backend, case: Case) -> None:
    """Rows whose label is in another part of the vocabulary: those of one more column, where no probability is."""
    v = case.logits.shape[-1]
    elsewhere = (torch.arange(case.logits.shape[0]) % 2 == 0) & (case.labels != IGNORE)
    assert elsewhere.any() and not elsewhere.all()
    narrow = replace(case, labels=case.labels.where(~elsewhere, reference.LABEL_ELSEWHERE))
    column = torch.full_like(case.logits[:, :1], -torch.inf)
    wide = replace(case, logits=torch.cat([case.logits, column], -1), labels=case.labels.where(~elsewhere, v))
    if case.ref_logits is not None:
        # Not -inf, of which the yardstick's autograd would make NaN.
        ref_column = torch.full_like(case.ref_logits[:, :1], torch.finfo(case.ref_logits.dtype).min)
        wide = replace(wide, ref_logits=torch.cat([case.ref_logits, ref_column], -1))
    true, yardstick = truth(wide), eager(wide)
    assert (true.logps[elsewhere] == -torch.inf).all()
    result = run(backend, narrow)
    assert_within_budget(
        result,
        true._replace(dlogits=true.dlogits[:, :v]),
        None if yardstick is None else yardstick._replace(dlogits=yardstick.dlogits[:, :v]),
    )
    assert_same_bits(run(backend, replace(narrow, logits=case.logits.clone()), inplace=True), result)


def assert_same_bits(actual: Result, expected: Result) -> None:
    """Equal to the last bit, NaN included."""
    for name in Result._fields:
        got, want = getattr(actual, name), getattr(expected, name)
        if want is None:
            assert got is None, f"{name} was not asked for"
        else:
            assert_same(got, want, name)


def assert_same(actual: Tensor, expected: Tensor, name: str = "value") -> None:
    """Two tensors with equal elements, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


# Rows by what they do to a kernel that keeps a running maximum and works in blocks. Each takes noise [N, V] and
# returns logits.
def _offset(x: Tensor) -> Tensor:
    return x + 1e4


def _peaked(x: Tensor) -> Tensor:
    x[..., x.shape[-1] // 2] += 80
    return x


def _late_maximum(x: Tensor) -> Tensor:
    """The maximum outside the first 512 elements, where a kernel may start from theirs, and high enough to overflow."""
    x[..., -1] = 120
    x[..., : x.shape[-1] // 2] -= 30
    return x


def _ramp(x: Tensor) -> Tensor:
    """Each block of 256 raises the maximum by 50: sums taken against an old maximum overflow after two of them."""
    return x + 50 * torch.arange(x.shape[-1]).div(256, rounding_mode="floor")


def _falling(x: Tensor) -> Tensor:
    """The mirror image: everything after the first blocks underflows."""
    return x - 50 * torch.arange(x.shape[-1]).div(256, rounding_mode="floor")


def _slope(x: Tensor) -> Tensor:
    """A new maximum at every element."""
    return x / 8 + torch.arange(x.shape[-1])


def _holes(value: float) -> Callable[[Tensor], Tensor]:
    """Two thirds of the vocabulary masked out with this value, the rest as it was."""

    def fill(x: Tensor) -> Tensor:
        x[..., 1::3] = value
        x[..., 2::3] = value
        return x

    return fill


def _all_very_negative(x: Tensor) -> Tensor:
    return torch.full_like(x, -1e30)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x,
    "offset": _offset,
    "peaked": _peaked,
    "late_maximum": _late_maximum,
    "ramp": _ramp,
    "falling": _falling,
    "slope": _slope,
    "minus_1e9": _holes(-1e9),
    "minus_1e30": _holes(-1e30),
    "minus_inf": _holes(-torch.inf),
    "all_very_negative": _all_very_negative,
    "denormal": lambda x: x * 40,
}


def make_case(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "noise",
    ref_dtype: torch.dtype | None = None,
    mode: str = "both",
    seed: int = 0,
) -> Case:
    """A case with every fourth row ignored, every third masked, and upstream gradients that are neither 1 nor equal."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(n, v, generator=generator, dtype=torch.float64)

    # Finite numbers below a half-precision type's range stay finite: -inf is another case.
    def fit(x: Tensor, to: torch.dtype) -> Tensor:
        return torch.where(x.isinf(), x, x.clamp(min=torch.finfo(to).min)).to(to)

    logits = fit(ROWS[rows](noise()), dtype)
    ref_logits = fit(ROWS[rows](noise()), ref_dtype or dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[3::4] = IGNORE
    mask = torch.ones(n, dtype=torch.bool)
    mask[2::3] = False
    wide = reference.accumulate_dtype(dtype)
    dlogps, dkl = (0.5 + 1.5 * torch.rand(2, n, generator=generator)).mul(torch.tensor([[1.0], [-1.0]])).to(wide)
    return Case(logits, labels, ref_logits, mask, dlogps, dkl).only(mode)
