"""The README's table of projects: each test calls our functions as that version of a project calls its own.

A test copies the call from the project's source: parameter names, their order, keywords, and what the caller does with
the result. It neither needs nor imports the project.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_batch import ALPHA, Batch, Triple, counts
from torch import Tensor

import spo_kernels
from spo_kernels.integrations.nemo_rl import SPOLossFn

README = Path(__file__).resolve().parent.parent / "README.md"
ROWS: dict[str, Callable[[], None]] = {}


def row(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers the test of the README's row with this first cell."""

    def register(test: Callable[[], None]) -> Callable[[], None]:
        ROWS[name] = test
        return test

    return register


@row("DPO reference code, f8b8c0f")
def dpo_reference_code() -> None:
    batch = Batch()

    def step(get_batch_logps: Any, preference_loss: Any, **options: Any) -> Triple:
        chosen, rejected = batch.split(get_batch_logps(batch.logits, batch.labels, average_log_prob=False))
        losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, *batch.references, **options)
        return losses.mean(), chosen_rewards, rejected_rewards

    options = {"beta": 0.1, "reference_free": False, "label_smoothing": 0.0, "ipo": False}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        step(spo_kernels.get_batch_logps, spo_kernels.spo_loss, **options)
    batch.check(step(spo_kernels.get_batch_logps, spo_kernels.spo_loss, alpha=ALPHA))


@row("TRL 0.7.11, 0.8.6")
def trl_with_log_probs() -> None:
    batch = Batch()

    def step(get_batch_logps: Any, dpo_loss: Any) -> Triple:
        logps = get_batch_logps(
            batch.logits, batch.labels, average_log_prob=False, is_encoder_decoder=False, label_pad_token_id=-100
        )
        losses, chosen_rewards, rejected_rewards = dpo_loss(*batch.split(logps), *batch.references)
        return losses.mean(), chosen_rewards, rejected_rewards

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        step(spo_kernels.get_batch_logps, spo_kernels.spo_loss)

    def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False, **_: Any) -> Tensor:
        return spo_kernels.get_batch_logps(logits, labels, average_log_prob)

    batch.check(step(get_batch_logps, spo_kernels.spo_loss))


@row("TRL 0.9.6, 0.11.4")
def trl_with_log_probs_and_counts() -> None:
    batch = Batch()

    def step(get_batch_logps: Any, dpo_loss: Any) -> Triple:
        logps, completion_sizes = get_batch_logps(
            batch.logits, batch.labels, is_encoder_decoder=False, label_pad_token_id=-100
        )
        assert completion_sizes.tolist() == counts(batch.labels).tolist()
        losses, chosen_rewards, rejected_rewards = dpo_loss(*batch.split(logps), *batch.references)
        return losses.mean(), chosen_rewards, rejected_rewards

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        step(spo_kernels.get_batch_logps, spo_kernels.spo_loss)
    with pytest.raises(ValueError, match="too many values to unpack"):
        step(lambda logits, labels, **_: spo_kernels.get_batch_logps(logits, labels), spo_kernels.spo_loss)

    def get_batch_logps(logits: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return spo_kernels.get_batch_logps(logits, labels), counts(labels)

    batch.check(step(get_batch_logps, spo_kernels.spo_loss))


@row("TRL 0.12.2, 0.18.2")
def trl_with_a_loss_of_four() -> None:
    batch = Batch()

    def step(dpo_loss: Any) -> Triple:
        losses, chosen_rewards, rejected_rewards = dpo_loss(*batch.policy(), *batch.references)
        return losses.mean(), chosen_rewards, rejected_rewards

    batch.check(step(spo_kernels.spo_loss))


@row("TRL 0.21.0, 0.28.0")
def trl_with_a_loss_of_six() -> None:
    batch = Batch()

    def step(dpo_loss: Any) -> Triple:
        model_output: dict[str, Tensor] = {}
        losses, chosen_rewards, rejected_rewards = dpo_loss(*batch.policy(), *batch.references, "sigmoid", model_output)
        return losses.mean(), chosen_rewards, rejected_rewards

    with pytest.raises(TypeError, match="positional arguments"):
        step(spo_kernels.spo_loss)
    batch.check(step(lambda *arguments: spo_kernels.spo_loss(*arguments[:4])))


@row("TRL 0.29.1, 1.16.0")
def trl_without_a_loss_to_replace() -> None:
    batch = Batch()

    class DPOTrainer:
        """The loss is written out inside one private method."""

        def _compute_loss(self) -> Tensor:
            (chosen, rejected), (ref_chosen, ref_rejected) = batch.policy(), batch.references
            return -F.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()

    def refuse(*arguments: Any, **options: Any) -> Triple:
        raise AssertionError("the trainer has no place that calls this")

    trainer: Any = DPOTrainer()
    trainer.dpo_loss = trainer.get_batch_logps = refuse
    losses, _, _ = spo_kernels.preference_loss("dpo", *batch.policy(), *batch.references, beta=0.1)
    torch.testing.assert_close(trainer._compute_loss(), losses.mean())


@row("LLaMA-Factory 0.9.5, 0.9.6.dev0 ff6d4d1")
def llama_factory() -> None:
    def step(batch: Batch, get_batch_logps: Any, compute_preference_loss: Any, nll: float = 0.0, **options: Any) -> Any:
        logps, valid_length = get_batch_logps(logits=batch.logits.float(), labels=batch.labels, **options)
        chosen, rejected = logps.split(batch.pairs, dim=0)
        chosen_length, _ = valid_length.split(batch.pairs, dim=0)
        losses, chosen_rewards, rejected_rewards = compute_preference_loss(chosen, rejected, *batch.references)
        if nll:
            losses += nll * -chosen / chosen_length
        return losses.mean(), chosen_rewards, rejected_rewards

    batch = Batch()
    with pytest.raises(TypeError, match="ld_alpha"):
        step(batch, spo_kernels.get_batch_logps, spo_kernels.spo_loss, ld_alpha=None)
    with pytest.raises(ValueError, match="too many values to unpack"):
        step(batch, spo_kernels.get_batch_logps, spo_kernels.spo_loss)
    # The two log-probs of one pair unpack as log-probs and lengths, without an error.
    one = Batch(pairs=1)
    logps, valid_length = spo_kernels.get_batch_logps(one.logits, one.labels)
    torch.testing.assert_close((logps, valid_length), (one.policy()[0][0], one.policy()[1][0]))

    def get_batch_logps(logits: Tensor, labels: Tensor, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
        assert ld_alpha is None
        return spo_kernels.get_batch_logps(logits, labels), counts(labels)

    batch.check(step(batch, get_batch_logps, spo_kernels.spo_loss, ld_alpha=None))
    loss, _, _ = step(batch, get_batch_logps, spo_kernels.spo_loss, nll=0.5, ld_alpha=None)
    chosen_mean = batch.policy()[0] / counts(batch.labels)[: batch.pairs]
    torch.testing.assert_close(loss, batch.spo()[0] - 0.5 * chosen_mean.mean())


@row("OpenRLHF 0.11.0, 0.11.2")
def openrlhf() -> None:
    def step(batch: Batch, loss_fn: Any) -> Triple:
        preference_loss, chosen_reward, reject_reward = loss_fn(*batch.policy(), *batch.references)
        loss = preference_loss + 0 * 0.01
        loss.backward(retain_graph=True)
        return loss, chosen_reward, reject_reward

    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        step(Batch(), spo_kernels.spo_loss)
    step(Batch(pairs=1), spo_kernels.spo_loss)  # backward takes a loss [1] for a scalar

    def loss_fn(*arguments: Tensor) -> Triple:
        losses, chosen_rewards, rejected_rewards = spo_kernels.spo_loss(*arguments)
        return losses.mean(), chosen_rewards, rejected_rewards

    batch = Batch()
    batch.check(step(batch, loss_fn))


@row("torchtune 0.6.1")
def torchtune() -> None:
    batch = Batch()

    def step(get_batch_log_probs: Any, loss_fn: Any, **full_recipe: Any) -> Triple:
        chosen, rejected = batch.split(get_batch_log_probs(batch.logits, batch.labels, **full_recipe))
        loss, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, *batch.references)
        return loss.mean(), chosen_rewards, rejected_rewards

    batch.check(step(spo_kernels.get_batch_logps, spo_kernels.spo_loss))
    with pytest.raises(TypeError, match="return_average_logprobs"):
        step(spo_kernels.get_batch_logps, spo_kernels.spo_loss, return_average_logprobs=False)


@row("NeMo-RL 0.6.0, 0.7.0, 7ea279a")
def nemo_rl() -> None:
    """Pairs are interleaved, masked a sample at a time, and the sum is divided by the count over all ranks."""
    batch = Batch()
    interleaved = torch.arange(2 * batch.pairs).view(2, -1).T.flatten()
    data = {"token_mask": (batch.labels != -100)[interleaved], "sample_mask": torch.tensor([1.0, 1, 0, 0, 1, 1])}

    def step(loss_fn: Any) -> tuple[Tensor, dict[str, float]]:
        return loss_fn(batch.token_logps()[interleaved], data, torch.tensor(4), torch.tensor(9))

    with pytest.raises(ValueError, match=r"policy_chosen_logps must be \[P\], got \[6, 6\]"):
        step(spo_kernels.spo_loss)

    loss, metrics = step(SPOLossFn(center=False))
    chosen, rejected = batch.policy()
    expected = (-F.logsigmoid(ALPHA * (chosen - rejected)) / ALPHA)[[0, 2]].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch.gradient(loss), batch.gradient(expected), rtol=1e-5, atol=1e-6)
    assert metrics["loss"] == loss.item()


@row("verl 0.8.0.dev, b178a3c")
def verl() -> None:
    def step(loss: Any) -> tuple[Tensor, dict[str, float]]:
        return loss(config=None, model_output={"log_probs": torch.zeros(2, 3)}, data={}, dp_group=None)

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        step(spo_kernels.spo_loss)


@row("Liger 0.8.5, `LigerFusedLinearDPOLoss`")
def liger() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 6, generator=generator), torch.randn(9, 6, generator=generator)
    target = torch.randint(9, (4, 5), generator=generator)

    def step(loss: Any) -> tuple[Tensor, Any]:
        return loss(weight, hidden, target, None)

    with pytest.raises(ValueError, match=r"weight must be .*got \[4, 5, 6\]"):
        step(spo_kernels.LinearSPOLoss())
    loss, _ = step(
        lambda lin_weight, _input, target, bias: spo_kernels.LinearSPOLoss()(_input, lin_weight, target, bias)
    )
    picked = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(loss, (-F.logsigmoid(ALPHA * (picked[:2] - picked[2:])) / ALPHA).mean())


@row("transformers 5.24.0, `Trainer`")
def transformers_trainer() -> None:
    """Two micro-batches: the Trainer takes the loss of a compute_loss_func as divided by their number already."""
    batches = [Batch(pairs=2), Batch(pairs=3)]

    def gradients(compute_loss_func: Any) -> list[Tensor]:
        return [
            batch.gradient(compute_loss_func(batch.logits, batch.labels, num_items_in_batch=40)) for batch in batches
        ]

    def compute_loss_func(logits: Tensor, labels: Tensor, num_items_in_batch: int | None = None) -> Tensor:
        chosen, rejected = spo_kernels.get_batch_logps(logits, labels).chunk(2)
        losses, _, _ = spo_kernels.spo_loss(chosen, rejected)
        return losses.mean()

    def divided(*arguments: Any, **options: Any) -> Tensor:
        return compute_loss_func(*arguments, **options) / len(batches)

    expected = [batch.gradient(batch.spo()[0] / len(batches)) for batch in batches]
    torch.testing.assert_close(gradients(divided), expected, rtol=1e-5, atol=1e-6)
    twice = [2 * gradient for gradient in expected]
    torch.testing.assert_close(gradients(compute_loss_func), twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]()


def test_every_row_of_the_readme_has_a_test() -> None:
    section = README.read_text().split("\n## Drop in\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (.+?) \|", section, flags=re.MULTILINE)
    assert table[0] == "project, version" and set(table[1]) == {"-"}
    assert table[2:] == list(ROWS)
