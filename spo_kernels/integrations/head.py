"""A function of hidden states and head, called inside a model's ``forward``.

Inside ``forward`` DDP, FSDP, PEFT, checkpointing and autocast have done their part: parameters are gathered, adapters
are applied, and a scalar that the function returns has the hooks that the engine needs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spo_kernels import gather_head, head_options

__all__ = ["attach_head", "attached_options", "gather_head", "head_options", "unwrapped"]

_MARK = "_spo_head_options"  # attribute of a model with a head: its options


def _hidden_states(model: Any, *args: Any, **inputs: Any) -> Tensor:
    return model.base_model(*args, use_cache=False, **inputs).last_hidden_state


def _output_embeddings(model: Any) -> nn.Module:
    return model.get_output_embeddings()


def _without_adapter(embeddings: Any) -> Any:
    if hasattr(embeddings, "base_layer"):
        raise ValueError("model must have no adapter on its head, whose weight the loss reads: leave lm_head out")
    return embeddings


def unwrapped(model: Any) -> Any:
    """The model within DDP and within PEFT."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_head(
    model: nn.Module,
    *,
    options: dict[str, Any] | None = None,
    backbone: Callable[..., Tensor] = _hidden_states,
    head: Callable[[Any], nn.Module] = _output_embeddings,
) -> None:
    """Let ``model(..., spo_head=fn)`` return ``fn(hidden, weight, bias, options)``; ``spo_logits=fn``: ``fn(logits)``.

    ``fn`` runs inside ``model.forward``. Without the two arguments ``forward`` is as it was, and so is ``generate``.
    The logits of ``spo_logits`` are those of the model's own forward. Attach before DDP or FSDP wrap the model; their
    wrappers pass the arguments on. Of a PEFT model, the base model gets the head. A second call changes nothing. A copy
    of the model has the head too.

    The head's weight may be a DTensor inside ``forward``, where FSDP2 shards the head as a unit of its own.
    `gather_head` makes a Tensor of it, whose gradient is the mean over the processes.

    Args:
        model: a Hugging Face causal language model, or any module with the two following functions.
        options: what `head_options` returns; None: of ``model.config``. If `head_options` refuses the configuration,
            ``spo_head`` raises its ValueError, and ``spo_logits`` works.
        backbone: ``backbone(model, *args, **inputs)`` gives the hidden states [B, T, H] before the head.
        head: ``head(model)`` gives the module with ``weight`` [V, H] and perhaps ``bias`` [V].

    Raises:
        ValueError: the model has no output embeddings with a weight, or an adapter on them. ``spo_head`` raises it too
            if the adapter came later.
    """
    model = unwrapped(model)
    if hasattr(model, _MARK):
        return
    embeddings = _without_adapter(head(model))
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        given = f"{type(model).__name__} with {type(embeddings).__name__}"
        raise ValueError(f"model must have output embeddings with a weight, got {given}")
    known: dict[str, Any] | ValueError
    try:
        known = head_options(model.config) if options is None else options
    except ValueError as error:
        known = error
    # A function, not a bound method: in a copy of the model it must run the copy.
    original = model.forward.__func__ if isinstance(model.forward, types.MethodType) else type(model).forward

    @functools.wraps(original)  # generate() reads the signature
    def forward(
        self: nn.Module,
        *args: Any,
        spo_head: Callable[..., Any] | None = None,
        spo_logits: Callable[..., Any] | None = None,
        **inputs: Any,
    ) -> Any:
        if spo_head is not None:
            if isinstance(known, ValueError):
                raise known
            hidden = backbone(self, *args, **inputs)
            module: Any = _without_adapter(head(self))
            gathered = gather_head(module.weight, getattr(module, "bias", None))
            return spo_head(hidden.to(gathered.weight.device), gathered.weight, gathered.bias, known)
        if spo_logits is None:
            return original(self, *args, **inputs)
        if backbone is _hidden_states:
            inputs["use_cache"] = False
        output = original(self, *args, **inputs)
        return spo_logits(output if isinstance(output, Tensor) else output.logits)

    setattr(model, _MARK, known)
    model.forward = types.MethodType(forward, model)


def attached_options(model: nn.Module) -> dict[str, Any] | ValueError:
    """The options of a model's attached head; the ValueError of `head_options` where its configuration is refused.

    Raises:
        ValueError: the model has no attached head.
    """
    known = getattr(unwrapped(model), _MARK, None)
    if known is None:
        raise ValueError(f"model must have a head attached by attach_head, got {type(model).__name__} without")
    return known
