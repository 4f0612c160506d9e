"""Log-probabilities and KL of models: from hidden states and heads where models give them, else from logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels import kl_loss, linear_kl_loss, linear_sequence_logps, linear_token_kl, sequence_logps, token_kl
from spo_train.protocol import Head, LanguageModel, ModelWithHead


class _Headed(NamedTuple):
    hidden: Callable[[Tensor], Tensor]
    head: Head

    def options(self) -> dict[str, Any]:
        return {"softcap": self.head.softcap, "logit_scale": self.head.logit_scale}


def _headed(model: LanguageModel) -> _Headed | None:
    if isinstance(model, ModelWithHead):
        head = model.head()
        if head is not None:
            return _Headed(model.hidden, head)
    return None


def response_logps(model: LanguageModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the sums [B] of the log-probabilities of labels [B, T] after tokens [B, T], in nats."""
    headed = _headed(model)
    if headed is None:
        return sequence_logps(model(tokens), labels, inplace_backward=torch.is_grad_enabled())
    hidden, (weight, bias, *_) = headed.hidden(tokens), headed.head
    return linear_sequence_logps(hidden, weight, labels, bias, vocab_size=model.vocab_size, **headed.options())


class KLToReference:
    """The exact KL of a policy to a reference of the same vocabulary.

    Attributes:
        from_heads: whether both models have heads. Then no logits are stored, and the reference's hidden states stand
            for its logits, which are V / H times as large.
    """

    def __init__(self, policy: LanguageModel, reference: LanguageModel) -> None:
        self._policy, self._reference = policy, reference
        self._policy_head, self._reference_head = _headed(policy), _headed(reference)
        self.from_heads = self._policy_head is not None and self._reference_head is not None

    @torch.no_grad()
    def reference_states(self, tokens: Tensor) -> Tensor:
        """Return what `loss` needs of the reference: its hidden states [B, T, H], or its logits [B, T, V]."""
        if self._policy_head is None or self._reference_head is None:
            return self._reference(tokens)
        return self._reference_head.hidden(tokens)

    def loss(self, tokens: Tensor, reference_states: Tensor, row_weight: Tensor) -> Tensor:
        """Return the KL of each token [B, T], summed with row_weight [B, T], in nats. Its backward runs once."""
        if self._policy_head is None or self._reference_head is None:
            return kl_loss(self._policy(tokens), reference_states, row_weight=row_weight, overwrite_logits=True)
        heads = self._heads(self._policy_head, self._reference_head)
        return linear_kl_loss(
            self._policy_head.hidden(tokens), ref_hidden=reference_states, row_weight=row_weight, **heads
        )

    def of_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the KL of each token [B, T], in nats; 0 where mask [B, T] is False."""
        if self._policy_head is None or self._reference_head is None:
            return token_kl(self._policy(tokens), self._reference(tokens), mask)
        heads = self._heads(self._policy_head, self._reference_head)
        hidden, ref_hidden = self._policy_head.hidden(tokens), self.reference_states(tokens)
        return linear_token_kl(hidden, ref_hidden=ref_hidden, mask=mask, **heads)

    def _heads(self, policy: _Headed, reference: _Headed) -> dict[str, Any]:
        head, ref_head = policy.head, reference.head
        return {
            "weight": head.weight,
            "bias": head.bias,
            "ref_weight": ref_head.weight.detach(),
            "ref_bias": None if ref_head.bias is None else ref_head.bias.detach(),
            "ref_softcap": math.inf if ref_head.softcap is None else ref_head.softcap,
            "ref_logit_scale": ref_head.logit_scale,
            "vocab_size": self._policy.vocab_size,
            **policy.options(),
        }
