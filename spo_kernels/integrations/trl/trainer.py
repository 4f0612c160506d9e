"""`SPOTrainer`: TRL's ``DPOTrainer`` with the loss of SPO.

It uses public hooks: ``compute_loss``, ``get_batch_samples`` (which has all micro-batches of a step before the first),
``evaluate``, ``log``, ``train`` and callbacks. What a step does is in `spo_kernels.integrations.step`.
"""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset, load_dataset
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from spo_kernels.integrations.buffer import KLBuffer, Reference
from spo_kernels.integrations.head import attach_head, attached_options, unwrapped
from spo_kernels.integrations.rows import Pairs
from spo_kernels.integrations.sampling import HFSampler, Sampler, SpecialTokens
from spo_kernels.integrations.step import MetricSums, SPOStep
from spo_kernels.integrations.trl import checks
from spo_kernels.integrations.trl.config import SPOConfig
from spo_kernels.integrations.trl.sampler import TRLVLLMSampler


class NonFiniteLossError(ValueError):
    """A loss is NaN or infinite; the optimizer step was not taken."""


class _NoReference(nn.Module):
    """Stands in for a reference that nothing reads, so that ``DPOTrainer`` builds none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()

    def forward(self) -> None: ...


class SPOTrainer(DPOTrainer):
    """Trainer for Soft Preference Optimization. Takes what ``DPOTrainer`` takes, with an `SPOConfig`.

        trainer = SPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=SPOConfig("out"), train_dataset=pairs)
        trainer.train()

    Every ``kl_every`` optimizer steps the policy answers prompts. The KL to the reference on these samples keeps the
    policy near the reference. Each step uses all samples of the last draw, spread over its micro-steps. Pairs and
    samples of a micro-step go through the model in one forward, inside which the loss is computed. Losses and gradients
    of an accumulated step are those of one big batch.

    Checkpoints hold the samples. A resumed run on the same number of ranks therefore has the same bits as one that was
    not interrupted. Evaluation uses the samples of the last draw; before the first one, samples of its own.

    Args:
        model, ref_model, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
            optimizers, quantization_config, peft_config: see ``trl.DPOTrainer``. With ``peft_config``, or a PEFT model,
            the reference is the model with the adapter off (or TRL's adapter "ref").
        args: an `SPOConfig`.
        kl_prompts: a dataset with a column prompt (text or messages), or a list of texts, messages or token ids, to
            sample from. None: ``args.kl_prompts``.
        sampler: draws in place of ``args.sampler``; see `spo_kernels.integrations.sampling.Sampler`.

    Raises:
        ValueError: rows that are no preference pairs; a model, tokenizer or adapter that SPO cannot train; a policy and
            a reference of different vocabularies; kl_samples that ranks and accumulation do not divide.
        TypeError: args is not an `SPOConfig`.
    """

    _tag_names = ["trl", "spo"]  # noqa: RUF012
    _name = "SPO"
    _paper = {  # noqa: RUF012
        "title": "Soft Preference Optimization: Aligning Language Models to Expert Distributions",
        "id": "2405.00747",
        "citation": textwrap.dedent("""\
            @article{sharifnassab2024soft,
                title  = {{Soft Preference Optimization: Aligning Language Models to Expert Distributions}},
                author = {Sharifnassab, A. and Salehkaleybar, S. and Ghiassian, S. and Kanoria, S. and Schuurmans, D.},
                year   = 2024,
                eprint = {arXiv:2405.00747},
            }"""),
    }

    args: SPOConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        kl_prompts: Dataset | Sequence[Any] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        if not Version(checks.TESTED[0]) <= Version(trl.__version__) < Version(checks.TESTED[1]):
            warnings.warn(
                f"TRL {trl.__version__} is outside the tested range >={checks.TESTED[0]},<{checks.TESTED[1]}",
                stacklevel=2,
            )
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SPOConfig(f"{name.rstrip('/').split('/')[-1]}-SPO")
        if not isinstance(args, SPOConfig):
            raise TypeError(f"args must be an SPOConfig, got {type(args).__name__}")
        adapted = peft_config is not None or isinstance(model, PeftModel)
        if not isinstance(model, str):
            checks.check_model(model)
        checks.check_adapters([peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())])
        checks.check_processing_class(processing_class)
        if args.beta > 0:
            checks.check_samples(args.kl_samples, args.world_size, args.gradient_accumulation_steps)
        for dataset_name, dataset in _named_datasets(train_dataset, eval_dataset):
            checks.check_pairs(dataset, dataset_name)
        stand_in = ref_model is None and not (adapted or args.needs_reference or _is_sharded(args))
        super().__init__(
            model=model,
            ref_model=_NoReference() if stand_in else ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        checks.check_parallelism(self.accelerator.parallelism_config)
        if not args.needs_reference:
            self.ref_model = None
        base = unwrapped(self.model)
        checks.check_model(base)
        checks.check_processing_class(self.processing_class)
        if self.ref_model is not None:
            checks.check_vocabularies(base, unwrapped(self.ref_model))
        if args.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef must be 0 or None, as SPO has no router loss, got {args.router_aux_loss_coef}"
            )
        if self.aux_loss_enabled:
            warnings.warn(
                "the auxiliary loss of the model's router is not part of the loss; router_aux_loss_coef=0 says as much",
                stacklevel=2,
            )
        self.spo = self._make_step(base, kl_prompts, sampler)
        self._window_losses: list[Tensor] = []
        self._window_metrics: list[MetricSums] = []
        self._sums: dict[str, MetricSums | None] = {"train": None, "eval": None}
        self._evaluation_kl: Tensor | None = None
        self._is_evaluating = False
        self.add_callback(_SPOCallback(self))

    # ---- construction

    def _make_step(self, base: Any, kl_prompts: Any, sampler: Sampler | None) -> SPOStep:
        args = self.args
        for model in (base, self.ref_model):
            if model is not None:
                attach_head(model)
        head, keep = ("linear" if args.head == "auto" else args.head), args.kl_reference
        problem = _logits_problem(base)
        if problem is not None:
            if head == "linear":
                warnings.warn(f'{problem}; head is "logits" in place of {args.head!r}', stacklevel=3)
                head = "logits"
            keep = "recompute" if keep == "hidden" else keep
        buffer = None
        if args.beta > 0:
            buffer = KLBuffer(
                self._prompts(kl_prompts),
                self._make_sampler(base) if sampler is None else sampler,
                self._reference(),
                SpecialTokens.of(self.processing_class, base),
                samples=args.kl_samples,
                every=args.kl_every,
                max_new_tokens=args.kl_max_new_tokens,
                max_length=args.max_length,
                keep=keep,
                seed=args.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                batch_size=args.kl_generation_batch_size,
                device=self.accelerator.device,
            )
        return SPOStep(
            args.settings(head),
            buffer,
            reference=self._reference() if args.needs_reference else None,
            process_group=torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None,
            device=self.accelerator.device,
        )

    def _make_sampler(self, base: Any) -> Sampler:
        args, tokenizer, vocab_size = self.args, self.processing_class, checks.rows_of(base.get_output_embeddings())
        if vocab_size > len(tokenizer):
            warnings.warn(
                f"the model has {vocab_size} ids, the tokenizer {len(tokenizer)}: the others are never sampled",
                stacklevel=5,
            )
        if args.sampler == "vllm":
            options = args.vllm_options()
            options["max_model_length"] = options["max_model_length"] or args.max_length
            options["trust_remote_code"] = args.trust_remote_code
            return TRLVLLMSampler(
                self.model,
                self.accelerator,
                tokenizer,
                max_new_tokens=args.kl_max_new_tokens,
                vocab_size=vocab_size,
                options=options,
            )
        return HFSampler(
            self.model,
            tokenizer,
            batch_size=args.kl_generation_batch_size,
            generation_options={"synced_gpus": True} if self.is_fsdp_enabled or self.is_deepspeed_enabled else None,
            opened=lambda: unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ),
        )

    def _prompts(self, kl_prompts: Any) -> Sequence[Sequence[int]]:
        if kl_prompts is None and self.args.kl_prompts is not None:
            kl_prompts = load_dataset(self.args.kl_prompts, split="train")
        if kl_prompts is None:
            if isinstance(self.train_dataset, IterableDataset):
                raise ValueError("kl_prompts must be given where train_dataset is a stream, whose rows have no index")
            return self.train_dataset["prompt_ids"]
        if isinstance(kl_prompts, Dataset):
            if "prompt" not in kl_prompts.column_names:
                raise ValueError(f"kl_prompts must have a column prompt, got {', '.join(kl_prompts.column_names)}")
            kl_prompts = kl_prompts["prompt"]
        return [self._prompt_ids(prompt) for prompt in kl_prompts]

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.processing_class(prompt)["input_ids"]
        if prompt and isinstance(prompt[0], dict):
            return self.processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        return list(prompt)

    def _reference(self) -> Reference:
        if self.ref_model is not None:
            return Reference(self.ref_model, opened=self.accelerator.autocast)
        policy = self.accelerator.unwrap_model(self.model)
        adapter = "ref" if "ref" in policy.peft_config else None

        @contextmanager
        def opened() -> Iterator[None]:
            with use_adapter(policy, adapter), self.accelerator.autocast():
                yield

        head = policy.get_output_embeddings()
        if hasattr(head, "original_module"):  # PEFT's modules_to_save
            return Reference(
                self.model, opened, head.original_module if adapter is None else head.modules_to_save[adapter]
            )
        return Reference(self.model, opened, shares_head=True)

    # ---- the step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of a step. Draws samples where it is time, and sets the step's normalizer."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_losses, self._window_metrics = [], []
        if batches:
            self._renew_reference()
            self.spo.begin(self.model_wrapped, [self._pairs(batch) for batch in batches], self.state.global_step)
        return batches, count

    def _renew_reference(self) -> None:
        """The models may have been wrapped since."""
        if self.args.needs_reference:
            self.spo.reference = self._reference()
        if self.spo.buffer is not None:
            assert self.spo.reference is not None
            self.spo.buffer.reference = self.spo.reference
            if isinstance(self.spo.buffer.sampler, HFSampler):
                self.spo.buffer.sampler.model = self.model

    def _pairs(self, inputs: Any) -> Pairs:
        device = self.accelerator.device
        try:
            ids, mask, completion = (inputs[n] for n in ("input_ids", "attention_mask", "completion_mask"))
        except KeyError as error:
            raise ValueError(
                f"data_collator must give input_ids, attention_mask and completion_mask, got {', '.join(inputs)}"
            ) from error
        return Pairs(ids.to(device), mask.to(device).bool(), completion.to(device).bool())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, a mean; the trainer divides it by the number of micro-batches of the step."""
        pairs = self._pairs(inputs)
        if model.training:
            loss, metrics = self.spo(model, pairs)
            self._window_losses.append(loss.detach())
            self._window_metrics.append(metrics)
        else:
            loss = self._evaluation_loss(model, pairs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    def _evaluation_loss(self, model: Any, pairs: Pairs) -> Tensor:
        self._renew_reference()
        kl = self._evaluation_kl
        if kl is None and self.spo.buffer is not None:
            # Over all ranks: the trainer may count the losses of one rank only.
            kl = self.accelerator.reduce(self.spo.evaluation_kl(model, batch_size=2 * self.args.eval_batch_size))
        if self._is_evaluating:  # the weights stay the same, so the KL does
            self._evaluation_kl = kl
        loss, metrics = self.spo.evaluate(model, pairs, kl)
        before = self._sums["eval"]
        self._sums["eval"] = metrics if before is None else before + metrics
        return loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """See ``trl.DPOTrainer.evaluate``. The KL is computed once, on the samples of the last draw."""
        for name, dataset in _named_datasets(None, eval_dataset):
            checks.check_pairs(dataset, name)
        self._is_evaluating = True
        try:
            return super().evaluate(eval_dataset, *args, **options)
        finally:
            self._is_evaluating, self._evaluation_kl = False, None

    def finish_window(self) -> None:
        """Before the optimizer takes a step: stop at a loss that is not finite, and add up metrics over the ranks.

        Raises:
            NonFiniteLossError: a rank has a loss that is not finite.
        """
        if not self._window_losses:
            return
        losses = torch.stack(self._window_losses).double()
        metrics = self._window_metrics[0]
        for other in self._window_metrics[1:]:
            metrics = metrics + other
        mine = torch.cat([losses, metrics.values.flatten()])
        everyone = self.accelerator.gather(mine[None])  # one message a step
        for rank, row in enumerate(everyone[:, : len(losses)].tolist()):
            for micro, loss in enumerate(row):
                if not math.isfinite(loss):
                    place = f"rank {rank} in micro-step {micro} of step {self.state.global_step + 1}"
                    raise NonFiniteLossError(
                        f"the loss is {loss} on {place}; stopped before the optimizer step (try a smaller learning "
                        "rate, or look for NaN in the model)"
                    )
        total = MetricSums(metrics.names, everyone[:, len(losses) :].sum(0).view_as(metrics.values))
        before = self._sums["train"]
        self._sums["train"] = total if before is None else before + total
        self._window_losses, self._window_metrics = [], []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the metrics since the last time; in evaluation with its prefix, summed over the ranks."""
        mode = "train" if self.model.training else "eval"
        sums, self._sums[mode] = self._sums[mode], None
        if sums is not None:
            prefix = ""
            if mode == "eval":
                everyone = self.accelerator.gather(sums.values[None]).sum(0)
                sums = MetricSums(sums.names, everyone)
                prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
            logs.update({f"{prefix}{name}": value for name, value in sums.means().items()})
        super().log(logs, start_time)

    # ---- resume

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """See ``transformers.Trainer.train``. A checkpoint's samples and running average are taken over."""
        self.spo.reset()
        self._sums["train"] = None
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self._load_step(Path(folder))
        return super().train(resume_from_checkpoint, *args, **options)

    def step_file(self, folder: Path) -> Path:
        """Where a checkpoint has the state of this rank's step."""
        return folder / f"spo_{self.accelerator.process_index}.pt"

    def _load_step(self, folder: Path) -> None:
        file = self.step_file(folder)
        if self.args.sync_ref_model:
            warnings.warn(
                "TRL's checkpoints do not hold the synchronized reference: the run continues with the first one",
                stacklevel=3,
            )
        if file.exists():
            self.spo.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        elif self.args.beta > 0:
            warnings.warn(
                f"{file} does not exist: new samples are drawn, so the run continues, but not with the same numbers",
                stacklevel=3,
            )


class _SPOCallback(TrainerCallback):
    def __init__(self, trainer: SPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_window()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        buffer = self.trainer.spo.buffer
        # TRL's own callback, which stands before this one, has just changed the reference.
        if args.sync_ref_model and buffer is not None and state.global_step % args.ref_model_sync_steps == 0:
            buffer.reference_changed()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and not args.save_only_model:
            torch.save(self.trainer.spo.state_dict(), self.trainer.step_file(folder))


def _logits_problem(model: Any) -> str | None:
    """Why the model's logits are not what hidden states, head and options give; None if they are."""
    options = attached_options(model)
    if isinstance(options, ValueError):
        return str(options)
    if type(model).__module__.startswith("transformers."):  # whose models `head_options` knows
        return None
    ids = torch.arange(4, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reference = Reference(model)
    own, ours = reference.logits(inputs).float(), reference.logits_of(reference.hidden(inputs)).float()
    if (own - ours).norm() <= 1e-2 * own.norm():  # bfloat16 rounds by less
        return None
    return f"{type(model).__name__} computes other logits than its head says"


def _named_datasets(train: Any, evaluation: Any) -> list[tuple[str, Any]]:
    named = [("train_dataset", train)]
    if isinstance(evaluation, dict):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in evaluation.items()]
    else:
        named.append(("eval_dataset", evaluation))
    return [(name, dataset) for name, dataset in named if isinstance(dataset, (Dataset, IterableDataset))]


def _is_sharded(args: Any) -> bool:
    """Whether FSDP or DeepSpeed takes the parameters apart."""
    environment = (os.environ.get(f"ACCELERATE_USE_{engine}", "") for engine in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(value.lower() in ("1", "true") for value in environment)
