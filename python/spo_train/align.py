"""The alignment loop: pairs in, an aligned model out, with SPO's training step as in Appendix B of the paper.

One `Aligner` step is: the policy's log-probabilities of a batch of pairs in one forward, the method's preference loss,
for SPO the exact token KL on sequences drawn from the policy itself every `kl_every` steps, clip, AdamW. A method is an
entry of `METHODS`; it works on log-probabilities and on nothing else.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import spo_kernels
from spo_kernels import SoftImportance, kl_loss, preference_loss, sequence_logps, spo_loss
from spo_train.checkpoint import load_checkpoint, save_checkpoint
from spo_train.config import AlignConfig
from spo_train.errors import CheckpointError, NonFiniteLossError, RunInterruptedError
from spo_train.evaluate import Evaluator
from spo_train.files import write_atomically
from spo_train.metrics import JsonlLog, PartTimer, progress
from spo_train.models.llama import TOKENIZER_FILE, Llama, save_model
from spo_train.pair_data import BatchOrder, PairDataset
from spo_train.protocol import IGNORE_INDEX, LanguageModel, Sequences
from spo_train.tokenizer import Tokenizer

CHECKPOINT_FILE, METRICS_FILE, EVALUATIONS_FILE = "checkpoint.safetensors", "metrics.jsonl", "evaluations.jsonl"
RUN_FILE, STORIES_FILE, MODEL_FOLDER = "run.json", "stories.jsonl", "model"
# Stories before and after that a run keeps for its report.
STORIES = 8
# Settings a resumed run may change: nothing before the resumed step depends on them.
RESUMABLE_SETTINGS = frozenset({"steps"})


class TrainableModel(LanguageModel, Protocol):
    """A `LanguageModel` that is a `torch.nn.Module`."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@dataclass(frozen=True)
class Method:
    """A preference objective.

    Attributes:
        loss: `(config, weight, policy_chosen, policy_rejected, reference_chosen, reference_rejected)` log-probabilities
            [P] (the reference's None unless `needs_reference`) to losses [P].
        needs_reference: the loss takes the reference's log-probabilities of the pairs.
        samples_kl: `beta` times the KL on sequences drawn from the policy is added.
    """

    loss: Callable[[AlignConfig, nn.Module | None, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    needs_reference: bool
    samples_kl: bool


def _spo(
    config: AlignConfig,
    weight: nn.Module | None,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
) -> Tensor:
    losses, _, _ = spo_loss(chosen, rejected, ref_chosen, ref_rejected, alpha=config.alpha, weight=weight)
    return losses


def _dpo(
    config: AlignConfig,
    _weight: nn.Module | None,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
) -> Tensor:
    losses, _, _ = preference_loss("dpo", chosen, rejected, ref_chosen, ref_rejected, beta=config.beta)
    return losses


METHODS = {
    "spo": Method(_spo, needs_reference=False, samples_kl=True),
    "dpo": Method(_dpo, needs_reference=True, samples_kl=False),
}


@dataclass(frozen=True)
class KLBatch:
    """Sequences drawn from the policy, and what of the KL term stays the same until the next draw.

    Attributes:
        samples: S sequences.
        ref_logits: [S, T-1, V], the reference's logits on them.
        row_weight: [S, T-1], beta / S where a response token is predicted, else 0: beta and the mean over sequences
            being in it, the kernel writes the final gradient.
        tokens: number of response tokens.
    """

    samples: Sequences
    ref_logits: Tensor
    row_weight: Tensor
    tokens: int

    @classmethod
    def of(cls, samples: Sequences, ref_logits: Tensor, beta: float) -> KLBatch:
        is_response = samples.labels() != IGNORE_INDEX
        # In double precision: kl_loss rounds it to the dtype it accumulates in.
        return cls(samples, ref_logits, is_response.double() * (beta / len(samples)), int(is_response.sum()))


class Aligner:
    """A policy in training: everything that a step reads and writes.

    Attributes:
        policy, reference: models of the same vocabulary; the reference is never changed.
        pairs: the preference data.
        config: the settings.
        step: optimizer steps done.
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
        self.step = 0
        self.method = METHODS[config.method]
        self.device = next(policy.parameters()).device
        self.weight = SoftImportance(config.gamma, config.normalizer) if config.weight == "soft" else None
        self.max_length = min(policy.max_length, reference.max_length)
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
        # The reference's log-probabilities of every pair, filled in as pairs first come up; NaN is "not yet".
        self._reference_logps = torch.full((len(pairs), 2), math.nan, dtype=torch.float64)
        if self.weight is not None:
            self.weight.to(self.device)
        reference.eval()

    def update(self) -> dict[str, float | None]:
        """Does one optimizer step.

        Returns:
            Metrics: `step` (counting this one), `loss`, `preference_loss`, `kl` (nats a sequence; None without
            KL samples), `margin` (mean over pairs of L_w - L_l, for DPO less the reference's, nats), `accuracy` (share
            of pairs with a positive margin), `logp_chosen`, `logp_rejected` (mean L_w and L_l, nats), `lr`,
            `grad_norm` (before clipping), `tokens_per_s` (response tokens with a gradient), `seconds` and parts of it:
            `seconds_preference`, `seconds_sampling` (reference logits included), `seconds_kl`.

        Raises:
            NonFiniteLossError: loss or gradient is NaN or infinite. Weights and optimizer are left as they were.
        """
        config, timer, start = self.config, PartTimer(), time.perf_counter()
        self.policy.train()
        self._optimizer.zero_grad()
        indices = self._order.indices(self.step)
        batch = self.pairs.batch(indices)
        tokens = int((batch.lengths - batch.prompt_lens).sum())
        with timer("preference"):
            batch = _to(batch, self.device)
            labels = batch.labels()
            ref_chosen, ref_rejected = self._reference(indices, batch, labels)
            logps = sequence_logps(self.policy(batch.tokens[:, :-1]), labels, inplace_backward=True)
            chosen, rejected = logps.chunk(2)
            preference = self.method.loss(config, self.weight, chosen, rejected, ref_chosen, ref_rejected).mean()
            # Two backward passes, one a term: the activations of pairs and of KL samples are never held together.
            preference.backward()
        weighted_kl = torch.zeros_like(preference)
        samples_kl = self.method.samples_kl and config.beta > 0
        if samples_kl:
            kl_batch = self._kl_batch
            if kl_batch is None or self.step % config.kl_every == 0:
                with timer("sampling"):
                    kl_batch = self._kl_batch = self._draw_kl_batch()
            with timer("kl"):
                tokens += kl_batch.tokens
                weighted_kl = kl_loss(
                    self.policy(kl_batch.samples.tokens[:, :-1]),
                    kl_batch.ref_logits,
                    row_weight=kl_batch.row_weight,
                    overwrite_logits=True,
                )
                weighted_kl.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.clip)

        margins = chosen - rejected
        if ref_chosen is not None and ref_rejected is not None:
            margins = margins - (ref_chosen - ref_rejected)
        accuracy = (margins > 0).to(margins.dtype).mean()
        scalars = (preference, weighted_kl, grad_norm, accuracy, margins.mean(), chosen.mean(), rejected.mean())
        # The only transfer of the step, and what decides whether the update is taken.
        values = torch.stack([scalar.detach().double() for scalar in scalars]).tolist()
        preference_value, kl_value, norm_value, accuracy_value, margin, logp_chosen, logp_rejected = values
        if not math.isfinite(preference_value + kl_value + norm_value):
            raise NonFiniteLossError(
                f"step {self.step + 1}: preference loss is {preference_value}, beta KL is {kl_value}, gradient norm is "
                f"{norm_value}; stopped before the update (try a smaller lr, or check the data and the models for NaN)"
            )
        lr = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            "loss": preference_value + kl_value,
            "preference_loss": preference_value,
            "kl": kl_value / config.beta if samples_kl else None,
            "accuracy": accuracy_value,
            "margin": margin,
            "logp_chosen": logp_chosen,
            "logp_rejected": logp_rejected,
            "lr": lr,
            "grad_norm": norm_value,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            **{f"seconds_{part}": timer.seconds.get(part, 0.0) for part in ("preference", "sampling", "kl")},
        }

    def _reference(
        self, indices: np.ndarray, batch: Sequences, labels: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The reference's log-probabilities [P] of chosen and rejected responses, from memory where known."""
        if not self.method.needs_reference:
            return None, None
        if self._reference_logps[indices].isnan().any():
            with torch.no_grad():
                logps = sequence_logps(self.reference(batch.tokens[:, :-1]), labels)
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
        with torch.no_grad():
            return KLBatch.of(samples, self.reference(samples.tokens[:, :-1]), self.config.beta)

    def save(self, path: Path) -> None:
        """Writes everything that the next step depends on, so that `restore` continues with the same bits."""
        tensors = {f"model/{name}": tensor for name, tensor in self.policy.state_dict().items()}
        for i, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": tensor for name, tensor in state.items()}
        if self.weight is not None:
            tensors |= {f"weight/{name}": tensor for name, tensor in self.weight.state_dict().items()}
        if self._kl_batch is not None:
            tensors |= {f"kl/{name}": tensor for name, tensor in vars(self._kl_batch.samples).items()}
            tensors["kl/ref_logits"] = self._kl_batch.ref_logits
        if self.method.needs_reference:
            tensors["reference_logps"] = self._reference_logps
        tensors["rng/sampling"] = self._sampling.get_state()
        # The global generator too: a model may have dropout.
        tensors["rng/torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"step": self.step, "config": asdict(self.config), "data": self.pairs.fingerprint}
        save_checkpoint(path, tensors=tensors, state=state)

    def restore(self, path: Path) -> None:
        """Takes over the state written by `save`.

        Raises:
            FileNotFoundError, CheckpointError: no checkpoint there, or a damaged one.
            ValueError: the checkpoint is of a run with other settings or other data, or of another model.
        """
        tensors, state = load_checkpoint(path)
        for name, ours in asdict(self.config).items():
            theirs = state["config"].get(name)
            if theirs != ours and name not in RESUMABLE_SETTINGS:
                raise ValueError(
                    f"{path} is of a run with {name}={theirs}, got {name}={ours}: resume with the same settings, or "
                    "start a new run in another folder"
                )
        if state["data"] != self.pairs.fingerprint:
            raise ValueError(f"{path} is of a run on other pairs (or with another tokenizer or length) than these")

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        try:
            self.policy.load_state_dict(part("model/"))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in part("optimizer/").items():
                i, key = name.split("/")
                moments.setdefault(int(i), {})[key] = tensor
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
            if self.weight is not None:
                self.weight.load_state_dict(part("weight/"))
            kl = {name: tensor.to(self.device) for name, tensor in part("kl/").items()}
            ref_logits = kl.pop("ref_logits", None)
            self._kl_batch = None if ref_logits is None else KLBatch.of(Sequences(**kl), ref_logits, self.config.beta)
            if self.method.needs_reference:
                self._reference_logps = tensors["reference_logps"]
            self._sampling.set_state(tensors["rng/sampling"])
            torch.set_rng_state(tensors["rng/torch"])
            if self.device.type == "cuda" and "rng/cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this model: {error}") from error
        self.step = state["step"]


def align(
    policy: Llama,
    reference: TrainableModel,
    tokenizer: Tokenizer,
    pairs: PairDataset,
    config: AlignConfig,
    out: Path,
    *,
    evaluator: Evaluator | None = None,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    evaluate_every: int = 100,
) -> None:
    """A whole run in one folder: `run`, then the aligned model in `out/model` and stories before and after.

    `out/run.json` says what was run, and whether it is finished.

    Args:
        policy: what is trained, in place.
        reference, pairs, config: see `Aligner`.
        tokenizer: saved with the model.
        out, resume, checkpoint_every, evaluate_every: see `run`.
        evaluator: evaluates during training; None trains only.
        about: further facts for `run.json`, for instance where model and pairs came from.

    Raises:
        What `run` raises.
    """
    aligner = Aligner(policy, reference, pairs, config)
    if not resume:
        refuse_existing(out)
    record = {
        **(about or {}),
        "config": asdict(config),
        "evaluate": asdict(evaluator.config) if evaluator else None,
        "pairs_used": len(pairs),
        "versions": {"torch": torch.__version__, "spo_kernels": spo_kernels.__version__},
        "threads": torch.get_num_threads(),
        "finished": False,
    }
    _write_json(out / RUN_FILE, record)
    run(
        aligner,
        out,
        resume=resume,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        evaluate=evaluator.hook(policy) if evaluator else None,
    )
    save_model(policy, out / MODEL_FOLDER)
    tokenizer.save(out / MODEL_FOLDER / TOKENIZER_FILE)
    if evaluator is not None:
        stories = evaluator.before_and_after(policy, STORIES)
        lines = [json.dumps({"before": before.record(), "after": after.record()}) + "\n" for before, after in stories]
        write_atomically(out / STORIES_FILE, "".join(lines).encode())
    _write_json(out / RUN_FILE, record | {"finished": True})


def is_finished(out: Path) -> bool:
    """Whether the folder holds a run that `align` brought to its end."""
    file = out / RUN_FILE
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["finished"]


def run(
    aligner: Aligner,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 100,
    evaluate_every: int = 100,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Trains until `config.steps`, writing `metrics.jsonl`, `evaluations.jsonl` and `checkpoint.safetensors` to `out`.

    A run that was killed goes on from its last checkpoint with the same losses as if nothing had happened (on the same
    machine, with the same number of threads). SIGINT and SIGTERM end it after the current step, with a checkpoint.

    Args:
        aligner: what to train.
        out: the run's folder.
        resume: go on from the checkpoint in `out`, or start if there is none yet.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        evaluate_every: steps between two calls of `evaluate`, which also has one before the first step and one at the
            end.
        evaluate: takes the number of steps done, returns a record for `evaluations.jsonl`. It must leave the global
            random state alone.

    Returns:
        The records of `evaluations.jsonl`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        NonFiniteLossError: see `Aligner.update`; earlier checkpoints stand.
        RunInterruptedError: stopped by a signal, after a checkpoint.
        CheckpointError, OSError, ValueError: a file cannot be written or read, or does not fit; see `Aligner.restore`.
    """
    checkpoint, steps = out / CHECKPOINT_FILE, aligner.config.steps
    if not resume:
        refuse_existing(out)
    if checkpoint.exists():
        aligner.restore(checkpoint)
    resumed_at = aligner.step
    keep = resumed_at if checkpoint.exists() else None
    metrics = JsonlLog(out / METRICS_FILE, keep_to_step=keep)
    evaluations = JsonlLog(out / EVALUATIONS_FILE, keep_to_step=keep)
    evaluated = {record["step"] for record in evaluations.records}
    with (
        _stop_requests() as stop_requested,
        progress(total=steps, initial=resumed_at, desc=f"align {aligner.config.method}", unit="step") as bar,
    ):
        while True:
            done, step = aligner.step >= steps, aligner.step
            if step > resumed_at and (done or stop_requested() or step % checkpoint_every == 0):
                aligner.save(checkpoint)
            if stop_requested():
                raise RunInterruptedError(f"stopped after step {step}; {checkpoint} holds all of it, resume to go on")
            if evaluate is not None and (done or step % evaluate_every == 0) and step not in evaluated:
                evaluations.write({"step": step, **evaluate(step)})
            if done:
                return evaluations.records
            record = aligner.update()
            metrics.write(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", accuracy=f"{record['accuracy']:.2f}", refresh=False)
            bar.update()


def refuse_existing(out: Path) -> None:
    """Raises FileExistsError if the folder holds a run with a checkpoint."""
    if (out / CHECKPOINT_FILE).exists():
        raise FileExistsError(f"{out} already holds a run: resume it, or choose another folder")


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request that the loop reads between steps; a second one acts at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: FrameType | None) -> None:
        requested.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to(samples: Sequences, device: torch.device) -> Sequences:
    return Sequences(*(tensor.to(device) for tensor in vars(samples).values()))
