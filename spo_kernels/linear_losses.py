"""SPO's objective from hidden states and the head's weight: `spo_kernels.losses` over `spo_kernels.linear`.

Two routes lead to the same loss and gradients. "recompute" is `linear_sequence_logps`, `spo_loss` and autograd: one
matrix product forward, three backward. "recompute_free" has three in all: where a pair's gradient by its own log-probs
depends on nothing but them, it is known as soon as the pair's rows have passed, and their logits are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_kernels import head, ops, sequences, vocabulary
from spo_kernels.functional import (
    check_rows,
    check_sequences,
    output_dtype,
    sum_sequences,
    waits_for_upstream,
)
from spo_kernels.linear import (
    as_rows,
    autocast_head,
    checked_head,
    checked_options,
    gradient_dtype_of,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    needs_of,
)
from spo_kernels.losses import (
    SoftImportance,
    SPOMetrics,
    check_like,
    check_number,
    checked_importance,
    checked_mu,
    mean_or_zero,
    pair_error,
    pair_preference,
    spo_loss,
    spo_metrics,
)
from spo_kernels.vocabulary import checked_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUTES = ("auto", "recompute", "recompute_free")

ops.library.define(
    f"linear_spo_loss_fwd({ops.HEAD_ARGS}, Tensor labels, Tensor bounds, Tensor counts, Tensor? pair_weight, "
    "Tensor? normalizer, float gamma, float alpha, bool center, bool average, float nll_weight, int ignore_index, "
    f"bool strict, {ops.UNIT_GRADIENT_ARGS}, {ops.OPTION_ARGS}) "
    "-> (Tensor loss, Tensor sums, Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@ops.head_op("linear_spo_loss_fwd")
def _(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    bounds: Tensor,  # [2P + 1], first row of each sequence, and N
    counts: Tensor,  # [2P] unignored rows of each sequence, floating
    pair_weight: Tensor | None,  # [P]
    normalizer: Tensor | None,  # [], of soft importance with gamma; None for uniform weights
    gamma: float,
    alpha: float,
    center: bool,
    average: bool,
    nll_weight: float,
    ignore_index: int,
    strict: bool,
    gradient_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    vocab_start: int,
    vocab_size: int,
    process_group: str | None,
) -> tuple[Tensor, ...]:
    pairs = counts.shape[0] // 2
    shard = ops.shard_of(vocab_start, vocab_size, process_group)
    if shard is not None:
        shard.check_same(labels=labels, cu_seqlens=bounds, pair_weight=pair_weight)
    vocabulary.check_labels(labels, vocab_size, ignore_index)
    importance = None if normalizer is None else SoftImportance(gamma, normalizer)
    losses = counts.new_zeros(pairs)
    divisor = counts.clamp(min=1) if average else torch.ones_like(counts)
    nll_share = nll_weight / counts[:pairs].sum().clamp(min=1)

    def coefficients(first: int, end: int, sums_w: Tensor, sums_l: Tensor) -> tuple[Tensor, Tensor]:
        divisor_w, divisor_l = divisor[first:end], divisor[pairs + first : pairs + end]
        logp_w, logp_l = sums_w / divisor_w, sums_l / divisor_l
        mu = torch.ones_like(logp_w)
        if pair_weight is not None:
            mu = pair_weight[first:end]
        elif importance is not None:
            mu = importance(logp_w, logp_l)
        margin = torch.where(mu == 0, 0, logp_w - logp_l)
        losses[first:end] = torch.where(mu == 0, 0, mu * pair_preference(margin, alpha, center))
        slope = mu * pair_error(margin, alpha) / pairs
        return -slope / divisor_w - nll_share, slope / divisor_l

    sums, *gradients = head.pair_gradients(
        head.Head(hidden, weight, bias, shard),
        labels,
        bounds,
        pairs,
        coefficients,
        gradient_dtype,
        head.Needs(need_hidden, need_weight, need_bias),
        head.LogitOptions(temperature, softcap, logit_scale),
        ignore_index,
        chunk_size,
        strict,
    )
    loss = mean_or_zero(losses) - (nll_share * sums[:pairs].sum() if nll_weight else 0)
    return loss, sums, *gradients


@torch.library.register_fake("spo_kernels::linear_spo_loss_fwd", lib=ops.library)
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, bounds: Tensor, counts: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    gradients = ops.empty_gradients(hidden, weight, bias, args)
    return counts.new_empty(()), torch.empty_like(counts), *gradients


ops.register_autograd(
    "linear_spo_loss_fwd",
    *ops.unit_gradients_of(
        'LinearSPOLoss with route "auto" or "recompute_free" can run backward only once: its gradients were computed '
        'in the forward and scaled in place by the first backward; use route "recompute"'
    ),
)


class LinearSPOLoss(nn.Module):
    """`SPOLoss` from hidden states and the head's weight, without the logits; optionally with an NLL term.

    Args:
        alpha: softness, >= 0; see `spo_loss`.
        beta: weight of the KL, >= 0. If it is not 0, `forward` needs the kl_ arguments.
        weight: importance of pairs: None for uniform weights, a number gamma for `SoftImportance(gamma)`, or a
            `SoftImportance` (or any callable from two [P] to [P]), whose state then belongs to this module.
        center: leave out eq. 8's constant log(2)/alpha.
        average: take the mean of token log-probs in place of their sum for L_w and L_l.
        nll_weight: >= 0; adds that much of the mean negative log-prob over all tokens of chosen responses.
        ignore_index: label of rows that are no part of a response.
        chunk_size, temperature, softcap, logit_scale: see `spo_kernels.linear`.
        process_group, vocab_shards: see `spo_kernels.linear`; the group that holds the vocabulary, of both heads. Pairs
            split over another group are `SoftImportance`'s.
        route: "recompute" or "recompute_free" (see the module), the same loss and gradients to rounding, or "auto".
            "recompute_free" computes gradients in the forward, keeps them in float32 (in bfloat16 where matrix
            products are), and can run one backward, which multiplies them by the upstream scalar on the device. It
            needs pair weights that a pair determines: uniform, `pair_weight`, or a `SoftImportance` whose normalizer is
            a number or a Tensor ("batch" and "ema" know theirs only after the last pair; for a running average that
            lags by a step, call a second `SoftImportance` of "ema" with `SPOMetrics.chosen_logps` and `rejected_logps`,
            and give its `running_mean` to `set_normalizer`); and tiles that hold every pair, chosen and rejected rows.
            "auto" takes it where the weights allow it, and recomputes the pairs that are too long.
            float16 recomputes, and refuses "recompute_free": see `kl_loss`.
            The KL's coefficient is always known. Without gradients no route computes any.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.0,
        weight: float | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        center: bool = False,
        average: bool = False,
        nll_weight: float = 0.0,
        ignore_index: int = -100,
        chunk_size: int | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        route: str = "auto",
        process_group: ProcessGroup | None = None,
        vocab_shards: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("beta", beta)
        check_number("nll_weight", nll_weight)
        if route not in ROUTES:
            raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
        self.alpha = alpha
        self.beta = beta
        self.weight = checked_importance(weight)
        self.center = center
        self.average = average
        self.nll_weight = nll_weight
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size
        self.options = checked_options(temperature, softcap, logit_scale, chunk_size)
        self.route = route
        self.process_group = process_group
        self.vocab_shards = vocab_shards

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, center={self.center}, average={self.average}, "
            f"nll_weight={self.nll_weight}, route={self.route!r}"
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        pair_weight: Tensor | None = None,
        kl_hidden: Tensor | None = None,
        kl_ref_hidden: Tensor | None = None,
        kl_ref_weight: Tensor | None = None,
        kl_ref_bias: Tensor | None = None,
        kl_mask: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, SPOMetrics]:
        """The objective and its metrics.

        Args:
            hidden: [2P, T, H], chosen responses in rows [0:P], rejected ones of the same pairs in [P:2P]; packed,
                [N, H] with `cu_seqlens`. Aligned with labels: nothing is shifted.
            weight: [V, H], the head's.
            labels: [2P, T] or [N] int64; `ignore_index` outside responses.
            bias: [V] or None, the head's.
            cu_seqlens: [2P + 1], start of each sequence in the packed rows, and N.
            pair_weight: mu [P], in place of the module's weight; no gradient flows to it. Pairs of weight 0 are not
                read: their rows are dropped as ignored ones are, from the NLL too, and their log-probs are 0.
            kl_hidden: [S, T', H], the policy on sequences sampled from it; packed, [N', H] with `kl_cu_seqlens`.
            kl_ref_hidden: the reference's hidden states of the same rows, [.., H'], without gradient.
            kl_ref_weight: [V, H'], the reference's head, without gradient.
            kl_ref_bias: [V] or None.
            kl_mask: [S, T'] or [N'] bool, True for the rows that predict a token of the sampled response, its
                end-of-sequence token included; None for all rows.
            kl_cu_seqlens: [S + 1]; the mean over S is all that depends on it.
            reference_chosen_logps: [P], for the rewards only.
            reference_rejected_logps: [P], for the rewards only.

        Returns:
            (objective [], `SPOMetrics`), float32 (float64 for float64 hidden states). With P = 0 the preference part is
            0; the NLL term is part of the objective and of no metric.

        Raises:
            ValueError: an odd number of sequences; beta without the kl_ arguments or the reverse; route
                "recompute_free" with weights that only the whole batch determines, or with a pair longer than a tile;
                and what `linear_sequence_logps`, `linear_token_kl` and `spo_loss` raise.
        """
        policy = checked_head(*autocast_head(hidden, weight, bias))
        check_rows(labels, "labels", torch.int64, hidden, "hidden")
        check_sequences(labels, cu_seqlens, "labels", "hidden")
        count = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        pairs = count // 2  # the compiler has no divmod of a dynamic size
        if count % 2:
            raise ValueError(f"hidden must hold P chosen and then P rejected sequences, got {count} in all")
        bounds = sequences.padded_bounds(labels) if cu_seqlens is None else cu_seqlens.contiguous()
        if pair_weight is not None:
            pair_weight = self._checked_pair_weight(pair_weight, pairs, policy.hidden)
            labels = self._labels_of_read_pairs(labels, bounds, pair_weight)
        valid = (labels != self.ignore_index).to(output_dtype(hidden))
        counts = sum_sequences(valid, cu_seqlens, "labels", "hidden")
        at_once = (
            self._gradients_at_once(pair_weight, policy.hidden.dtype)
            and torch.is_grad_enabled()
            and any(needs_of(policy))
        )
        unit: Tensor | None = None
        if at_once:
            unit, sums = self._loss_and_sums(policy, labels, bounds, counts, pair_weight)
        else:
            sums = linear_sequence_logps(
                policy.hidden,
                policy.weight,
                labels,
                policy.bias,
                ignore_index=self.ignore_index,
                cu_seqlens=cu_seqlens,
                chunk_size=self.chunk_size,
                process_group=self.process_group,
                vocab_shards=self.vocab_shards,
                **self.options._asdict(),
            )
        logps = sums / counts.clamp(min=1) if self.average else sums
        logp_w, logp_l = logps[:pairs], logps[pairs:]
        mu = checked_mu(self.weight if pair_weight is None else pair_weight, logp_w, logp_l)
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
        if unit is not None:
            objective = unit
        elif self.nll_weight:
            objective = preference - self.nll_weight * sums[:pairs].sum() / counts[:pairs].sum().clamp(min=1)
        kl = self._mean_kl(kl_hidden, policy, (kl_ref_hidden, kl_ref_weight, kl_ref_bias), kl_mask, kl_cu_seqlens)
        if kl is not None:
            objective = objective + self.beta * kl
        return objective, spo_metrics(preference, kl, logp_w, logp_l, chosen_rewards, rejected_rewards, mu, self.alpha)

    @staticmethod
    def _checked_pair_weight(pair_weight: Tensor, pairs: int, hidden: Tensor) -> Tensor:
        """pair_weight [P] as a constant in the dtype of the log-probs."""
        check_like("pair_weight", pair_weight, "the pairs", hidden.new_empty(pairs), same_dtype=False)
        return pair_weight.detach().to(output_dtype(hidden))

    def _labels_of_read_pairs(self, labels: Tensor, bounds: Tensor, pair_weight: Tensor) -> Tensor:
        """labels with `ignore_index` in the rows of pairs of weight 0, which are not read."""
        unread = (pair_weight == 0).repeat(2)[sequences.of_rows(bounds, labels.numel())]
        return labels.masked_fill(unread.view_as(labels), self.ignore_index)

    def _gradients_at_once(self, pair_weight: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether the route is the one without recomputation, for these pair weights and a head of this dtype."""
        if self.route == "recompute":
            return False
        if not waits_for_upstream(dtype):
            if self.route == "recompute_free":
                raise ValueError(
                    f'route "recompute_free" computes gradients before the loss scale that {dtype} needs is known: use '
                    '"recompute" or "auto", or bfloat16'
                )
            return False
        by_pair = (
            pair_weight is not None
            or self.weight is None
            or (isinstance(self.weight, SoftImportance) and not isinstance(self.weight.normalizer, str))
        )
        if self.route == "recompute_free" and not by_pair:
            raise ValueError(
                'route "recompute_free" needs pair weights that a pair determines: weight None, pair_weight, or a '
                f"SoftImportance whose normalizer is a number or a Tensor, got weight {self.weight}"
            )
        return by_pair

    def _loss_and_sums(
        self, policy: head.Head, labels: Tensor, bounds: Tensor, counts: Tensor, pair_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(preference loss and NLL [], summed log-probs [2P] without gradient), the gradient computed with them."""
        importance = self.weight if pair_weight is None else None
        normalizer = None
        if importance is not None:
            normalizer = torch.as_tensor(importance.normalizer, dtype=counts.dtype, device=counts.device)
        loss, sums, *_ = torch.ops.spo_kernels.linear_spo_loss_fwd(
            *as_rows(policy),
            labels.reshape(-1),
            bounds,
            counts,
            pair_weight,
            normalizer,
            0.0 if importance is None else importance.gamma,
            self.alpha,
            self.center,
            self.average,
            self.nll_weight,
            self.ignore_index,
            self.route == "recompute_free",
            gradient_dtype_of(policy, self.options),
            *needs_of(policy),
            *self.options,
            self.chunk_size,
            *checked_shard(self.process_group, self.vocab_shards, policy.weight.shape[0]),
        )
        return loss, sums

    def _mean_kl(
        self,
        hidden: Tensor | None,
        policy: head.Head,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor | None:
        """Mean over sampled sequences of the token KL summed over each (Appendix B); None at beta = 0."""
        ref_hidden, ref_weight, ref_bias = reference
        given = {"kl_hidden": hidden, "kl_ref_hidden": ref_hidden, "kl_ref_weight": ref_weight}
        if self.beta == 0:
            for name, tensor in given.items():
                if tensor is not None:
                    raise ValueError(f"{name} must be None where beta is 0: it would have no effect; give beta > 0")
            return None
        for name, tensor in given.items():
            if tensor is None:
                raise ValueError(f"{name} must be given where beta is not 0, got None with beta = {self.beta}")
        assert hidden is not None and ref_hidden is not None and ref_weight is not None
        if cu_seqlens is None and hidden.dim() != 3:
            raise ValueError(f"kl_hidden must be [S, T, H], or [N, H] with kl_cu_seqlens, got {list(hidden.shape)}")
        sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if sequences < 1:
            raise ValueError(f"kl_hidden must hold at least one sequence, got {list(hidden.shape)}")
        if mask is not None:
            check_rows(mask, "kl_mask", torch.bool, hidden, "kl_hidden")
        arguments = (hidden, policy.weight, ref_hidden, ref_weight, mask, policy.bias, ref_bias)
        options: dict[str, Any] = {
            "chunk_size": self.chunk_size,
            "process_group": self.process_group,
            "vocab_shards": self.vocab_shards,
            **self.options._asdict(),
        }
        kl = linear_token_kl if self.route == "recompute" else linear_kl_loss
        return kl(*arguments, **options).sum() / sequences
