"""The options of a head from small stand-ins of Hugging Face configurations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spo_kernels import LinearSPOLoss, head_options, linear_token_logps, token_logps


@pytest.mark.parametrize(
    ("attributes", "softcap", "logit_scale"),
    [
        ({"model_type": "llama"}, None, 1.0),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, 30.0, 1.0),
        ({"model_type": "gemma3_text", "final_logit_softcapping": None}, None, 1.0),
        ({"model_type": "recurrent_gemma", "logits_soft_cap": 30.0}, 30.0, 1.0),
        ({"model_type": "xlstm", "output_logit_soft_cap": 30.0}, 30.0, 1.0),
        ({"model_type": "cohere", "logit_scale": 0.0625}, None, 0.0625),
        ({"model_type": "cohere_compass_text", "logit_scale": None}, None, 1.0),
        ({"model_type": "granite", "logits_scaling": 8}, None, 0.125),
        ({"model_type": "minicpm3", "logits_scaling": 10.0}, None, 0.1),
        ({"model_type": "hyperclovax", "logits_scaling": 0.25}, None, 0.25),
        ({"model_type": "inkling_text", "logits_mup_width_multiplier": 24.0}, None, 1 / 24),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, None, 0.5),
        ({"model_type": "muse_spark_text", "output_multiplier": 0.25, "final_logit_softcapping": 20.0}, 20.0, 0.25),
        ({"model_type": "mpt", "logit_scale": None}, None, 1.0),
        ({"model_type": "a stranger", "logits_scaling": 1.0}, None, 1.0),
        ({"logit_scale": 0.5, "lm_head_multiplier": 1.0}, None, 0.5),
    ],
    ids=lambda value: value.get("model_type", "two") if isinstance(value, dict) else None,
)
def test_options(attributes: dict[str, Any], softcap: float | None, logit_scale: float) -> None:
    expected = {"softcap": softcap, "logit_scale": logit_scale}
    assert head_options(SimpleNamespace(**attributes)) == expected
    # The parts of a configuration with images or sound
    text = SimpleNamespace(**attributes)
    assert head_options(SimpleNamespace(model_type="whole", text_config=text)) == expected
    assert head_options(SimpleNamespace(model_type="whole", get_text_config=lambda: text)) == expected


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"model_type": "a stranger", "logits_scaling": 8.0},
            "logits_scaling = 8, which divides .* got 'a stranger'",
        ),
        ({"logits_scaling": 8.0}, "logits_scaling = 8, which divides .* got None"),
        ({"logit_scale": 0.5, "lm_head_multiplier": 2.0}, "must have one of logit_scale, lm_head_multiplier, got all"),
        (
            {"final_logit_softcapping": 30.0, "logits_soft_cap": 30.0},
            "must have one of final_logit_softcapping, logits_soft_cap, got all",
        ),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, "got mpt, which leaves it to the implementation"),
        ({"model_type": "mpt", "logit_scale": 0.1}, "got mpt, which leaves it to the implementation"),
        (
            {"logit_scale": "inv_sqrt_d_model"},
            "logit_scale of config must be a finite number > 0 .* 'inv_sqrt_d_model'",
        ),
        ({"logit_scale": True}, "logit_scale of config must be a finite number > 0 .* got True"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping of config must be a finite number > 0 .* got 0"),
        ({"model_type": "grok-1", "output_multiplier_scale": 0.58}, "output_multiplier_scale = 0.58, whose effect"),
        ({"model_type": "chameleon"}, "got chameleon, which forbids the tokens of images"),
        ({"model_type": "dory"}, "got dory, which scales each token's logit"),
        ({"is_encoder_decoder": True}, "must be a decoder's"),
        ({"vocab_size": 512, "unpadded_vocab_size": 500}, "unpadded_vocab_size = 500 of 512"),
    ],
)
def test_refusals(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_options(SimpleNamespace(**attributes))


def test_functions_take_the_options() -> None:
    options = head_options(SimpleNamespace(output_multiplier=0.5, final_logit_softcapping=3.0))
    hidden, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    labels = torch.tensor([0, 3, 10, 5])
    logits = torch.tanh(hidden @ weight.T * 0.5 / 3.0) * 3.0
    expected = token_logps(logits, labels)
    torch.testing.assert_close(linear_token_logps(hidden, weight, labels, **options), expected)
    _, metrics = LinearSPOLoss(**options)(hidden[:, None], weight, labels[:, None])
    torch.testing.assert_close(metrics.chosen_logps, expected[:2])


@pytest.mark.parametrize("config", [{"logit_scale": 0.5}, SimpleNamespace(config=SimpleNamespace(logit_scale=0.5))])
def test_a_dict_or_a_model_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="config must be a configuration, as model.config is, got"):
        head_options(config)
