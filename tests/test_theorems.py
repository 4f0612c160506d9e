"""The paper's theorems, run: `spo_loss` on a tabular policy in float64, expectations over D as sums over ordered pairs.

A problem has X contexts with n responses each, Bradley-Terry rewards r [X, n], and a distribution D over the n (n - 1)
ordered pairs of each context. Unless said otherwise the mass of a pair {y, y'} is uneven (the theorems allow any), and
only how it splits between (y, y') and (y', y) follows the rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spo_kernels.losses import SoftImportance, spo_loss

Weight = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A step on a few hundred numbers takes 0.4 ms, but 20 ms with threads that wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Problem(NamedTuple):
    rewards: Tensor  # [X, n]
    winner: Tensor  # [n (n - 1)] response of each ordered pair
    loser: Tensor
    mass: Tensor  # [X, n (n - 1)] D, sums to 1 over each context


def make_problem(rewards: Tensor, pair_mass: Tensor) -> Problem:
    """D consistent with Bradley-Terry, from symmetric `pair_mass` [X, n, n] (any scale)."""
    n = rewards.shape[1]
    winner, loser = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    mass = (pair_mass / (1 + torch.exp(rewards[:, None, :] - rewards[:, :, None])))[:, winner, loser]
    return Problem(rewards, winner, loser, mass / mass.sum(1, keepdim=True))


def random_problem(seed: int = 0, contexts: int = 4, n: int = 7) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(contexts, n, dtype=torch.float64, generator=generator)
    mass = torch.rand(contexts, n, n, dtype=torch.float64, generator=generator) ** 2 + 0.01
    return make_problem(rewards, mass + mass.mT)


def expected_loss(problem: Problem, logp: Tensor, alpha: float, mu: Weight | None = None) -> Tensor:
    """E_D of eq. 8 to 11, summed over contexts, all of it through `spo_loss`; logp [X, n]."""
    mass = problem.mass.flatten()
    losses, _, _ = spo_loss(
        logp[:, problem.winner].flatten(),
        logp[:, problem.loser].flatten(),
        alpha=alpha,
        weight=mass if mu is None else lambda logp_w, logp_l: mass * mu(logp_w, logp_l),
    )
    return losses.sum()


def gradient(
    problem: Problem, point: Tensor, alpha: float, mu: Weight | None = None, *, simplex: bool = False
) -> Tensor:
    """Gradient by the logits theta of the softmax policy at `point`; with `simplex` by pi itself (Appendix A)."""
    point = point.detach().requires_grad_()
    logp = point.log() if simplex else point.log_softmax(1)
    return torch.autograd.grad(expected_loss(problem, logp, alpha, mu), point)[0]


def descend(problem: Problem, alpha: float, mu: Weight | None, learning_rate: float, steps: int) -> Tensor:
    """The softmax policy [X, n] after gradient descent from logits that favour the worst responses."""
    logits = -problem.rewards.clone()
    for _ in range(steps):
        logits -= learning_rate * gradient(problem, logits, alpha, mu)
    return logits.softmax(1)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum(1).max().item()


UNIFORM_MU = pytest.param(None, id="uniform")
SOFT_MU = pytest.param(SoftImportance(0.5), id="soft_importance")


@pytest.mark.parametrize("mu", [UNIFORM_MU, SOFT_MU])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
def test_descent_reaches_softmax_of_scaled_rewards(alpha: float, mu: Weight | None) -> None:
    """Theorems 1 and 2: softmax(r / alpha), whatever the masses of D and mu.

    For fixed mu the loss is convex in theta. Under even masses its curvature is at most alpha / (2 (n - 1)). The step
    is small enough for a curvature three times as large under uneven masses.
    """
    problem = random_problem()
    policy = descend(problem, alpha, mu, learning_rate=problem.rewards.shape[1] / alpha, steps=300)
    assert total_variation(policy, torch.softmax(problem.rewards / alpha, 1)) < 1e-6


@pytest.mark.parametrize("mu", [UNIFORM_MU, SOFT_MU])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
def test_gradient_is_section_3_and_eq_12(alpha: float, mu: Weight | None) -> None:
    """-E[mu pi(y_l)^a / (pi(y_w)^a + pi(y_l)^a) (grad log pi(y_w) - grad log pi(y_l))], term by term."""
    problem = random_problem(seed=1)
    logits = torch.randn(problem.rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    policy = logits.softmax(1)
    weight = torch.ones_like(problem.mass)
    if mu is not None:
        scores = 0.5 * (policy[:, problem.winner] + policy[:, problem.loser]).log()
        weight = 1 / (1 + torch.exp(scores.mean() - scores))
    expected = torch.zeros_like(logits)
    onehot = torch.eye(logits.shape[1], dtype=torch.float64)
    for k, (win, lose) in enumerate(zip(problem.winner.tolist(), problem.loser.tolist(), strict=True)):
        error = policy[:, lose] ** alpha / (policy[:, win] ** alpha + policy[:, lose] ** alpha)
        grad_log_winner, grad_log_loser = onehot[win] - policy, onehot[lose] - policy
        expected -= (problem.mass[:, k] * weight[:, k] * error)[:, None] * (grad_log_winner - grad_log_loser)
    torch.testing.assert_close(gradient(problem, logits, alpha, mu), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_gradient_on_the_simplex_is_eq_20(alpha: float) -> None:
    problem = random_problem(seed=3)
    x, n = problem.rewards.shape
    policy = torch.rand(x, n, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).softmax(1)
    expert = problem.rewards.softmax(1)
    mass = torch.zeros(x, n, n, dtype=torch.float64)
    mass[:, problem.winner, problem.loser] = problem.mass
    symmetric = mass + mass.mT  # eq. 17 with mu = 1
    p, q = policy[:, :, None], policy[:, None, :]
    numerator = symmetric * (expert[:, :, None] * q**alpha - expert[:, None, :] * p**alpha)
    expected = (numerator / (p * (expert[:, :, None] + expert[:, None, :]) * (p**alpha + q**alpha))).sum(2)
    torch.testing.assert_close(-gradient(problem, policy, alpha, simplex=True), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mu", [UNIFORM_MU, SOFT_MU])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
def test_simplex_flow_is_at_rest_only_at_the_softmax(alpha: float, mu: Weight | None) -> None:
    """Theorem 2 and eq. 23: the flow stands still at softmax(r / alpha), and from any other point moves nearer."""
    problem = random_problem(seed=5, contexts=64)
    target = torch.softmax(problem.rewards / alpha, 1)
    at_rest = gradient(problem, target, alpha, mu, simplex=True)
    assert (
        target * at_rest
    ).abs().max() < 1e-12  # times pi: the gradient by log pi, whose rounding pi does not magnify

    generator = torch.Generator().manual_seed(6)
    elsewhere = (3 * torch.randn(target.shape, dtype=torch.float64, generator=generator)).softmax(1)
    flow = -gradient(problem, elsewhere, alpha, mu, simplex=True)
    assert ((flow * (elsewhere - target)).sum(1) < 0).all()


@pytest.mark.parametrize("mu", [UNIFORM_MU, SOFT_MU])
def test_simplex_flow_arrives_at_the_softmax(mu: Weight | None) -> None:
    problem = random_problem(seed=7, n=4)
    target = problem.rewards.softmax(1)
    policy = (-problem.rewards).softmax(1)
    distance = (policy - target).norm(dim=1)
    for _ in range(2500):
        flow = -gradient(problem, policy, 1.0, mu, simplex=True)
        flow -= flow.mean(1, keepdim=True)  # projected on the plane of the simplex, which the path does not leave
        policy = policy + 0.02 * flow
        nearer = (policy - target).norm(dim=1)
        assert (nearer <= distance + 1e-12).all()
        distance = nearer
    assert total_variation(policy, target) < 1e-6


def test_alpha_zero_heads_for_the_best_response_under_even_pairs() -> None:
    """Eq. 9 has no minimum in theta. Descent moves along c (`surplus`), so pi goes to argmax c, here argmax r."""
    rewards = random_problem(seed=8).rewards
    problem = make_problem(rewards, torch.ones(*rewards.shape, rewards.shape[1], dtype=torch.float64))
    best = torch.nn.functional.one_hot(rewards.argmax(1), rewards.shape[1]).double()
    policy = descend(problem, 0.0, None, learning_rate=100.0, steps=200)
    assert total_variation(policy, best) < 1e-6


def uneven_problem() -> Problem:
    """Most pairs hold the second-best and the worst response; few pairs hold the best one."""
    rewards = torch.tensor([[1.0, 0.9, -3.0]], dtype=torch.float64)
    return make_problem(rewards, torch.tensor([[[0, 1, 1], [1, 0, 20], [1, 20, 0]]], dtype=torch.float64))


def surplus(problem: Problem) -> Tensor:
    """c_y = sum_y' D(y, y') - D(y', y), [X, n]."""
    c = torch.zeros_like(problem.rewards)
    return c.index_add(1, problem.winner, problem.mass).index_add(1, problem.loser, -problem.mass)


def test_alpha_zero_misses_the_best_response_under_uneven_pairs() -> None:
    """Theorem 1 does not hold at alpha = 0 for every D of full support: descent goes to argmax c, not argmax r."""
    problem = uneven_problem()
    c = surplus(problem)
    assert problem.rewards.argmax() == 0
    assert c.argmax() == 1
    logits = torch.zeros_like(problem.rewards)
    torch.testing.assert_close(-gradient(problem, logits, 0.0), c / 2, rtol=1e-13, atol=1e-15)
    policy = descend(problem, 0.0, None, learning_rate=10.0, steps=50)
    assert total_variation(policy, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("alpha", [0.02, 0.05])
def test_small_alpha_finds_the_best_response_under_the_same_pairs(alpha: float) -> None:
    """Theorem 1 holds for alpha -> 0+: eq. 8 is convex in theta, and its minimum is softmax(r / alpha)."""
    problem = uneven_problem()
    target = torch.softmax(problem.rewards / alpha, 1)
    assert gradient(problem, problem.rewards / alpha, alpha).abs().max() < 1e-12
    policy = descend(problem, alpha, None, learning_rate=8 / alpha, steps=300)
    assert total_variation(policy, target) < 1e-6
    assert policy.argmax() == 0


@pytest.mark.parametrize("make", [uneven_problem, random_problem], ids=["uneven", "random"])
def test_alpha_zero_simplex_flow_rests_at_the_positive_surplus(make: Callable[[], Problem]) -> None:
    """Eq. 9 in pi: the flow is v_y = c_y / (2 pi_y).

    At pi = c+ / sum c+ it is equal for all responses with c > 0, so pi rests there, and not at the argmax. The flow
    lowers pi where c < 0.
    """
    problem = make()
    c = surplus(problem)
    target = c.clamp(min=0) / c.clamp(min=0).sum(1, keepdim=True)
    floor = 1e-9
    flow = -gradient(problem, target.clamp(min=floor), 0.0, simplex=True)
    on_face = c > 0
    level = c.clamp(min=0).sum(1, keepdim=True) / 2
    torch.testing.assert_close(flow[on_face], level.expand_as(flow)[on_face], rtol=1e-12, atol=0)
    assert (flow[~on_face] < 0).all()
    assert total_variation(target, torch.nn.functional.one_hot(problem.rewards.argmax(1), c.shape[1]).double()) > 0.01
