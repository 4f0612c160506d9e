"""Settings of alignment and evaluation, with their help texts; free of torch so that `--help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

DEFAULT_BETA = {"spo": 0.03, "dpo": 0.1}
WEIGHTS = ("uniform", "soft")
NORMALIZERS = ("batch", "ema")


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field whose help text, and choices, the command line shows."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """How to align: objective, optimizer and schedule. Log-probabilities and KL are sums over tokens, in nats.

    With L_w, L_l the log-probabilities of the chosen and the rejected response, SPO minimizes, on average over pairs,

        -(mu / alpha) log sigmoid(alpha (L_w - L_l)) + beta KL(pi || pi_ref)            (eq. 8; eq. 9 for alpha = 0)

    and DPO `-log sigmoid(beta ((L_w - ref_w) - (L_l - ref_l)))` (eq. 4).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    method: str = setting("spo", "Preference objective: SPO (eq. 5) or DPO (eq. 4).", choices=tuple(DEFAULT_BETA))
    alpha: float = setting(
        0.1,
        "SPO's exponent in -(mu/alpha) log sigmoid(alpha (L_w - L_l)) (eq. 8); larger keeps the model's entropy higher."
        " 0 takes the linear loss -(mu/2) (L_w - L_l) (eq. 9).",
    )
    beta: float = setting(
        None,
        "SPO: factor of KL(pi || pi_ref), nats a sequence, in the objective (eq. 5). DPO: its beta (eq. 4)."
        " [default: 0.03 for spo, 0.1 for dpo]",
    )
    weight: str = setting(
        "soft",
        "SPO's weight mu of a pair: 1 (uniform), or sigmoid(gamma log(pi(y_w) + pi(y_l)) - normalizer) (soft, eq. 24).",
        choices=WEIGHTS,
    )
    gamma: float = setting(0.1, "gamma of the soft weight (eq. 24).")
    normalizer: str = setting(
        "batch",
        "Normalizer of the soft weight: mean of gamma log(pi(y_w) + pi(y_l)) over the batch, or a running average.",
        choices=NORMALIZERS,
    )
    kl_samples: int = setting(32, "Sequences drawn from the model for the KL estimate of SPO (Appendix B).")
    kl_every: int = setting(8, "Steps between two draws of KL sequences (k in Appendix B).")
    steps: int = setting(300, "Optimizer steps in all.")
    batch_size: int = setting(16, "Pairs a step.")
    lr: float = setting(1e-4, "AdamW's learning rate after warm-up.")
    warmup_steps: int = setting(60, "Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    beta1: float = setting(0.9, "AdamW's decay of the gradient's running mean.")
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient's running mean.")
    clip: float = setting(1.0, "Largest norm of the gradient; it is scaled down to that.")
    seed: int = setting(0, "Seed of the order of pairs and of the sampling.")

    def __post_init__(self) -> None:
        for setting_field in fields(self):
            choices = setting_field.metadata["choices"]
            value = getattr(self, setting_field.name)
            if choices and value not in choices:
                raise ValueError(f"{setting_field.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.beta is None:
            object.__setattr__(self, "beta", DEFAULT_BETA[self.method])
        for name in ("alpha", "beta", "gamma", "weight_decay", "warmup_steps", "seed"):
            _check(self, name, "at least 0", getattr(self, name) >= 0)
        for name in ("lr", "clip", "kl_samples", "kl_every", "steps", "batch_size"):
            _check(self, name, "positive", getattr(self, name) > 0)
        for name in ("beta1", "beta2"):
            _check(self, name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        if self.method == "dpo":
            _check(self, "beta", "positive for dpo", self.beta > 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How to compare a model with the reference by sampling from both.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    samples: int = setting(256, "Texts sampled from the model.")
    reference_samples: int = setting(512, "Texts sampled from the reference, once.")
    batch_size: int = setting(256, "Texts sampled at a time.")
    temperature: float = setting(1.0, "Sampling temperature, for model and reference alike.")
    seed: int = setting(1000, "Seed of the sampling.")

    def __post_init__(self) -> None:
        for name in ("samples", "reference_samples"):
            _check(self, name, "at least 2", getattr(self, name) >= 2)
        for name in ("batch_size", "temperature"):
            _check(self, name, "positive", getattr(self, name) > 0)
        _check(self, "seed", "at least 0", self.seed >= 0)


def _check(config: object, name: str, must_be: str, holds: bool) -> None:
    value = getattr(config, name)
    # NaN fails every comparison above; infinity passes some.
    if not holds or not math.isfinite(value):
        raise ValueError(f"{name} must be {must_be} and finite, got {value}")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; everything else is fixed (see `spo_train.toy.demo`).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    pairs: int = setting(2500, "Pairs sampled and judged; about a sixth passes the filter, re-paired samples add more.")
    steps: int = setting(200, "Optimizer steps of each of the three alignments.")
    warmup_steps: int = setting(60, "Steps over which the learning rate rises linearly from 0.")
    batch_size: int = setting(16, "Pairs a step.")
    evaluate_every: int = setting(50, "Steps between two evaluations.")
    samples: int = setting(192, "Stories sampled at an evaluation.")
    reference_samples: int = setting(512, "Stories of the reference that they are compared with.")
    seed: int = setting(0, "Seed of pairs, alignments and evaluations.")

    def __post_init__(self) -> None:
        for name in ("pairs", "steps", "batch_size", "evaluate_every"):
            _check(self, name, "positive", getattr(self, name) > 0)
        for name in ("samples", "reference_samples"):
            _check(self, name, "at least 2", getattr(self, name) >= 2)
        for name in ("warmup_steps", "seed"):
            _check(self, name, "at least 0", getattr(self, name) >= 0)


QUICK_DEMO = DemoConfig(
    pairs=150, steps=16, warmup_steps=4, batch_size=8, evaluate_every=8, samples=48, reference_samples=64
)
