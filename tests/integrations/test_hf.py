"""SPO in Hugging Face's Trainer: one optimizer step against the plain formulas, resume, evaluation, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from repository import ROOT
from tiny_models import make_model, make_rows, make_tokenizer
from transformers import Trainer, TrainingArguments

from spo_kernels.integrations.core import SPOSettings
from spo_kernels.integrations.hf import PairCollator, SPOTrainerMixin

PLAIN = SPOSettings(beta=0.0)
TOKENIZER = make_tokenizer()
RATE = 0.1


class SPOTrainer(SPOTrainerMixin, Trainer):
    pass


def rows_of(count: int) -> list[dict[str, list[int]]]:
    eos = TOKENIZER.eos_token_id
    return [
        {
            "prompt_ids": TOKENIZER(row["prompt"])["input_ids"],
            "chosen_ids": [*TOKENIZER(row["chosen"])["input_ids"], eos],
            "rejected_ids": [*TOKENIZER(row["rejected"])["input_ids"], eos],
        }
        for row in make_rows(count)
    ]


def trainer_of(
    folder: Path, rows: Any, model: Any = None, *, args: dict[str, Any] | None = None, **options: Any
) -> Any:
    model = make_model() if model is None else model
    arguments = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **(args or {}),
    }
    if options.get("spo", PLAIN).beta:
        kl = {"ref_model": make_model(seed=1), "kl_samples": 8, "kl_every": 2, "kl_max_new_tokens": 6}
        options = {**kl, "processing_class": TOKENIZER, **options}
    return SPOTrainer(
        model=model,
        args=TrainingArguments(str(folder), **arguments),
        data_collator=PairCollator(TOKENIZER.pad_token_id),
        train_dataset=rows,
        **{"spo": PLAIN, **options},
    )


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_step(rows: Any, settings: SPOSettings) -> Tensor:
    """Weights after one step of SGD on all rows as one batch, in float64 and by the plain formulas."""
    model = make_model().double().train()
    batch = PairCollator(0)(rows)
    labels = batch.pop("labels")
    log_p = model(**batch).logits.log_softmax(-1)
    sums = (log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(-1)
    chosen, rejected = sums.chunk(2)
    mu: Any = 1.0
    if settings.weighting == "soft":
        scores = settings.gamma * torch.logaddexp(chosen, rejected).detach()
        mu = torch.sigmoid(scores - scores.mean())
    loss = (-mu * F.logsigmoid(settings.alpha * (chosen - rejected)) / settings.alpha).mean()
    loss.backward()
    return torch.cat([(p - RATE * p.grad).detach().flatten() for p in model.parameters()])


def close(got: Tensor, expected: Tensor, start: Tensor) -> None:
    """The steps from the starting weights agree to float32's rounding."""
    step = (expected - start).double()
    assert (got.double() - expected.double()).norm() <= 1e-5 * step.norm()


@pytest.mark.parametrize("settings", [PLAIN, SPOSettings(beta=0.0, weighting="soft", gamma=0.1)], ids=["plain", "soft"])
@pytest.mark.parametrize(
    ("rows", "size", "accumulation"),
    [(4, 4, 1), (4, 2, 2), (3, 2, 2), (2, 2, 2)],
    ids=["whole", "accumulated", "short last micro-batch", "fewer micro-batches"],
)
def test_a_step_is_that_of_one_batch(
    rows: int, size: int, accumulation: int, settings: SPOSettings, tmp_path: Path
) -> None:
    data = rows_of(rows)
    args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(tmp_path, data, args=args, spo=settings)
    start = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 1
    close(weights(trainer.model), plain_step(data, settings), start)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["spo/loss"], rel=1e-3)
    assert ("spo/mu" in logged) == (settings.weighting == "soft")


def test_the_kl_of_a_step_is_that_of_one_batch(tmp_path: Path) -> None:
    data, settings = rows_of(3), SPOSettings(beta=0.5)
    after = []
    for size, accumulation in ((3, 1), (2, 2), (1, 3)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, data, args=args, spo=settings)
        trainer.train()
        after.append(weights(trainer.model))
    start = weights(make_model())
    close(after[1], after[0], start)
    close(after[2], after[0], start)
    assert (after[0] - plain_step(data, PLAIN)).norm() > 1e-2 * (after[0] - start).norm(), "the KL has no effect"
    assert trainer.state.log_history[0]["spo/kl"] > 0


def test_the_loss_falls_and_the_policy_starts_at_its_reference(tmp_path: Path) -> None:
    args = {"max_steps": 12, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    trainer = trainer_of(
        tmp_path, rows_of(16), args=args, ref_model=make_model(), spo=SPOSettings(reference_rewards=True)
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert history[0]["spo/kl"] == pytest.approx(0, abs=1e-5)
    assert sum(entry["loss"] for entry in history[-4:]) < sum(entry["loss"] for entry in history[:4]) - 1


@pytest.mark.parametrize("normalizer", ["step", "ema"])
def test_resume_is_exact(normalizer: str, tmp_path: Path) -> None:
    settings = SPOSettings(beta=0.1, weighting="soft", normalizer=normalizer)
    args = {"max_steps": 5, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 3}

    def run(resume: bool) -> Tensor:
        # A draw every 2 steps: step 3 continues with the samples of step 2.
        trainer = trainer_of(tmp_path, rows_of(12), args=args, spo=settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return weights(trainer.model)

    unbroken = run(resume=False)
    torch.testing.assert_close(run(resume=True), unbroken, rtol=0, atol=0)
    (tmp_path / "checkpoint-3/spo_0.pt").unlink()
    with pytest.warns(UserWarning, match=r"spo_0\.pt does not exist: samples and running average start anew"):
        other = run(resume=True)
    assert not torch.equal(other, unbroken)


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    settings = SPOSettings(beta=0.1, weighting="soft", normalizer="ema")
    data, after = rows_of(8), []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        args = {"max_steps": 3, "learning_rate": 0.02, **extra}
        trainer = trainer_of(tmp_path, data, args=args, spo=settings, eval_dataset=data[:5])
        if extra:
            first = trainer.evaluate()  # draws samples of its own
            assert first["eval_loss"] == pytest.approx(
                first["eval_spo/loss"] + settings.beta * first["eval_spo/kl"], rel=1e-4
            )
            assert 0 <= first["eval_rewards/accuracies"] <= 1
        trainer.train()
        after.append(weights(trainer.model))
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=0)
    assert sum("eval_spo/kl" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_precision_and_checkpointing(option: str, tmp_path: Path) -> None:
    """The steps are near those of float32: within bfloat16's rounding, or float32's."""
    steps = []
    for args in ({}, {option: True}):
        trainer = trainer_of(tmp_path, rows_of(4), args=args, spo=SPOSettings(beta=0.3), ref_model=make_model())
        trainer.train()
        steps.append(weights(trainer.model) - weights(make_model()))
        assert trainer.state.log_history[0]["spo/kl"] == pytest.approx(0, abs=1e-5)
    tolerance = 5e-2 if option == "bf16" else 1e-5
    assert (steps[1] - steps[0]).norm() <= tolerance * steps[0].norm()


def test_lora_is_its_own_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    settings = SPOSettings(beta=0.1, reference_rewards=True)
    args = {"max_steps": 4, "learning_rate": 0.5}
    trainer = trainer_of(tmp_path, rows_of(8), model, args=args, spo=settings, ref_model=None)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["spo/kl"] == pytest.approx(0, abs=1e-5)
    assert history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["spo/kl"] > 1e-4


def test_refuses_adapters_that_the_loss_would_not_see(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora, prompts = peft.LoraConfig, peft.PromptTuningConfig
    for config, message in (
        (lora(target_modules=["lm_head"]), "model must have no adapter on its head"),
        (prompts(task_type="CAUSAL_LM", num_virtual_tokens=2), "must not use prompt learning, .* PromptTuningConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, rows_of(2), peft.get_peft_model(make_model(), config))
    trained_head = peft.get_peft_model(make_model(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="head must be frozen where a PEFT model is its own reference"):
        trainer_of(tmp_path, rows_of(2), trained_head, spo=SPOSettings(), ref_model=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spo": SPOSettings(), "ref_model": None}, "ref_model must be given where beta > 0"),
        ({"spo": SPOSettings(), "processing_class": None}, "processing_class must be the tokenizer where beta > 0"),
        ({"spo": SPOSettings(), "ref_model": "resized"}, "ref_model must have the 64 rows of the model's head, got 70"),
        ({"compute_metrics": lambda _: {}}, "compute_metrics must be None"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func must be None"),
        ({"spo": SPOSettings(), "kl_samples": 0}, "samples must be an integer >= 1, got 0"),
    ],
)
def test_refuses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if options.get("ref_model") == "resized":
        options = {**options, "ref_model": make_model(vocab=70)}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows_of(2), **options)


def train_in_ranks(folder: Path, rank: int) -> None:
    """What each rank of the next test does."""
    settings = SPOSettings(beta=0.0, weighting="soft", gamma=0.1)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = trainer_of(folder, rows_of(4), args=args, spo=settings)
    trainer.train()
    torch.save((weights(trainer.model), trainer.state.log_history[0]["spo/loss"]), folder / f"{rank}.pt")
    trainer = trainer_of(folder, rows_of(8), args={**args, "max_steps": 2}, spo=SPOSettings(beta=0.3))
    trainer.train()
    draw = trainer.spo.buffer.draw
    torch.save((weights(trainer.model), draw.samples.responses()), folder / f"kl_{rank}.pt")


def test_two_ranks_step_as_one(tmp_path: Path) -> None:
    """Under DDP: the pairs of both ranks give the step of one process; each rank draws its half of the samples."""
    folders = [str(ROOT / folder) for folder in ("tests/integrations", "tests/support", "examples")]
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import os, sys, pathlib\nsys.path[:0] = {folders}\nimport test_hf\n"
        f"test_hf.train_in_ranks(pathlib.Path({str(tmp_path)!r}), int(os.environ['RANK']))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    settings = SPOSettings(beta=0.0, weighting="soft", gamma=0.1)
    close(ranks[0][0], plain_step(rows_of(4), settings), weights(make_model()))
    kl = [torch.load(tmp_path / f"kl_{rank}.pt", weights_only=False) for rank in range(2)]
    torch.testing.assert_close(kl[0][0], kl[1][0], rtol=0, atol=0)
    assert len(kl[0][1]) == len(kl[1][1]) == 4 and kl[0][1] != kl[1][1]


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("n_gpu", 2, "one process must have one GPU, .* got 2"),
        ("parallelism_config", SimpleNamespace(cp_size=2), "must not split sequences .* got cp_size = 2"),
        ("parallelism_config", SimpleNamespace(sp_size=4), "must not split sequences .* got sp_size = 4"),
        ("is_fsdp_enabled", True, "beta must be 0 under FSDP and DeepSpeed .* got beta = 0.03"),
        ("is_deepspeed_enabled", True, "beta must be 0 under FSDP and DeepSpeed .* got beta = 0.03"),
    ],
)
def test_refuses_engines_that_split(
    fact: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, rows_of(2), spo=SPOSettings())
    for owner in (trainer, trainer.args, trainer.accelerator):
        if hasattr(owner, fact):
            monkeypatch.setattr(type(owner), fact, value, raising=False)
            vars(owner).pop(fact, None)
    with pytest.raises(ValueError, match=message):
        trainer._refuse(SPOSettings())


def test_refuses_a_dataset_without_an_index_and_other_batches(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows_of(2))

    with pytest.raises(ValueError, match="kl_prompts must be given where train_dataset has no length .* got Stream"):
        trainer_of(tmp_path, Stream(), spo=SPOSettings())
    trainer = trainer_of(tmp_path, rows_of(2))
    with pytest.raises(ValueError, match=r"PairCollator gives, got no labels: \['input_ids', 'attention_mask'\]"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)})


def test_collator() -> None:
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9, 2]},
        {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [9, 9]},
    ]
    ignored = -100
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 7, 0, 0, 0], [5, 6, 9, 2, 0], [5, 9, 9, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 4, 3]
    assert batch["labels"].tolist() == [
        [ignored, 7, 8, 2, ignored],
        [7, *[ignored] * 4],
        [ignored, 9, 2, ignored, ignored],
        [9, 9, *[ignored] * 3],
    ]
    wide = PairCollator(0, max_length=4, pad_to_multiple_of=8)(rows)
    assert {name: list(x.shape) for name, x in wide.items()} == {name: [4, 8] for name in batch}
    assert wide["labels"][0].tolist() == [ignored, 7, 8, *[ignored] * 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": None}, "row 1 has no chosen_ids"),
        ({"rejected_ids": []}, "rejected_ids must not be empty, got no token in row 1"),
        ({"prompt_ids": []}, "prompt_ids must not be empty, got no token in row 1"),
        ({"rejected_ids": [7, 2]}, "chosen_ids and rejected_ids must differ, got the same in row 1"),
        ({"prompt_ids": [5] * 6}, "prompt_ids must be shorter than max_length = 6, .* got 6 tokens in row 1"),
    ],
)
def test_collator_refuses(change: dict[str, Any], message: str) -> None:
    good = {"prompt_ids": [5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
    bad = {name: ids for name, ids in {**good, **change}.items() if ids is not None}
    with pytest.raises(ValueError, match=message):
        PairCollator(0, max_length=6)([good, bad])
