"""Cases with row options (`spo_kernels.reference.RowOptions`) and gradients of the log-sum-exp, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from typing import NamedTuple

import torch
from oracle import (
    DTYPES,
    HALF_DTYPES,
    MODES,
    Case,
    assert_rounded,
    assert_same,
    assert_same_bits,
    assert_within_budget,
    loss_rounding,
    make_case,
    poisoned_memory,
    rounding,
    run,
    truth,
)
from torch import Tensor

from spo_kernels import precision
from spo_kernels.backends import Backend
from spo_kernels.reference import RowOptions


def _one(*values: float) -> Tensor:
    """The factors of a transform that all rows share."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _each(n: int, low: float, high: float) -> Tensor:
    """A factor for each row."""
    return torch.linspace(low, high, n, dtype=torch.float64)[None]


# The transforms of policy and reference for n rows. The logits have a standard deviation of 3: a softcap of 5 changes
# most of them and leaves the largest almost without a slope.
TRANSFORMS: dict[str, Callable[[int], tuple[Tensor | None, Tensor | None]]] = {
    "none": lambda n: (None, None),
    "factor": lambda n: (_one(0.7), None),
    "negative factors": lambda n: (_one(-1.3), _one(-0.6)),
    "a factor each": lambda n: (_each(n, 0.25, 1.5), _each(n, 1.5, 0.25)),
    "softcap": lambda n: (_one(1 / 5, 5), None),
    "softcap of a factor each": lambda n: (torch.cat([_each(n, 0.2, 0.2), 5 * _each(n, 0.5, 2)]), _one(0.9)),
    "reference alone": lambda n: (None, torch.cat([_each(n, 0.1, 0.3), _each(n, 8, 4)])),
}


class Spec(NamedTuple):
    """A case by its parts."""

    transform: str
    n: int
    v: int
    dtype: torch.dtype
    ref_dtype: torch.dtype
    mode: str = "both"
    padding: tuple[int, int] | None = None  # columns after V in policy and reference; None for no vocab_size
    upstream: str = "all"  # which of dlogps, dkl and dlse: "all", "given" for the first two, "lse" for the third
    rows: str = "noise"
    mixture: float = 0.0

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((self.dtype, self.ref_dtype)))
        padding = "" if self.padding is None else f"-padding {self.padding[0]}, {self.padding[1]}"
        return f"{self.transform}-{self.n}x{self.v}-{dtypes}-{self.mode}{padding}-{self.upstream}-{self.rows}" + (
            f"-mixture {self.mixture:g}" if self.mixture else ""
        )


def _specs() -> list[Spec]:
    found = []
    for dtype in DTYPES:
        for transform in TRANSFORMS:
            found.append(Spec(transform, 24, 33, dtype, dtype))
            found.append(Spec(transform, 12, 1000, dtype, dtype, padding=(24, 7)))
        for transform in ("none", "softcap of a factor each"):
            for mode in MODES:
                for upstream in ("given", "lse"):
                    found.append(Spec(transform, 12, 31, dtype, dtype, mode, (0, 5), upstream))
            found.append(Spec(transform, 12, 1, dtype, dtype, padding=(31, 0)))
            for rows in ("late_maximum", "minus_inf", "offset"):
                found.append(Spec(transform, 12, 4097, dtype, dtype, padding=(1, 2), rows=rows))
            # Few long rows, of which a GPU may split each over several blocks.
            found.append(Spec(transform, 5, 50257, dtype, dtype, padding=(47, 0)))
        found.append(Spec("factor", 5, 50257, dtype, dtype, "logps"))
    for dtype, ref_dtype in permutations((torch.float32, *HALF_DTYPES), 2):
        for transform in ("none", "factor", "softcap of a factor each"):
            found.append(Spec(transform, 12, 1000, dtype, ref_dtype, padding=(3, 600)))
    return found


SPECS = _specs()

# The reverse KL, and JSDs of which one is far from the KL.
MIXTURES = (1.0, 0.5, 0.1)


def _mixture_specs() -> list[Spec]:
    found = []
    for dtype, mixture in product(DTYPES, MIXTURES):
        of_mixture = Spec("none", 12, 1000, dtype, dtype, mixture=mixture)
        found += [of_mixture, of_mixture._replace(mode="kl", v=1), of_mixture._replace(mode="kl", v=33)]
        found.append(of_mixture._replace(transform="softcap of a factor each", v=33, padding=(24, 7)))
        found.append(of_mixture._replace(v=50257, n=5, padding=(47, 0)))
        for rows in ("late_maximum", "minus_inf", "offset"):
            found.append(of_mixture._replace(v=4097, padding=(1, 2), rows=rows))
    for (dtype, ref_dtype), mixture in product(permutations((torch.float32, *HALF_DTYPES), 2), MIXTURES[:2]):
        found.append(Spec("none", 12, 1000, dtype, ref_dtype, padding=(3, 600), mixture=mixture))
    return found


MIXTURE_SPECS = _mixture_specs()


def _padded(logits: Tensor, columns: int) -> Tensor:
    """With columns of NaN at the end, which nothing may read."""
    return torch.nn.functional.pad(logits, (0, columns), value=torch.nan)


def make(spec: Spec) -> Case:
    """The case of a spec.

    Row 0 has a gradient of its log-sum-exp alone. Row 1 has no gradient at all, and NaN as its logits. In mode "both",
    nothing is wanted in row 11 and every twelfth after it, and the logits are NaN there.
    """
    n, dtype = spec.n, spec.dtype
    case = make_case(n, spec.v, dtype, rows=spec.rows, ref_dtype=spec.ref_dtype, mode="both")
    wide = precision.accumulate_dtype(dtype)
    # Noise is scaled by 3 under a transform. Without one, the KL of noise so scaled, 8 to 11 nats, exceeds the budget
    # on a CPU by up to a sixth: see docs/lab.md.
    scale = 3 if spec.rows == "noise" and spec.transform != "none" else 1
    # A softcap makes -inf finite. Beside it, -inf in the reference would make every KL infinite.
    logits, ref_logits = case.logits * scale, case.ref_logits.nan_to_num(neginf=-50) * scale
    dlse = torch.linspace(-1.5, 0.8, n, dtype=wide)
    if spec.mode != "both":
        case.labels[11::12], case.mask[11::12] = 0, True
    for upstream in (case.dlogps, case.dkl):
        upstream[:2] = 0
    dlse[1] = 0
    if spec.mode == "both":
        dlse[11::12] = 0
        logits[11::12] = torch.nan
    logits[1] = torch.nan
    if spec.mode == "logps":  # without a statistic of these rows, their log-sum-exp has no gradient
        dlse[3::4] = 0
    if spec.mode == "kl":
        dlse[2::3] = 0
    policy, reference = TRANSFORMS[spec.transform](n)
    transforms = [None if x is None else x.to(wide) for x in (policy, reference)]
    padding = spec.padding or (0, 0)
    options = RowOptions(None if spec.padding is None else spec.v, *transforms, spec.mixture)
    made = replace(
        case,
        logits=_padded(logits, padding[0]),
        ref_logits=_padded(ref_logits, padding[1]),
        dlse=None if spec.upstream == "given" else dlse,
        dlogps=None if spec.upstream == "lse" else case.dlogps,
        dkl=None if spec.upstream == "lse" else case.dkl,
        options=options,
    )
    return made.only(spec.mode)


def _part_of_a_buffer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer full of sevens, and a part of it with the logits ``[B, T, V]``, in misaligned, unevenly spaced rows."""
    batch, steps, width = logits.shape
    buffer = torch.full((batch, steps + 1, width + 6), 7, dtype=logits.dtype)
    part = buffer[:, :-1, 1:-5]
    part.copy_(logits)
    return buffer, part


def check(backend: Backend, spec: Spec) -> None:
    """Out of place and in place, of ``[N, V]`` and of a part of a buffer, and with rows that are split."""
    case = make(spec)
    true, rounded = truth(case), rounding(case)
    own = case.logits.clone()
    result = run(backend, case)
    assert_same(case.logits, own, "logits")
    assert_within_budget(result, true, rounded)
    assert not result.dlogits[:, spec.v :].any(), "the gradient of columns after vocab_size"
    assert not result.dlogits[1].any(), "the gradient of a row that is not read"
    inplace = run(backend, replace(case, logits=own), inplace=True)
    assert inplace.dlogits.data_ptr() == own.data_ptr()
    assert_same_bits(inplace, result)

    in_batches = case.map(lambda x: x.unflatten(0, (-1, 4 if spec.n % 4 == 0 else 1)))
    buffer, part = _part_of_a_buffer(in_batches.logits)
    ref_part = None if in_batches.ref_logits is None else _part_of_a_buffer(in_batches.ref_logits)[1]
    of_part = run(backend, replace(in_batches, logits=part, ref_logits=ref_part), inplace=True)
    assert_within_budget(of_part.map(lambda x: x.flatten(0, 1)), true, rounded)
    part.fill_(7)
    assert (buffer == 7).all(), "what surrounds the rows"
    if spec.v > 10_000:
        assert_within_budget(run(backend, case, deterministic=False), true, rounded)


KL_LOSS_SPECS = [
    Spec(transform, n, v, dtype, ref_dtype, "kl", padding)
    for transform in ("none", "factor", "softcap of a factor each", "reference alone")
    for n, v, padding in ((12, 33, None), (12, 1000, (24, 8)), (5, 50256, (48, 0)))
    for dtype, ref_dtype in (*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32))
]
KL_LOSS_SPECS += [
    Spec(transform, 12, 1000, dtype, dtype, "kl", padding, mixture=mixture)
    for (transform, padding), dtype, mixture in product(
        (("none", None), ("softcap of a factor each", (24, 8))), DTYPES, MIXTURES
    )
]


def check_kl_loss(backend: Backend, spec: Spec) -> None:
    """The loss and its gradient, out of place and in place, where rows may be split and where they may not."""
    case = make(spec)
    weight = case.dkl * case.mask  # 0 in rows 0 and 1, of which row 1 is NaN, and in every third row
    case = replace(case, mask=weight != 0, dkl=weight, dlse=None)
    true, rounded = truth(case), rounding(case)

    def compare(loss: Tensor, dlogits: Tensor) -> None:
        assert_rounded(loss, (weight * true.kl).sum(), loss_rounding(rounded, true, weight), "loss")
        assert_rounded(dlogits, true.dlogits, None if rounded is None else rounded.dlogits, "dlogits")
        assert not dlogits[:, spec.v :].any(), "the gradient of columns after vocab_size"

    own = case.logits.clone()
    with poisoned_memory():
        loss, dlogits = backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False, case.options)
        assert_same(case.logits, own, "logits")
        compare(loss, dlogits)
        inplace_loss, inplace = backend.kl_loss_fwd(own, case.ref_logits, weight, True, case.options)
    assert inplace.data_ptr() == own.data_ptr()
    assert_same(inplace, dlogits, "dlogits in place")
    assert_same(inplace_loss, loss, "loss in place")
    compare(*backend.kl_loss_fwd(case.logits, case.ref_logits, weight, False, case.options))
