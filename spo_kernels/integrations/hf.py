"""SPO in Hugging Face's `Trainer`: a collator of pairs, and a mixin with SPO's loss, its KL, metrics and resume.

    class SPOTrainer(SPOTrainerMixin, Trainer):
        pass

    trainer = SPOTrainer(
        model=model,
        ref_model=reference,
        spo=SPOSettings(alpha=0.1, beta=0.03),
        args=TrainingArguments("out"),
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=rows,  # dicts with prompt_ids, chosen_ids and rejected_ids, lists of token ids
        processing_class=tokenizer,
    )
    trainer.train()

It needs transformers, 5.6 or later. One process or DDP; `spo_kernels.integrations.trl` is for FSDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.integrations.core import (
    HFSampler,
    KLBuffer,
    MetricSums,
    Pairs,
    Reference,
    SpecialTokens,
    SPOSettings,
    SPOStep,
    attach_head,
)
from spo_kernels.integrations.head import unwrapped

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError("spo_kernels.integrations.hf needs transformers: pip install transformers accelerate") from error

__all__ = ["PairCollator", "SPOTrainerMixin"]

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_Trainer: Any = object  # the methods of Trainer come from the class that the mixin stands before


@dataclass
class PairCollator:
    """Rows with lists of token ids -> a right-padded batch of P chosen and then P rejected sequences.

    A row is a mapping with `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL names them. A response holds its
    end-of-sequence token, and does not repeat the prompt.

    Args:
        pad_token_id: fills up short sequences.
        max_length: tokens of a sequence at most; the end of a longer response is cut off. None: as long as they are.
        pad_to_multiple_of: the width T is a multiple of this.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """`input_ids` [2P, T] int64, `attention_mask` [2P, T] int64, `labels` [2P, T] int64.

        Labels are aligned with logits, as the functions of this library take them: position t has the token at t + 1
        where that is a token of a response, and -100 elsewhere. A model's own loss would shift them once more.

        Raises:
            ValueError: a row lacks a column, has an empty one, two equal responses, or a prompt that fills max_length.
        """
        for number, row in enumerate(rows):
            if missing := [name for name in COLUMNS if name not in row]:
                raise ValueError(f"rows must have {', '.join(COLUMNS)}; row {number} has no {missing[0]}: {list(row)}")
            prompt, chosen, rejected = (row[name] for name in COLUMNS)
            for name in COLUMNS:
                if not len(row[name]):
                    raise ValueError(f"{name} must not be empty, got no token in row {number}")
            if list(chosen) == list(rejected):
                raise ValueError(f"chosen_ids and rejected_ids must differ, got the same in row {number}")
            if self.max_length is not None and len(prompt) >= self.max_length:
                raise ValueError(
                    f"prompt_ids must be shorter than max_length = {self.max_length}, to leave room for a response, "
                    f"got {len(prompt)} tokens in row {number}"
                )
        columns = ([row[name] for row in rows] for name in COLUMNS)
        pairs = Pairs.from_lists(*columns, pad=self.pad_token_id, max_length=self.max_length)
        missing_width = -pairs.ids.shape[1] % self.pad_to_multiple_of
        return {
            "input_ids": F.pad(pairs.ids, (0, missing_width), value=self.pad_token_id),
            "attention_mask": F.pad(pairs.attention_mask.long(), (0, missing_width)),
            "labels": F.pad(pairs.labels, (0, missing_width), value=-100),
        }


class SPOTrainerMixin(_Trainer):
    """SPO for a `transformers.Trainer`: ``class SPOTrainer(SPOTrainerMixin, Trainer)``.

    An optimizer step has the gradient that one batch of all its pairs would have, whatever the accumulation. The logs
    hold the metrics of `spo_kernels.integrations.core.SPOStep`, those of an evaluation with the prefix `eval_`.
    Checkpoints hold the samples and the running average of the weights.

    Args:
        args, kwargs: those of Trainer. `data_collator` must be a `PairCollator`, or give what it gives.
            `args.remove_unused_columns` becomes False.
        spo: see `spo_kernels.integrations.core.SPOSettings`; None: its defaults.
        ref_model: the frozen reference; needed where beta > 0 or `reference_rewards`, unless the model is a PEFT model,
            which without its adapter is its own reference.
        kl_prompts: prompts to sample from, token ids of each; None: the `prompt_ids` of the training set.
        kl_samples: sequences of a draw, over all ranks.
        kl_every: optimizer steps between two draws.
        kl_max_new_tokens: tokens of a sampled response at most.
        kl_max_length: tokens of prompt and sampled response at most; longer prompts lose their beginning.
        kl_generation_batch_size: sequences sampled, and scored by the reference, at once; None: all.

    Raises:
        ValueError: a reference is missing or has another vocabulary; an adapter on the head, or prompt learning;
            `compute_metrics` or `compute_loss_func` is given; pairs or sequences would be split (several GPUs in one
            process, an IterableDataset that one process reads for all, context parallelism); FSDP or DeepSpeed with
            beta > 0; and what `KLBuffer` and `SPOStep` raise.
    """

    # Trainer then divides the loss of a micro-batch by the number of micro-batches. Without that, accumulation over two
    # would double the gradient.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        spo: SPOSettings | None = None,
        ref_model: Any = None,
        kl_prompts: Sequence[Sequence[int]] | None = None,
        kl_samples: int = 32,
        kl_every: int = 8,
        kl_max_new_tokens: int = 256,
        kl_max_length: int | None = None,
        kl_generation_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        settings = SPOSettings() if spo is None else spo
        self.model_accepts_loss_kwargs = False  # says the same to a Trainer without loss_is_scaled_for_ga
        self.args.remove_unused_columns = False
        self._refuse(settings)
        self._refuse_adapters()
        attach_head(self.model)
        reference = self._reference(settings, ref_model)
        accelerator = self.accelerator
        buffer = None
        if reference is not None and settings.beta:
            tokenizer = self.processing_class
            if tokenizer is None:
                raise ValueError("processing_class must be the tokenizer where beta > 0, got None")
            buffer = KLBuffer(
                _prompts(self.train_dataset) if kl_prompts is None else kl_prompts,
                HFSampler(self.model, tokenizer, batch_size=kl_generation_batch_size),
                reference,
                SpecialTokens.of(tokenizer, unwrapped(self.model)),
                samples=kl_samples,
                every=kl_every,
                max_new_tokens=kl_max_new_tokens,
                max_length=kl_max_length,
                keep="logits" if settings.head != "linear" else "hidden",
                seed=self.args.seed,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                batch_size=kl_generation_batch_size,
                device=self.args.device,
            )
        group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
        self.spo = SPOStep(settings, buffer, reference=reference, process_group=group, device=self.args.device)
        self._evaluation_kl: Tensor | None = None
        self._sums: dict[str, MetricSums] = {}
        self.add_callback(_SaveState(self))

    def _refuse(self, settings: SPOSettings) -> None:
        for name in ("compute_metrics", "compute_loss_func"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"{name} must be None: SPOTrainerMixin has its own loss and metrics")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process must have one GPU, as DataParallel would split pairs, got {self.args.n_gpu}: start one "
                "process a GPU with torchrun or accelerate launch"
            )
        splits = self.accelerator.dispatch_batches is not False and self.accelerator.num_processes > 1
        if splits and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                'an IterableDataset needs accelerator_config={"dispatch_batches": False} in TrainingArguments, as '
                "accelerate would split pairs"
            )
        for kind in ("cp", "sp"):
            size = getattr(getattr(self.accelerator, "parallelism_config", None), f"{kind}_size", 1)
            if size > 1:
                raise ValueError(
                    f"parallelism_config must not split sequences over ranks, got {kind}_size = {size}: a rank "
                    "sums the log-probs of whole responses"
                )
        if settings.beta and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "beta must be 0 under FSDP and DeepSpeed with SPOTrainerMixin; for the KL under FSDP use "
                f"spo_kernels.integrations.trl, got beta = {settings.beta}"
            )

    def _refuse_adapters(self) -> None:
        for config in getattr(self.model, "peft_config", {}).values():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"model must not use prompt learning, which lengthens the sequences, got {type(config).__name__}"
                )

    def _reference(self, settings: SPOSettings, ref_model: Any) -> Reference | None:
        if not settings.beta and not settings.reference_rewards:
            return None
        if ref_model is None:
            if not hasattr(self.model, "disable_adapter"):
                raise ValueError("ref_model must be given where beta > 0 or with reference_rewards, got None")
            head = unwrapped(self.model).get_output_embeddings()
            if any(p.requires_grad for p in head.parameters()):
                raise ValueError("the head must be frozen where a PEFT model is its own reference: give a ref_model")
            return Reference(self.model, self.model.disable_adapter, shares_head=True)
        policy, reference = (unwrapped(model).get_output_embeddings().weight for model in (self.model, ref_model))
        if policy.shape[0] != reference.shape[0]:
            raise ValueError(
                f"ref_model must have the {policy.shape[0]} rows of the model's head, got {reference.shape[0]}: resize "
                "the reference too"
            )
        attach_head(ref_model)
        ref_model.requires_grad_(False)
        return Reference(self.accelerator.prepare_model(ref_model, evaluation_mode=True))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; a resumed run continues with the samples and the running average of the checkpoint."""
        self.spo.reset()
        self._sums.clear()
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            state = Path(folder) / _state_file(self.args.process_index)
            if state.exists():
                self.spo.load_state_dict(torch.load(state, map_location=self.args.device, weights_only=True))
            else:
                warnings.warn(
                    f"{state} does not exist: samples and running average start anew, so the run continues, but not "
                    "with the same numbers",
                    stacklevel=2,
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Trainer's micro-batches of an optimizer step; prepares the samples and the weights of the step."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches:
            window = [_pairs(self._prepare_inputs(batch)) for batch in batches]
            self.spo.begin(self.model_wrapped, window, self.state.global_step)
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss [] of a micro-batch; Trainer divides it by the number of micro-batches."""
        pairs = _pairs(inputs)
        if model.training:
            kind, result = "train", self.spo(model, pairs)
        else:
            if self._evaluation_kl is None and self.spo.buffer is not None:
                kl = self.spo.evaluation_kl(model, 2 * self.args.eval_batch_size)
                self._evaluation_kl = self.accelerator.reduce(kl, "sum")
            kind, result = "eval", self.spo.evaluate(model, pairs, self._evaluation_kl)
        sums = self._sums.get(kind)
        self._sums[kind] = result.metrics if sums is None else sums + result.metrics
        return (result.loss, {}) if return_outputs else result.loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch of an evaluation; no predictions."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's, with SPO's metrics in the result."""
        self._evaluation_kl = None
        self._sums.pop("eval", None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._means("eval").items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the metrics since the last log of a training loss."""
        if "loss" in logs:
            logs = {**logs, **self._means("train")}
        super().log(logs, *args, **kwargs)

    def _means(self, kind: str) -> dict[str, float]:
        """Metrics over all ranks since the last call; one message, one wait for the device."""
        sums = self._sums.pop(kind, None)
        if sums is None:
            return {}
        return MetricSums(sums.names, self.accelerator.reduce(sums.values, "sum")).means()


class _SaveState(TrainerCallback):
    """Writes the state of an `SPOStep` into each checkpoint."""

    def __init__(self, trainer: SPOTrainerMixin) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.save_only_model:
            torch.save(self.trainer.spo.state_dict(), folder / _state_file(args.process_index))


def _state_file(rank: int) -> str:
    return f"spo_{rank}.pt"


def _pairs(inputs: Mapping[str, Tensor]) -> Pairs:
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in inputs]
    if missing:
        raise ValueError(f"data_collator must give what PairCollator gives, got no {missing[0]}: {list(inputs)}")
    response = F.pad(inputs["labels"][:, :-1] != -100, (1, 0))
    return Pairs(inputs["input_ids"], inputs["attention_mask"].bool(), response)


class _Column(Sequence[Any]):
    """A column of a dataset, read where it is asked for."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return self.rows[row][self.name]


def _prompts(dataset: Any) -> Sequence[Sequence[int]]:
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"kl_prompts must be given where train_dataset has no length and no index, got {type(dataset).__name__}"
        )
    return _Column(dataset, "prompt_ids")
