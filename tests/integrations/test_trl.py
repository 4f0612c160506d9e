"""`SPOTrainer` with tiny models: gradients, resume, data order, metrics, bad input."""

from __future__ import annotations

import copy
import inspect
import math
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL, see the extra [trl]")
pytest.importorskip("peft", reason="needs PEFT, see the extra [trl]")

import datasets
import plain_loop
import trl
from accelerate import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import ARCHITECTURES, make_model, make_rows, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer import dpo_trainer

from spo_kernels.integrations.core import Pairs, SPOSettings
from spo_kernels.integrations.trl import SPOConfig, SPOTrainer, TRLVLLMSampler
from spo_kernels.integrations.trl import checks as trl_checks
from spo_kernels.integrations.trl.trainer import NonFiniteLossError

datasets.disable_progress_bars()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

TOKENIZER = make_tokenizer()
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


class FixedSampler:
    """The same responses for every model."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        self.calls.append(seed)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, max_new_tokens + 1, (len(prompts),), generator=generator).tolist()
        return [torch.randint(2, 60, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with model and tokenizer of each architecture."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ARCHITECTURES}


Make = Callable[..., SPOTrainer]


@pytest.fixture
def make(folders: dict[str, Path], tmp_path: Path) -> Make:
    """A trainer of a tiny model; keywords that are none of its own are settings of SPOConfig."""

    def build(
        architecture: str = "llama",
        *,
        model: Any = None,
        ref_model: Any = None,
        rows: Sequence[dict[str, Any]] | None = None,
        eval_rows: Sequence[dict[str, Any]] | None = None,
        peft_config: Any = None,
        draws_with: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **settings: Any,
    ) -> SPOTrainer:
        given: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "kl_samples": 8,
            "kl_max_new_tokens": 6,
            "kl_every": 2,
            "max_length": 40,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return SPOTrainer(
            AutoModelForCausalLM.from_pretrained(folders[architecture]) if model is None else model,
            ref_model,
            SPOConfig(**(given | settings)),
            train_dataset=Dataset.from_list(list(make_rows(16) if rows is None else rows)),
            eval_dataset=Dataset.from_list(list(eval_rows)) if eval_rows else None,
            processing_class=TOKENIZER,
            peft_config=peft_config,
            sampler=draws_with,
            callbacks=callbacks,
        )

    return build


def perturb(trainer: SPOTrainer) -> None:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(1)
    assert trainer.model is not None
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def step_gradient(trainer: SPOTrainer) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the first optimizer step, by the trainer's own hooks."""
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    loader = iter(trainer.get_train_dataloader())
    steps = trainer.args.gradient_accumulation_steps
    batches, _ = trainer.get_batch_samples(loader, steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(float(trainer.training_step(trainer.model_wrapped, dict(batch))) for batch in batches)
    gradient = {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradient


def distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert ours.keys() == truth.keys()
    error = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return math.sqrt(error / sum(float(value.square().sum()) for value in truth.values()))


def weights(trainer: SPOTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


class TestGradients:
    """Against plain torch in float64: not more than twice the error of plain torch."""

    def errors(self, make: Make, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, float]:
        def gradient(head: str, dtype: torch.dtype, **others: Any) -> tuple[float, dict[str, Tensor]]:
            trainer = make(head=head, draws_with=FixedSampler(), **(settings | others))
            perturb(trainer)
            for model in (trainer.model, trainer.ref_model):
                if model is not None:
                    model.to(dtype)
            return step_gradient(trainer)

        exact = gradient("eager", torch.float64, bf16=False, gradient_checkpointing=False)
        errors = {}
        for head in ("eager", "linear", "logits"):
            loss, ours = gradient(head, dtype)
            errors[head] = distance(ours, exact[1])
            half = dtype == torch.bfloat16 or settings.get("bf16", False)
            assert loss == pytest.approx(exact[0], rel=3e-2 if half else 1e-5)
        return errors

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_architectures(self, make: Make, architecture: str) -> None:
        errors = self.errors(make, architecture=architecture, weighting="soft", nll_weight=0.2)
        assert max(errors["linear"], errors["logits"]) <= 2 * errors["eager"], errors

    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_checkpointing": True},
            {"peft_config": LORA},
            {"peft_config": LORA, "gradient_checkpointing": True},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "weighting": "soft"},
            {"average_log_probs": True, "center": False},
            {"bf16": True},
            {"bf16": True, "peft_config": LORA},
            {"kl_reference": "recompute", "peft_config": LORA},
        ],
        ids=lambda settings: "-".join(settings),
    )
    def test_settings(self, make: Make, settings: dict[str, Any]) -> None:
        errors = self.errors(make, **settings)
        assert max(errors["linear"], errors["logits"]) <= 2 * errors["eager"], errors

    @pytest.mark.parametrize("architecture", ["llama", "gemma2"])
    def test_half_precision_weights(self, make: Make, architecture: str) -> None:
        errors = self.errors(make, torch.bfloat16, architecture=architecture)
        assert max(errors["linear"], errors["logits"]) <= 2 * errors["eager"], errors

    @pytest.mark.parametrize("normalizer", ["auto", "step"])
    def test_accumulation_is_one_big_batch(self, make: Make, normalizer: str) -> None:
        results = []
        for accumulation in (1, 2, 4):
            trainer = make(
                draws_with=FixedSampler(),
                weighting="soft",
                importance_normalizer=normalizer,
                nll_weight=0.3,
                gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=8 // accumulation,
            )
            perturb(trainer)
            results.append(step_gradient(trainer))
        for loss, gradient in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-5)
            assert distance(gradient, results[0][1]) < 5e-6

    def test_a_partial_last_window_is_one_smaller_batch(self, make: Make) -> None:
        """3 micro-batches of 4, the last one with half the pairs, share 8 samples and 5 pairs."""
        results = []
        for accumulation, size in ((1, 5), (4, 2)):
            trainer = make(
                rows=make_rows(5),
                draws_with=FixedSampler(),
                weighting="soft",
                gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=size,
            )
            perturb(trainer)
            results.append(step_gradient(trainer))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
        assert distance(results[1][1], results[0][1]) < 5e-6

    def test_ema_moves_once_a_micro_step(self, make: Make) -> None:
        trainer = make(weighting="soft", importance_normalizer="ema", gradient_accumulation_steps=2, max_steps=3)
        trainer.train()
        assert trainer.spo.importance is not None
        assert trainer.spo.importance.num_updates == 6


class TestResume:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"weighting": "soft", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"weighting": "soft", "importance_normalizer": "ema"},
            {"peft_config": LORA},
        ],
        ids=["uniform", "step", "ema", "lora"],
    )
    def test_has_the_same_bits(self, make: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "kl_every": 4, **settings}
        whole, resumed = make(**copy.deepcopy(options)), make(**copy.deepcopy(options))
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
        assert torch.equal(weights(whole), weights(resumed))
        losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
        assert losses[0] == losses[1]
        kls = [[log["spo/kl"] for log in t.state.log_history if "spo/kl" in log] for t in (whole, resumed)]
        assert kls[0] == kls[1]

    def test_without_its_file_warns(self, make: Make, tmp_path: Path) -> None:
        make(save_strategy="steps", save_steps=3).train()
        (tmp_path / "out" / "checkpoint-3" / "spo_0.pt").unlink()
        with pytest.warns(UserWarning, match=r"spo_0.pt does not exist: new samples are drawn"):
            make().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))

    def test_true_takes_the_last_checkpoint(self, make: Make) -> None:
        make(save_strategy="steps", save_steps=1, max_steps=3).train()
        trainer = make(max_steps=4)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        assert trainer.spo.buffer is not None
        assert trainer.spo.buffer.draw is not None
        assert trainer.spo.buffer.draw.step == 2

    def test_a_second_run_starts_afresh(self, make: Make) -> None:
        trainer = make(weighting="soft", importance_normalizer="ema", max_steps=2)
        trainer.train()
        trainer.train()
        assert trainer.spo.importance is not None
        assert trainer.spo.importance.num_updates == 2


class TestSampling:
    def batches(self, make: Make, **settings: Any) -> list[Tensor]:
        seen: list[Tensor] = []

        trainer = make(max_steps=6, **settings)
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            seen.append(inputs["input_ids"])
            return original(model, inputs, *args, **keywords)

        trainer.compute_loss = compute_loss  # type: ignore[method-assign]
        trainer.train()
        return seen

    def test_leaves_the_data_order_alone(self, make: Make) -> None:
        without = self.batches(make, beta=0.0)
        for every in (1, 3):
            drawing = self.batches(make, kl_every=every)
            assert len(drawing) == len(without) == 6
            assert all(torch.equal(*pair) for pair in zip(without, drawing, strict=True))

    def test_draws_every_k_steps(self, make: Make) -> None:
        sampler = FixedSampler()
        make(draws_with=sampler, max_steps=7, kl_every=3, gradient_accumulation_steps=2).train()
        assert len(sampler.calls) == len(set(sampler.calls)) == 3

    def test_prompts_of_their_own(self, make: Make, folders: dict[str, Path]) -> None:
        seen: list[list[int]] = []

        class Watching(FixedSampler):
            def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
                seen.extend(prompts)
                return super().sample(prompts, max_new_tokens, seed)

        for prompts in (Dataset.from_dict({"prompt": ["w1 w2", "w3"]}), ["w1 w2", [7]]):
            seen.clear()
            SPOTrainer(
                make().model,
                AutoModelForCausalLM.from_pretrained(folders["llama"]),
                make(max_steps=1).args,
                train_dataset=Dataset.from_list(make_rows(8)),
                processing_class=TOKENIZER,
                kl_prompts=prompts,
                sampler=Watching(),
            ).train()
            assert sorted(seen) == [[5, 6]] * 4 + [[7]] * 4

    def test_conversations(self, make: Make) -> None:
        """Messages, with the prompt of its own or within both responses."""
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        )

        def said(role: str, text: str) -> dict[str, str]:
            return {"role": role, "content": text}

        explicit = [
            {
                "prompt": [said("user", row["prompt"])],
                "chosen": [said("assistant", row["chosen"])],
                "rejected": [said("assistant", row["rejected"])],
            }
            for row in make_rows(8)
        ]
        implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in explicit]
        results = []
        for rows in (explicit, implicit):
            options: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
            trainer = SPOTrainer(make().model, args=make(max_steps=2).args, **options)
            trainer.train()
            results.append(weights(trainer))
            prompts = [row["prompt"] for row in explicit]
            own = SPOTrainer(make().model, args=make(max_steps=2).args, **options, kl_prompts=prompts)
            assert own.spo.buffer is not None
            assert list(own.spo.buffer.prompts) == list(trainer.train_dataset["prompt_ids"])
        assert torch.equal(*results)

    def test_a_stream_needs_prompts(self, folders: dict[str, Path], make: Make) -> None:
        stream = Dataset.from_list(make_rows(16)).to_iterable_dataset()
        options: dict[str, Any] = {
            "model": str(folders["llama"]),
            "args": make(max_steps=2).args,
            "train_dataset": stream,
            "processing_class": TOKENIZER,
        }
        with pytest.raises(ValueError, match="kl_prompts must be given where train_dataset is a stream"):
            SPOTrainer(**options)
        trainer = SPOTrainer(**options, kl_prompts=["w1", "w2"])
        trainer.train()
        assert trainer.state.global_step == 2

    def test_sync_ref_model_scores_the_samples_again(self, make: Make) -> None:
        """With alpha 1 the reference is the policy after each step, so the KL of the next one is 0."""
        options: dict[str, Any] = {"kl_every": 100, "max_steps": 4, "learning_rate": 1e-2}
        synced = make(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, **options)
        synced.train()
        kls = [log["spo/kl"] for log in synced.state.log_history if "spo/kl" in log]
        assert max(map(abs, kls)) < 1e-5
        plain = make(**options)
        plain.train()
        assert [log["spo/kl"] for log in plain.state.log_history if "spo/kl" in log][-1] > 1e-3


class TestTraining:
    def test_equals_the_plain_loop(self, make: Make, folders: dict[str, Path]) -> None:
        """30 steps, soft weights over the step, accumulation, draws every 4 steps."""
        windows: list[list[Pairs]] = []
        trainer = make(
            rows=make_rows(64),
            max_steps=30,
            weighting="soft",
            gradient_accumulation_steps=2,
            kl_every=4,
            per_device_train_batch_size=2,
        )
        begin = trainer.spo.begin

        def recording(model: Any, window: Sequence[Pairs], step: int) -> None:
            windows.append(list(window))
            begin(model, window, step)

        trainer.spo.begin = recording  # type: ignore[method-assign]
        trainer.train()
        policy = AutoModelForCausalLM.from_pretrained(folders["llama"])
        losses = plain_loop.train(
            policy,
            TOKENIZER,
            trainer.train_dataset["prompt_ids"],
            windows,
            SPOSettings(weighting="soft"),
            learning_rate=1e-3,
            kl_samples=8,
            kl_every=4,
            kl_max_new_tokens=6,
            max_length=40,
            seed=trainer.args.seed,
        )
        ours = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert ours == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(
            weights(trainer), torch.cat([p.detach().flatten() for p in policy.parameters()]), rtol=1e-5, atol=1e-6
        )
        assert sum(losses[-10:]) < sum(losses[:10])

    def test_one_forward_a_micro_step(self, make: Make) -> None:
        trainer = make(draws_with=FixedSampler(), kl_every=100, gradient_accumulation_steps=2, max_steps=3)
        calls = {"policy": 0, "reference": 0}
        assert trainer.ref_model is not None
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            model.model.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        trainer.train()
        assert calls == {"policy": 6, "reference": 1}

    def test_beta_0_builds_no_reference(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **options: Any) -> None:
            raise AssertionError("a reference was built")

        monkeypatch.setattr(dpo_trainer, "create_model_from_path", refuse)
        trainer = make(beta=0.0)
        assert trainer.ref_model is None
        trainer.train()
        assert "spo/kl" not in trainer.state.log_history[0]
        monkeypatch.undo()
        assert make(beta=0.0, log_reference_rewards=True).ref_model is not None

    @pytest.mark.parametrize("adapter", ["new", "trained"])
    def test_lora_has_its_reference_without_a_second_model(self, make: Make, adapter: str) -> None:
        """A new adapter's reference is the model without it; of a trained one, the adapter as it was."""
        if adapter == "new":
            trainer = make(peft_config=LORA, kl_every=100)
        else:
            trainer = make(model=get_peft_model(make().model, LORA), kl_every=100)
        assert trainer.ref_model is None
        trainer.train()
        kls = [log["spo/kl"] for log in trainer.state.log_history if "spo/kl" in log]
        if adapter == "trained":
            assert abs(kls[0]) < 1e-5
        assert kls[-1] > kls[0]

    def test_lora_that_trains_the_head(self, make: Make) -> None:
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        trainer = make(peft_config=config, kl_every=100, learning_rate=1e-2)
        trainer.train()
        kls = [log["spo/kl"] for log in trainer.state.log_history if "spo/kl" in log]
        assert abs(kls[0]) < 1e-5
        assert kls[-1] > 1e-2

    def test_generation_is_untouched(self, make: Make, folders: dict[str, Path]) -> None:
        trainer = make()
        plain = AutoModelForCausalLM.from_pretrained(folders["llama"])
        ids = torch.tensor([[5, 6, 7]])
        for model in (plain, trainer.model):
            model.eval()
        assert torch.equal(
            *(m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (plain, trainer.model))
        )

    def test_stops_before_a_step_with_a_loss_of_nan(self, make: Make) -> None:
        class Poison(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if state.global_step == 2:
                    with torch.no_grad():
                        model.lm_head.weight[5] = math.nan

        trainer = make(beta=0.0, callbacks=[Poison()], gradient_accumulation_steps=2)
        with pytest.raises(NonFiniteLossError, match=r"the loss is nan on rank 0 in micro-step 0 of step 3; stopped"):
            trainer.train()
        assert trainer.model.lm_head.weight[6:].isfinite().all()
        assert issubclass(NonFiniteLossError, ValueError)


class TestMetrics:
    NAMES = frozenset(
        {
            "logps/chosen",
            "logps/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "spo/loss",
            "spo/preference_error",
            "spo/kl",
            "spo/kl_per_token",
            "spo/sample_length",
            "spo/sample_eos_rate",
            "spo/draw_seconds",
            "spo/sample_age",
        }
    )
    SOFT = frozenset({"spo/mu", "spo/mu_std", "spo/normalizer"})
    TRAINER = frozenset({"loss", "grad_norm", "learning_rate", "epoch", "step"})

    def test_names_and_values(self, make: Make) -> None:
        trainer = make(
            weighting="soft",
            log_reference_rewards=True,
            eval_rows=make_rows(6, seed=3),
            eval_strategy="steps",
            eval_steps=2,
            kl_every=3,
            max_steps=5,
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        rewards = {"rewards/chosen", "rewards/rejected"}
        assert logs[0].keys() == self.NAMES | self.SOFT | rewards | self.TRAINER
        assert [log["spo/sample_age"] for log in logs] == [0, 1, 2, 0, 1]
        for log in logs:
            assert log["loss"] == pytest.approx(log["spo/loss"] + 0.03 * log["spo/kl"], rel=1e-5)
            assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], abs=1e-6)
        assert abs(logs[0]["rewards/chosen"]) < 1e-5  # relative to the reference, which the policy still is
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert {name.removeprefix("eval_") for name in evaluations[0]} >= self.NAMES | self.SOFT
        for log in evaluations:
            assert log["eval_loss"] == pytest.approx(log["eval_spo/loss"] + 0.03 * log["eval_spo/kl"], rel=1e-5)

    def test_means_over_several_steps(self, make: Make) -> None:
        each, all_at_once = make(logging_steps=1), make(logging_steps=4)
        for trainer in (each, all_at_once):
            trainer.train()
        logs = [log for log in each.state.log_history if "loss" in log]
        (together,) = [log for log in all_at_once.state.log_history if "loss" in log]
        for name in ("spo/kl", "logps/chosen", "rewards/accuracies"):
            assert together[name] == pytest.approx(sum(log[name] for log in logs) / 4, rel=1e-6)

    def test_one_message_a_step(self, make: Make) -> None:
        trainer = make(gradient_accumulation_steps=4, logging_steps=2, max_steps=4)
        calls = []
        gather = trainer.accelerator.gather
        trainer.accelerator.gather = lambda tensor: (calls.append(1), gather(tensor))[1]
        trainer.train()
        assert len(calls) == 4

    def test_evaluation_alone_and_of_several_sets(self, make: Make) -> None:
        trainer = make(eval_rows=make_rows(6, seed=3))
        metrics = trainer.evaluate()
        assert abs(metrics["eval_spo/kl"]) < 1e-5
        sets = {name: Dataset.from_list(make_rows(4, seed=seed)) for name, seed in (("a", 1), ("b", 2))}
        metrics = trainer.evaluate(sets)
        for name in sets:
            assert {f"eval_{name}_loss", f"eval_{name}_spo/kl"} <= metrics.keys()

    def test_evaluation_leaves_training_alone(self, make: Make) -> None:
        options: dict[str, Any] = {"weighting": "soft", "importance_normalizer": "ema", "kl_every": 3, "max_steps": 4}
        plain = make(**options)
        evaluated = make(
            **options, eval_rows=make_rows(6, seed=3), eval_on_start=True, eval_strategy="steps", eval_steps=1
        )
        for trainer in (plain, evaluated):
            trainer.train()
        assert torch.equal(weights(plain), weights(evaluated))

    def test_evaluation_computes_the_kl_once(self, make: Make) -> None:
        sampler = FixedSampler()
        trainer = make(eval_rows=make_rows(12, seed=3), per_device_eval_batch_size=2, draws_with=sampler)
        calls = []
        trainer.model.model.register_forward_hook(lambda *_: calls.append(1))
        trainer.evaluate()
        assert len(sampler.calls) == 1
        assert len(calls) == 6 + 2  # 6 batches of pairs; 8 samples, 4 at a time

    def test_return_outputs_has_the_logits(self, make: Make) -> None:
        trainer = make(eval_rows=make_rows(4, seed=3))
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert loss.isfinite()
        assert outputs.logits.shape == (*batch["input_ids"].shape, 64)


class RecordedVLLM:
    """The signature of TRL 1.16's VLLMGeneration: what the sampler may call."""

    made: list[RecordedVLLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        mode: str = "colocate",
        structured_outputs_regex: str | None = None,
        server_base_url: str | None = None,
        server_host: str = "0.0.0.0",
        server_port: int = 8000,
        server_timeout: float = 240.0,
        group_port: int = 51216,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_completion_length: int = 16,
        logprobs: int | None = 0,
        generation_kwargs: dict | None = None,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        self.calls: list[str] = []
        RecordedVLLM.made.append(self)

    def sync_weights(self) -> None:
        self.calls.append("sync_weights")

    def generate(
        self, prompts: list[list[int]], images: list | None, num_generations: int, profiler: Any = None
    ) -> tuple:
        assert images is None
        assert num_generations == 1
        self.calls.append("generate")
        torch.rand(3)
        return prompts, [[5, 6, 2, 9][: 1 + i % 4] for i in range(len(prompts))], None, None


class TestVLLM:
    def test_the_recorded_signature_is_trls(self) -> None:
        """Read from the source: importing it needs vLLM."""
        source = (Path(trl.__file__).parent / "generation" / "vllm_generation.py").read_text()
        for name in ("__init__", "generate", "sync_weights"):
            names = list(inspect.signature(getattr(RecordedVLLM, name)).parameters)
            text = re.search(rf"    def {name}\((.*?)\)(?: -> \w+)?:\n", source, re.DOTALL)
            assert text is not None
            found = re.findall(r"(?:^|[(,\n])\s*(\w+)\s*(?=[:=,]|$)", re.sub(r"#.*", "", text[1]))
            assert found == names

    def test_weights_go_over_once_a_draw(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        RecordedVLLM.made.clear()
        monkeypatch.setattr("trl.generation.VLLMGeneration", RecordedVLLM, raising=False)
        trainer = make(sampler="vllm", vllm_mode="server", vllm_server_port=1234, max_steps=5, kl_every=2)
        trainer.train()
        (engine,) = RecordedVLLM.made
        assert engine.calls == ["sync_weights", "generate"] * 3
        assert (engine.temperature, engine.top_p, engine.top_k, engine.min_p) == (1.0, 1.0, 0, 0.0)
        assert (engine.mode, engine.server_port, engine.max_model_length) == ("server", 1234, 40)
        assert engine.max_completion_length == 6
        draw = trainer.spo.buffer.draw
        assert draw.samples.responses()[:4] == [[5], [5, 6], [5, 6, 2], [5, 6, 2]]  # nothing after an eos

    def test_the_data_order_stays(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trl.generation.VLLMGeneration", RecordedVLLM, raising=False)
        without = TestSampling().batches(make, beta=0.0)
        with_vllm = TestSampling().batches(make, kl_every=1, sampler="vllm")
        assert all(torch.equal(*pair) for pair in zip(without, with_vllm, strict=True))

    def test_ids_beyond_the_tokenizer_are_biased_away(self) -> None:
        sampler = TRLVLLMSampler(
            make_model(),
            None,
            TOKENIZER,
            max_new_tokens=4,
            vocab_size=len(TOKENIZER) + 2,
            options={},
            generation=RecordedVLLM,
        )
        engine = sampler._generation
        assert engine.generation_kwargs == {"logit_bias": {len(TOKENIZER): -100.0, len(TOKENIZER) + 1: -100.0}}
        engine.temperature = 0.7
        with pytest.raises(ValueError, match="samples must come from the policy itself"):
            sampler.sample([[5]], 4, 0)

    def test_without_vllm(self, make: Make) -> None:
        with pytest.raises(ImportError, match=r'sampler="vllm" needs vLLM, which is not installed: pip install'):
            make(sampler="vllm")


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"loss_type": "ipo"}, r"loss_type must be left at \['sigmoid'\], got \['ipo'\]: SPO is the loss"),
            ({"loss_weights": [1.0]}, "loss_weights must be left at None"),
            ({"f_divergence_type": "js_divergence"}, "f_divergence_type must be left at 'reverse_kl'"),
            ({"ld_alpha": 0.5}, "ld_alpha must be left at None"),
            ({"use_weighting": True}, "use_weighting must be left at False, got True: SPO weighs pairs by weighting"),
            ({"label_smoothing": 0.1}, "label_smoothing must be left at 0.0, got 0.1"),
            ({"use_liger_kernel": True}, "use_liger_kernel must be left at False"),
            ({"padding_free": True}, "padding_free must be left at False, got True: TRL does not offer it"),
            ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be False with beta > 0"),
            ({"alpha": -0.1}, "alpha must be a finite number >= 0, got -0.1"),
            ({"beta": math.nan}, "beta must be a finite number >= 0, got nan"),
            ({"gamma": -1.0}, "gamma must be a finite number >= 0"),
            ({"nll_weight": -1.0}, "nll_weight must be a finite number >= 0"),
            ({"weighting": "hard"}, "weighting must be one of uniform, soft, got 'hard'"),
            ({"importance_normalizer": "all"}, "importance_normalizer must be one of auto, batch, step, ema"),
            ({"kl_every": 0}, "kl_every must be an integer >= 1, got 0"),
            ({"kl_samples": 0}, "kl_samples must be an integer >= 1, got 0"),
            ({"kl_generation_batch_size": 0}, "kl_generation_batch_size must be an integer >= 1"),
            ({"kl_max_new_tokens": 1024}, "kl_max_new_tokens must be < max_length = 1024, to leave room for a prompt"),
            ({"kl_reference": "all"}, "kl_reference must be one of hidden, logits, recompute"),
            ({"kl_reference": "logits"}, 'kl_reference must be "hidden" or "recompute" with head \'auto\''),
            ({"sampler": "sglang"}, "sampler must be one of hf, vllm"),
            ({"head": "fused"}, "head must be one of auto, linear, logits, eager"),
            ({"vllm_mode": "remote"}, "vllm_mode must be one of colocate, server"),
            ({"beta": 0.0, "sync_ref_model": True}, "sync_ref_model must be False where no reference is used"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_settings(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SPOConfig("out", use_cpu=True, **change)

    def test_a_beta_like_dpos_is_questioned_once(self) -> None:
        with pytest.warns(UserWarning, match="beta = 0.1 is not DPO's beta") as caught:
            SPOConfig("out", use_cpu=True, beta=0.1)
        assert len([w for w in caught if "DPO's beta" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*DPO's beta")
            assert SPOConfig("out", use_cpu=True).beta == 0.03

    def test_precomputing_without_a_reference_has_no_effect(self) -> None:
        with pytest.warns(UserWarning, match="precompute_ref_log_probs has no effect at beta = 0"):
            assert not SPOConfig("out", use_cpu=True, beta=0.0, precompute_ref_log_probs=True).precompute_ref_log_probs

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"chosen": ""}, "train_dataset must have a response in each row, got an empty chosen in row 2"),
            ({"rejected": "  "}, "got an empty rejected in row 2"),
            ({"rejected": None}, "got an empty rejected in row 2"),
            ({"chosen": "w1", "rejected": "w1"}, "got the same chosen and rejected in row 2; drop such rows"),
        ],
    )
    def test_rows(self, make: Make, row: dict[str, Any], message: str) -> None:
        rows = make_rows(4)
        rows[2] |= row
        with pytest.raises(ValueError, match=message):
            make(rows=rows)
        with pytest.raises(ValueError, match=message.replace("train_dataset", "eval_dataset")):
            make(eval_rows=rows)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a", "chosen": "b"}], "must have the columns chosen and rejected, got prompt, chosen"),
            ([{"prompt": "a", "completion": "b", "label": True}], "unpaired data with labels, as for KTO"),
            ([{"prompt": "a", "chosen": "b", "rejected": "c", "image": "d"}], "takes no vision datasets"),
            (
                [
                    {
                        "chosen": [{"role": "assistant", "content": ""}],
                        "rejected": [{"role": "assistant", "content": "b"}],
                    }
                ],
                "got an empty chosen in row 0",
            ),
        ],
    )
    def test_columns(self, make: Make, rows: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(rows=rows)

    def test_adapters(self, make: Make) -> None:
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            make(peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="peft_config must not be prompt learning, .* got PrefixTuningConfig"):
            make(peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))

    def test_models(self, make: Make) -> None:
        import transformers

        sizes = {"vocab_size": 64, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        with pytest.raises(ValueError, match="model must be a decoder, got T5ForConditionalGeneration"):
            make(model=transformers.T5ForConditionalGeneration(config))
        with pytest.raises(ValueError, match="model must have output embeddings, as a causal LM has, got LlamaModel"):
            make(model=make_model().model)

    def test_processors(self, make: Make) -> None:
        class Processor(trl_checks.ProcessorMixin):
            def __init__(self) -> None: ...

        trainer = make()
        with pytest.raises(ValueError, match="processing_class must be a tokenizer, got Processor"):
            SPOTrainer(
                trainer.model,
                args=trainer.args,
                train_dataset=Dataset.from_list(make_rows(2)),
                processing_class=Processor(),
            )

    def test_vocabularies(self, make: Make, folders: dict[str, Path]) -> None:
        policy = AutoModelForCausalLM.from_pretrained(folders["llama"])
        policy.resize_token_embeddings(72)
        with pytest.raises(ValueError, match="got 72 and 64 rows of the head; resize the reference too"):
            make(model=policy)
        reference = AutoModelForCausalLM.from_pretrained(folders["llama"])
        reference.resize_token_embeddings(72)
        with pytest.warns(UserWarning, match="the model has 72 ids, the tokenizer 64: the others are never sampled"):
            trainer = make(model=policy, ref_model=reference)
        with torch.no_grad():
            trainer.model.lm_head.weight[64:] *= 20
        trainer.train()
        assert trainer.spo.buffer is not None
        assert trainer.spo.buffer.draw is not None
        assert trainer.spo.buffer.draw.samples.ids.max() < 64

    @pytest.mark.parametrize("head", ["auto", "linear", "logits"])
    def test_an_unknown_transform_of_logits_is_never_linear(
        self, make: Make, folders: dict[str, Path], head: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        policy = AutoModelForCausalLM.from_pretrained(folders["llama"])
        policy.config.logit_cap = 3.0
        trainer = make(model=policy, head=head)
        told = [str(w.message) for w in recwarn if "logit_cap" in str(w.message)]
        assert trainer.spo.settings.head == "logits"
        assert len(told) == (head != "logits")
        assert all('head is "logits" in place of' in text for text in told)
        trainer.train()
        assert trainer.state.log_history[0]["spo/kl"] == pytest.approx(0, abs=1e-5)

    def test_code_of_a_models_own_that_changes_logits(self, make: Make) -> None:
        import transformers

        class Sharper(transformers.LlamaForCausalLM):
            def forward(self, *args: Any, **inputs: Any) -> Any:
                output = super().forward(*args, **inputs)
                output.logits = 2 * output.logits
                return output

        model = Sharper(make_model().config)
        reference = copy.deepcopy(model)
        with pytest.warns(UserWarning, match='Sharper computes other logits than its head says; head is "logits" in'):
            trainer = make(model=model, ref_model=reference)
        assert trainer.spo.settings.head == "logits"
        trainer.train()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*computes other logits")
            Same = type("Same", (transformers.LlamaForCausalLM,), {})
            model = Same(make_model().config)
            assert make(model=model, ref_model=copy.deepcopy(model)).spo.settings.head == "linear"

    @pytest.mark.parametrize("name", ["cp_size", "sp_size"])
    def test_sequences_split_over_ranks(self, name: str) -> None:
        trl_checks.check_parallelism(None)
        trl_checks.check_parallelism(ParallelismConfig(dp_shard_size=2))
        with pytest.raises(ValueError, match=f"must not split sequences over ranks, got {name} = 2"):
            trl_checks.check_parallelism(ParallelismConfig(**{name: 2}))

    def test_samples_per_micro_step(self, make: Make) -> None:
        message = (
            r"kl_samples must be a multiple of ranks x gradient_accumulation_steps = 1 x 4 = 4, got 6; the next is 8"
        )
        with pytest.raises(ValueError, match=message):
            make(kl_samples=6, gradient_accumulation_steps=4)

    def test_arguments(self, make: Make) -> None:
        trainer = make()
        given: dict[str, Any] = {"model": trainer.model, "train_dataset": Dataset.from_list(make_rows(2))}
        with pytest.raises(TypeError, match="args must be an SPOConfig, got DPOConfig"):
            SPOTrainer(**given, args=trl.DPOConfig("out", use_cpu=True, bf16=False), processing_class=TOKENIZER)
        with pytest.raises(ValueError, match="kl_prompts must have a column prompt, got text"):
            SPOTrainer(
                **given, args=trainer.args, processing_class=TOKENIZER, kl_prompts=Dataset.from_dict({"text": ["w1"]})
            )

    def test_router_losses(self, make: Make) -> None:
        import transformers

        config = transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            router_aux_loss_coef=0.02,
        )
        model = transformers.MixtralForCausalLM(config)
        with pytest.raises(ValueError, match="router_aux_loss_coef must be 0 or None, .*, got 0.1"):
            make(model=model, beta=0.0, router_aux_loss_coef=0.1)
        with pytest.warns(UserWarning, match="the auxiliary loss of the model's router is not part of the loss"):
            make(model=transformers.MixtralForCausalLM(config), beta=0.0).train()

    def test_empty_prompts(self, make: Make) -> None:
        rows = [{**row, "prompt": ""} for row in make_rows(8)]
        trainer = make(rows=rows)
        trainer.train()  # the bos stands in
        tokenizer = make_tokenizer()
        tokenizer.bos_token = None
        without = SPOTrainer(
            make().model,
            args=trainer.args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        with pytest.raises(ValueError, match="prompts must not be empty, as the tokenizer has no bos: got none in row"):
            without.train()

    def test_a_collator_of_ones_own(self, make: Make) -> None:
        trainer = make()
        with pytest.raises(ValueError, match="data_collator must give input_ids, .* completion_mask, got input_ids"):
            trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(2, 2)})

    def test_untested_versions_warn(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trl, "__version__", "2.0.0")
        with pytest.warns(UserWarning, match=r"TRL 2.0.0 is outside the tested range >=1.16,<1.17"):
            make()

    @pytest.mark.parametrize("package", ["trl", "peft"])
    def test_without_trl(self, tmp_path: Path, package: str) -> None:
        code = f"import sys; sys.modules['{package}'] = None; import spo_kernels.integrations.trl"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode
        assert "ImportError: spo_kernels.integrations.trl needs TRL and PEFT" in done.stderr
        assert 'pip install "spo_kernels[trl]"' in done.stderr

    def test_the_library_imports_none_of_it(self, tmp_path: Path) -> None:
        code = "import sys, spo_kernels; assert not [m for m in sys.modules if 'integrations' in m or m == 'trl']"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.fixture
def renamed_script(tmp_path: Path) -> Path:
    """TRL's own dpo.py with two imports and two names changed."""
    source = (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text()
    ours, mixture = "from spo_kernels.integrations.trl import", "from trl import DatasetMixtureConfig,"
    changes = [
        ("from trl import DPOTrainer, ", f"{ours} SPOTrainer\n    from trl import "),
        (f"{mixture} DPOConfig,", f"{ours} SPOConfig\n    {mixture}"),
        ("trainer = DPOTrainer(", "trainer = SPOTrainer("),
        ("(ScriptArguments, DPOConfig,", "(ScriptArguments, SPOConfig,"),
    ]
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    script = tmp_path / "spo.py"
    script.write_text(source)
    return script


@pytest.mark.parametrize("peft", [False, True])
def test_trls_own_script(
    renamed_script: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: bool
) -> None:
    """All options of SPO on its command line."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 16), ("test", 4)):
        Dataset.from_list(make_rows(count)).to_json(data / f"{split}.jsonl")
    out = tmp_path / "script"
    options = {
        "model_name_or_path": folders["llama"],
        "dataset_name": data,
        "output_dir": out,
        "alpha": 0.2,
        "beta": 0.05,
        "weighting": "soft",
        "gamma": 0.2,
        "importance_normalizer": "step",
        "average_log_probs": True,
        "center": False,
        "nll_weight": 0.1,
        "kl_every": 2,
        "kl_samples": 4,
        "kl_max_new_tokens": 6,
        "kl_prompts": data,
        "kl_generation_batch_size": 2,
        "kl_reference": "recompute",
        "sampler": "hf",
        "head": "logits",
        "log_reference_rewards": True,
        "vllm_mode": "server",
        "vllm_server_port": 1,
        "max_steps": 3,
        "max_length": 40,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        **({"use_peft": True, "lora_r": 4} if peft else {}),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(renamed_script), *arguments])
    names = runpy.run_path(str(renamed_script), run_name="__main__")
    args = names["training_args"]
    assert isinstance(args, SPOConfig)
    for name in ("alpha", "beta", "gamma", "average_log_probs", "center", "kl_every", "head", "vllm_server_port"):
        assert getattr(args, name) == options[name]
    assert (out / ("adapter_model.safetensors" if peft else "model.safetensors")).exists()


@pytest.mark.parametrize("example", ["plain_loop", "trl_spo", "trl_spo_lora"])
def test_examples_run_with_a_falling_loss(example: str) -> None:
    script = Path(plain_loop.__file__).parent / f"{example}.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "in the last third" in done.stdout
