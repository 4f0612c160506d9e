"""The rows of `LOSSES` that TRL 1.16 has, against TRL's own code: a batch of log-probs goes in, without a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL, see the extra [trl]")
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from spo_kernels import preference_loss

P, T = 6, 40


class Batch:
    """Per-token log-probs [2P, T + 1], chosen first, and their sums; the first token has none."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        noise = lambda: torch.randn(2 * P, T + 1, generator=g, dtype=torch.float64)  # noqa: E731
        self.lengths = torch.randint(10, T, (2 * P,), generator=g)
        mask = torch.arange(T + 1) < 1 + self.lengths[:, None]
        mask[:, 0] = False
        self.mask = mask.long()
        self.token_logps = (-noise().abs() * mask).requires_grad_()
        self.logps = self.token_logps[:, 1:].sum(1).chunk(2)
        self.references = (self.logps[0].detach() + noise()[:P, 0], self.logps[1].detach() + noise()[:P, 0])

    def of_trl(self, loss_type: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
        """DPOTrainer's loss of these log-probs."""
        outputs = SimpleNamespace(
            log_probs=self.token_logps,
            entropy=torch.zeros(2 * P, T + 1),
            mean_logits=torch.zeros(2 * P, T + 1),
            is_top1=torch.zeros(2 * P, T + 1, dtype=torch.bool),
        )
        accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
        trainer: Any = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=accelerator,
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {
            "input_ids": torch.zeros(2 * P, T + 1, dtype=torch.int64),
            "attention_mask": self.mask,
            "completion_mask": self.mask,
            "ref_chosen_logps": self.references[0],
            "ref_rejected_logps": self.references[1],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("name", "options", "of_trl"),
    [
        ("dpo", {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("ipo", {"tau": 0.2}, {"loss_type": "ipo", "beta": 0.2}),
        ("rdpo", {"beta": 0.3, "flip": 0.2}, {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2}),
        ("rso", {"gamma": 0.4}, {"loss_type": "hinge", "beta": 0.4}),
        ("apo_zero", {"beta": 0.3}, {"loss_type": "apo_zero", "beta": 0.3}),
    ],
)
def test_dpo_trainer(name: str, options: dict[str, float], of_trl: dict[str, Any]) -> None:
    batch = Batch()
    lengths = {"lengths": batch.lengths.chunk(2)} if name == "ipo" else {}
    ours = preference_loss(name, *batch.logps, *batch.references, **options, **lengths, reduction="mean")[0]
    theirs = batch.of_trl(**of_trl)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(x, batch.token_logps)[0] for x in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


def of_cpo(**settings: Any) -> Any:
    accelerator = SimpleNamespace(device="cpu")
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "loss_type": "sigmoid", "accelerator": accelerator}
    return SimpleNamespace(**defaults | settings)


def test_cpo_trainer() -> None:
    """TRL adds the NLL of all chosen tokens outside of its `cpo_loss`."""
    batch = Batch()
    theirs, *rewards = CPOTrainer.cpo_loss(of_cpo(beta=0.3), *batch.logps)
    nll = torch.nn.functional.cross_entropy  # takes logits; over one label its NLL is that of the log-prob
    chosen = batch.mask[:P].bool()
    picked = batch.token_logps[:P][chosen].exp()
    logits = torch.stack((picked, 1 - picked), 1).log()
    theirs = theirs + 0.7 * nll(logits, torch.zeros(len(logits), dtype=torch.int64))
    ours = preference_loss("cpo", *batch.logps, beta=0.3, nll_weight=0.7, lengths=batch.lengths.chunk(2))
    for got, wanted in zip(ours, (theirs, *rewards), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_simpo() -> None:
    batch = Batch()
    lengths = batch.lengths.chunk(2)
    averages = [logps / n for logps, n in zip(batch.logps, lengths, strict=True)]
    theirs = CPOTrainer.cpo_loss(of_cpo(beta=2.5, simpo_gamma=0.8, loss_type="simpo"), *averages)
    ours = preference_loss("simpo", *batch.logps, beta=2.5, gamma=0.8, lengths=lengths)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_orpo_trainer() -> None:
    """TRL returns beta log sigmoid(log odds), in float32, and adds the NLL elsewhere."""
    batch = Batch()
    lengths = batch.lengths.chunk(2)
    averages = [logps / n for logps, n in zip(batch.logps, lengths, strict=True)]
    trainer: Any = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs, *rewards = ORPOTrainer.odds_ratio_loss(trainer, *averages)[:3]
    ours = preference_loss("orpo", *batch.logps, beta=0.3, lengths=lengths)
    torch.testing.assert_close(ours[0] + averages[0], -theirs.double(), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(ours[1:], rewards, strict=True):
        torch.testing.assert_close(got, wanted.double(), rtol=1e-6, atol=1e-6)
