"""What the public functions refuse, with the text of each refusal: the argument, what it must be, what came.

`like`: name of the argument whose shape, dtype or device the checked argument must share; it appears in the text.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from spo_kernels.precision import LOGITS_DTYPES, accumulate_dtype, upcast

IGNORE_INDEX = -100  # label of rows that are not wanted, unless the caller says otherwise
# The largest finite number. torch.compile takes numbers that change for finite and drops comparisons with math.inf.
LARGEST = torch.finfo(torch.float64).max


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_is_number(name: str, value: object) -> None:
    """`value` must be a Python number; a Tensor would sync when compared."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False) -> None:
    """`value` must be a Python number in [low, high), (low, high) if `above`."""
    check_is_number(name, value)
    # Written so that NaN fails.
    if not ((low < value if above else low <= value) and value < high and value <= LARGEST):
        upper = " and finite" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name} must be {'>' if above else '>='} {low:g}{upper}, got {value}")


def check_logits(logits: Tensor, name: str) -> None:
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {list(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")


def check_ref_logits(ref_logits: Tensor, logits: Tensor, read: int | None = None) -> None:
    """read: columns that are read, if a vocab_size is given: the others are padding, whose number may differ."""
    check_logits(ref_logits, "ref_logits")
    if read is not None and (ref_logits.shape[:-1] != logits.shape[:-1] or ref_logits.shape[-1] < read):
        wanted = ", ".join(map(str, (*logits.shape[:-1], "V")))
        raise ValueError(f"ref_logits must be [{wanted}] like logits, with V >= {read}, got {list(ref_logits.shape)}")
    if read is None and ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits must be {list(logits.shape)} like logits, got {list(ref_logits.shape)}; give vocab_size where "
            "the vocabularies are padded differently"
        )
    if (ref_logits.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise ValueError(f"ref_logits must be float64 exactly when logits are, got {ref_logits.dtype}")
    if ref_logits.device != logits.device:
        raise ValueError(f"ref_logits must be on {logits.device} like logits, got {ref_logits.device}")
    if ref_logits.requires_grad:
        raise ValueError("ref_logits must not require grad: the gradient flows to the policy only (use .detach())")


def check_rows(values: Tensor, name: str, dtype: torch.dtype, logits: Tensor, like: str = "logits") -> None:
    """values must have the shape of logits ``[..., V]`` without V. like: name of logits in the error text."""
    wanted = logits.shape[:-1]
    if values.shape != wanted or values.dtype != dtype:
        raise ValueError(f"{name} must be {list(wanted)} {str(dtype).removeprefix('torch.')}, got {describe(values)}")
    if values.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like {like}, got {values.device}")


def checked_row_weight(mask: Tensor | None, row_weight: Tensor | None, rows: Tensor, like: str) -> Tensor | None:
    """The weight of each row's KL, 0 where masked, as a constant in the dtype of the KL; None if all are 1."""
    if mask is not None:
        check_rows(mask, "mask", torch.bool, rows, like)
    if row_weight is not None:
        if not row_weight.is_floating_point():
            raise ValueError(f"row_weight must be floating, got {row_weight.dtype}")
        check_rows(row_weight, "row_weight", row_weight.dtype, rows, like)
    weight = row_weight
    if mask is not None:
        weight = mask.to(accumulate_dtype(rows.dtype)) if weight is None else torch.where(mask, weight, 0)
    return None if weight is None else savable(weight.detach().to(accumulate_dtype(rows.dtype)))


def check_sequences(values: Tensor, cu_seqlens: Tensor | None, name: str, like: str = "logits") -> None:
    """values must be ``[B, T]``, or ``[N]`` or ``[1, N]`` with cu_seqlens, which must be on their device."""
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(f"{name} must be [B, T] without cu_seqlens, got {list(values.shape)}")
        return
    if values.dim() != 1 and not (values.dim() == 2 and values.shape[0] == 1):
        raise ValueError(f"{name} must be [N] or [1, N] with cu_seqlens, got {list(values.shape)}")
    check_cu_seqlens(cu_seqlens, "cu_seqlens", values, like)


def check_cu_seqlens(cu_seqlens: Tensor, name: str, values: Tensor, like: str) -> None:
    """cu_seqlens must be ``[B + 1]`` integers on the device of values. This check does not read the integers."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be [B + 1] int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"{name} must be on {values.device} like {like}, got {cu_seqlens.device}")


def differentiated_eagerly(tensor: Tensor) -> bool:
    """Whether autograd records operations on the tensor, outside torch.compile."""
    return torch.is_grad_enabled() and tensor.requires_grad and not torch.compiler.is_compiling()


@overload
def savable(tensor: Tensor) -> Tensor: ...


@overload
def savable(tensor: Tensor | None) -> Tensor | None: ...


def savable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of one made under inference_mode, which autograd would refuse to save."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def check_inplace(logits: Tensor, option: str) -> None:
    """Refuse logits whose memory must not be overwritten: leaves, a non-unit last stride, elements sharing memory.

    Without gradients and under torch.compile nothing is overwritten.
    """
    if not differentiated_eagerly(logits):
        return
    base = logits._base if logits._is_view() and logits._base is not None else logits
    if base.is_leaf:
        raise ValueError(f"{option}=True would overwrite a leaf tensor (or a view of one) with its gradient")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{option}=True needs logits with a unit last stride, got strides {logits.stride()}")
    extent = 0
    for size, stride in sorted(zip(logits.shape, logits.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1:
            if stride <= extent:
                raise ValueError(f"{option}=True needs logits without shared memory, got strides {logits.stride()}")
            extent += (size - 1) * stride


def check_markable(logits: Tensor) -> None:
    """Refuse views that autograd does not track: a later use of the overwritten memory would go unseen."""
    if not differentiated_eagerly(logits) or not logits._is_view():
        return
    autograd = torch._C._autograd
    if autograd._get_creation_meta(logits) != autograd.CreationMeta.DEFAULT:
        raise ValueError(
            "overwrite_logits=True needs logits that an in-place operation may change, got a view that chunk, split, "
            "unbind or a no_grad block made; take a slice instead"
        )


def check_float(name: str, x: Tensor, form: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a floating-point Tensor {form}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point Tensor {form}, got {x.dtype}")


def check_like(name: str, x: Tensor, like_name: str, like: Tensor, *, same_dtype: bool) -> None:
    """`x` must be a floating-point [P] on the device of `like`, a checked [P]."""
    check_float(name, x, "[P]")
    if x.shape != like.shape:
        raise ValueError(f"{name} must be [P] like {like_name}, got {list(x.shape)} against {list(like.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, got {x.device} against {like.device}")
    if same_dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, got {x.dtype} against {like.dtype}")


def checked_pair(chosen_name: str, chosen: Tensor, rejected_name: str, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-probs [P], checked to have the same shape, dtype and device; in float32 (float64 for float64)."""
    check_float(chosen_name, chosen, "[P]")
    if chosen.dim() != 1:
        raise ValueError(f"{chosen_name} must be [P], got {list(chosen.shape)}")
    check_like(rejected_name, rejected, chosen_name, chosen, same_dtype=True)
    return upcast(chosen), upcast(rejected)


def checked_references(chosen: Tensor | None, rejected: Tensor | None, policy: Tensor) -> tuple[Tensor, Tensor] | None:
    """The reference's log-probs as constants in the policy's dtype; None if neither was given."""
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        given = "reference_rejected_logps" if chosen is None else "reference_chosen_logps"
        raise ValueError(f"reference_chosen_logps and reference_rejected_logps come together, got only {given}")
    check_like("reference_chosen_logps", chosen, "policy_chosen_logps", policy, same_dtype=False)
    check_like("reference_rejected_logps", rejected, "policy_chosen_logps", policy, same_dtype=False)
    return chosen.detach().to(policy.dtype), rejected.detach().to(policy.dtype)
