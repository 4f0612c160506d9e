"""The Cringe loss against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spo_kernels import cringe_loss

P, T, V = 3, 5, 11


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2 * P, T, V, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2 * P, T), generator=g)
    labels[P, 0] = logits[P, 0].argmax()  # a label that is the most likely token, and one that is not
    labels[P + 1, 0] = logits[P + 1, 0].argmin()
    labels[:, -1] = -100
    labels[2, 2:] = -100
    return logits, labels


def by_loops(logits: Tensor, labels: Tensor, weight: float, alternatives: Tensor | None = None) -> list[float]:
    losses = []
    for p in range(P):
        ce, cr = [], []
        for t in range(T):
            row, label = logits[p, t].tolist(), labels[p, t].item()
            if label >= 0:
                ce.append(math.log(sum(map(math.exp, row))) - row[label])
            row, label = logits[P + p, t].tolist(), labels[P + p, t].item()
            if label >= 0:
                others = [z for v, z in enumerate(row) if v != label]
                z = max(others) if alternatives is None else row[alternatives[p, t]]
                cr.append(-math.log(math.exp(z) / (math.exp(z) + math.exp(row[label]))))
        losses.append(sum(ce) / max(len(ce), 1) + weight * sum(cr) / max(len(cr), 1))
    return losses


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_values(weight: float) -> None:
    logits, labels = batch()
    losses = cringe_loss(logits, labels, weight=weight, reduction="none")
    assert losses.tolist() == pytest.approx(by_loops(logits, labels, weight), rel=1e-12)
    torch.testing.assert_close(cringe_loss(logits, labels, weight=weight), losses.mean())
    torch.testing.assert_close(cringe_loss(logits, labels, weight=weight, reduction="sum"), losses.sum())
    gate = torch.tensor([0.2, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    gated = cringe_loss(logits, labels, weight=weight, gate=gate, reduction="none")
    torch.testing.assert_close(gated, gate * losses)
    torch.testing.assert_close(torch.autograd.grad(gated.sum(), gate)[0], losses.detach())


def test_given_alternatives() -> None:
    logits, labels = batch()
    alternatives = (labels[P:].clamp(min=0) + 3) % V
    losses = cringe_loss(logits, labels, alternatives=alternatives, reduction="none")
    assert losses.tolist() == pytest.approx(by_loops(logits, labels, 1.0, alternatives), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: cringe_loss(z, labels, alternatives=alternatives), logits)


def test_a_rejected_row_has_a_gradient_at_two_entries() -> None:
    logits, labels = batch()
    (gradient,) = torch.autograd.grad(cringe_loss(logits, labels), logits)
    read = labels[P:] >= 0
    assert (gradient[P:] != 0).sum(-1).tolist() == (2 * read).tolist()
    torch.testing.assert_close(gradient[P:].sum(-1), torch.zeros(P, T, dtype=torch.float64))


def test_alternatives_are_drawn_from_the_softmax_of_the_likeliest() -> None:
    """Chi-square over 3 alternatives, 2 degrees of freedom: 1 in 10,000 draws of the seed would exceed 18.4."""
    row = torch.tensor([0.0, 1.0, 2.0, 0.5, -3.0], dtype=torch.float64)
    rows = 20000
    for label, likeliest in ((2, [1, 3, 0]), (4, [2, 1, 3])):
        logits = row.expand(2, rows, 5).clone().requires_grad_()
        labels = torch.full((2, rows), label)
        generator = torch.Generator().manual_seed(0)
        loss = cringe_loss(logits, labels, k=3, generator=generator, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        drawn = (gradient[1] < 0).sum(0)
        assert drawn.sum() == rows
        expected = rows * row[likeliest].softmax(0)
        assert drawn[likeliest].sum() == rows
        assert ((drawn[likeliest] - expected) ** 2 / expected).sum() < 18.4


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_rows_are_not_read(poison: float) -> None:
    logits, labels = batch()
    expected = cringe_loss(logits, labels)
    poisoned = torch.where((labels >= 0)[..., None], logits.detach(), poison).requires_grad_()
    loss = cringe_loss(poisoned, labels)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    assert torch.equal(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cringe_loss(logits, labels, k=1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cringe_loss(logits.double(), labels).item(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, T, V)}, r"logits must be \[2P, T, V\], P chosen and .*, got \[3, 5, 11\]"),
        ({"labels": torch.zeros(4, T)}, r"labels must be \[4, 5\] int64, got \[4, 5\] float32"),
        ({"k": 0}, "k must be an integer >= 1 and < V = 11, got 0"),
        ({"k": V}, "k must be an integer >= 1 and < V = 11, got 11"),
        ({"weight": -1}, "weight must be >= 0"),
        ({"gate": torch.ones(4)}, r"gate must be floating \[P\] = \[2\] on cpu, got \[4\]"),
        ({"alternatives": torch.zeros(4, T).long()}, r"alternatives must be \[2, 5\] int64, got \[4, 5\] int64"),
        ({"alternatives": torch.zeros(2, T).long(), "k": 2}, "k and generator must be left out with alternatives"),
        ({"reduction": "batch"}, "reduction must be one of none, mean, sum"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(4, T, V), "labels": torch.zeros(4, T, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        cringe_loss(**{**arguments, **change})
