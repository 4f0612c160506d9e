"""Losses over preference pairs, from per-sequence log-probs.

P pairs, S sampled sequences, L_w and L_l the summed log-probs (nats) of the chosen and the rejected response,
D = L_w - L_l. Everything here is [P]-sized plain torch, shared by every backend; the vocabulary-wide work is in
`spo_kernels.functional`. `LOSSES` lists the losses; none of them enters a kernel. `linear/ops.py` uses
`pair_preference` and `pair_error` for gradients that are computed within a forward.

Log-probs of -inf are legal and follow the equations. An impossible chosen response makes SPO's loss +inf. An impossible
rejected response makes it 0 (-log(2)/alpha when centred), or -inf at alpha = 0. Both at once make D, the loss and the
gradient NaN.

A pair of weight 0, or that `pair_mask` leaves out, is not read: its loss and its gradient are 0 even if its log-probs
are NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.checks import (
    check_float,
    check_like,
    check_number,
    checked_pair,
    checked_references,
    describe,
    savable,
)
from spo_kernels.distributed import HoldsProcessGroup, takes_dtensors
from spo_kernels.op_library import is_transforming
from spo_kernels.precision import upcast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LOSSES", "SoftImportance", "dpo_loss", "preference_loss", "spo_loss"]

PairWeight = Tensor | Callable[[Tensor, Tensor], Tensor]
LossTriple = tuple[Tensor, Tensor, Tensor]
REDUCTIONS = ("none", "mean", "sum")

# Below this, alpha D and 1/alpha come near the ends of float32. The rounding of D / 2 then hides the term that eq. 9
# drops, alpha D^2 / 8.
_SMALLEST_ALPHA = 1e-30


def checked_mu(weight: PairWeight | None, logp_w: Tensor, logp_l: Tensor, pair_mask: Tensor | None = None) -> Tensor:
    """mu [P] as a constant, 0 for pairs that pair_mask leaves out; calls a callable weight once."""
    if weight is None:
        mu = torch.ones_like(logp_w.detach())
    elif isinstance(weight, Tensor):
        mu = weight
    elif not callable(weight):
        raise TypeError(f"weight must be a Tensor [P], a callable or None, got {type(weight).__name__}")
    elif pair_mask is None:
        mu = weight(logp_w.detach(), logp_l.detach())
    elif isinstance(weight, SoftImportance):
        mu = weight(logp_w.detach(), logp_l.detach(), pair_mask)
    else:  # the callable sees only the pairs that are read; finding them waits for the device
        read_w, read_l = logp_w.detach()[pair_mask], logp_l.detach()[pair_mask]
        read = weight(read_w, read_l)
        check_like("weight", read, "the pairs of pair_mask", read_w, same_dtype=False)
        mu = torch.zeros_like(logp_w.detach()).masked_scatter(pair_mask, read.detach().to(logp_w.dtype))
    check_like("weight", mu, "policy_chosen_logps", logp_w, same_dtype=False)
    mu = mu.detach().to(logp_w.dtype)
    return savable(mu if pair_mask is None else torch.where(pair_mask, mu, 0))


def _check_pair_options(pair_mask: Tensor | None, reduction: str, logp_w: Tensor) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if pair_mask is None:
        return
    if not isinstance(pair_mask, Tensor):
        raise TypeError(f"pair_mask must be a bool Tensor [P] or None, got {type(pair_mask).__name__}")
    if pair_mask.dtype != torch.bool or pair_mask.shape != logp_w.shape:
        raise ValueError(
            f"pair_mask must be [P] bool like policy_chosen_logps, got {describe(pair_mask)} against "
            f"{list(logp_w.shape)}"
        )
    if pair_mask.device != logp_w.device:
        raise ValueError(
            f"pair_mask must be on the device of policy_chosen_logps, got {pair_mask.device} against {logp_w.device}"
        )


def _reduced(losses: Tensor, penalty: Tensor | None, pair_mask: Tensor | None, reduction: str) -> Tensor:
    """Losses [P] and a penalty [] that each pair which is read bears, reduced."""
    if reduction == "mean":
        count = max(losses.numel(), 1) if pair_mask is None else pair_mask.sum().clamp(min=1)
        mean = losses.sum() / count
        return mean if penalty is None else mean + penalty
    if penalty is not None:
        losses = losses + penalty if pair_mask is None else torch.where(pair_mask, losses + penalty, 0)
    return losses.sum() if reduction == "sum" else losses


def pair_preference(margin: Tensor, alpha: float, center: bool) -> Tensor:
    """Eq. 8 or eq. 9 of D = `margin` [P], unweighted."""
    if alpha == 0 or (center and alpha < _SMALLEST_ALPHA):
        return -0.5 * margin
    if not center:
        return -F.logsigmoid(alpha * margin) / alpha
    # -D/2 + logcosh(alpha D/2)/alpha, in a form that does not cancel where alpha D is small or large
    return F.relu(-margin) + torch.log1p(0.5 * torch.expm1(-alpha * margin.abs())) / alpha


def pair_error(margin: Tensor, alpha: float) -> Tensor:
    """Minus the derivative of `pair_preference` by D (eq. 12), [P]."""
    return torch.sigmoid(-alpha * margin) if alpha else torch.full_like(margin, 0.5)  # 0 * inf is NaN


class _PairPreference(torch.autograd.Function):
    """`pair_preference` with the closed form of its gradient, which is the same with and without center.

    Autograd through the value would divide by alpha, and lose the gradient for tiny alpha or large alpha D.
    """

    generate_vmap_rule = True

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


class _TransformablePreference(_PairPreference):
    """With a jvp, for torch.func and forward-mode AD. Dynamo cannot trace a function with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        _PairPreference.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (margin,) = ctx.saved_tensors
        return -pair_error(margin, ctx.alpha) * tangent


def _preference_losses(margin: Tensor, alpha: float, center: bool) -> Tensor:
    return (_TransformablePreference if is_transforming() else _PairPreference).apply(margin, alpha, center)


def mean_or_zero(x: Tensor) -> Tensor:
    """Mean of [P]; 0, still on the graph, for P = 0."""
    return x.sum() / max(x.numel(), 1)


@takes_dtensors()
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
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Soft Preference Optimization: weighted preference loss plus an optional KL regularizer (eq. 1, 8 to 12).

    With D = L_w - L_l, in nats:

        alpha > 0 (eq. 8, 10):  -(mu / alpha) log sigmoid(alpha D)
        alpha = 0 (eq. 9, 11):  -(mu / 2) D
        gradient (eq. 12):      d/dL_w = -mu sigmoid(-alpha D) = -d/dL_l

    plus `beta * kl.mean()` on every pair, so that `losses.mean()` is the objective.

    Eq. 8 grows like log(2)/alpha as alpha -> 0, and eq. 9 is its limit without that constant. `center=True` leaves the
    constant out for every alpha: -D/2 + logcosh(alpha D / 2)/alpha is continuous at 0 and has the same gradient.

    At alpha = 0 eq. 9 is linear in the log-probs. If pairs are drawn unevenly, descent on eq. 9
    need not lead to the best response. Theorem 1 covers evenly drawn pairs, and the limit alpha -> 0+.

    Args:
        policy_chosen_logps: L_w [P], floating point. float16 and bfloat16 are taken to float32.
        policy_rejected_logps: L_l [P], same dtype and device.
        reference_chosen_logps: [P], or None. References never enter the loss, only the rewards; any float dtype.
        reference_rejected_logps: [P], given together with the above.
        alpha: softness, >= 0; the minimizer of the expected loss is softmax(reward / alpha).
        weight: mu, symmetric in the pair and not negative: a Tensor [P], a callable (L_w [P], L_l [P]) -> mu [P] like
            `SoftImportance`, or None for 1. Never differentiated. Pairs of weight 0 are not read.
        kl: K_s [S], the summed token KL of each sequence sampled from the policy; or the mean of K_s, [].
        beta: weight of the KL, >= 0. A KL without beta, and a beta without KL, are errors.
        center: leave out the constant log(2)/alpha.
        pair_mask: [P] bool, False for pairs that are not read, for instance those that pad a last batch; their losses
            and rewards are 0. A callable weight sees only the other pairs. None: all pairs are read.
        reduction: "none": losses [P]. "mean": the mean over the pairs that are read, [], plus beta * the mean of kl;
            over no pair the preference part is 0. "sum": the sum of the losses [P], so the KL counts once a pair.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], losses [] with a reduction, float32 (float64 for float64
        log-probs). Rewards are detached: alpha * (policy - reference), or alpha * policy without references; all 0 at
        alpha = 0. With P = 0 and reduction "none" all three are empty, and `losses.mean()` is torch's NaN even if a KL
        was given.

    Raises:
        ValueError: alpha or beta negative or not finite; pairs that differ in count, dtype or device; only one
            reference; beta without kl, kl without beta, an empty kl; a pair_mask that is not [P] bool; an unknown
            reduction.
        TypeError: an argument is not a Tensor where it must be one, or not a Python number where it must be one.
    """
    logp_w, logp_l = checked_pair(
        "policy_chosen_logps", policy_chosen_logps, "policy_rejected_logps", policy_rejected_logps
    )
    references = checked_references(reference_chosen_logps, reference_rejected_logps, logp_w)
    check_number("alpha", alpha)
    check_number("beta", beta)
    _check_pair_options(pair_mask, reduction, logp_w)
    margin = logp_w - logp_l
    if weight is None and pair_mask is None:
        losses = _preference_losses(margin, alpha, center)
    else:
        mu = checked_mu(weight, logp_w, logp_l, pair_mask)
        losses = _preference_losses(torch.where(mu == 0, 0, margin), alpha, center)
        losses = torch.where(mu == 0, 0, mu * losses)
    penalty = None
    if kl is not None:
        if beta == 0:
            raise ValueError("kl must be None where beta is 0: it would have no effect; give beta > 0")
        check_float("kl", kl, "[S] or []")
        if kl.dim() > 1 or kl.numel() == 0:
            raise ValueError(f"kl must be [S] with S >= 1 or [], got {list(kl.shape)}")
        if kl.device != losses.device:
            raise ValueError(
                f"kl must be on the device of policy_chosen_logps, got {kl.device} against {losses.device}"
            )
        penalty = beta * upcast(kl).mean().to(losses.dtype)
    elif beta != 0:
        raise ValueError(f"kl must be given where beta is not 0 (it needs samples of the policy), got beta = {beta}")
    rewards = _rewards(alpha, logp_w, logp_l, references, pair_mask)
    return _reduced(losses, penalty, pair_mask, reduction), *rewards


def _rewards(
    scale: float,
    logp_w: Tensor,
    logp_l: Tensor,
    references: tuple[Tensor, Tensor] | None,
    pair_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chosen, rejected = logp_w.detach(), logp_l.detach()
    if scale == 0:  # 0 * -inf is NaN
        return torch.zeros_like(chosen), torch.zeros_like(rejected)
    if references is not None:
        chosen, rejected = chosen - references[0], rejected - references[1]
    if pair_mask is not None:
        chosen, rejected = torch.where(pair_mask, chosen, 0), torch.where(pair_mask, rejected, 0)
    return scale * chosen, scale * rejected


@takes_dtensors()
def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
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
        pair_mask, reduction: see `spo_loss`.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], losses [] with a reduction; rewards are
        beta * (policy - reference), detached.

    Raises:
        ValueError: a reference is missing; pairs differ in count, dtype or device; an option is out of its range.
    """
    logp_w, logp_l = checked_pair(
        "policy_chosen_logps", policy_chosen_logps, "policy_rejected_logps", policy_rejected_logps
    )
    references = checked_references(reference_chosen_logps, reference_rejected_logps, logp_w)
    if references is None:
        raise ValueError("reference_chosen_logps and reference_rejected_logps must be [P] for dpo, got None")
    check_number("beta", beta, above=True)
    check_number("label_smoothing", label_smoothing, high=0.5)
    _check_pair_options(pair_mask, reduction, logp_w)
    margin = (logp_w - logp_l) - (references[0] - references[1])
    logits = beta * (margin if pair_mask is None else torch.where(pair_mask, margin, 0))
    losses = -F.logsigmoid(logits)
    if label_smoothing:  # at 0 an infinite log-probability would make 0 * inf
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    if pair_mask is not None:
        losses = torch.where(pair_mask, losses, 0)
    rewards = _rewards(beta, logp_w, logp_l, references, pair_mask)
    return _reduced(losses, None, pair_mask, reduction), *rewards


# One row a loss: (policy chosen, policy rejected, reference chosen, reference rejected, *, options) -> triple. The
# function's keyword-only parameters are the options that `preference_loss` takes.
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
    """A preference loss by its name. The function of each name has the equation.

    Args:
        name: "spo" (`spo_loss`, eq. 8 to 12) or "dpo" (`dpo_loss`, eq. 4).
        policy_chosen_logps: [P].
        policy_rejected_logps: [P].
        reference_chosen_logps: [P]; may be None for a loss without a reference.
        reference_rejected_logps: [P]; as above.
        **options: the loss's own keyword arguments.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], the rewards detached. All losses take ``pair_mask`` and
        ``reduction``, see `spo_loss`.

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


class SoftImportance(HoldsProcessGroup):
    """Pair weights by how likely the policy finds the pair (eq. 24): (L_w [P], L_l [P]) -> mu [P], no gradient.

        mu = sigmoid(s - normalizer),    s = gamma log(pi(y_w) + pi(y_l)) = gamma logaddexp(L_w, L_l)

    At gamma = 0 every pair has the weight sigmoid(0) = 1/2, as eq. 24 says, not 1.

    Args:
        gamma: >= 0, usually small.
        normalizer: "batch", "ema", a float or a 0-d Tensor. `set_normalizer` changes it.

            - "batch": the mean of s over the pairs of this call.
            - "ema": a running average of that mean, kept in `state_dict` (`running_mean`, `num_updates`). Each call in
              training mode updates it and then uses it; the first sets it. In evaluation mode, before the first update,
              the batch's mean stands in.
            - a number: for instance what `batch_normalizer` gave for all pairs of an accumulated step.
        process_group: sums and counts of s are all-reduced over it, so ranks may hold different numbers of pairs, or
            none. Every rank must call. None: no communication. Copies have the same group, pickles its name: see
            `spo_kernels.distributed.HoldsProcessGroup`.
        decay: share of the old value that an "ema" update keeps, in [0, 1).

    A batch whose mean is not finite (no pair, or a pair with both log-probs -inf) leaves the running average alone.

    The running average and a Tensor normalizer follow ``.to(device)`` and keep their dtype through ``.to(dtype)``,
    ``.half()`` and ``.bfloat16()``. The average is float32; a checkpoint that holds it in another dtype loads into
    float32. Every call in training mode moves the average: read a step's weights from `SPOMetrics.mu` instead.
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

    @takes_dtensors()
    def set_normalizer(self, normalizer: str | float | Tensor) -> None:
        """Change the normalizer to "batch", "ema", a float or a 0-d Tensor, which is held detached, not copied.

        "ema" starts a running average on the CPU, as `__init__` does. An existing running average is kept.
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
            # Not the default dtype: it may be half precision while a model is built.
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
    @takes_dtensors()
    def forward(self, logp_w: Tensor, logp_l: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """mu [P] in (0, 1), float32 (float64 for float64 log-probs); pairs with pair_mask False enter no mean."""
        scores = self._scores(logp_w, logp_l)
        normalizer = self.normalizer
        if isinstance(normalizer, str):
            mean = self._mean(scores, pair_mask)
            normalizer = mean if normalizer == "batch" else self._running_mean(mean)
        return torch.sigmoid(scores - normalizer)

    @torch.no_grad()
    @takes_dtensors()
    def batch_normalizer(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        """Mean of s over these pairs and the process group, 0-d; NaN over no pair."""
        return self._mean(self._scores(logp_w, logp_l))

    def _scores(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        # no_grad does not keep tangents of forward-mode AD out
        pair = checked_pair("logp_w", logp_w.detach(), "logp_l", logp_l.detach())
        return self.gamma * torch.logaddexp(*pair)

    def _mean(self, scores: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        ones = torch.ones_like(scores)
        if pair_mask is not None:
            scores, ones = torch.where(pair_mask, scores, 0), torch.where(pair_mask, ones, 0)
        totals = torch.stack((scores, ones)).sum(dim=1)  # sum and count in one message
        if self.process_group is not None:
            torch.distributed.all_reduce(totals, group=self.process_group)
        return totals[0] / totals[1]

    def _running_mean(self, mean: Tensor) -> Tensor:
        if self.running_mean.device != mean.device:
            raise ValueError(
                f"logp_w must be on the device of SoftImportance's state, got {mean.device} against "
                f"{self.running_mean.device}; move the module with .to()"
            )
        if self.running_mean.dtype not in (torch.float32, torch.float64):  # someone set the buffer's data
            raise ValueError(f"running_mean must be float32 or float64, got {self.running_mean.dtype}")
        mean = mean.to(self.running_mean.dtype)
        if self.training:
            # where() instead of if: the decision stays on the device
            moved = torch.where(self.num_updates > 0, torch.lerp(mean, self.running_mean, self.decay), mean)
            usable = mean.isfinite()
            self.running_mean.copy_(torch.where(usable, moved, self.running_mean))
            self.num_updates.add_(usable)
        return torch.where(self.num_updates > 0, self.running_mean, mean)
