"""One distribution from parts of its vocabulary: blocks of columns one after the other, or shards of a process group.

Parts combine exactly, by the chain rule over "which part, then which token in it".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spo_kernels.reference import LABEL_ELSEWHERE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What local labels have where a row is ignored: unlike a caller's ignore_index it is never a column's number.
IGNORED = -1


class Part(NamedTuple):
    """What some columns of the vocabulary say of n rows. In float64, so that the number of parts leaves no trace."""

    stats: Tensor  # [2, n], or [4, n] with a reference: shift and logsum of the policy, then of the reference
    kl: Tensor  # [n] KL between the distributions restricted to the columns; [0] without a reference
    picked: Tensor  # [n] the labels' logits, -inf where the token is in no column; [0] without labels

    def logps(self) -> Tensor:
        """Log-probs of the labels ``[n]`` (``[0]`` without labels), if the part is the whole vocabulary."""
        return (self.picked - self.stats[0]) - self.stats[1] if self.picked.numel() else self.picked


class Shard(NamedTuple):
    """The columns of a vocabulary that this process holds, of those held by a process group (Megatron's layout)."""

    start: int  # index of the first in the whole vocabulary
    vocabulary: int  # columns in all
    group: str  # the process group's name, by which the ops know it

    @property
    def process_group(self) -> ProcessGroup:
        return torch.distributed.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    def sum_(self, tensor: Tensor) -> None:
        """Add up what every process has, in place."""
        torch.distributed.all_reduce(tensor, group=self.process_group)

    def least(self, number: int, device: torch.device) -> int:
        """The least of every process's number, read back to the host."""
        value = torch.full((), number, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN, group=self.process_group)
        return int(value.item())

    def check_same(self, **tensors: Tensor | None) -> None:
        """ValueError for a tensor that is not the same in every process; on a GPU a device-side assertion.

        One all-reduce of two numbers a tensor, before a loop whose messages would differ in size.
        """
        digests = torch.stack([digest(tensor) for tensor in tensors.values() if tensor is not None])
        bounds = torch.stack([digests, -digests])
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MIN, group=self.process_group)
        _check_same(_given(tensors), bounds[0] == -bounds[1])


def checked_shard(
    process_group: ProcessGroup | None, vocab_shards: Sequence[int] | None, columns: int
) -> tuple[int, int, str | None]:
    """The op arguments ``(vocab_start, vocab_size, process_group)`` of a tensor with this many columns."""
    if process_group is None:
        if vocab_shards is not None:
            raise ValueError(f"vocab_shards needs a process_group, got {vocab_shards} without one")
        return 0, columns, None
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise ValueError(
            "process_group must be a torch.distributed.ProcessGroup that this process belongs to, got "
            f"{type(process_group).__name__}"
        )
    rank, size = process_group.rank(), process_group.size()
    if vocab_shards is None:
        return rank * columns, size * columns, process_group.group_name
    shards = list(vocab_shards)
    if len(shards) != size:
        raise ValueError(f"vocab_shards must have one entry for each of {size} processes, got {shards}")
    if shards[rank] != columns:
        raise ValueError(f"vocab_shards must have the {columns} columns of this process as entry {rank}, got {shards}")
    return sum(shards[:rank]), sum(shards), process_group.group_name


def local_labels(labels: Tensor, start: int, columns: int, ignore_index: int | None = None) -> Tensor:
    """Labels as columns from start on see them: `LABEL_ELSEWHERE` outside, `IGNORED` for ignore_index."""
    local = labels - start
    local = torch.where((local >= 0) & (local < columns), local, LABEL_ELSEWHERE)
    return local if ignore_index is None else torch.where(labels == ignore_index, IGNORED, local)


def part_of(logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, mask: Tensor | None = None) -> Part:
    """What the row op says of logits ``[N, V]`` or ``[B, T, V]`` with local labels; n counts all rows."""
    _, kl, stats = torch.ops.spo_kernels.token_stats_fwd(logits, labels, ref_logits, mask, IGNORED, False)
    if labels is None:
        picked = kl.new_empty(0)
    else:
        held = labels >= 0
        picked = logits.gather(-1, torch.where(held, labels, 0)[..., None])[..., 0]
        picked = torch.where(held, picked, -torch.inf)
    return Part(stats.flatten(1).double(), kl.flatten().double(), picked.flatten().double())


def _shares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(shift and logsum [2, n] of two parts together, log of the share of each in the sum)."""
    # A part of only -inf has logsum -inf and a shift that says nothing.
    shifts = torch.stack([a[0], b[0]])
    logsums = torch.stack([a[1], b[1]])
    shift = torch.where(logsums == -torch.inf, -torch.inf, shifts).amax(0)
    shift = torch.where(shift == -torch.inf, 0, shift)
    parts = (shifts - shift) + logsums
    logsum = torch.logaddexp(parts[0], parts[1])
    return torch.stack([shift, logsum]), parts[0] - logsum, parts[1] - logsum


def merge(a: Part, b: Part) -> Part:
    """Two parts as one: KL(p || q) = KL of the choice of part + its mean of the KL within parts."""
    stats, log_a, log_b = _shares(a.stats[:2], b.stats[:2])
    picked = torch.maximum(a.picked, b.picked)
    if a.stats.shape[0] == 2:
        return Part(stats, a.kl, picked)
    ref_stats, ref_log_a, ref_log_b = _shares(a.stats[2:], b.stats[2:])
    kl = torch.zeros_like(a.kl)
    for part_kl, log_p, log_q in ((a.kl, log_a, ref_log_a), (b.kl, log_b, ref_log_b)):
        share = log_p.exp()
        kl = kl + torch.where(share == 0, 0, share * (part_kl + (log_p - log_q)))
    return Part(torch.cat([stats, ref_stats]), kl, picked)


# Odd numbers of 64 bits, as int64: of the golden ratio, and of splitmix64.
_HASH_ROW, _HASH_VALUE = -0x61C8864680B583EB, -0x40A7B892E31B1A47


def digest(tensor: Tensor) -> Tensor:
    """53 bits of the values, their order and number: 0-d int64 that float64 holds exactly, the same on every device."""
    values = tensor.detach().flatten()
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    mixed = values.long() + torch.arange(1, values.shape[0] + 1, device=values.device) * _HASH_ROW
    mixed = (mixed ^ (mixed >> 31)) * _HASH_VALUE
    return ((mixed ^ (mixed >> 29)).sum() + values.shape[0]) & (2**53 - 1)


def _given(tensors: dict[str, Tensor | None]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None]


def _check_same(names: list[str], same: Tensor) -> None:
    """Raise where same ``[len(names)]`` is False: an error of its own for each tensor."""
    for name, is_same in zip(names, same, strict=True):
        message = f"{name} must be the same in every process of process_group"
        if not same.is_cpu:
            torch._assert_async(is_same, f"spo_kernels: {message}")
        elif not is_same:
            raise ValueError(f"{message}, got different ones")


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """RuntimeError for a label out of range; on a GPU a device-side assertion, without a sync."""
    legal = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if not labels.is_cpu:
        torch._assert_async(legal.all(), "spo_kernels: labels must be in [0, V) or ignore_index")
    elif not legal.all():
        bad = labels[~legal][0].item()
        raise RuntimeError(f"labels must be in [0, {vocabulary}) or ignore_index {ignore_index}, got {bad}")


def combine(part: Part, shard: Shard | None, columns: int, **same: Tensor | None) -> Part:
    """The whole vocabulary from this process's columns: one all-gather of at most six numbers a row and process.

    Every process merges the parts in the same order and gets the same bits. Without a shard the part is the whole.
    Raises ValueError where the shards are not the vocabulary without gap or overlap, or where one of the tensors `same`
    differs between processes; a GPU has a device-side assertion.
    """
    if shard is None:
        return part
    sizes = [part.stats.numel(), part.kl.numel(), part.picked.numel()]
    layout = [part.stats.new_full((1,), number) for number in (shard.start, columns)]
    names = _given(same)
    digests = [digest(tensor)[None].to(part.stats.dtype) for tensor in same.values() if tensor is not None]
    message = torch.cat([*layout, *digests, *(x.flatten() for x in part)])
    group = shard.process_group
    messages = message.new_empty(group.size(), message.numel())
    _all_gather(messages.flatten(), message, group)
    _check_layout(messages[:, 0], messages[:, 1], shard.vocabulary)
    header = 2 + len(names)
    _check_same(names, (messages[:, 2:header] == messages[0, 2:header]).all(0))
    parts = []
    for values in messages:
        stats, kl, picked = values[header:].split(sizes)
        parts.append(Part(stats.view_as(part.stats), kl, picked))
    return functools.reduce(merge, parts)


def _all_gather(gathered: Tensor, message: Tensor, group: ProcessGroup) -> None:
    # The name up to torch 2.12 is deprecated in 2.13.
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    getattr(torch.distributed, name)(gathered, message, group=group)


def _check_layout(starts: Tensor, columns: Tensor, vocabulary: int) -> None:
    ends = starts + columns
    legal = (starts[0] == 0) & (starts[1:] == ends[:-1]).all() & (ends[-1] == vocabulary)
    if not starts.is_cpu:
        torch._assert_async(legal, "spo_kernels: the shards of process_group must add up to the vocabulary")
    elif not legal:
        shards = ", ".join(f"[{int(b)}, {int(e)})" for b, e in zip(starts, ends, strict=True))
        raise ValueError(
            f"the shards of process_group must be [0, {vocabulary}) without gap or overlap, got {shards} by rank; "
            "give vocab_shards where they are uneven"
        )
