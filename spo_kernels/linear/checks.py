"""What the head's functions refuse, and the records they make of what they accept."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.checks import describe
from spo_kernels.linear.records import Head, HeadOptions
from spo_kernels.logit_options import LogitOptions, RefLogitOptions, checked_transforms
from spo_kernels.precision import LOGITS_DTYPES
from spo_kernels.shards import Columns


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of rows >= 1, or None, got {chunk_size!r}")


def checked_options(
    head: Head,
    hidden: Tensor,
    policy: LogitOptions,
    reference: RefLogitOptions,
    chunk_size: int | None,
    columns: Columns,
    mixture: float = 0.0,
) -> HeadOptions:
    """The checked options of a head's function.

    Args:
        hidden: ``[..., H]``, the argument of which the head was made.
        mixture: checked already.
    """
    transforms = checked_transforms(policy, reference, hidden, "hidden", head.hidden.dtype)
    check_chunk_size(chunk_size)
    return HeadOptions(chunk_size, columns, *transforms, mixture)


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> Head:
    """A head of rows ``[N, H]``, cast as autocast casts linear layers. prefix: of the arguments' names."""
    device_type = hidden.device.type
    # Not torch.amp.is_autocast_available, which Dynamo of torch 2.10 cannot trace. Other devices may know no autocast.
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{prefix}hidden must be [..., H] with H >= 1, got {list(hidden.shape)}")
    if hidden.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{prefix}hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != width:
        raise ValueError(f"{prefix}weight must be [V, {width}] with V >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}], got {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{prefix}{name} must be {hidden.dtype} like {prefix}hidden, got {tensor.dtype}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{prefix}{name} must be on {hidden.device} like {prefix}hidden, got {tensor.device}")
    return Head(hidden.reshape(-1, width), weight, bias)


def checked_ref_head(
    ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, hidden: Tensor, head: Head, read: int | None
) -> Head:
    """The reference's head, with the vocabulary of the policy's head and the rows of its hidden ``[..., H]``.

    read: rows of the weight that are read, if a vocab_size is given: the others are padding, whose number may differ.
    """
    for name, tensor in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: the gradient flows to the policy only (use .detach())")
    ref_head = checked_head(ref_hidden, ref_weight, ref_bias, "ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        wanted = ", ".join(map(str, (*hidden.shape[:-1], "H'")))
        raise ValueError(f"ref_hidden must be [{wanted}] like hidden, got {list(ref_hidden.shape)}")
    if read is not None and ref_weight.shape[0] < read:
        raise ValueError(
            f"ref_weight must have at least the {read} rows of weight that are read, got {ref_weight.shape[0]}"
        )
    if read is None and ref_weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"ref_weight must have V = {head.weight.shape[0]} rows like weight, got {ref_weight.shape[0]}; give "
            "vocab_size where the vocabularies are padded differently"
        )
    if ref_head.hidden.dtype != head.hidden.dtype:
        raise ValueError(f"ref_hidden must be {head.hidden.dtype} like hidden, got {ref_hidden.dtype}")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden must be on {hidden.device} like hidden, got {ref_hidden.device}")
    return ref_head


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
