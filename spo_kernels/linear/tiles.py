"""A head's logits and gradients, a tile at a time: rows x columns of logits in one scratch buffer that tiles reuse.

A matrix product ``h W^T + b`` fills the tile, a row op works on it in place, and the matrix products of the backward
consume it. Temperature, softcap and scale are the row op's work (`reference.RowOptions`). Sums over tiles are float32,
or float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels import shards
from spo_kernels.linear.records import Head, HeadOptions, Needs, Uniform
from spo_kernels.precision import accumulate_dtype, accumulates_in_float32, product_dtype

Rows = slice | Tensor  # of the hidden states: a range, or the indices of the rows that were kept


class TileSizes(NamedTuple):
    """How large a tile may be on a kind of device.

    A narrow tile holds a block of columns, a wide tile whole rows. Gradients within the forward need wide tiles.
    """

    rows: int  # most rows of a narrow tile
    bytes: int  # size of a narrow tile; `least_columns` may exceed it
    least_columns: int  # of a narrow tile
    least_forward_rows: int | None  # a forward takes wide tiles if so many rows fit in `bytes`; None: never
    wide_bytes: int  # size of a wide tile; `least_wide_rows` may exceed it
    least_wide_rows: int  # of a wide tile
    row_multiple: int  # rows of a wide tile are a multiple of it: products take rows in blocks of so many
    column_multiple: int  # columns of a narrow tile are a multiple of it: every row of a tile then starts aligned
    cast_columns: int  # columns that are cast at a time when the weight or its gradient needs another dtype


TILE_SIZES = {
    # These tiles keep matrix products near their peak: fewer than 512 rows or 1024 columns lose a fifth of the speed.
    # They also stay in cache between the product and the row op.
    "cpu": TileSizes(
        rows=4096,
        bytes=16 << 20,
        least_columns=1024,
        least_forward_rows=None,
        wide_bytes=64 << 20,
        least_wide_rows=512,
        row_multiple=1,
        column_multiple=16,
        cast_columns=4096,
    ),
    # Launches must cost little beside products: on an H100 a launch took the host 17 us, and the product of a 16 MiB
    # tile at H = 2048 50 us. Statistics of whole rows need no merging, which takes 30 launches a block.
    "cuda": TileSizes(
        rows=4096,
        bytes=256 << 20,
        least_columns=1024,
        least_forward_rows=512,
        wide_bytes=1 << 30,
        least_wide_rows=512,
        row_multiple=256,
        column_multiple=16,
        cast_columns=4096,
    ),
}


class TileShape(NamedTuple):
    rows: int
    columns: int


def tile_sizes(hidden: Tensor) -> TileSizes:
    """`TILE_SIZES` of the device of the hidden states."""
    return TILE_SIZES["cpu" if hidden.device.type == "cpu" else "cuda"]


def tile_shape(head: Head, options: HeadOptions, rows: int, *, forward: bool) -> TileShape:
    """Shape of the tiles for this many rows: wide in a forward if enough rows fit, else narrow."""
    sizes, width = tile_sizes(head.hidden), head_columns(head, options)
    itemsize = _product_dtype(head).itemsize
    if forward and sizes.least_forward_rows is not None:
        whole = _same_rows(head, options, _rounded_down(sizes.bytes // (width * itemsize), sizes.row_multiple))
        tile_rows = _tile_rows(rows, options, whole)
        if sizes.least_forward_rows <= whole and tile_rows <= whole:
            return TileShape(tile_rows, width)
    tile_rows = _tile_rows(rows, options, sizes.rows)
    most = max(sizes.bytes // (tile_rows * itemsize), sizes.least_columns)
    blocks = -(-width // most)
    even = -(-width // blocks)  # blocks of one size
    return TileShape(tile_rows, min(-(-even // sizes.column_multiple) * sizes.column_multiple, width))


def wide_tile_shape(head: Head, options: HeadOptions, tiles: int = 1) -> TileShape:
    """Shape of tiles as wide as the vocabulary, of which so many are held at once."""
    sizes, width = tile_sizes(head.hidden), head_columns(head, options)
    row_bytes = width * _product_dtype(head).itemsize
    size = _rounded_down(max(sizes.wide_bytes // row_bytes, sizes.least_wide_rows) // tiles, sizes.row_multiple)
    rows = _same_rows(head, options, _tile_rows(head.hidden.shape[0], options, size))
    return TileShape(rows, width)


def _same_rows(head: Head, options: HeadOptions, rows: int) -> int:
    """The smallest of the processes' rows: they exchange statistics of a tile, so all must take the same rows."""
    return rows if options.columns.group is None else options.columns.all_min(rows, head.hidden.device)


def head_columns(head: Head, options: HeadOptions) -> int:
    """How many columns of logits a head has in this process, without padding."""
    return shards.columns_read(options.columns, head.weight.shape[0])


def _product_dtype(head: Head) -> torch.dtype:
    return product_dtype(head.hidden.device.type, head.hidden.dtype)


def _tile_rows(rows: int, options: HeadOptions, size: int) -> int:
    return max(min(size if options.chunk_size is None else options.chunk_size, rows), 1)


def _rounded_down(number: int, multiple: int) -> int:
    """The largest multiple up to the number, or the number itself below one multiple."""
    return max(number // multiple * multiple, min(number, multiple))


def row_tiles(kept: Tensor | None, rows: int, size: int) -> list[Rows]:
    """Rows of each tile.

    kept: a bool mask, or None for all rows. The number of rows that it keeps is read back to the host.
    """
    if kept is not None:
        index = kept.nonzero()[:, 0]
        if index.shape[0] < rows:
            return list(index.split(size)) if index.shape[0] else []
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


class LogitsBuffer:
    """Logits of one head before their transform, a tile at a time in one buffer."""

    def __init__(self, head: Head, options: HeadOptions, shape: TileShape, transform: Tensor | None) -> None:
        self.transform = transform
        self.mixture = options.mixture
        self._head = head
        self._shape = shape
        self._memory: Tensor | None = None
        self.columns = options.columns
        self.width = head_columns(head, options)
        self.dtype = _product_dtype(head)
        self.accumulate = accumulate_dtype(head.hidden.dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First column and end of each block of columns."""
        for begin in range(0, self.width, self._shape.columns):
            yield begin, min(begin + self._shape.columns, self.width)

    def hidden(self, rows: Rows) -> Tensor:
        """Hidden states ``[n, H]`` of these rows, as the products take them."""
        return self._head.hidden[rows].to(self.dtype)

    def fill(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        """Logits ``[n, end - begin]``, in the buffer, of what `hidden` returned."""
        if self._memory is None:
            self._memory = self._head.hidden.new_empty(self._shape, dtype=self.dtype)
        logits = self._memory[: hidden.shape[0], : end - begin]
        for b, e in self._cast_blocks(begin, end):
            weight, out = self._head.weight[b:e].to(self.dtype), logits[:, b - begin : e - begin]
            if self._head.bias is None:
                torch.mm(hidden, weight.t(), out=out)
            else:
                bias = self._head.bias[b:e].to(self.dtype)
                torch.addmm(bias, hidden, weight.t(), out=out)
        return logits

    def local_labels(self, labels: Tensor | None, begin: int, end: int) -> Tensor | None:
        """Labels of the whole vocabulary, relative to a block of columns."""
        if labels is None or self.holds_vocabulary(begin, end):
            return labels
        return shards.local_labels(labels, self.columns.start + begin, end - begin)

    def holds_vocabulary(self, begin: int, end: int) -> bool:
        """Whether these columns are the whole vocabulary, so that no statistics have to be merged."""
        return self.columns.group is None and (begin, end) == (0, self.width)

    def weights(self, begin: int, end: int, dweight_dtype: torch.dtype | None) -> Iterator[tuple[int, int, Tensor]]:
        """``(begin, end, weight)`` of each product of the backward. dweight_dtype: None if dweight is not wanted."""
        for b, e in self._cast_blocks(begin, end, dweight_dtype):
            yield b, e, self._head.weight[b:e].to(self.dtype)

    def _cast_blocks(self, begin: int, end: int, dweight_dtype: torch.dtype | None = None) -> Iterator[tuple[int, int]]:
        """Blocks of columns whose cast copies stay small.

        One block if nothing is cast, because one large product is a few percent faster.
        """
        weight = self._head.weight
        casts_gradient = dweight_dtype not in (None, self.dtype) and not accumulates_in_float32(
            dweight_dtype, self.dtype, weight.device.type
        )
        one_block = weight.dtype == self.dtype and not casts_gradient
        size = end - begin if one_block else tile_sizes(weight).cast_columns
        for b in range(begin, end, size):
            yield b, min(b + size, end)


class UniformLogits:
    """Logits of the uniform distribution, in place of a reference's `LogitsBuffer`."""

    transform = None

    def __init__(self, head: Head, options: HeadOptions, shape: TileShape) -> None:
        self._row = head.hidden.new_zeros(1, shape.columns, dtype=_product_dtype(head))

    def hidden(self, rows: Rows) -> Tensor:
        """What `fill` takes in place of hidden states: one row of zeros, viewed as ``[n, columns of a tile]``."""
        return self._row.expand(rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0], -1)

    def fill(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return hidden[:, : end - begin]


RefLogits = LogitsBuffer | UniformLogits


def ref_logits_buffer(
    head: Head, ref_head: Head | Uniform | None, options: HeadOptions, shape: TileShape
) -> RefLogits | None:
    """The logits of a head's reference, tile by tile."""
    if ref_head is None:
        return None
    if isinstance(ref_head, Head):
        return LogitsBuffer(ref_head, options, shape, options.ref_transform)
    return UniformLogits(head, options, shape)


class GradientSums:
    """Sums over tiles of a head's gradients; ``[0]`` where not wanted.

    one_chunk: all rows are in one chunk. The weight's gradient is then no sum over chunks, so it has the result dtype.
    """

    def __init__(self, head: Head, needs: Needs, options: HeadOptions, *, one_chunk: bool) -> None:
        hidden, weight, bias = head
        self._dtype = needs.dtype
        self._columns = options.columns
        self._wide = accumulate_dtype(hidden.dtype)
        # Summed over processes below, so kept wide until then.
        hidden_dtype = self._wide if self._columns.group is not None else needs.dtype
        self._hidden = hidden.new_zeros(hidden.shape if needs.hidden else 0, dtype=hidden_dtype)
        weight_dtype = needs.dtype if one_chunk else self._wide
        self._weight = weight.new_empty(weight.shape if needs.weight else 0, dtype=weight_dtype)
        self._bias = weight.new_zeros(weight.shape[0] if needs.bias and bias is not None else 0, dtype=self._wide)
        self._width = head_columns(head, options)
        self._chunks = 0

    def begin_rows(self, rows: Rows, hidden: Tensor) -> None:
        """Start on rows with these hidden states."""
        self._rows = rows
        self._dhidden = torch.empty_like(hidden, dtype=self._wide) if self._hidden.numel() else None
        self._chunks += 1

    def add(self, buffer: LogitsBuffer, hidden: Tensor, dlogits: Tensor, begin: int, end: int) -> None:
        """Add the products of the backward of a block of logits, whose rows have these hidden states."""
        dweight_dtype = self._weight.dtype if self._weight.numel() else None
        for b, e, weight in buffer.weights(begin, end, dweight_dtype):
            block = dlogits[:, b - begin : e - begin]
            if self._dhidden is not None:
                _accumulate(self._dhidden, block, weight, first=b == 0)
            if self._weight.numel():
                _accumulate(self._weight[b:e], block.t(), hidden, first=self._chunks == 1)
        if self._bias.numel():
            self._bias[begin:end].add_(dlogits.sum(0, dtype=self._wide))

    def end_rows(self) -> None:
        """Store the gradient of the rows: all their columns have been added."""
        if self._dhidden is not None:
            self._hidden[self._rows] = self._dhidden.to(self._hidden.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(dhidden, dweight, dbias)`` of all rows, dhidden summed over the processes that share the vocabulary."""
        if self._columns.group is not None and self._hidden.numel():
            self._columns.sum_(self._hidden)
        self._weight[0 if self._chunks == 0 else self._width :].zero_()
        return self._hidden.to(self._dtype), self._weight.to(self._dtype), self._bias.to(self._dtype)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total += a b``; with first ``total = a b``, and total may be uninitialized.

    Total may have a wider dtype than the operands. It may have a narrower one only if this is the sole call for it.
    """
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif accumulates_in_float32(total.dtype, a.dtype, a.device.type):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
