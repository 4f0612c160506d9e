"""LinearSPOLoss on both routes, against SPOLoss of the logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    ROUTE,
    Inputs,
    Options,
    all_near,
    differentiate,
    kl_arguments,
    logits_of,
    near,
    objective_of,
    pair_inputs,
    set_tile_sizes,
)
from oracle import HALF_DTYPES, IGNORE, assert_close
from torch import Tensor

from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
)


def half_ulp_of_the_largest(x: Tensor, dtype: torch.dtype) -> float:
    return 0.5 * torch.finfo(dtype).eps * x.abs().max().item()


class HalvedImportance(SoftImportance):
    """A subclass that changes the weights, so the head must call its forward."""

    def forward(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        return 0.5 * super().forward(logp_w, logp_l)


def test_a_subclass_of_soft_importance_is_asked_for_its_weights() -> None:
    x, halved = pair_inputs(), HalvedImportance(0.1, -1.0)
    values = [
        differentiate(lambda h, w, r=route: LinearSPOLoss(weight=halved, route=r)(h, w, x.labels)[0], x.policy[:2])
        for route in ("recompute", "auto")
    ]
    all_near(*values)
    with pytest.raises(ValueError, match='route "recompute_free" needs pair weights that a pair determines'):
        LinearSPOLoss(weight=halved, route="recompute_free")(x.hidden.requires_grad_(), x.weight, x.labels)


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
    """Hidden states are one-hot, so a logit is an entry of the weight, whatever the shape of the product."""
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


def test_the_kl_of_many_tiles_is_summed_in_float64() -> None:
    """With 20000 tiles of one row, a float32 sum would be off by thousands of roundings."""
    n, v = 20000, 4
    weight, ref_weight = torch.eye(v), torch.eye(v).roll(1, 0)
    hidden = 3 * torch.eye(v)[torch.randint(0, v, (n,))]
    loss = linear_kl_loss(hidden.requires_grad_(), weight, hidden.detach(), ref_weight, chunk_size=1)
    rows = linear_token_kl(hidden, weight, hidden.detach(), ref_weight).detach()
    torch.testing.assert_close(loss.detach(), rows.double().sum().float(), rtol=2e-7, atol=0)


@ROUTE
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_pair_of_weight_zero_is_not_read(route: str, layout: str, average: bool, poison: float) -> None:
    """Loss and gradients equal those of a batch in which the pair's rows are ignored. P still counts the pair."""
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
    """The forward reads the rows, because a callable gives the weights only afterwards. The backward does not."""
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
    """Ignored rows, masked rows, rows of weight 0, and rows whose upstream gradient is 0."""
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


@pytest.mark.parametrize("route", ["recompute", "auto"])
def test_float16_gradients_get_their_loss_scale_before_they_are_rounded(route: str, native: bool) -> None:
    """With a gradient scaler: the gradient is far below float16's range, but within it after the upstream scale."""
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
        # The pair loss and the KL share these leaves. Autograd adds their gradients, each rounded to half precision.
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
