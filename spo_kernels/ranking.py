"""SPO from groups of responses: the best of n, or a ranking.

A group has n responses to one prompt with the log-probs L_1 ... L_n, best first. A stage is the choice of one response
among those that are left. With two left it is a pair, and goes through the code of `spo_loss`. With more left it is a
row of a matrix of deficits L_j - L_i, which is as wide as the largest group may be. N responses and G groups below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.checks import check_cu_seqlens, check_float, check_number, describe
from spo_kernels.distributed import takes_dtensors
from spo_kernels.losses import REDUCTIONS, SMALLEST_ALPHA, PairWeight, checked_mu, preference_losses
from spo_kernels.op_library import is_transforming, without_batches
from spo_kernels.precision import upcast

__all__ = ["spo_ranking_loss"]

KINDS = ("ranking", "best_of_n")


class _Groups(NamedTuple):
    order: Tensor | None  # [N] int64: the responses sorted by group; None if they are
    starts: Tensor  # [G] int64: rows of the sorted responses
    ends: Tensor  # [G]
    of_rows: Tensor  # [N] int64: the group of each sorted response

    @property
    def sizes(self) -> Tensor:
        return self.ends - self.starts


def _from_bounds(cu_groups: Tensor, logps: Tensor) -> _Groups:
    check_cu_seqlens(cu_groups, "cu_groups", logps, "policy_logps")
    bounds = cu_groups.long()
    values = without_batches(bounds)
    legal = (values[..., 0] == 0) & (values[..., -1] == len(logps)) & (values.diff() >= 0).all(-1)
    torch._assert_async(legal.all(), "cu_groups must rise from 0 to the number of responses N")
    of_rows = (torch.arange(len(logps), device=logps.device)[:, None] >= bounds[1:]).sum(1)
    return _Groups(None, bounds[:-1], bounds[1:], of_rows)


def _from_ids(group_ids: Tensor, num_groups: int | None, logps: Tensor) -> _Groups:
    if not isinstance(group_ids, Tensor):
        raise TypeError(f"group_ids must be an integer Tensor [N], got {type(group_ids).__name__}")
    if group_ids.shape != logps.shape or group_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"group_ids must be [N] int32 or int64 like policy_logps, got {describe(group_ids)} against "
            f"{list(logps.shape)}"
        )
    if group_ids.device != logps.device:
        raise ValueError(f"group_ids must be on {logps.device} like policy_logps, got {group_ids.device}")
    count = len(logps) if num_groups is None else num_groups
    values = without_batches(group_ids)
    torch._assert_async(((values >= 0) & (values < count)).all(), "group_ids must be >= 0 and below num_groups")
    of_rows, order = group_ids.long().sort(stable=True)
    ends = (of_rows[:, None] == torch.arange(count, device=logps.device)).sum(0).cumsum(0)
    return _Groups(order, F.pad(ends, (1, 0))[:-1], ends, of_rows)


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values [N] at rows of any shape; 0 at row N."""
    return F.pad(values, (0, 1)).gather(0, rows.flatten()).view(rows.shape)


def _windows(first: Tensor, ends: Tensor, width: int, rows: int) -> Tensor:
    """The rows [R, width] from first [R] on, `rows` after the ends [R]."""
    window = first[:, None] + torch.arange(width, device=first.device)
    return torch.where(window < ends[:, None], window, rows)


def _stage_losses(deficits: Tensor, valid: Tensor, alpha: float, center: bool) -> Tensor:
    """log(1 + sum_j exp(alpha deficit_j)) / alpha, [R], over the valid deficits [R, K]; the others are -inf.

    The centred form has a mean in the place of the sum, over the chosen response (deficit 0) too.
    """
    count = 1 + valid.sum(1)
    if alpha == 0 or (center and alpha < SMALLEST_ALPHA):
        return torch.where(valid, deficits, 0).sum(1) / count
    every = F.pad(deficits, (1, 0))
    largest, at = every.max(1)
    scaled = torch.where(every == largest[:, None], 0, alpha * (every - largest[:, None]))  # inf - inf is NaN
    if center:
        present = F.pad(valid, (1, 0), value=True)
        return largest + torch.log1p(torch.where(present, torch.expm1(scaled), 0).sum(1) / count) / alpha
    is_largest = torch.arange(every.shape[1], device=at.device) == at[:, None]  # its 1 is that of log1p
    return largest + torch.log1p(torch.where(is_largest, 0, scaled.exp()).sum(1)) / alpha


def _stage_errors(deficits: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """The derivative of `_stage_losses` by the deficits, [R, K], with and without center: a softmax."""
    if alpha == 0:
        return valid / (1 + valid.sum(1, keepdim=True)).to(deficits.dtype)
    every = F.pad(deficits, (1, 0))
    largest = every.detach().amax(1, keepdim=True)
    impossible = torch.where(every == torch.inf, 0, -torch.inf)  # of a chosen response with log-prob -inf
    gaps = torch.where(largest == torch.inf, impossible.to(every.dtype), every - largest)
    return (alpha * gaps).softmax(1)[:, 1:]


class _Stages(torch.autograd.Function):
    """`_stage_losses` with the closed form of its gradient, which needs no division by alpha."""

    generate_vmap_rule = True

    @staticmethod
    def forward(deficits: Tensor, valid: Tensor, alpha: float, center: bool) -> Tensor:
        return _stage_losses(deficits, valid, alpha, center)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
        deficits, valid, ctx.alpha, _ = inputs
        ctx.save_for_backward(deficits, valid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        deficits, valid = ctx.saved_tensors
        return _stage_errors(deficits, valid, ctx.alpha) * grad[:, None], None, None, None


class _TransformableStages(_Stages):
    """With a jvp, for torch.func and forward-mode AD. Dynamo cannot trace a function with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
        _Stages.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        deficits, valid = ctx.saved_tensors
        return (_stage_errors(deficits, valid, ctx.alpha) * tangent).sum(1)


@takes_dtensors()
def spo_ranking_loss(
    policy_logps: Tensor,
    cu_groups: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
    max_group_size: int | None = None,
    kind: str = "ranking",
    alpha: float = 0.1,
    weight: PairWeight | None = None,
    center: bool = False,
    reduction: str = "none",
) -> Tensor:
    """Soft Preference Optimization of groups of responses: rankings (Plackett-Luce), or the best of n.

    A group has n responses to one prompt, best first, with the log-probs L_1 ... L_n in nats:

        ranking:    -(mu / alpha) sum_i log [exp(alpha L_i) / sum_{j >= i} exp(alpha L_j)]
        best of n:  -(mu / alpha) log [exp(alpha L_1) / sum_j exp(alpha L_j)]; the order of the others has no effect

    A pair is a group of 2, and its loss is that of `spo_loss`, bit for bit. A group of 1 has the loss 0. With mu fixed
    and rankings that follow Plackett-Luce with rewards r, the minimizer of the expected loss is softmax(r / alpha).

    `center=True` leaves out the constant, log(n!) / alpha of a ranking and log(n) / alpha of a best of n. The loss is
    then continuous at alpha = 0: sum_i (mean_{j >= i} L_j - L_i), or mean_j L_j - L_1. This limit is the loss at
    alpha = 0 with and without center. It is linear in the log-probs, so it has no minimum.

    From logits, L is `sequence_logps`. From hidden states, without logits, it is `linear_sequence_logps`.

    Log-probs of -inf follow the equations: a stage whose chosen response is impossible has the loss +inf, and its
    gradient is shared evenly by the others. It is NaN if another response that is left is impossible too.

    Args:
        policy_logps: L [N] of the responses of all groups, floating point. float16 and bfloat16 are taken to float32.
        cu_groups: [G + 1] int32 or int64, on the device of policy_logps: group g is the responses from cu_groups[g] up
            to cu_groups[g + 1], best first; from 0 to N. Groups may differ in size, and may be empty.
        group_ids: [N] int32 or int64 in the place of cu_groups: the group of each response, >= 0. The responses of a
            group may stand anywhere, the better before the worse.
        num_groups: G, with group_ids; None: N, the most that there can be.
        max_group_size: an upper bound on n; None: N. Memory and time grow like N times this number, and N times G.
        kind: "ranking" or "best_of_n".
        alpha: softness, >= 0.
        weight: mu of each group, the same for all stages, not negative: a Tensor [G], a callable, or None for 1. Never
            differentiated. Groups of weight 0 are not read. A callable gets L_1 [G] and the log-sum-exp of the others
            [G], as if they were a pair: so `SoftImportance` and `PowerImportance` see the probability of the whole
            group, whatever its order. They see groups of 2 and more only.
        center: leave out the constant.
        reduction: "none": losses [G]. "mean": the mean over groups with a response, []. "sum": the sum, [].

    Returns:
        losses [G], 0 for empty groups, or [] with a reduction; float32 (float64 for float64 log-probs).

    Raises:
        ValueError: not exactly one of cu_groups and group_ids; a Tensor of another shape, dtype or device; an option
            out of its range; num_groups without group_ids.
        RuntimeError: cu_groups does not rise from 0 to N; a group id is not in [0, G); a group is larger than
            max_group_size. On a GPU these are device-side assertions.
        TypeError: an argument is not a Tensor where it must be one, or not a Python number where it must be one.
    """
    check_float("policy_logps", policy_logps, "[N]")
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps must be [N], got {list(policy_logps.shape)}")
    check_number("alpha", alpha)
    for name, size in (("num_groups", num_groups), ("max_group_size", max_group_size)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 0):
            raise ValueError(f"{name} must be an integer >= 0 or None, got {size!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if (cu_groups is None) == (group_ids is None):
        given = "neither" if cu_groups is None else "both"
        raise ValueError(f"exactly one of cu_groups and group_ids must be given, got {given}")
    if cu_groups is not None:
        if num_groups is not None:
            raise ValueError("num_groups must be None with cu_groups, which says it")
        groups = _from_bounds(cu_groups, policy_logps)
    else:
        assert group_ids is not None
        groups = _from_ids(group_ids, num_groups, policy_logps)

    logps, rows = upcast(policy_logps), len(policy_logps)
    width = rows if max_group_size is None else min(max_group_size, rows)
    if max_group_size is not None:
        within = (without_batches(groups.sizes) <= max_group_size).all()
        torch._assert_async(within, "max_group_size must be at least the size of the largest group")
    if groups.order is not None:
        logps = logps.gather(0, groups.order)
    mu = _group_weights(weight, logps.detach(), groups, width)
    read = mu != 0
    logps = torch.where(_at(read, groups.of_rows), logps, 0)
    losses = _group_losses(logps, groups, width, read, alpha=alpha, center=center, best_only=kind == "best_of_n")
    losses = torch.where(read, mu * losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (groups.sizes > 0).sum().clamp(min=1)


def _group_weights(weight: PairWeight | None, logps: Tensor, groups: _Groups, width: int) -> Tensor:
    """mu [G], 0 for groups that have no choice."""
    choice = groups.sizes >= 2
    if isinstance(weight, Tensor) and weight.shape != choice.shape:
        raise ValueError(f"weight must be [G] with G = {len(choice)}, got {list(weight.shape)}")
    rows = len(logps)
    others = _windows(groups.starts + 1, groups.ends, max(width - 1, 1), rows)
    first = _at(logps, torch.where(choice, groups.starts, rows))
    rest = torch.where(others < rows, _at(logps, others), -torch.inf).logsumexp(1)
    return checked_mu(weight, first, rest, choice)


def _group_losses(
    logps: Tensor, groups: _Groups, width: int, read: Tensor, *, alpha: float, center: bool, best_only: bool
) -> Tensor:
    """Losses [G] of sorted log-probs [N], without weights; anything for groups that are not read."""
    rows = len(logps)
    as_pair = read & (groups.sizes == 2) if best_only else read
    better, worse = (_at(logps, torch.where(as_pair, groups.ends - back, rows)) for back in (2, 1))
    pairs = torch.where(as_pair, preference_losses(better - worse, alpha, center), 0)

    # Stages with three or more left: the first of each group, or all. The others have no valid deficit, and the loss 0.
    first = groups.starts if best_only else torch.arange(rows, device=logps.device)
    ends = groups.ends if best_only else _at(groups.ends, groups.of_rows)
    ends = torch.where(ends - first > 2, ends, first)
    rest = _windows(first + 1, ends, max(width - 1, 0), rows)
    valid = rest < rows
    chosen = _at(logps, torch.where(ends > first, first, rows))
    deficits = torch.where(valid, _at(logps, rest) - chosen[:, None], -torch.inf)
    stages = (_TransformableStages if is_transforming() else _Stages).apply(deficits, valid, alpha, center)
    if best_only:
        return pairs + stages
    return pairs + _at(stages, _windows(groups.starts, groups.ends, width, rows)).sum(1)
