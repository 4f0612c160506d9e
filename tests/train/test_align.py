from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spo_train.align import Aligner
from spo_train.checkpoint import CheckpointError, load_checkpoint
from spo_train.config import AlignConfig
from spo_train.errors import NonFiniteLossError, RunInterruptedError
from spo_train.files import CHECKPOINT_FILE, EVALUATIONS_FILE, METRICS_FILE
from spo_train.models.llama import Llama
from spo_train.pair_data import BatchOrder, PairDataset
from spo_train.protocol import IGNORE_INDEX, Sequences
from spo_train.run import run

SMALL = {"batch_size": 4, "kl_samples": 6, "kl_every": 4, "warmup_steps": 3, "lr": 1e-3, "steps": 14}
SPO = SMALL | {"method": "spo", "alpha": 0.3, "beta": 0.05, "gamma": 0.2}
DPO = SMALL | {"method": "dpo", "beta": 0.2}
TIMES = {"seconds", "seconds_preference", "seconds_sampling", "seconds_kl", "tokens_per_second"}


@pytest.fixture
def make_aligner(make_model: Callable[..., Llama], pairs: PairDataset) -> Callable[..., Aligner]:
    def make(dtype: torch.dtype = torch.float32, **settings: Any) -> Aligner:
        # The reference differs from the policy, so that neither KL nor the reference's log-probs drop out.
        return Aligner(make_model(0, dtype), make_model(1, dtype), pairs, AlignConfig(**settings))

    return make


def plain_logps(model: Llama, batch: Sequences) -> torch.Tensor:
    labels = batch.labels()
    log_probs = F.log_softmax(model(batch.tokens[:, :-1]), -1)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORE_INDEX, 0, picked).sum(1)


def chi_square(logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A regularizer of a user: the chi-square divergence of each sequence."""
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return ((p - q).square() / q).sum(-1).where(mask, 0).sum(-1)


def wrong_shape(logits: torch.Tensor, ref_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return chi_square(logits, ref_logits, mask).mean()


def plain_divergence(log_p: torch.Tensor, log_q: torch.Tensor, regularizer: str) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    if regularizer == "reverse-kl":
        return (q * (log_q - log_p)).sum()
    if regularizer == "jsd":
        return (p * (log_p - log_m) + q * (log_q - log_m)).sum() / 2
    if regularizer == "kl":
        return (p * (log_p - log_q)).sum()
    return ((p - q).square() / q).sum()


def plain_kl(policy: Llama, reference: Llama, samples: Sequences, regularizer: str = "kl") -> torch.Tensor:
    p = F.log_softmax(policy(samples.tokens[:, :-1]), -1)
    q = F.log_softmax(reference(samples.tokens[:, :-1]), -1)
    total = torch.zeros((), dtype=p.dtype)
    for row in range(len(samples)):
        # Rows that predict the response: from the prompt's last token to the one before the response's last.
        rows = slice(int(samples.prompt_lens[row]) - 1, int(samples.lengths[row]) - 1)
        total = total + plain_divergence(p[row, rows], q[row, rows], regularizer)
    return total / len(samples)


def capture_gradient(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Do one update whose optimizer step is a no-op; return the gradients, after clipping."""
    monkeypatch.setattr(aligner._optimizer, "step", lambda: None)
    aligner.update()
    return [parameter.grad for parameter in aligner.policy.parameters()]


def plain_objective(aligner: Aligner, step: int) -> torch.Tensor:
    config, policy, reference = aligner.config, aligner.policy, aligner.reference
    batch = aligner.pairs.batch(BatchOrder(len(aligner.pairs), config.batch_size, config.seed).indices(step))
    chosen, rejected = plain_logps(policy, batch).chunk(2)
    if config.method == "dpo":
        with torch.no_grad():
            ref_chosen, ref_rejected = plain_logps(reference, batch).chunk(2)
        return -F.logsigmoid(config.effective_beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
    mu = torch.ones_like(chosen)
    if config.weight == "soft":
        importance = config.gamma * torch.logaddexp(chosen, rejected).detach()
        mu = torch.sigmoid(importance - importance.mean())
    if config.alpha > 0:
        preference = -mu * F.logsigmoid(config.alpha * (chosen - rejected)) / config.alpha
    else:
        preference = -mu * (chosen - rejected) / 2
    samples = aligner._kl_batch.samples
    return preference.mean() + config.effective_beta * plain_kl(policy, reference, samples, config.regularizer)


@pytest.mark.parametrize(
    "settings",
    [
        SPO,
        SPO | {"weight": "uniform"},
        SPO | {"alpha": 0.0},
        SPO | {"regularizer": "reverse-kl"},
        SPO | {"regularizer": "jsd"},
        SPO | {"regularizer": "own:chi_square"},
        DPO,
    ],
    ids=["spo", "spo-uniform", "spo-alpha0", "spo-reverse-kl", "spo-jsd", "spo-function", "dpo"],
)
def test_gradient_is_that_of_the_plain_formula(
    make_aligner: Callable[..., Aligner], monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    aligner = make_aligner(torch.float64, **settings | {"clip": 1e9})
    got = capture_gradient(aligner, monkeypatch)
    expected = torch.autograd.grad(plain_objective(aligner, 0), list(aligner.policy.parameters()))
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [SPO, DPO], ids=["spo", "dpo"])
def test_metrics_are_those_of_the_batch(make_aligner: Callable[..., Aligner], settings: dict) -> None:
    aligner = make_aligner(torch.float64, **settings)
    record = aligner.update()
    fresh = make_aligner(torch.float64, **settings)
    fresh._kl_batch = aligner._kl_batch
    objective = plain_objective(fresh, 0).item()
    batch = fresh.pairs.batch(BatchOrder(len(fresh.pairs), 4, 0).indices(0))
    with torch.no_grad():
        chosen, rejected = plain_logps(fresh.policy, batch).chunk(2)
        ref_chosen, ref_rejected = plain_logps(fresh.reference, batch).chunk(2)
    margins = chosen - rejected
    if settings["method"] == "dpo":
        margins = margins - (ref_chosen - ref_rejected)
        assert record["kl"] is None
        assert record["seconds_sampling"] == 0
    else:
        kl = plain_kl(fresh.policy, fresh.reference, aligner._kl_batch.samples).item()
        assert record["kl"] == pytest.approx(kl, rel=1e-9)
        assert kl > 0
    assert record["step"] == 1
    assert record["loss"] == pytest.approx(objective, rel=1e-9)
    assert record["margin"] == pytest.approx(margins.mean().item(), rel=1e-9)
    assert record["accuracy"] == (margins > 0).double().mean().item()
    assert record["logp_chosen"] == pytest.approx(chosen.mean().item(), rel=1e-9)
    assert record["lr"] == pytest.approx(1e-3 / 3)
    json.dumps(record)


def test_gradient_is_clipped_and_its_norm_reported(
    make_aligner: Callable[..., Aligner], monkeypatch: pytest.MonkeyPatch
) -> None:
    aligner = make_aligner(**SPO | {"clip": 0.01})
    records = []
    update = aligner.update
    monkeypatch.setattr(aligner, "update", lambda: records.append(update()))
    gradients = capture_gradient(aligner, monkeypatch)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert records[0]["grad_norm"] > 0.1


def test_warm_up_is_linear_then_constant(make_aligner: Callable[..., Aligner]) -> None:
    aligner = make_aligner(**DPO)
    rates = [aligner.update()["lr"] for _ in range(5)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])
    assert make_aligner(**DPO | {"warmup_steps": 0}).update()["lr"] == 1e-3


def test_kl_samples_are_drawn_every_k_steps_and_kept_between(make_aligner: Callable[..., Aligner]) -> None:
    aligner = make_aligner(**SPO)
    drawn = []
    for _ in range(9):
        aligner.update()
        drawn.append(aligner._kl_batch)
    refreshes = [step for step in range(9) if step == 0 or drawn[step] is not drawn[step - 1]]
    assert refreshes == [0, 4, 8]
    assert len(drawn[0].samples) == 6
    assert not torch.equal(drawn[0].samples.tokens, drawn[4].samples.tokens)


def test_beta_zero_means_no_sampling(make_aligner: Callable[..., Aligner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "sample", None)
    record = make_aligner(**SPO | {"beta": 0.0}).update()
    assert record["kl"] is None
    assert record["loss"] == record["preference_loss"]


def test_kl_prompts_are_those_of_the_data(make_aligner: Callable[..., Aligner], pairs: PairDataset) -> None:
    aligner = make_aligner(**SPO | {"kl_samples": len(pairs)})
    aligner.update()
    samples = aligner._kl_batch.samples
    drawn = sorted(samples.tokens[row, 1 : samples.prompt_lens[row]].tolist() for row in range(len(samples)))
    assert drawn == sorted(pairs.prompts(range(len(pairs))))
    assert [] in drawn
    assert drawn[-1] != []


def test_reference_is_left_alone(make_aligner: Callable[..., Aligner]) -> None:
    for settings in (SPO, DPO):
        aligner = make_aligner(**settings)
        before = {name: tensor.clone() for name, tensor in aligner.reference.state_dict().items()}
        aligner.update()
        assert all(parameter.grad is None for parameter in aligner.reference.parameters())
        for name, tensor in aligner.reference.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_policy_equal_to_its_reference_has_no_kl(make_model: Callable[..., Llama], pairs: PairDataset) -> None:
    aligner = Aligner(make_model(0), make_model(0), pairs, AlignConfig(**SPO))
    assert aligner.update()["kl"] == 0.0
    assert aligner.update()["kl"] > 0.0


def lines(path: Path, *, ignore: set[str] = TIMES) -> list[dict]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in ignore}
        for line in path.read_text().splitlines()
    ]


class KilledError(Exception):
    pass


def kill_after(aligner: Aligner, step: int) -> None:
    """Let `aligner` die in the middle of the step after `step`, without saving anything, as by SIGKILL."""
    update = aligner.update

    def dying() -> dict:
        if aligner.step == step:
            aligner.policy.embedding.weight.data.zero_()
            raise KilledError
        return update()

    aligner.update = dying


# With a checkpoint every 5 steps and KL samples every 4, the run dies after step 7 and goes on from step 5, between two
# draws.
@pytest.mark.parametrize(
    "settings",
    [
        SPO | {"normalizer": "ema"},
        SPO | {"weight": "uniform"},
        DPO,
    ],
    ids=["spo-ema", "spo-uniform", "dpo"],
)
def test_resume_is_exact(make_aligner: Callable[..., Aligner], tmp_path: Path, settings: dict) -> None:
    def evaluate(step: int) -> dict:
        return {"value": 10 * step}

    options = {"checkpoint_every": 5, "evaluate_every": 3, "evaluate": evaluate}
    torch.manual_seed(99)
    whole = make_aligner(**settings)
    run(whole, tmp_path / "whole", **options)

    torch.manual_seed(99)
    first = make_aligner(**settings)
    kill_after(first, 7)
    with pytest.raises(KilledError):
        run(first, tmp_path / "killed", **options)
    with open(tmp_path / "killed" / METRICS_FILE, "a") as file:
        file.write('{"step": 8, "lo')
    torch.manual_seed(12345)
    torch.rand(7)
    second = make_aligner(**settings)
    run(second, tmp_path / "killed", resume=True, **options)

    for name in (METRICS_FILE, EVALUATIONS_FILE):
        assert lines(tmp_path / "killed" / name) == lines(tmp_path / "whole" / name)
    assert [record["step"] for record in lines(tmp_path / "whole" / METRICS_FILE)] == list(range(1, 15))
    assert [record["step"] for record in lines(tmp_path / "whole" / EVALUATIONS_FILE)] == [0, 3, 6, 9, 12, 14]
    tensors = [load_checkpoint(tmp_path / name / CHECKPOINT_FILE)[0] for name in ("whole", "killed")]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0, atol=0, equal_nan=True)
    for mine, other in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_resume_needs_the_running_average(make_aligner: Callable[..., Aligner], tmp_path: Path) -> None:
    """The running average changes the loss, so `test_resume_is_exact` fails if a checkpoint lacks the average."""
    aligner = make_aligner(**SPO | {"normalizer": "ema", "steps": 5})
    run(aligner, tmp_path)
    resumed, forgetful = (make_aligner(**SPO | {"normalizer": "ema", "steps": 8}) for _ in range(2))
    for other in (resumed, forgetful):
        other.restore(tmp_path / CHECKPOINT_FILE)
    forgetful.importance.running_mean += 1
    assert resumed.update()["loss"] != forgetful.update()["loss"]


def test_steps_may_grow_and_a_finished_run_stays(make_aligner: Callable[..., Aligner], tmp_path: Path) -> None:
    run(make_aligner(**SPO | {"steps": 6}), tmp_path / "grown")
    run(make_aligner(**SPO | {"steps": 9}), tmp_path / "grown", resume=True)
    run(make_aligner(**SPO | {"steps": 9}), tmp_path / "whole")
    assert lines(tmp_path / "grown" / METRICS_FILE) == lines(tmp_path / "whole" / METRICS_FILE)
    before = (tmp_path / "whole" / METRICS_FILE).read_bytes()
    run(make_aligner(**SPO | {"steps": 9}), tmp_path / "whole", resume=True)
    assert (tmp_path / "whole" / METRICS_FILE).read_bytes() == before


def test_a_run_is_not_overwritten(make_aligner: Callable[..., Aligner], tmp_path: Path) -> None:
    run(make_aligner(**DPO | {"steps": 2}), tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(make_aligner(**DPO | {"steps": 2}), tmp_path)


def test_resume_with_anything_else_is_refused(
    make_aligner: Callable[..., Aligner], make_model: Callable[..., Llama], pairs: PairDataset, tmp_path: Path
) -> None:
    run(make_aligner(**SPO | {"steps": 2}), tmp_path)
    checkpoint = tmp_path / CHECKPOINT_FILE
    with pytest.raises(ValueError, match=r"belongs to another run \(alpha was 0\.3, is 0\.4\)"):
        make_aligner(**SPO | {"alpha": 0.4}).restore(checkpoint)
    fewer = PairDataset([([5], [6, 2], [7, 2])], bos_id=1, pad_id=3)
    with pytest.raises(ValueError, match=r"data was \d+, is \d+"):
        Aligner(make_model(), make_model(), fewer, AlignConfig(**SPO)).restore(checkpoint)
    wider = make_aligner(**SPO)
    wider.policy.embedding = torch.nn.Embedding(wider.policy.vocab_size, 40)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        wider.restore(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read"):
        run(make_aligner(**SPO), tmp_path, resume=True)


@pytest.mark.parametrize("settings", [SPO, DPO], ids=["spo", "dpo"])
def test_nan_stops_before_the_update(make_aligner: Callable[..., Aligner], tmp_path: Path, settings: dict) -> None:
    aligner = make_aligner(**settings)
    clean, calls = aligner.policy.forward, []

    def poisoned(tokens: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        logits = clean(tokens)
        return logits * math.nan if aligner.step == 6 and len(calls) > 6 else logits

    aligner.policy.forward = poisoned
    with pytest.raises(NonFiniteLossError, match=r"step 7: preference loss is nan"):
        run(aligner, tmp_path, checkpoint_every=3)
    assert all(parameter.isfinite().all() for parameter in aligner.policy.parameters())
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE)[1]["step"] == 6
    assert len(lines(tmp_path / METRICS_FILE)) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(
    make_aligner: Callable[..., Aligner], tmp_path: Path, number: signal.Signals
) -> None:
    aligner, update = make_aligner(**DPO), None
    handler = signal.getsignal(number)
    update = aligner.update

    def signalled() -> dict:
        if aligner.step == 3:
            os.kill(os.getpid(), number)
        return update()

    aligner.update = signalled
    with pytest.raises(RunInterruptedError, match="after step 4"):
        run(aligner, tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE)[1]["step"] == 4
    assert signal.getsignal(number) is handler


def test_full_disk_while_writing_a_checkpoint(
    make_aligner: Callable[..., Aligner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligner = make_aligner(**DPO)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fill_the_disk(step: int) -> dict:
        if step == 6:
            monkeypatch.setattr("spo_train.checkpoint.write_atomically", full)
        return {}

    with pytest.raises(CheckpointError, match="No space left on device; the previous checkpoint is untouched"):
        run(aligner, tmp_path, checkpoint_every=4, evaluate_every=3, evaluate=fill_the_disk)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE)[1]["step"] == 4
    resumed = make_aligner(**DPO)
    run(resumed, tmp_path, resume=True)
    assert len(lines(tmp_path / METRICS_FILE)) == DPO["steps"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0 and finite, got -1.0"),
        ({"alpha": math.nan}, "alpha must be at least 0 and finite, got nan"),
        ({"alpha": math.inf}, "alpha must be at least 0 and finite, got inf"),
        ({"gamma": -0.1}, "gamma must be"),
        ({"beta": -0.1}, "beta must be"),
        ({"method": "dpo", "beta": 0.0}, "beta must be positive for dpo"),
        ({"method": "ppo"}, "method must be one of spo, dpo, got 'ppo'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"steps": 0}, "steps must be positive"),
        ({"kl_every": 0}, "kl_every must be positive"),
        ({"beta2": 1.0}, "beta2 must be in"),
        ({"weight": "hard"}, "weight must be one of uniform, soft"),
        ({"regularizer": "tv"}, "regularizer must be kl, reverse-kl, jsd or module:function, got 'tv'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**settings)


def test_a_regularizer_that_cannot_be_used_is_named(
    make_aligner: Callable[..., Aligner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    message = 'regularizer must be "kl", "reverse-kl", "jsd" or an importable "module:function", got \'own:nothing\''
    with pytest.raises(ValueError, match=message):
        make_aligner(**SPO | {"regularizer": "own:nothing"})
    with pytest.raises(ValueError, match=r"regularizer own:wrong_shape must return a Tensor \[6\], got \[\]"):
        make_aligner(**SPO | {"regularizer": "own:wrong_shape"}).update()


def test_beta_defaults_to_the_methods() -> None:
    assert (AlignConfig(method="spo").effective_beta, AlignConfig(method="dpo").effective_beta) == (0.03, 0.1)


def test_models_of_different_vocabularies_are_refused(make_model: Callable[..., Llama], pairs: PairDataset) -> None:
    reference = make_model()
    reference.vocab_size += 1
    with pytest.raises(ValueError, match="same vocabulary"):
        Aligner(make_model(), reference, pairs, AlignConfig())
