"""One step of alignment, as in Appendix B of the paper; `spo_train.alignment` is a whole run.

A step computes the method's preference loss of a batch of pairs, from one forward of the policy. SPO adds the exact
token KL on sequences that are drawn from the policy itself every `kl_every` steps. The step then clips the gradient,
lets AdamW update the weights, and returns metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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

# Settings a resumed run may change: nothing before the resumed step depends on them.
MAY_CHANGE = frozenset({"steps"})


@dataclass(frozen=True)
class KLBatch:
    """Sequences drawn from the policy, with the parts of the KL term that stay the same until the next draw.

    Attributes:
        samples: S sequences.
        reference_states: the reference on them, see `KLToReference.reference_states`.
        row_weight: [S, T-1], beta / S on response tokens, 0 elsewhere. With beta and 1/S in it, kl_loss writes the
            final gradient.
        tokens: number of response tokens.
    """

    samples: Sequences
    reference_states: Tensor
    row_weight: Tensor
    tokens: int

    @classmethod
    def of(cls, samples: Sequences, reference_states: Tensor, beta: float) -> KLBatch:
        is_response = samples.labels() != IGNORE_INDEX
        # float64 here; kl_loss rounds the weight to the dtype in which it accumulates.
        return cls(samples, reference_states, is_response.double() * (beta / len(samples)), int(is_response.sum()))


class PairsTerm(NamedTuple):
    """The preference term of a step, after its backward.

    Attributes:
        loss: the mean loss, a scalar.
        logps: log-probabilities [P] of the pairs.
        tokens: number of response tokens.
    """

    loss: Tensor
    logps: PairLogps
    tokens: int


class Aligner:
    """A policy in training: everything that a step reads and writes.

    Attributes:
        policy, reference: models of the same vocabulary; the reference is never changed.
        pairs: the preference data.
        config: the settings.
        name, steps, step: see `spo_train.run.Trainer`.
    """

    def __init__(
        self, policy: TrainableModel, reference: TrainableModel, pairs: PairDataset, config: AlignConfig
    ) -> None:
        """
        Raises:
            ValueError: the two models differ in vocabulary size.
        """
        if policy.vocab_size != reference.vocab_size:
            raise ValueError(
                f"policy and reference must have the same vocabulary, got {policy.vocab_size} and "
                f"{reference.vocab_size} ids"
            )
        self.policy, self.reference, self.pairs, self.config = policy, reference, pairs, config
        self.name, self.steps, self.step = f"align {config.method}", config.steps, 0
        self.method, self.beta = METHODS[config.method], config.effective_beta
        self.device = next(policy.parameters()).device
        self.importance = SoftImportance(config.gamma, config.normalizer) if config.weight == "soft" else None
        self.max_length = min(policy.max_length, reference.max_length)
        self._kl = KLToReference(policy, reference)
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

    def update(self) -> dict[str, float | None]:
        """Do one optimizer step.

        Returns:
            Metrics: `step` (counting this one), `loss`, `preference_loss`, `kl` (nats a sequence; None without
            KL samples), `accuracy` (share of pairs with a positive margin), `margin` (mean over pairs of L_w - L_l, for
            DPO less the reference's, nats), `logp_chosen`, `logp_rejected` (mean L_w and L_l, nats), `lr`,
            `grad_norm` (before clipping), `tokens_per_second` (response tokens with a gradient), `seconds` and parts of
            it: `seconds_preference`, `seconds_sampling` (reference logits included), `seconds_kl`.

        Raises:
            NonFiniteLossError: loss or gradient is NaN or infinite. The weights and AdamW's moments are unchanged.
        """
        timer = PartTimer(self.device)
        self.policy.train()
        self._optimizer.zero_grad()
        # Each term has its own backward, so the activations of pairs and of KL samples are never held together.
        pairs = self._preference_backward(timer)
        weighted_kl, kl_tokens = self._kl_backward(timer)
        record = self._clip_and_step(pairs, weighted_kl)
        seconds = timer.total()
        return {
            **record,
            "tokens_per_second": (pairs.tokens + kl_tokens) / seconds,
            "seconds": seconds,
            **{f"seconds_{part}": timer.seconds.get(part, 0.0) for part in ("preference", "sampling", "kl")},
        }

    def _preference_backward(self, timer: PartTimer) -> PairsTerm:
        """Add the gradient of the mean preference loss."""
        indices = self._order.indices(self.step)
        batch = self.pairs.batch(indices)
        tokens = int((batch.lengths - batch.prompt_lens).sum())
        with timer("preference"):
            batch = batch.to(self.device)
            labels = batch.labels()
            reference = self._reference(indices, batch, labels)
            logps = response_logps(self.policy, batch.tokens[:, :-1], labels)
            pairs = PairLogps(*logps.chunk(2), *reference)
            loss = self.method.loss(self.config, self.importance, pairs).mean()
            loss.backward()
        return PairsTerm(loss, pairs, tokens)

    def _kl_backward(self, timer: PartTimer) -> tuple[Tensor | None, int]:
        """Add the gradient of beta KL. Return beta KL, or None without that term, and the number of response tokens."""
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

    def _clip_and_step(self, pairs: PairsTerm, weighted_kl: Tensor | None) -> dict[str, float | None]:
        """Clip the gradient, raise if loss or gradient is not finite, and let AdamW take the step. Return metrics."""
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip)
        logps = pairs.logps
        margins = logps.chosen - logps.rejected
        if logps.ref_chosen is not None and logps.ref_rejected is not None:
            margins = margins - (logps.ref_chosen - logps.ref_rejected)
        scalars = {
            "preference_loss": pairs.loss,
            "weighted_kl": torch.zeros_like(pairs.loss) if weighted_kl is None else weighted_kl,
            "accuracy": (margins > 0).to(margins.dtype).mean(),
            "margin": margins.mean(),
            "logp_chosen": logps.chosen.mean(),
            "logp_rejected": logps.rejected.mean(),
            "grad_norm": grad_norm,
        }
        # One transfer from the device, because the values decide whether the update is taken.
        values = torch.stack([scalar.detach().double() for scalar in scalars.values()]).tolist()
        record: dict[str, float] = dict(zip(scalars, values, strict=True))
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
        return {
            "step": self.step,
            "loss": record["preference_loss"] + kl,
            "kl": None if weighted_kl is None else kl / self.beta,
            **record,
            "lr": lr,
        }

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
        samples = self.policy.sample(
            self.pairs.prompts(self._kl_order.indices(refresh)),
            max_length=self.max_length,
            generator=self._sampling,
        )
        return KLBatch.of(samples, self._kl.reference_states(samples.tokens[:, :-1]), self.beta)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, so that `restore` continues with the same bits."""
        extra = {}
        if self._kl_batch is not None:
            extra = {f"kl/{name}": tensor for name, tensor in vars(self._kl_batch.samples).items()}
            extra[f"kl/{self._kl_key}"] = self._kl_batch.reference_states
        if self.method.needs_reference:
            extra["reference_logps"] = self._reference_logps
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
        self._kl_batch = None if states is None else KLBatch.of(Sequences(**kl), states, self.beta)
