"""SPO's objective as modules: from logits, and from hidden states and the head's weight.

Both are the mean preference loss over P pairs plus beta times the mean KL over S sampled sequences (eq. 1, 8).
`SPOLoss` takes logits, `LinearSPOLoss` hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels import sequences
from spo_kernels.checks import IGNORE_INDEX, check_cu_seqlens, check_like, check_number, check_rows, check_sequences
from spo_kernels.distributed import HoldsProcessGroup, takes_dtensors
from spo_kernels.divergences import checked_mixture
from spo_kernels.functional import sequence_logps, token_kl
from spo_kernels.linear.checks import check_chunk_size, checked_head, checked_options, checked_ref_head
from spo_kernels.linear.functional import kl_loss_of, kl_of, precomputed_needs
from spo_kernels.linear.ops import linear_spo_loss_fwd, linear_token_stats_fwd
from spo_kernels.linear.records import Head, HeadOptions, PairObjective, PairWeights
from spo_kernels.logit_options import LogitOptions, RefLogitOptions, check_logit_options, of_reference
from spo_kernels.losses import SoftImportance, checked_mu, mean_or_zero, pair_error, spo_loss
from spo_kernels.op_library import is_transforming
from spo_kernels.precision import accumulate_dtype, can_precompute_gradient
from spo_kernels.shards import Columns, check_vocab_size, padded_columns_read

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUTES = ("auto", "recompute", "recompute_free")

Importance = Callable[[Tensor, Tensor], Tensor]  # (L_w [P], L_l [P]) -> mu [P]


class SPOMetrics(NamedTuple):
    """Numbers to watch a step by: detached Tensors on the device, nothing read back to the host."""

    preference_loss: Tensor  # [] mean over pairs, without the KL
    kl: Tensor  # [] mean over sampled sequences of their summed token KL (or other divergence), nats; 0 without samples
    chosen_logps: Tensor  # [P] nats
    rejected_logps: Tensor  # [P] nats
    chosen_rewards: Tensor  # [P] as `spo_loss` returns them
    rejected_rewards: Tensor  # [P]
    accuracy: Tensor  # [] share of pairs with D > 0: the policy's own preference (eq. 6) agrees with the label
    margin: Tensor  # [] mean of D, nats; this and accuracy are over the pairs whose mu is not 0
    mu: Tensor  # [P] weights of the pairs; 1 without importance
    preference_error: Tensor  # [P] sigmoid(-alpha D) of eq. 12: 0 where the policy surely prefers the chosen response


def _checked_importance(weight: float | Importance | None) -> Importance | None:
    if weight is None or callable(weight):
        return weight
    if not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number gamma, a callable or None, got {type(weight).__name__}")
    return SoftImportance(weight)


class _PairObjective(HoldsProcessGroup):
    """What both modules have in common: the options of the pair loss, and the objective from log-probs and KL."""

    importance: Importance | None

    def __init__(
        self,
        alpha: float,
        beta: float,
        weight: float | Importance | None,
        *,
        center: bool,
        average: bool,
        ignore_index: int,
        logit_options: LogitOptions,
        ref_logit_options: RefLogitOptions,
        vocab_size: int | None,
        divergence: str,
        mixture: float | None,
        process_group: ProcessGroup | None,
        vocab_shards: Sequence[int] | None,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("beta", beta)
        self.alpha = alpha
        self.beta = beta
        self.importance = _checked_importance(weight)
        self.center = center
        self.average = average
        self.ignore_index = ignore_index
        check_logit_options(logit_options, None)
        check_logit_options(of_reference(ref_logit_options, logit_options), None, prefix="ref_")
        self.temperature, self.softcap, self.logit_scale = logit_options
        self.ref_temperature, self.ref_softcap, self.ref_logit_scale = ref_logit_options
        check_vocab_size(vocab_size)
        self.vocab_size = vocab_size
        checked_mixture(divergence, mixture)
        self.divergence = divergence
        self.mixture = mixture
        self.process_group = process_group
        self.vocab_shards = vocab_shards

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, center={self.center}, average={self.average}"

    @property
    def weight(self) -> Importance | None:
        """`importance`, by the name of the constructor's argument. Setting either sets both."""
        return self.importance

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "importance"):
            name, value = "importance", _checked_importance(value)
            self._modules.pop(name, None)  # a function may take a submodule's place
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Earlier states call `importance` weight.
        old = f"{prefix}weight."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}importance.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _objective(
        self,
        logps: Tensor,
        mu: Importance | Tensor | None,
        kl: Tensor | None,
        references: tuple[Tensor | None, Tensor | None],
        preference_and_more: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, SPOMetrics]:
        """The objective and its metrics.

        Args:
            logps: [2P], chosen then rejected.
            mu: the pairs' weights, or what computes them.
            kl: [], or None without a KL term.
            references: the reference's log-probs, each [P] or None.
            preference_and_more: maps the preference loss [] to the term of the objective that replaces it.
        """
        pairs = logps.shape[0] // 2
        logp_w, logp_l = logps[:pairs], logps[pairs:]
        mu = checked_mu(mu, logp_w, logp_l)
        losses, chosen_rewards, rejected_rewards = spo_loss(
            logp_w, logp_l, *references, alpha=self.alpha, weight=mu, center=self.center
        )
        preference = mean_or_zero(losses)
        objective = preference if preference_and_more is None else preference_and_more(preference)
        if kl is not None:
            objective = objective + self.beta * kl
        margin = (logp_w - logp_l).detach()
        read = mu != 0
        read_pairs = read.sum().clamp(min=1)
        return objective, SPOMetrics(
            preference_loss=preference.detach(),
            kl=torch.zeros_like(preference) if kl is None else kl.detach(),
            chosen_logps=logp_w.detach(),
            rejected_logps=logp_l.detach(),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            accuracy=(read & (margin > 0)).sum().to(margin.dtype) / read_pairs,
            margin=torch.where(read, margin, 0).sum() / read_pairs,
            mu=mu,
            preference_error=pair_error(margin, self.alpha),
        )

    def _samples(
        self, needed: dict[str, Tensor | None], optional: dict[str, Tensor | None], cu_seqlens: Tensor | None, form: str
    ) -> int:
        """Number of sampled sequences S; 0 at beta = 0. Arguments of the KL by name, the policy's first.

        ValueError if beta is 0 and any argument is given, or if beta is not 0 and a needed one is missing or holds no
        sequence.
        """
        if self.beta == 0:
            for name, tensor in (needed | optional | {"kl_cu_seqlens": cu_seqlens}).items():
                if tensor is not None:
                    raise ValueError(f"{name} must be None where beta is 0: it would have no effect; give beta > 0")
            return 0
        for name, tensor in needed.items():
            if tensor is None:
                raise ValueError(f"{name} must be given where beta is not 0, got None with beta = {self.beta}")
        name, policy = next(iter(needed.items()))
        assert policy is not None
        if cu_seqlens is None and policy.dim() != 3:
            shapes = f"[S, T, {form}], or [N, {form}] with kl_cu_seqlens"
            raise ValueError(f"{name} must be {shapes}, got {list(policy.shape)}")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, "kl_cu_seqlens", policy, name)
        samples = policy.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if samples < 1:
            raise ValueError(f"{name} must hold at least one sequence, got {list(policy.shape)}")
        return samples


def _number(value: float) -> Tensor:
    """A number as an op takes it. A product, because torch.compile specializes a number in most other operations."""
    return torch.ones((), dtype=torch.float64) * value


def _check_even(sequences: int, name: str) -> None:
    if sequences % 2:
        raise ValueError(f"{name} must hold P chosen and then P rejected sequences, got {sequences} in all")


class SPOLoss(_PairObjective):
    """SPO's objective from logits: mean preference loss over pairs plus beta times the mean KL over samples (eq. 1, 8).

    Args:
        alpha: softness, >= 0; see `spo_loss`.
        beta: weight of the KL, >= 0. If it is not 0, `forward` needs `kl_logits` and `kl_ref_logits`.
        weight: importance of pairs: None for uniform weights, a number gamma for `SoftImportance(gamma)`, or a
            `SoftImportance` (or any callable from two [P] to [P]). The attribute `importance` holds it.
        center: leave out eq. 8's constant log(2)/alpha.
        average: take the mean of token log-probs in place of their sum for L_w and L_l.
        ignore_index: label of rows outside responses.
        temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size: see
            `spo_kernels.functional`; numbers. The ref_ options are those of `kl_ref_logits`.
        divergence, mixture: "kl", "reverse_kl" or "jsd": the regularizer in the place of the KL; see
            `spo_kernels.functional`.
        inplace_backward: the backward writes dlogits into the memory of `logits` and `kl_logits`: this saves a
            V-wide allocation. Use neither tensor afterwards. See `token_logps` for what autograd catches.
        process_group, vocab_shards: see `spo_kernels.functional`; the group that holds the vocabulary. A group that
            splits the pairs belongs to `SoftImportance`. Copies have the same group, pickles its name: see
            `spo_kernels.distributed.HoldsProcessGroup`.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.0,
        weight: float | Importance | None = None,
        *,
        center: bool = False,
        average: bool = False,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ref_temperature: float | None = None,
        ref_softcap: float | None = None,
        ref_logit_scale: float | None = None,
        vocab_size: int | None = None,
        divergence: str = "kl",
        mixture: float | None = None,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
        vocab_shards: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            alpha,
            beta,
            weight,
            center=center,
            average=average,
            ignore_index=ignore_index,
            logit_options=LogitOptions(temperature, softcap, logit_scale),
            ref_logit_options=RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale),
            vocab_size=vocab_size,
            divergence=divergence,
            mixture=mixture,
            process_group=process_group,
            vocab_shards=vocab_shards,
        )
        self.inplace_backward = inplace_backward

    @takes_dtensors(logits=-1, kl_logits=-1, kl_ref_logits=-1)
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
            kl_cu_seqlens: [S + 1]; used only for S, by which the KL is divided.
            reference_chosen_logps: [P], for the rewards only.
            reference_rejected_logps: [P], for the rewards only.

        Returns:
            (objective [], `SPOMetrics`), float32 (float64 for float64 logits). With P = 0 the preference part is 0.

        Raises:
            ValueError: an odd number of sequences; beta without KL logits, KL logits without beta, only one of the two,
                or no sampled sequence; and what `sequence_logps`, `token_kl` and `spo_loss` raise.
        """
        samples = self._samples(
            {"kl_logits": kl_logits, "kl_ref_logits": kl_ref_logits}, {"kl_mask": kl_mask}, kl_cu_seqlens, "V"
        )
        check_sequences(labels, cu_seqlens, "labels")
        _check_even(labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, "logits")
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "vocab_size": self.vocab_size,
            "inplace_backward": self.inplace_backward,
            "process_group": self.process_group,
            "vocab_shards": self.vocab_shards,
        }
        logps = sequence_logps(
            logits, labels, ignore_index=self.ignore_index, cu_seqlens=cu_seqlens, average=self.average, **options
        )
        kl = None
        if samples:
            assert kl_logits is not None and kl_ref_logits is not None
            kls = token_kl(
                kl_logits,
                kl_ref_logits,
                kl_mask,
                ref_temperature=self.ref_temperature,
                ref_softcap=self.ref_softcap,
                ref_logit_scale=self.ref_logit_scale,
                divergence=self.divergence,
                mixture=self.mixture,
                **options,
            )
            kl = kls.sum() / samples
        return self._objective(logps, self.importance, kl, (reference_chosen_logps, reference_rejected_logps))


class LinearSPOLoss(_PairObjective):
    """`SPOLoss` from hidden states and the head's weight, without the logits; optionally with an NLL term.

    Without "auto" there are two routes, to the same loss and gradients up to rounding. "recompute" is
    `linear_sequence_logps`, `spo_loss` and autograd: one matrix product forward, three backward. "recompute_free" has
    three in all: it computes gradients in the forward, while the logits of a pair are still there. It requires pair
    weights that do not depend on other pairs.

    "recompute_free" keeps the gradients in float32 (in bfloat16 where matrix products are bfloat16), and can run one
    backward, which multiplies them by the upstream scalar on the device. The chosen and rejected rows of every pair
    must fit in one tile. It accepts uniform weights, `pair_weight`, and a `SoftImportance` whose normalizer is a number
    or a Tensor. It refuses the normalizers "batch" and "ema", which are known only after the last pair. For a running
    average that lags by a step, call a second `SoftImportance` of "ema" with `SPOMetrics.chosen_logps` and
    `rejected_logps`, and give its `running_mean` to `set_normalizer`. It also refuses float16: see `kl_loss`.

    "auto" takes "recompute_free" where weights and dtype allow it, and recomputes the pairs that are too long. "auto"
    and "recompute_free" compute the KL's gradient in the forward, except "auto" for float16. Under no_grad no route
    computes gradients.

    Args:
        alpha: softness, >= 0; see `spo_loss`.
        beta: weight of the KL, >= 0. If it is not 0, `forward` needs the kl_ arguments.
        weight: importance of pairs: None for uniform weights, a number gamma for `SoftImportance(gamma)`, or a
            `SoftImportance` (or any callable from two [P] to [P]). The attribute `importance` holds it.
        center: leave out eq. 8's constant log(2)/alpha.
        average: take the mean of token log-probs in place of their sum for L_w and L_l.
        nll_weight: >= 0; adds that much of the mean negative log-prob over all tokens of chosen responses.
        ignore_index: label of rows outside responses.
        chunk_size, temperature, softcap, logit_scale, ref_temperature, ref_softcap, ref_logit_scale, vocab_size: see
            `spo_kernels.linear.functional`; numbers. The ref_ options are those of the reference's head.
        divergence, mixture: see `SPOLoss`.
        process_group, vocab_shards: see `spo_kernels.linear.functional`; the group that holds the vocabulary, of both
            heads. A group that splits the pairs belongs to `SoftImportance`. Copies and pickles: see `SPOLoss`.
        route: "auto", "recompute" or "recompute_free".
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.0,
        weight: float | Importance | None = None,
        *,
        center: bool = False,
        average: bool = False,
        nll_weight: float = 0.0,
        ignore_index: int = IGNORE_INDEX,
        chunk_size: int | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ref_temperature: float | None = None,
        ref_softcap: float | None = None,
        ref_logit_scale: float | None = None,
        vocab_size: int | None = None,
        divergence: str = "kl",
        mixture: float | None = None,
        route: str = "auto",
        process_group: ProcessGroup | None = None,
        vocab_shards: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            alpha,
            beta,
            weight,
            center=center,
            average=average,
            ignore_index=ignore_index,
            logit_options=LogitOptions(temperature, softcap, logit_scale),
            ref_logit_options=RefLogitOptions(ref_temperature, ref_softcap, ref_logit_scale),
            vocab_size=vocab_size,
            divergence=divergence,
            mixture=mixture,
            process_group=process_group,
            vocab_shards=vocab_shards,
        )
        check_number("nll_weight", nll_weight)
        check_chunk_size(chunk_size)
        if route not in ROUTES:
            raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
        self.nll_weight = nll_weight
        self.chunk_size = chunk_size
        self.route = route

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nll_weight={self.nll_weight}, route={self.route!r}"

    @takes_dtensors(weight=0, bias=0, kl_ref_weight=0, kl_ref_bias=0)
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
            pair_weight: mu [P], in place of the module's importance; no gradient flows to it. Pairs of weight 0 are not
                read: their rows are dropped like ignored ones, from the NLL too, and their log-probs are 0.
            kl_hidden: [S, T', H], the policy on sequences sampled from it; packed, [N', H] with `kl_cu_seqlens`.
            kl_ref_hidden: the reference's hidden states of the same rows, [.., H'], without gradient.
            kl_ref_weight: [V, H'], the reference's head, without gradient.
            kl_ref_bias: [V] or None.
            kl_mask: [S, T'] or [N'] bool, True for the rows that predict a token of the sampled response, its
                end-of-sequence token included; None for all rows.
            kl_cu_seqlens: [S + 1]; used only for S, by which the KL is divided.
            reference_chosen_logps: [P], for the rewards only.
            reference_rejected_logps: [P], for the rewards only.

        Returns:
            (objective [], `SPOMetrics`), float32 (float64 for float64 hidden states). With P = 0 the preference part is
            0. The NLL term is part of the objective and of no metric.

        Raises:
            ValueError: an odd number of sequences; beta without the kl_ arguments or the reverse; route
                "recompute_free" with weights that only the whole batch determines, or with a pair longer than a tile;
                and what `linear_sequence_logps`, `linear_token_kl` and `spo_loss` raise.
        """
        given_kl = {"kl_hidden": kl_hidden, "kl_ref_hidden": kl_ref_hidden, "kl_ref_weight": kl_ref_weight}
        samples = self._samples(given_kl, {"kl_ref_bias": kl_ref_bias, "kl_mask": kl_mask}, kl_cu_seqlens, "H")
        head = checked_head(hidden, weight, bias)
        columns = Columns.checked(self.process_group, self.vocab_shards, weight.shape[0], self.vocab_size)
        options = checked_options(
            head,
            hidden,
            LogitOptions(self.temperature, self.softcap, self.logit_scale),
            RefLogitOptions(self.ref_temperature, self.ref_softcap, self.ref_logit_scale),
            self.chunk_size,
            columns,
            checked_mixture(self.divergence, self.mixture),
        )
        check_rows(labels, "labels", torch.int64, hidden, "hidden")
        check_sequences(labels, cu_seqlens, "labels", "hidden")
        bounds = sequences.padded_bounds(labels) if cu_seqlens is None else cu_seqlens.contiguous()
        _check_even(bounds.shape[0] - 1, "hidden")
        pairs = (bounds.shape[0] - 1) // 2
        wide = accumulate_dtype(head.hidden.dtype)
        if pair_weight is not None:
            check_like("pair_weight", pair_weight, "the pairs", head.hidden.new_empty(pairs), same_dtype=False)
            pair_weight = pair_weight.detach().to(wide)
            sequences.check_bounds(bounds, labels.numel())
            labels = self._labels_of_read_pairs(labels, bounds, pair_weight)
        counts = sequences.checked_sums((labels != self.ignore_index).to(wide), cu_seqlens, "labels", "hidden")

        loss: Tensor | None = None
        if self._precomputes_gradients(head, pair_weight):
            loss, sums, *_ = linear_spo_loss_fwd(
                head,
                labels.reshape(-1),
                bounds,
                counts,
                self._weights(pair_weight, counts),
                PairObjective(_number(self.alpha), _number(self.nll_weight), self.center, self.average),
                self.ignore_index,
                self.route == "recompute_free",
                precomputed_needs(head),
                options,
            )
        else:
            rows = labels.reshape(-1)
            logps, *_ = linear_token_stats_fwd(head, rows, None, None, self.ignore_index, False, options)
            sums = sequences.checked_sums(logps.view(labels.shape), cu_seqlens, "labels", "hidden")

        def preference_and_nll(preference: Tensor) -> Tensor:
            if loss is not None or not self.nll_weight:
                return preference if loss is None else loss
            return preference - self.nll_weight * sums[:pairs].sum() / counts[:pairs].sum().clamp(min=1)

        kl = None
        if samples:
            assert kl_hidden is not None and kl_ref_hidden is not None and kl_ref_weight is not None
            reference = (kl_ref_hidden, kl_ref_weight, kl_ref_bias)
            kl = self._summed_kl(head, options, kl_hidden, reference, kl_mask) / samples
        return self._objective(
            sums / counts.clamp(min=1) if self.average else sums,
            self.importance if pair_weight is None else pair_weight,
            kl,
            (reference_chosen_logps, reference_rejected_logps),
            preference_and_nll,
        )

    def _labels_of_read_pairs(self, labels: Tensor, bounds: Tensor, pair_weight: Tensor) -> Tensor:
        """labels with `ignore_index` in the rows of pairs of weight 0, which are not read."""
        unread = (pair_weight == 0).repeat(2)[sequences.of_rows(bounds, labels.numel())]
        return labels.masked_fill(unread.view_as(labels), self.ignore_index)

    def _precomputes_gradients(self, head: Head, pair_weight: Tensor | None) -> bool:
        """Whether the forward computes gradients; ValueError where route "recompute_free" cannot."""
        if self.route == "recompute":
            return False
        strict = self.route == "recompute_free"
        if not can_precompute_gradient(head.hidden.dtype):
            if strict:
                raise ValueError(
                    f'route "recompute_free" computes gradients before the loss scale that {head.hidden.dtype} needs '
                    'is known: use "recompute" or "auto", or bfloat16'
                )
            return False
        if is_transforming():
            if strict:
                raise RuntimeError(
                    'route "recompute_free" cannot be used under torch.func transforms or forward-mode AD: use "auto" '
                    'or "recompute"'
                )
            return False
        importance = self.importance
        by_pair = (
            pair_weight is not None
            or importance is None
            # A subclass may compute other weights: the op knows only those of SoftImportance.
            or (type(importance) is SoftImportance and not isinstance(importance.normalizer, str))
        )
        if strict and not by_pair:
            raise ValueError(
                'route "recompute_free" needs pair weights that a pair determines: weight None, pair_weight, or a '
                f"SoftImportance whose normalizer is a number or a Tensor, got weight {importance}"
            )
        return by_pair and torch.is_grad_enabled() and any(precomputed_needs(head)[:3])

    def _weights(self, pair_weight: Tensor | None, counts: Tensor) -> PairWeights:
        importance = self.importance
        if pair_weight is not None or importance is None:
            return PairWeights(pair_weight, None, _number(0.0))
        assert isinstance(importance, SoftImportance)
        normalizer = torch.as_tensor(importance.normalizer, dtype=counts.dtype, device=counts.device)
        return PairWeights(None, normalizer, _number(importance.gamma))

    def _summed_kl(
        self,
        head: Head,
        options: HeadOptions,
        hidden: Tensor,
        reference: tuple[Tensor, Tensor, Tensor | None],
        mask: Tensor | None,
    ) -> Tensor:
        """Sum of the token KL of sampled rows (Appendix B). reference: hidden states, weight, bias."""
        if mask is not None:
            check_rows(mask, "kl_mask", torch.bool, hidden, "kl_hidden")
        kl_head = checked_head(hidden, head.weight, head.bias)
        read = padded_columns_read(self.vocab_size, options.columns, head.weight.shape[0])
        ref_head = checked_ref_head(*reference, hidden, kl_head, read)
        rows = None if mask is None else mask.reshape(-1)
        if self.route == "recompute":
            return kl_of(kl_head, ref_head, rows, options).sum()
        row_weight = None if rows is None else rows.to(accumulate_dtype(kl_head.hidden.dtype))
        return kl_loss_of(kl_head, ref_head, row_weight, options)
