"""The loss of SPO, micro-batch by micro-batch, from one forward of the pairs and a slice of the samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    linear_sequence_logps,
    sequence_logps,
    spo_loss,
    token_kl,
)
from spo_kernels.integrations.buffer import KLBuffer, KLDraw, Reference
from spo_kernels.integrations.head import attached_options
from spo_kernels.integrations.rows import IGNORE_INDEX, Pairs, Rows, Samples, join_rows
from spo_kernels.integrations.sampling import check_one_of, evaluating

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HEADS = ("linear", "logits", "eager")
NORMALIZERS = ("batch", "step", "ema")


@dataclass(frozen=True)
class SPOSettings:
    """Numbers and choices of an SPO step.

    Attributes:
        alpha: softness, >= 0; see `spo_kernels.spo_loss`.
        beta: weight of the KL, >= 0. Not DPO's beta. 0: no sampling, no reference.
        weighting: "uniform", or "soft": `spo_kernels.SoftImportance` weighs the pairs.
        gamma: of the soft weights.
        normalizer: of the soft weights. "step": over all pairs of the optimizer step, from a pass without gradients.
            "batch": over a micro-batch, which is the same for a step of one. "ema": a running average.
        average_log_probs: mean of token log-probs in place of their sum.
        center: leave out the loss's constant log(2)/alpha, so that a pair with L_w = L_l costs 0; same gradient.
        nll_weight: adds that much of the mean negative log-prob over tokens of chosen responses.
        divergence, mixture: what the KL is: "kl", "reverse_kl" or "jsd"; see `spo_kernels.functional`.
        head: "linear" computes the loss from hidden states, without storing logits. "logits" uses the logits of the
            model's own forward and this library's row kernels; "eager" uses plain torch on them, for comparison.
        packed: sequences one after the other, without padding; see `join_rows`.
        reference_rewards: rewards relative to the reference, comparable with DPO's. Costs a forward of the reference.
    """

    alpha: float = 0.1
    beta: float = 0.03
    weighting: str = "uniform"
    gamma: float = 0.1
    normalizer: str = "step"
    average_log_probs: bool = False
    center: bool = True
    nll_weight: float = 0.0
    divergence: str = "kl"
    mixture: float | None = None
    head: str = "linear"
    packed: bool = False
    reference_rewards: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "nll_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        SPOLoss(divergence=self.divergence, mixture=self.mixture)  # checks them
        check_one_of("weighting", self.weighting, ("uniform", "soft"))
        check_one_of("normalizer", self.normalizer, NORMALIZERS)
        check_one_of("head", self.head, HEADS)


class MetricSums:
    """Means in the making: a sum and a count of each metric, on the device, without waiting for it.

    Sums of micro-batches add up with ``+``. `values` [2, M] float64 is what ranks all-reduce.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self.names, self.values = tuple(names), values

    @classmethod
    def of(cls, metrics: Mapping[str, tuple[Tensor | float, Tensor | float]], device: torch.device) -> MetricSums:
        """metrics: a sum and a count by name. The numbers among them go to the device in one message."""
        flat = [pair[i] for i in range(2) for pair in metrics.values()]
        numbers = torch.tensor([0.0 if isinstance(x, Tensor) else x for x in flat], dtype=torch.float64).to(device)
        tensors = [x.detach().double() if isinstance(x, Tensor) else numbers[i] for i, x in enumerate(flat)]
        return cls(tuple(metrics), torch.stack(tensors).view(2, -1))

    def __add__(self, other: MetricSums) -> MetricSums:
        if self.names != other.names:
            raise ValueError(f"metrics must be of one kind to be added, got {self.names} and {other.names}")
        return MetricSums(self.names, self.values + other.values)

    def means(self) -> dict[str, float]:
        """The mean of each metric; waits for the device. A metric without a count is left out."""
        sums, counts = self.values.tolist()
        means = {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}
        if _MU_SQUARE in means:
            variance = means.pop(_MU_SQUARE) - means["spo/mu"] ** 2
            means["spo/mu_std"] = max(variance, 0.0) ** 0.5
        return means


_MU_SQUARE = "spo/mu_square"


class StepResult(NamedTuple):
    """The loss of a micro-batch and its metrics."""

    loss: Tensor  # [], on the graph
    metrics: MetricSums


class _Terms(NamedTuple):
    """What a head computes of a micro-batch."""

    loss: Tensor  # [] the objective
    preference: Tensor  # [] mean preference loss
    kl: Tensor  # [] mean over the samples
    chosen: Tensor  # [P] log-probs
    rejected: Tensor  # [P]
    mu: Tensor  # [P]
    error: Tensor  # [P] sigmoid(-alpha D)
    entropy: Tensor | None = None  # [] mean over the response tokens of the pairs


class _Scale(NamedTuple):
    """Factors of a micro-batch's terms, which make means over micro-batches means over pairs, samples, tokens."""

    preference: float
    kl: float
    nll: float


class SPOStep:
    """The loss of SPO, micro-batch by micro-batch.

    Args:
        settings: see `SPOSettings`.
        buffer: the samples; None where beta is 0.
        reference: for ``reference_rewards``; None: the buffer's.
        process_group: ranks that split the pairs. The normalizers and the means of a step are then over the pairs,
            samples and response tokens of all ranks, which may hold different numbers of them. The mean over ranks of
            loss and gradient, which DDP and FSDP take, is that of one process with the whole batch. None: this process
            has all.
        device: where the running average of "ema" lies.

    Attributes:
        importance: the `SoftImportance` of the weights, or None.

    Raises:
        ValueError: beta without a buffer or the reverse; a buffer that keeps what the head cannot use;
            ``reference_rewards`` without a reference.
    """

    def __init__(
        self,
        settings: SPOSettings,
        buffer: KLBuffer | None = None,
        *,
        reference: Reference | None = None,
        process_group: ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if (settings.beta > 0) != (buffer is not None):
            given = "None" if buffer is None else "a KLBuffer"
            raise ValueError(f"buffer must be given exactly where beta > 0, got {given} with beta = {settings.beta}")
        if buffer is not None and settings.head == "linear" and buffer.keep == "logits":
            raise ValueError('keep must be "hidden" or "recompute" for the head "linear", got "logits"')
        self.settings, self.buffer = settings, buffer
        self.reference = reference or (None if buffer is None else buffer.reference)
        if settings.reference_rewards and self.reference is None:
            raise ValueError("reference must be given for reference_rewards, got None")
        self.importance: SoftImportance | None = None
        if settings.weighting == "soft":
            start = "batch" if settings.normalizer == "step" else settings.normalizer
            self.importance = SoftImportance(settings.gamma, start, process_group).to(device)
        self._process_group = process_group
        self._linear: LinearSPOLoss | None = None
        self._micro = 0
        self._scales: list[_Scale] = []
        self._slices: list[slice] = []
        self._step = 0

    def begin(self, model: nn.Module, window: Sequence[Pairs], step: int) -> None:
        """Prepare an optimizer step: draw samples where it is time, and set the normalizer "step".

        Args:
            model: the policy, as it is called in the step; with DDP, the wrapper.
            window: the step's micro-batches on the device, in order.
            step: optimizer steps done so far.
        """
        if not window:
            raise ValueError("window must hold a micro-batch at least, got none")
        self._micro, self._step = 0, step
        samples = 0
        if self.buffer is not None:
            self.buffer.refresh(step)
            assert self.buffer.draw is not None
            samples = len(self.buffer.draw.samples)
        bounds = [round(samples * i / len(window)) for i in range(len(window) + 1)]
        self._slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        pairs = [len(batch) for batch in window]
        tokens = [1.0] * len(window)
        if self.settings.nll_weight:  # counting waits for the device
            tokens = torch.stack([(b.labels[: len(b)] != IGNORE_INDEX).sum() for b in window]).tolist()
        mean_pairs, mean_samples, mean_tokens = self._mean_over_ranks(
            [sum(pairs), samples, sum(tokens)], window[0].ids.device
        )
        self._scales = [
            _Scale(
                preference=p * len(window) / (mean_pairs or 1.0),
                kl=(rows.stop - rows.start) * len(window) / (mean_samples or 1.0),
                nll=t * len(window) / (mean_tokens or 1.0),
            )
            for p, rows, t in zip(pairs, self._slices, tokens, strict=True)
        ]
        if self.importance is not None and self.settings.normalizer == "step":
            with evaluating(model):
                logps = torch.cat([self._logps(model, batch) for batch in window], dim=1)
            self.importance.set_normalizer(self.importance.batch_normalizer(*logps))

    def __call__(self, model: nn.Module, pairs: Pairs) -> StepResult:
        """The loss of the next micro-batch of the window, from one forward of its pairs and its slice of the samples.

        The mean of these losses over the window is the loss of the step: backward ``loss / len(window)``.
        """
        if self._micro >= len(self._slices):
            raise RuntimeError(
                f"begin() announced {len(self._slices)} micro-batches, got another: call it before a step"
            )
        rows, scale = self._slices[self._micro], self._scales[self._micro]
        self._micro += 1
        draw = None if self.buffer is None else self.buffer.draw
        if self.importance is not None:
            self.importance.train()
        return self._result(model, pairs, draw, rows, scale)

    def evaluate(self, model: nn.Module, pairs: Pairs, kl: Tensor | None = None) -> StepResult:
        """Loss and metrics of pairs, without a trace in the state of training.

        Soft weights are normalized over these pairs, or by the running average of "ema", which stays as it is.

        Args:
            model: the policy, in evaluation mode.
            pairs: a batch.
            kl: [3] of `evaluation_kl`; None with beta > 0: computed here.
        """
        if kl is None and self.buffer is not None:
            kl = self.evaluation_kl(model)
        with self._importance_of_evaluation():
            result = self._result(model, pairs, None, slice(0, 0), _Scale(1.0, 0.0, 1.0))
        if kl is None:
            return result
        assert self.buffer is not None
        metrics = {
            "spo/kl": (kl[0], kl[1]),
            "spo/kl_per_token": (kl[0], kl[2]),
            **self._draw_metrics(self.buffer.for_evaluation()),
        }
        values = torch.cat([result.metrics.values, MetricSums.of(metrics, kl.device).values], dim=1)
        loss = result.loss + self.settings.beta * (kl[0] / kl[1].clamp(min=1)).to(result.loss.dtype)
        return StepResult(loss, MetricSums((*result.metrics.names, *metrics), values))

    @torch.no_grad()
    def evaluation_kl(self, model: nn.Module, batch_size: int | None = None) -> Tensor:
        """Sum of the KL of the last draw's sequences, their number, and their response tokens: [3] float64.

        It is the same for every batch of an evaluation. batch_size: sequences of a forward; None: all.
        """
        if self.buffer is None:
            raise ValueError("there is no KL where beta is 0")
        draw = self.buffer.for_evaluation()
        total, size = len(draw.samples), batch_size or max(len(draw.samples), 1)
        no_pair = Pairs.from_lists([], [], [], pad=0, device=draw.samples.ids.device)
        summed = torch.zeros((), dtype=torch.float64, device=draw.samples.ids.device)
        with self._importance_of_evaluation():
            for first in range(0, total, size):
                rows = slice(first, min(first + size, total))
                terms = self._terms(model, no_pair, draw, rows, _Scale(1.0, 1.0, 0.0))
                summed += terms.kl.double() * (rows.stop - rows.start)
        return torch.stack([summed, torch.full_like(summed, total), draw.samples.mask.sum().to(summed)])

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the models: this rank's samples, the running average."""
        return {
            "importance": None if self.importance is None else self.importance.state_dict(),
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the step that `state_dict` was taken of would.

        Raises:
            ValueError: the state is of other settings of beta or weighting.
        """
        for name, part in (("importance", self.importance), ("buffer", self.buffer)):
            if (state[name] is None) != (part is None):
                raise ValueError(
                    f"the state must be of the same beta and weighting, got {name} {'without' if part else 'with'}"
                )
        if self.importance is not None:
            self.importance.load_state_dict(state["importance"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])

    def reset(self) -> None:
        """Forget samples and running average, for a new run."""
        if self.buffer is not None:
            self.buffer.reset()
        if self.importance is not None and self.settings.normalizer == "ema":
            self.importance.running_mean.zero_()
            self.importance.num_updates.zero_()

    # ---- inside

    def _mean_over_ranks(self, counts: list[float], device: torch.device) -> list[float]:
        """Counts of a step as means over the ranks of the process group; waits for them."""
        if self._process_group is None:
            return counts
        totals = torch.tensor(counts, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(totals, group=self._process_group)
        return (totals / torch.distributed.get_world_size(self._process_group)).tolist()

    @contextmanager
    def _importance_of_evaluation(self) -> Iterator[None]:
        if self.importance is None:
            yield
            return
        was, normalizer = self.importance.training, self.importance.normalizer
        self.importance.eval()
        if self.settings.normalizer != "ema":
            self.importance.set_normalizer("batch")
        try:
            yield
        finally:
            self.importance.train(was)
            self.importance.set_normalizer(normalizer)

    def _logps(self, model: nn.Module, pairs: Pairs, reference: Reference | None = None) -> Tensor:
        """Log-probs [2, P] of chosen and rejected responses, without gradient; of the reference if given."""
        rows, average = join_rows(pairs, packed=self.settings.packed), self.settings.average_log_probs
        keywords: dict[str, Any] = {"cu_seqlens": rows.cu_seqlens, "average": average}

        def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
            return linear_sequence_logps(rows.split(hidden)[0], weight, rows.labels, bias, **keywords, **options)

        def from_logits(logits: Tensor) -> Tensor:
            return sequence_logps(rows.split(logits)[0], rows.labels, **keywords)

        with torch.no_grad():
            if reference is None:
                return self._inside(model, rows, from_hidden, from_logits)[1].view(2, -1)
            with reference.opened(), evaluating(reference.model):
                return self._inside(reference.model, rows, from_hidden, from_logits)[1].view(2, -1)

    def _inside(self, model: nn.Module, rows: Rows, from_hidden: Callable, from_logits: Callable) -> tuple[Any, Any]:
        """What ``model`` returns, and what the function computed inside its forward.

        Engines may round what a forward returns to half precision. They need a returned Tensor for their hooks.
        """
        computed = None

        def hook(*args: Any) -> Tensor:
            nonlocal computed
            computed = from_hidden(*args) if linear else from_logits(*args)
            return computed.loss if isinstance(computed, _Terms) else computed

        linear = self.settings.head == "linear"
        returned = model(**rows.model_inputs(), **{"spo_head" if linear else "spo_logits": hook})
        return returned, computed

    def _terms(self, model: nn.Module, pairs: Pairs, draw: KLDraw | None, part: slice, scale: _Scale) -> _Terms:
        samples = None if draw is None or part.stop <= part.start else draw.part(part)
        rows = join_rows(pairs, samples, packed=self.settings.packed)
        states = None if samples is None or draw is None else self._reference_states(draw, part, samples)

        def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> _Terms:
            return self._linear_terms((hidden, weight, bias), options, rows, samples, states, scale)

        def from_logits(logits: Tensor) -> _Terms:
            return self._logits_terms(logits, rows, samples, states, scale)

        loss, terms = self._inside(model, rows, from_hidden, from_logits)
        if loss.dtype != terms.loss.dtype:  # rounded: its graph has the gradients, the other Tensor the value
            loss = terms.loss.detach() + (loss - loss.detach()).to(terms.loss.dtype)
        return terms._replace(loss=loss)

    def _reference_states(self, draw: KLDraw, part: slice, samples: Samples) -> Tensor:
        """The reference's hidden states [S, T, H] for the head "linear", else its logits [S, T, V]."""
        assert self.buffer is not None
        reference, linear = self.buffer.reference, self.settings.head == "linear"
        inputs = {"input_ids": samples.ids, "attention_mask": samples.attention_mask.long()}
        if draw.states is None:
            return reference.hidden(inputs) if linear else reference.logits(inputs)
        states = draw.states[part, : samples.ids.shape[1]]
        if linear or self.buffer.keep == "logits":
            return states
        return reference.logits_of(states)

    def _linear_terms(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        options: dict[str, Any],
        rows: Rows,
        samples: Samples | None,
        states: Tensor | None,
        scale: _Scale,
    ) -> _Terms:
        settings = self.settings
        hidden, weight, bias = head
        pair_hidden, kl_hidden = rows.split(hidden)
        if self._linear is None:
            self._linear = LinearSPOLoss(
                settings.alpha,
                weight=self.importance,
                center=settings.center,
                average=settings.average_log_probs,
                divergence=settings.divergence,
                mixture=settings.mixture,
                **options,
            )
        criterion = self._linear
        pref = scale.preference or 1.0  # no pair: its part is 0 whatever the factor
        criterion.nll_weight = settings.nll_weight * scale.nll / pref
        criterion.beta = settings.beta * scale.kl / pref if samples is not None else 0.0
        kl: dict[str, Any] = {}
        if samples is not None and self.buffer is not None and states is not None:
            ref_options = attached_options(self.buffer.reference.model)
            own_options = {name: x for name, x in options.items() if name not in ("process_group", "vocab_shards")}
            if ref_options != own_options:
                raise ValueError(
                    f"reference must have the policy's options of the head, got {ref_options} against {own_options}"
                )
            ref_weight, ref_bias = self.buffer.reference.weights(weight, bias)
            if not torch.is_autocast_enabled(hidden.device.type):  # which casts these too
                states, ref_weight = states.to(hidden.dtype), ref_weight.to(hidden.dtype)
                ref_bias = None if ref_bias is None else ref_bias.to(hidden.dtype)
            kl = {
                "kl_hidden": kl_hidden,
                "kl_ref_hidden": rows.of_samples(states, samples),
                "kl_ref_weight": ref_weight,
                "kl_ref_bias": ref_bias,
                "kl_mask": rows.kl_mask,
                "kl_cu_seqlens": rows.kl_cu_seqlens,
            }
        loss, metrics = criterion(pair_hidden, weight, rows.labels, bias, cu_seqlens=rows.cu_seqlens, **kl)
        return _Terms(
            loss if pref == 1.0 else pref * loss,
            metrics.preference_loss,
            metrics.kl,
            metrics.chosen_logps,
            metrics.rejected_logps,
            metrics.mu,
            metrics.preference_error,
        )

    def _logits_terms(
        self, logits: Tensor, rows: Rows, samples: Samples | None, states: Tensor | None, scale: _Scale
    ) -> _Terms:
        settings, eager = self.settings, self.settings.head == "eager"
        pair_logits, kl_logits = rows.split(logits)
        real = rows.labels != IGNORE_INDEX
        entropy = None
        if eager:
            log_p = pair_logits.to(_wide(logits)).log_softmax(-1)
            token_logps = log_p.gather(-1, rows.labels.clamp(min=0)[..., None])[..., 0] * real
            sums = _sequence_sums(token_logps, rows.cu_seqlens)
            with torch.no_grad():
                entropy = -((log_p.exp() * log_p).sum(-1) * real).sum() / real.sum().clamp(min=1)
        else:
            sums = sequence_logps(pair_logits, rows.labels, cu_seqlens=rows.cu_seqlens)
        counts = _sequence_sums(real.to(sums.dtype), rows.cu_seqlens)
        logps = sums / counts.clamp(min=1) if settings.average_log_probs else sums
        chosen, rejected = logps[: len(logps) // 2], logps[len(logps) // 2 :]
        mu = torch.ones_like(chosen) if self.importance is None else self.importance(chosen.detach(), rejected.detach())
        preference, *_ = spo_loss(
            chosen, rejected, alpha=settings.alpha, weight=mu, center=settings.center, reduction="mean"
        )
        loss = scale.preference * preference
        if settings.nll_weight:
            pairs = len(sums) // 2
            nll = -sums[:pairs].sum() / counts[:pairs].sum().clamp(min=1)
            loss = loss + settings.nll_weight * scale.nll * nll
        kl = torch.zeros_like(preference)
        if samples is not None and states is not None:
            reference = rows.of_samples(states, samples)
            if eager:
                log_p, log_q = (x.to(_wide(logits)).log_softmax(-1) for x in (kl_logits, reference))
                rows_kl = _eager_divergence(log_p, log_q, settings) * rows.kl_mask
            else:
                options: dict[str, Any] = {"divergence": settings.divergence, "mixture": settings.mixture}
                rows_kl = token_kl(kl_logits, reference, rows.kl_mask, **options)
            kl = rows_kl.sum() / len(samples)
            loss = loss + settings.beta * scale.kl * kl
        chosen, rejected = chosen.detach(), rejected.detach()
        error = torch.sigmoid(-settings.alpha * (chosen - rejected))
        return _Terms(loss, preference.detach(), kl.detach(), chosen, rejected, mu, error, entropy)

    def _result(self, model: nn.Module, pairs: Pairs, draw: KLDraw | None, part: slice, scale: _Scale) -> StepResult:
        references = None
        if self.settings.reference_rewards:
            references = self._logps(model, pairs, self.reference)
        terms = self._terms(model, pairs, draw, part, scale)
        return StepResult(terms.loss, self._metrics(terms, len(pairs), draw, part, references))

    def _metrics(
        self, terms: _Terms, pairs: int, draw: KLDraw | None, part: slice, references: Tensor | None
    ) -> MetricSums:
        alpha = self.settings.alpha
        chosen, rejected = terms.chosen, terms.rejected
        rewards = chosen, rejected
        if references is not None:
            rewards = chosen - references[0], rejected - references[1]
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "logps/chosen": (chosen.sum(), pairs),
            "logps/rejected": (rejected.sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).sum(), pairs),
            "rewards/margins": (alpha * (rewards[0] - rewards[1]).sum(), pairs),
            "spo/loss": (terms.preference * pairs, pairs),
            "spo/preference_error": (terms.error.sum(), pairs),
        }
        if references is not None:
            metrics["rewards/chosen"] = (alpha * rewards[0].sum(), pairs)
            metrics["rewards/rejected"] = (alpha * rewards[1].sum(), pairs)
        if terms.entropy is not None:
            metrics["entropy"] = (terms.entropy, 1)
        if self.importance is not None:
            normalizer: Any = self.importance.normalizer
            if normalizer == "ema":
                normalizer = self.importance.running_mean
            elif normalizer == "batch":
                normalizer = self.importance.gamma * torch.logaddexp(chosen, rejected).mean()
            metrics |= {
                "spo/mu": (terms.mu.sum(), pairs),
                _MU_SQUARE: (terms.mu.square().sum(), pairs),
                "spo/normalizer": (normalizer, 1),
            }
        if draw is not None:
            count = part.stop - part.start
            tokens = draw.samples.mask[part].sum()
            metrics |= {"spo/kl": (terms.kl * count, count), "spo/kl_per_token": (terms.kl * count, tokens)}
            metrics |= self._draw_metrics(draw)
        return MetricSums.of(metrics, chosen.device)

    def _draw_metrics(self, draw: KLDraw) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        samples = draw.samples
        return {
            "spo/sample_length": ((samples.lengths - samples.prompt_lengths).sum(), len(samples)),
            "spo/sample_eos_rate": (samples.finished.sum(), len(samples)),
            "spo/draw_seconds": (draw.seconds, 1),
            "spo/sample_age": (self._step - draw.step, 1),
        }


def _eager_divergence(log_p: Tensor, log_q: Tensor, settings: SPOSettings) -> Tensor:
    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if settings.divergence != "jsd":
        return kl(log_p, log_q) if settings.divergence == "kl" else kl(log_q, log_p)
    mixture = 0.5 if settings.mixture is None else settings.mixture
    log_m = torch.logaddexp(log_p + math.log(mixture), log_q + math.log1p(-mixture))
    return mixture * kl(log_p, log_m) + (1 - mixture) * kl(log_q, log_m)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _sequence_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums [B] of values [B, T], or of [N] with cu_seqlens [B + 1]."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, unsafe=True)
