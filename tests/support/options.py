"""Options of the logits, each alone and all together, and what they mean in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Options = dict[str, Any]

PADDING, REF_PADDING = 3, 5  # columns after the vocabulary where the options have a vocab_size

POLICY: dict[str, Options] = {
    "temperature": {"temperature": 0.7},
    "0-d temperature": {"temperature": torch.tensor(1.7, dtype=torch.float64)},
    "temperature of rows": {"temperature": "rows"},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": -0.5},
    "vocab_size": {"vocab_size": "V"},
    "all": {"temperature": "rows", "softcap": 3.0, "logit_scale": 0.6, "vocab_size": "V"},
}
REFERENCE: dict[str, Options] = {
    "ref_temperature": {"ref_temperature": 0.7},
    "ref_temperature of rows": {"ref_temperature": "other rows"},
    "0-d ref_temperature of rows": {"temperature": "rows", "ref_temperature": torch.tensor(0.8)},
    "ref_softcap": {"ref_softcap": 4.0},
    "no ref_softcap": {"softcap": 4.0, "ref_softcap": math.inf},
    "ref_logit_scale": {"logit_scale": 0.9, "ref_logit_scale": -0.5},
    "all of both": {
        **POLICY["all"],
        "ref_temperature": "other rows",
        "ref_softcap": 5.0,
        "ref_logit_scale": -0.8,
    },
}
DIVERGENCES: dict[str, Options] = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "reverse_kl, all of both": {**REFERENCE["all of both"], "divergence": "reverse_kl"},
    "jsd, all of both": {**REFERENCE["all of both"], "divergence": "jsd", "mixture": 0.2},
}
EVERY = {**POLICY, **REFERENCE, **DIVERGENCES}
# Modules take numbers.
NUMBERS: dict[str, Options] = {
    **{name: options for name, options in EVERY.items() if "rows" not in str(options) and "0-d" not in name},
    "all numbers": {**EVERY["all of both"], "temperature": 1.3, "ref_temperature": 0.7},
}


def transformed(raw: Tensor, temperature: Any = 1.0, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """What the options mean."""
    z = logit_scale * raw
    z = z if softcap is None or softcap == math.inf else softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def divergence_of(options: Options) -> Options:
    """The options that `heads.kl_of` takes."""
    return {name: options[name] for name in ("divergence", "mixture") if name in options}


def both_transformed(raw: Tensor, ref_raw: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    policy = {name: options[name] for name in ("temperature", "softcap", "logit_scale") if name in options}
    reference = {name: options.get(f"ref_{name}", policy.get(name)) for name in ("temperature", "softcap")}
    scale = options.get("ref_logit_scale", policy.get("logit_scale", 1.0))
    if reference["temperature"] is None:
        reference["temperature"] = 1.0
    return transformed(raw, **policy), transformed(ref_raw, **reference, logit_scale=scale)


def filled(options: Options, vocab_size: int, temperature: Tensor, ref_temperature: Tensor) -> Options:
    """The options of a table with the numbers that depend on the inputs."""
    values = {"V": vocab_size, "rows": temperature, "other rows": ref_temperature}
    return {name: values.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
