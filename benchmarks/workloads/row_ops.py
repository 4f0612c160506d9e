"""The row ops: inputs, the bytes that an op must move, and its float64 truth. One entry of `OPS` per op.

N rows, V vocabulary. A *pass* is ``fwd`` (no gradients recorded), ``fwd_bwd``, or ``fwd_bwd_scaled``: ``fwd_bwd`` with
an upstream gradient other than 1, for a scalar whose gradient the forward stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import reference

Shape = tuple[int, ...]

SCALED_UPSTREAM = 0.3
# On randn x 40 most of the softmax is denormal in float32. An exponential without flush-to-zero is 15-28x slower there.
DENORMAL_SCALE = 40.0

_TILE_ROWS = 128
_TRUTH_ROWS = 64


class Traffic(NamedTuple):
    """The least that an op must move, in tensors of the logits' size. Values per row are under 0.1 % and do not count.

    The count is the same for every provider, so a provider that moves more has a smaller share of the bandwidth.
    """

    read: int  # tensors moved by sweeps that only read
    update: int  # tensors moved by sweeps that read logits and write their gradient: 2 for each sweep


@dataclass(frozen=True)
class Op:
    arguments: tuple[str, ...]  # keys of the inputs, in the order in which providers take them
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]
    passes: Mapping[str, Traffic]
    make_inputs: Callable[[Shape, torch.dtype, torch.device, float], dict[str, Tensor]]
    truth: Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], dict[str, Tensor]]

    def bytes_moved(self, pass_name: str, shape: Shape, dtype: torch.dtype) -> Traffic:
        """`Traffic` in bytes."""
        tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
        traffic = self.passes[pass_name]
        return Traffic(traffic.read * tensor_bytes, traffic.update * tensor_bytes)


def row_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, scale: float) -> dict[str, Tensor]:
    """Inputs of every row op at ``shape = (N, V)``: normal logits times scale, uniform labels and row weights."""
    generator = torch.Generator(device).manual_seed(0)
    rows, vocabulary = shape
    return {
        "logits": _normal_rows(rows, vocabulary, dtype, device, scale, generator),
        "ref_logits": _normal_rows(rows, vocabulary, dtype, device, scale, generator),
        "labels": torch.randint(vocabulary, (rows,), device=device, generator=generator),
        "row_weight": (torch.rand(rows, device=device, generator=generator) + 0.5) / rows,
    }


def _normal_rows(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, scale: float, generator: torch.Generator
) -> Tensor:
    # A few random rows, repeated. Random numbers cost more than any op here, and no op's time depends on repetition.
    tile = torch.randn(min(rows, _TILE_ROWS), vocabulary, device=device, generator=generator).mul_(scale).to(dtype)
    out = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    for start in range(0, rows, _TILE_ROWS):
        out[start : start + _TILE_ROWS] = tile[: rows - start]
    return out


def row_truth(inputs: Mapping[str, Tensor], rows: Tensor, upstream: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float64 ``logps``, ``kl`` and ``logits`` (their gradient) of the given rows, and ``loss`` over all rows.

    upstream: gradients of ``logps`` ``[N]``, ``kl`` ``[N]`` or ``loss`` ``[]``. If empty, no gradient is computed.
    """
    logits, ref_logits = inputs["logits"][rows].double(), inputs["ref_logits"][rows].double()
    labels = inputs["labels"][rows]
    logps, kl, stats = reference.token_stats_fwd(logits, labels, ref_logits, None, -100)
    truth = {"logps": logps, "kl": kl}
    dlogps, dkl = upstream.get("logps"), upstream.get("kl")
    if (dloss := upstream.get("loss")) is not None:
        dkl = dloss * inputs["row_weight"]
        truth["loss"] = _weighted_kl(inputs)
    if upstream:
        truth["logits"] = reference.token_stats_bwd(
            None if dlogps is None else dlogps[rows],
            None if dkl is None else dkl[rows],
            *(logits, labels, ref_logits, None, kl, stats, -100, False),
        )
    return truth


def _weighted_kl(inputs: Mapping[str, Tensor]) -> Tensor:
    """``sum_i row_weight_i KL_i`` in float64, a few rows at a time, so that the copies fit the memory."""
    parts = zip(*(inputs[name].split(_TRUTH_ROWS) for name in ("logits", "ref_logits", "row_weight")), strict=True)
    total = inputs["row_weight"].new_zeros((), dtype=torch.float64)
    for logits, ref_logits, weight in parts:
        _, kl, _ = reference.token_stats_fwd(logits.double(), None, ref_logits.double(), None, -100)
        total += kl @ weight.double()
    return total


def _row_op(arguments: tuple[str, ...], outputs: tuple[str, ...], passes: Mapping[str, Traffic]) -> Op:
    return Op(arguments, ("logits",), outputs, passes, row_inputs, row_truth)


_LOGPS = {"fwd": Traffic(read=1, update=0), "fwd_bwd": Traffic(read=1, update=2)}
_KL = {"fwd": Traffic(read=2, update=0), "fwd_bwd": Traffic(read=3, update=2)}
# kl_loss writes the gradient for an upstream gradient of 1 while the row is in cache. Another upstream gradient becomes
# known only after all rows were read, and costs a second sweep.
_KL_LOSS = {"fwd_bwd": Traffic(read=1, update=2), "fwd_bwd_scaled": Traffic(read=1, update=4)}

OPS: dict[str, Op] = {
    "token_logps": _row_op(("logits", "labels"), ("logps",), _LOGPS),
    "token_kl": _row_op(("logits", "ref_logits"), ("kl",), _KL),
    "token_logps_kl": _row_op(("logits", "labels", "ref_logits"), ("logps", "kl"), _KL),
    "kl_loss": _row_op(("logits", "ref_logits", "row_weight"), ("loss",), _KL_LOSS),
}


class Workload(NamedTuple):
    """One op and pass, written ``token_logps.fwd_bwd``."""

    op: str
    pass_name: str

    def __str__(self) -> str:
        return f"{self.op}.{self.pass_name}"


WORKLOADS = [Workload(op, pass_name) for op, entry in OPS.items() for pass_name in entry.passes]
# One workload of each kind. `token_logps_kl` is left out, since it moves the same bytes as `token_kl`.
REPRESENTATIVE_WORKLOADS = (
    Workload("token_logps", "fwd"),
    Workload("token_logps", "fwd_bwd"),
    Workload("token_kl", "fwd"),
    Workload("token_kl", "fwd_bwd"),
    Workload("kl_loss", "fwd_bwd"),
)


class Case(NamedTuple):
    """One shape and dtype, and a factor on the logits."""

    shape: Shape
    dtype: torch.dtype
    scale: float = 1.0

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {self.dtype_name}" + (
            "" if self.scale == 1 else f" x {self.scale:g}"
        )


# Two vocabularies of real models (Llama 2, Qwen 2.5) well beyond any cache, the large one with the same bytes in both
# dtypes; rows that fit a last-level cache; and the single row of a decoding step.
DEFAULT_CASES = (
    Case((4096, 32000), torch.float32),
    Case((4096, 32000), torch.bfloat16),
    Case((1024, 151936), torch.float32),
    Case((2048, 151936), torch.bfloat16),
    Case((256, 32000), torch.float32),
    Case((256, 32000), torch.bfloat16),
    Case((1, 151936), torch.float32),
    Case((1, 151936), torch.bfloat16),
)
