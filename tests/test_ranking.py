"""Rankings and the best of n, against formulas with mpmath, against `spo_loss`, and against Plackett-Luce data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from spo_kernels import (
    PowerImportance,
    SoftImportance,
    linear_sequence_logps,
    sequence_logps,
    spo_loss,
    spo_ranking_loss,
)

SIZES = [4, 1, 2, 0, 3, 7, 2]
BOUNDS = [0, *itertools.accumulate(SIZES)]
CU = torch.tensor(BOUNDS)
KINDS = ("ranking", "best_of_n")
ALPHAS = [0.0, 1e-40, 1e-6, 0.1, 1.0, 30.0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logps(dtype: torch.dtype = torch.float64, n: int = BOUNDS[-1], spread: float = 5.0) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (-100 + spread * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


def exact_stage(values: list[float], alpha: float, center: bool) -> mpmath.mpf:
    """From probabilities, with 100 digits; at alpha = 0 the limit."""
    with mpmath.workdps(100):
        numbers = [mpmath.mpf(value) for value in values]
        if alpha == 0:
            return mpmath.fsum(numbers) / len(numbers) - numbers[0]
        powers = [mpmath.exp(mpmath.mpf(alpha) * number) for number in numbers]
        loss = -mpmath.log(powers[0] / mpmath.fsum(powers)) / mpmath.mpf(alpha)
        return loss - mpmath.log(len(numbers)) / mpmath.mpf(alpha) if center else loss


def exact(values: list[float], kind: str, alpha: float, center: bool) -> mpmath.mpf:
    stages = 1 if kind == "best_of_n" else len(values)
    return mpmath.fsum(exact_stage(values[i:], alpha, center) for i in range(min(stages, len(values))))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(kind: str, alpha: float, center: bool, dtype: torch.dtype) -> None:
    values = logps(dtype)
    losses = spo_ranking_loss(values, CU, kind=kind, alpha=alpha, center=center)
    assert losses.dtype == dtype
    eps = torch.finfo(dtype).eps
    for (start, end), loss in zip(itertools.pairwise(BOUNDS), losses.tolist(), strict=True):
        group = values[start:end].tolist()
        truth = exact(group, kind, alpha, center)
        if abs(truth) > torch.finfo(dtype).max:
            assert loss == math.inf
        else:
            spread = sum(abs(x - group[0]) for x in group)
            assert abs(loss - truth) <= 8 * eps * (abs(truth) + len(group) * spread), (group, loss, float(truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [None, "tensor", SoftImportance(0.3), PowerImportance(0.02), "callable"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_spo_loss_bit_for_bit(kind: str, alpha: float, center: bool, weight: Any, dtype: torch.dtype) -> None:
    pairs = 37
    both = logps(dtype, 2 * pairs, spread=20.0)
    if weight == "tensor":
        weight = torch.linspace(0, 2, pairs)
    elif weight == "callable":
        weight = lambda chosen, rejected: (0.01 * torch.logaddexp(chosen, rejected)).exp()  # noqa: E731
    cu_groups = 2 * torch.arange(pairs + 1)
    losses = spo_ranking_loss(both, cu_groups, kind=kind, alpha=alpha, center=center, weight=weight)
    chosen, rejected = (both.detach()[i::2].clone().requires_grad_() for i in (0, 1))
    expected = spo_loss(chosen, rejected, alpha=alpha, center=center, weight=weight)[0]
    assert torch.equal(losses, expected)
    upstream = torch.linspace(-1, 2, pairs, dtype=dtype)
    (gradient,) = torch.autograd.grad(losses, both, upstream)
    of_pairs = torch.autograd.grad(expected, (chosen, rejected), upstream)
    assert torch.equal(gradient, torch.stack(of_pairs, 1).flatten())
    for reduction in ("mean", "sum"):
        got = spo_ranking_loss(both, cu_groups, kind=kind, alpha=alpha, center=center, reduction=reduction)
        assert torch.equal(got, spo_loss(chosen, rejected, alpha=alpha, center=center, reduction=reduction)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_gradient_is_the_softmax_of_what_is_left(kind: str, alpha: float) -> None:
    values, mu = logps(), torch.linspace(0.5, 2, len(SIZES), dtype=torch.float64)
    upstream = torch.linspace(-1, 2, len(SIZES), dtype=torch.float64)
    losses = spo_ranking_loss(values, CU, kind=kind, alpha=alpha, weight=mu)
    (gradient,) = torch.autograd.grad(losses, values, upstream)
    expected = torch.zeros_like(values)
    for g, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        for i in range(start, end if kind == "ranking" else min(start + 1, end)):
            left = values.detach()[i:end]
            expected[i:end] += mu[g] * upstream[g] * (alpha * left).softmax(0)
            expected[i] -= mu[g] * upstream[g]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, alpha: float, center: bool) -> None:
    def losses(values: Tensor) -> Tensor:
        return spo_ranking_loss(values, CU, kind=kind, alpha=alpha, center=center)

    assert torch.autograd.gradcheck(losses, logps(spread=2.0))
    assert torch.autograd.gradgradcheck(losses, logps(spread=2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_center_leaves_out_the_constant_and_is_continuous_at_0(kind: str) -> None:
    values = logps()
    constants = torch.tensor([math.lgamma(n + 1) if kind == "ranking" else math.log(max(n, 1)) for n in SIZES])
    plain, centred = (spo_ranking_loss(values, CU, kind=kind, alpha=0.3, center=c) for c in (False, True))
    torch.testing.assert_close(plain - constants.double() / 0.3, centred, rtol=1e-6, atol=1e-6)
    limit = spo_ranking_loss(values, CU, kind=kind, alpha=0.0)
    assert torch.equal(limit, spo_ranking_loss(values, CU, kind=kind, alpha=0.0, center=True))
    for power in range(4, 40, 3):
        near = spo_ranking_loss(values, CU, kind=kind, alpha=10.0**-power, center=True)
        assert (near - limit).abs().max() < 1e3 * 10.0**-power + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [None, SoftImportance(0.1)])
def test_ids_are_bounds(kind: str, weight: Any) -> None:
    """The responses of a group may stand anywhere, if the better stand before the worse."""
    values = logps()
    expected = spo_ranking_loss(values, CU, kind=kind, weight=weight)
    ids = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    order = torch.argsort((torch.arange(len(ids)) - CU[ids]) + 0.01 * ids, stable=True)  # all the best ones first
    mixed = values.detach()[order].requires_grad_()
    given: dict[str, Any] = {"group_ids": ids[order].int(), "kind": kind, "weight": weight}
    losses = spo_ranking_loss(mixed, **given, num_groups=len(SIZES), max_group_size=max(SIZES))
    assert torch.equal(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), mixed)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), values)[0][order])
    unknown = spo_ranking_loss(mixed, **given)
    assert torch.equal(unknown[: len(SIZES)], expected)
    assert not unknown[len(SIZES) :].any()
    mean = spo_ranking_loss(mixed, **given, reduction="mean")
    torch.testing.assert_close(mean, expected.sum() / sum(size > 0 for size in SIZES))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_of_the_unordered_group_and_never_differentiated(kind: str) -> None:
    values = logps()
    seen: list[Tensor] = []
    importance = SoftImportance(0.2)

    def weight(first: Tensor, others: Tensor) -> Tensor:
        seen.append(torch.logaddexp(first, others))
        return importance(first, others)

    losses = spo_ranking_loss(values, CU, kind=kind, weight=weight)
    groups = [values.detach()[start:end] for start, end in itertools.pairwise(BOUNDS) if end - start > 1]
    totals = torch.stack([group.logsumexp(0) for group in groups])
    torch.testing.assert_close(seen[0], totals, rtol=1e-14, atol=0)
    mu = torch.zeros(len(SIZES), dtype=torch.float64)
    mu[torch.tensor(SIZES) > 1] = torch.sigmoid(0.2 * totals - (0.2 * totals).mean())
    by_tensor = spo_ranking_loss(values, CU, kind=kind, weight=mu)
    torch.testing.assert_close(losses, by_tensor, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_tensor, mu * spo_ranking_loss(values, CU, kind=kind), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x.sum(), values)[0] for x in (losses, by_tensor)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)
    parameter = torch.ones(len(SIZES), dtype=torch.float64, requires_grad=True)
    spo_ranking_loss(values, CU, kind=kind, weight=parameter).sum().backward()
    assert parameter.grad is None


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_weight_0_and_of_one_are_not_read(kind: str, poison: float) -> None:
    clean, mu = logps(), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    expected = spo_ranking_loss(clean, CU, kind=kind, weight=mu)
    unread = torch.cat([torch.full((n,), bool(m == 0 or n == 1)) for n, m in zip(SIZES, mu, strict=True)])
    values = torch.where(unread, poison, clean.detach()).requires_grad_()
    losses = spo_ranking_loss(values, CU, kind=kind, weight=mu)
    assert torch.equal(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), clean)[0])


@pytest.mark.parametrize("center", [False, True])
def test_impossible_responses(center: bool) -> None:
    inf = math.inf
    values = torch.tensor([-inf, -3.0, -4.0, -3.0, -4.0, -inf, -3.0, -inf, -inf], requires_grad=True)
    cu_groups = torch.tensor([0, 3, 6, 9])
    best = spo_ranking_loss(values, cu_groups, kind="best_of_n", alpha=0.5, center=center)
    constant = math.log(3) / 0.5 if center else 0.0
    pair = math.log1p(math.exp(-0.5)) / 0.5
    assert best.tolist() == pytest.approx([inf, pair - constant, -constant], rel=1e-6, abs=1e-6)
    best.sum().backward()
    p = 1 / (1 + math.exp(0.5))
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-1, 0.5, 0.5, -p, p, 0, 0, 0, 0], rel=1e-6, abs=1e-7)
    ranking = spo_ranking_loss(values, cu_groups, alpha=0.5, center=center)
    assert ranking[0] == inf
    assert ranking[1].isfinite()
    assert ranking[2].isnan()  # no order among two impossible responses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_taken_to_float32(kind: str, dtype: torch.dtype) -> None:
    values = logps(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = spo_ranking_loss(values, CU, kind=kind)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, spo_ranking_loss(values.float(), CU, kind=kind))
    losses.sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == dtype


@pytest.mark.parametrize("weight", [None, SoftImportance(0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind: str, weight: Any) -> None:
    torch.compiler.reset()

    def loss(values: Tensor, cu_groups: Tensor) -> Tensor:
        return spo_ranking_loss(values, cu_groups, kind=kind, weight=weight, reduction="mean")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for sizes in (SIZES, [3, 3, 1], [2, 5, 4, 1, 1]):
        values, cu_groups = logps(n=sum(sizes)), torch.tensor([0, *itertools.accumulate(sizes)])
        results = [of(values, cu_groups) for of in (loss, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result, values)[0] for result in results))


def test_from_logits_and_from_hidden_states() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(BOUNDS[-1], 6, 4, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(31, 4, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 31, hidden.shape[:2], generator=g)
    of_logits = sequence_logps(hidden @ weight.T, labels)
    of_hidden = linear_sequence_logps(hidden, weight, labels)
    losses = [spo_ranking_loss(values, CU, reduction="mean") for values in (of_logits, of_hidden)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses))


# ---- the theorem, for rankings


def plackett_luce(rewards: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """All rankings [K, n] of all sets of n responses, and their probabilities [K]; a set's mass is uneven."""
    rankings, masses = [], []
    for index, group in enumerate(itertools.combinations(range(len(rewards)), n)):
        for ranking in itertools.permutations(group):
            mass = 1.0 + index % 3
            for i in range(n):
                left = rewards[list(ranking[i:])].exp()
                mass *= (left[0] / left.sum()).item()
            rankings.append(ranking)
            masses.append(mass)
    probabilities = torch.tensor(masses, dtype=torch.float64)
    return torch.tensor(rankings), probabilities / probabilities.sum()


def gradient_by_logits(
    logits: Tensor, rankings: Tensor, masses: Tensor, alpha: float, kind: str, importance: Any = None
) -> Tensor:
    logits = logits.detach().requires_grad_()
    groups, n = rankings.shape
    mu = masses if importance is None else lambda first, others: masses * importance(first, others)
    losses = spo_ranking_loss(
        logits.log_softmax(0)[rankings].flatten(),
        n * torch.arange(groups + 1),
        kind=kind,
        alpha=alpha,
        weight=mu,
        max_group_size=n,
    )
    return torch.autograd.grad(losses.sum(), logits)[0]


REWARDS = torch.tensor([0.3, -1.2, 1.1, 0.4, -0.5], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_the_minimizer_is_softmax_of_scaled_rewards(alpha: float, kind: str) -> None:
    """The loss is convex in the logits. A stage's curvature is at most alpha / 2, and a ranking of 3 has two stages."""
    rankings, masses = plackett_luce(REWARDS, 3)
    logits = -REWARDS.clone()
    for _ in range(200):
        logits -= 1.9 / alpha * gradient_by_logits(logits, rankings, masses, alpha, kind)
    target = (REWARDS / alpha).softmax(0)
    assert 0.5 * (logits.softmax(0) - target).abs().sum() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_the_minimizer_is_at_rest_with_soft_weights_too(alpha: float, kind: str) -> None:
    rankings, masses = plackett_luce(REWARDS, 3)
    importance = SoftImportance(0.5)
    at_rest = gradient_by_logits(REWARDS / alpha, rankings, masses, alpha, kind, importance)
    assert at_rest.abs().max() < 1e-14
    elsewhere = gradient_by_logits(-REWARDS, rankings, masses, alpha, kind, importance)
    assert elsewhere.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy_logps": [0.0]}, TypeError, r"policy_logps must be a floating-point Tensor \[N\], got list"),
        ({"policy_logps": torch.zeros(2, 2)}, ValueError, r"policy_logps must be \[N\], got \[2, 2\]"),
        ({"cu_groups": None}, ValueError, "exactly one of cu_groups and group_ids must be given, got neither"),
        ({"group_ids": torch.zeros(4).long()}, ValueError, "exactly one of .* got both"),
        ({"cu_groups": torch.zeros(3)}, ValueError, r"cu_groups must be \[B \+ 1\] int32 or int64, got \[3\] float32"),
        ({"cu_groups": torch.tensor([0, 3])}, RuntimeError, "cu_groups must rise from 0 to the number of responses"),
        ({"cu_groups": torch.tensor([0, 3, 2, 4])}, RuntimeError, "cu_groups must rise from 0"),
        ({"cu_groups": torch.zeros(3, device="meta").long()}, ValueError, "cu_groups must be on cpu like policy_logps"),
        ({"num_groups": 1}, ValueError, "num_groups must be None with cu_groups"),
        ({"max_group_size": 2}, RuntimeError, "max_group_size must be at least the size of the largest group"),
        ({"max_group_size": 2.5}, ValueError, "max_group_size must be an integer >= 0 or None, got 2.5"),
        ({"kind": "best"}, ValueError, "kind must be one of ranking, best_of_n, got 'best'"),
        ({"alpha": -1}, ValueError, "alpha must be >= 0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \[G\] with G = 1, got \[4\]"),
        ({"weight": 2.0}, TypeError, "weight must be a Tensor .*, got float"),
        ({"cu_groups": None, "group_ids": [0, 0, 0, 0]}, TypeError, r"group_ids must be an integer Tensor \[N\]"),
        ({"cu_groups": None, "group_ids": torch.zeros(4)}, ValueError, r"group_ids must be \[N\] int32 or int64"),
        ({"cu_groups": None, "group_ids": torch.zeros(3).long()}, ValueError, r"got \[3\] int64 against \[4\]"),
        ({"cu_groups": None, "group_ids": torch.full((4,), -1)}, RuntimeError, "group_ids must be >= 0 and below"),
        (
            {"cu_groups": None, "group_ids": torch.arange(4), "num_groups": 3},
            RuntimeError,
            "group_ids must be >= 0 and below num_groups",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"policy_logps": torch.zeros(4), "cu_groups": torch.tensor([0, 4])}
    spo_ranking_loss(**arguments)
    with pytest.raises(error, match=message):
        spo_ranking_loss(**{**arguments, **change})
