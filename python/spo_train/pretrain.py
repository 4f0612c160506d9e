"""Pretraining of a small Llama on plain text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spo_kernels import sequence_logps, token_logps
from spo_train.checkpoint import TrainingState
from spo_train.config import PretrainConfig
from spo_train.errors import NonFiniteLossError
from spo_train.files import CHECKPOINT_FILE, TOKENIZER_FILE, WEIGHTS_FILE, StrPath
from spo_train.models.llama import Llama, ModelConfig
from spo_train.protocol import IGNORE_INDEX, Sequences
from spo_train.run import run
from spo_train.text_data import TokenSequences
from spo_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainResult:
    """A pretrained model. `spo_train.models.llama.load_pretrained` reads the same model from its folder.

    Attributes:
        model, tokenizer: the model, in eval mode, and its tokenizer.
        nll_per_token, nll_per_sequence: held-out negative log-likelihood in nats, eos counted.
        train_sequences, held_out_sequences: numbers of sequences.
    """

    model: Llama
    tokenizer: Tokenizer
    nll_per_token: float
    nll_per_sequence: float
    train_sequences: int
    held_out_sequences: int


def pretrain(
    documents: Sequence[str],
    out: StrPath,
    config: PretrainConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    restart: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Train a tokenizer (unless one is given) and a model on documents, and write both to a folder.

    An interrupted run goes on from its last checkpoint if it is called again with the same arguments, and ends with
    the weights of an unbroken run. The same arguments and number of threads give the same weights.

    Args:
        documents: plain text; each becomes `bos text eos`, split where longer than `config.max_length`.
        out: receives config.json, model.safetensors, tokenizer.model, metrics.jsonl and, meanwhile, a checkpoint.
        config: sizes and schedule; None takes the defaults.
        tokenizer: reused instead of training one.
        device: where to train.
        resume: go on from the checkpoint in `out`, or start if there is none.
        restart: start over, and replace the run or the finished model in `out`.
        progress: whether to show progress bars, if standard error is a terminal.

    Raises:
        ValueError: no or too little text, a finished model in `out`, or a checkpoint of another run.
        Everything that `spo_train.run.run` raises.
    """
    config = config or PretrainConfig()
    out = Path(out)
    if not restart and holds_finished_model(out):
        raise ValueError(f"{out} already holds a model: restart, or choose another folder")
    if tokenizer is None:
        # A resumed run gets the same tokenizer, because its training is deterministic.
        tokenizer = Tokenizer.train(documents, vocab_size=config.vocab_size)
    data = TokenSequences.encode(documents, tokenizer, config.max_length, progress=progress)

    torch.manual_seed(config.seed)
    model = Llama(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            ffn_dim=config.ffn_dim,
            max_length=config.max_length,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
    ).to(device)
    pretrainer = Pretrainer(model, data, config)
    records = run(
        pretrainer,
        out,
        resume=resume,
        restart=restart,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
    )
    tokenizer.save(out / TOKENIZER_FILE)
    model.save(out)
    (out / CHECKPOINT_FILE).unlink()
    return PretrainResult(
        model.eval(),
        tokenizer,
        records[-1]["nll_per_token"],
        records[-1]["nll_per_sequence"],
        len(pretrainer.train),
        len(pretrainer.held_out),
    )


def holds_finished_model(out: Path) -> bool:
    """Return whether pretraining in this folder came to its end."""
    return (out / WEIGHTS_FILE).exists() and not (out / CHECKPOINT_FILE).exists()


class Pretrainer:
    """A model in pretraining: everything that a step reads and writes.

    Attributes:
        model: what is trained.
        train, held_out: sequences to train on, and sequences to measure the NLL on.
        config: the settings.
        name, steps, step: see `spo_train.run.Trainer`.
    """

    name = "pretrain"

    def __init__(self, model: Llama, data: TokenSequences, config: PretrainConfig) -> None:
        self.model, self.config = model, config
        self.train, self.held_out = data.split(config.held_out, config.seed)
        self.steps, self.step = config.steps, 0
        self.device = model.embedding.weight.device
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._order = self.train.by_length(config.seed)
        self._state = TrainingState(model=model, optimizer=self._optimizer, config=config, data=data.fingerprint())

    def update(self) -> dict[str, Any]:
        """Do one optimizer step.

        Returns:
            Metrics: `step` (counting this one), `loss` (nats a token), `lr`, `grad_norm` (before clipping),
            `tokens_per_second`; with an evaluation also `nll_per_token` and `nll_per_sequence` (held out, nats).

        Raises:
            NonFiniteLossError: loss or gradient is NaN or infinite. The weights and AdamW's moments are unchanged.
        """
        start = time.perf_counter()
        lr = _learning_rate(self.step, self.config)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        batch = self.train.batch(_draw_batch(self._order, self.step, self.config), self.model.pad_id, self.device)
        loss = nll_loss(self.model, batch)
        self._optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        loss_value, norm_value = loss.item(), grad_norm.item()
        if not math.isfinite(loss_value + norm_value):
            raise NonFiniteLossError(
                f"step {self.step + 1}: loss is {loss_value}, gradient norm is {norm_value}; stopped before the update "
                "(try a smaller lr)"
            )
        self._optimizer.step()
        self.step += 1
        record = {
            "step": self.step,
            "loss": loss_value,
            "lr": lr,
            "grad_norm": norm_value,
            "tokens_per_second": int((batch.lengths - 1).sum()) / (time.perf_counter() - start),
        }
        if self.step % self.config.evaluate_every == 0 or self.step == self.steps:
            per_token, per_sequence = held_out_nll(self.model, self.held_out, self.model.pad_id)
            record |= {"nll_per_token": per_token, "nll_per_sequence": per_sequence}
        return record

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, so that `restore` continues with the same bits."""
        self._state.save(path, self.step)

    def restore(self, path: Path) -> None:
        """Take over the state written by `save`; see `TrainingState.restore` for what is refused."""
        self.step, _ = self._state.restore(path)


def nll_loss(model: Llama, batch: Sequences) -> Tensor:
    """Return the mean negative log-likelihood of a batch's labels, in nats a token."""
    labels = batch.labels()
    logps = token_logps(model(batch.tokens[:, :-1]), labels, inplace_backward=True)
    return -logps.sum() / (labels != IGNORE_INDEX).sum()


@torch.no_grad()
def held_out_nll(model: Llama, data: TokenSequences, pad_id: int, batch_size: int = 64) -> tuple[float, float]:
    """Return the negative log-likelihood of all sequences of `data`, in nats a token and in nats a sequence."""
    device = next(model.parameters()).device
    order = np.argsort(data.lengths, kind="stable")
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(order), batch_size):
        batch = data.batch(order[start : start + batch_size], pad_id, device)
        total -= sequence_logps(model(batch.tokens[:, :-1]), batch.labels()).double().sum().item()
    model.train(was_training)
    return total / int((data.lengths - 1).sum()), total / len(data)


def _learning_rate(step: int, config: PretrainConfig) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def _draw_batch(order: np.ndarray, step: int, config: PretrainConfig) -> np.ndarray:
    """Return neighbours in `order` from a random place. Seed and step decide the place, so checkpoints hold no more."""
    size = min(config.batch_size, len(order))
    start = np.random.default_rng((config.seed, 2, step)).integers(len(order) - size + 1)
    return order[start : start + size]
