"""A whole SPO training step, ours against the same step in eager PyTorch.

The step is Appendix B of the paper: P pairs through a causal transformer, the preference loss (eq. 8) with
SoftImportance weights (eq. 24) and its backward; the exact token KL on S sequences drawn from the policy, and its
backward; clipping; AdamW. Every k steps a refresh draws the S sequences anew and computes the reference's logits of
them. All implementations share the model (spo_train's `Llama`), refresh and optimizer. They differ only between hidden
states and loss. `LOSSES` has one entry per implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks.harness import measure
from benchmarks.harness.bench import Settings
from benchmarks.harness.contest import Contender, contest
from benchmarks.harness.gate import Verdict, by_norm, judge, relative_error, worst
from benchmarks.harness.rows import Memory, Timing, keyed, part
from benchmarks.peers import eager
from spo_train.models.llama import Llama, ModelConfig

_ALPHA, _BETA, _GAMMA = 0.1, 0.03, 0.1
_IGNORED = -100
# Budgets of errors relative to float64, through a whole model. A wrong coefficient makes far larger errors. In half
# precision the model's own activations are rounded, for every implementation.
_BUDGETS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# At most so many pairs, sampled sequences, and tokens of each take part in the gate: the whole batch would not fit in
# float64.
_GATE_SEQUENCES, _GATE_TOKENS = 1, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepSize:
    """Size of the step and of its model; columns of its rows."""

    pairs: int
    kl_samples: int
    kl_every: int  # steps between two refreshes
    tokens: int
    vocabulary: int
    hidden: int
    layers: int

    @property
    def prompt(self) -> int:
        """Tokens of each sequence that are prompt."""
        return self.tokens // 4


@dataclass(frozen=True)
class KLBatch:
    """Sampled sequences, and the reference's hidden states and logits of them."""

    ids: Tensor  # [S, T]
    mask: Tensor  # [S, T], False in the prompt
    ref_hidden: Tensor  # [S, T, H]
    ref_weight: Tensor  # [V, H]
    ref_logits: Tensor  # [S, T, V]


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [2P, T], chosen then rejected
    labels: Tensor  # [2P, T], the next ids, ignored in the prompt
    kl: KLBatch


@dataclass(frozen=True)
class Losses:
    """The two losses, as functions of the policy's hidden states [.., T, H] and its head's weight [V, H]."""

    preference: Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels [2P, T]) -> scalar
    kl: Callable[[Tensor, Tensor, KLBatch], Tensor]  # (hidden, weight, batch) -> scalar
    compiled: bool = False


def eager_preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = eager.token_logps(eager.at_least_float32(F.linear(hidden, weight)), labels.clamp(min=0))
    logp_w, logp_l = (logps * (labels != _IGNORED)).sum(-1).chunk(2)
    scores = _GAMMA * torch.logaddexp(logp_w, logp_l).detach()
    mu = torch.sigmoid(scores - scores.mean())
    return (-mu * F.logsigmoid(_ALPHA * (logp_w - logp_l)) / _ALPHA).mean()


def eager_kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
    kl = eager.token_kl(eager.at_least_float32(F.linear(hidden, weight)), eager.at_least_float32(batch.ref_logits))
    return _BETA * (kl * batch.mask).sum(-1).mean()


def _row_weight(batch: KLBatch) -> Tensor:
    return torch.full(batch.mask.shape, _BETA / len(batch.mask), device=batch.mask.device)


def _ours(*, inplace: bool) -> Losses:
    importance = spo_kernels.SoftImportance(_GAMMA)

    def preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = spo_kernels.sequence_logps(F.linear(hidden, weight), labels, inplace_backward=inplace)
        losses, _, _ = spo_kernels.spo_loss(*logps.chunk(2), alpha=_ALPHA, weight=importance)
        return losses.mean()

    def kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
        return spo_kernels.kl_loss(
            F.linear(hidden, weight),
            batch.ref_logits,
            batch.mask,
            row_weight=_row_weight(batch),
            overwrite_logits=inplace,
        )

    return Losses(preference, kl)


def _ours_head() -> Losses:
    """Losses without logits in memory.

    SoftImportance normalizes the pairs' weights over the batch, so the preference loss recomputes the logits.
    """
    loss = spo_kernels.LinearSPOLoss(_ALPHA, weight=spo_kernels.SoftImportance(_GAMMA))

    def preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        objective, _ = loss(hidden, weight, labels)
        return objective

    def kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
        return spo_kernels.linear_kl_loss(
            hidden, weight, batch.ref_hidden, batch.ref_weight, batch.mask, row_weight=_row_weight(batch)
        )

    return Losses(preference, kl)


LOSSES: dict[str, Losses] = {
    "ours": _ours(inplace=False),
    "ours_inplace": _ours(inplace=True),
    "ours_head": _ours_head(),
    "eager": Losses(eager_preference, eager_kl),
    "compile": Losses(eager_preference, eager_kl, compiled=True),
}
# A step whose backward begins at a ready-made gradient of the logits, without a loss. No implementation with logits in
# memory can be faster.
MODEL_ONLY = "model_only"
REFRESH = "refresh"  # not a step: additional work of every k-th step, the same for every implementation
PROVIDERS = (*LOSSES, MODEL_ONLY)


@dataclass
class StepRow:
    """One implementation of the step, or the refresh."""

    provider: str
    size: StepSize = field(metadata=part(StepSize))
    status: str = ""
    timing: Timing | None = field(default=None, metadata=part(Timing))
    with_refresh_ms: float | None = None  # median of the step plus 1/k of the refresh's median
    memory: Memory | None = field(default=None, metadata=part(Memory))  # beyond parameters, optimizer state and batch
    # grad: the largest of the errors of the parameters' gradients.
    error: dict[str, float] = field(default_factory=dict, metadata=keyed("loss", "grad"))
    over: dict[str, float] = field(default_factory=dict, metadata=keyed("ours", "ours_inplace"))

    @property
    def ours(self) -> bool:
        return self.provider.startswith("ours")


class Step:
    """The training step of one implementation on a shared model, optimizer and batch."""

    def __init__(self, name: str, model: Llama, optimizer: torch.optim.Optimizer | None, batch: Batch) -> None:
        self._model = model
        self._optimizer = optimizer
        self._batch = batch
        self._gradients: tuple[Tensor, Tensor] | None = None
        if name == MODEL_ONLY:
            self._gradients = (
                batch.kl.ref_logits.new_full((*batch.ids.shape, model.vocab_size), 1e-6),
                torch.full_like(batch.kl.ref_logits, 1e-6),
            )
            return
        losses = LOSSES[name]
        wrap = torch.compile if losses.compiled else lambda function: function
        self._preference, self._kl = wrap(losses.preference), wrap(losses.kl)

    def run(self) -> Tensor:
        """Run one step and return the objective. Without an optimizer the step ends with the gradients."""
        model, batch = self._model, self._batch
        model.zero_grad(set_to_none=True)
        if self._gradients is not None:
            model(batch.ids).backward(self._gradients[0])
            model(batch.kl.ids).backward(self._gradients[1])
            objective = torch.zeros(())
        else:
            # Each loss has its own backward, so that the two sets of logits never live at the same time.
            preference = self._preference(model.hidden(batch.ids), model.embedding.weight, batch.labels)
            preference.backward()
            kl = self._kl(model.hidden(batch.kl.ids), model.embedding.weight, batch.kl)
            kl.backward()
            objective = (preference + kl).detach()
        if self._optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self._optimizer.step()
        return objective


class Refresh:
    """Draws samples from the policy and computes the reference's logits of them."""

    def __init__(self, size: StepSize, model: Llama, generator: torch.Generator) -> None:
        self._model = model
        self._tokens = size.tokens
        # The sampler puts a bos before each prompt.
        shape = (size.kl_samples, max(size.prompt - 1, 0))
        ids = torch.randint(4, size.vocabulary, shape, device=generator.device, generator=generator)
        self._prompts: list[list[int]] = ids.tolist()
        # A reference near the policy, as in training: their KL is small but not 0.
        self._reference = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in self._reference.parameters():
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(0.05 * parameter.std(correction=0) * noise)

    def run(self) -> KLBatch:
        generator = torch.Generator(self._model.embedding.weight.device).manual_seed(0)
        samples = self._model.sample(self._prompts, max_length=self._tokens + 1, generator=generator)
        ids = samples.tokens[:, :-1]
        with torch.no_grad():
            hidden, weight = self._reference.hidden(ids), self._reference.embedding.weight.detach()
            return KLBatch(ids, samples.labels() != _IGNORED, hidden, weight, F.linear(hidden, weight))


def _make_model(size: StepSize, dtype: str, device: torch.device) -> Llama:
    config = ModelConfig(
        size.vocabulary,
        dim=size.hidden,
        layers=size.layers,
        heads=max(size.hidden // 64, 1),
        ffn_dim=max(size.hidden * 11 // 4, 1),
        max_length=size.tokens + 1,
    )
    with device:
        return Llama(config).to(DTYPES[dtype])


def _make_batch(size: StepSize, refresh: Refresh, generator: torch.Generator) -> Batch:
    shape = (2 * size.pairs, size.tokens + 1)
    ids = torch.randint(size.vocabulary, shape, device=generator.device, generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : size.prompt] = _IGNORED
    return Batch(ids[:, :-1], labels, refresh.run())


def _gradients(name: str, model: Llama, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    objective = Step(name, model, None, batch).run().item()
    return objective, {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def _gate_batch(batch: Batch) -> Batch:
    """The first pairs and samples, and the last tokens of each. The prompt, which no loss counts, comes first."""
    pairs, tokens = _GATE_SEQUENCES, _GATE_TOKENS
    chosen, rejected = (half[:pairs] for half in batch.ids.chunk(2))
    labels = torch.cat([half[:pairs] for half in batch.labels.chunk(2)])
    kl = batch.kl
    return Batch(
        torch.cat((chosen, rejected))[:, -tokens:].contiguous(),
        labels[:, -tokens:].contiguous(),
        KLBatch(
            kl.ids[:pairs, -tokens:].contiguous(),
            kl.mask[:pairs, -tokens:].contiguous(),
            kl.ref_hidden[:pairs, -tokens:].contiguous(),
            kl.ref_weight,
            kl.ref_logits[:pairs, -tokens:].contiguous(),
        ),
    )


def _truth(model: Llama, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    kl = batch.kl
    exact = KLBatch(kl.ids, kl.mask, kl.ref_hidden.double(), kl.ref_weight.double(), kl.ref_logits.double())
    return _gradients("eager", copy.deepcopy(model).double(), Batch(batch.ids, batch.labels, exact))


def _gate(name: str, model: Llama, batch: Batch, truth: tuple[float, dict[str, Tensor]]) -> Verdict:
    objective, gradients = _gradients(name, model, batch)
    parameter_errors = [relative_error(gradients.get(key), grad) for key, grad in truth[1].items() if grad.any()]
    errors = {"loss": abs(objective - truth[0]) / abs(truth[0]), "grad": worst(parameter_errors)}
    return by_norm(errors, _BUDGETS[model.embedding.weight.dtype])


class StepRunner:
    """The step of every provider on one model and batch: compared with float64, then timed in turns."""

    def __init__(self, size: StepSize, dtype: str, settings: Settings, providers: Sequence[str]) -> None:
        torch.manual_seed(0)
        self._size, self._settings = size, settings
        self._model = _make_model(size, dtype, settings.device)
        generator = torch.Generator(settings.device).manual_seed(0)
        refresh = Refresh(size, self._model, generator)
        self._batch = _make_batch(size, refresh, generator)
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True)
        self.calls: dict[str, Callable[[], object]] = {
            name: Step(name, self._model, optimizer, self._batch).run for name in providers
        }
        self.calls[REFRESH] = refresh.run

    def run(self) -> list[StepRow]:
        """A row for each provider, and one for the refresh."""
        verdicts = self._judge()
        rows = {name: StepRow(name, self._size) for name in self.calls}
        contenders = [self._contender(row, verdicts[name]) for name, row in rows.items()]
        contest(contenders, self._settings, over={"ours": ["ours"], "ours_inplace": ["ours_inplace"]})
        refresh = rows.pop(REFRESH)
        refresh.over = {}  # a refresh is not a step, so these ratios mean nothing
        for row in rows.values():
            if row.timing is not None and refresh.timing is not None:
                row.with_refresh_ms = row.timing.wall_ms + refresh.timing.wall_ms / self._size.kl_every
        return [*rows.values(), refresh]

    def _judge(self) -> dict[str, Verdict]:
        """Compare every provider with float64 before anything is timed. So the float64 gradients are freed by then."""
        batch = _gate_batch(self._batch)
        truth = _truth(self._model, batch)
        return {
            name: judge(partial(_gate, name, self._model, batch, truth)) if name in LOSSES else Verdict({})
            for name in self.calls
        }

    def _contender(self, row: StepRow, verdict: Verdict) -> Contender:
        def clear() -> None:
            self._model.zero_grad(set_to_none=True)

        call = self.calls[row.provider]
        # A timed step frees the gradients of the step before. For the memory they are freed outside the call.
        return Contender(row, measure.Entry(call), lambda: verdict, measure.Entry(call, clear, clear))
