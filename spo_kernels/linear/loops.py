"""Row statistics and gradients of a head, tile by tile, without the logits of all rows.

Statistics of a row's blocks of columns, and of the shards of a vocabulary that is split over processes, combine as
`spo_kernels.shards` says.

The last bits of a row may depend on the other rows, because a matrix product sums in an order that depends on its
shape. Row ops are free of this, except the CUDA kernels where several blocks share a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import sequences, shards
from spo_kernels.linear.records import Head, HeadOptions, Needs, Uniform
from spo_kernels.linear.tiles import (
    GradientSums,
    LogitsBuffer,
    RefLogits,
    Rows,
    ref_logits_buffer,
    row_tiles,
    tile_shape,
    wide_tile_shape,
)
from spo_kernels.logit_options import transform_rows
from spo_kernels.precision import accumulate_dtype
from spo_kernels.reference import RowOptions, is_jsd


class RowStats(NamedTuple):
    """What `reference.token_stats_fwd` returns, of n rows."""

    logps: Tensor  # [n]; [0] without labels
    kl: Tensor  # [n]; [0] without a reference
    stats: Tensor  # [2, 4 or 5, n]


class RowGradients(NamedTuple):
    """Upstream gradients of n rows."""

    logps: Tensor | None  # [n]
    kl: Tensor | None  # [n]
    lse: Tensor | None  # [n]


def _row_options(rows: Rows, buffer: LogitsBuffer, reference: RefLogits | None) -> RowOptions:
    """How the row ops take a tile with these rows."""
    ref_transform = None if reference is None else reference.transform
    transforms = transform_rows(buffer.transform, rows), transform_rows(ref_transform, rows)
    return RowOptions(None, *transforms, buffer.mixture if isinstance(reference, LogitsBuffer) else 0.0)


def _row_stats(rows: Rows, buffer: LogitsBuffer, reference: RefLogits | None, labels: Tensor | None) -> RowStats:
    """Statistics of these rows, block by block."""
    hidden = buffer.hidden(rows)
    ref_block = None if reference is None else functools.partial(reference.fill, reference.hidden(rows))
    tile_labels = None if labels is None else labels[rows]
    options = _row_options(rows, buffer, reference)
    merged: shards.BlockStats | None = None
    for begin, end in buffer.blocks():
        logits = buffer.fill(hidden, begin, end)
        local = buffer.local_labels(tile_labels, begin, end)
        ref_logits = None if ref_block is None else ref_block(begin, end)
        if buffer.holds_vocabulary(begin, end):
            inputs = (logits, local, ref_logits, None, shards.IGNORED, False)
            return RowStats(*torch.ops.spo_kernels.token_stats_fwd(*inputs, *options))
        stats = shards.block_stats(logits, local, ref_logits, None, options)
        merged = stats if merged is None else shards.merge(merged, stats, options.mixture)
    assert merged is not None  # a head has a column
    return _whole_vocabulary_stats(merged, buffer, logits, ref_logits, options)


def _whole_vocabulary_stats(
    block: shards.BlockStats, buffer: LogitsBuffer, logits: Tensor, ref_logits: Tensor | None, options: RowOptions
) -> RowStats:
    """Statistics over the whole vocabulary, from a block that covers all columns of this process.

    The logits, of those columns, are read for a JSD.
    """
    whole = shards.combine(block, buffer.columns, buffer.width, options.mixture)
    if ref_logits is not None and is_jsd(options.mixture):
        whole = shards.add_jsd(whole, logits, ref_logits, None, buffer.columns, options)
    return RowStats(*(x.to(buffer.accumulate) for x in (whole.logps(), whole.kl, whole.stats)))


def _add_gradients(
    rows: Rows,
    buffer: LogitsBuffer,
    reference: RefLogits | None,
    labels: Tensor | None,
    upstream: RowGradients,
    saved: RowStats,
    gradients: GradientSums,
) -> None:
    """Add the gradients of these rows. Recomputes their logits block by block; uses the saved kl and stats."""
    hidden = buffer.hidden(rows)
    gradients.begin_rows(rows, hidden)
    ref_block = None if reference is None else functools.partial(reference.fill, reference.hidden(rows))
    tile_labels = None if labels is None else labels[rows]
    options = _row_options(rows, buffer, reference)
    for begin, end in buffer.blocks():
        logits = buffer.fill(hidden, begin, end)
        ref_logits = None if ref_block is None else ref_block(begin, end)
        local = buffer.local_labels(tile_labels, begin, end)
        _to_gradient_(logits, local, ref_logits, upstream, saved, options)
        gradients.add(buffer, hidden, logits, begin, end)
    gradients.end_rows()


def _to_gradient_(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    upstream: RowGradients,
    saved: RowStats,
    options: RowOptions,
) -> None:
    """Replace logits by their gradient."""
    torch.ops.spo_kernels.token_stats_bwd_(
        *upstream, logits, labels, ref_logits, None, saved.kl, saved.stats, shards.IGNORED, *options
    )


def token_stats_fwd(
    head: Head,
    labels: Tensor | None,
    ref_head: Head | Uniform | None,
    kept: Tensor | None,
    options: HeadOptions,
) -> RowStats:
    """`reference.token_stats_fwd` of a head's logits, 0 on rows that are not kept.

    Args:
        labels: ``[N]``, in range wherever kept.
        kept: ``[N]`` bool, or None for all rows.
    """
    rows = head.hidden.shape[0]
    dtype = accumulate_dtype(head.hidden.dtype)
    logps = head.hidden.new_zeros(0 if labels is None else rows, dtype=dtype)
    kl = head.hidden.new_zeros(0 if ref_head is None else rows, dtype=dtype)
    # A JSD needs statistics of a tile's rows before its second sweep, so its tiles hold whole rows.
    jsd = isinstance(ref_head, Head) and is_jsd(options.mixture)
    stats = head.hidden.new_zeros(2 if ref_head is None else 4 + jsd, rows, dtype=dtype)
    shape = wide_tile_shape(head, options, tiles=2) if jsd else tile_shape(head, options, rows, forward=True)
    buffer = LogitsBuffer(head, options, shape, options.transform)
    reference = ref_logits_buffer(head, ref_head, options, shape)
    for selected in row_tiles(kept, rows, shape.rows):
        tile_results = _row_stats(selected, buffer, reference, labels)
        stats[:, selected] = tile_results.stats
        if labels is not None:
            logps[selected] = tile_results.logps
        if ref_head is not None:
            kl[selected] = tile_results.kl
    return RowStats(logps, kl, stats)


def token_stats_bwd(
    upstream: RowGradients,
    head: Head,
    labels: Tensor | None,
    ref_head: Head | Uniform | None,
    kept: Tensor | None,
    saved: RowStats,
    needs: Needs,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)``, each ``[0]`` where not wanted. saved: what the forward returned."""
    rows = head.hidden.shape[0]
    shape = tile_shape(head, options, rows, forward=False)
    buffer = LogitsBuffer(head, options, shape, options.transform)
    if upstream.logps is None:
        labels = None
    saved_kl, stats = saved.kl, saved.stats
    if upstream.kl is None:  # without the reference's product
        ref_head, saved_kl, stats = None, saved_kl[:0], stats[:2]
    reference = ref_logits_buffer(head, ref_head, options, shape)
    tiles = row_tiles(kept, rows, shape.rows)
    gradients = GradientSums(head, needs, options, one_chunk=len(tiles) <= 1)
    for selected in tiles:
        of_tile = RowGradients(*(None if values is None else values[selected] for values in upstream))
        tile_kl = saved_kl if of_tile.kl is None else saved_kl[selected]
        tile_stats = RowStats(saved.logps, tile_kl, stats[:, selected])
        _add_gradients(selected, buffer, reference, labels, of_tile, tile_stats, gradients)
    return gradients.finish()


def token_stats_jvp(
    tangent: tuple[Tensor | None, Tensor | None, Tensor | None],
    head: Head,
    labels: Tensor | None,
    ref_head: Head | Uniform | None,
    kept: Tensor | None,
    saved: RowStats,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of log-probs, KL and log-sum-exp, each ``[N]``; ``[0]`` without labels or reference.

    tangent: of hidden states, weight and bias. A row's tangent is the product of the row's gradient, for an upstream
    gradient of 1, and the tangent of the row's logits.
    """
    rows = head.hidden.shape[0]
    shape = tile_shape(head, options, rows, forward=False)
    buffer = LogitsBuffer(head, options, shape, options.transform)
    reference = ref_logits_buffer(head, ref_head, options, shape)
    wanted = (labels is not None, ref_head is not None, True)
    tangents = [saved.stats.new_zeros(rows if want else 0) for want in wanted]
    for selected in row_tiles(kept, rows, shape.rows):
        hidden = buffer.hidden(selected)
        ref_block = None if reference is None else functools.partial(reference.fill, reference.hidden(selected))
        tile_labels = None if labels is None else labels[selected]
        row_options = _row_options(selected, buffer, reference)
        of_rows = RowStats(saved.logps, saved.kl[selected] if saved.kl.numel() else saved.kl, saved.stats[:, selected])
        one = saved.stats.new_ones(hidden.shape[0])
        for begin, end in buffer.blocks():
            moved = _logits_tangent(tangent, head, selected, begin, end).to(one.dtype)
            local = buffer.local_labels(tile_labels, begin, end)
            ref_logits = None if ref_block is None else ref_block(begin, end)
            for i, total in enumerate(tangents):
                if wanted[i]:
                    logits = buffer.fill(hidden, begin, end)
                    upstream = RowGradients(*(one if j == i else None for j in range(3)))
                    _to_gradient_(logits, local, ref_logits, upstream, of_rows, row_options)
                    total[selected] += (logits.to(one.dtype) * moved).sum(-1)
    return tangents[0], tangents[1], tangents[2]


def _logits_tangent(
    tangent: tuple[Tensor | None, Tensor | None, Tensor | None], head: Head, rows: Rows, begin: int, end: int
) -> Tensor:
    """Tangent of a block of logits before their transform."""
    hidden, weight, bias = tangent
    total = head.hidden.new_zeros(())
    if hidden is not None:
        total = total + hidden[rows] @ head.weight[begin:end].t()
    if weight is not None:
        total = total + head.hidden[rows] @ weight[begin:end].t()
    if bias is not None:
        total = total + bias[begin:end]
    return total


def kl_loss_fwd(
    head: Head, ref_head: Head, row_weight: Tensor, needs: Needs, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sum_i row_weight_i KL_i, dhidden, dweight, dbias)``, from one product of each head.

    Tiles are as wide as the vocabulary. The gradients are ``[0]`` where not wanted.
    """
    shape = wide_tile_shape(head, options, tiles=2)
    buffer = LogitsBuffer(head, options, shape, options.transform)
    reference = LogitsBuffer(ref_head, options, shape, options.ref_transform)
    tiles = row_tiles(row_weight != 0, head.hidden.shape[0], shape.rows)
    gradients = GradientSums(head, needs, options, one_chunk=len(tiles) <= 1)
    loss = head.hidden.new_zeros((), dtype=torch.float64)  # a sum over many tiles
    for selected in tiles:
        loss += _kl_loss_of_tile(selected, buffer, reference, row_weight[selected], gradients)
    del buffer, reference  # room for the cast of the sums
    return loss.to(accumulate_dtype(head.hidden.dtype)), *gradients.finish()


def _kl_loss_of_tile(
    rows: Rows, buffer: LogitsBuffer, reference: LogitsBuffer, row_weight: Tensor, gradients: GradientSums
) -> Tensor:
    """``sum_i row_weight_i KL_i`` of these rows, whose gradients are added."""
    hidden = buffer.hidden(rows)
    gradients.begin_rows(rows, hidden)
    logits = buffer.fill(hidden, 0, buffer.width)
    ref_logits = reference.fill(reference.hidden(rows), 0, buffer.width)
    options = _row_options(rows, buffer, reference)
    loss: Tensor
    if buffer.columns.group is not None:  # the gradient has to wait for the other columns' statistics
        block = shards.block_stats(logits, None, ref_logits, None, options)
        saved = _whole_vocabulary_stats(block, buffer, logits, ref_logits, options)
        _to_gradient_(logits, None, ref_logits, RowGradients(None, row_weight, None), saved, options)
        loss = saved.kl.double() @ row_weight.double()
    else:
        loss = torch.ops.spo_kernels.kl_loss_fwd_(logits, ref_logits, row_weight, *options)
    gradients.add(buffer, hidden, logits, 0, buffer.width)
    gradients.end_rows()
    return loss


# (first pair, end, sums of log-probs of the chosen [p], of the rejected [p]) -> gradients of the objective with respect
# to both
PairCoefficients = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]


class PairGroup(NamedTuple):
    """Consecutive pairs, and their rows."""

    first: int
    end: int
    rows: Tensor


def pair_gradients(
    head: Head,
    labels: Tensor,
    kept: Tensor,
    bounds: Tensor,
    coefficients: PairCoefficients,
    needs: Needs,
    options: HeadOptions,
    *,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sums [2P], dhidden, dweight, dbias)`` of an objective that is a sum over pairs.

    A pair's gradient may depend on that pair's log-probs only. Sequence s is rows ``bounds[s]`` to ``bounds[s + 1]``.
    Pair p is sequences p and p + P. A wide tile holds the kept rows of whole pairs, as many as fit. A pair with more
    rows than a tile is recomputed in narrow tiles, or refused if strict. The gradients are ``[0]`` where not wanted.
    """
    shape = wide_tile_shape(head, options)
    log_probs = _PairLogProbs(head, bounds, coefficients)
    order, lengths = log_probs.rows_by_pair(kept)
    if strict and lengths and max(lengths) > shape.rows:
        raise ValueError(
            f'chunk_size must be at least the {max(lengths)} rows of the longest pair for route "recompute_free", got '
            f'{shape.rows}; use route "auto" or "recompute"'
        )
    gradients = GradientSums(head, needs, options, one_chunk=len(order) <= shape.rows)
    fits = any(0 < length <= shape.rows for length in lengths)
    buffer = LogitsBuffer(head, options, shape, options.transform) if fits else None
    for group in _pair_groups(order, lengths, shape.rows):
        gradient_of_logps = functools.partial(log_probs.complete_group, group)
        if group.rows.shape[0] == 0:  # pairs without rows have a loss too, at log-probs of 0
            gradient_of_logps(log_probs.sums[:0])
        elif buffer is not None and group.rows.shape[0] <= shape.rows:
            _add_gradients_of_tile(group.rows, buffer, labels, gradient_of_logps, gradients)
        else:
            _add_gradients_of_long_pair(group.rows, head, labels, gradient_of_logps, gradients, options)
    del buffer  # room for the cast of the sums
    return log_probs.sums.to(accumulate_dtype(head.hidden.dtype)), *gradients.finish()


class _PairLogProbs:
    """Log-probs of sequences as they become known, group of pairs by group of pairs."""

    def __init__(self, head: Head, bounds: Tensor, coefficients: PairCoefficients) -> None:
        rows = head.hidden.shape[0]
        self._pairs = (bounds.shape[0] - 1) // 2
        self._bounds = bounds
        self._coefficients = coefficients
        self._dtype = accumulate_dtype(head.hidden.dtype)
        self._sequence = sequences.of_rows(bounds, rows)
        # In float64: D is a small difference of long sums.
        self._token_logps = head.hidden.new_zeros(rows, dtype=torch.float64)
        self.sums = head.hidden.new_zeros(2 * self._pairs, dtype=torch.float64)

    def rows_by_pair(self, kept: Tensor) -> tuple[Tensor, list[int]]:
        """``(indices of the kept rows, sorted by pair; how many each pair has)``."""
        index = kept.nonzero()[:, 0]
        pair_of_row = self._sequence[index] % max(self._pairs, 1)
        lengths: list[int] = torch.bincount(pair_of_row, minlength=self._pairs).tolist()
        return index[pair_of_row.argsort(stable=True)], lengths

    def complete_group(self, group: PairGroup, logps: Tensor) -> Tensor:
        """Sum the log-probs ``[n]`` of the rows of a group; return the objective's gradient with respect to each."""
        self._token_logps[group.rows] = logps.double()
        chosen = slice(group.first, group.end)
        rejected = slice(self._pairs + group.first, self._pairs + group.end)
        for part in (chosen, rejected):
            self.sums[part] = sequences.sums(self._token_logps, self._bounds[part.start : part.stop + 1])
        dlogp_of_sequence = torch.zeros_like(self.sums)
        dlogp_of_sequence[chosen], dlogp_of_sequence[rejected] = self._coefficients(
            group.first, group.end, self.sums[chosen], self.sums[rejected]
        )
        return dlogp_of_sequence[self._sequence[group.rows]].to(self._dtype)


def _pair_groups(order: Tensor, lengths: list[int], size: int) -> Iterator[PairGroup]:
    """Groups of consecutive pairs with at most `size` rows together; a pair with more is a group of its own."""
    first = start = stop = 0
    for pair, length in enumerate(lengths):
        if stop + length - start > size and pair > first:
            yield PairGroup(first, pair, order[start:stop])
            first, start = pair, stop
        stop += length
    if lengths:
        yield PairGroup(first, len(lengths), order[start:stop])


def _add_gradients_of_tile(
    rows: Tensor,
    buffer: LogitsBuffer,
    labels: Tensor,
    gradient_of_logps: Callable[[Tensor], Tensor],
    gradients: GradientSums,
) -> None:
    hidden = buffer.hidden(rows)
    gradients.begin_rows(rows, hidden)
    logits = buffer.fill(hidden, 0, buffer.width)
    local = buffer.local_labels(labels[rows], 0, buffer.width)
    assert local is not None
    options = _row_options(rows, buffer, None)
    block = shards.block_stats(logits, local, None, None, options)
    saved = _whole_vocabulary_stats(block, buffer, logits, None, options)
    _to_gradient_(logits, local, None, RowGradients(gradient_of_logps(saved.logps), None, None), saved, options)
    gradients.add(buffer, hidden, logits, 0, buffer.width)
    gradients.end_rows()


def _add_gradients_of_long_pair(
    rows: Tensor,
    head: Head,
    labels: Tensor,
    gradient_of_logps: Callable[[Tensor], Tensor],
    gradients: GradientSums,
    options: HeadOptions,
) -> None:
    shape = tile_shape(head, options, rows.shape[0], forward=False)
    buffer = LogitsBuffer(head, options, shape, options.transform)
    saved = [(chunk, _row_stats(chunk, buffer, None, labels)) for chunk in rows.split(shape.rows)]
    dlogps = gradient_of_logps(torch.cat([stats.logps for _, stats in saved])).split(shape.rows)
    for (chunk, stats), upstream in zip(saved, dlogps, strict=True):
        _add_gradients(chunk, buffer, None, labels, RowGradients(upstream, None, None), stats, gradients)
