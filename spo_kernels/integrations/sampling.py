"""Sampling from the policy: `Sampler` is what the buffer needs, `HFSampler` draws with a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spo_kernels.integrations.rows import Samples


def check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_whole_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its training flag as before afterwards."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


class SpecialTokens(NamedTuple):
    """Ids that sampling needs to know."""

    pad: int
    eos: tuple[int, ...]  # each of these ends a response
    bos: int | None = None  # stands in for an empty prompt

    @classmethod
    def of(cls, tokenizer: Any, model: Any = None) -> SpecialTokens:
        """Those of a tokenizer, and every eos of the model's ``generation_config``.

        Raises:
            ValueError: the tokenizer has no eos.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an eos token, which ends a sampled response, got none")
        others = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        others = [others] if isinstance(others, int) else others or []
        eos = tuple(dict.fromkeys([tokenizer.eos_token_id, *others]))
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(pad, eos, tokenizer.bos_token_id)


class Sampler(Protocol):
    """What `KLBuffer` draws with."""

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """One response to each prompt, drawn from the policy itself: temperature 1, no top-k, no top-p.

        Args:
            prompts: ids of each, one at least.
            max_new_tokens: tokens of a response at most.
            seed: the same seed, prompts and weights give the same responses. Global random states stay as they are.

        Returns:
            The ids of each response, the eos that ended it included.
        """
        ...


# Options of ``generate`` that leave the distribution of the samples alone.
_GENERATION_OPTIONS = (
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
    "synced_gpus",
    "use_cache",
)


class HFSampler:
    """`Sampler` by the ``generate`` of a Hugging Face model.

    Samples come from the softmax of the model's logits and nothing else: sampling options of the model's own
    ``generation_config`` are not used. Only ids that the tokenizer does not have, which padded or resized embeddings
    bring, are never sampled. Prompts are left-padded.

    Args:
        model: the policy.
        tokenizer: of the policy; its length and its special tokens are read.
        batch_size: prompts of one call of ``generate``; None: all.
        generation_options: for ``generate``; those that do not change the distribution, for instance ``synced_gpus``
            for a model that FSDP shards.
        opened: a context that gives the model to call ``generate`` of, where that is not model itself, for instance
            TRL's ``unwrap_model_for_generation``.

    Raises:
        ValueError: an option of generation_options may change the distribution; batch_size < 1; no eos.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int | None = None,
        generation_options: Mapping[str, Any] | None = None,
        opened: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        if batch_size is not None:
            check_whole_number("batch_size", batch_size, 1)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.generation_options = dict(generation_options or {})
        for name in self.generation_options:
            if name not in _GENERATION_OPTIONS:
                raise ValueError(
                    f"generation_options must not hold {name}: the KL needs samples of the policy itself (temperature "
                    f"1, no top-k, no top-p); it may hold {', '.join(_GENERATION_OPTIONS)}"
                )
        self._opened = opened or (lambda: nullcontext(model))
        SpecialTokens.of(tokenizer)

    def sample(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """See `Sampler`."""
        size = self.batch_size or max(len(prompts), 1)
        responses: list[list[int]] = []
        special = SpecialTokens.of(self.tokenizer, self.model)
        with evaluating(self.model), self._opened() as model, _plain_generation_config(model) as config_class:
            options = {name: value for name, value in self.generation_options.items() if name != "synced_gpus"}

            known = max(len(self.tokenizer), 1 + max(special.eos))  # ids may have gaps

            def without_others(_: Tensor, logits: Tensor) -> Tensor:
                return logits[:, :known]

            config = config_class(
                do_sample=True,
                num_beams=1,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                pad_token_id=special.pad,
                eos_token_id=list(special.eos),
                **options,
            )
            device = next(model.parameters()).device
            with _own_generators(device, seed):
                for first in range(0, len(prompts), size):
                    batch = prompts[first : first + size]
                    width = max(map(len, batch))
                    ids = torch.tensor([[special.pad] * (width - len(p)) + p for p in batch], device=device)
                    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
                    output = model.generate(
                        input_ids=ids,
                        attention_mask=real,
                        generation_config=config,
                        logits_processor=[without_others],
                        synced_gpus=self.generation_options.get("synced_gpus"),
                    )
                    drawn = Samples.from_generate(output, eos=special.eos, pad=special.pad, attention_mask=real)
                    responses += drawn.responses()
        return responses


@contextmanager
def _own_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Global generators of the CPU and of the device seeded, and afterwards as they were."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            yield
        return
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        torch.random.default_generator.manual_seed(seed)
        torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[type]:
    """The model without sampling options of its own, which ``generate`` would merge into those it is given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = type(own)()
    try:
        yield type(own)
    finally:
        base.generation_config = own
