"""The settings of `SPOTrainer`: ``DPOConfig`` with the fields of SPO."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from trl import DPOConfig

from spo_kernels.integrations.buffer import KEEPS
from spo_kernels.integrations.sampling import check_one_of, check_whole_number
from spo_kernels.integrations.step import HEADS, NORMALIZERS, SPOSettings

# From this beta on, a value looks like one that was meant for DPO, whose default is 0.1.
DPO_BETA = 0.1
# Fields of DPOConfig without a meaning in SPO, with the reason.
_REFUSED = {
    "loss_type": "SPO is the loss",
    "loss_weights": "SPO is the only loss",
    "f_divergence_type": "SPO's regularizer is the KL of whole output distributions",
    "ld_alpha": "SPO has average_log_probs for responses of unequal length",
    "use_weighting": 'SPO weighs pairs by weighting="soft"',
    "label_smoothing": "SPO's softness alpha takes the place of label smoothing",
    "use_liger_kernel": "SPO computes the loss with kernels of its own, by head",
    "padding_free": "TRL does not offer it: it pads the batches all the same",
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SPOConfig(DPOConfig):
    """``trl.DPOConfig`` for SPO. Fields of ``DPOConfig`` that do not belong to DPO's loss mean what they mean there.

    Each field below is an option of TRL's command line too.

    Args:
        alpha: softness of the preferences, >= 0; the optimal policy is softmax(reward / alpha).
        beta: weight of the KL to the reference on samples of the policy, >= 0. Not DPO's beta, so its default is not
            DPO's 0.1; a value of 0.1 or more is questioned once. 0: nothing is sampled, no reference model is built.
        weighting: "uniform", or "soft", which weighs pairs by how likely the policy finds them (`SoftImportance`).
        gamma: of the soft weights.
        importance_normalizer: of the soft weights: "batch" is over a micro-batch, "step" over the whole optimizer step
            (one more forward of the pairs), "ema" a running average. "auto": "batch" without accumulation, else "step".
        average_log_probs: mean of the token log-probs of a response in place of their sum.
        center: leave out the loss's constant log(2)/alpha, so that a pair with L_w = L_l costs 0. The gradient is the
            same.
        nll_weight: adds that much of the mean negative log-prob of chosen responses.
        kl_every: optimizer steps between two draws of samples.
        kl_samples: sequences of a draw, over all ranks; a multiple of ranks x accumulation steps.
        kl_max_new_tokens: tokens of a sampled response at most; less than max_length. Longer prompts lose their
            beginning, so that prompt and response fit into max_length.
        kl_prompts: name or folder of a dataset whose train split has a column prompt; None: the training prompts in an
            order of their own. `SPOTrainer` also takes a dataset.
        kl_generation_batch_size: sequences sampled, and scored by the reference, at a time; None: all of a rank.
        kl_reference: what is kept of the reference from a draw to the next: "hidden" states; "logits", V/H times as
            much, for the heads "logits" and "eager"; "recompute": nothing, its forward runs in every micro-step.
        sampler: "hf" samples by the model's ``generate``, "vllm" by TRL's ``VLLMGeneration`` with the vllm_ fields,
            which TRL's ``GRPOConfig`` documents. "vllm" is written to the interface of TRL 1.16, and was not run.
        head: "linear" computes the loss from hidden states, without logits. "logits" uses the logits of the model's own
            forward. "eager" is plain torch on them, for comparison. "auto": "linear", but "logits" where the model's
            configuration names a transform of logits that `head_options` does not know.
        log_reference_rewards: log rewards relative to the reference, comparable with DPO's. The reference then runs on
            the pairs.

    Raises:
        ValueError: a value is out of its range; a field of DPO without a meaning here is set: loss_type, loss_weights,
            f_divergence_type, ld_alpha, use_weighting, label_smoothing, use_liger_kernel, padding_free, and
            precompute_ref_log_probs with beta > 0; sync_ref_model without a reference.
    """

    alpha: float = field(default=0.1, metadata=_help("Softness of the preferences, at least 0."))
    beta: float = field(
        default=0.03, metadata=_help("Weight of the KL to the reference on samples of the policy. Not DPO's beta.")
    )
    weighting: str = field(
        default="uniform", metadata=_help("Weights of pairs: uniform, or soft (by the policy's likelihood).")
    )
    gamma: float = field(default=0.1, metadata=_help("Exponent of the soft weights, at least 0."))
    importance_normalizer: str = field(
        default="auto", metadata=_help("Normalizer of the soft weights: auto, batch, step or ema.")
    )
    average_log_probs: bool = field(
        default=False, metadata=_help("Take the mean of token log-probs in place of their sum.")
    )
    center: bool = field(
        default=True, metadata=_help("Leave out the constant log(2)/alpha of the loss; same gradient.")
    )
    nll_weight: float = field(
        default=0.0, metadata=_help("Weight of the mean negative log-prob of chosen responses, at least 0.")
    )
    kl_every: int = field(default=8, metadata=_help("Optimizer steps between two draws of samples."))
    kl_samples: int = field(default=32, metadata=_help("Sequences of a draw, over all ranks."))
    kl_max_new_tokens: int = field(default=256, metadata=_help("Tokens of a sampled response at most."))
    kl_prompts: str | None = field(
        default=None,
        metadata=_help("Dataset (name or folder) whose train split has prompts to sample from; training's if unset."),
    )
    kl_generation_batch_size: int | None = field(
        default=None, metadata=_help("Sequences sampled at a time; all of a rank if unset.")
    )
    kl_reference: str = field(
        default="hidden", metadata=_help("What is kept of the reference between draws: hidden, logits or recompute.")
    )
    sampler: str = field(default="hf", metadata=_help("What samples: hf (generate) or vllm."))
    head: str = field(default="auto", metadata=_help("How the loss is computed: auto, linear, logits or eager."))
    log_reference_rewards: bool = field(
        default=False, metadata=_help("Log rewards relative to the reference, which then runs on the pairs.")
    )
    vllm_mode: str = field(default="colocate", metadata=_help("vLLM in this process (colocate) or a server."))
    vllm_model_impl: str = field(default="vllm", metadata=_help("Implementation of the model: vllm or transformers."))
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata=_help("Let vLLM give its memory back between two draws (colocate).")
    )
    vllm_server_base_url: str | None = field(default=None, metadata=_help("Address of the vLLM server."))
    vllm_server_host: str = field(default="0.0.0.0", metadata=_help("Host of the vLLM server, without a base URL."))
    vllm_server_port: int = field(default=8000, metadata=_help("Port of the vLLM server, without a base URL."))
    vllm_server_timeout: float = field(default=240.0, metadata=_help("Seconds to wait for the vLLM server."))
    vllm_group_port: int = field(default=51216, metadata=_help("Port for the server's update of weights."))
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata=_help("Share of the GPU's memory for vLLM (colocate).")
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata=_help("Context of vLLM in tokens; max_length if unset.")
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata=_help("GPUs that share a model in vLLM (colocate)."))

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        for name, reason in _REFUSED.items():
            value = getattr(self, name, defaults.get(name))
            if value != defaults.get(name):
                raise ValueError(f"{name} must be left at {defaults[name]!r}, got {value!r}: {reason}")
        check_one_of("importance_normalizer", self.importance_normalizer, ("auto", *NORMALIZERS))
        check_one_of("kl_reference", self.kl_reference, KEEPS)
        check_one_of("sampler", self.sampler, ("hf", "vllm"))
        check_one_of("head", self.head, ("auto", *HEADS))
        check_one_of("vllm_mode", self.vllm_mode, ("colocate", "server"))
        self.settings(head="linear" if self.head == "auto" else self.head)
        for name in ("kl_every", "kl_samples", "kl_max_new_tokens"):
            check_whole_number(name, getattr(self, name), 1)
        if self.kl_generation_batch_size is not None:
            check_whole_number("kl_generation_batch_size", self.kl_generation_batch_size, 1)
        if self.sync_ref_model and not self.needs_reference:
            raise ValueError("sync_ref_model must be False where no reference is used (beta = 0)")
        if self.beta == 0:
            if self.precompute_ref_log_probs:
                warnings.warn("precompute_ref_log_probs has no effect at beta = 0 and is taken as False", stacklevel=3)
                self.precompute_ref_log_probs: bool = False
            return
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs must be False with beta > 0: the KL needs the reference itself, on samples"
            )
        if self.max_length is not None and self.kl_max_new_tokens >= self.max_length:
            raise ValueError(
                f"kl_max_new_tokens must be < max_length = {self.max_length}, to leave room for a prompt, got "
                f"{self.kl_max_new_tokens}"
            )
        if self.kl_reference == "logits" and self.head in ("auto", "linear"):
            raise ValueError(
                f'kl_reference must be "hidden" or "recompute" with head {self.head!r}, which uses hidden states, got '
                '"logits"'
            )
        if self.beta >= DPO_BETA:
            warnings.warn(
                f"beta = {self.beta} is not DPO's beta: it weighs the KL of whole responses, in nats, and its default "
                "is 0.03. Leave it as it is if you mean it.",
                stacklevel=3,
            )

    def settings(self, head: str) -> SPOSettings:
        """The settings of the step, with a head that is not "auto"."""
        normalizer = self.importance_normalizer
        if normalizer == "auto":
            normalizer = "batch" if self.gradient_accumulation_steps == 1 else "step"
        return SPOSettings(
            alpha=self.alpha,
            beta=self.beta,
            weighting=self.weighting,
            gamma=self.gamma,
            normalizer=normalizer,
            average_log_probs=self.average_log_probs,
            center=self.center,
            nll_weight=self.nll_weight,
            head=head,
            reference_rewards=self.log_reference_rewards,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference ever runs."""
        return self.beta > 0 or self.log_reference_rewards

    def vllm_options(self) -> dict[str, Any]:
        """The keyword arguments of TRL's ``VLLMGeneration`` that the vllm_ fields set."""
        return {f.name.removeprefix("vllm_"): getattr(self, f.name) for f in fields(self) if f.name.startswith("vllm_")}
