"""The head by tiles: row statistics and gradients from hidden states and a weight, without the logits of all rows.

    z = softcap(logit_scale (h W^T + b)) / temperature,    softcap(x) = softcap tanh(x / softcap), or x without one

A tile is some rows by some columns of z, in one scratch buffer that every tile reuses: a matrix product fills it, a row
op works on it in place, the matrix products of the backward consume it. Statistics of a row's blocks of columns, and of
the shards of a vocabulary that is split over processes, combine as `vocabulary` says. Sums are float32, or float64.

Unlike a row op's, a row's result may depend on the other rows in the last bits: a matrix product sums in an order that
depends on its shape.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import sequences, vocabulary
from spo_kernels.reference import accumulate_dtype
from spo_kernels.vocabulary import Part, Shard


class TileSizes(NamedTuple):
    """How large the scratch buffer of a head's logits may be on a kind of device."""

    rows: int  # at most, of a tile that holds a block of columns
    bytes: int  # of such a tile, as near as `least_columns` allows
    least_columns: int  # of such a tile
    least_forward_rows: int | None  # a forward takes whole rows where this many fit in `bytes`; None: never
    wide_bytes: int  # of a tile of whole rows, which gradients within the forward need
    least_wide_rows: int  # of such a tile
    row_multiple: int  # of tiles of whole rows: products take rows in blocks of so many


TILE_SIZES = {
    # Near the peak of matrix products (below 512 rows or 1024 columns a fifth is lost), and small enough to stay in
    # cache between the product and the row op.
    "cpu": TileSizes(
        rows=4096,
        bytes=16 << 20,
        least_columns=1024,
        least_forward_rows=None,
        wide_bytes=64 << 20,
        least_wide_rows=512,
        row_multiple=1,
    ),
    # So large that launches cost little beside products: a host took 17 us a launch, and its H100 50 us for the product
    # of a 16 MiB tile at H = 2048. Statistics of whole rows need no merging, which takes 30 launches a block.
    "cuda": TileSizes(
        rows=4096,
        bytes=256 << 20,
        least_columns=1024,
        least_forward_rows=512,
        wide_bytes=1 << 30,
        least_wide_rows=512,
        row_multiple=256,
    ),
}
# Columns whose weight, or whose products, are cast at a time where half precision is involved.
_CAST_COLUMNS = 4096
# How much faster native products must be.
_NATIVE_MARGIN = 1.25
# Blocks have a multiple of this many columns, so that every row of a tile starts aligned.
_ALIGNED_COLUMNS = 16

Rows = slice | Tensor  # of the hidden states: a range, or the indices of those that were kept


class LogitOptions(NamedTuple):
    """How logits come from ``h W^T + b``; see the module docstring."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Head(NamedTuple):
    """One head and what goes into it."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    shard: Shard | None = None  # where weight and bias are a part of a vocabulary held by several processes


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


@functools.cache
def native_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether matrix products of a half-precision dtype are to run in it rather than in float32.

    CPUs differ by an order of magnitude: without instructions for a dtype its products take 4 to 30 times as long as
    float32's, with them (AMX, avx512_bf16) half or less. Measured once, on the product with the least favourable
    layout, and with a margin: native products round the logits to the dtype, so the choice should not change from one
    process to the next.
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


def _product_dtype(hidden: Tensor, options: LogitOptions) -> torch.dtype:
    """Dtype of the tiles and of the operands of their products: that of the hidden states, or float32."""
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return hidden.dtype
    # A softcap's tanh and product would each round again.
    native = options.softcap is None and native_products(hidden.device.type, hidden.dtype)
    return hidden.dtype if native else torch.float32


# For a compiler, which must know the dtypes of outputs but must not trace a measurement: a constant of the graph.
@torch.compiler.assume_constant_result
def stored_dtype(device_type: str, dtype: torch.dtype, capped: bool) -> torch.dtype:
    """Dtype in which the gradients that a forward computed wait for the backward's upstream scalar.

    bfloat16 where that is the dtype of their products, which have rounded them already: half the memory, and no sum
    in float32 at all where one tile holds every row. (float16 does not come here: see `functional.waits_for_upstream`.)

    Args:
        device_type, dtype: of the hidden states.
        capped: whether there is a softcap.
    """
    native = dtype == torch.bfloat16 and not capped and native_products(device_type, dtype)
    return dtype if native else accumulate_dtype(dtype)


def _adds_wide(total: torch.dtype, operands: torch.dtype, device_type: str) -> bool:
    """Whether a product of half-precision operands adds to a float32 sum itself, unrounded and without a temporary."""
    half = operands in (torch.bfloat16, torch.float16)
    return half and total == torch.float32 and device_type == "cuda" and torch.version.hip is None


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float, *, first: bool) -> None:
    """``total += scale a b``, or ``= scale a b`` if first: what total held then, NaN included, is not read.

    Total may have a wider dtype than the operands, or a narrower one if nothing follows the first.
    """
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=scale, out=total)
    elif _adds_wide(total.dtype, a.dtype, a.device.type):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
    elif first:
        torch.mul(torch.mm(a, b), scale, out=total)
    else:
        total.add_(torch.mm(a, b), alpha=scale)


class _Tile:
    """Logits of one head, a tile at a time in one buffer."""

    def __init__(self, head: Head, options: LogitOptions, rows: int, columns: int) -> None:
        self._head = head
        self._options = options
        self._dtype = _product_dtype(head.hidden, options)
        self._size = (rows, columns)
        self.scale = options.logit_scale / options.temperature  # dz / d(h W^T + b), apart from the softcap's slope
        self._slope: Tensor | None = None
        self.shard = head.shard
        self.columns_in_all = head.weight.shape[0]
        self.wide = accumulate_dtype(head.hidden.dtype)

    def select(self, rows: Rows) -> None:
        self._hidden = self._head.hidden[rows].to(self._dtype)

    def empty_rows(self, dtype: torch.dtype) -> Tensor:
        """Memory ``[n, H]`` for the selected rows."""
        return torch.empty_like(self._hidden, dtype=dtype)

    def fill(self, begin: int, end: int, *, slope: bool = False) -> Tensor:
        """Logits ``[n, end - begin]`` of the selected rows; with slope also what `dlogits` needs."""
        logits = self._memory[: self._hidden.shape[0], : end - begin]
        softcap = self._options.softcap
        factor = self.scale if softcap is None else self._options.logit_scale / softcap
        for b, e in self._blocks(begin, end):
            weight, out = self._head.weight[b:e].to(self._dtype), logits[:, b - begin : e - begin]
            if self._head.bias is None:
                torch.addmm(out, self._hidden, weight.t(), beta=0, alpha=factor, out=out)
            else:
                bias = self._head.bias[b:e].to(self._dtype)
                torch.addmm(bias, self._hidden, weight.t(), beta=factor, alpha=factor, out=out)
        if softcap is not None:
            logits.tanh_()
            self._slope = 1 - logits.square() if slope else None
            logits.mul_(softcap / self._options.temperature)
        return logits

    @functools.cached_property
    def _memory(self) -> Tensor:
        return self._head.hidden.new_empty(self._size, dtype=self._dtype)

    def dlogits(self, gradient: Tensor) -> Tensor:
        """What the products of the backward multiply by `scale`, from the gradient of what `fill` gave."""
        return gradient if self._slope is None else gradient.mul_(self._slope)

    def local_labels(self, labels: Tensor | None, begin: int, end: int) -> Tensor | None:
        """Labels of the whole vocabulary as the columns of a block see them."""
        if self.is_whole(begin, end):
            return labels
        start = 0 if self.shard is None else self.shard.start
        return None if labels is None else vocabulary.local_labels(labels, start + begin, end - begin)

    def is_whole(self, begin: int, end: int) -> bool:
        """Whether columns are the whole vocabulary, so that nothing has to be merged."""
        return self.shard is None and (begin, end) == (0, self.columns_in_all)

    def operands(
        self, dlogits: Tensor, begin: int, end: int, dtype: torch.dtype | None
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """(begin, end, dlogits, weight, hidden) of the products of the backward; dtype: of the weight's gradient."""
        for b, e in self._blocks(begin, end, dtype):
            yield b, e, dlogits[:, b - begin : e - begin], self._head.weight[b:e].to(self._dtype), self._hidden

    def _blocks(self, begin: int, end: int, result: torch.dtype | None = None) -> Iterator[tuple[int, int]]:
        """All columns at once, or blocks of them where the weight or a result as large must be cast: copies stay small.

        Whole products are a few percent faster where hidden states are wide and rows few.
        """
        one_dtype = self._head.weight.dtype == self._dtype and (
            result in (None, self._dtype) or _adds_wide(result, self._dtype, self._head.weight.device.type)
        )
        size = end - begin if one_dtype else _CAST_COLUMNS
        for b in range(begin, end, size):
            yield b, min(b + size, end)


class _UniformTile:
    """Logits of the uniform distribution, in place of a reference's: the KL to it is log V minus the entropy."""

    def __init__(self, hidden: Tensor, columns: int, dtype: torch.dtype) -> None:
        self._row = hidden.new_zeros(1, columns, dtype=dtype)

    def select(self, rows: Rows) -> None:
        self._count = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]

    def fill(self, begin: int, end: int) -> Tensor:
        return self._row[:, : end - begin].expand(self._count, -1)


Reference = _Tile | _UniformTile


class _Gradients:
    """Sums over tiles of the gradients of a head; ``[0]`` where not wanted.

    one_tile: all rows come in one tile at most. It finishes each block of the weight's gradient at once, which then
    needs no wider sum than dtype, the one of the results.
    """

    def __init__(self, head: Head, needs: Needs, dtype: torch.dtype, *, one_tile: bool) -> None:
        hidden, weight, bias, self._shard = head
        self._dtype = dtype
        self._wide = accumulate_dtype(hidden.dtype)
        # What several processes add up stays wide until they have.
        hidden_dtype = dtype if self._shard is None else self._wide
        self._hidden = hidden.new_zeros(hidden.shape if needs.hidden else 0, dtype=hidden_dtype)
        weight_dtype = dtype if one_tile else self._wide
        self._weight = weight.new_empty(weight.shape if needs.weight else 0, dtype=weight_dtype)
        self._bias = weight.new_zeros(weight.shape[0] if needs.bias and bias is not None else 0, dtype=self._wide)
        self._tiles = 0

    def select(self, rows: Rows, tile: _Tile) -> None:
        self._rows = rows
        self._dhidden = tile.empty_rows(self._wide) if self._hidden.numel() else None
        self._tiles += 1

    def add(self, tile: _Tile, filled: Tensor, begin: int, end: int) -> None:
        """The products of the backward of a tile whose logits have become their gradient; all blocks of it in turn."""
        dlogits = tile.dlogits(filled)
        result = self._weight.dtype if self._weight.numel() else None
        for b, e, part, weight, hidden in tile.operands(dlogits, begin, end, result):
            if self._dhidden is not None:
                _accumulate(self._dhidden, part, weight, tile.scale, first=b == 0)
            if self._weight.numel():
                _accumulate(self._weight[b:e], part.t(), hidden, tile.scale, first=self._tiles == 1)
        if self._bias.numel():
            self._bias[begin:end].add_(dlogits.sum(0, dtype=self._wide), alpha=tile.scale)

    def finish_rows(self) -> None:
        """The selected rows have had all their columns."""
        if self._dhidden is not None:
            self._hidden[self._rows] = self._dhidden.to(self._hidden.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(dhidden, dweight, dbias)`` after all rows, the first summed over the processes that share the columns."""
        if self._shard is not None and self._hidden.numel():
            self._shard.sum_(self._hidden)
        if self._tiles == 0:
            self._weight.zero_()
        return self._hidden.to(self._dtype), self._weight.to(self._dtype), self._bias.to(self._dtype)


def _row_tiles(kept: Tensor | None, rows: int, size: int) -> list[Rows]:
    """Rows of each tile. kept is a bool mask, whose number of rows is read back to the host, or None for all rows."""
    if kept is not None:
        index = kept.nonzero()[:, 0]
        if index.shape[0] < rows:
            return list(index.split(size)) if index.shape[0] else []
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def tile_sizes(hidden: Tensor) -> TileSizes:
    """`TILE_SIZES` of the device of the hidden states."""
    return TILE_SIZES["cpu" if hidden.device.type == "cpu" else "cuda"]


def _rounded_down(number: int, multiple: int) -> int:
    """To a multiple, where there is one that is not 0."""
    return max(number // multiple * multiple, min(number, multiple))


def _tile_rows(rows_in_all: int, chunk_size: int | None, size: int) -> int:
    return max(min(size if chunk_size is None else chunk_size, rows_in_all), 1)


def _tile_shape(
    head: Head, options: LogitOptions, rows_in_all: int, chunk_size: int | None, *, forward: bool
) -> tuple[int, int]:
    """(rows, columns) of a tile: whole rows in a forward where enough of them fit, else a block of columns.

    chunk_size: rows, where the caller chose them.
    """
    sizes, columns_in_all = tile_sizes(head.hidden), head.weight.shape[0]
    itemsize = _product_dtype(head.hidden, options).itemsize
    whole = _rounded_down(sizes.bytes // (columns_in_all * itemsize), sizes.row_multiple)
    if forward and sizes.least_forward_rows is not None and sizes.least_forward_rows <= whole:
        rows = _tile_rows(rows_in_all, chunk_size, whole)
        if rows <= whole:
            return rows, columns_in_all
    rows = _tile_rows(rows_in_all, chunk_size, sizes.rows)
    most = max(sizes.bytes // (rows * itemsize), sizes.least_columns)
    blocks = -(-columns_in_all // most)
    even = -(-columns_in_all // blocks)  # blocks of one size
    return rows, min(-(-even // _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS, columns_in_all)


def _blocks(columns_in_all: int, columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, columns_in_all, columns):
        yield begin, min(begin + columns, columns_in_all)


def _stats_of_rows(
    rows: Rows, tile: _Tile, reference: Reference | None, labels: Tensor | None, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` of some rows, block by block, as the row op has them."""
    tile.select(rows)
    if reference is not None:
        reference.select(rows)
    selected = None if labels is None else labels[rows]
    if tile.is_whole(0, columns):
        logits = tile.fill(0, columns)
        ref_logits = None if reference is None else reference.fill(0, columns)
        whole: tuple[Tensor, Tensor, Tensor] = torch.ops.spo_kernels.token_stats_fwd(
            logits, selected, ref_logits, None, vocabulary.IGNORED, False
        )
        return whole
    parts = (
        vocabulary.part_of(
            tile.fill(begin, end),
            tile.local_labels(selected, begin, end),
            None if reference is None else reference.fill(begin, end),
        )
        for begin, end in _blocks(tile.columns_in_all, columns)
    )
    return _finished(functools.reduce(vocabulary.merge, parts), tile)


def _finished(part: Part, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` from the statistics of all columns of a tile's head."""
    whole = vocabulary.combine(part, tile.shard, tile.columns_in_all)
    return whole.logps().to(tile.wide), whole.kl.to(tile.wide), whole.stats.to(tile.wide)


def _gradients_of_rows(
    rows: Rows,
    tile: _Tile,
    reference: Reference | None,
    labels: Tensor | None,
    upstream: tuple[Tensor | None, Tensor | None],
    known: tuple[Tensor, Tensor],
    gradients: _Gradients,
    columns: int,
) -> None:
    """Add the gradients of some rows, recomputing their logits by blocks; upstream and known, (kl, stats), theirs."""
    dlogps, dkl = upstream
    tile.select(rows)
    gradients.select(rows, tile)
    if reference is not None:
        reference.select(rows)
    selected = None if labels is None else labels[rows]
    for begin, end in _blocks(tile.columns_in_all, columns):
        logits = tile.fill(begin, end, slope=True)
        ref_logits = None if reference is None else reference.fill(begin, end)
        local = tile.local_labels(selected, begin, end)
        torch.ops.spo_kernels.token_stats_bwd_(dlogps, dkl, logits, local, ref_logits, None, *known, vocabulary.IGNORED)
        gradients.add(tile, logits, begin, end)
    gradients.finish_rows()


def _reference_tile(
    head: Head, ref_head: Head | None, uniform: bool, options: LogitOptions, rows: int, columns: int
) -> Reference | None:
    if uniform:
        return _UniformTile(head.hidden, columns, _product_dtype(head.hidden, options))
    return None if ref_head is None else _Tile(ref_head, options, rows, columns)


def token_stats_fwd(
    head: Head,
    labels: Tensor | None,
    ref_head: Head | None,
    kept: Tensor | None,
    uniform: bool,
    options: LogitOptions,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logps, kl, stats)`` as `reference.token_stats_fwd` has them, 0 on rows that are not kept.

    labels ``[N]`` are in range wherever kept; the KL is that to ref_head, or to the uniform distribution.
    """
    rows = head.hidden.shape[0]
    dtype = accumulate_dtype(head.hidden.dtype)
    with_kl = uniform or ref_head is not None
    logps = head.hidden.new_zeros(rows if labels is not None else 0, dtype=dtype)
    kl = head.hidden.new_zeros(rows if with_kl else 0, dtype=dtype)
    stats = head.hidden.new_zeros(4 if with_kl else 2, rows, dtype=dtype)
    size, columns = _tile_shape(head, options, rows, chunk_size, forward=True)
    tile = _Tile(head, options, size, columns)
    reference = _reference_tile(head, ref_head, uniform, options, size, columns)
    for selected in _row_tiles(kept, rows, size):
        tile_logps, tile_kl, stats[:, selected] = _stats_of_rows(selected, tile, reference, labels, columns)
        if labels is not None:
            logps[selected] = tile_logps
        if with_kl:
            kl[selected] = tile_kl
    return logps, kl, stats


def token_stats_bwd(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    head: Head,
    labels: Tensor | None,
    ref_head: Head | None,
    kept: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    uniform: bool,
    needs: Needs,
    options: LogitOptions,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dhidden, dweight, dbias)``, each ``[0]`` where not wanted, in the head's dtype."""
    rows = head.hidden.shape[0]
    size, columns = _tile_shape(head, options, rows, chunk_size, forward=False)
    tile = _Tile(head, options, size, columns)
    with_kl = dkl is not None
    reference = _reference_tile(head, ref_head, uniform, options, size, columns) if with_kl else None
    tiles = _row_tiles(kept, rows, size)
    gradients = _Gradients(head, needs, head.hidden.dtype, one_tile=len(tiles) <= 1)
    for selected in tiles:
        known = (kl[selected] if with_kl else kl[:0], stats[: 4 if with_kl else 2, selected])
        upstream = (
            None if dlogps is None else dlogps[selected],
            None if dkl is None else dkl[selected],
        )
        wanted = None if dlogps is None else labels
        _gradients_of_rows(selected, tile, reference, wanted, upstream, known, gradients, columns)
    return gradients.finish()


def kl_loss_fwd(
    head: Head,
    ref_head: Head,
    row_weight: Tensor,
    gradient_dtype: torch.dtype,
    needs: Needs,
    options: LogitOptions,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sum_i row_weight_i KL_i, dhidden, dweight, dbias)``, from one product of each head.

    Tiles are as wide as the vocabulary. The gradients are ``[0]`` where not wanted.
    """
    columns = head.weight.shape[0]
    size = _wide_tile_rows(head, options, chunk_size, buffers=2)
    tile, reference = _Tile(head, options, size, columns), _Tile(ref_head, options, size, columns)
    tiles = _row_tiles(row_weight != 0, head.hidden.shape[0], size)
    gradients = _Gradients(head, needs, gradient_dtype, one_tile=len(tiles) <= 1)
    wide = tile.wide
    loss = head.hidden.new_zeros((), dtype=torch.float64)  # of many tiles, one after the other
    for selected in tiles:
        loss += _kl_loss_of_tile(selected, tile, reference, row_weight[selected], gradients)
    del tile, reference  # room for the cast of the sums
    return loss.to(wide), *gradients.finish()


def _wide_tile_rows(head: Head, options: LogitOptions, chunk_size: int | None, buffers: int = 1) -> int:
    sizes = tile_sizes(head.hidden)
    row_bytes = head.weight.shape[0] * _product_dtype(head.hidden, options).itemsize
    size = _rounded_down(max(sizes.wide_bytes // row_bytes, sizes.least_wide_rows) // buffers, sizes.row_multiple)
    rows = _tile_rows(head.hidden.shape[0], chunk_size, size)
    # Every process must take the same rows at a time, also where shards are uneven.
    return rows if head.shard is None else head.shard.least(rows, head.hidden.device)


# (first pair, end, sums of log-probs of the chosen [p], of the rejected [p]) -> gradients of the objective by them
PairCoefficients = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]


def pair_gradients(
    head: Head,
    labels: Tensor,
    bounds: Tensor,
    pairs: int,
    coefficients: PairCoefficients,
    gradient_dtype: torch.dtype,
    needs: Needs,
    options: LogitOptions,
    ignore_index: int,
    chunk_size: int | None,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sums [2P], dhidden, dweight, dbias)`` of an objective whose gradient by a pair's log-probs needs only them.

    Of the 2P sequences, s is rows ``bounds[s]`` to ``bounds[s + 1]``; s and s + P are a pair. Rows of as many pairs as
    fit make a tile, which is as wide as the vocabulary. A pair with more rows is recomputed in narrower ones, or
    refused if strict. The gradients are ``[0]`` where not wanted.
    """
    wide = accumulate_dtype(head.hidden.dtype)
    size = _wide_tile_rows(head, options, chunk_size)
    kept = (labels != ignore_index).nonzero()[:, 0]
    sequence = sequences.of_rows(bounds, labels.shape[0])
    pair_of_row = sequence[kept] % max(pairs, 1)
    order = kept[pair_of_row.argsort(stable=True)]
    lengths: list[int] = torch.bincount(pair_of_row, minlength=pairs).tolist()
    if strict and lengths and max(lengths) > size:
        raise ValueError(
            f"chunk_size must be at least the {max(lengths)} rows of the longest pair for gradients within the "
            f"forward, got {size}; the route that recomputes takes any"
        )
    # In float64: D is a small difference of long sums.
    token_logps = head.hidden.new_zeros(labels.shape[0], dtype=torch.float64)
    sums = head.hidden.new_zeros(2 * pairs, dtype=torch.float64)
    gradients = _Gradients(head, needs, gradient_dtype, one_tile=len(order) <= size)
    fits = any(0 < length <= size for length in lengths)
    tile = _Tile(head, options, size, head.weight.shape[0]) if fits else None
    for first, end, rows in _pair_groups(order, lengths, size):
        of_row = sequence[rows]

        def upstream(
            logps: Tensor, first: int = first, end: int = end, rows: Tensor = rows, of_row: Tensor = of_row
        ) -> Tensor:
            token_logps[rows] = logps.double()
            for begin, stop in ((first, end), (pairs + first, pairs + end)):
                sums[begin:stop] = sequences.sums(token_logps, bounds[begin : stop + 1])
            chosen, rejected = coefficients(first, end, sums[first:end], sums[pairs + first : pairs + end])
            of_sequence = torch.zeros_like(sums)
            of_sequence[first:end], of_sequence[pairs + first : pairs + end] = chosen, rejected
            return of_sequence[of_row].to(wide)

        if rows.shape[0] == 0:
            upstream(sums[:0])
        elif tile is not None and rows.shape[0] <= size:
            _gradients_of_tile(rows, tile, labels, upstream, gradients)
        else:
            _gradients_of_long_pair(rows, head, labels, upstream, gradients, options, chunk_size)
    del tile  # room for the cast of the sums
    return sums.to(wide), *gradients.finish()


def _pair_groups(order: Tensor, lengths: list[int], size: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first pair, end, their rows) of consecutive pairs with at most `size` rows together, or of one with more."""
    first = start = stop = 0
    for pair, length in enumerate(lengths):
        if stop + length - start > size and pair > first:
            yield first, pair, order[start:stop]
            first, start = pair, stop
        stop += length
    if lengths:
        yield first, len(lengths), order[start:stop]


def _gradients_of_tile(
    rows: Tensor,
    tile: _Tile,
    labels: Tensor,
    upstream: Callable[[Tensor], Tensor],
    gradients: _Gradients,
) -> None:
    tile.select(rows)
    gradients.select(rows, tile)
    logits = tile.fill(0, tile.columns_in_all, slope=True)
    local = tile.local_labels(labels[rows], 0, tile.columns_in_all)
    logps, *known = _finished(vocabulary.part_of(logits, local, None), tile)
    dlogps = upstream(logps)
    torch.ops.spo_kernels.token_stats_bwd_(dlogps, None, logits, local, None, None, *known, vocabulary.IGNORED)
    gradients.add(tile, logits, 0, tile.columns_in_all)
    gradients.finish_rows()


def _kl_loss_of_tile(rows: Rows, tile: _Tile, reference: _Tile, row_weight: Tensor, gradients: _Gradients) -> Tensor:
    """``sum_i row_weight_i KL_i`` of some rows, adding its gradients."""
    tile.select(rows)
    reference.select(rows)
    gradients.select(rows, tile)
    logits = tile.fill(0, tile.columns_in_all, slope=True)
    ref_logits = reference.fill(0, tile.columns_in_all)
    loss: Tensor
    if tile.shard is None:
        loss = torch.ops.spo_kernels.kl_loss_fwd_(logits, ref_logits, row_weight)
    else:  # the gradient has to wait for the other columns' statistics
        _, *known = _finished(vocabulary.part_of(logits, None, ref_logits), tile)
        torch.ops.spo_kernels.token_stats_bwd_(
            None, row_weight, logits, None, ref_logits, None, *known, vocabulary.IGNORED
        )
        loss = known[0].double() @ row_weight.double()
    gradients.add(tile, logits, 0, tile.columns_in_all)
    gradients.finish_rows()
    return loss


def _gradients_of_long_pair(
    rows: Tensor,
    head: Head,
    labels: Tensor,
    upstream: Callable[[Tensor], Tensor],
    gradients: _Gradients,
    options: LogitOptions,
    chunk_size: int | None,
) -> None:
    size, columns = _tile_shape(head, options, rows.shape[0], chunk_size, forward=False)
    tile = _Tile(head, options, size, columns)
    parts = [(part, *_stats_of_rows(part, tile, None, labels, columns)) for part in rows.split(size)]
    dlogps = upstream(torch.cat([logps for _, logps, _, _ in parts])).split(size)
    for (part, _, *known), given in zip(parts, dlogps, strict=True):
        _gradients_of_rows(part, tile, None, labels, (given, None), (known[0], known[1]), gradients, columns)
