"""Triton backend, for NVIDIA and AMD GPUs: how the kernels of `.triton_kernels` are launched.

Under ``TRITON_INTERPRET=1`` (set before this module is imported) the kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from spo_kernels.backends import mixtures
from spo_kernels.backends import triton_kernels as kernels
from spo_kernels.precision import accumulate_dtype
from spo_kernels.reference import LABEL_ELSEWHERE, PLAIN, RowOptions

_WARP = 64 if torch.version.hip else 32  # threads; 64 on AMD's data-centre GPUs
_VECTOR_BYTES = 16  # the widest load
# Equal logits must give equal sums. A compiler may contract one of two equal expressions and not the other, so
# contraction is off. Triton before 3.10 contracts by default.
_NO_CONTRACTION = {"enable_fp_fusion": False}


class RowConfig(NamedTuple):
    """Launch of a kernel that reads a whole row per program, in tiles of ``[steps, lanes, vector]``."""

    steps: int
    lanes: int
    vector: int
    threads: int


class BlockConfig(NamedTuple):
    """Launch of a kernel that takes one block of a row per program."""

    block: int
    threads: int


def row_config(V: int, itemsize: int, tensors: int, aligned: bool, softcap: bool = False) -> RowConfig:
    """For rows of V elements, read from this many tensors at once. itemsize: bytes of their smaller element.

    Aligned rows: a lane is one vector load. Two steps are fastest on an H100, because more steps leave too few programs
    to a multiprocessor. Unaligned rows: the compiler hands out single elements, so a lane is one element and there are
    `vector` times as many lanes; steps are as many as registers allow: half as many beside the tanh of a softcap.
    """
    threads = 64 if V <= 1024 else 128 if V <= 32768 else 256
    vector = _VECTOR_BYTES // itemsize
    if aligned:
        return RowConfig(2, threads, vector, threads)
    steps = 8 if tensors == 1 else 4
    return RowConfig(steps // 2 if softcap else steps, threads * vector, 1, threads)


def block_config(V: int, softcap: bool = False) -> BlockConfig:
    """For rows of V elements in an elementwise kernel: short rows must not idle most of a block.

    A thread takes 16 elements: 8 beside the tanh of a softcap, or float64 would not fit its registers.
    """
    block, threads = (1024, 64) if V <= 1024 else (4096, 256)
    return BlockConfig(block // 2 if softcap else block, threads)


class _Rows(NamedTuple):
    """Logits as kernels address them: row i starts at ``(i // T) * stride_b + (i % T) * stride_t``."""

    T: int
    stride_b: int
    stride_t: int


def _rows(logits: Tensor, name: str) -> _Rows:
    if logits.dim() not in (2, 3) or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
        raise ValueError(
            f"{name} must be [N, V] or [B, T, V] with a unit last stride, "
            f"got {list(logits.shape)} with strides {logits.stride()}"
        )
    _check_device(logits, name)
    if logits.dim() == 2:
        return _Rows(1, logits.stride(0), 0)
    return _Rows(logits.shape[1], logits.stride(0), logits.stride(1))


def _check_device(tensor: Tensor, name: str) -> None:
    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(
            f"{name} must be on a GPU (or TRITON_INTERPRET=1 be set before the import), got {tensor.device}"
        )


class _Options(NamedTuple):
    """`RowOptions` as kernels take them, checked."""

    V: int  # columns that are read
    width: int | None  # columns of logits and gradient; None for V
    transform: Tensor | None  # contiguous [1 or 2, 1 or N]
    ref_transform: Tensor | None

    @property
    def softcap(self) -> bool:
        return any(x is not None and x.shape[0] == 2 for x in (self.transform, self.ref_transform))

    @property
    def transforms(self) -> dict[str, Tensor | int | None]:
        """The arguments of the kernels that are about transforms."""
        arguments: dict[str, Tensor | int | None] = {}
        for prefix, transform in (("", self.transform), ("ref_", self.ref_transform)):
            factors, rows = (0, None) if transform is None else transform.shape
            arguments |= {f"{prefix}transform": transform, f"{prefix}transform_rows": rows}
            arguments[f"{prefix.upper()}FACTORS"] = factors
        return arguments


def _options(logits: Tensor, ref_logits: Tensor | None, options: RowOptions) -> _Options:
    *shape, width = logits.shape
    V = width if options.vocab_size is None else int(options.vocab_size)
    if options.vocab_size is not None and not 1 <= V <= width:
        raise ValueError(f"vocab_size must be in [1, {width}], got {V}")
    if ref_logits is not None:
        *ref_shape, ref_width = ref_logits.shape
        if ref_shape != shape or (options.vocab_size is None and ref_width != width):
            raise ValueError(f"ref_logits must have the shape of logits {[*logits.shape]}, got {[*ref_logits.shape]}")
        if ref_width < V:
            raise ValueError(f"ref_logits must have at least {V} columns, got {ref_width}")
    transform = _transform(options.transform, "transform", logits)
    ref_transform = None if ref_logits is None else _transform(options.ref_transform, "ref_transform", logits)
    return _Options(V, None if width == V else width, transform, ref_transform)


def _transform(transform: Tensor | None, name: str, logits: Tensor) -> Tensor | None:
    if transform is None:
        return None
    N, dtype = logits.shape[:-1].numel(), accumulate_dtype(logits.dtype)
    shape = [*transform.shape]
    if len(shape) != 2 or shape[0] not in (1, 2) or shape[1] not in (1, N) or transform.dtype != dtype:
        raise ValueError(f"{name} must be [1 or 2, 1 or {N}] {dtype}, got {shape} {transform.dtype}")
    _check_device(transform, name)
    return transform.contiguous()


def _aligned(V: int, *tensors: Tensor | None) -> bool:
    """Whether V and every pointer and stride are multiples of 16. Only then does Triton load whole vectors.

    Sums of aligned and unaligned rows are grouped differently, so a row's last bits depend on the alignment.
    """
    sizes = [size for x in tensors if x is not None for size in (x.data_ptr(), *x.stride()[:-1])]
    return all(size % 16 == 0 for size in (V, *sizes))


def _per_row(values: Tensor | None) -> Tensor | None:
    # Labels are often a slice, and the gradient of a sum is expanded. N values are not worth strides in the kernels.
    return None if values is None else values.contiguous()


def _check_labels(labels: Tensor, V: int, ignore_index: int) -> None:
    """RuntimeError for a label out of range, for CPU tensors only: on a GPU the kernel asserts, without a sync."""
    if labels.is_cpu:
        bad = labels[((labels < 0) | (labels >= V)) & (labels != ignore_index) & (labels != LABEL_ELSEWHERE)]
        if bad.numel():
            raise RuntimeError(f"labels must be in [0, {V}) or ignore_index {ignore_index}, got {bad[0].item()}")


def token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    options: RowOptions = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """`spo_kernels.reference.token_stats_fwd`; statistics of rows that are ignored and masked are 0."""
    if ref_logits is not None and options.mixture:
        return mixtures.token_stats_fwd(sys.modules[__name__], logits, labels, ref_logits, mask, ignore_index, options)
    rows = _rows(logits, "logits")
    ref_rows = rows if ref_logits is None else _rows(ref_logits, "ref_logits")
    checked = _options(logits, ref_logits, options)
    shape, V = logits.shape[:-1], checked.V
    dtype = accumulate_dtype(logits.dtype)
    logps = logits.new_empty((0,) if labels is None else shape, dtype=dtype)
    kl = logits.new_empty((0,) if ref_logits is None else shape, dtype=dtype)
    stats = logits.new_empty((2 if ref_logits is None else 4, *shape), dtype=dtype)
    if labels is not None:
        _check_labels(labels, V, ignore_index)
    if stats.numel():
        itemsize = min(t.element_size() for t in (logits, ref_logits) if t is not None)
        aligned = _aligned(V, logits, ref_logits)
        config = row_config(V, itemsize, 1 if ref_logits is None else 2, aligned, checked.softcap)
        with torch.cuda.device_of(logits):
            kernels.token_stats_fwd_kernel[(stats[0].numel(),)](
                logits,
                _per_row(labels),
                ref_logits,
                _per_row(mask),
                None if labels is None else logps,
                None if ref_logits is None else kl,
                stats,
                V,
                *rows,
                *ref_rows[1:],
                ignore_index,
                **checked.transforms,
                STEPS=config.steps,
                LANES=config.lanes,
                VECTOR=config.vector,
                num_warps=config.threads // _WARP,
                **_NO_CONTRACTION,
                # debug compiles the assertion on labels in; sanitize_overflow would check every integer operation too.
                debug=labels is not None,
                sanitize_overflow=False,
            )
    return logps, kl, stats


def token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    inplace: bool,
    dlse: Tensor | None = None,
    options: RowOptions = PLAIN,
) -> Tensor:
    """`spo_kernels.reference.token_stats_bwd`."""
    if labels is None or dlogps is None:
        labels = dlogps = None
    if ref_logits is None or dkl is None:
        ref_logits = mask = dkl = None
    rows = _rows(logits, "logits")
    ref_rows = rows if ref_logits is None else _rows(ref_logits, "ref_logits")
    checked = _options(logits, ref_logits, options)
    if labels is not None:
        _check_labels(labels, checked.V, ignore_index)
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel():
        N, width = logits.shape[:-1].numel(), logits.shape[-1]
        config = block_config(width, checked.softcap)
        with torch.cuda.device_of(logits):
            kernels.token_stats_bwd_kernel[(N * triton.cdiv(width, config.block),)](
                dlogits,
                _per_row(dlogps),
                _per_row(dkl),
                _per_row(dlse),
                logits,
                _per_row(labels),
                ref_logits,
                _per_row(mask),
                _per_row(kl),
                _per_row(stats),
                N,
                checked.V,
                checked.width,
                *rows,
                *_rows(dlogits, "dlogits")[1:],
                *ref_rows[1:],
                ignore_index,
                **checked.transforms,
                MIXTURE=options.mixture if ref_logits is not None else 0.0,
                BLOCK=config.block,
                num_warps=config.threads // _WARP,
                **_NO_CONTRACTION,
            )
    return dlogits


def mixture_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, stats: Tensor, options: RowOptions = PLAIN
) -> Tensor:
    """`spo_kernels.reference.mixture_kl`."""
    rows = _rows(logits, "logits")
    ref_rows = _rows(ref_logits, "ref_logits")
    checked = _options(logits, ref_logits, options)
    kls = torch.empty_like(stats[:2], memory_format=torch.contiguous_format)
    if kls.numel():
        itemsize = min(logits.element_size(), ref_logits.element_size())
        # The exponentials and the logarithm take registers, as a tanh does.
        config = row_config(checked.V, itemsize, 2, _aligned(checked.V, logits, ref_logits), softcap=True)
        with torch.cuda.device_of(logits):
            kernels.mixture_kl_kernel[(kls[0].numel(),)](
                logits,
                ref_logits,
                _per_row(mask),
                _per_row(stats),
                kls,
                kls[0].numel(),
                checked.V,
                *rows,
                *ref_rows[1:],
                **checked.transforms,
                STEPS=config.steps,
                LANES=config.lanes,
                VECTOR=config.vector,
                MIXTURE=options.mixture,
                num_warps=config.threads // _WARP,
                **_NO_CONTRACTION,
            )
    return kls


def kl_loss_fwd(
    logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None, inplace: bool, options: RowOptions = PLAIN
) -> tuple[Tensor, Tensor]:
    """`spo_kernels.reference.kl_loss_fwd`; the row losses are summed by torch, in an order that does not vary."""
    if options.mixture:
        return mixtures.kl_loss_fwd(sys.modules[__name__], logits, ref_logits, row_weight, inplace, options)
    rows = _rows(logits, "logits")
    ref_rows = _rows(ref_logits, "ref_logits")
    checked = _options(logits, ref_logits, options)
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    losses = logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits.dtype))
    if logits.numel():
        itemsize = min(logits.element_size(), ref_logits.element_size())
        config = row_config(checked.V, itemsize, 2, _aligned(checked.V, logits, ref_logits), checked.softcap)
        with torch.cuda.device_of(logits):
            kernels.kl_loss_fwd_kernel[(losses.numel(),)](
                dlogits,
                losses,
                logits,
                ref_logits,
                _per_row(row_weight),
                checked.V,
                checked.width,
                *rows,
                *_rows(dlogits, "dlogits")[1:],
                *ref_rows[1:],
                **checked.transforms,
                STEPS=config.steps,
                LANES=config.lanes,
                VECTOR=config.vector,
                num_warps=config.threads // _WARP,
                **_NO_CONTRACTION,
            )
    return losses.sum(), dlogits


def scale_(tensor: Tensor, scale: Tensor) -> None:
    """`spo_kernels.reference.scale_`; the comparison with 1 happens on the device."""
    rows = _rows(tensor, "tensor")
    if tensor.numel():
        V = tensor.shape[-1]
        config = block_config(V)
        with torch.cuda.device_of(tensor):
            kernels.scale_kernel[(tensor.shape[:-1].numel() * triton.cdiv(V, config.block),)](
                tensor, scale, V, *rows, BLOCK=config.block, num_warps=config.threads // _WARP, **_NO_CONTRACTION
            )
