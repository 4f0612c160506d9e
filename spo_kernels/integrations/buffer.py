"""The reference model, and the buffer of sequences on which the KL is computed."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_kernels import gather_head
from spo_kernels.integrations.head import attached_options, attached_vocab_dim, unwrapped
from spo_kernels.integrations.rows import Samples
from spo_kernels.integrations.sampling import Sampler, SpecialTokens, check_one_of, check_whole_number, evaluating

KEEPS = ("hidden", "logits", "recompute")
EVALUATION = -1  # index of the draw that evaluation makes if training has made none


def seed_of(*parts: Any) -> int:
    """A seed from a tuple of numbers and words, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Reference:
    """The reference model pi_ref: frozen, with an attached head.

    Attributes:
        model: what is called; for LoRA the policy itself.
        opened: a context in which model is the reference; for LoRA, with the adapter off.
        head: a module with the reference's ``weight`` and ``bias``, where the output embeddings of model have others.
        shares_head: the reference's head has the policy's weights, frozen, as for LoRA.
    """

    model: nn.Module
    opened: Callable[[], AbstractContextManager[Any]] = nullcontext
    head: nn.Module | None = None
    shares_head: bool = False

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states [.., H] without gradient, in the dtype in which the head takes them."""
        dtype = None

        def hook(hidden: Tensor, *_: Any) -> Tensor:
            nonlocal dtype
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            return hidden.to(dtype)

        with self.opened(), evaluating(self.model):
            hidden = self.model(**inputs, spo_head=hook)
        return hidden.to(dtype)  # engines may return outputs in float32

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [.., V] without gradient."""
        with self.opened(), evaluating(self.model):
            return self.model(**inputs, spo_logits=lambda logits: logits)

    def weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head's weight [V, H] and bias as Tensors, where the policy has weight and bias in its forward.

        Where tensor parallelism splits the policy's vocabulary, attach_head gets vocab_dim for the reference too: these
        are then the rows of this process.
        """
        if self.shares_head:
            return weight.detach(), None if bias is None else bias.detach()
        return self._own_weights(attached_vocab_dim(self.model))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] from hidden states [.., H], as the model's own forward computes them."""
        options = attached_options(self.model)
        if isinstance(options, ValueError):
            raise options
        weight, bias = self._own_weights(None)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        with torch.no_grad():
            logits = F.linear(hidden, weight, bias)
            scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
            logits = logits if scale == 1 else logits * scale
            return logits if cap is None else torch.tanh(logits / cap) * cap

    def _own_weights(self, vocab_dim: str | int | None) -> tuple[Tensor, Tensor | None]:
        module: Any = self.head if self.head is not None else unwrapped(self.model).get_output_embeddings()
        weight, bias = module.weight, getattr(module, "bias", None)
        if hasattr(weight, "ds_id"):  # DeepSpeed's ZeRO-3 has taken it apart
            return _whole(weight), None if bias is None else _whole(bias)
        with torch.no_grad():
            head = gather_head(weight, bias, vocab_dim=vocab_dim)
        return head.weight.detach(), None if head.bias is None else head.bias.detach()


def _whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter of which each rank of DeepSpeed's ZeRO-3 holds a part."""
    deepspeed: Any = sys.modules["deepspeed"]  # it made the parameter
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@dataclass(frozen=True)
class KLDraw:
    """Sequences of one draw.

    Attributes:
        samples: S of them.
        lengths: tokens of each, known to the host.
        states: the reference's hidden states [S, T, H] or logits [S, T, V] on them; None if they are computed anew.
        step: optimizer step before which they were drawn.
        seconds: what the draw took, the reference's forward included.
    """

    samples: Samples
    lengths: list[int]
    states: Tensor | None
    step: int
    seconds: float

    def part(self, rows: slice) -> Samples:
        """Some of the sequences, without columns that only padding of these fills."""
        s, width = self.samples, max([1, *self.lengths[rows]])
        return Samples(s.ids[rows, :width], s.prompt_lengths[rows], s.lengths[rows], s.finished[rows])

    def bytes(self) -> int:
        """Memory of the reference's states."""
        return 0 if self.states is None else self.states.numel() * self.states.element_size()


class KLBuffer:
    """Sequences that the policy draws every k steps, with what the KL needs of the reference (Appendix B).

    A draw's prompts follow from `seed` and the number of the draw, its responses also from the rank. Draws depend on
    no random state. The prompts of a draw are the next ones in a random order of all prompts.

    Args:
        prompts: token ids of each; anything with a length and an index.
        sampler: draws the responses.
        reference: the reference model.
        special: the tokenizer's special ids.
        samples: sequences of a draw, over all ranks.
        every: optimizer steps between two draws, k.
        max_new_tokens: tokens of a response at most.
        max_length: tokens of prompt and response at most; longer prompts lose their beginning. None: no limit.
        keep: "hidden" keeps the reference's hidden states from a draw to the next. "logits" keeps logits, V/H times as
            much. "recompute" keeps nothing: the reference runs in every micro-batch.
        seed: of the draws.
        rank, world_size: this process draws samples / world_size sequences.
        batch_size: sequences of one forward of the reference after a draw; None: all.
        device: where the samples lie.

    Raises:
        ValueError: no prompts; samples is no multiple of world_size; a number is out of its range.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        reference: Reference,
        special: SpecialTokens,
        *,
        samples: int = 32,
        every: int = 8,
        max_new_tokens: int = 256,
        max_length: int | None = None,
        keep: str = "hidden",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_one_of("keep", keep, KEEPS)
        for name, value in (("samples", samples), ("every", every), ("max_new_tokens", max_new_tokens)):
            check_whole_number(name, value, 1)
        if batch_size is not None:
            check_whole_number("batch_size", batch_size, 1)
        if len(prompts) == 0:
            raise ValueError("prompts must hold a prompt at least, got none")
        if samples % world_size:
            raise ValueError(
                f"samples must be a multiple of world_size = {world_size}, got {samples}; the next is "
                f"{samples + world_size - samples % world_size}"
            )
        if max_length is not None and max_new_tokens >= max_length:
            raise ValueError(
                f"max_new_tokens must be < max_length = {max_length}, to leave room for a prompt, got {max_new_tokens}"
            )
        self.prompts, self.sampler, self.reference, self.special = prompts, sampler, reference, special
        self.samples, self.every, self.max_new_tokens, self.max_length = samples, every, max_new_tokens, max_length
        self.keep, self.seed, self.rank, self.world_size = keep, seed, rank, world_size
        self.batch_size, self.device = batch_size, device
        self.draw: KLDraw | None = None
        self._evaluation: KLDraw | None = None
        self._stale = False

    def refresh(self, step: int) -> None:
        """Before an optimizer step: draw where it is time, score again where the reference has changed."""
        due = step % self.every == 0 and (self.draw is None or self.draw.step != step)
        if self.draw is None or due:
            self.draw = self._evaluation = None  # frees their memory before the draw needs it
            self.draw = self._drawn(step // self.every, step)
        elif self._stale:
            self.draw = replace(self.draw, states=None)  # frees their memory
            self.draw = replace(self.draw, states=self._scored(self.draw.samples))
        self._stale = False

    def for_evaluation(self) -> KLDraw:
        """The last draw. Before the first one, a draw of evaluation's own, which training does not see."""
        if self.draw is not None:
            if self._stale:
                self.refresh(self.draw.step)
            return self.draw
        if self._evaluation is None:
            self._evaluation = self._drawn(EVALUATION, 0)
        return self._evaluation

    def reference_changed(self) -> None:
        """Say that the reference has new weights: its states are computed anew before they are used again."""
        self._stale = True
        self._evaluation = None

    def reset(self) -> None:
        """Forget all draws, for a new run."""
        self.draw = self._evaluation = None
        self._stale = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's draw. The reference's states are not in it: they are computed anew."""
        draw = self.draw
        state: dict[str, Any] = {"world_size": self.world_size, "samples": self.samples, "draw": None}
        if draw is not None:
            state["draw"] = {name: x.cpu() for name, x in vars(draw.samples).items()}
            state |= {"step": draw.step, "seconds": draw.seconds}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved draw. With another number of ranks or of samples, warns and draws anew."""
        self.reset()
        if state["draw"] is None:
            return
        if (state["world_size"], state["samples"]) != (self.world_size, self.samples):
            warnings.warn(
                f"the saved samples are {state['samples']} on {state['world_size']} ranks, not {self.samples} on "
                f"{self.world_size}: new ones are drawn, so the run continues, but not with the same numbers",
                stacklevel=2,
            )
            return
        samples = Samples(**state["draw"]).to(self.device)
        self.draw = KLDraw(samples, samples.lengths.tolist(), None, state["step"], state["seconds"])
        self._stale = True

    def _drawn(self, index: int, step: int) -> KLDraw:
        start = time.perf_counter()
        prompts = self._prompts(index)
        responses = self.sampler.sample(prompts, self.max_new_tokens, seed_of(self.seed, "samples", index, self.rank))
        if len(responses) != len(prompts):
            raise ValueError(f"sampler must give a response to each of {len(prompts)} prompts, got {len(responses)}")
        samples = Samples.from_lists(prompts, responses, eos=self.special.eos, pad=self.special.pad, device=self.device)
        if not any(responses):
            warnings.warn("all sampled responses are empty: the KL is 0 until the next draw", stacklevel=2)
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        return KLDraw(samples, lengths, self._scored(samples), step, time.perf_counter() - start)

    def _prompts(self, index: int) -> list[list[int]]:
        """This rank's prompts of a draw."""
        count, share = len(self.prompts), self.samples // self.world_size
        first = max(index, 0) * self.samples + self.rank * share
        places = range(first, first + share)
        orders = {}
        for epoch in {place // count for place in places}:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "prompts", epoch, index == EVALUATION))
            orders[epoch] = torch.randperm(count, generator=generator)
        return [self._prompt(int(orders[place // count][place % count])) for place in places]

    def _prompt(self, row: int) -> list[int]:
        ids = [int(i) for i in self.prompts[row]]
        if not ids:
            if self.special.bos is None:
                raise ValueError(f"prompts must not be empty, as the tokenizer has no bos: got none in row {row}")
            ids = [self.special.bos]
        return ids if self.max_length is None else ids[-(self.max_length - self.max_new_tokens) :]

    def _scored(self, samples: Samples) -> Tensor | None:
        if self.keep == "recompute":
            return None
        call = self.reference.hidden if self.keep == "hidden" else self.reference.logits
        size = self.batch_size or max(len(samples), 1)
        states = []
        for first in range(0, len(samples), size):
            rows = slice(first, first + size)
            inputs = {"input_ids": samples.ids[rows], "attention_mask": samples.attention_mask[rows].long()}
            states.append(call(inputs))
        return torch.cat(states)
