"""Settings of every command, with their help texts and ranges; free of torch so that `--help` answers at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DEFAULT_BETA = {"spo": 0.03, "dpo": 0.1}
WEIGHTS = ("uniform", "soft")
NORMALIZERS = ("batch", "ema")

# Ranges of numbers with their tests. A number must also be finite.
RANGES: dict[str, Callable[[float], bool]] = {
    "a number": lambda value: True,
    "at least 0": lambda value: value >= 0,
    "at least 2": lambda value: value >= 2,
    "positive": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}


def setting(
    default: Any,
    must_be: str | tuple[str, ...],
    help: str,
    *,
    default_text: str | None = None,
    earlier_name: str | None = None,
) -> Any:
    """Return a dataclass field that the command line shows and `Settings` checks.

    Args:
        default: the field's default; None if another setting or the model decides.
        must_be: one of `RANGES`, or the strings to choose from.
        help: the text of `--help`.
        default_text: how `--help` shows the default, if not by its value.
        earlier_name: the setting's name in earlier versions, whose options and checkpoints still work.
    """
    text = str(default) if default_text is None else default_text
    return field(
        default=default, metadata={"help": help, "must_be": must_be, "default": text, "earlier_name": earlier_name}
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the settings, whose fields are made by `setting`.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    def __post_init__(self) -> None:
        for own in fields(self):
            value, must_be = getattr(self, own.name), own.metadata["must_be"]
            if isinstance(must_be, tuple):
                if value not in must_be:
                    raise ValueError(f"{own.name} must be one of {', '.join(must_be)}, got {value!r}")
            elif value is not None and not (RANGES[must_be](value) and math.isfinite(value)):
                raise ValueError(f"{own.name} must be {must_be} and finite, got {value}")

    def record(self) -> dict[str, Any]:
        """Return the settings as files keep them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Settings):
    """How to align: objective, optimizer and schedule. Log-probabilities and KL are sums over tokens, in nats.

    L_w and L_l are the log-probabilities of the chosen and the rejected response. SPO minimizes, on average over pairs,

        -(mu / alpha) log sigmoid(alpha (L_w - L_l)) + beta KL(pi || pi_ref)            (eq. 8; eq. 9 for alpha = 0)

    and DPO `-log sigmoid(beta ((L_w - ref_w) - (L_l - ref_l)))` (eq. 4).
    """

    method: str = setting("spo", tuple(DEFAULT_BETA), "Preference objective: SPO (eq. 5) or DPO (eq. 4).")
    alpha: float = setting(
        0.1,
        "at least 0",
        "SPO's alpha in -(mu/alpha) log sigmoid(alpha (L_w - L_l)) (eq. 8); larger keeps the model's entropy higher."
        " 0 takes the linear loss -(mu/2) (L_w - L_l) (eq. 9).",
    )
    beta: float | None = setting(
        None,
        "at least 0",
        "SPO: factor of KL(pi || pi_ref), nats a sequence, in the objective (eq. 5). DPO: its beta (eq. 4).",
        default_text=", ".join(f"{beta} for {method}" for method, beta in DEFAULT_BETA.items()),
    )
    weight: str = setting(
        "soft",
        WEIGHTS,
        "SPO's weight mu of a pair: 1 (uniform), or sigmoid(gamma log(pi(y_w) + pi(y_l)) - normalizer) (soft, eq. 24).",
    )
    gamma: float = setting(0.1, "at least 0", "gamma of the soft weight (eq. 24).")
    normalizer: str = setting(
        "batch",
        NORMALIZERS,
        "Normalizer of the soft weight: mean of gamma log(pi(y_w) + pi(y_l)) over the batch, or a running average.",
    )
    kl_samples: int = setting(32, "positive", "Sequences drawn from the model for the KL estimate of SPO (Appendix B).")
    kl_every: int = setting(8, "positive", "Steps between two draws of KL sequences (k in Appendix B).")
    steps: int = setting(300, "positive", "Optimizer steps in all.")
    batch_size: int = setting(16, "positive", "Pairs a step.")
    lr: float = setting(1e-4, "positive", "AdamW's learning rate after warm-up.")
    warmup_steps: int = setting(60, "at least 0", "Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = setting(0.0, "at least 0", "AdamW's weight decay.")
    beta1: float = setting(0.9, "in [0, 1)", "AdamW's decay of the gradient's running mean.")
    beta2: float = setting(0.95, "in [0, 1)", "AdamW's decay of the squared gradient's running mean.")
    clip: float = setting(1.0, "positive", "Largest norm of the gradient; a longer gradient is scaled down to it.")
    seed: int = setting(0, "at least 0", "Seed of the order of pairs and of the sampling.")
    max_length: int | None = setting(
        None,
        "at least 2",
        "Tokens of the longest sequence, of a pair or a sample: prompt and response together.",
        default_text="the model's, of Hugging Face models at most 1024",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "dpo" and self.beta == 0:
            raise ValueError(f"beta must be positive for dpo and finite, got {self.beta}")

    @property
    def effective_beta(self) -> float:
        """`beta`, or the method's default if `beta` is None."""
        return DEFAULT_BETA[self.method] if self.beta is None else self.beta

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"beta": self.effective_beta}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """How often an alignment run saves and evaluates."""

    checkpoint_every: int = setting(100, "positive", "Steps between two checkpoints; there is always one at the end.")
    evaluate_every: int = setting(
        100, "positive", "Steps between two evaluations; there is always one at the start and one at the end."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """How to compare a model with the reference by sampling from both."""

    samples: int = setting(256, "at least 2", "Texts sampled from the model.")
    reference_samples: int = setting(512, "at least 2", "Texts sampled from the reference, once.")
    batch_size: int = setting(256, "positive", "Texts sampled at a time.")
    temperature: float = setting(1.0, "positive", "Sampling temperature, for model and reference alike.")
    seed: int = setting(1000, "at least 0", "Seed of the sampling.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Settings):
    """Model shape, optimizer and schedule of a pretraining run; the defaults made the shipped reference model."""

    vocab_size: int = setting(1500, "positive", "Ids of a newly trained tokenizer; a given tokenizer brings its own.")
    dim: int = setting(128, "positive", "Width of the model.")
    layers: int = setting(3, "positive", "Number of layers.")
    heads: int = setting(4, "positive", "Attention heads of a layer.")
    ffn_dim: int = setting(352, "positive", "Inner width of the SwiGLU feed-forward.")
    max_length: int = setting(
        128, "at least 2", "Tokens of the longest sequence, bos and eos included; longer texts are split."
    )
    steps: int = setting(2600, "positive", "Optimizer steps in all.")
    batch_size: int = setting(16, "positive", "Sequences a step.")
    lr: float = setting(3e-3, "positive", "AdamW's peak learning rate.")
    warmup_steps: int = setting(100, "at least 0", "Steps over which the learning rate rises linearly from 0.")
    final_lr_ratio: float = setting(
        0.05, "in [0, 1]", "Share of the peak learning rate at which its cosine decay ends."
    )
    weight_decay: float = setting(0.1, "at least 0", "AdamW's weight decay.")
    beta1: float = setting(0.9, "in [0, 1)", "AdamW's decay of the gradient's running mean.")
    beta2: float = setting(0.95, "in [0, 1)", "AdamW's decay of the squared gradient's running mean.")
    clip: float = setting(1.0, "positive", "Largest norm of the gradient; a longer gradient is scaled down to it.")
    held_out: int = setting(
        512, "positive", "Sequences kept from training to measure the NLL on; at most a tenth of all."
    )
    evaluate_every: int = setting(
        500,
        "positive",
        "Steps between two evaluations, which measure the held-out NLL; there is always one at the end.",
        earlier_name="eval_every",
    )
    checkpoint_every: int = setting(200, "positive", "Steps between two checkpoints.")
    seed: int = setting(0, "at least 0", "Seed of the initial weights, of the held-out choice and of the batches.")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Settings):
    """How pairs are sampled and judged."""

    pairs: int = setting(2500, "positive", "Pairs sampled and judged, each of two new samples.")
    repairings: int = setting(
        3,
        "at least 0",
        "How often all samples are paired anew at random, within their prompt, and judged again. Such pairs cost no "
        "sampling, but share their samples with other pairs.",
    )
    temperature: float = setting(1.0, "positive", "Sampling temperature.")
    max_length: int | None = setting(
        None, "at least 2", "Tokens of the longest sample, prompt, bos and eos included.", default_text="the model's"
    )
    batch_size: int = setting(256, "positive", "Samples drawn at a time.")
    noise: float = setting(1.0, "at least 0", "Standard deviation of the noise on a judge's score, in points of 10.")
    bias: float = setting(0.5, "a number", "Points that the judge gives the story shown second for its position.")
    seed: int = setting(0, "at least 0", "Seed of the sampling, of the pairings and of the judge's noise.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Sizes, schedule and seed of the demo; `spo_train.toy.demo` has the settings that cannot be changed."""

    pairs: int = setting(
        2500, "positive", "Pairs sampled and judged; about a sixth passes the filter, and re-pairing adds more."
    )
    steps: int = setting(200, "positive", "Optimizer steps of each of the three alignments.")
    warmup_steps: int = setting(60, "at least 0", "Steps over which the learning rate rises linearly from 0.")
    batch_size: int = setting(16, "positive", "Pairs a step.")
    evaluate_every: int = setting(50, "positive", "Steps between two evaluations.")
    samples: int = setting(192, "at least 2", "Stories sampled at an evaluation.")
    reference_samples: int = setting(512, "at least 2", "Stories of the reference that they are compared with.")
    seed: int = setting(0, "at least 0", "Seed of pairs, alignments and evaluations.")


QUICK_DEMO = DemoConfig(
    pairs=150, steps=16, warmup_steps=4, batch_size=8, evaluate_every=8, samples=48, reference_samples=64
)
