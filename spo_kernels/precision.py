"""Every decision about dtypes: the dtype of sums, and where half-precision matrix products pay."""

from __future__ import annotations

import functools
import time

import torch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)

# Use half-precision products only where they are at least this many times faster than float32. They round the logits,
# so the choice should not change from one process to the next.
_NATIVE_MARGIN = 1.25


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of outputs and of accumulation: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of outputs."""
    return x.to(accumulate_dtype(x.dtype))


def can_precompute_gradient(dtype: torch.dtype) -> bool:
    """Whether the forward may compute a gradient in this dtype, before the upstream scalar is known.

    False for float16: the upstream scalar may be a loss scale, without which gradients fall below float16's range.
    """
    return dtype != torch.float16


@functools.cache
def native_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether matrix products of a half-precision dtype run in that dtype rather than in float32.

    Measured once per process on CPUs. A CPU without instructions for the dtype takes 4 to 30 times as long as for
    float32. A CPU with them (AMX, avx512_bf16) takes half as long or less. The timed product has a transposed operand,
    the slowest layout for half precision.
    """
    if device_type != "cpu":
        return True

    def seconds(operand: torch.dtype) -> float:
        dlogits, hidden = torch.ones(256, 1024, dtype=operand), torch.ones(256, 512, dtype=operand)
        times = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            torch.mm(dlogits.t(), hidden)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch._C._DisableTorchDispatch():  # the first call may come under fake tensors, which take no time
        return _NATIVE_MARGIN * seconds(dtype) < seconds(torch.float32)


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a head's tiles and of the operands of their matrix products, for hidden states of this dtype."""
    return dtype if dtype not in HALF_DTYPES or native_products(device_type, dtype) else torch.float32


# torch.compile must treat this as a constant: it may not trace the timing in native_products.
@torch.compiler.assume_constant_result
def precomputed_gradient_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a forward stores its gradients until the backward scales them, for hidden states of this dtype.

    It is bfloat16 where the matrix products are bfloat16: the products round the gradients anyway, and bfloat16 halves
    the memory. Callers exclude float16, see `can_precompute_gradient`.
    """
    native = dtype == torch.bfloat16 and product_dtype(device_type, dtype) == dtype
    return dtype if native else accumulate_dtype(dtype)


def accumulates_in_float32(total: torch.dtype, operands: torch.dtype, device_type: str) -> bool:
    """Whether ``addmm`` of half-precision operands can add to a float32 sum itself, without a rounded temporary."""
    half = operands in HALF_DTYPES
    return half and total == torch.float32 and device_type == "cuda" and torch.version.hip is None
