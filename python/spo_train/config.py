"""Settings of every command, with their help texts and bounds; free of torch so that `--help` answers at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DEFAULT_BETA = {"spo": 0.03, "dpo": 0.1}
WEIGHTS = ("uniform", "soft")
NORMALIZERS = ("batch", "ema")


@dataclass(frozen=True)
class Bounds:
    """The range of a setting; None is no bound. Infinity and NaN are always outside."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.above == 0:
            return "positive"
        if self.below is not None:
            return f"in [{self.at_least}, {self.below})"
        if self.at_most is not None:
            return f"in [{self.at_least}, {self.at_most}]"
        return "" if self.at_least is None else f"at least {self.at_least}"


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    default_text: str | None = None,
    earlier_name: str | None = None,
    **bounds: float,
) -> Any:
    """Return a dataclass field that the command line shows and `Settings` checks.

    Args:
        default: the field's default; None if another setting or the model decides.
        help: the text of `--help`.
        choices: the values that a string may have.
        default_text: how `--help` shows the default, if not by its value.
        earlier_name: name of the setting in earlier versions, whose options and checkpoints still work.
        bounds: the fields of `Bounds`.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "default_text": default_text or str(default),
        "earlier_name": earlier_name,
        "bounds": Bounds(**bounds),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the settings: fields made by `setting`.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    def __post_init__(self) -> None:
        for own in fields(self):
            value, choices, bounds = getattr(self, own.name), own.metadata["choices"], own.metadata["bounds"]
            if choices and value not in choices:
                raise ValueError(f"{own.name} must be one of {', '.join(choices)}, got {value!r}")
            if value is not None and not isinstance(value, str) and not bounds.hold(value):
                must_be = f"{bounds} and finite" if str(bounds) else "finite"
                raise ValueError(f"{own.name} must be {must_be}, got {value}")

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

    method: str = setting("spo", "Preference objective: SPO (eq. 5) or DPO (eq. 4).", choices=tuple(DEFAULT_BETA))
    alpha: float = setting(
        0.1,
        "SPO's exponent in -(mu/alpha) log sigmoid(alpha (L_w - L_l)) (eq. 8); larger keeps the model's entropy higher."
        " 0 takes the linear loss -(mu/2) (L_w - L_l) (eq. 9).",
        at_least=0,
    )
    beta: float | None = setting(
        None,
        "SPO: factor of KL(pi || pi_ref), nats a sequence, in the objective (eq. 5). DPO: its beta (eq. 4).",
        default_text=", ".join(f"{beta} for {method}" for method, beta in DEFAULT_BETA.items()),
        at_least=0,
    )
    weight: str = setting(
        "soft",
        "SPO's weight mu of a pair: 1 (uniform), or sigmoid(gamma log(pi(y_w) + pi(y_l)) - normalizer) (soft, eq. 24).",
        choices=WEIGHTS,
    )
    gamma: float = setting(0.1, "gamma of the soft weight (eq. 24).", at_least=0)
    normalizer: str = setting(
        "batch",
        "Normalizer of the soft weight: mean of gamma log(pi(y_w) + pi(y_l)) over the batch, or a running average.",
        choices=NORMALIZERS,
    )
    kl_samples: int = setting(32, "Sequences drawn from the model for the KL estimate of SPO (Appendix B).", above=0)
    kl_every: int = setting(8, "Steps between two draws of KL sequences (k in Appendix B).", above=0)
    steps: int = setting(300, "Optimizer steps in all.", above=0)
    batch_size: int = setting(16, "Pairs a step.", above=0)
    lr: float = setting(1e-4, "AdamW's learning rate after warm-up.", above=0)
    warmup_steps: int = setting(60, "Steps over which the learning rate rises linearly from 0.", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", at_least=0)
    beta1: float = setting(0.9, "AdamW's decay of the gradient's running mean.", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient's running mean.", at_least=0, below=1)
    clip: float = setting(1.0, "Largest norm of the gradient; a longer gradient is scaled down to it.", above=0)
    seed: int = setting(0, "Seed of the order of pairs and of the sampling.", at_least=0)

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

    checkpoint_every: int = setting(100, "Steps between two checkpoints; there is always one at the end.", above=0)
    evaluate_every: int = setting(
        100, "Steps between two evaluations; there is always one at the start and one at the end.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """How to compare a model with the reference by sampling from both."""

    samples: int = setting(256, "Texts sampled from the model.", at_least=2)
    reference_samples: int = setting(512, "Texts sampled from the reference, once.", at_least=2)
    batch_size: int = setting(256, "Texts sampled at a time.", above=0)
    temperature: float = setting(1.0, "Sampling temperature, for model and reference alike.", above=0)
    seed: int = setting(1000, "Seed of the sampling.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Settings):
    """Model shape, optimizer and schedule of a pretraining run; the defaults made the shipped reference model."""

    vocab_size: int = setting(1500, "Ids of a newly trained tokenizer; a given tokenizer brings its own.", above=0)
    dim: int = setting(128, "Width of the model.", above=0)
    layers: int = setting(3, "Number of layers.", above=0)
    heads: int = setting(4, "Attention heads of a layer.", above=0)
    ffn_dim: int = setting(352, "Inner width of the SwiGLU feed-forward.", above=0)
    max_length: int = setting(
        128, "Tokens of the longest sequence, bos and eos included; longer texts are split.", at_least=2
    )
    steps: int = setting(2600, "Optimizer steps in all.", above=0)
    batch_size: int = setting(16, "Sequences a step.", above=0)
    lr: float = setting(3e-3, "AdamW's peak learning rate.", above=0)
    warmup_steps: int = setting(100, "Steps over which the learning rate rises linearly from 0.", at_least=0)
    final_lr_ratio: float = setting(
        0.05, "Share of the peak learning rate at which its cosine decay ends.", at_least=0, at_most=1
    )
    weight_decay: float = setting(0.1, "AdamW's weight decay.", at_least=0)
    beta1: float = setting(0.9, "AdamW's decay of the gradient's running mean.", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient's running mean.", at_least=0, below=1)
    clip: float = setting(1.0, "Largest norm of the gradient; a longer gradient is scaled down to it.", above=0)
    held_out: int = setting(512, "Sequences kept from training to measure the NLL on; at most a tenth of all.", above=0)
    evaluate_every: int = setting(
        500,
        "Steps between two evaluations, which measure the held-out NLL; there is always one at the end.",
        earlier_name="eval_every",
        above=0,
    )
    checkpoint_every: int = setting(200, "Steps between two checkpoints.", above=0)
    seed: int = setting(0, "Seed of the initial weights, of the held-out choice and of the batches.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Settings):
    """How pairs are sampled and judged."""

    pairs: int = setting(2500, "Pairs sampled and judged, each of two new samples.", above=0)
    repairings: int = setting(
        3,
        "How often all samples are paired anew at random, within their prompt, and judged again. Such pairs cost no "
        "sampling, but share their samples with others.",
        at_least=0,
    )
    temperature: float = setting(1.0, "Sampling temperature.", above=0)
    max_length: int | None = setting(
        None,
        "Tokens of the longest sample, prompt, bos and eos included.",
        default_text="the model's",
        at_least=2,
    )
    batch_size: int = setting(256, "Samples drawn at a time.", above=0)
    noise: float = setting(1.0, "Standard deviation of the noise on a judge's score, in points of 10.", at_least=0)
    bias: float = setting(0.5, "Points that the judge gives the story shown second for its position.")
    seed: int = setting(0, "Seed of the sampling, of the pairings and of the judge's noise.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Sizes of the demo; everything else is fixed (see `spo_train.toy.demo`)."""

    pairs: int = setting(
        2500, "Pairs sampled and judged; about a sixth passes the filter, re-paired samples add more.", above=0
    )
    steps: int = setting(200, "Optimizer steps of each of the three alignments.", above=0)
    warmup_steps: int = setting(60, "Steps over which the learning rate rises linearly from 0.", at_least=0)
    batch_size: int = setting(16, "Pairs a step.", above=0)
    evaluate_every: int = setting(50, "Steps between two evaluations.", above=0)
    samples: int = setting(192, "Stories sampled at an evaluation.", at_least=2)
    reference_samples: int = setting(512, "Stories of the reference that they are compared with.", at_least=2)
    seed: int = setting(0, "Seed of pairs, alignments and evaluations.", at_least=0)


QUICK_DEMO = DemoConfig(
    pairs=150, steps=16, warmup_steps=4, batch_size=8, evaluate_every=8, samples=48, reference_samples=64
)
