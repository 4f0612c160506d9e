"""Settings of pretraining and of making pairs, with their help texts; free of torch, as `spo_train.config` is."""

from __future__ import annotations

from dataclasses import dataclass

from spo_train.config import _check, setting


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Model shape, optimizer and schedule of a pretraining run; the defaults are the shipped reference's.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    vocab_size: int = setting(1500, "Ids of a newly trained tokenizer; a given tokenizer brings its own.")
    dim: int = setting(128, "Width of the model.")
    layers: int = setting(3, "Number of layers.")
    heads: int = setting(4, "Attention heads of a layer.")
    ffn_dim: int = setting(352, "Inner width of the SwiGLU feed-forward.")
    max_length: int = setting(128, "Tokens of the longest sequence, bos and eos included; longer texts are split.")
    steps: int = setting(2600, "Optimizer steps in all.")
    batch_size: int = setting(16, "Sequences a step.")
    lr: float = setting(3e-3, "AdamW's peak learning rate.")
    warmup_steps: int = setting(100, "Steps over which the learning rate rises linearly from 0.")
    final_lr_ratio: float = setting(0.05, "Share of the peak learning rate at which its cosine decay ends.")
    weight_decay: float = setting(0.1, "AdamW's weight decay.")
    beta1: float = setting(0.9, "AdamW's decay of the gradient's running mean.")
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient's running mean.")
    clip: float = setting(1.0, "Largest norm of the gradient; it is scaled down to that.")
    held_out: int = setting(512, "Sequences kept from training to measure the NLL on; at most a tenth of all.")
    eval_every: int = setting(
        500, "Steps between two measurements of the held-out NLL; there is always one at the end."
    )
    checkpoint_every: int = setting(200, "Steps between two checkpoints.")
    seed: int = setting(0, "Seed of the initial weights, of the held-out choice and of the batches.")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "ffn_dim", "steps", "batch_size", "lr", "clip"):
            _check(self, name, "positive", getattr(self, name) > 0)
        for name in ("held_out", "eval_every", "checkpoint_every"):
            _check(self, name, "positive", getattr(self, name) > 0)
        for name in ("weight_decay", "warmup_steps", "seed"):
            _check(self, name, "at least 0", getattr(self, name) >= 0)
        for name in ("beta1", "beta2"):
            _check(self, name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        _check(self, "max_length", "at least 2", self.max_length >= 2)
        _check(self, "final_lr_ratio", "in [0, 1]", 0 <= self.final_lr_ratio <= 1)


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How pairs are sampled and judged.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    pairs: int = setting(2500, "Pairs sampled and judged, each of two new samples.")
    repairings: int = setting(
        3,
        "How often all samples are paired anew at random, within their prompt, and judged again. Such pairs cost no "
        "sampling, but share their samples with others.",
    )
    temperature: float = setting(1.0, "Sampling temperature.")
    max_length: int | None = setting(
        None, "Tokens of the longest sample, prompt, bos and eos included. [default: the model's]"
    )
    batch_size: int = setting(256, "Samples drawn at a time.")
    noise: float = setting(1.0, "Standard deviation of the noise on a judge's score, in points of 10.")
    bias: float = setting(0.5, "Points that the judge gives the story shown second for its position.")
    seed: int = setting(0, "Seed of the sampling, of the pairings and of the judge's noise.")

    def __post_init__(self) -> None:
        for name in ("pairs", "batch_size", "temperature"):
            _check(self, name, "positive", getattr(self, name) > 0)
        for name in ("repairings", "noise", "seed"):
            _check(self, name, "at least 0", getattr(self, name) >= 0)
        _check(self, "bias", "a number", True)
        if self.max_length is not None:
            _check(self, "max_length", "at least 2", self.max_length >= 2)
