"""Every public function and module, as functions of tensors: ours and the same in plain torch.

`FUNCTIONS` is the list. `tests/test_kinds.py` calls each of them in every kind of transform, context and compiler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import IGNORE
from torch import Tensor

import spo_kernels
from spo_kernels import LinearSPOLoss, PowerImportance, SoftImportance, SPOLoss, preference_loss, spo_loss
from spo_kernels.losses import LOSSES

V, H, REF_H = 9, 4, 3
kernels: Any = spo_kernels

OPTIONS: dict[str, Any] = {"softcap": 5.0, "logit_scale": -0.7}


class Sizes(NamedTuple):
    """Sequences of the batch (2P for modules), tokens of each, and sampled sequences."""

    sequences: int = 4
    tokens: int = 3
    samples: int = 2


Inputs = tuple[list[Tensor], list[Tensor]]  # leaves, which are differentiated, and constants


class Refusal(NamedTuple):
    kinds: tuple[str, ...]
    why: str  # in the table of docs/transforms.md
    message: str  # what the error must say


class PublicFunction(NamedTuple):
    """A call of a public function.

    ``call`` and ``truth`` take the leaves and then the constants, all tensors, and return one flat Tensor.
    """

    name: str
    call: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    inputs: Callable[[Sizes], Inputs]
    empty: Sequence[Sizes]  # sizes with an empty axis
    refusals: Sequence[Refusal] = ()
    flops: int = 0  # of the matrix products in a forward and a backward
    traced: bool = False  # by torch.compile within a transform too

    @property
    def refused(self) -> dict[str, Refusal]:
        """By the name of the kind."""
        refusals = (*self.refusals, *(() if self.traced else (COMPILED,)))
        return {kind: refusal for refusal in reversed(refusals) for kind in refusal.kinds}


def flat(*outputs: Tensor) -> Tensor:
    return torch.cat([output.flatten() for output in outputs])


# ---- plain torch


def transformed(logits: Tensor, temperature: Any = 1.0, softcap: Any = None, scale: float = 1.0) -> Tensor:
    z = scale * logits
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORE
    picked = logits.log_softmax(-1).gather(-1, labels.where(valid, 0)[..., None])[..., 0]
    return torch.where(valid, picked, 0)


def kl_of(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return torch.where(mask, (log_p.exp() * (log_p - ref_logits.log_softmax(-1))).sum(-1), 0)


def reverse_kl_of(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    return kl_of(ref_logits, logits, mask)


def jsd_of(logits: Tensor, ref_logits: Tensor, mask: Tensor, mixture: float = 0.5) -> Tensor:
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    log_m = (mixture * log_p.exp() + (1 - mixture) * log_q.exp()).log()
    return mixture * kl_of(log_p, log_m, mask) + (1 - mixture) * kl_of(log_q, log_m, mask)


def with_entropy_and_lse(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    both = -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)
    return flat(logps_of(logits, labels), *(torch.where(labels != IGNORE, x, 0) for x in both))


def packed_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    sums = [values[start:end].sum() for start, end in itertools.pairwise(bounds)]
    return torch.stack(sums) if sums else values.new_zeros(0) * values.sum()


def preference_of(logp_w: Tensor, logp_l: Tensor, mu: Any = 1.0, alpha: float = 0.1) -> Tensor:
    return -mu * F.logsigmoid(alpha * (logp_w - logp_l)) / alpha


def importance_of(logp_w: Tensor, logp_l: Tensor, gamma: float = 0.3) -> Tensor:
    scores = gamma * torch.logaddexp(logp_w.detach(), logp_l.detach())
    return torch.sigmoid(scores - scores.mean())


def power_importance_of(logp_w: Tensor, logp_l: Tensor, gamma: float = 0.3) -> Tensor:
    power = (logp_w.detach().exp() + logp_l.detach().exp()) ** gamma
    return power / power.mean()


def relative_of(w: Tensor, r: Tensor, rw: Tensor, rr: Tensor) -> Tensor:
    return (w - rw) - (r - rr)


def cost(x: Tensor) -> Tensor:
    """-log sigmoid(x)."""
    return (1 + (-x).exp()).log()


def odds_of(logp: Tensor) -> Tensor:
    return logp.exp() / (1 - logp.exp())


def losses_by_loops(w: Tensor, r: Tensor, rw: Tensor, rr: Tensor, closeness: Tensor) -> Tensor:
    """RPO at beta = 0.3 and temperature 0.5."""
    rows = [
        sum((cost(0.3 * row[j] * (w[i] - rw[i] - r[j] + rr[j])) for j in range(len(w))), 0 * w.sum()) / len(w)
        for i, row in enumerate((closeness / 0.5).exp() / (closeness / 0.5).exp().sum(1, keepdim=True))
    ]
    return torch.stack(rows) if rows else w.new_zeros(0) * w.sum()


# The rows of `LOSSES` in plain torch: of log-probs, references, and two [P] of numbers >= 1. `lengths` are those
# numbers, and `scores` are the first of them and 0.
PLAIN_LOSSES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "ipo": ({"tau": 0.2}, lambda w, r, rw, rr, n, m: (relative_of(w / n, r / m, rw / n, rr / m) - 2.5) ** 2),
    "odpo": ({"beta": 0.3}, lambda w, r, rw, rr, n, m: cost(0.3 * relative_of(w, r, rw, rr) - n.log())),
    "rdpo": (
        {"beta": 0.3, "flip": 0.2},
        lambda w, r, rw, rr, n, m: (
            (0.8 * cost(0.3 * relative_of(w, r, rw, rr)) - 0.2 * cost(-0.3 * relative_of(w, r, rw, rr))) / 0.6
        ),
    ),
    "cpo": ({"beta": 0.3}, lambda w, r, rw, rr, n, m: cost(0.3 * (w - r)) - w.sum() / n.sum().clamp(min=1)),
    "rpo": ({"beta": 0.3}, lambda w, r, rw, rr, n, m: losses_by_loops(w, r, rw, rr, (n[:, None] * m).cos())),
    "slic": ({"delta": 0.7}, lambda w, r, rw, rr, n, m: (0.7 * n - w + r).clamp(min=0) - 0.1 * w),
    "rso": ({"gamma": 0.6}, lambda w, r, rw, rr, n, m: (1 - 0.6 * relative_of(w, r, rw, rr)).clamp(min=0)),
    "simpo": ({}, lambda w, r, rw, rr, n, m: cost(2 * (w / n - r / m) - 1)),
    "orpo": ({}, lambda w, r, rw, rr, n, m: 0.1 * cost((odds_of(w / n) / odds_of(r / m)).log()) - w / n),
    "apo_zero": ({}, lambda w, r, rw, rr, n, m: 1 / (1 + (0.1 * (w - rw)).exp()) + 1 / (1 + (0.1 * (rr - r)).exp())),
}


def groups_of(logps: Tensor, cu_groups: Tensor) -> list[Tensor]:
    return [logps[start:end] for start, end in itertools.pairwise(cu_groups.tolist())]


def stage_of(logps: Tensor, alpha: float) -> Tensor:
    return -(logps[0] - (alpha * logps).exp().sum().log() / alpha)


def rankings_of(logps: Tensor, cu_groups: Tensor, mu: Tensor, alpha: float) -> Tensor:
    """Plackett-Luce over groups of logps [N], best first."""
    groups = groups_of(logps, cu_groups)
    losses = [sum((stage_of(group[i:], alpha) for i in range(len(group))), 0 * logps.sum()) for group in groups]
    return mu * torch.stack(losses) if losses else mu * logps.sum()


def best_of_groups(logps: Tensor, cu_groups: Tensor, alpha: float, gamma: float = 0.3) -> Tensor:
    """The first is the best of its group; with `SoftImportance` over groups of two and more."""
    groups = groups_of(logps, cu_groups)
    scores = [gamma * group.detach().exp().sum().log() for group in groups if len(group) > 1]
    mean = torch.stack(scores).mean() if scores else 0.0
    losses = [
        torch.sigmoid(gamma * group.detach().exp().sum().log() - mean) * stage_of(group, alpha)
        if len(group) > 1
        else 0 * logps.sum()
        for group in groups
    ]
    return torch.stack(losses) if losses else logps.new_zeros(0) * logps.sum()


def ids_of(logps: Tensor, cu_groups: Tensor) -> Tensor:
    return (torch.arange(len(logps))[:, None] >= cu_groups[1:]).sum(1)


def cringe_of(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    pairs, valid = len(labels) // 2, labels != IGNORE
    label = labels.where(valid, 0)[..., None]
    alternative = logits.scatter(-1, label, -torch.inf).amax(-1)
    contrast = torch.where(valid, cost(alternative - logits.gather(-1, label)[..., 0]), 0)[pairs:]
    counts = valid.sum(-1).clamp(min=1)
    ce = -logps_of(logits, labels)[:pairs]
    return ce.sum(-1) / counts[:pairs] + weight * contrast.sum(-1) / counts[pairs:]


def objective_of(logits: Tensor, labels: Tensor, kl: Tensor, weight: Any, nll_weight: float = 0.0) -> Tensor:
    """The modules' objective; kl is the mean over samples."""
    logps = logps_of(logits, labels).sum(-1)
    pairs = len(logps) // 2
    logp_w, logp_l = logps[:pairs], logps[pairs:]
    mu = 1.0 if weight is None else importance_of(logp_w, logp_l)
    losses = preference_of(logp_w, logp_l, mu)
    tokens = (labels[:pairs] != IGNORE).sum().clamp(min=1)
    return losses.sum() / max(pairs, 1) + 0.1 * kl - nll_weight * logp_w.sum() / tokens


# ---- inputs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def noise(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def some_labels(g: torch.Generator, *rows: int, high: int = V) -> Tensor:
    labels = torch.randint(0, high, rows, generator=g)
    labels.view(-1)[1::4] = IGNORE
    return labels


def some_mask(*rows: int) -> Tensor:
    mask = torch.ones(rows, dtype=torch.bool)
    mask.view(-1)[1::3] = False
    return mask


def of_rows(n: Sizes) -> Inputs:
    """Logits; labels, reference logits, mask, row weight, temperature."""
    g, rows = generator(), (n.sequences, n.tokens)
    constants = [some_labels(g, *rows, high=V - 2), noise(g, *rows, V), some_mask(*rows), noise(g, *rows)]
    return [noise(g, *rows, V)], [*constants, noise(g, *rows).exp()]


def of_packed_rows(n: Sizes) -> Inputs:
    """Logits; labels, cu_seqlens."""
    (logits,), (labels, *_) = of_rows(n)
    return [logits.flatten(0, 1)], [labels.flatten(), bounds_of(n)]


def bounds_of(n: Sizes) -> Tensor:
    """Sequences of different length, one empty, with as many rows as ``n`` has."""
    bounds = torch.arange(n.sequences + 1) * n.tokens
    bounds[1:-1:2] += n.tokens
    return bounds.clamp(max=n.sequences * n.tokens)


def of_head(n: Sizes) -> Inputs:
    """Hidden, weight, bias; labels, reference's hidden, weight, bias, mask, row weight, temperature."""
    g, rows = generator(), (n.sequences, n.tokens)
    reference = [noise(g, *rows, REF_H), noise(g, V, REF_H), noise(g, V)]
    constants = [some_labels(g, *rows, high=V - 2), *reference, some_mask(*rows), noise(g, *rows)]
    return [noise(g, *rows, H), noise(g, V, H), noise(g, V)], [*constants, noise(g, *rows).exp()]


def of_packed_head(n: Sizes) -> Inputs:
    (hidden, *head), (labels, *_) = of_head(n)
    return [hidden.flatten(0, 1), *head], [labels.flatten(), bounds_of(n)]


def of_pairs(n: Sizes) -> Inputs:
    """Log-probs chosen and rejected, KL of samples; references chosen and rejected, pair weights."""
    g, pairs = generator(), n.sequences
    constants = [noise(g, pairs), noise(g, pairs), noise(g, pairs).exp()]
    return [noise(g, pairs), noise(g, pairs), noise(g, max(n.samples, 1)).exp()], constants


def of_two(n: Sizes) -> Inputs:
    leaves, constants = of_pairs(n)
    return leaves[:2], constants


def of_losses(n: Sizes) -> Inputs:
    """Log-probs below 0 chosen and rejected; references chosen and rejected, and two of numbers >= 1."""
    leaves, (ref_w, ref_r, _) = of_pairs(n)
    more = [1 + noise(generator(), n.sequences).exp() for _ in range(2)]
    return [-1 - leaf.exp() for leaf in leaves[:2]], [ref_w, ref_r, *more]


def of_groups(n: Sizes) -> Inputs:
    """Log-probs of all responses; bounds of groups, weights of groups."""
    g = generator()
    return [noise(g, n.sequences * n.tokens)], [bounds_of(n), noise(g, n.sequences).exp()]


def of_module(n: Sizes) -> Inputs:
    """Logits, sampled logits; labels, the reference's sampled logits, mask."""
    g, rows, samples = generator(), (n.sequences, n.tokens), (n.samples, n.tokens)
    leaves = [noise(g, *rows, V), noise(g, *samples, V)]
    return leaves, [some_labels(g, *rows), noise(g, *samples, V), some_mask(*samples)]


def of_linear_module(n: Sizes) -> Inputs:
    """Hidden, weight, bias, sampled hidden; labels, the reference's sampled hidden, weight, mask."""
    g, rows, samples = generator(), (n.sequences, n.tokens), (n.samples, n.tokens)
    leaves = [noise(g, *rows, H), noise(g, V, H), noise(g, V), noise(g, *samples, H)]
    constants = [some_labels(g, *rows), noise(g, *samples, REF_H), noise(g, V, REF_H), some_mask(*samples)]
    return leaves, constants


# ---- the modules


def spo_module(**options: Any) -> Callable[..., Tensor]:
    loss = SPOLoss(beta=0.1, **options)

    def call(logits: Tensor, kl_logits: Tensor, labels: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        return loss(logits, labels, kl_logits=kl_logits, kl_ref_logits=ref, kl_mask=mask)[0][None]

    return call


def spo_module_truth(
    logits: Tensor, kl_logits: Tensor, labels: Tensor, ref: Tensor, mask: Tensor, weight: Any
) -> Tensor:
    return objective_of(logits, labels, kl_of(kl_logits, ref, mask).sum() / len(ref), weight)[None]


def linear_module(**options: Any) -> Callable[..., Tensor]:
    loss = LinearSPOLoss(beta=0.1, nll_weight=0.2, **options)

    def call(*inputs: Tensor) -> Tensor:
        hidden, weight, bias, kl_hidden, labels, ref_hidden, ref_weight, mask = inputs
        kl = {"kl_hidden": kl_hidden, "kl_ref_hidden": ref_hidden, "kl_ref_weight": ref_weight, "kl_mask": mask}
        return loss(hidden, weight, labels, bias, **kl)[0][None]

    return call


def linear_module_truth(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    kl_hidden: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor,
    importance: Any,
) -> Tensor:
    kl = kl_of(F.linear(kl_hidden, weight, bias), ref_hidden @ ref_weight.mT, mask).sum() / len(ref_hidden)
    return objective_of(F.linear(hidden, weight, bias), labels, kl, importance, 0.2)[None]


# ---- the list

NO_ROWS = (Sizes(4, 0), Sizes(0, 3), Sizes(0, 0))
NO_PAIRS = (Sizes(0, 3), Sizes(4, 0), Sizes(0, 0))

FORWARD_MODE = ("forward-mode AD", "jvp", "jacfwd", "hessian")
TRANSFORMS = (*FORWARD_MODE, "forward-mode AD of constants", "grad", "vmap", "vmap in part", "vmap(grad)", "jacrev")
COMPUTE_LOGITS = "compute the logits and call the function that takes them"

COMPILED = Refusal(
    ("compile of grad",), "fullgraph", "torch.compile cannot trace .* call the transformed function outside"
)
OF_CONSTANTS = Refusal(
    ("forward-mode AD of constants",),
    "constant",
    r"reference logits or a temperature have a tangent of forward-mode AD: use \.detach",
)


def in_place(option: str) -> tuple[Refusal, ...]:
    return (
        Refusal(TRANSFORMS, "in place", rf"{option}.* under torch\.func transforms .*leave the option out"),
        Refusal(("double backward",), "in place", rf"{option}.* differentiated again .*: leave the option out"),
        Refusal(("backward twice",), "in place", rf"{option}.* can run only once: .*leave the option out"),
    )


def only_once(call: str, instead: str) -> tuple[Refusal, ...]:
    """Of functions that compute the gradient in the forward."""
    return (
        Refusal(("backward twice",), "once", rf"{call} can run backward only once: .*{instead}"),
        Refusal(("double backward",), "once", rf"{call}.* differentiated again \(double backward\): .*{instead}"),
    )


def of_a_head(call: str, *, constants: bool = False) -> tuple[Refusal, ...]:
    """constants: whether the call has a reference or a temperature."""
    again = ("double backward", "hessian")
    return (
        Refusal(again, "head", rf"{call}.* differentiated again \(double backward\): {COMPUTE_LOGITS}"),
        *((OF_CONSTANTS,) if constants else ()),
    )


def linear(leaves: tuple[Tensor, ...]) -> Tensor:
    return F.linear(*leaves[:3])


def loss_by_name(name: str) -> PublicFunction:
    options, truth = PLAIN_LOSSES[name]
    takes = LOSSES[name].options

    def call(w: Tensor, r: Tensor, rw: Tensor, rr: Tensor, n: Tensor, m: Tensor) -> Tensor:
        given = dict(options)
        if "lengths" in takes:
            given["lengths"] = (n, m)
        if "scores" in takes:
            given["scores"] = (n, 0 * n)
        if "similarity" in takes:
            given["similarity"] = (n[:, None] * m).cos()
        return preference_loss(name, w, r, rw, rr, **given)[0]

    return PublicFunction(f'preference_loss("{name}")', call, truth, of_losses, NO_PAIRS, traced=name != "odpo")


IMPORTANCE = SoftImportance(0.3)
POWER = PowerImportance(0.3)
IN_PLACE = spo_module(inplace_backward=True)
ROWS = 2 * Sizes().sequences * Sizes().tokens * V  # flops of all rows, for each element of a hidden state
SAMPLED_ROWS = 2 * Sizes().samples * Sizes().tokens * V

FUNCTIONS = [
    PublicFunction(
        "token_logps",
        lambda z, y, *_: flat(kernels.token_logps(z, y)),
        lambda z, y, *_: flat(logps_of(z, y)),
        of_rows,
        NO_ROWS,
    ),
    PublicFunction(
        "token_logps, all options",
        lambda z, y, r, m, w, t: flat(
            *kernels.token_logps(z, y, temperature=t, vocab_size=V - 1, return_entropy=True, return_lse=True, **OPTIONS)
        ),
        lambda z, y, r, m, w, t: with_entropy_and_lse(transformed(z[..., : V - 1], t, 5.0, -0.7), y),
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        "token_logps, inplace_backward",
        lambda z, y, *_: flat(kernels.token_logps(z * 1, y, inplace_backward=True)),
        lambda z, y, *_: flat(logps_of(z, y)),
        of_rows,
        NO_ROWS,
        in_place("inplace_backward"),
    ),
    PublicFunction(
        "sequence_logps",
        lambda z, y, *_: kernels.sequence_logps(z, y),
        lambda z, y, *_: logps_of(z, y).sum(-1),
        of_rows,
        NO_ROWS,
    ),
    PublicFunction(
        "sequence_logps, cu_seqlens",
        lambda z, y, cu: kernels.sequence_logps(z, y, cu_seqlens=cu),
        lambda z, y, cu: packed_sums(logps_of(z, y), cu),
        of_packed_rows,
        NO_ROWS,
    ),
    PublicFunction(
        "get_batch_logps",
        lambda z, y, *_: kernels.get_batch_logps(z, y, average_log_prob=True),
        lambda z, y, *_: logps_of(z[:, :-1], y[:, 1:]).sum(-1) / (y[:, 1:] != IGNORE).sum(-1).clamp(min=1),
        of_rows,
        NO_ROWS,
    ),
    PublicFunction(
        "token_kl",
        lambda z, y, r, m, *_: flat(kernels.token_kl(z, r, m)),
        lambda z, y, r, m, *_: flat(kl_of(z, r, m)),
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        'token_kl, divergence="reverse_kl"',
        lambda z, y, r, m, *_: flat(kernels.token_kl(z, r, m, divergence="reverse_kl")),
        lambda z, y, r, m, *_: flat(reverse_kl_of(z, r, m)),
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        'token_kl, divergence="jsd"',
        lambda z, y, r, m, *_: flat(kernels.token_kl(z, r, m, divergence="jsd", mixture=0.3)),
        lambda z, y, r, m, *_: flat(jsd_of(z, r, m, 0.3)),
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        "token_logps_kl",
        lambda z, y, r, m, w, t: flat(*kernels.token_logps_kl(z, y, r, m, temperature=t, ref_temperature=2.0)),
        lambda z, y, r, m, w, t: flat(logps_of(transformed(z, t), y), kl_of(transformed(z, t), r / 2, m)),
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        "kl_loss",
        lambda z, y, r, m, w, *_: kernels.kl_loss(z, r, m, row_weight=w)[None],
        lambda z, y, r, m, w, *_: (kl_of(z, r, m) * w).sum()[None],
        of_rows,
        NO_ROWS,
        (OF_CONSTANTS, *only_once("kl_loss", "token_kl")),
    ),
    PublicFunction(
        "kl_loss, overwrite_logits",
        lambda z, y, r, m, w, *_: kernels.kl_loss(z * 1, r, m, row_weight=w, overwrite_logits=True)[None],
        lambda z, y, r, m, w, *_: (kl_of(z, r, m) * w).sum()[None],
        of_rows,
        NO_ROWS,
        (*only_once("kl_loss", "token_kl"), *in_place("overwrite_logits")),
    ),
    PublicFunction(
        "linear_token_logps",
        lambda h, w, b, y, *_: flat(kernels.linear_token_logps(h, w, y, b)),
        lambda *x: flat(logps_of(linear(x), x[3])),
        of_head,
        NO_ROWS,
        of_a_head("linear_token_logps"),
        flops=ROWS * 4 * H,
    ),
    PublicFunction(
        "linear_token_logps, all options",
        lambda h, w, b, y, rh, rw, rb, m, u, t: flat(
            *kernels.linear_token_logps(
                h, w, y, b, temperature=t, vocab_size=V - 1, return_entropy=True, return_lse=True, **OPTIONS
            )
        ),
        lambda *x: with_entropy_and_lse(transformed(linear(x)[..., : V - 1], x[-1], 5.0, -0.7), x[3]),
        of_head,
        NO_ROWS,
        of_a_head("linear_token_logps", constants=True),
        flops=ROWS * 4 * H,
    ),
    PublicFunction(
        "linear_sequence_logps",
        lambda h, w, b, y, *_: kernels.linear_sequence_logps(h, w, y, b),
        lambda *x: logps_of(linear(x), x[3]).sum(-1),
        of_head,
        NO_ROWS,
        of_a_head("linear_sequence_logps"),
        flops=ROWS * 4 * H,
    ),
    PublicFunction(
        "linear_sequence_logps, cu_seqlens",
        lambda h, w, b, y, cu: kernels.linear_sequence_logps(h, w, y, b, cu_seqlens=cu),
        lambda *x: packed_sums(logps_of(linear(x), x[3]), x[4]),
        of_packed_head,
        NO_ROWS,
        of_a_head("linear_sequence_logps"),
        flops=ROWS * 4 * H,
    ),
    PublicFunction(
        "linear_token_kl",
        lambda h, w, b, y, rh, rw, rb, m, *_: flat(kernels.linear_token_kl(h, w, rh, rw, m, b, rb)),
        lambda *x: flat(kl_of(linear(x), linear(x[4:]), x[7])),
        of_head,
        NO_ROWS,
        of_a_head("linear_token_kl", constants=True),
        flops=ROWS * (4 * H + 2 * REF_H),
    ),
    PublicFunction(
        'linear_token_kl, divergence="jsd"',
        lambda h, w, b, y, rh, rw, rb, m, *_: flat(kernels.linear_token_kl(h, w, rh, rw, m, b, rb, divergence="jsd")),
        lambda *x: flat(jsd_of(linear(x), linear(x[4:]), x[7])),
        of_head,
        NO_ROWS,
        of_a_head("linear_token_kl", constants=True),
        flops=ROWS * (4 * H + 2 * REF_H),
    ),
    PublicFunction(
        "linear_kl_loss",
        lambda h, w, b, y, rh, rw, rb, m, u, *_: kernels.linear_kl_loss(h, w, rh, rw, m, b, rb, row_weight=u)[None],
        lambda *x: (kl_of(linear(x), linear(x[4:]), x[7]) * x[8]).sum()[None],
        of_head,
        NO_ROWS,
        (*of_a_head("linear_kl_loss", constants=True), *only_once("linear_kl_loss", "linear_token_kl")),
        flops=ROWS * (3 * H + REF_H),
    ),
    PublicFunction(
        "spo_loss",
        lambda w, r, k, rw, rr, mu: spo_loss(w, r, rw, rr, weight=mu, kl=k, beta=0.2)[0],
        lambda w, r, k, rw, rr, mu: preference_of(w, r, mu) + 0.2 * k.mean(),
        of_pairs,
        NO_PAIRS,
    ),
    PublicFunction(
        "spo_loss, SoftImportance",
        lambda w, r, *_: spo_loss(w, r, weight=IMPORTANCE)[0],
        lambda w, r, *_: preference_of(w, r, importance_of(w, r)),
        of_two,
        NO_PAIRS,
    ),
    PublicFunction(
        'preference_loss("spo")',
        lambda w, r, *_: preference_loss("spo", w, r, alpha=0.4, center=True)[0],
        lambda w, r, *_: preference_of(w, r, 1, 0.4) - torch.tensor(2.0, dtype=torch.float64).log() / 0.4,
        of_two,
        NO_PAIRS,
    ),
    PublicFunction(
        'preference_loss("dpo")',
        lambda w, r, rw, rr, *_: preference_loss("dpo", w, r, rw, rr, beta=0.3, label_smoothing=0.1)[0],
        lambda w, r, rw, rr, *_: 0.1 * 0.3 * (w - r - rw + rr) - F.logsigmoid(0.3 * (w - r - rw + rr)),
        of_two,
        NO_PAIRS,
        traced=True,
    ),
    *[loss_by_name(name) for name in ("ipo", "odpo", "rdpo", "cpo", "rpo", "slic", "rso", "simpo", "orpo", "apo_zero")],
    PublicFunction(
        "spo_ranking_loss, cu_groups",
        lambda x, cu, mu: kernels.spo_ranking_loss(x, cu, alpha=0.4, weight=mu),
        lambda x, cu, mu: rankings_of(x, cu, mu, 0.4),
        of_groups,
        NO_PAIRS,
    ),
    PublicFunction(
        'spo_ranking_loss, group_ids, kind="best_of_n"',
        lambda x, cu, mu: kernels.spo_ranking_loss(
            x, group_ids=ids_of(x, cu), num_groups=len(mu), kind="best_of_n", alpha=0.4, weight=IMPORTANCE
        ),
        lambda x, cu, mu: best_of_groups(x, cu, 0.4),
        of_groups,
        NO_PAIRS,
    ),
    PublicFunction(
        "cringe_loss",
        lambda z, y, *_: kernels.cringe_loss(z, y, weight=0.7, reduction="none"),
        lambda z, y, *_: cringe_of(z, y, 0.7),
        of_rows,
        NO_ROWS,
    ),
    PublicFunction(
        "reward_model_loss",
        lambda w, r, *_: kernels.reward_model_loss(w, r),
        lambda w, r, *_: (1 + (r - w).exp()).log(),
        of_two,
        NO_PAIRS,
        traced=True,
    ),
    PublicFunction(
        "PowerImportance",
        lambda w, r, *_: POWER(w, r),
        lambda w, r, *_: power_importance_of(w, r),
        of_two,
        NO_PAIRS,
        traced=True,
    ),
    PublicFunction(
        "SoftImportance",
        lambda w, r, *_: IMPORTANCE(w, r),
        lambda w, r, *_: importance_of(w, r),
        of_two,
        NO_PAIRS,
        traced=True,
    ),
    PublicFunction(
        "SPOLoss",
        spo_module(weight=0.3),
        lambda *x: spo_module_truth(*x, 0.3),
        of_module,
        NO_PAIRS,
        (OF_CONSTANTS,),
    ),
    PublicFunction(
        "SPOLoss, inplace_backward",
        lambda z, k, *x: IN_PLACE(z * 1, k * 1, *x),
        lambda *x: spo_module_truth(*x, None),
        of_module,
        NO_PAIRS,
        in_place("inplace_backward"),
    ),
    PublicFunction(
        'LinearSPOLoss, route "auto"',
        linear_module(route="auto"),
        lambda *x: linear_module_truth(*x, None),
        of_linear_module,
        NO_PAIRS,
        (
            *of_a_head("LinearSPOLoss", constants=True),
            *only_once("(LinearSPOLoss|linear_kl_loss).*", 'route "recompute"'),
        ),
        flops=(ROWS + SAMPLED_ROWS) * 3 * H + SAMPLED_ROWS * REF_H,
    ),
    PublicFunction(
        'LinearSPOLoss, route "recompute"',
        linear_module(route="recompute", weight=0.3),
        lambda *x: linear_module_truth(*x, 0.3),
        of_linear_module,
        NO_PAIRS,
        of_a_head("LinearSPOLoss", constants=True),
        flops=(ROWS + SAMPLED_ROWS) * 4 * H + 2 * SAMPLED_ROWS * REF_H,
    ),
]
