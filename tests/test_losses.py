"""The losses against formulas written independently of them (mpmath, or probabilities in place of log-probs)."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from spo_kernels import LinearSPOLoss, SPOLoss
from spo_kernels.losses import PowerImportance, SoftImportance, dpo_loss, preference_loss, spo_loss
from spo_kernels.modules import SPOMetrics

ALPHAS = [0.0, 1e-45, 1e-20, 1e-6, 0.01, 0.1, 1.0, 30.0]
# D: equal, close, typical, and where alpha D leaves the range of exp in float32 and in float64.
MARGINS = [0.0, 1e-3, -1e-3, 0.5, -0.5, 20.0, -20.0, 300.0, -300.0, 5000.0, -5000.0]


def pairs(dtype: torch.dtype = torch.float64, p: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of sequences: around -300 nats, a few tens apart."""
    generator = torch.Generator().manual_seed(seed)
    logp_w = -300 + 30 * torch.randn(p, dtype=torch.float64, generator=generator)
    logp_l = logp_w + 10 * torch.randn(p, dtype=torch.float64, generator=generator)
    return logp_w.to(dtype).requires_grad_(), logp_l.to(dtype).requires_grad_()


def exact_preference(margin: float, alpha: float, center: bool) -> mpmath.mpf:
    """Eq. 8 and 9 from probabilities, with 100 digits; centred means without log(2)/alpha."""
    with mpmath.workdps(100):
        if alpha == 0:
            return mpmath.mpf(-margin) / 2
        a, d = mpmath.mpf(alpha), mpmath.mpf(margin)
        winner, loser = mpmath.exp(a * d), mpmath.mpf(1)
        value = -mpmath.log(winner / (winner + loser)) / a
        return value - mpmath.log(2) / a if center else value


class TestSpoLoss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_value(self, alpha: float, center: bool, dtype: torch.dtype) -> None:
        margin = torch.tensor(MARGINS, dtype=dtype)
        losses, _, _ = spo_loss(margin - 3000, torch.full_like(margin, -3000), alpha=alpha, center=center)
        assert losses.dtype == dtype
        eps = torch.finfo(dtype).eps
        for d, loss in zip((margin - 3000 + 3000).tolist(), losses.tolist(), strict=True):
            exact = exact_preference(d, alpha, center)
            if abs(exact) > torch.finfo(dtype).max:  # log(2)/alpha for alpha below float32
                assert loss == math.inf
            else:
                # D and alpha D carry a rounding each, of which the loss passes on at most |D| eps; no term in 1/alpha
                assert abs(loss - exact) <= 4 * eps * (abs(exact) + abs(d)), (d, loss, float(exact))

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_gradient_identity(self, alpha: float, center: bool) -> None:
        """dL/dL_w = -mu sigmoid(-alpha D) = -dL/dL_l, to float32's relative precision, with a non-unit upstream."""
        logp_w = torch.tensor(MARGINS).requires_grad_()
        logp_l = torch.zeros(len(MARGINS)).requires_grad_()
        mu = torch.linspace(0.1, 2.0, len(MARGINS))
        upstream = torch.linspace(-3.0, 5.0, len(MARGINS))
        spo_loss(logp_w, logp_l, alpha=alpha, weight=mu, center=center)[0].backward(upstream)
        scaled = (alpha * logp_w.detach().double()).clamp(max=700)
        expected = (-upstream * mu).double() / (1 + scaled.exp())
        assert logp_w.grad is not None
        assert logp_l.grad is not None
        # alpha D in float32 is off by half an ulp, which exp(-alpha D) turns into alpha D / 2 ulps
        rtol = 1e-6 * (1 + scaled.abs().clamp(max=100))
        assert ((logp_w.grad - expected).abs() <= rtol * expected.abs() + 1e-37).all()
        assert torch.equal(logp_l.grad, -logp_w.grad)

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_center_has_the_same_gradient(self, alpha: float) -> None:
        gradients = []
        for center in (False, True):
            logp_w = torch.tensor(MARGINS).requires_grad_()
            spo_loss(logp_w, torch.zeros_like(logp_w), alpha=alpha, center=center)[0].sum().backward()
            gradients.append(logp_w.grad)
        assert gradients[0] is not None
        assert gradients[1] is not None
        assert torch.equal(gradients[0], gradients[1])

    def test_center_is_continuous_at_zero(self) -> None:
        """0 <= centred(alpha) - eq. 9 <= alpha D^2 / 8, since 0 <= logcosh(x) <= x^2 / 2."""
        logp_w, logp_l = pairs()
        margin = (logp_w - logp_l).detach()
        limit = spo_loss(logp_w, logp_l, alpha=0.0)[0]
        assert torch.equal(limit, -margin / 2)
        for alpha in [10.0**-k for k in range(0, 40, 3)]:
            gap = spo_loss(logp_w, logp_l, alpha=alpha, center=True)[0] - limit
            assert (gap >= -1e-14).all(), alpha
            assert (gap <= alpha * margin**2 / 8 + 1e-14).all(), alpha

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
    def test_gradcheck(self, alpha: float, center: bool) -> None:
        logp_w, logp_l = pairs(p=4)
        with torch.no_grad():
            logp_l[0] = logp_w[0]
        kl = torch.rand(3, dtype=torch.float64).requires_grad_()
        mu = torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)

        def losses(logp_w: Tensor, logp_l: Tensor, kl: Tensor) -> Tensor:
            return spo_loss(logp_w, logp_l, alpha=alpha, weight=mu, kl=kl, beta=0.3, center=center)[0]

        assert torch.autograd.gradcheck(losses, (logp_w, logp_l, kl))
        assert torch.autograd.gradgradcheck(losses, (logp_w, logp_l, kl))

    @pytest.mark.parametrize("center", [False, True])
    def test_infinite_log_probs(self, center: bool) -> None:
        """An impossible chosen response costs +inf, an impossible rejected one nothing, both are undefined."""
        inf = math.inf
        logp_w = torch.tensor([-inf, -3.0, -inf, -3.0], requires_grad=True)
        logp_l = torch.tensor([-3.0, -inf, -inf, -3.0])
        losses, _, _ = spo_loss(logp_w, logp_l, alpha=0.1, center=center)
        least = -math.log(2) / 0.1 if center else 0.0
        equal = 0.0 if center else math.log(2) / 0.1
        torch.testing.assert_close(losses.detach(), torch.tensor([inf, least, math.nan, equal]), equal_nan=True)
        losses.sum().backward()
        torch.testing.assert_close(logp_w.grad, torch.tensor([-1.0, 0.0, math.nan, -0.5]), equal_nan=True)

    def test_infinite_log_probs_at_alpha_zero(self) -> None:
        logp_w = torch.tensor([-math.inf, -3.0], requires_grad=True)
        losses, _, _ = spo_loss(logp_w, torch.tensor([-3.0, -math.inf]), alpha=0.0)
        losses.sum().backward()
        assert losses.tolist() == [math.inf, -math.inf]
        assert logp_w.grad is not None
        assert logp_w.grad.tolist() == [-0.5, -0.5]

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_dtypes(self, dtype: torch.dtype, expected: torch.dtype) -> None:
        logp_w, logp_l = pairs(dtype)
        outputs = spo_loss(logp_w, logp_l, logp_w.detach().half(), logp_l.detach().half(), weight=SoftImportance(0.1))
        assert [output.dtype for output in outputs] == [expected] * 3
        exact = spo_loss(logp_w.to(expected), logp_l.to(expected), weight=SoftImportance(0.1))[0]
        assert torch.equal(outputs[0], exact)
        outputs[0].sum().backward()
        assert logp_w.grad is not None
        assert logp_w.grad.dtype == dtype

    def test_rewards_are_0_at_alpha_0_even_for_impossible_responses(self) -> None:
        _, chosen, rejected = spo_loss(torch.tensor([-torch.inf]), torch.tensor([-1.0]), alpha=0)
        assert (chosen.item(), rejected.item()) == (0, 0)

    def test_rewards(self) -> None:
        logp_w, logp_l = pairs()
        ref_w, ref_l = pairs(seed=1)
        bare = spo_loss(logp_w, logp_l, alpha=0.3)
        relative = spo_loss(logp_w, logp_l, ref_w, ref_l, alpha=0.3)
        assert torch.equal(bare[0], relative[0])  # references never enter the loss
        for reward, policy, reference in zip(relative[1:], (logp_w, logp_l), (ref_w, ref_l), strict=True):
            torch.testing.assert_close(reward, 0.3 * (policy.detach() - reference.detach()))
            assert not reward.requires_grad
        for reward, policy in zip(bare[1:], (logp_w, logp_l), strict=True):
            torch.testing.assert_close(reward, 0.3 * policy.detach())
            assert not reward.requires_grad

    def test_kl(self) -> None:
        logp_w, logp_l = pairs()
        kl = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64, requires_grad=True)
        bare = spo_loss(logp_w, logp_l)[0].mean()
        objective = spo_loss(logp_w, logp_l, kl=kl, beta=0.2)[0].mean()
        torch.testing.assert_close(objective, bare + 0.2 * 5.0)
        objective.backward()
        torch.testing.assert_close(kl.grad, torch.full_like(kl, 0.2 / 3))
        scalar = spo_loss(logp_w, logp_l, kl=torch.tensor(5.0), beta=0.2)[0].mean()
        torch.testing.assert_close(scalar, objective)

    def test_half_kl_is_averaged_in_float32(self) -> None:
        kl = torch.tensor([2048.0, 2050.0], dtype=torch.float16)  # float16 has no 2049
        losses, _, _ = spo_loss(torch.zeros(1), torch.zeros(1), alpha=0.0, kl=kl, beta=0.5)
        assert losses.item() == 1024.5

    def test_no_pair(self) -> None:
        none = torch.zeros(0, requires_grad=True)
        outputs = spo_loss(none, none, none, none, weight=SoftImportance(0.1), kl=torch.ones(2), beta=0.1)
        assert [list(output.shape) for output in outputs] == [[0]] * 3
        outputs[0].sum().backward()
        assert none.grad is not None
        assert list(none.grad.shape) == [0]

    def test_weight_is_never_differentiated(self) -> None:
        """Eq. 12: with mu a function of the log-probs, the gradient is that of a constant mu."""
        logp_w, logp_l = pairs()
        mu = (0.01 * torch.logaddexp(logp_w, logp_l)).exp()  # on the graph of the log-probs
        by_tensor = spo_loss(logp_w, logp_l, weight=mu)[0].sum()
        by_callable = spo_loss(logp_w, logp_l, weight=lambda *logps: (0.01 * torch.logaddexp(*logps)).exp())[0].sum()
        constant = spo_loss(logp_w, logp_l, weight=mu.detach().clone())[0].sum()
        assert torch.equal(by_tensor, constant)
        assert torch.equal(by_callable, constant)
        gradients = [torch.autograd.grad(loss, logp_w)[0] for loss in (by_tensor, by_callable, constant)]
        assert torch.equal(gradients[0], gradients[2])
        assert torch.equal(gradients[1], gradients[2])
        torch.testing.assert_close(constant, (mu * spo_loss(logp_w, logp_l)[0]).sum().detach())

        parameter = torch.ones(6, dtype=torch.float64, requires_grad=True)
        spo_loss(logp_w, logp_l, weight=parameter)[0].sum().backward()
        spo_loss(logp_w, logp_l, weight=lambda *_: parameter * 1)[0].sum().backward()
        assert parameter.grad is None

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"alpha": -0.1}, ValueError, r"alpha must be >= 0 and finite, got -0\.1"),
            ({"alpha": math.nan}, ValueError, "alpha must be >= 0 and finite, got nan"),
            ({"alpha": math.inf}, ValueError, "alpha must be >= 0 and finite, got inf"),
            ({"alpha": torch.tensor(0.1)}, TypeError, "alpha must be a Python number, got Tensor"),
            ({"beta": -1.0}, ValueError, r"beta must be >= 0 and finite, got -1\.0"),
            ({"beta": 0.1}, ValueError, "kl must be given where beta is not 0"),
            ({"kl": torch.ones(2)}, ValueError, "kl must be None where beta is 0"),
            ({"kl": torch.ones(0), "beta": 0.1}, ValueError, r"kl must be \[S\] with S >= 1 or \[\], got \[0\]"),
            ({"kl": torch.ones(2, 3), "beta": 0.1}, ValueError, r"kl must be \[S\] .*, got \[2, 3\]"),
            ({"kl": torch.ones(2, dtype=torch.int64), "beta": 0.1}, ValueError, "kl must be a floating-point Tensor"),
            ({"kl": 0.5, "beta": 0.1}, TypeError, "kl must be a floating-point Tensor .*, got float"),
            ({"kl": torch.ones(2, device="meta"), "beta": 0.1}, ValueError, "kl must be on the device .*got meta"),
            (
                {"policy_rejected_logps": torch.zeros(3)},
                ValueError,
                r"policy_rejected_logps must be \[P\] like policy_chosen_logps, got \[3\] against \[4\]",
            ),
            (
                {"policy_rejected_logps": torch.zeros(4, dtype=torch.float64)},
                ValueError,
                "policy_rejected_logps must have the dtype .*got torch.float64 against torch.float32",
            ),
            (
                {"policy_rejected_logps": torch.zeros(4, device="meta")},
                ValueError,
                "policy_rejected_logps must be on the device of policy_chosen_logps, got meta against cpu",
            ),
            (
                {"policy_chosen_logps": torch.zeros(2, 2)},
                ValueError,
                r"policy_chosen_logps must be \[P\], got \[2, 2\]",
            ),
            (
                {"policy_chosen_logps": torch.zeros(4, dtype=torch.int64)},
                ValueError,
                "policy_chosen_logps must be a floating-point Tensor .*got torch.int64",
            ),
            ({"policy_chosen_logps": [0.0]}, TypeError, "policy_chosen_logps must be a .*Tensor .*got list"),
            (
                {"reference_chosen_logps": torch.zeros(4)},
                ValueError,
                "come together, got only reference_chosen_logps",
            ),
            (
                {"reference_chosen_logps": torch.zeros(4), "reference_rejected_logps": torch.zeros(5)},
                ValueError,
                r"reference_rejected_logps must be \[P\] like policy_chosen_logps, got \[5\] against \[4\]",
            ),
            ({"weight": torch.ones(5)}, ValueError, r"weight must be \[P\] like .*got \[5\] against \[4\]"),
            (
                {"weight": lambda *logps: logps[0].sum()},
                ValueError,
                r"weight must be \[P\] like .*got \[\] against \[4\]",
            ),
            ({"weight": torch.ones(4, device="meta")}, ValueError, "weight must be on the device"),
            ({"weight": 0.5}, TypeError, r"weight must be a Tensor \[P\], a callable or None, got float"),
        ],
    )
    def test_errors(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments: dict[str, Any] = {"policy_chosen_logps": torch.zeros(4), "policy_rejected_logps": torch.zeros(4)}
        spo_loss(**arguments)
        with pytest.raises(error, match=message):
            spo_loss(**{**arguments, **change})


def unread_pairs(poison: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [6] of which two pairs are `poison`, and weights that are 0 there and nowhere else."""
    logp_w, logp_l = (x.detach() for x in pairs())
    logp_w[1], logp_l[1], logp_l[4] = poison, poison, poison
    return logp_w.requires_grad_(), logp_l.requires_grad_(), torch.tensor([0.3, 0.0, 1.0, 2.0, 0.0, 0.7])


class TestPairsOfWeightZero:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("alpha", [0.0, 1e-45, 0.1])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("form", ["tensor", "callable", "preference_loss"])
    def test_spo_loss_does_not_read_them(self, form: str, center: bool, alpha: float, poison: float) -> None:
        logp_w, logp_l, mu = unread_pairs(poison)
        weight = (lambda chosen, rejected: mu) if form == "callable" else mu
        loss = spo_loss if form != "preference_loss" else lambda *args, **kw: preference_loss("spo", *args, **kw)
        losses, *_ = loss(logp_w, logp_l, alpha=alpha, weight=weight, center=center)
        read = mu != 0
        clean = [x.detach()[read].requires_grad_() for x in (logp_w, logp_l)]
        expected, *_ = spo_loss(*clean, alpha=alpha, weight=mu[read], center=center)
        assert torch.equal(losses[read], expected)
        assert losses[~read].tolist() == [0, 0]
        got = torch.autograd.grad(losses.sum(), (logp_w, logp_l))
        for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), clean), strict=True):
            assert torch.equal(ours[read], theirs)
            assert ours[~read].tolist() == [0, 0]

    def test_a_weight_of_nan_is_not_zero(self) -> None:
        losses, *_ = spo_loss(*pairs(), weight=torch.tensor([math.nan, 1, 1, 1, 1, 1]))
        assert losses.isnan().tolist() == [True] + [False] * 5

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_spo_loss_module_does_not_read_their_logits(self, inplace: bool, packed: bool, poison: float) -> None:
        batch = Batch()
        mu = torch.ones(P)
        mu[1] = 0
        logits = batch.logits.detach().clone()
        logits[[1, P + 1]] = poison

        def run(logits: Tensor) -> tuple[Tensor, Tensor, SPOMetrics]:
            leaf = logits.detach().requires_grad_()
            rows, labels, options = leaf * 1, batch.labels, {}
            if packed:
                rows, labels = rows.flatten(0, 1), labels.flatten()
                options = {"cu_seqlens": torch.arange(0, 2 * P * T + 1, T)}
            module = SPOLoss(0.3, weight=lambda chosen, rejected: mu, inplace_backward=inplace)
            objective, metrics = module(rows, labels, **options)
            return objective, torch.autograd.grad(objective, leaf)[0], metrics

        objective, gradient, metrics = run(logits)
        expected, expected_gradient, expected_metrics = run(batch.logits)
        assert torch.equal(objective, expected)
        assert torch.equal(gradient, expected_gradient)
        assert not gradient[[1, P + 1]].any()
        for name in ("preference_loss", "accuracy", "margin", "mu"):
            assert torch.equal(getattr(metrics, name), getattr(expected_metrics, name)), name


def hand_written_importance(gamma: float, logp_w: Tensor, logp_l: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """Eq. 24 in probabilities, shifted by 300 nats to keep them representable."""
    scores = gamma * (((logp_w + 300).exp() + (logp_l + 300).exp()).log() - 300)
    return 1 / (1 + (-(scores - (scores.mean() if normalizer is None else normalizer))).exp())


class TestPairMask:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize(
        ("name", "weight"),
        [*(("spo", weight) for weight in ("uniform", "tensor", "callable", "batch", "ema")), ("dpo", "uniform")],
    )
    def test_masked_pairs_are_not_read(self, name: str, weight: str, reduction: str, poison: float) -> None:
        logp_w, logp_l, mu = unread_pairs(poison)
        mask = mu != 0
        weights: dict[str, Any] = {
            "uniform": [None, None],
            "tensor": [torch.where(mask, mu, math.nan), mu[mask]],
            "callable": [lambda chosen, rejected: torch.sigmoid(chosen - rejected + len(chosen))] * 2,
            "batch": [SoftImportance(0.1)] * 2,
            "ema": [SoftImportance(0.1, "ema"), SoftImportance(0.1, "ema")],
        }
        clean = [x.detach()[mask].requires_grad_() for x in (logp_w, logp_l)]
        options: list[dict[str, Any]] = [{"alpha": 0.1, "center": True, "weight": w} for w in weights[weight]]
        references: list[tuple[Tensor, ...]] = [(), ()]
        if name == "dpo":
            options = [{"label_smoothing": 0.1}] * 2
            references = [(logp_w.detach() + 1, logp_l.detach()), (clean[0].detach() + 1, clean[1].detach())]
        masked = preference_loss(
            name, logp_w, logp_l, *references[0], pair_mask=mask, reduction=reduction, **options[0]
        )
        expected = preference_loss(name, *clean, *references[1], reduction=reduction, **options[1])
        losses = masked[0][mask] if reduction == "none" else masked[0]
        torch.testing.assert_close(losses, expected[0], rtol=1e-14, atol=0)
        for ours, theirs in zip(masked[1:], expected[1:], strict=True):
            assert torch.equal(ours[mask], theirs)
            assert ours[~mask].tolist() == [0, 0]
        got = torch.autograd.grad(masked[0].sum(), (logp_w, logp_l))
        for ours, theirs in zip(got, torch.autograd.grad(expected[0].sum(), clean), strict=True):
            torch.testing.assert_close(ours[mask], theirs, rtol=1e-14, atol=0)
            assert ours[~mask].tolist() == [0, 0]
        if reduction == "none":
            assert masked[0][~mask].tolist() == [0, 0]
        if weight == "ema":
            assert [w.num_updates.item() for w in weights["ema"]] == [1, 1]
            assert weights["ema"][0].running_mean == weights["ema"][1].running_mean

    @pytest.mark.parametrize("masked", [False, True])
    def test_reductions_with_a_kl(self, masked: bool) -> None:
        logp_w, logp_l = pairs()
        mask = torch.tensor([True, False, True, True, False, True]) if masked else None
        options: dict[str, Any] = {"kl": torch.tensor([1.0, 5.0]), "beta": 0.5, "pair_mask": mask}
        losses = spo_loss(logp_w, logp_l, **options)[0]
        pairs_read = 4 if masked else 6
        torch.testing.assert_close(spo_loss(logp_w, logp_l, **options, reduction="sum")[0], losses.sum())
        mean = spo_loss(logp_w, logp_l, **options, reduction="mean")[0]
        torch.testing.assert_close(mean, losses.sum() / pairs_read)
        bare = spo_loss(logp_w, logp_l, pair_mask=mask, reduction="mean")[0]
        torch.testing.assert_close(mean, bare + 1.5)

    @pytest.mark.parametrize("pairs_given", [0, 6])
    def test_no_pair_that_is_read(self, pairs_given: int) -> None:
        logp_w, logp_l = pairs(p=pairs_given)
        mask = torch.zeros(pairs_given, dtype=torch.bool)
        for reduction in ("mean", "sum"):
            loss = spo_loss(logp_w, logp_l, weight=SoftImportance(0.1), pair_mask=mask, reduction=reduction)[0]
            assert loss.item() == 0
            loss.backward()
            assert logp_w.grad is not None
            assert logp_w.grad.tolist() == [0] * pairs_given
        with_kl = spo_loss(logp_w, logp_l, pair_mask=mask, reduction="mean", kl=torch.tensor(3.0), beta=0.5)[0]
        assert with_kl.item() == 1.5

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"reduction": "average"}, ValueError, "reduction must be one of none, mean, sum, got 'average'"),
            (
                {"pair_mask": torch.ones(4)},
                ValueError,
                r"pair_mask must be \[P\] bool .*got \[4\] float32 against \[4\]",
            ),
            ({"pair_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"pair_mask must be .*got \[3\] bool against"),
            ({"pair_mask": [True] * 4}, TypeError, r"pair_mask must be a bool Tensor \[P\] or None, got list"),
            (
                {"pair_mask": torch.ones(4, dtype=torch.bool, device="meta")},
                ValueError,
                "pair_mask must be on the device of policy_chosen_logps, got meta against cpu",
            ),
            (
                {"pair_mask": torch.ones(4, dtype=torch.bool), "weight": lambda *logps: logps[0].sum()},
                ValueError,
                r"weight must be \[P\] like the pairs of pair_mask, got \[\] against \[4\]",
            ),
        ],
    )
    def test_errors(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            spo_loss(torch.zeros(4), torch.zeros(4), **change)

    def test_compiles(self) -> None:
        logp_w, logp_l, mu = unread_pairs(math.nan)
        mask, importance = mu != 0, SoftImportance(0.1)

        def loss(logp_w: Tensor, logp_l: Tensor) -> Tensor:
            return spo_loss(logp_w, logp_l, weight=importance, pair_mask=mask, reduction="mean")[0]

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logp_w, logp_l), loss(logp_w, logp_l))


class TestSoftImportance:
    def test_batch(self) -> None:
        logp_w, logp_l = pairs()
        mu = SoftImportance(0.1)(logp_w, logp_l)
        torch.testing.assert_close(mu, hand_written_importance(0.1, logp_w, logp_l).detach())
        assert not mu.requires_grad
        assert torch.equal(mu, SoftImportance(0.1)(logp_l, logp_w))  # symmetric in the pair

    @pytest.mark.parametrize("value", [-25.0, torch.tensor(-25.0), torch.tensor(-25.0, requires_grad=True)])
    def test_given_normalizer(self, value: float | Tensor) -> None:
        logp_w, logp_l = pairs()
        mu = SoftImportance(0.1, value)(logp_w, logp_l)
        torch.testing.assert_close(mu, hand_written_importance(0.1, logp_w, logp_l, torch.tensor(-25.0)).detach())
        assert mu.dtype == torch.float64
        assert not mu.requires_grad

    @pytest.mark.parametrize("normalizer", ["batch", "ema", 0.0])
    def test_gamma_zero_is_one_half(self, normalizer: str | float) -> None:
        assert SoftImportance(0.0, normalizer)(*pairs()).tolist() == [0.5] * 6

    def test_batch_normalizer_over_accumulation_steps(self) -> None:
        """A pass without gradients gives the whole step's normalizer; micro-batches then have the step's weights."""
        logp_w, logp_l = pairs()
        importance = SoftImportance(0.1)
        step = SoftImportance(0.1, importance.batch_normalizer(logp_w, logp_l))
        micro = [step(logp_w[rows], logp_l[rows]) for rows in (slice(0, 4), slice(4, 6))]
        torch.testing.assert_close(torch.cat(micro), importance(logp_w, logp_l))

    def test_running_average(self) -> None:
        importance = SoftImportance(0.1, "ema", decay=0.75)
        batch = SoftImportance(0.1)
        average = None
        for seed in range(4):
            logp_w, logp_l = pairs(torch.float32, p=3 + seed, seed=seed)
            mean = batch.batch_normalizer(logp_w, logp_l)
            average = mean if average is None else 0.75 * average + 0.25 * mean  # the first update initialises
            mu = importance(logp_w, logp_l)
            torch.testing.assert_close(mu, hand_written_importance(0.1, logp_w, logp_l, average).detach())
        assert importance.num_updates == 4

        saved = copy.deepcopy(importance.state_dict())
        importance.eval()(*pairs(torch.float32, seed=9))
        importance.train()(torch.zeros(0), torch.zeros(0))  # no pair
        nothing = torch.full((2,), -math.inf)
        importance(nothing, nothing)  # no finite mean
        assert importance.state_dict() == saved

    def test_running_average_survives_a_checkpoint_exactly(self, tmp_path: Path) -> None:
        batches = [pairs(torch.float32, seed=seed) for seed in range(5)]
        first = SoftImportance(0.1, "ema")
        for batch in batches[:3]:
            first(*batch)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = SoftImportance(0.1, "ema")
        second.load_state_dict(torch.load(tmp_path / "state.pt"))
        for batch in batches[3:]:
            assert torch.equal(second(*batch), first(*batch))

    @pytest.mark.parametrize(
        "cast",
        [
            lambda module: module.half(),
            lambda module: module.bfloat16(),
            lambda module: module.to(torch.float16),
            lambda module: module.to("cpu", torch.bfloat16),
            lambda module: module.double(),
        ],
        ids=["half", "bfloat16", "to dtype", "to device and dtype", "double"],
    )
    def test_state_keeps_its_dtype_through_a_cast_of_the_model(self, cast: Callable[[Any], Any]) -> None:
        """-9e4 is beyond float16, and steps of 1 at -150 round away in bfloat16."""
        model, plain = torch.nn.Module(), SoftImportance(0.1, "ema")
        model.loss = LinearSPOLoss(weight=SoftImportance(0.1, "ema"))
        given = torch.tensor(-9e4 + 1 / 64)
        model.given = SPOLoss(weight=SoftImportance(0.1, given))
        model.parameter = torch.nn.Parameter(torch.zeros(1))
        before = model.parameter.dtype
        cast(model)
        assert model.parameter.dtype != before
        assert torch.equal(model.given.importance.normalizer, given)
        for k in range(100):
            batch = torch.tensor([-9.0e5 - k]), torch.tensor([-9.1e5 - k])
            assert torch.equal(model.loss.importance(*batch), plain(*batch))
        assert plain.num_updates == 100
        assert model.loss.state_dict()["importance.running_mean"].dtype == torch.float32
        assert torch.equal(model.loss.importance.running_mean, plain.running_mean)

    def test_state_follows_the_device(self) -> None:
        for normalizer in ("ema", torch.tensor(-3.0)):
            module = SPOLoss(weight=SoftImportance(0.1, normalizer)).to("meta", torch.float16).importance
            state = module.running_mean if isinstance(normalizer, str) else module.normalizer
            assert (state.device.type, state.dtype) == ("meta", torch.float32)

    def test_state_is_float32_where_the_model_is_made_in_half_precision(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert SoftImportance(0.1, "ema").running_mean.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("assign", [False, True])
    def test_checkpoints_in_half_precision_load_into_float32(self, assign: bool) -> None:
        saved = {"running_mean": torch.tensor(-150.0, dtype=torch.bfloat16), "num_updates": torch.tensor(3)}
        module = SoftImportance(0.1, "ema")
        module.load_state_dict(saved, assign=assign)
        assert (module.running_mean.item(), module.num_updates.item()) == (-150.0, 3)
        assert module.running_mean.dtype == torch.float32
        module.running_mean.data = module.running_mean.data.half()  # as FSDP's buffer_dtype does
        with pytest.raises(ValueError, match=r"running_mean must be float32 or float64, got torch\.float16"):
            module(*pairs(torch.float32))

    def test_set_normalizer(self) -> None:
        batch = tuple(x.detach() for x in pairs(torch.float32))
        module = SoftImportance(0.1, requires_grad := torch.tensor(-3.0, requires_grad=True))
        copy.deepcopy(module), pickle.dumps(module)
        assert torch.equal(module(*batch), SoftImportance(0.1, -3.0)(*batch))
        with torch.no_grad():
            requires_grad.fill_(-4.0)  # shared, not copied
        assert torch.equal(module(*batch), SoftImportance(0.1, -4.0)(*batch))
        module.set_normalizer(-5.0)
        assert torch.equal(module(*batch), SoftImportance(0.1, -5.0)(*batch))
        module.set_normalizer("batch")
        assert torch.equal(module(*batch), SoftImportance(0.1)(*batch))
        assert not module.state_dict()
        module.set_normalizer("ema")
        module(*batch)
        mean = module.running_mean.clone()
        module.set_normalizer(0.0)
        module(*batch)
        module.set_normalizer("ema")
        assert (module.running_mean, module.num_updates) == (mean, 1)
        for wrong, error in (("mean", ValueError), (torch.zeros(2), ValueError), (None, TypeError)):
            with pytest.raises(error, match="normalizer must be"):
                module.set_normalizer(wrong)
            assert module.normalizer == "ema"

    def test_running_average_before_any_update_is_the_batch(self) -> None:
        logp_w, logp_l = pairs(torch.float32)
        importance = SoftImportance(0.1, "ema").eval()
        assert torch.equal(importance(logp_w, logp_l), SoftImportance(0.1)(logp_w, logp_l))
        assert importance.num_updates == 0

    def test_only_the_running_average_has_state(self) -> None:
        assert not SoftImportance(0.1).state_dict()
        assert not SoftImportance(0.1, -3.0).state_dict()
        assert set(SoftImportance(0.1, "ema").state_dict()) == {"running_mean", "num_updates"}

    def test_no_pair(self) -> None:
        empty = torch.zeros(0)
        for normalizer in ("batch", "ema", 0.0):
            assert list(SoftImportance(0.1, normalizer)(empty, empty).shape) == [0]
        assert SoftImportance(0.1).batch_normalizer(empty, empty).isnan()

    @pytest.mark.parametrize("importance", [SoftImportance, PowerImportance])
    def test_process_group_with_unequal_pair_counts(self, tmp_path: Path, importance: type[SoftImportance]) -> None:
        """Two gloo processes with 5 and 1 pairs, then 6 and none: the weights are those of one process with all."""
        logp_w, logp_l = pairs()
        torch.save((logp_w.detach(), logp_l.detach()), tmp_path / "pairs.pt")
        script = """
import sys, torch, torch.distributed as dist
import spo_kernels
torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
logp_w, logp_l = torch.load(f"{folder}/pairs.pt")
importance = getattr(spo_kernels, sys.argv[3])
batch = importance(0.1, process_group=dist.group.WORLD)
running = importance(0.1, "ema", dist.group.WORLD)
weights = []
for split in (5, 6):
    rows = slice(0, split) if rank == 0 else slice(split, 6)
    weights += [batch(logp_w[rows], logp_l[rows]), running(logp_w[rows], logp_l[rows])]
torch.save(weights, f"{folder}/weights{rank}.pt")
del batch, running  # gloo aborts now and then when the last reference to a group goes at interpreter exit
dist.destroy_process_group()
"""
        # The parent's import path, from a folder that holds no source tree which would come before it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, tmp_path, str(rank), importance.__name__],
                env=environment,
                cwd=tmp_path,
            )
            for rank in (0, 1)
        ]
        try:
            assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
        expected = importance(0.1)(logp_w, logp_l)
        parts = [torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1)]
        assert [len(weights) for weights in parts[1]] == [1, 1, 0, 0]
        for weights in zip(*parts, strict=True):
            torch.testing.assert_close(torch.cat(weights), expected, rtol=1e-5, atol=0)  # running mean is float32

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"gamma": -0.1}, ValueError, r"gamma must be >= 0 and finite, got -0\.1"),
            ({"gamma": "0.1"}, TypeError, "gamma must be a Python number, got str"),
            ({"gamma": 0.1, "decay": 1.0}, ValueError, r"decay must be >= 0 and < 1, got 1\.0"),
            ({"gamma": 0.1, "normalizer": "mean"}, ValueError, 'normalizer must be "batch", "ema".*got \'mean\''),
            ({"gamma": 0.1, "normalizer": torch.zeros(2)}, ValueError, r"normalizer must be a 0-d Tensor, got \[2\]"),
            ({"gamma": 0.1, "normalizer": None}, TypeError, "normalizer must be .*got NoneType"),
        ],
    )
    def test_constructor_errors(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SoftImportance(**arguments)

    def test_call_errors(self) -> None:
        with pytest.raises(ValueError, match=r"logp_l must be \[P\] like logp_w, got \[3\] against \[4\]"):
            SoftImportance(0.1)(torch.zeros(4), torch.zeros(3))
        with pytest.raises(ValueError, match="device of SoftImportance's state, got cpu against meta"):
            SoftImportance(0.1, "ema").to("meta")(torch.zeros(4), torch.zeros(4))


class TestPreferenceLoss:
    def test_spo_is_spo_loss(self) -> None:
        arguments = (*pairs(), *pairs(seed=1))
        options: dict[str, Any] = {
            "alpha": 0.4,
            "center": True,
            "kl": torch.ones(2),
            "beta": 0.1,
            "weight": SoftImportance(0.1),
        }
        for ours, direct in zip(
            preference_loss("spo", *arguments, **options), spo_loss(*arguments, **options), strict=True
        ):
            assert torch.equal(ours, direct)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_dpo(self, beta: float, label_smoothing: float) -> None:
        """Eq. 4 and cDPO in probabilities: sigmoid(beta h) is u / (u + v) of the two implicit rewards."""
        logp_w, logp_l = pairs()
        ref_w, ref_l = pairs(seed=1)
        options = {"beta": beta, "label_smoothing": label_smoothing}
        losses, chosen, rejected = preference_loss("dpo", logp_w, logp_l, ref_w, ref_l, **options)
        u, v = (logp_w - ref_w).exp() ** beta, (logp_l - ref_l).exp() ** beta
        expected = -(1 - label_smoothing) * (u / (u + v)).log() - label_smoothing * (v / (u + v)).log()
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(chosen, u.log().detach())
        torch.testing.assert_close(rejected, v.log().detach())
        assert not chosen.requires_grad
        assert not rejected.requires_grad
        upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
        gradients = torch.autograd.grad(losses, (logp_w, logp_l), upstream, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (logp_w, logp_l), upstream))
        losses.sum().backward()
        assert ref_w.grad is None  # the reference is a constant

    def test_dpo_defaults_and_extremes(self) -> None:
        logp_w, logp_l = pairs()
        reference = torch.zeros(6, dtype=torch.float64)
        ours = preference_loss("dpo", logp_w, logp_l, reference, reference)[0]
        torch.testing.assert_close(ours, (1 + (-0.1 * (logp_w - logp_l)).exp()).log())
        far = torch.tensor([1e5, -1e5, math.inf])
        losses = preference_loss("dpo", far, -far, torch.zeros(3), torch.zeros(3))[0]
        torch.testing.assert_close(losses, torch.tensor([0.0, 2e4, 0.0]))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"beta": 0.0}, ValueError, r"beta must be > 0 and finite, got 0\.0"),
            ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be >= 0 and < 0\.5, got 0\.5"),
            ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be >= 0"),
            ({"alpha": 0.1}, TypeError, "dpo takes the options beta, label_smoothing, pair_mask, reduction, got alpha"),
        ],
    )
    def test_dpo_option_errors(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            preference_loss("dpo", *pairs(), *pairs(seed=1), **options)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"must be \[P\] for dpo, got None"):
            preference_loss("dpo", *pairs())
        with pytest.raises(ValueError, match="got only reference_rejected_logps"):
            preference_loss("dpo", *pairs(), None, pairs()[0])
        with pytest.raises(ValueError, match="name must be one of spo, dpo, ipo, .*, got 'ppo'"):
            preference_loss("ppo", *pairs(), *pairs())
        with pytest.raises(
            TypeError, match="spo takes the options alpha, weight, kl, beta, center, pair_mask, reduction, got label"
        ):
            preference_loss("spo", *pairs(), label_smoothing=0.1)


P, T, S, V = 3, 5, 4, 31


class Batch:
    """Logits of P pairs and S samples in float64, and their quantities from plain log_softmax."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.logits = normal(2 * P, T, V).requires_grad_()
        self.labels = torch.randint(V, (2 * P, T), generator=generator)
        self.labels[:, 0] = -100
        self.labels[1, 3:] = -100
        self.kl_logits = normal(S, T, V).requires_grad_()
        self.kl_ref_logits = normal(S, T, V)
        self.kl_mask = torch.rand(S, T, generator=generator) < 0.7

    def logps(self, average: bool = False) -> Tensor:
        kept = self.labels != -100
        tokens = self.logits.log_softmax(-1).gather(-1, self.labels.clamp(min=0)[..., None])[..., 0] * kept
        return tokens.sum(1) / kept.sum(1) if average else tokens.sum(1)

    def kl(self) -> Tensor:
        p, q = self.kl_logits.softmax(-1), self.kl_ref_logits.softmax(-1)
        return ((p * (p / q).log()).sum(-1) * self.kl_mask).sum(1)

    def samples(self) -> dict[str, Tensor]:
        return {"kl_logits": self.kl_logits, "kl_ref_logits": self.kl_ref_logits, "kl_mask": self.kl_mask}


class TestSPOLoss:
    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("weight", [None, 0.1])
    def test_objective_and_gradients(self, weight: float | None, average: bool) -> None:
        batch = Batch()
        objective, metrics = SPOLoss(0.3, 0.05, weight, average=average)(batch.logits, batch.labels, **batch.samples())
        logps, kl = batch.logps(average), batch.kl()
        logp_w, logp_l = logps[:P], logps[P:]
        mu = 1.0 if weight is None else hand_written_importance(weight, logp_w.detach(), logp_l.detach())
        u, v = logp_w.exp() ** 0.3, logp_l.exp() ** 0.3
        preference = (-mu * (u / (u + v)).log() / 0.3).mean()
        expected = preference + 0.05 * kl.mean()
        torch.testing.assert_close(objective, expected)

        inputs = (batch.logits, batch.kl_logits)
        upstream = torch.tensor(-1.7, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad(objective, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
        )
        assert not any(value.requires_grad for value in metrics)
        detached = {
            "preference_loss": preference,
            "kl": kl.mean(),
            "chosen_logps": logp_w,
            "rejected_logps": logp_l,
            "chosen_rewards": 0.3 * logp_w,
            "rejected_rewards": 0.3 * logp_l,
            "accuracy": (logp_w > logp_l).double().mean(),
            "margin": (logp_w - logp_l).mean(),
            "mu": torch.ones_like(logp_w) * mu,
            "preference_error": v / (u + v),
        }
        torch.testing.assert_close(metrics._asdict(), {name: value.detach() for name, value in detached.items()})

    def test_packed_is_padded(self) -> None:
        batch = Batch()
        module = SPOLoss(0.3, 0.05, 0.1)
        padded, _ = module(batch.logits, batch.labels, **batch.samples())
        packed, _ = module(
            batch.logits.flatten(0, 1),
            batch.labels.flatten(),
            cu_seqlens=torch.arange(0, 2 * P * T + 1, T),
            kl_logits=batch.kl_logits.flatten(0, 1),
            kl_ref_logits=batch.kl_ref_logits.flatten(0, 1),
            kl_mask=batch.kl_mask.flatten(),
            kl_cu_seqlens=torch.arange(0, S * T + 1, T),
        )
        torch.testing.assert_close(packed, padded)

    def test_references_enter_the_rewards_only(self) -> None:
        batch = Batch()
        reference = torch.arange(P, dtype=torch.float64)
        bare, _ = SPOLoss(0.3)(batch.logits, batch.labels)
        objective, metrics = SPOLoss(0.3)(
            batch.logits, batch.labels, reference_chosen_logps=reference, reference_rejected_logps=-reference
        )
        assert torch.equal(objective, bare)
        torch.testing.assert_close(metrics.chosen_rewards, 0.3 * (metrics.chosen_logps - reference))
        torch.testing.assert_close(metrics.rejected_rewards, 0.3 * (metrics.rejected_logps + reference))
        assert metrics.kl == 0

    def test_center_changes_the_value_alone(self) -> None:
        batch = Batch()
        plain, _ = SPOLoss(0.3)(batch.logits, batch.labels)
        centred, _ = SPOLoss(0.3, center=True)(batch.logits, batch.labels)
        torch.testing.assert_close(plain - centred, torch.tensor(math.log(2) / 0.3, dtype=torch.float64))
        assert torch.equal(*(torch.autograd.grad(value, batch.logits)[0] for value in (plain, centred)))

    def test_ignore_index(self) -> None:
        batch = Batch()
        other = torch.where(batch.labels == -100, -1, batch.labels)
        assert torch.equal(SPOLoss(ignore_index=-1)(batch.logits, other)[0], SPOLoss()(batch.logits, batch.labels)[0])

    def test_inplace_backward(self) -> None:
        batch = Batch()
        gradients = {}
        for inplace in (False, True):
            logits, kl_logits = batch.logits * 1, batch.kl_logits * 1
            module = SPOLoss(0.3, 0.05, 0.1, inplace_backward=inplace)
            objective, _ = module(logits, batch.labels, **{**batch.samples(), "kl_logits": kl_logits})
            gradients[inplace] = torch.autograd.grad(objective, (batch.logits, batch.kl_logits))
            assert torch.equal(logits, batch.logits) != inplace
            assert torch.equal(kl_logits, batch.kl_logits) != inplace
        assert all(map(torch.equal, gradients[False], gradients[True]))

    def test_no_pair(self) -> None:
        """The preference part is 0, and the KL alone is minimized."""
        batch = Batch()
        logits = torch.zeros(0, T, V, dtype=torch.float64, requires_grad=True)
        labels = torch.zeros(0, T, dtype=torch.int64)
        objective, metrics = SPOLoss(0.3, 0.05, 0.1)(logits, labels, **batch.samples())
        torch.testing.assert_close(objective, 0.05 * batch.kl().mean())
        assert metrics.accuracy == 0
        assert metrics.margin == 0
        assert metrics.preference_loss == 0
        objective.backward()
        assert SPOLoss()(logits, labels)[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"alpha": -1.0}, ValueError, "alpha must be >= 0"),
            ({"beta": -1.0}, ValueError, "beta must be >= 0"),
            ({"weight": -0.1}, ValueError, "gamma must be >= 0"),
            ({"weight": "soft"}, TypeError, "weight must be a number gamma, a callable or None, got str"),
        ],
    )
    def test_constructor_errors(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SPOLoss(**arguments)

    def test_errors(self) -> None:
        batch = Batch()
        logits, labels, samples = batch.logits, batch.labels, batch.samples()
        with pytest.raises(ValueError, match="logits must hold P chosen and then P rejected sequences, got 5 in all"):
            SPOLoss()(logits[:5], labels[:5])
        with pytest.raises(ValueError, match=r"kl_logits must be given where beta is not 0, got None with beta = 0\.1"):
            SPOLoss(beta=0.1)(logits, labels)
        with pytest.raises(ValueError, match="kl_ref_logits must be given where beta is not 0"):
            SPOLoss(beta=0.1)(logits, labels, kl_logits=batch.kl_logits)
        with pytest.raises(ValueError, match="kl_logits must be None where beta is 0"):
            SPOLoss()(logits, labels, **samples)
        with pytest.raises(ValueError, match=r"kl_logits must hold at least one sequence, got \[0, 5, 31\]"):
            SPOLoss(beta=0.1)(logits, labels, **{name: value[:0] for name, value in samples.items()})
        with pytest.raises(
            ValueError, match=r"kl_logits must be \[S, T, V\], or \[N, V\] with kl_cu_seqlens, got \[5, 31\]"
        ):
            SPOLoss(beta=0.1)(logits, labels, **{name: value[0] for name, value in samples.items()})

    def test_a_step_moves_the_running_average_once(self) -> None:
        """The metrics hold the weights, so reading the weights takes no second call."""
        batch = Batch()
        module = SPOLoss(0.3, weight=SoftImportance(0.1, "ema"))
        _, metrics = module(batch.logits, batch.labels)
        assert module.importance.num_updates == 1
        assert torch.equal(metrics.mu, module.importance.eval()(metrics.chosen_logps, metrics.rejected_logps))

    def test_state_and_repr(self) -> None:
        assert set(SPOLoss(weight=SoftImportance(0.1, "ema")).state_dict()) == {
            "importance.running_mean",
            "importance.num_updates",
        }
        assert not SPOLoss(weight=0.1).state_dict()
        assert "gamma=0.1" in repr(SPOLoss(weight=0.1))
        assert "alpha=0.1" in repr(SPOLoss())

    @pytest.mark.parametrize("module", [SPOLoss, LinearSPOLoss])
    @pytest.mark.parametrize("prefix", ["", "loss."])
    def test_states_saved_under_the_earlier_name_load(self, prefix: str, module: Any) -> None:
        """The earlier name of the importance is weight."""
        target = module(weight=SoftImportance(0.1, "ema"))
        model = torch.nn.ModuleDict({"loss": target}) if prefix else target
        saved = {"weight.running_mean": torch.tensor(-7.0), "weight.num_updates": torch.tensor(3)}
        model.load_state_dict({prefix + name: tensor for name, tensor in saved.items()})
        assert (target.importance.running_mean, target.importance.num_updates) == (-7, 3)

    @pytest.mark.parametrize("module", [SPOLoss, LinearSPOLoss])
    def test_the_importance_goes_by_the_name_of_its_argument_too(self, module: Any) -> None:
        loss, importance = module(weight=0.1), SoftImportance(0.2)
        assert loss.weight is loss.importance
        loss.weight = importance
        assert loss.importance is importance
        assert [name for name, _ in loss.named_children()] == ["importance"]
        loss.weight = 0.3
        assert loss.importance.gamma == 0.3
        with pytest.raises(TypeError, match="weight must be a number gamma, a callable or None, got str"):
            loss.importance = "soft"


def spo_with(normalizer: str | Tensor | None = None, **options: Any) -> Callable[..., Tensor]:
    weight = None if normalizer is None else SoftImportance(0.1, normalizer)
    return lambda *logps: spo_loss(*logps, weight=weight, **options)[0]


class TestCompile:
    """fullgraph: no graph break, hence no value read back to the host."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: spo_with(),
            lambda: spo_with(alpha=0.0, kl=torch.ones(3), beta=0.1),
            lambda: spo_with("batch", alpha=0.3, center=True),
            lambda: spo_with("ema"),
            lambda: spo_with(torch.tensor(-30.0)),
            lambda: lambda *logps: dpo_loss(*logps, beta=0.2, label_smoothing=0.1)[0],
            lambda: lambda *logps: preference_loss("spo", *logps, alpha=0.2)[0],
        ],
        ids=["spo", "alpha0_kl", "centred_batch", "ema", "given", "dpo", "by_name"],
    )
    def test_losses(self, make: Callable[[], Callable[..., Tensor]]) -> None:
        torch.compiler.reset()  # all cases compile one function, whose recompilations are limited
        eager, compiled = make(), torch.compile(make(), backend="aot_eager", fullgraph=True)
        for p in (6, 3, 0):  # recompiled for another size, and for none
            logp_w, logp_l = pairs(p=p)
            references = pairs(p=p, seed=1)
            upstream = torch.linspace(-1, 1, p, dtype=torch.float64)
            results = []
            for loss in (eager, compiled):
                losses = loss(logp_w, logp_l, *references)
                results.append((losses, *torch.autograd.grad(losses, (logp_w, logp_l), upstream)))
            torch.testing.assert_close(results[0], results[1])

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_module(self, backend: str) -> None:
        batch = Batch()
        results = []
        for compiled in (False, True):
            importance = SoftImportance(0.1, "ema")
            module = SPOLoss(0.3, 0.05, importance, center=True)
            step = torch.compile(module, backend=backend, fullgraph=True) if compiled else module
            for _ in range(2):
                objective, metrics = step(batch.logits, batch.labels, **batch.samples())
            assert importance.num_updates == 2
            gradients = torch.autograd.grad(objective, (batch.logits, batch.kl_logits))
            results.append((objective, *gradients, *metrics, importance.running_mean))
        torch.testing.assert_close(results[0], results[1])
