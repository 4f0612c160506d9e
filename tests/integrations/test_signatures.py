"""Adapters for other trainers, called as these trainers call their own losses.

`RECORDED` has the signatures that the adapters rely on, copied from the projects' sources. Stand-ins with these
signatures call the adapters as the projects do. Where a project is installed, its own trainer runs too.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_batch import ALPHA, Batch, counts
from torch import Tensor, nn

import spo_kernels
from spo_kernels.integrations import llamafactory, nemo_rl, openrlhf, torchtune

FOUR = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
# Where a project has the function, its parameters, and the function of ours that stands in its place.
RECORDED: dict[str, tuple[tuple[str, ...], Callable[..., Any] | None]] = {
    # LLaMA-Factory 0.9.5, and 0.9.6.dev0 ff6d4d1
    "llamafactory.train.dpo.trainer:CustomDPOTrainer.compute_preference_loss": (
        ("self", *FOUR),
        llamafactory.SPOMixin.compute_preference_loss,
    ),
    "llamafactory.train.dpo.trainer:CustomDPOTrainer.compute_reference_log_probs": (
        ("self", "model", "batch"),
        llamafactory.SPOMixin.compute_reference_log_probs,
    ),
    "llamafactory.train.trainer_utils:get_batch_logps": (
        ("logits", "labels", "label_pad_token_id", "ld_alpha"),  # the trainer passes all but the third, by keyword
        None,
    ),
    # OpenRLHF 0.11.0 3c3be62, and 0.11.2
    "openrlhf.models.loss:DPOLoss.forward": (("self", *FOUR), openrlhf.SPOLoss.forward),
    "openrlhf.models.loss:DPOLoss.__init__": (("self", "beta", "label_smoothing", "ipo"), None),
    # torchtune 0.6.1
    "torchtune.rlhf.loss:DPOLoss.forward": (("self", *FOUR), torchtune.SPOLoss.forward),
    "torchtune.rlhf:get_batch_log_probs": (
        ("logits", "labels", "label_pad_token_id", "return_average_logprobs"),
        None,
    ),
    # NeMo-RL 0.6.0, 0.7.0 and 7ea279a
    "nemo_rl.algorithms.loss:DPOLossFn.__call__": (
        ("self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks"),
        nemo_rl.SPOLossFn.forward,
    ),
}


def module_of(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> Any:
    """A module of this name in sys.modules, with empty packages above it, until the test ends."""
    for package in itertools.accumulate(name.split("."), "{}.{}".format):
        module: Any = ModuleType(package)
        module.__spec__, module.__path__ = ModuleSpec(package, None), []
        monkeypatch.setitem(sys.modules, package, module)
    vars(module).update(contents)
    return module


# Packages that trainers import and the tests need not run, with the names that are taken from them.
UNUSED = {
    "llamafactory": {"torchaudio": ()},
    "openrlhf": {
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils.distributed": ("all_gather",),
    },
}


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of a project, or skips. Missing packages that the tests need not run get an empty stand-in."""

    def load(name: str) -> Any:
        project = name.split(".")[0]
        if importlib.util.find_spec(project) is None:
            pytest.skip(f"{project} is not installed")
        missing = {
            unused: names
            for unused, names in UNUSED.get(project, {}).items()
            if importlib.util.find_spec(unused.split(".")[0]) is None
        }
        if missing:
            importlib.import_module("transformers.modeling_flash_attention_utils")  # looks for flash_attn itself
        for unused, names in missing.items():
            module_of(monkeypatch, unused, **dict.fromkeys(names))
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("place", RECORDED)
def test_adapters_have_the_recorded_parameters(place: str) -> None:
    names, ours = RECORDED[place]
    if ours is not None:
        assert tuple(inspect.signature(ours).parameters) == names


@pytest.mark.parametrize("place", RECORDED)
def test_recorded_parameters_are_the_projects(place: str, real: Callable[[str], Any]) -> None:
    module, _, path = place.partition(":")
    function = real(module)
    for name in path.split("."):
        function = getattr(function, name)
    assert tuple(inspect.signature(function).parameters) == RECORDED[place][0]


def test_importing_an_adapter_does_not_import_its_project(tmp_path: Path) -> None:
    projects = ["llamafactory", "nemo_rl", "openrlhf", "torchtune"]
    imports = ", ".join(f"spo_kernels.integrations.{project}" for project in projects)
    code = f"import sys, {imports}; assert not {{*{projects}, 'transformers'}} & set(sys.modules)"
    # Outside the source tree: Python would import it from the current directory, before the installed package.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_losses_refuse_wrong_options_at_once() -> None:
    for refused, message in (
        (lambda: torchtune.SPOLoss(-1.0), "alpha must be >= 0 and finite, got -1.0"),
        (lambda: torchtune.SPOLoss(weight=-1.0), "gamma must be >= 0 and finite, got -1.0"),
        (lambda: nemo_rl.SPOLossFn(nll_weight=float("nan")), "nll_weight must be >= 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def torchtune_step(batch: Batch, loss_fn: Any) -> Any:
    """As in torchtune 0.6.1's recipes."""
    loss, chosen_rewards, rejected_rewards = loss_fn(*batch.policy(), *batch.references)
    return loss.mean(), chosen_rewards, rejected_rewards


def test_torchtune_recorded() -> None:
    batch = Batch()
    batch.check(torchtune_step(batch, torchtune.SPOLoss()), center=True)
    batch.check(torchtune_step(batch, torchtune.SPOLoss(center=False)))
    batch.check(
        torchtune_step(batch, torch.compile(torchtune.SPOLoss(), fullgraph=True, backend="aot_eager")), center=True
    )


def test_torchtune_weights_pairs() -> None:
    batch = Batch()
    loss, _, _ = torchtune_step(batch, torchtune.SPOLoss(weight=0.3, center=False))
    chosen, rejected = batch.policy()
    scores = 0.3 * torch.logaddexp(chosen, rejected).detach()
    expected = -torch.sigmoid(scores - scores.mean()) * F.logsigmoid(ALPHA * (chosen - rejected)) / ALPHA
    torch.testing.assert_close(loss, expected.mean())


def test_an_evaluation_leaves_the_running_average_alone() -> None:
    batch, loss_fn = Batch(), torchtune.SPOLoss(weight=spo_kernels.SoftImportance(0.3, "ema"))
    torchtune_step(batch, loss_fn)
    with torch.no_grad():
        torchtune_step(Batch(pairs=2), loss_fn)
    assert loss_fn.importance.num_updates == 1
    torchtune_step(batch, loss_fn)
    assert loss_fn.importance.num_updates == 2


def test_torchtune_itself(real: Callable[[str], Any]) -> None:
    config, rlhf = real("torchtune.config"), real("torchtune.rlhf")
    from omegaconf import OmegaConf

    yaml = OmegaConf.create({"_component_": "spo_kernels.integrations.torchtune.SPOLoss", "alpha": ALPHA})
    batch = Batch()
    batch.check(torchtune_step(batch, config.instantiate(yaml)), center=True)
    ours = spo_kernels.get_batch_logps(batch.logits, batch.labels)
    torch.testing.assert_close(rlhf.get_batch_log_probs(batch.logits, batch.labels), ours)


class OpenRLHFActor(nn.Module):
    """Returns log-probs [2P, T - 1] of a fixed batch, as OpenRLHF's Actor does."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.logits = nn.Parameter(batch.logits.detach().clone())

    def forward(self, sequences: Tensor, attention_mask: Tensor, return_output: bool, **_: Any) -> Any:
        assert return_output
        labels = sequences[:, 1:, None]
        return self.logits[:, :-1].log_softmax(-1).gather(-1, labels)[..., 0], {}


def test_openrlhf_recorded() -> None:
    batch = Batch()
    loss_fn = (lambda beta, label_smoothing, ipo: openrlhf.SPOLoss(alpha=ALPHA))(0.01, 0.0, False)
    preference_loss, chosen_reward, reject_reward = loss_fn(*batch.policy(), *batch.references)
    (preference_loss + 0 * 0.01).backward(retain_graph=True)
    assert preference_loss.item() == preference_loss and chosen_reward.numel() == reject_reward.numel() == batch.pairs
    batch.check((preference_loss, chosen_reward, reject_reward), center=True)


def test_openrlhf_itself(real: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer's own fit and evaluate, with a strategy that needs no DeepSpeed."""
    dpo_trainer = real("openrlhf.trainer.dpo_trainer")
    monkeypatch.setattr(dpo_trainer, "DPOLoss", lambda beta, label_smoothing, ipo: openrlhf.SPOLoss(alpha=ALPHA))
    batch = Batch()
    actor, reference = OpenRLHFActor(batch), OpenRLHFActor(batch)
    optimizer = torch.optim.SGD(actor.parameters(), 0.5)
    ids, response = batch.labels.clamp(min=0), batch.labels != -100
    present = response | (torch.arange(7) < 3)  # prompts have 3 tokens
    chosen, rejected = slice(0, batch.pairs), slice(batch.pairs, None)
    rows = (ids[chosen], present[chosen].long(), ids[rejected], present[rejected].long(), [3] * batch.pairs)
    namespace = SimpleNamespace
    args = namespace(
        model=namespace(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.0),
        ds=namespace(packing_samples=False),
        logger=namespace(wandb=namespace(key=None), tensorboard_dir=None, logging_steps=1),
        eval=namespace(steps=-1),
        ckpt=namespace(save_steps=-1),
        train=namespace(batch_size=1),
    )
    logs: list[dict[str, float]] = []
    strategy = namespace(
        args=args,
        accumulated_gradient=1,
        ring_attn_group=None,
        is_rank_0=lambda: True,
        backward=lambda loss, model, optimizer: loss.backward(),
        optimizer_step=lambda optimizer, model, scheduler: (optimizer.step(), optimizer.zero_grad()),
        get_grad_norm=lambda model: 0.0,
        all_reduce=lambda numbers: logs.append(dict(numbers)) or numbers,
    )
    trainer = dpo_trainer.DPOTrainer(
        model=actor,
        ref_model=reference,
        strategy=strategy,
        tokenizer=namespace(pad_token_id=0),
        optim=optimizer,
        train_dataloader=torch.utils.data.DataLoader([0, 0, 0, 0], collate_fn=lambda _: rows),
        eval_dataloader=torch.utils.data.DataLoader([0], collate_fn=lambda _: rows),
        scheduler=namespace(get_last_lr=lambda: [0.5]),
        max_epochs=1,
    )
    trainer.fit(args)
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert losses[0] == pytest.approx(batch.spo()[0].item() - math.log(2) / ALPHA, rel=1e-5)
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert logs[0]["chosen_reward"] == pytest.approx(0, abs=1e-6), "the policy starts as the reference"
    assert logs[-1]["eval_loss"] < losses[-1]


def llamafactory_modules(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> Any:
    """A stand-in for LLaMA-Factory's DPO trainer: what it calls, in its order, with its arguments."""

    def get_batch_logps(logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: Any = None) -> Any:
        assert ld_alpha == 0.5
        return logits.new_full(labels.shape[:1], -7.0), counts(labels)

    class CustomDPOTrainer:
        def __init__(self, finetuning_args: Any) -> None:
            self.finetuning_args = finetuning_args
            self.loss_type = finetuning_args.pref_loss
            self.bco_gemma = finetuning_args.pref_bco_weight
            self.label_smoothing = finetuning_args.dpo_label_smoothing
            self.ld_alpha = finetuning_args.ld_alpha
            self.ftx_gamma = finetuning_args.pref_ftx
            self.reference_calls = 0

        def compute_preference_loss(self, *_: Tensor) -> Any:
            raise AssertionError("DPO's loss")

        def compute_reference_log_probs(self, model: Any, batch: Any) -> Any:
            self.reference_calls += 1
            return batch.references

        def get_batch_loss_metrics(self, model: Any, batch: Batch) -> Any:
            all_logps, valid_length = trainer_module.get_batch_logps(
                logits=batch.logits.to(torch.float32), labels=batch.labels, ld_alpha=self.ld_alpha
            )
            if self.loss_type in ["ipo", "orpo", "simpo"]:
                all_logps = all_logps / valid_length
            chosen, rejected = all_logps.split(batch.pairs, dim=0)
            chosen_length, _ = valid_length.split(batch.pairs, dim=0)
            references = self.compute_reference_log_probs(model, batch)
            losses, chosen_rewards, rejected_rewards = self.compute_preference_loss(chosen, rejected, *references)
            if self.ftx_gamma > 1e-6:
                losses += self.ftx_gamma * -chosen / chosen_length
            return losses.mean(), chosen_rewards, rejected_rewards

    trainer_module = module_of(monkeypatch, "llamafactory.train.dpo.trainer", CustomDPOTrainer=CustomDPOTrainer)
    module_of(monkeypatch, "llamafactory.train.dpo.workflow", CustomDPOTrainer=CustomDPOTrainer)
    module_of(monkeypatch, "llamafactory.train.trainer_utils", get_batch_logps=get_batch_logps)
    return trainer_module


def finetuning(**fields: Any) -> Any:
    defaults = {"pref_loss": "sigmoid", "pref_bco_weight": 0.0, "dpo_label_smoothing": 0.0, "ld_alpha": None}
    return SimpleNamespace(**{**defaults, "pref_ftx": 0.0, **fields})


def test_llamafactory_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch()
    module = llamafactory_modules(monkeypatch, batch)
    unpatched = module.CustomDPOTrainer

    llamafactory.patch()
    trainer = module.CustomDPOTrainer(finetuning())
    batch.check(trainer.get_batch_loss_metrics(None, batch), center=True, references=False)
    assert trainer.reference_calls == 0
    one = Batch(pairs=1)  # whose two log-probs could pass for log-probs and lengths
    one.check(trainer.get_batch_loss_metrics(None, one), center=True, references=False)

    llamafactory.patch(center=False, log_reference_rewards=True)
    trainer = module.CustomDPOTrainer(finetuning())
    batch.check(trainer.get_batch_loss_metrics(None, batch))
    assert trainer.reference_calls == 1
    assert sys.modules["llamafactory.train.dpo.workflow"].CustomDPOTrainer is module.CustomDPOTrainer
    assert module.CustomDPOTrainer.__bases__ == (llamafactory.SPOMixin, unpatched), "a second patch replaces the first"

    chosen_mean = batch.policy()[0] / counts(batch.labels)[: batch.pairs]
    loss, _, _ = module.CustomDPOTrainer(finetuning(pref_ftx=0.5)).get_batch_loss_metrics(None, batch)
    torch.testing.assert_close(loss, batch.spo()[0] - 0.5 * chosen_mean.mean())
    # LLaMA-Factory's own function weights tokens.
    loss, *_ = module.CustomDPOTrainer(finetuning(ld_alpha=0.5)).get_batch_loss_metrics(None, batch)
    torch.testing.assert_close(loss, torch.tensor(2.0).log() / ALPHA)


def test_llamafactory_takes_means_with_simpo(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch()
    module = llamafactory_modules(monkeypatch, batch)
    llamafactory.patch(alpha=2.0, center=False)
    loss, _, _ = module.CustomDPOTrainer(finetuning(pref_loss="simpo")).get_batch_loss_metrics(None, batch)
    chosen, rejected = batch.split(batch.token_logps().sum(-1) / counts(batch.labels))
    torch.testing.assert_close(loss, (-F.logsigmoid(2 * (chosen - rejected)) / 2).mean())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pref_loss": "orpo"}, "pref_loss must be sigmoid .* or simpo .* with SPO, got orpo"),
        ({"pref_bco_weight": 0.1}, "pref_bco_weight must be 0 with SPO, which has no such term, got 0.1"),
        ({"dpo_label_smoothing": 0.2}, "dpo_label_smoothing must be 0 with SPO, .* got 0.2"),
    ],
)
def test_llamafactory_refuses(fields: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = llamafactory_modules(monkeypatch, Batch())
    llamafactory.patch()
    with pytest.raises(ValueError, match=message):
        module.CustomDPOTrainer(finetuning(**fields))


def test_llamafactory_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llamafactory.train", None)
    with pytest.raises(ImportError, match="pip install llamafactory"):
        llamafactory.patch()


@pytest.mark.parametrize("log_reference_rewards", [False, True])
def test_llamafactory_itself(
    log_reference_rewards: bool, real: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Its trainer trains a tiny model for three steps; the first loss is the plain formula's."""
    module = real("llamafactory.train.dpo.trainer")
    monkeypatch.setattr(module, "CustomDPOTrainer", module.CustomDPOTrainer)
    monkeypatch.setattr(module, "get_batch_logps", module.get_batch_logps)
    from llamafactory.hparams import FinetuningArguments
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    def model() -> Any:
        torch.manual_seed(1)
        size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=0.5, **size))

    batch = Batch()
    ids = batch.labels.clamp(min=0)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": batch.labels}
    policy, reference = model(), model()
    reference_forwards: list[int] = []
    reference.register_forward_hook(lambda *_: reference_forwards.append(1))
    llamafactory.patch(alpha=ALPHA, log_reference_rewards=log_reference_rewards)
    trainer = module.CustomDPOTrainer(
        model=policy,
        ref_model=reference,
        finetuning_args=FinetuningArguments(stage="dpo"),
        processor=None,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            learning_rate=0.01,
            max_grad_norm=1e9,
            logging_steps=1,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
        ),
        data_collator=lambda _: {name: tensor.clone() for name, tensor in rows.items()},
        train_dataset=[{"row": i} for i in range(6)],
        tokenizer=None,
    )
    batch.logits = policy(ids).logits.detach()
    expected = batch.spo()[0] - math.log(2) / ALPHA
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3)
    assert losses == sorted(losses, reverse=True)
    assert bool(reference_forwards) == log_reference_rewards
    assert (history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)) == log_reference_rewards


@pytest.fixture
def nemo_interfaces(monkeypatch: pytest.MonkeyPatch) -> Any:
    class LossType(enum.Enum):
        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        LOGIT = "logit"
        LOGPROB = "logprob"

    return module_of(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)


def nemo_batch(batch: Batch, sample_mask: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and data as NeMo-RL has them: pairs interleaved, prompts and padding unmasked by nothing but a mask."""
    interleaved = torch.arange(2 * batch.pairs).view(2, -1).T.flatten()
    reference = torch.zeros(2 * batch.pairs, 7)
    reference[:, 2] = torch.stack(batch.references, 1).flatten()  # predicts the first token of the response
    reference[:, 6] = torch.nan  # rolled in from the left; belongs to no token
    data = {
        "token_mask": (batch.labels != -100)[interleaved].float(),
        "sample_mask": torch.tensor(sample_mask),
        "reference_policy_logprobs": reference,
    }
    return batch.token_logps()[interleaved], data


def nemo_step(loss_fn: Any, interfaces: Any, logps: Tensor, data: Any, seqs: float) -> Any:
    """As NeMo-RL's workers call a loss."""
    assert loss_fn.input_type == interfaces.LossInputType.LOGPROB
    assert loss_fn.loss_type != interfaces.LossType.TOKEN_LEVEL
    loss_fn = pickle.loads(pickle.dumps(loss_fn))  # sent to workers
    return loss_fn(
        data=data, global_valid_seqs=torch.tensor(seqs), global_valid_toks=torch.tensor(9.0), next_token_logprobs=logps
    )


def test_nemo_rl_recorded(nemo_interfaces: Any) -> None:
    batch = Batch()
    logps, data = nemo_batch(batch, [1.0, 1, 0, 0, 1, 1])
    logps = torch.where(data["sample_mask"][:, None] > 0, logps, torch.nan)  # an invalid pair is not read
    loss, metrics = nemo_step(nemo_rl.SPOLossFn(center=False), nemo_interfaces, logps, data, 4.0)
    chosen, rejected = batch.policy()
    expected = (-F.logsigmoid(ALPHA * (chosen - rejected)) / ALPHA)[[0, 2]].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch.gradient(loss), batch.gradient(expected), rtol=1e-5, atol=1e-6)
    _, *rewards = batch.spo()
    assert metrics == pytest.approx(
        {
            "loss": expected.item(),
            "sft_loss": -chosen[[0, 2]].mean().item(),
            "preference_loss": expected.item(),
            "accuracy": (chosen > rejected)[[0, 2]].float().mean().item(),
            "rewards_chosen_mean": rewards[0][[0, 2]].mean().item(),
            "rewards_rejected_mean": rewards[1][[0, 2]].mean().item(),
            "num_valid_samples": 2,
        },
        rel=1e-5,
    )


def test_nemo_rl_sums_over_micro_batches(nemo_interfaces: Any) -> None:
    """The losses of micro-batches add up to the mean over the whole batch; one without valid pairs adds 0."""
    batch = Batch()
    logps, data = nemo_batch(batch, [1.0, 1, 1, 1, 0, 0])
    loss_fn = nemo_rl.SPOLossFn()
    whole, _ = nemo_step(loss_fn, nemo_interfaces, logps, data, 4.0)
    parts = [
        nemo_step(loss_fn, nemo_interfaces, logps[rows], {k: v[rows] for k, v in data.items()}, 4.0)[0]
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert parts[2] == 0
    # Some of its trainers pass 1 in place of the count, and divide afterwards.
    undivided, _ = nemo_step(loss_fn, nemo_interfaces, logps, data, 1.0)
    torch.testing.assert_close(undivided / 4, whole)


def test_nemo_rl_means_and_nll(nemo_interfaces: Any) -> None:
    batch = Batch()
    logps, data = nemo_batch(batch, [1.0] * 6)
    del data["reference_policy_logprobs"]
    loss_fn = nemo_rl.SPOLossFn(alpha=2.0, center=False, average_log_probs=True, nll_weight=0.5)
    loss, metrics = nemo_step(loss_fn, nemo_interfaces, logps, data, 6.0)
    chosen, rejected = batch.split(batch.token_logps().sum(-1) / counts(batch.labels))
    preference = (-F.logsigmoid(2 * (chosen - rejected)) / 2).mean()
    torch.testing.assert_close(loss, preference - 0.5 * chosen.mean())
    assert metrics["rewards_chosen_mean"] == pytest.approx(2 * chosen.mean().item())


def test_nemo_rl_refuses_rows_that_are_no_pairs(nemo_interfaces: Any) -> None:
    logps, data = nemo_batch(Batch(), [1.0] * 6)
    with pytest.raises(ValueError, match="next_token_logprobs must hold interleaved pairs, got 5 rows"):
        nemo_step(nemo_rl.SPOLossFn(), nemo_interfaces, logps[:5], data, 6.0)
    with pytest.raises(ValueError, match=r"token_mask must be \[6, 6\], got \[6, 7\]"):
        nemo_step(nemo_rl.SPOLossFn(), nemo_interfaces, logps[:, 1:], data, 6.0)
