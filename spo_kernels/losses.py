"""Losses over preference pairs: what happens between per-sequence log-probs and the scalar that is minimized.

P pairs, S sampled sequences, L_w and L_l the summed log-probs (nats) of the chosen and the rejected response,
D = L_w - L_l. Everything here is [P]-sized plain torch, shared by every backend; the vocabulary-wide work is in
`spo_kernels.functional`. A loss is one row of `LOSSES`; none of them enters a kernel.

Log-probs of -inf are legal and follow the equations: an impossible chosen response makes SPO's loss +inf, an impossible
rejected one makes it 0 (-log(2)/alpha when centred), both at once make D, the loss and the gradient NaN.

A pair of weight 0 is not read: whatever its log-probs are, NaN included, its loss and its gradient are 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_kernels.functional import sequence_logps, token_kl

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LOSSES", "SPOLoss", "SPOMetrics", "SoftImportance", "dpo_loss", "preference_loss", "spo_loss"]

PairWeight = Tensor | Callable[[Tensor, Tensor], Tensor]
LossTriple = tuple[Tensor, Tensor, Tensor]

# Below this, alpha D and 1/alpha near the ends of float32, and the term that eq. 9 drops, alpha D^2 / 8, is lost in the
# rounding of D / 2.
_SMALLEST_ALPHA = 1e-30


def check_number(name: str, value: float, low: float = 0.0, high: float = math.inf, *, above: bool = False) -> None:
    """`value` must be a Python number in [low, high), (low, high) if `above`; a Tensor would sync when compared."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not ((low < value if above else low <= value) and value < high):  # written so that NaN fails
        upper = " and finite" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name} must be {'>' if above else '>='} {low:g}{upper}, got {value}")


def _check_float(name: str, x: Tensor, form: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a floating-point Tensor {form}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point Tensor {form}, got {x.dtype}")


def check_like(name: str, x: Tensor, like_name: str, like: Tensor, *, same_dtype: bool) -> None:
    """`x` must be a floating-point [P] on the device of `like`, which is known to be a good [P]."""
    _check_float(name, x, "[P]")
    if x.shape != like.shape:
        raise ValueError(f"{name} must be [P] like {like_name}, got {list(x.shape)} against {list(like.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, got {x.device} against {like.device}")
    if same_dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, got {x.dtype} against {like.dtype}")


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _checked_pair(chosen_name: str, chosen: Tensor, rejected_name: str, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-probs, checked to be one [P] of one dtype on one device; float32, or float64 if they came so."""
    _check_float(chosen_name, chosen, "[P]")
    if chosen.dim() != 1:
        raise ValueError(f"{chosen_name} must be [P], got {list(chosen.shape)}")
    check_like(rejected_name, rejected, chosen_name, chosen, same_dtype=True)
    return _upcast(chosen), _upcast(rejected)


def _checked_references(chosen: Tensor | None, rejected: Tensor | None, policy: Tensor) -> tuple[Tensor, Tensor] | None:
    """The reference's log-probs as constants in the policy's dtype; None if neither was given."""
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        given = "reference_rejected_logps" if chosen is None else "reference_chosen_logps"
        raise ValueError(f"reference_chosen_logps and reference_rejected_logps come together, got only {given}")
    check_like("reference_chosen_logps", chosen, "policy_chosen_logps", policy, same_dtype=False)
    check_like("reference_rejected_logps", rejected, "policy_chosen_logps", policy, same_dtype=False)
    return chosen.detach().to(policy.dtype), rejected.detach().to(policy.dtype)


def checked_mu(weight: PairWeight | None, logp_w: Tensor, logp_l: Tensor) -> Tensor:
    """mu [P] as a constant; calls a callable weight once."""
    if weight is None:
        return torch.ones_like(logp_w.detach())
    mu = weight if isinstance(weight, Tensor) else None
    if mu is None:
        if not callable(weight):
            raise TypeError(f"weight must be a Tensor [P], a callable or None, got {type(weight).__name__}")
        mu = weight(logp_w.detach(), logp_l.detach())
    check_like("weight", mu, "policy_chosen_logps", logp_w, same_dtype=False)
    return mu.detach().to(logp_w.dtype)


def pair_preference(margin: Tensor, alpha: float, center: bool) -> Tensor:
    """Eq. 8 or eq. 9 of D = `margin` [P], unweighted."""
    if alpha == 0 or (center and alpha < _SMALLEST_ALPHA):
        return -0.5 * margin
    if not center:
        return -F.logsigmoid(alpha * margin) / alpha
    # -D/2 + logcosh(alpha D/2)/alpha, without the cancellation it has wherever alpha D is small or large
    return F.relu(-margin) + torch.log1p(0.5 * torch.expm1(-alpha * margin.abs())) / alpha


def pair_error(margin: Tensor, alpha: float) -> Tensor:
    """Minus the derivative of `pair_preference` by D (eq. 12), [P]."""
    return torch.sigmoid(-alpha * margin) if alpha else torch.full_like(margin, 0.5)  # apart at 0, where 0 * inf is NaN


class _PairPreference(torch.autograd.Function):
    """`pair_preference` with the closed form of its gradient, the same for each way of writing the value: autograd
    through any of them would divide by alpha, and lose it for tiny alpha or large alpha D."""

    @staticmethod
    def forward(margin: Tensor, alpha: float, center: bool) -> Tensor:
        return pair_preference(margin, alpha, center)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        margin, ctx.alpha, _ = inputs
        ctx.save_for_backward(margin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (margin,) = ctx.saved_tensors
        return -pair_error(margin, ctx.alpha) * grad, None, None


def spo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    alpha: float = 0.1,
    weight: PairWeight | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    center: bool = False,
) -> LossTriple:
    """Soft Preference Optimization: weighted preference loss plus an optional KL regularizer (eq. 1, 8 to 12).

    With D = L_w - L_l, in nats:

        alpha > 0 (eq. 8, 10):  -(mu / alpha) log sigmoid(alpha D)
        alpha = 0 (eq. 9, 11):  -(mu / 2) D
        gradient (eq. 12):      d/dL_w = -mu sigmoid(-alpha D) = -d/dL_l

    plus `beta * kl.mean()` on every pair, so that `losses.mean()` is the objective.

    Eq. 8 grows like log(2)/alpha as alpha -> 0 and eq. 9 is its limit without that constant: `center=True` leaves the
    constant out for every alpha, -D/2 + logcosh(alpha D / 2)/alpha, which is continuous at 0 and has the same gradient.
    For alpha = 0 and pairs drawn unevenly eq. 9 is linear in the log-probs and its descent need not lead to the best
    response (Theorem 1 holds there for evenly drawn pairs, or as the limit alpha -> 0+).

    Args:
        policy_chosen_logps: L_w [P], floating point. float16 and bfloat16 are taken to float32.
        policy_rejected_logps: L_l [P], same dtype and device.
        reference_chosen_logps: [P], or None. References never enter the loss, only the rewards; any float dtype.
        reference_rejected_logps: [P], given together with the above.
        alpha: softness, >= 0; the minimizer of the expected loss is softmax(r / alpha).
        weight: mu, symmetric in the pair and not negative: a Tensor [P], a callable (L_w [P], L_l [P]) -> mu [P] like
            `SoftImportance`, or None for 1. Never differentiated. Pairs of weight 0 are not read.
        kl: K_s [S], the token KL of sequences sampled from the policy summed over each, or one value [] for their mean.
        beta: weight of the KL, >= 0. A KL without beta, and a beta without KL, are errors.
        center: leave out the constant log(2)/alpha.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], float32 (float64 for float64 log-probs). Rewards are
        detached: alpha * (policy - reference), or alpha * policy without references; all 0 at alpha = 0. With P = 0 all
        three are empty, and `losses.mean()` is torch's NaN even if a KL was given.

    Raises:
        ValueError: alpha or beta negative or not finite; pairs that differ in count, dtype or device; only one
            reference; beta without kl, kl without beta, an empty kl.
        TypeError: something that is not a Tensor or a number where one is needed.
    """
    logp_w, logp_l = _checked_pair(
        "policy_chosen_logps", policy_chosen_logps, "policy_rejected_logps", policy_rejected_logps
    )
    references = _checked_references(reference_chosen_logps, reference_rejected_logps, logp_w)
    check_number("alpha", alpha)
    check_number("beta", beta)
    margin = logp_w - logp_l
    if weight is None:
        losses = _PairPreference.apply(margin, alpha, center)
    else:
        mu = checked_mu(weight, logp_w, logp_l)
        losses = _PairPreference.apply(torch.where(mu == 0, 0, margin), alpha, center)
        losses = torch.where(mu == 0, 0, mu * losses)
    if kl is not None:
        if beta == 0:
            raise ValueError("kl must be None where beta is 0: it would have no effect; give beta > 0")
        _check_float("kl", kl, "[S] or []")
        if kl.dim() > 1 or kl.numel() == 0:
            raise ValueError(f"kl must be [S] with S >= 1 or [], got {list(kl.shape)}")
        if kl.device != losses.device:
            raise ValueError(
                f"kl must be on the device of policy_chosen_logps, got {kl.device} against {losses.device}"
            )
        losses = losses + beta * _upcast(kl).mean().to(losses.dtype)
    elif beta != 0:
        raise ValueError(f"kl must be given where beta is not 0 (it needs samples of the policy), got beta = {beta}")
    return losses, *_rewards(alpha, logp_w, logp_l, references)


def _rewards(
    scale: float, logp_w: Tensor, logp_l: Tensor, references: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    chosen, rejected = logp_w.detach(), logp_l.detach()
    if references is not None:
        chosen, rejected = chosen - references[0], rejected - references[1]
    return scale * chosen, scale * rejected


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossTriple:
    """Direct Preference Optimization (eq. 4; Rafailov et al. 2023), with cDPO's label smoothing (Mitchell 2023).

    With h = D - D_ref and a probability e = `label_smoothing` that a label is flipped:

        -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

    Args:
        policy_chosen_logps: [P], floating point. float16 and bfloat16 are taken to float32.
        policy_rejected_logps: [P], same dtype and device.
        reference_chosen_logps: [P], any float dtype; a constant.
        reference_rejected_logps: [P], any float dtype; a constant.
        beta: > 0.
        label_smoothing: in [0, 0.5).

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P]; rewards are beta * (policy - reference), detached.

    Raises:
        ValueError: a reference is missing; pairs differ in count, dtype or device; an option is out of its range.
    """
    logp_w, logp_l = _checked_pair(
        "policy_chosen_logps", policy_chosen_logps, "policy_rejected_logps", policy_rejected_logps
    )
    references = _checked_references(reference_chosen_logps, reference_rejected_logps, logp_w)
    if references is None:
        raise ValueError("reference_chosen_logps and reference_rejected_logps must be [P] for dpo, got None")
    check_number("beta", beta, above=True)
    check_number("label_smoothing", label_smoothing, high=0.5)
    logits = beta * ((logp_w - logp_l) - (references[0] - references[1]))
    losses = -F.logsigmoid(logits)
    if label_smoothing:  # skipped at 0, where an infinite other side would make 0 * inf
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses, *_rewards(beta, logp_w, logp_l, references)


# One row a loss: (policy chosen, policy rejected, reference chosen, reference rejected, *, options) -> triple. The
# keyword-only parameters of the function are the options `preference_loss` takes.
LOSSES: dict[str, Callable[..., LossTriple]] = {
    "spo": spo_loss,
    "dpo": dpo_loss,
}
_OPTIONS = {
    name: tuple(p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY)
    for name, loss in LOSSES.items()
}


def preference_loss(
    name: str,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    **options: Any,
) -> LossTriple:
    """A preference loss by its name; the equation stands at the function of each row.

    Args:
        name: "spo" (`spo_loss`, eq. 8 to 12) or "dpo" (`dpo_loss`, eq. 4).
        policy_chosen_logps: [P].
        policy_rejected_logps: [P].
        reference_chosen_logps: [P]; may be None for a loss without a reference.
        reference_rejected_logps: [P]; as above.
        **options: the loss's own keyword arguments.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], the rewards detached.

    Raises:
        ValueError: unknown name, or what the loss itself raises.
        TypeError: an option the loss does not take.
    """
    if name not in LOSSES:
        raise ValueError(f"name must be one of {', '.join(LOSSES)}, got {name!r}")
    for option in options:
        if option not in _OPTIONS[name]:
            raise TypeError(f"{name} takes the options {', '.join(_OPTIONS[name])}, got {option}")
    return LOSSES[name](
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, **options
    )


class SoftImportance(nn.Module):
    """Pair weights by how likely the policy finds the pair (eq. 24): (L_w [P], L_l [P]) -> mu [P], no gradient.

        mu = sigmoid(s - normalizer),    s = gamma log(pi(y_w) + pi(y_l)) = gamma logaddexp(L_w, L_l)

    At gamma = 0 every pair has the same weight sigmoid(0) = 1/2, not 1, as eq. 24 says.

    Args:
        gamma: >= 0, usually small.
        normalizer: "batch", the mean of s over the pairs of this call; "ema", a running average of that mean, kept in
            `state_dict` (`running_mean`, `num_updates`), updated by calls in training mode before it is used, set by
            the first of them, and replaced by the batch's mean until there has been one; or a float or 0-d Tensor, for
            instance what `batch_normalizer` gave for all pairs of an accumulated step. `set_normalizer` changes it.
        process_group: sums and counts of s are all-reduced over it, so ranks may hold different numbers of pairs (none
            included); every rank must call. None: no communication.
        decay: share of the old value that an "ema" update keeps, in [0, 1).

    A batch whose mean is not finite (no pair, or a pair with both log-probs -inf) leaves the running average alone.

    The running average and a Tensor normalizer follow ``.to(device)`` and keep their dtype through ``.to(dtype)``,
    ``.half()`` and ``.bfloat16()``: the average is float32, and a checkpoint that holds it in another dtype loads into
    float32. Every call in training mode moves the average; `SPOMetrics.mu` has the weights of a step without a call.
    """

    running_mean: Tensor
    num_updates: Tensor

    def __init__(
        self,
        gamma: float,
        normalizer: str | float | Tensor = "batch",
        process_group: ProcessGroup | None = None,
        *,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        check_number("gamma", gamma)
        check_number("decay", decay, high=1.0)
        self.gamma = gamma
        self.process_group = process_group
        self.decay = decay
        self.set_normalizer(normalizer)

    def set_normalizer(self, normalizer: str | float | Tensor) -> None:
        """Change the normalizer to "batch", "ema", a float or a 0-d Tensor, which is held detached, not copied.

        "ema" starts a running average on the CPU, as `__init__` does; where there has been one before, it goes on.
        """
        if isinstance(normalizer, str):
            if normalizer not in ("batch", "ema"):
                raise ValueError(f'normalizer must be "batch", "ema", a float or a 0-d Tensor, got {normalizer!r}')
        elif isinstance(normalizer, Tensor):
            if normalizer.dim() != 0:
                raise ValueError(f"normalizer must be a 0-d Tensor, got {list(normalizer.shape)}")
            normalizer = normalizer.detach()
        elif not isinstance(normalizer, (int, float)):
            raise TypeError(
                f'normalizer must be "batch", "ema", a float or a 0-d Tensor, got {type(normalizer).__name__}'
            )
        self.normalizer = normalizer
        if isinstance(normalizer, str) and normalizer == "ema" and not hasattr(self, "running_mean"):
            # Not the default dtype, which is half precision where a model is made in it.
            self.register_buffer("running_mean", torch.zeros((), dtype=torch.float32))
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftImportance:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        if isinstance(self.normalizer, Tensor):
            self.normalizer = keeping_dtype(self.normalizer)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if hasattr(self, "running_mean"):  # assign=True takes the checkpoint's Tensor, in the checkpoint's dtype
            self.running_mean = self.running_mean.to(torch.float32)

    def extra_repr(self) -> str:
        ema = f", decay={self.decay}" if hasattr(self, "running_mean") else ""
        return f"gamma={self.gamma}, normalizer={self.normalizer!r}{ema}"

    @torch.no_grad()
    def forward(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        """mu [P] in (0, 1), float32 (float64 for float64 log-probs)."""
        scores = self._scores(logp_w, logp_l)
        normalizer = self.normalizer
        if isinstance(normalizer, str):
            normalizer = self._mean(scores) if normalizer == "batch" else self._running_mean(scores)
        return torch.sigmoid(scores - normalizer)

    @torch.no_grad()
    def batch_normalizer(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        """Mean of s over these pairs and the process group, 0-d; NaN over no pair."""
        return self._mean(self._scores(logp_w, logp_l))

    def _scores(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        return self.gamma * torch.logaddexp(*_checked_pair("logp_w", logp_w, "logp_l", logp_l))

    def _mean(self, scores: Tensor) -> Tensor:
        totals = torch.stack((scores, torch.ones_like(scores))).sum(dim=1)  # sum and count in one message
        if self.process_group is not None:
            torch.distributed.all_reduce(totals, group=self.process_group)
        return totals[0] / totals[1]

    def _running_mean(self, scores: Tensor) -> Tensor:
        if self.running_mean.device != scores.device:
            raise ValueError(
                f"logp_w must be on the device of SoftImportance's state, got {scores.device} against "
                f"{self.running_mean.device}; move the module with .to()"
            )
        if self.running_mean.dtype not in (torch.float32, torch.float64):  # cast behind the module's back
            raise ValueError(f"running_mean must be float32 or float64, got {self.running_mean.dtype}")
        mean = self._mean(scores).to(self.running_mean.dtype)
        if self.training:
            # where() instead of if: the decision stays on the device
            moved = torch.where(self.num_updates > 0, torch.lerp(mean, self.running_mean, self.decay), mean)
            usable = mean.isfinite()
            self.running_mean.copy_(torch.where(usable, moved, self.running_mean))
            self.num_updates.add_(usable)
        return torch.where(self.num_updates > 0, self.running_mean, mean)


class SPOMetrics(NamedTuple):
    """What a step of `SPOLoss` is watched by: detached Tensors on the device, nothing read back to the host."""

    preference_loss: Tensor  # [] mean over pairs, without the KL
    kl: Tensor  # [] mean over sampled sequences of their summed token KL, nats; 0 without samples
    chosen_logps: Tensor  # [P] nats
    rejected_logps: Tensor  # [P] nats
    chosen_rewards: Tensor  # [P] as `spo_loss` returns them
    rejected_rewards: Tensor  # [P]
    accuracy: Tensor  # [] share of pairs with D > 0: the policy's own preference (eq. 6) agrees with the label
    margin: Tensor  # [] mean of D, nats; this and accuracy are over the pairs whose mu is not 0
    mu: Tensor  # [P] weights of the pairs; 1 without importance
    preference_error: Tensor  # [P] sigmoid(-alpha D) of eq. 12: 0 where the policy surely prefers the chosen response


def mean_or_zero(x: Tensor) -> Tensor:
    """Mean of [P]; 0, still on the graph, for P = 0."""
    return x.sum() / max(x.numel(), 1)


def spo_metrics(
    preference: Tensor,
    kl: Tensor | None,
    logp_w: Tensor,
    logp_l: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    mu: Tensor,
    alpha: float,
) -> SPOMetrics:
    margin = (logp_w - logp_l).detach()
    read = mu != 0
    pairs = read.sum().clamp(min=1)
    return SPOMetrics(
        preference_loss=preference.detach(),
        kl=torch.zeros_like(preference) if kl is None else kl.detach(),
        chosen_logps=logp_w.detach(),
        rejected_logps=logp_l.detach(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        accuracy=(read & (margin > 0)).sum().to(margin.dtype) / pairs,
        margin=torch.where(read, margin, 0).sum() / pairs,
        mu=mu,
        preference_error=pair_error(margin, alpha),
    )


def checked_importance(weight: float | Callable[[Tensor, Tensor], Tensor] | None) -> Any:
    """The `weight` of a module: None, a callable, or the `SoftImportance` that a number gamma stands for."""
    if weight is None or callable(weight):
        return weight
    if not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number gamma, a callable or None, got {type(weight).__name__}")
    return SoftImportance(weight)


class SPOLoss(nn.Module):
    """SPO's objective from logits: mean preference loss over pairs plus beta times the mean KL over samples (eq. 1, 8).

    Args:
        alpha: softness, >= 0; see `spo_loss`.
        beta: weight of the KL, >= 0. If it is not 0, `forward` needs `kl_logits` and `kl_ref_logits`.
        weight: None for uniform weights, a number gamma for `SoftImportance(gamma)`, or a `SoftImportance` (or any
            callable from two [P] to [P]), whose state then belongs to this module.
        center: leave out eq. 8's constant log(2)/alpha.
        average: take the mean of token log-probs in place of their sum for L_w and L_l.
        ignore_index: label of rows that are no part of a response.
        inplace_backward: the backward writes dlogits into the memory of `logits` and `kl_logits`: no V-wide allocation,
            and neither may be used afterwards. See `token_logps` for what autograd catches.
        process_group, vocab_shards: see `spo_kernels.functional`; the group that holds the vocabulary. Pairs split over
            another group are `SoftImportance`'s.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.0,
        weight: float | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        center: bool = False,
        average: bool = False,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
        vocab_shards: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("beta", beta)
        self.alpha = alpha
        self.beta = beta
        self.weight = checked_importance(weight)
        self.center = center
        self.average = average
        self.ignore_index = ignore_index
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.vocab_shards = vocab_shards

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, center={self.center}, average={self.average}"

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        kl_logits: Tensor | None = None,
        kl_ref_logits: Tensor | None = None,
        kl_mask: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, SPOMetrics]:
        """The objective and its metrics.

        Args:
            logits: [2P, T, V], chosen responses in rows [0:P], rejected ones of the same pairs in [P:2P]; packed,
                [N, V] with `cu_seqlens`. Aligned with labels: nothing is shifted.
            labels: [2P, T] or [N] int64; `ignore_index` outside responses.
            cu_seqlens: [2P + 1], start of each sequence in the packed rows, and N.
            kl_logits: [S, T', V], the policy on sequences sampled from it; packed, [N', V] with `kl_cu_seqlens`.
            kl_ref_logits: the reference's logits of the same rows, without gradient.
            kl_mask: [S, T'] or [N'] bool, True for the rows that predict a token of the sampled response, its
                end-of-sequence token included; None for all rows.
            kl_cu_seqlens: [S + 1]; the mean over S is all that depends on it.
            reference_chosen_logps: [P], for the rewards only.
            reference_rejected_logps: [P], for the rewards only.

        Returns:
            (objective [], `SPOMetrics`), float32 (float64 for float64 logits). With P = 0 the preference part is 0.

        Raises:
            ValueError: an odd number of sequences; beta without KL logits, KL logits without beta, only one of the two,
                or no sampled sequence; and what `sequence_logps`, `token_kl` and `spo_loss` raise.
        """
        logps = sequence_logps(
            logits,
            labels,
            ignore_index=self.ignore_index,
            cu_seqlens=cu_seqlens,
            average=self.average,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
            vocab_shards=self.vocab_shards,
        )
        pairs = logps.shape[0] // 2  # the compiler has no divmod of a dynamic size
        if logps.shape[0] % 2:
            raise ValueError(f"logits must hold P chosen and then P rejected sequences, got {logps.shape[0]} in all")
        logp_w, logp_l = logps[:pairs], logps[pairs:]
        mu = checked_mu(self.weight, logp_w, logp_l)
        losses, chosen_rewards, rejected_rewards = spo_loss(
            logp_w,
            logp_l,
            reference_chosen_logps,
            reference_rejected_logps,
            alpha=self.alpha,
            weight=mu,
            center=self.center,
        )
        preference = objective = mean_or_zero(losses)
        kl = self._mean_kl(kl_logits, kl_ref_logits, kl_mask, kl_cu_seqlens)
        if kl is not None:
            objective = preference + self.beta * kl
        return objective, spo_metrics(preference, kl, logp_w, logp_l, chosen_rewards, rejected_rewards, mu, self.alpha)

    def _mean_kl(
        self, logits: Tensor | None, ref_logits: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """Mean over sampled sequences of the token KL summed over each (Appendix B); None at beta = 0."""
        if self.beta == 0:
            if logits is not None or ref_logits is not None:
                raise ValueError("kl_logits must be None where beta is 0: they would have no effect; give beta > 0")
            return None
        if logits is None or ref_logits is None:
            missing = "kl_logits" if logits is None else "kl_ref_logits"
            raise ValueError(f"{missing} must be given where beta is not 0, got None with beta = {self.beta}")
        if cu_seqlens is None and logits.dim() != 3:
            raise ValueError(f"kl_logits must be [S, T, V], or [N, V] with kl_cu_seqlens, got {list(logits.shape)}")
        sequences = logits.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if sequences < 1:
            raise ValueError(f"kl_logits must hold at least one sequence, got {list(logits.shape)}")
        kl = token_kl(
            logits,
            ref_logits,
            mask,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
            vocab_shards=self.vocab_shards,
        )
        return kl.sum() / sequences
