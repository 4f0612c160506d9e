"""One distribution from parts of its vocabulary: blocks of columns one after the other, or shards of a process group.

The statistics of parts combine exactly, by the chain rule over "which part, then which token in it".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels import row_ops
from spo_kernels.op_library import Size, op, refuse_double_backward, refuse_transforms
from spo_kernels.precision import accumulate_dtype
from spo_kernels.reference import LABEL_ELSEWHERE, RowOptions, is_jsd, transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The local label of an ignored row: unlike a caller's ignore_index it is never a column's number.
IGNORED = -1


class BlockStats(NamedTuple):
    """Statistics of n rows over some columns. In float64, so that the result does not depend on how many blocks there
    were."""

    stats: Tensor  # [2, n], or [4, n] with a reference: shift and logsum of the policy, then of the reference
    kl: Tensor  # [n] KL, or reverse KL, of the distributions restricted to the columns; [0] without a reference
    picked: Tensor  # [n] the labels' logits, -inf where the label is in no column; [0] without labels

    def logps(self) -> Tensor:
        """Log-probs of the labels ``[n]`` (``[0]`` without labels), if the columns are the whole vocabulary."""
        return (self.picked - self.stats[0]) - self.stats[1] if self.picked.numel() else self.picked


class Columns(NamedTuple):
    """The columns of a vocabulary that this process holds, in the layout of Megatron's parallel output layer."""

    start: Size  # index of the first column in the whole vocabulary
    vocab_size: Size  # columns of the whole vocabulary
    group: str | None  # name of the process group that holds the vocabulary; None if this process holds all of it

    @classmethod
    def checked(
        cls,
        process_group: ProcessGroup | None,
        vocab_shards: Sequence[int] | None,
        columns: int,
        vocab_size: int | None = None,
    ) -> Columns:
        """From the options of a public function, for a tensor with this many columns, padding included."""
        check_vocab_size(vocab_size)
        if process_group is None:
            if vocab_shards is not None:
                raise ValueError(f"vocab_shards needs a process_group, got {vocab_shards} without one")
            if vocab_size is not None and vocab_size > columns:
                raise ValueError(f"vocab_size must be at most the {columns} columns, got {vocab_size}")
            return cls(0, columns if vocab_size is None else vocab_size, None)
        if not isinstance(process_group, torch.distributed.ProcessGroup):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup that this process belongs to, got "
                f"{type(process_group).__name__}"
            )
        refuse_transforms("process_group")
        rank, size = process_group.rank(), process_group.size()
        shards = [columns] * size if vocab_shards is None else list(vocab_shards)
        if len(shards) != size:
            raise ValueError(f"vocab_shards must have one entry for each of {size} processes, got {shards}")
        if shards[rank] != columns:
            raise ValueError(
                f"vocab_shards must have the {columns} columns of this process as entry {rank}, got {shards}"
            )
        if vocab_size is not None and not sum(shards[:-1]) < vocab_size <= sum(shards):
            raise ValueError(
                f"vocab_size must end in the last of the shards {shards}, got {vocab_size}; where every process has "
                "the whole vocabulary, leave process_group out"
            )
        return cls(sum(shards[:rank]), sum(shards) if vocab_size is None else vocab_size, process_group.group_name)

    @property
    def process_group(self) -> ProcessGroup:
        return torch.distributed.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        torch.distributed.all_reduce(tensor, group=self.process_group)

    def all_min(self, number: int, device: torch.device) -> int:
        """The smallest of the processes' numbers, read back to the host."""
        value = torch.full((), number, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN, group=self.process_group)
        return int(value.item())

    def check_same(self, **tensors: Tensor | None) -> None:
        """ValueError for a tensor that is not the same in every process; on a GPU a device-side assertion.

        Call it before a loop: tensors that differ would make the loop's messages differ in size, which hangs. It is one
        all-reduce of two numbers a tensor.
        """
        digests = torch.stack([digest(tensor) for tensor in tensors.values() if tensor is not None])
        bounds = torch.stack([digests, -digests])
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MIN, group=self.process_group)
        _check_same(_given(tensors), bounds[0] == -bounds[1])


def local_labels(labels: Tensor, start: int, columns: int, ignore_index: int | None = None) -> Tensor:
    """Labels relative to columns from start on: `LABEL_ELSEWHERE` outside them, `IGNORED` for ignore_index."""
    local = labels - start
    local = torch.where((local >= 0) & (local < columns), local, LABEL_ELSEWHERE)
    return local if ignore_index is None else torch.where(labels == ignore_index, IGNORED, local)


def check_vocab_size(vocab_size: int | None) -> None:
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1):
        raise ValueError(f"vocab_size must be a whole number of columns >= 1, or None, got {vocab_size!r}")


def block_stats(
    logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, mask: Tensor | None, options: RowOptions
) -> BlockStats:
    """`BlockStats` of logits ``[N, V]`` or ``[B, T, V]`` with local labels; n counts all rows.

    For a JSD, kl is the KL: see `add_jsd`.
    """
    if is_jsd(options.mixture):
        options = options._replace(mixture=0.0)
    _, kl, stats = torch.ops.spo_kernels.token_stats_fwd(logits, labels, ref_logits, mask, IGNORED, False, *options)
    if labels is None:
        picked = kl.new_empty(0)
    else:
        held = labels >= 0
        raw = logits.gather(-1, torch.where(held, labels, 0)[..., None])
        picked = torch.where(held, transformed(raw.double(), options.transform)[..., 0], -torch.inf)
    return BlockStats(stats.flatten(1).double(), kl.flatten().double(), picked.flatten().double())


def _merge_log_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(merged [2, n], log_a [n], log_b [n])``: shift and logsum of both, and the log-probability of each block."""
    # A block of only -inf: logsum is -inf and shift is meaningless.
    shifts = torch.stack([a[0], b[0]])
    logsums = torch.stack([a[1], b[1]])
    shift = torch.where(logsums == -torch.inf, -torch.inf, shifts).amax(0)
    shift = torch.where(shift == -torch.inf, 0, shift)
    shifted = (shifts - shift) + logsums
    logsum = torch.logaddexp(shifted[0], shifted[1])
    return torch.stack([shift, logsum]), shifted[0] - logsum, shifted[1] - logsum


def merge(a: BlockStats, b: BlockStats, mixture: float) -> BlockStats:
    """Two blocks as one: KL(p || q) = KL of the choice of block + the mean, under p, of the KL within blocks.

    The reverse KL is KL(q || p).
    """
    stats, log_a, log_b = _merge_log_sums(a.stats[:2], b.stats[:2])
    picked = torch.maximum(a.picked, b.picked)
    if a.stats.shape[0] == 2:
        return BlockStats(stats, a.kl, picked)
    ref_stats, ref_log_a, ref_log_b = _merge_log_sums(a.stats[2:], b.stats[2:])
    kl = torch.zeros_like(a.kl)
    for block_kl, log_p, log_q in ((a.kl, log_a, ref_log_a), (b.kl, log_b, ref_log_b)):
        if mixture == 1:
            log_p, log_q = log_q, log_p
        share = log_p.exp()
        kl = kl + torch.where(share == 0, 0, share * (block_kl + (log_p - log_q)))
    return BlockStats(torch.cat([stats, ref_stats]), kl, picked)


def columns_read(columns: Columns, width: int) -> int:
    """How many of this process's columns belong to the vocabulary; the others are padding."""
    return min(width, columns.vocab_size - columns.start)


def padded_columns_read(vocab_size: int | None, columns: Columns, width: int) -> int | None:
    """`columns_read`; None without a vocab_size, where no column is padding."""
    return None if vocab_size is None else columns_read(columns, width)


# Odd 64-bit constants as int64: the golden ratio's, and one of splitmix64.
_HASH_ROW, _HASH_VALUE = -0x61C8864680B583EB, -0x40A7B892E31B1A47


def digest(tensor: Tensor) -> Tensor:
    """A 53-bit hash of the values, their order and number: 0-d int64, exact in float64, the same on every device."""
    values = tensor.detach().flatten()
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    mixed = values.long() + torch.arange(1, values.shape[0] + 1, device=values.device) * _HASH_ROW
    mixed = (mixed ^ (mixed >> 31)) * _HASH_VALUE
    return ((mixed ^ (mixed >> 29)).sum() + values.shape[0]) & (2**53 - 1)


def _given(tensors: dict[str, Tensor | None]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None]


def _check_same(names: list[str], same: Tensor) -> None:
    """Raise for the first tensor whose entry of same ``[len(names)]`` is False."""
    for name, is_same in zip(names, same, strict=True):
        message = f"{name} must be the same in every process of process_group"
        if not same.is_cpu:
            torch._assert_async(is_same, f"spo_kernels: {message}")
        elif not is_same:
            raise ValueError(f"{message}, got different ones")


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """RuntimeError for a label out of range; on a GPU a device-side assertion, without a sync."""
    legal = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    if not labels.is_cpu:
        torch._assert_async(legal.all(), "spo_kernels: labels must be in [0, V) or ignore_index")
    elif not legal.all():
        bad = labels[~legal][0].item()
        raise RuntimeError(f"labels must be in [0, {vocab_size}) or ignore_index {ignore_index}, got {bad}")


def combine(block: BlockStats, columns: Columns, width: int, mixture: float, **same: Tensor | None) -> BlockStats:
    """The whole vocabulary from this process's columns: one all-gather of at most six numbers a row and process.

    Every process merges the blocks in the same order and gets the same bits. Without a group, returns the block.
    Raises ValueError where the shards leave a gap or overlap, or where one of the tensors `same` differs between
    processes. On a GPU, a device-side assertion replaces the ValueError.

    Args:
        width: the columns of this process.
        mixture: see `reference.RowOptions`.
    """
    if columns.group is None:
        return block
    sizes = [block.stats.numel(), block.kl.numel(), block.picked.numel()]
    layout = [block.stats.new_full((1,), number) for number in (columns.start, width)]
    names = _given(same)
    digests = [digest(tensor)[None].to(block.stats.dtype) for tensor in same.values() if tensor is not None]
    message = torch.cat([*layout, *digests, *(x.flatten() for x in block)])
    group = columns.process_group
    messages = message.new_empty(group.size(), message.numel())
    _all_gather(messages.flatten(), message, group)
    _check_layout(messages[:, 0], messages[:, 1], columns.vocab_size)
    header = 2 + len(names)
    _check_same(names, (messages[:, 2:header] == messages[0, 2:header]).all(0))
    blocks = []
    for values in messages:
        stats, kl, picked = values[header:].split(sizes)
        blocks.append(BlockStats(stats.view_as(block.stats), kl, picked))
    return functools.reduce(functools.partial(merge, mixture=mixture), blocks)


def add_jsd(
    whole: BlockStats,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    columns: Columns,
    options: RowOptions,
) -> BlockStats:
    """Statistics of the whole vocabulary with a JSD in the place of the KL: the logits are read again.

    The terms of a JSD need p and q, so blocks of it cannot be merged. With a group this is one all-reduce of two
    numbers a row.
    """
    stats = whole.stats.to(accumulate_dtype(logits.dtype))
    kls = torch.ops.spo_kernels.mixture_kl(logits, ref_logits, mask, stats, *options).flatten(1).double()
    if columns.group is not None:
        columns.sum_(kls)
    jsd = options.mixture * kls[0] + (1 - options.mixture) * kls[1]
    return whole._replace(stats=torch.cat([whole.stats, kls[:1]]), kl=jsd)


def _all_gather(gathered: Tensor, message: Tensor, group: ProcessGroup) -> None:
    # The name up to torch 2.12 is deprecated in 2.13.
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    getattr(torch.distributed, name)(gathered, message, group=group)


def _check_layout(starts: Tensor, widths: Tensor, vocab_size: int) -> None:
    ends = starts + widths
    legal = (starts[0] == 0) & (starts[1:] == ends[:-1]).all() & (ends[-1] == vocab_size)
    if not starts.is_cpu:
        torch._assert_async(legal, "spo_kernels: the shards of process_group must add up to the vocabulary")
    elif not legal:
        shards = ", ".join(f"[{int(b)}, {int(e)})" for b, e in zip(starts, ends, strict=True))
        raise ValueError(
            f"the shards of process_group must be [0, {vocab_size}) without gap or overlap, got {shards} by rank; "
            "give vocab_shards where they are uneven"
        )


@op
def sharded_token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    columns: Columns,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_ops.token_stats_fwd` over a process group: logits are this process's columns, labels are global."""
    rows, width = logits.shape[:-1], columns_read(columns, logits.shape[-1])
    local = None if labels is None else local_labels(labels, columns.start, width, ignore_index)
    block = block_stats(logits, local, ref_logits, mask, options)
    whole = combine(block, columns, width, options.mixture, labels=labels, mask=mask)
    if ref_logits is not None and is_jsd(options.mixture):
        whole = add_jsd(whole, logits, ref_logits, mask, columns, options)
    if labels is not None:  # after the all-gather, so that labels that differ are an error in every process
        check_labels(labels, columns.vocab_size, ignore_index)
    logps, kl = whole.logps(), whole.kl
    # Ignored and masked rows carry no statistics; report 0.
    if labels is not None:
        logps = torch.where(labels.flatten() == ignore_index, 0, logps).view(rows)
    if ref_logits is not None:
        kl = (kl if mask is None else torch.where(mask.flatten(), kl, 0)).view(rows)
    dtype = accumulate_dtype(logits.dtype)
    return logps.to(dtype), kl.to(dtype), whole.stats.view(whole.stats.shape[0], *rows).to(dtype)


sharded_token_stats_fwd.fake(row_ops.empty_token_stats)


def _save_local_token_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """With the statistics of the whole vocabulary and local labels, the gradient of a shard is the row op's own."""
    given = sharded_token_stats_fwd.records(inputs)
    logits, labels, columns = given["logits"], given["labels"], given["columns"]
    if labels is not None:
        labels = local_labels(labels, columns.start, columns_read(columns, logits.shape[-1]), given["ignore_index"])
    rows = (logits, labels, given["ref_logits"], given["mask"], IGNORED, given["inplace_backward"], *given["options"])
    row_ops.save_token_stats(ctx, rows, output)


def _backward(ctx: Any, *upstream: Tensor | None) -> Tensor | None:
    refuse_double_backward("the functions with a process_group", "gather the logits and leave the group out")
    return row_ops.token_stats_backward(ctx, *upstream)


sharded_token_stats_fwd.gradient(_save_local_token_stats, _backward, of="logits")
