"""Records that the head's functions, ops and loops share. An op flattens and rebuilds them, see `op_library`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.op_library import Size
from spo_kernels.shards import Columns


class Head(NamedTuple):
    """Hidden states, and the head that makes logits of them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Uniform(NamedTuple):
    """Stands in for a reference head whose distribution is uniform: the KL to it is log V minus the entropy."""


class HeadOptions(NamedTuple):
    """The options of every function of a head, checked."""

    chunk_size: Size | None  # rows of a tile, at most
    columns: Columns  # of weight and bias, in the whole vocabulary
    transform: Tensor | None  # of the policy's logits, see `reference.RowOptions`
    ref_transform: Tensor | None  # of the reference's
    mixture: float = 0.0  # which divergence from the reference, see `reference.RowOptions`


class PairWeights(NamedTuple):
    """mu of each pair, computed from that pair alone; 1 if nothing is given."""

    given: Tensor | None  # [P]
    normalizer: Tensor | None  # [], of soft importance; None without it
    gamma: Tensor  # [], of soft importance


class PairObjective(NamedTuple):
    """What `LinearSPOLoss` minimizes over pairs. Numbers are CPU tensors: torch.compile specializes floats of ops."""

    alpha: Tensor  # []
    nll_weight: Tensor  # []
    center: bool
    average: bool


class Needs(NamedTuple):
    """Which gradients of a head are wanted, and in which dtype."""

    hidden: bool
    weight: bool
    bias: bool
    dtype: torch.dtype
