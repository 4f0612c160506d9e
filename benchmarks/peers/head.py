"""The providers of the head: losses from hidden states and a weight. `PROVIDERS` has them by loss.

Two losses: ``pairs`` is SPO's loss of 2P sequences (eq. 8 with uniform weights), ``kl`` the sum of every token's exact
KL to a reference head. Every provider computes the same scalar, and its gradients with respect to hidden states and
weight, with one exception: PyTorch's chunked linear cross-entropy has no per-token result. It computes a plain sum of
log-probs, which takes the same matrix products, without pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks.peers import eager

_ALPHA = 0.1


class Inputs(NamedTuple):
    """hidden and weight are leaves."""

    hidden: Tensor  # [2P, T, H], chosen then rejected
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T]
    ref_hidden: Tensor  # [2P, T, H]
    ref_weight: Tensor  # [V, H]


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    loss: Loss
    units: int  # matrix work of forward and backward, in products of 2 N H V operations
    ours: bool = False
    compiled: bool = False
    pairs: bool = True  # False: a sum over tokens
    half_only: bool = False  # in float32 it is the same as another provider
    backward_only: bool = False  # without gradients it is the same as another provider


def _pair_loss(token_logps: Tensor) -> Tensor:
    logp_w, logp_l = token_logps.sum(-1).chunk(2)
    return -F.logsigmoid(_ALPHA * (logp_w - logp_l)).mean() / _ALPHA


def eager_pairs(x: Inputs) -> Tensor:
    return _pair_loss(eager.token_logps(F.linear(x.hidden, x.weight), x.labels))


def eager_pairs_float(x: Inputs) -> Tensor:
    return _pair_loss(eager.token_logps(F.linear(x.hidden, x.weight).float(), x.labels))


def eager_kl(x: Inputs) -> Tensor:
    return eager.kl_terms(F.linear(x.hidden, x.weight), F.linear(x.ref_hidden, x.ref_weight)).sum()


def eager_kl_float(x: Inputs) -> Tensor:
    return eager.kl_terms(F.linear(x.hidden, x.weight).float(), F.linear(x.ref_hidden, x.ref_weight).float()).sum()


def cross_entropy(x: Inputs) -> Tensor:
    logits = F.linear(x.hidden, x.weight).flatten(0, 1)
    return _pair_loss(-F.cross_entropy(logits, x.labels.flatten(), reduction="none").view(x.labels.shape))


def chunked_nll(x: Inputs) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it cannot work in chunks and stores the logits instead
        return F.linear_cross_entropy(
            x.hidden.flatten(0, 1),
            x.weight,
            x.labels.flatten(),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )


def liger(x: Inputs) -> Tensor:
    """Liger's DPO loss without a reference, which is eq. 8 times alpha.

    It works on one pair at a time, computes the gradients in the forward, and compiles its inner loop.
    """
    dpo = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss: Tensor = dpo(beta=_ALPHA, use_ref_model=False, compute_nll_loss=False)(x.weight, x.hidden, x.labels)[0]
    return loss / _ALPHA


def cut_cross_entropy(x: Inputs) -> Tensor:
    """The package's implementation for devices without Triton: compiled, and it stores the logits."""
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    labels = x.labels.flatten()
    nll = linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, labels, impl="torch_compile", reduction="none")
    return _pair_loss(-nll.view(x.labels.shape))


def trl(x: Inputs) -> Tensor:
    """TRL's chunked log-probs with the tiles of its trainers, 4096 rows by 32768 columns. Recomputes the logits."""
    chunked = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    logps = chunked.apply(x.hidden.flatten(0, 1), x.weight, None, x.labels.flatten(), 1.0, 32768, None, 1.0, ())[0]
    return _pair_loss(logps.view(x.labels.shape))


def trl_kl(x: Inputs) -> Tensor:
    """TRL's generalized divergence at beta = 1, the KL from student to teacher."""
    chunked = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    student, teacher = x.hidden.flatten(0, 1), x.ref_hidden.flatten(0, 1)
    divergence: Tensor = chunked.apply(student, x.weight, None, teacher, x.ref_weight, None, 1.0)[0]
    return divergence.sum()


def _our_pairs(route: str) -> Loss:
    loss = spo_kernels.LinearSPOLoss(_ALPHA, route=route)
    return lambda x: loss(x.hidden, x.weight, x.labels)[0]


def _our_kl_loss(x: Inputs) -> Tensor:
    return spo_kernels.linear_kl_loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight)


def _our_token_kl(x: Inputs) -> Tensor:
    return spo_kernels.linear_token_kl(x.hidden, x.weight, x.ref_hidden, x.ref_weight).sum()


# By loss, then by name. Forward and backward of the pair loss take three products if the logits are kept or the forward
# computes the gradients, and four if the backward recomputes the logits. The KL has a second head, which gets no
# gradient: it takes four products, or six.
PROVIDERS: dict[str, dict[str, Provider]] = {
    "pairs": {
        "recompute_free": Provider(_our_pairs("recompute_free"), 3, ours=True, backward_only=True),
        "recompute": Provider(_our_pairs("recompute"), 4, ours=True),
        "eager": Provider(eager_pairs, 3),
        "eager_float": Provider(eager_pairs_float, 3, half_only=True),
        "cross_entropy": Provider(cross_entropy, 3),
        "compile": Provider(eager_pairs_float, 3, compiled=True),
        **({"chunked_nll": Provider(chunked_nll, 3, pairs=False)} if hasattr(F, "linear_cross_entropy") else {}),
        **({"liger": Provider(liger, 3)} if find_spec("liger_kernel") else {}),
        **({"cut_cross_entropy": Provider(cut_cross_entropy, 3)} if find_spec("cut_cross_entropy") else {}),
        **({"trl": Provider(trl, 4)} if find_spec("trl") else {}),
    },
    "kl": {
        "recompute_free": Provider(_our_kl_loss, 4, ours=True, pairs=False, backward_only=True),
        "recompute": Provider(_our_token_kl, 6, ours=True, pairs=False),
        "eager": Provider(eager_kl, 4, pairs=False),
        "eager_float": Provider(eager_kl_float, 4, half_only=True, pairs=False),
        "compile": Provider(eager_kl_float, 4, compiled=True, pairs=False),
        **({"trl": Provider(trl_kl, 6, pairs=False)} if find_spec("trl") else {}),
    },
}
FORWARD_UNITS = {"pairs": 1, "kl": 2}
NAMES = tuple(dict.fromkeys(name for providers in PROVIDERS.values() for name in providers))
OURS = {name for providers in PROVIDERS.values() for name, provider in providers.items() if provider.ours}
EAGER = ("eager", "eager_float")
