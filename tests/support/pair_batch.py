"""Pairs with the plain formulas beside them, to compare what a trainer gets from the library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.1  # the default of spo_loss, because projects pass no alpha

Triple = tuple[Tensor, Tensor, Tensor]  # loss [] or [P], chosen and rejected rewards [P]


class Batch:
    """Logits and labels of P pairs, chosen first, and log-probs of a reference; the plain formulas beside them."""

    def __init__(self, pairs: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pairs = pairs
        self.logits = (3 * torch.randn(2 * pairs, 7, 11, generator=generator)).requires_grad_()
        self.labels = torch.randint(11, (2 * pairs, 7), generator=generator)
        self.labels[:, :3] = -100  # prompts
        self.labels[1, 5:] = -100  # padding
        self.references = tuple(-10 + torch.randn(2, pairs, generator=generator))

    def token_logps(self) -> Tensor:
        """[2P, T - 1], 0 where a label is ignored."""
        labels = self.labels[:, 1:]
        picked = self.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return picked * (labels != -100)

    def split(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        return logps[: self.pairs], logps[self.pairs :]

    def policy(self) -> tuple[Tensor, Tensor]:
        """Log-probs [P] of chosen and of rejected, as a project computes them without a function of ours."""
        return self.split(self.token_logps().sum(-1))

    def spo(self) -> Triple:
        chosen, rejected = self.policy()
        losses = -F.logsigmoid(ALPHA * (chosen - rejected)) / ALPHA
        chosen_rewards, rejected_rewards = (
            ALPHA * (policy - reference).detach()
            for policy, reference in zip((chosen, rejected), self.references, strict=True)
        )
        return losses.mean(), chosen_rewards, rejected_rewards

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits)[0]

    def check(self, result: Triple, *, center: bool = False, references: bool = True) -> None:
        """Compare the values that a project got, and their gradient, with the plain formulas.

        center: the loss is without the constant log(2)/alpha. references: the rewards subtract the reference's.
        """
        loss, *rewards = result
        expected, *expected_rewards = self.spo()
        if center:
            expected = expected - math.log(2) / ALPHA
        if not references:
            expected_rewards = [ALPHA * logps.detach() for logps in self.policy()]
        torch.testing.assert_close(self.gradient(loss), self.gradient(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([loss.detach(), *rewards], [expected.detach(), *expected_rewards])
        assert not any(reward.requires_grad for reward in rewards)


def counts(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != -100).sum(-1)
