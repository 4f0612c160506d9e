"""A function of hidden states and head, called inside a model's ``forward``.

Inside ``forward`` DDP, FSDP, PEFT, checkpointing and autocast have done their part: parameters are gathered, adapters
are applied, and a scalar that the function returns has the hooks that the engine needs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import gather_head, head_options

__all__ = ["attach_head", "attached_options", "gather_head", "head_options", "unwrapped"]

_MARK = "_spo_head_options"  # attribute of a model with a head: its options
_VOCAB_DIM = "_spo_vocab_dim"  # attribute of such a model: vocab_dim of attach_head


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
    vocab_dim: str | int | None = None,
) -> None:
    """Let ``model(..., spo_head=fn)`` return ``fn(hidden, weight, bias, options)``; ``spo_logits=fn``: ``fn(logits)``.

    ``fn`` runs inside ``model.forward``. Without the two arguments ``forward`` is as it was, and so is ``generate``.
    The logits of ``spo_logits`` are those of the model's own forward. Attach before DDP or FSDP wrap the model; their
    wrappers pass the arguments on. Of a PEFT model, the base model gets the head. A second call changes nothing. A copy
    of the model has the head too.

    Where FSDP2 shards the head as a unit of its own, or in one with the last norm, ``fn`` runs inside the ``forward``
    of that unit: FSDP gathers the weight and reduces its gradient as it does for the model's own ``forward``. Where
    tensor parallelism shards the head, `gather_head` makes Tensors of its DTensors.

    Args:
        model: a Hugging Face causal language model, or any module with the two following functions.
        options: what `head_options` returns; None: of ``model.config``. If `head_options` refuses the configuration,
            ``spo_head`` raises its ValueError, and ``spo_logits`` works.
        backbone: ``backbone(model, *args, **inputs)`` gives the hidden states [B, T, H] before the head.
        head: ``head(model)`` gives the module with ``weight`` [V, H] and perhaps ``bias`` [V].
        vocab_dim: name (or index) of the mesh dimension over which tensor parallelism splits the vocabulary. ``fn``
            gets this process's rows of the head, and options with ``process_group`` and ``vocab_shards``, see
            `gather_head`. None: ``fn`` gets the whole head.

    Raises:
        ValueError: the model has no output embeddings with a weight, or an adapter on them. In ``forward``: an adapter
            came later; vocab_dim is given, and FSDP2 shards the head as a unit of its own.
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
            hidden, module = backbone(self, *args, **inputs), _without_adapter(head(self))
            call = functools.partial(_with_head, module, vocab_dim, known, spo_head)
            return _inside(module, call, hidden) if _is_fsdp_unit(module) else call(hidden)
        if spo_logits is None:
            return original(self, *args, **inputs)
        if backbone is _hidden_states:
            inputs["use_cache"] = False
        output = original(self, *args, **inputs)
        return spo_logits(output if isinstance(output, Tensor) else output.logits)

    setattr(model, _MARK, known)
    setattr(model, _VOCAB_DIM, vocab_dim)
    model.forward = types.MethodType(forward, model)


def _with_head(
    module: Any, vocab_dim: str | int | None, options: dict[str, Any], fn: Callable[..., Any], hidden: Tensor
) -> Any:
    """``fn`` of the hidden states and the head's Tensors."""
    if vocab_dim is not None and _is_fsdp_unit(module):
        raise ValueError(
            f"the head must be no FSDP unit of its own where vocab_dim={vocab_dim!r} splits its vocabulary: leave it "
            "to the unit of the whole model"
        )
    gathered = gather_head(module.weight, getattr(module, "bias", None), vocab_dim=vocab_dim)
    if gathered.process_group is not None:
        options = {**options, "process_group": gathered.process_group, "vocab_shards": gathered.vocab_shards}
    return fn(hidden.to(gathered.weight.device), gathered.weight, gathered.bias, options)


def _is_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module as a unit, alone or with others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _inside(module: nn.Module, call: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """``call(hidden)`` in place of the module's ``forward``, between the hooks that FSDP has on the module."""
    own = vars(module).get("forward")
    module.forward = call
    try:
        return module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def attached_vocab_dim(model: nn.Module) -> str | int | None:
    """The mesh dimension that splits the vocabulary of a model's attached head."""
    return getattr(unwrapped(model), _VOCAB_DIM, None)


def attached_options(model: nn.Module) -> dict[str, Any] | ValueError:
    """The options of a model's attached head; the ValueError of `head_options` where its configuration is refused.

    Raises:
        ValueError: the model has no attached head.
    """
    known = getattr(unwrapped(model), _MARK, None)
    if known is None:
        raise ValueError(f"model must have a head attached by attach_head, got {type(model).__name__} without")
    return known
