"""Losses over preference pairs, from per-sequence log-probs.

P pairs, S sampled sequences, L_w and L_l the summed log-probs (nats) of the chosen and the rejected response,
D = L_w - L_l. Everything here is [P]-sized plain torch, shared by every backend; the vocabulary-wide work is in
`spo_kernels.functional`. `LOSSES` lists the losses; none of them enters a kernel. `linear/ops.py` uses
`pair_preference` and `pair_error` for gradients that are computed within a forward. In the formulas R_w and R_l are the
reference's log-probs, h = D - (R_w - R_l), |y| is the number of tokens of a response, and s_w and s_l are scores.

Log-probs of -inf are legal and follow the equations. An impossible chosen response makes SPO's loss +inf. An impossible
rejected response makes it 0 (-log(2)/alpha when centred), or -inf at alpha = 0. Both at once make D, the loss and the
gradient NaN.

A pair of weight 0, or that `pair_mask` leaves out, is not read: its loss and its gradient are 0 even if its log-probs
are NaN.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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
from spo_kernels.op_library import is_transforming, without_batches
from spo_kernels.precision import upcast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LOSSES",
    "Loss",
    "PowerImportance",
    "SoftImportance",
    "apo_zero_loss",
    "cpo_loss",
    "dpo_loss",
    "ipo_loss",
    "odpo_loss",
    "orpo_loss",
    "preference_loss",
    "rdpo_loss",
    "reward_model_loss",
    "rpo_loss",
    "rso_loss",
    "simpo_loss",
    "slic_loss",
    "spo_loss",
]

PairWeight = Tensor | Callable[[Tensor, Tensor], Tensor]
PairOfTensors = Tensor | tuple[Tensor, Tensor]  # of the chosen and the rejected responses: two [P], or one [2, P]
LossTriple = tuple[Tensor, Tensor, Tensor]
REDUCTIONS = ("none", "mean", "sum")

# Below this, alpha D and 1/alpha come near the ends of float32. The rounding of D / 2 then hides the term that eq. 9
# drops, alpha D^2 / 8.
SMALLEST_ALPHA = 1e-30


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


def _check_pair_options(
    pair_mask: Tensor | None, reduction: str, logp_w: Tensor, like: str = "policy_chosen_logps"
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if pair_mask is None:
        return
    if not isinstance(pair_mask, Tensor):
        raise TypeError(f"pair_mask must be a bool Tensor [P] or None, got {type(pair_mask).__name__}")
    if pair_mask.dtype != torch.bool or pair_mask.shape != logp_w.shape:
        raise ValueError(
            f"pair_mask must be [P] bool like {like}, got {describe(pair_mask)} against {list(logp_w.shape)}"
        )
    if pair_mask.device != logp_w.device:
        raise ValueError(f"pair_mask must be on the device of {like}, got {pair_mask.device} against {logp_w.device}")


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
    if alpha == 0 or (center and alpha < SMALLEST_ALPHA):
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


def preference_losses(margin: Tensor, alpha: float, center: bool) -> Tensor:
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
        losses = preference_losses(margin, alpha, center)
    else:
        mu = checked_mu(weight, logp_w, logp_l, pair_mask)
        losses = preference_losses(torch.where(mu == 0, 0, margin), alpha, center)
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


class _Pairs(NamedTuple):
    """Checked log-probs of pairs in the dtype of the loss; -1 stands for those of pairs that are not read."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P]
    references: tuple[Tensor, Tensor] | None  # [P] each, constants
    mask: Tensor | None  # [P] bool, the pairs that are read

    @property
    def margin(self) -> Tensor:
        """D [P]."""
        return self.chosen - self.rejected

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """L - R of the chosen and the rejected responses, [P] each."""
        assert self.references is not None
        return self.chosen - self.references[0], self.rejected - self.references[1]

    @property
    def relative_margin(self) -> Tensor:
        """h [P]."""
        assert self.references is not None
        return self.margin - (self.references[0] - self.references[1])

    def averaged(self, lengths: tuple[Tensor, Tensor]) -> _Pairs:
        """Log-probs of a token in the place of log-probs of a response."""
        of_w, of_l = lengths
        references = None if self.references is None else (self.references[0] / of_w, self.references[1] / of_l)
        return _Pairs(self.chosen / of_w, self.rejected / of_l, references, self.mask)

    def constants(self, name: str, value: PairOfTensors, fill: float) -> tuple[Tensor, Tensor]:
        """`value` as two constants [P] in the dtype of the loss; `fill` for pairs that are not read."""
        if not isinstance(value, (Tensor, tuple, list)) or len(value) != 2:
            came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be two Tensors [P], of the chosen and the rejected responses, got {came}")
        for each in value:
            if not isinstance(each, Tensor):
                raise TypeError(f"{name} must be two Tensors [P], got a {type(each).__name__} in it")
            if each.shape != self.chosen.shape or each.dtype == torch.bool or each.is_complex():
                raise ValueError(
                    f"{name} must be two Tensors [P] of numbers like policy_chosen_logps, got {describe(each)} against "
                    f"{list(self.chosen.shape)}"
                )
            if each.device != self.chosen.device:
                raise ValueError(
                    f"{name} must be on the device of policy_chosen_logps, got {each.device} against "
                    f"{self.chosen.device}"
                )
        chosen, rejected = (savable(self.filled(each.detach().to(self.chosen.dtype), fill)) for each in value)
        return chosen, rejected

    def lengths(self, value: PairOfTensors) -> tuple[Tensor, Tensor]:
        """Tokens [P] of both responses; 0 counts as 1, as it does in `sequence_logps`."""
        chosen, rejected = self.constants("lengths", value, 1)
        return chosen.clamp(min=1), rejected.clamp(min=1)

    def filled(self, values: Tensor, fill: float) -> Tensor:
        return values if self.mask is None else torch.where(self.mask, values, fill)

    def result(self, losses: Tensor, reduction: str, scale: float, penalty: Tensor | None = None) -> LossTriple:
        """The triple of losses [P], a penalty [] of each pair, and rewards, which are `scale` times the log-probs."""
        rewards = _rewards(scale, self.chosen, self.rejected, self.references, self.mask)
        return _reduced(self.filled(losses, 0), penalty, self.mask, reduction), *rewards


def _checked_pairs(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    pair_mask: Tensor | None,
    reduction: str,
    needed_by: str | None = None,
) -> _Pairs:
    """needed_by: the loss that needs references, if it does."""
    logp_w, logp_l = checked_pair("policy_chosen_logps", chosen, "policy_rejected_logps", rejected)
    references = checked_references(reference_chosen, reference_rejected, logp_w)
    if references is None and needed_by is not None:
        raise ValueError(f"reference_chosen_logps and reference_rejected_logps must be [P] for {needed_by}, got None")
    _check_pair_options(pair_mask, reduction, logp_w)
    if pair_mask is not None:
        logp_w, logp_l = torch.where(pair_mask, logp_w, -1), torch.where(pair_mask, logp_l, -1)
        if references is not None:
            references = torch.where(pair_mask, references[0], -1), torch.where(pair_mask, references[1], -1)
    return _Pairs(logp_w, logp_l, references, pair_mask)


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

    Zephyr's dDPO is this loss on pairs that a model ranked.

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
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "dpo",
    )
    check_number("beta", beta, above=True)
    check_number("label_smoothing", label_smoothing, high=0.5)
    logits = beta * pairs.relative_margin
    losses = -F.logsigmoid(logits)
    if label_smoothing:  # at 0 an infinite log-probability would make 0 * inf
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return pairs.result(losses, reduction, beta)


@takes_dtensors()
def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    tau: float = 0.1,
    lengths: PairOfTensors | None = None,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Identity Preference Optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h - 1 / (2 tau))^2.

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`. Rewards are tau * (policy -
    reference).

    The paper has log-probs of responses, as here without `lengths`; so have the DPO reference code and TRL's CPOTrainer
    (``loss_type="ipo"``). TRL's DPOTrainer and HALOs take log-probs of a token, the mean over the response, as here
    with `lengths`. The same tau then stands for another strength: at 100 tokens, by a factor of about 100.

    Args:
        tau: > 0.
        lengths: tokens of the chosen and the rejected responses, two Tensors [P] or one [2, P]; 0 counts as 1.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "ipo",
    )
    check_number("tau", tau, above=True)
    if lengths is not None:
        pairs = pairs.averaged(pairs.lengths(lengths))
    return pairs.result((pairs.relative_margin - 1 / (2 * tau)).square(), reduction, tau)


@takes_dtensors()
def odpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    scores: PairOfTensors,
    beta: float = 0.1,
    offset_scale: float = 1.0,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Direct Preference Optimization with an offset (Amini et al. 2024, arXiv:2402.10571).

        -log sigmoid(beta h - offset_scale log(s_w - s_l))

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`. A difference of
    scores below 1 makes the offset negative, which may favour the rejected response. The authors' code also offers the
    offset log(s_w / s_l), which this function does not.

    Args:
        scores: what a judge gave the chosen and the rejected responses, two Tensors [P] or one [2, P], s_w > s_l.
        beta: > 0.
        offset_scale: alpha of the paper, >= 0. At 0, and at s_w - s_l = 1, the loss is DPO's.

    Raises:
        RuntimeError: s_w <= s_l in a pair that is read; on a GPU this is a device-side assertion.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "odpo",
    )
    check_number("beta", beta, above=True)
    check_number("offset_scale", offset_scale)
    score_w, score_l = pairs.constants("scores", scores, 0)
    gap = pairs.filled(score_w - score_l, 1)
    torch._assert_async((without_batches(gap) > 0).all(), "scores must be higher for the chosen response in every pair")
    return pairs.result(-F.logsigmoid(beta * pairs.relative_margin - offset_scale * gap.log()), reduction, beta)


@takes_dtensors()
def rdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    flip: float = 0.1,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Robust DPO, for labels that are flipped with probability e (Chowdhury et al. 2024, arXiv:2403.00409).

        (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e),    e = flip

    The mean over flips, (1 - e) loss(w, l) + e loss(l, w), is DPO's loss. The loss is unbounded below in h: watch it.
    TRL has the same as ``loss_type="robust"``. Log-probs, `pair_mask`, `reduction`, results and errors are those of
    `dpo_loss`.

    Args:
        beta: > 0.
        flip: e, in [0, 0.5).
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "rdpo",
    )
    check_number("beta", beta, above=True)
    check_number("flip", flip, high=0.5)
    logits = beta * pairs.relative_margin
    losses = -F.logsigmoid(logits)
    if flip:  # at 0 an infinite log-probability would make 0 * inf
        losses = ((1 - flip) * losses + flip * F.logsigmoid(-logits)) / (1 - 2 * flip)
    return pairs.result(losses, reduction, beta)


@takes_dtensors()
def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    lengths: PairOfTensors | None = None,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Contrastive Preference Optimization (Xu et al. 2024, arXiv:2401.08417): -log sigmoid(beta D) - nll_weight L_w.

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`, but references may be None: they
    enter the rewards only.

    The paper's NLL is that of the response, as here without `lengths`. The authors' code (ALMA) and TRL take the mean
    over all chosen tokens of the batch, as here with `lengths`: every pair then bears
    -nll_weight sum_p L_w / sum_p |y_w|, which is weaker by the length of a response.

    Args:
        beta: > 0.
        nll_weight: lambda of the paper, >= 0. At 0 the loss is beta times SPO's with alpha = beta.
        lengths: tokens of the chosen and the rejected responses, two Tensors [P] or one [2, P]; 0 counts as 1.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
    )
    check_number("beta", beta, above=True)
    check_number("nll_weight", nll_weight)
    losses, penalty = -F.logsigmoid(beta * pairs.margin), None
    if nll_weight == 0:
        if lengths is not None:
            raise ValueError("lengths must be None where nll_weight is 0: they would have no effect")
    elif lengths is None:
        losses = losses - nll_weight * pairs.chosen
    else:
        tokens = pairs.filled(pairs.lengths(lengths)[0], 0).sum().clamp(min=1)
        penalty = -nll_weight * pairs.filled(pairs.chosen, 0).sum() / tokens
    return pairs.result(losses, reduction, beta, penalty)


@takes_dtensors()
def rpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    similarity: Tensor,
    beta: float = 0.1,
    temperature: float = 0.5,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Relative Preference Optimization (Yin et al. 2024, arXiv:2402.10958): chosen against rejected of all prompts.

        -1/P sum_j log sigmoid(beta w_ij ((L - R) of chosen i - (L - R) of rejected j)),
        w = softmax over j of similarity_ij / temperature

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`. DPO with an NLL term, which is also
    called RPO, is another method.

    The weights stand inside the sigmoid, and those of a row sum to 1. So with one prompt for all pairs w = 1/P, and
    beta acts as beta / P. For temperature -> 0 and distinct prompts, P times the loss is DPO's plus (P - 1) log 2.
    Pairs of other processes are not seen.

    Args:
        similarity: [P, P], cosine similarity of prompt i and prompt j, floating point; a constant.
        beta: > 0.
        temperature: tau of the paper, > 0.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "rpo",
    )
    check_number("beta", beta, above=True)
    check_number("temperature", temperature, above=True)
    check_float("similarity", similarity, "[P, P]")
    if similarity.shape != (*pairs.chosen.shape, *pairs.chosen.shape):
        raise ValueError(f"similarity must be [P, P] with P = {len(pairs.chosen)}, got {list(similarity.shape)}")
    if similarity.device != pairs.chosen.device:
        raise ValueError(
            f"similarity must be on the device of policy_chosen_logps, got {similarity.device} against "
            f"{pairs.chosen.device}"
        )
    closeness = similarity.detach().to(pairs.chosen.dtype) / temperature
    if pairs.mask is not None:
        closeness = torch.where(pairs.mask[:, None], closeness, 0)
    ratio_w, ratio_l = pairs.log_ratios
    weights = savable(pairs.filled(closeness, -math.inf).softmax(1))
    margins = torch.where(weights == 0, 0, ratio_w[:, None] - ratio_l)  # 0 * inf is NaN
    losses = pairs.filled(-F.logsigmoid(beta * weights * margins), 0).sum(1)
    count = max(len(pairs.chosen), 1) if pairs.mask is None else pairs.mask.sum().clamp(min=1)
    return pairs.result(losses / count, reduction, beta)


@takes_dtensors()
def slic_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    delta: float = 1.0,
    scores: PairOfTensors | None = None,
    nll_weight: float = 0.1,
    sft_logps: Tensor | None = None,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Sequence Likelihood Calibration: SLiC-HF, or with `scores` the margin loss of SLiC.

        SLiC-HF (Zhao et al. 2023, arXiv:2305.10425):  max(0, delta - D) - nll_weight L_sft
        SLiC (Zhao et al. 2022, arXiv:2210.00045):     max(0, delta (s_w - s_l) - D) - nll_weight L_sft

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`, but references may be None: they
    enter the rewards only. Rewards are the log-probs, less those of the reference.

    TRL's and LLaMA-Factory's "hinge" is another loss: the hinge of RSO, relative to the reference (`rso_loss`). HALOs
    takes the chosen response for the SFT target, as here without `sft_logps`.

    Args:
        delta: margin in nats, >= 0.
        scores: of the chosen and the rejected responses, two Tensors [P] or one [2, P].
        nll_weight: lambda of the paper, >= 0.
        sft_logps: L_sft [P], the policy's log-probs of the SFT target of each prompt, differentiated. None: L_w.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
    )
    check_number("delta", delta)
    check_number("nll_weight", nll_weight)
    margin: float | Tensor = delta
    if scores is not None:
        score_w, score_l = pairs.constants("scores", scores, 0)
        margin = delta * (score_w - score_l)
    losses = F.relu(margin - pairs.margin)
    if sft_logps is not None:
        check_like("sft_logps", sft_logps, "policy_chosen_logps", pairs.chosen, same_dtype=False)
        if nll_weight == 0:
            raise ValueError("sft_logps must be None where nll_weight is 0: it would have no effect")
    if nll_weight:
        target = pairs.chosen if sft_logps is None else pairs.filled(sft_logps.to(losses.dtype), -1)
        losses = losses - nll_weight * target
    return pairs.result(losses, reduction, 1.0)


@takes_dtensors()
def rso_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    gamma: float = 0.05,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """The hinge of Statistical Rejection Sampling Optimization (Liu et al. 2023, arXiv:2309.06657).

        max(0, 1 - gamma h)

    TRL has it as ``loss_type="hinge"``. RSO's sigmoid loss is `dpo_loss`. The method also draws its pairs by rejection
    sampling, which is no part of the loss. Log-probs, `pair_mask`, `reduction`, results and errors are those of
    `dpo_loss`. Rewards are gamma * (policy - reference).

    Args:
        gamma: > 0.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "rso",
    )
    check_number("gamma", gamma, above=True)
    return pairs.result(F.relu(1 - gamma * pairs.relative_margin), reduction, gamma)


@takes_dtensors()
def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    lengths: PairOfTensors,
    beta: float = 2.0,
    gamma: float = 1.0,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """SimPO (Meng et al. 2024, arXiv:2405.14734): -log sigmoid(beta (L_w / |y_w| - L_l / |y_l|) - gamma).

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`, but references may be None: they
    enter the rewards only. Rewards are beta times the log-prob of a token. TRL's CPOTrainer has the loss as
    ``loss_type="simpo"``, and adds CPO's NLL unless ``cpo_alpha=0``.

    Args:
        lengths: tokens of the chosen and the rejected responses, two Tensors [P] or one [2, P]; 0 counts as 1.
        beta: > 0. The authors take 2 to 10.
        gamma: target margin, >= 0, within the sigmoid; the authors take gamma / beta near 0.5.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
    )
    check_number("beta", beta, above=True)
    check_number("gamma", gamma)
    pairs = pairs.averaged(pairs.lengths(lengths))
    return pairs.result(-F.logsigmoid(beta * pairs.margin - gamma), reduction, beta)


@takes_dtensors()
def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    lengths: PairOfTensors,
    beta: float = 0.1,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Odds Ratio Preference Optimization (Hong et al. 2024, arXiv:2403.07691).

        -a_w - beta log sigmoid(log(odds_w / odds_l)),    a = L / |y|,    odds = e^a / (1 - e^a)

    Log-probs, `pair_mask`, `reduction`, results and errors are those of `dpo_loss`, but references may be None: they
    enter the rewards only. Rewards are beta times the log-prob of a token. The first term is the NLL of a token of the
    chosen response, as in the paper; TRL's ORPOTrainer takes the mean over all tokens of the batch, prompts among them.

    Args:
        lengths: tokens of the chosen and the rejected responses, two Tensors [P] or one [2, P]; 0 counts as 1.
        beta: lambda of the paper, > 0.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
    )
    check_number("beta", beta, above=True)
    pairs = pairs.averaged(pairs.lengths(lengths))
    odds = _log_odds(pairs.chosen) - _log_odds(pairs.rejected)
    return pairs.result(-pairs.chosen - beta * F.logsigmoid(odds), reduction, beta)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)). A log-prob of 0 counts as -eps, so that its odds and their gradient are finite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


@takes_dtensors()
def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> LossTriple:
    """Anchored Preference Optimization, the variant "zero" (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

        1 - sigmoid(beta (L_w - R_w)) + sigmoid(beta (L_l - R_l))

    TRL has it as ``loss_type="apo_zero"``. Log-probs, `pair_mask`, `reduction`, results and errors are those of
    `dpo_loss`.

    Args:
        beta: > 0.
    """
    pairs = _checked_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        pair_mask,
        reduction,
        "apo_zero",
    )
    check_number("beta", beta, above=True)
    ratio_w, ratio_l = pairs.log_ratios
    return pairs.result(torch.sigmoid(-beta * ratio_w) + torch.sigmoid(beta * ratio_l), reduction, beta)


class Loss(NamedTuple):
    """A row of `LOSSES`."""

    function: Callable[..., LossTriple]  # (policy chosen, policy rejected, reference chosen, rejected, *, options)
    needs_reference: bool
    inputs: tuple[str, ...]  # options that must be given: of lengths, scores, similarity
    options: tuple[str, ...]  # all keyword-only parameters


def _row(function: Callable[..., LossTriple]) -> Loss:
    parameters = inspect.signature(function).parameters
    options = [parameter for parameter in parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    return Loss(
        function,
        parameters["reference_chosen_logps"].default is inspect.Parameter.empty,
        tuple(option.name for option in options if option.default is option.empty),
        tuple(option.name for option in options),
    )


LOSSES: dict[str, Loss] = {
    "spo": _row(spo_loss),
    "dpo": _row(dpo_loss),
    "ipo": _row(ipo_loss),
    "odpo": _row(odpo_loss),
    "rdpo": _row(rdpo_loss),
    "cpo": _row(cpo_loss),
    "rpo": _row(rpo_loss),
    "slic": _row(slic_loss),
    "rso": _row(rso_loss),
    "simpo": _row(simpo_loss),
    "orpo": _row(orpo_loss),
    "apo_zero": _row(apo_zero_loss),
}


def preference_loss(
    name: str,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    **options: Any,
) -> LossTriple:
    """A preference loss by its name. The function of each name, such as `ipo_loss` for "ipo", has the equation.

    Args:
        name: a key of `LOSSES`: "spo", "dpo", "ipo", "odpo", "rdpo", "cpo", "rpo", "slic", "rso", "simpo", "orpo",
            "apo_zero".
        policy_chosen_logps: [P].
        policy_rejected_logps: [P].
        reference_chosen_logps: [P]; may be None for a loss without a reference (`LOSSES[name].needs_reference`).
        reference_rejected_logps: [P]; as above.
        **options: the loss's own keyword arguments. Some losses need one: `lengths` (simpo, orpo), `scores` (odpo),
            `similarity` (rpo).

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [P], the rewards detached. All losses take ``pair_mask`` and
        ``reduction``, see `spo_loss`.

    Raises:
        ValueError: unknown name, or what the loss itself raises.
        TypeError: an option the loss does not take, or one that it needs is missing.
    """
    if name not in LOSSES:
        raise ValueError(f"name must be one of {', '.join(LOSSES)}, got {name!r}")
    row = LOSSES[name]
    for option in options:
        if option not in row.options:
            raise TypeError(f"{name} takes the options {', '.join(row.options)}, got {option}")
    for needed in row.inputs:
        if options.get(needed) is None:
            raise TypeError(f"{name} needs {needed}, got None; see `spo_kernels.losses.{name}_loss`")
    return row.function(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, **options
    )


@takes_dtensors()
def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    pair_mask: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Negative log-likelihood of a Bradley-Terry reward model (eq. 2): -log sigmoid(r_w - r_l).

    The paper prints this loss without its logarithm.

    Args:
        chosen_rewards: the model's rewards of chosen responses [P], floating point, differentiated. float16 and
            bfloat16 are taken to float32.
        rejected_rewards: [P], same dtype and device.
        pair_mask, reduction: see `spo_loss`.

    Returns:
        losses [P], or [] with a reduction.

    Raises:
        ValueError: pairs differ in count, dtype or device; an option is none of its values.
    """
    chosen, rejected = checked_pair("chosen_rewards", chosen_rewards, "rejected_rewards", rejected_rewards)
    _check_pair_options(pair_mask, reduction, chosen, "chosen_rewards")
    pairs = _Pairs(chosen, rejected, None, pair_mask)
    losses = pairs.filled(-F.logsigmoid(pairs.filled(pairs.margin, 0)), 0)
    return _reduced(losses, None, pair_mask, reduction)


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
        return self._weights(scores - normalizer)

    @torch.no_grad()
    @takes_dtensors()
    def batch_normalizer(self, logp_w: Tensor, logp_l: Tensor) -> Tensor:
        """Mean of s over these pairs and the process group, 0-d; NaN over no pair."""
        return self._mean(self._scores(logp_w, logp_l))

    def _weights(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores)

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
                f"logp_w must be on the device of {type(self).__name__}'s state, got {mean.device} against "
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


class PowerImportance(SoftImportance):
    """Pair weights that are a power of the pair's probability (section 4): (L_w [P], L_l [P]) -> mu [P], no gradient.

        mu = (pi(y_w) + pi(y_l))^gamma / c = exp(s - log c),    s = gamma logaddexp(L_w, L_l)

    Probabilities of responses are e^-30 to e^-300, so the power needs a normalizer: by default c is the mean of the
    power over the batch, which makes the mean of mu 1. At gamma = 0 every weight is 1. Weights have no upper bound but
    the number of pairs: one likely pair may carry the batch where gamma is not small.

    Args:
        gamma: >= 0, usually small.
        normalizer: log c: "batch", "ema", a float or a 0-d Tensor, as in `SoftImportance`. "batch" is the log of the
            mean of the power over the pairs of this call, "ema" a running average of that logarithm.
        process_group: the power is averaged over it, as in `SoftImportance`.
        decay: as in `SoftImportance`.

    The batch's normalizer depends on the pairs that it weighs. In small batches this biases the expected gradient,
    which Theorem 2 does not cover. The bias is smaller with "ema", and 0 with a number.
    """

    def _weights(self, scores: Tensor) -> Tensor:
        return scores.exp()

    def _mean(self, scores: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """Logarithm of the mean of exp(scores)."""
        ones = torch.ones_like(scores)
        if pair_mask is not None:
            scores, ones = torch.where(pair_mask, scores, -math.inf), torch.where(pair_mask, ones, 0)
        if len(scores) == 0:
            scores, ones = scores.new_full((1,), -math.inf), ones.new_zeros(1)
        largest = scores.amax(0)
        if self.process_group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.process_group)
        shift = torch.where(largest.isfinite(), largest, 0)
        totals = torch.stack((torch.exp(scores - shift), ones)).sum(dim=1)  # sum and count in one message
        if self.process_group is not None:
            torch.distributed.all_reduce(totals, group=self.process_group)
        return torch.log(totals[0] / totals[1]) + shift
