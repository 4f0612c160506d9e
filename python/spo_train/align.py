"""One step of alignment, as in Appendix B of the paper; `spo_train.alignment` is a whole run.

A step computes the method's preference loss of a batch of pairs, from one forward of the policy. SPO adds the exact
token KL on sequences that are drawn from the policy itself every `kl_every` steps. The step then clips the gradient,
lets AdamW update the weights, and returns metrics.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_kernels import SoftImportance
from spo_train.checkpoint import TrainingState
from spo_train.config import AlignConfig
from spo_train.errors import NonFiniteLossError
from spo_train.heads import KLToReference, response_logps
from spo_train.methods import METHODS, PairLogps
from spo_train.metrics import PartTimer
from spo_train.pair_data import BatchOrder, PairDataset
from spo_train.protocol import IGNORE_INDEX, Sequences, TrainableModel
from spo_train.ranks import Ranks

# Settings a resumed run may change: nothing before the resumed step depends on them.
MAY_CHANGE = frozenset({"steps"})


@dataclass(frozen=True)
class KLBatch:
    """Sequences drawn from the policy, with the parts of the KL term that stay the same until the next draw.

    Attributes:
        samples: the sequences of this process.
        reference_states: the reference on them, see `KLToReference.reference_states`.
        row_weight: beta / S on response tokens, 0 elsewhere; S counts the sequences of all processes. With beta and 1/S
            in it, kl_loss writes the final gradient.
        tokens: number of response tokens.
    """

    samples: Sequences
    reference_states: Tensor
    row_weight: Tensor
    tokens: int

    @classmethod
    def of(cls, samples: Sequences, reference_states: Tensor, weight: float) -> KLBatch:
        """Return a batch whose KL counts with `weight` a sequence."""
        is_response = samples.labels() != IGNORE_INDEX
        # float64 here; kl_loss rounds the weight to the dtype in which it accumulates.
        return cls(samples, reference_states, is_response.double() * weight, int(is_response.sum()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sequences and the reference's states, on the CPU."""
        return {name: x.cpu() for name, x in {**vars(self.samples), "states": self.reference_states}.items()}


class PairsTerm(NamedTuple):
    """The preference term of a step in this process, after its backward.

    Attributes:
        loss: this process's part of the mean loss, a scalar: its pairs' mean times `share`.
        logps: log-probabilities [P] of its pairs.
        share: its part of the step's pairs.
        tokens: number of response tokens.
    """

    loss: Tensor
    logps: PairLogps
    share: float
    tokens: int


class Aligner:
    """A policy in training: everything that a step reads and writes.

    Attributes:
        policy, reference: models of the same vocabulary; the reference is never changed.
        pairs: the preference data.
        config: the settings.
        ranks: the processes that share each step.
        name, steps, step: see `spo_train.run.Trainer`.
    """

    def __init__(
        self,
        policy: TrainableModel,
        reference: TrainableModel,
        pairs: PairDataset,
        config: AlignConfig,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            policy, reference, pairs, config: see the attributes. All processes hold the whole models and all pairs. The
                models of the first process overwrite those of the others.
            ranks: the processes; None for one. The settings count pairs and samples over all of them.

        Raises:
            ValueError: the two models differ in vocabulary size; the processes differ in their pairs; a step has fewer
                pairs or samples than processes.
        """
        self.ranks = ranks or Ranks()
        if policy.vocab_size != reference.vocab_size:
            raise ValueError(
                f"policy and reference must have the same vocabulary, got {policy.vocab_size} and "
                f"{reference.vocab_size} ids"
            )
        self.policy, self.reference, self.pairs, self.config = policy, reference, pairs, config
        self.name, self.steps, self.step = f"align {config.method}", config.steps, 0
        self.method, self.beta = METHODS[config.method], config.effective_beta
        self.device = next(policy.parameters()).device
        self.importance = None
        if config.weight == "soft":
            self.importance = SoftImportance(config.gamma, config.normalizer, self.ranks.process_group)
        self._check_shares()
        self.ranks.check_same("pairs", pairs.fingerprint)
        self.ranks.take_from_first([*policy.state_dict().values(), *reference.state_dict().values()])
        self.max_length = min(policy.max_length, reference.max_length)
        self._kl = KLToReference(policy, reference, config.regularizer)
        # Name of the reference's states in a checkpoint.
        self._kl_key = "ref_hidden" if self._kl.from_heads else "ref_logits"
        self._optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._order = BatchOrder(len(pairs), config.batch_size, config.seed)
        self._kl_order = BatchOrder(len(pairs), config.kl_samples, config.seed)
        self._sampling = torch.Generator(self.device).manual_seed(config.seed)
        self._kl_batch: KLBatch | None = None
        # The reference's log-probabilities of both responses. A pair has NaN until a batch holds it for the first time.
        self._reference_logps = torch.full((len(pairs), 2), math.nan, dtype=torch.float64)
        if self.importance is not None:
            self.importance.to(self.device)
        reference.eval()
        self._state = TrainingState(
            model=policy,
            optimizer=self._optimizer,
            config=config,
            data=pairs.fingerprint,
            may_change=MAY_CHANGE,
            # Checkpoints keep the tensors under the name of the setting, "weight".
            modules={} if self.importance is None else {"weight": self.importance},
            generators={"sampling": self._sampling},
        )

    def _check_shares(self) -> None:
        counts = {"batch_size": self.config.batch_size}
        if self.method.samples_kl and self.beta > 0:
            counts["kl_samples"] = self.config.kl_samples
        for name, count in counts.items():
            if count < self.ranks.size:
                raise ValueError(f"{name} must be at least the number of processes, {self.ranks.size}, got {count}")

    def update(self) -> dict[str, float | None]:
        """Do one optimizer step.

        Returns:
            Metrics: `step` (counting this one), `loss`, `preference_loss`, `kl` (the regularizer, nats a sequence; None
            without KL samples), `accuracy` (share of pairs with a positive margin), `margin` (mean over pairs of
            L_w - L_l, for DPO less the reference's, nats), `logp_chosen`, `logp_rejected` (mean L_w and L_l, nats),
            `lr`, `grad_norm` (before clipping), `tokens_per_second` (response tokens with a gradient), `seconds` and
            parts of it: `seconds_preference`, `seconds_sampling` (reference logits included), `seconds_kl`. The seconds
            are this process's, the other metrics are over all processes.

        Raises:
            NonFiniteLossError: loss or gradient is NaN or infinite. The weights and AdamW's moments are unchanged.
        """
        timer = PartTimer(self.device)
        self.policy.train()
        self._optimizer.zero_grad()
        # Each term has its own backward, so the activations of pairs and of KL samples are never held together.
        pairs = self._preference_backward(timer)
        weighted_kl, kl_tokens = self._kl_backward(timer)
        record, tokens = self._clip_and_step(pairs, weighted_kl, kl_tokens)
        seconds = timer.total()
        return {
            **record,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **{f"seconds_{part}": timer.seconds.get(part, 0.0) for part in ("preference", "sampling", "kl")},
        }

    def _preference_backward(self, timer: PartTimer) -> PairsTerm:
        """Add the gradient of this process's part of the mean preference loss."""
        indices = self._order.indices(self.step)
        total = len(indices)
        indices = indices[self.ranks.share(total)]
        share = len(indices) / total
        batch = self.pairs.batch(indices)
        tokens = int((batch.lengths - batch.prompt_lens).sum())
        with timer("preference"):
            batch = batch.to(self.device)
            labels = batch.labels()
            reference = self._reference(indices, batch, labels)
            logps = response_logps(self.policy, batch.tokens[:, :-1], labels)
            pairs = PairLogps(*logps.chunk(2), *reference)
            loss = self.method.loss(self.config, self.importance, pairs).mean() * share
            loss.backward()
        return PairsTerm(loss, pairs, share, tokens)

    def _kl_backward(self, timer: PartTimer) -> tuple[Tensor | None, int]:
        """Add the gradient of beta times the regularizer.

        Return that term, or None without it, and the number of response tokens.
        """
        if not (self.method.samples_kl and self.beta > 0):
            return None, 0
        batch = self._kl_batch
        if batch is None or self.step % self.config.kl_every == 0:
            with timer("sampling"):
                batch = self._kl_batch = self._draw_kl_batch()
        with timer("kl"):
            weighted_kl = self._kl.loss(batch.samples.tokens[:, :-1], batch.reference_states, batch.row_weight)
            weighted_kl.backward()
        return weighted_kl, batch.tokens

    def _clip_and_step(
        self, pairs: PairsTerm, weighted_kl: Tensor | None, kl_tokens: int
    ) -> tuple[dict[str, float | None], float]:
        """Sum the gradient over the processes, clip it, raise if it or the loss is not finite, and let AdamW step.

        Returns:
            Metrics, and the number of response tokens.
        """
        self.ranks.sum_gradients(self.policy.parameters())
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip)
        logps = pairs.logps
        margins = logps.chosen - logps.rejected
        if logps.ref_chosen is not None and logps.ref_rejected is not None:
            margins = margins - (logps.ref_chosen - logps.ref_rejected)
        # Parts of this process, whose sums are the values.
        scalars = {
            "preference_loss": pairs.loss,
            "weighted_kl": torch.zeros_like(pairs.loss) if weighted_kl is None else weighted_kl,
            "accuracy": (margins > 0).double().mean() * pairs.share,
            "margin": margins.mean() * pairs.share,
            "logp_chosen": logps.chosen.mean() * pairs.share,
            "logp_rejected": logps.rejected.mean() * pairs.share,
            "tokens": torch.full_like(pairs.loss, pairs.tokens + kl_tokens, dtype=torch.float64),
        }
        summed = self.ranks.sum(torch.stack([scalar.detach().double() for scalar in scalars.values()]))
        # One transfer from the device, because the values decide whether the update is taken.
        values = torch.cat([summed, grad_norm.detach().double()[None]]).tolist()
        record: dict[str, float] = dict(zip([*scalars, "grad_norm"], values, strict=True))
        tokens = record.pop("tokens")
        kl = record.pop("weighted_kl")
        if not math.isfinite(record["preference_loss"] + kl + record["grad_norm"]):
            raise NonFiniteLossError(
                f"step {self.step + 1}: preference loss is {record['preference_loss']}, beta KL is {kl}, gradient norm "
                f"is {record['grad_norm']}; stopped before the update (try a smaller lr, or check the data and the "
                "models for NaN)"
            )
        lr = self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.step += 1
        metrics = {
            "step": self.step,
            "loss": record["preference_loss"] + kl,
            "kl": None if weighted_kl is None else kl / self.beta,
            **record,
            "lr": lr,
        }
        return metrics, tokens

    def _reference(
        self, indices: np.ndarray, batch: Sequences, labels: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the reference's log-probabilities [P] of chosen and rejected responses.

        The reference runs only if a pair of the batch is new.
        """
        if not self.method.needs_reference:
            return None, None
        if self._reference_logps[indices].isnan().any():
            with torch.no_grad():
                logps = response_logps(self.reference, batch.tokens[:, :-1], labels)
            self._reference_logps[indices] = logps.view(2, -1).T.to("cpu", torch.float64)
        dtype = next(self.policy.parameters()).dtype
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        chosen, rejected = self._reference_logps[indices].to(self.device, dtype).unbind(1)
        return chosen, rejected

    def _draw_kl_batch(self) -> KLBatch:
        refresh = self.step // self.config.kl_every
        prompts = self.pairs.prompts(self._kl_order.indices(refresh))
        rows = self.ranks.share(len(prompts))
        options: dict[str, Any] = {"max_length": self.max_length, "generator": self._sampling}
        if self.ranks.size == 1:
            samples = self.policy.sample(prompts, **options)
        elif "rows" in inspect.signature(self.policy.sample).parameters:
            samples = self.policy.sample(prompts, **options, rows=rows)  # type: ignore[call-arg]
        else:
            samples = _rows(self.policy.sample(prompts, **options), rows)
        return KLBatch.of(samples, self._kl.reference_states(samples.tokens[:, :-1]), self.beta / len(prompts))

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, so that `restore` continues with the same bits.

        All processes call, the first one writes. Another number of processes can go on from the file.
        """
        extra = {}
        if self._kl_batch is not None:
            parts = self.ranks.gather(self._kl_batch.tensors())
            for name in parts[0] if parts else ():
                key = self._kl_key if name == "states" else name
                extra[f"kl/{key}"] = _joined([part[name] for part in parts])
        if self.method.needs_reference:
            known = self._reference_logps
            if self.ranks.size > 1:  # a process has NaN for pairs that only others have met
                known = self.ranks.largest(torch.where(known.isnan(), -math.inf, known))
                known = torch.where(known == -math.inf, math.nan, known)
            extra["reference_logps"] = known
        if self.ranks.is_first:
            self._state.save(path, self.step, extra)

    def restore(self, path: Path) -> None:
        """Take over the state written by `save`.

        Raises:
            FileNotFoundError, CheckpointError: there is no checkpoint, it is damaged, or its model differs.
            ValueError: the checkpoint belongs to a run with other settings or other data.
        """
        self.step, extra = self._state.restore(path)
        if self.method.needs_reference:
            self._reference_logps = extra.pop("reference_logps")
        kl = {name.removeprefix("kl/"): tensor.to(self.device) for name, tensor in extra.items()}
        states = kl.pop(self._kl_key, None)
        self._kl_batch = None
        if states is not None:
            total = len(states)
            rows = self.ranks.share(total)
            samples = _rows(Sequences(**kl), rows)
            self._kl_batch = KLBatch.of(samples, states[rows, : samples.tokens.shape[1] - 1], self.beta / total)


def _rows(sequences: Sequences, rows: slice) -> Sequences:
    """Return some of the sequences, without columns that only their padding fills."""
    lengths = sequences.lengths[rows]
    return Sequences(sequences.tokens[rows, : int(lengths.max())], sequences.prompt_lens[rows], lengths)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of tensors [B, ..] or [B, T, ..], each filled up with 0 to the longest T."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (*[0, 0] * (part.dim() - 2), 0, longest - part.shape[1])) for part in parts])
