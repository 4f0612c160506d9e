"""What Hugging Face configurations say about a head. Reads attributes only: transformers need not be installed."""

from __future__ import annotations

import math
from typing import Any

# Attributes that cap the logits: cap tanh(logits / cap).
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Attributes that multiply the logits.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Attributes that divide the hidden states before the head, or the logits.
_DIVISORS = ("logits_mup_width_multiplier",)
# `logits_scaling` divides in some models and multiplies in others.
_DIVIDES = frozenset(
    {
        "granite",
        "granite4_vision_text",
        "granite_docling_text",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "minicpm3",
    }
)
_MULTIPLIES = frozenset({"hyperclovax"})
# Attributes of models outside transformers that change the logits by rules of their own.
_UNKNOWN = ("logit_cap", "logits_softcap", "mup_output_alpha", "mup_width_scale", "output_multiplier_scale")
# Models that change their logits by what no option describes.
_REFUSED_TYPES = {
    "chameleon": "forbids the tokens of images",
    "dory": "scales each token's logit by a parameter",
    "gemma4_assistant": "may leave out tokens",
    "gemma4_unified_assistant": "may leave out tokens",
    "mpt": "leaves it to the implementation whether logit_scale is applied",
}


def head_options(config: Any) -> dict[str, Any]:
    """The options with which the ``linear_*`` functions and `LinearSPOLoss` compute a Hugging Face model's logits.

        options = head_options(model.config)
        linear_token_logps(hidden, model.lm_head.weight, labels, **options)

    Checked against the sources of transformers 5.24, by ``model_type``:

    - softcap from ``final_logit_softcapping``: beam, diffusion_gemma, gemma2, gemma3_text, gemma3n, gemma4,
      gemma4_unified, inkling2, inkling2_loop, mistral_large4, muse_glimmer, muse_spark, nanochat, paligemma,
      vaultgemma; from ``logits_soft_cap``: recurrent_gemma; from ``output_logit_soft_cap``: xlstm.
    - logit_scale from ``logit_scale``: cohere, cohere2, cohere2_moe, cohere_compass; from ``output_multiplier``:
      muse_glimmer, muse_spark; from ``lm_head_multiplier``: falcon_h1; from ``logits_scaling``: hyperclovax.
    - 1 / logit_scale from ``logits_scaling``: granite, granite4_vision, granite_docling, granite_swa, granitemoe,
      granitemoe_swa, granitemoehybrid, granitemoeshared, minicpm3; from ``logits_mup_width_multiplier``: inkling.

    The hidden states are ``last_hidden_state`` of the model's body. Minicpm3 and inkling divide it before they pass it
    to the head's module: an input of that module needs no logit_scale.

    A model whose logits change by none of these attributes has softcap None and logit_scale 1. Code of a model's own
    may change logits without an attribute: compare ``model(ids).logits`` once.

    Args:
        config: a configuration, for instance ``model.config``. Of one with several parts, the text decoder's is read.

    Returns:
        A dict with ``softcap``, a number or None, and ``logit_scale``, a number.

    Raises:
        ValueError: an attribute that changes the logits cannot be mapped, is not a number, or stands beside another of
            its kind; a model type whose logits no option describes (chameleon, dory, gemma4_assistant,
            gemma4_unified_assistant, mpt with a logit_scale); an encoder-decoder model.
        TypeError: a dict or a model in place of a configuration.
    """
    if isinstance(config, dict) or hasattr(config, "config"):
        raise TypeError(f"config must be a configuration, as model.config is, got {type(config).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("config must be a decoder's, got an encoder-decoder model, which may scale its hidden states")
    text = config.get_text_config() if hasattr(config, "get_text_config") else getattr(config, "text_config", config)
    model_type = getattr(text, "model_type", None)
    for kind in (getattr(config, "model_type", None), model_type):
        if kind in _REFUSED_TYPES and (kind != "mpt" or getattr(text, "logit_scale", None) is not None):
            raise ValueError(
                f"config must be of a model whose logits the options describe, got {kind}, which {_REFUSED_TYPES[kind]}"
            )
    for name in _UNKNOWN:
        if getattr(text, name, None) is not None:
            raise ValueError(f"config has {name} = {getattr(text, name)!r}, whose effect on the logits is not known")
    vocab_size, true_size = getattr(text, "vocab_size", None), getattr(text, "unpadded_vocab_size", None)
    if true_size is not None and (vocab_size is None or true_size < vocab_size):
        raise ValueError(
            f"config has unpadded_vocab_size = {true_size} of {vocab_size}: the model drops the other logits, and the "
            "options do not"
        )

    caps = {name: value for name in _CAPS if (value := _number(text, name)) is not None}
    scales = {name: value for name in _FACTORS if (value := _number(text, name)) is not None}
    scales |= {name: 1 / value for name in _DIVISORS if (value := _number(text, name)) is not None}
    scaling = _number(text, "logits_scaling")
    if scaling is not None:
        if scaling != 1 and model_type not in _DIVIDES | _MULTIPLIES:
            raise ValueError(
                f"config has logits_scaling = {scaling:g}, which divides the logits of some models and multiplies the "
                f"logits of others; model_type must be one of {', '.join(sorted(_DIVIDES | _MULTIPLIES))}, "
                f"got {model_type!r}"
            )
        scales["logits_scaling"] = scaling if model_type in _MULTIPLIES else 1 / scaling
    scales = {name: scale for name, scale in scales.items() if scale != 1}
    for several in (caps, scales):
        if len(several) > 1:
            raise ValueError(f"config must have one of {', '.join(several)}, got all")
    return {"softcap": next(iter(caps.values()), None), "logit_scale": next(iter(scales.values()), 1.0)}


def _number(config: Any, name: str) -> float | None:
    """A positive number of the configuration; None where it has none."""
    value = getattr(config, name, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} of config must be a finite number > 0 or None, got {value!r}")
    return float(value)
