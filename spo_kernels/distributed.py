"""Tensors and modules of several processes: a sharded model's head, DTensor arguments, modules that hold a group.

A DTensor is what torch's FSDP2 (``fully_shard``) and tensor parallelism make of a parameter. `gather_head` makes
Tensors of it for the head's functions; its options say how the processes' gradients combine. The functions and modules
themselves take DTensors whose placements leave no choice, see `takes_dtensors`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from spo_kernels.shards import Columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Function = TypeVar("Function", bound=Callable[..., Any])


class GatheredHead(NamedTuple):
    """A head's Tensors, and the options of the head's functions that go with them."""

    weight: Tensor  # [V, H]; with a process_group the rows that this process holds
    bias: Tensor | None  # [V], or the rows of this process
    process_group: ProcessGroup | None  # holds the vocabulary; None if this process has all of it
    vocab_shards: tuple[int, ...] | None  # rows of each process, in the order of ranks


def gather_head(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: Literal["avg", "sum"] = "avg",
    vocab_dim: str | int | None = None,
) -> GatheredHead:
    """The head of a sharded model as Tensors for the ``linear_*`` functions and `LinearSPOLoss`.

    The parameters get the gradient that one process with the whole batch would give, as DTensors with their own
    placements. All processes of the mesh must call, and all must run the backward. The gathered weight stays in memory
    until then. Inside the ``forward`` of its FSDP unit a parameter is already gathered: Tensors are returned as they
    are, so one call serves inside and outside. With ``weight.full_tensor()`` alone, each process keeps the gradient of
    its own batch and torch reduces nothing: the gradient is silently wrong.

        head = gather_head(model.lm_head.weight, model.lm_head.bias, vocab_dim="tp")
        split = {"process_group": head.process_group, "vocab_shards": head.vocab_shards}
        linear_token_logps(hidden, head.weight, labels, head.bias, **split)

    Args:
        weight: ``[V, H]``, a DTensor that is sharded (evenly or not) or replicated over each dimension of its mesh, or
            a Tensor.
        bias: ``[V]`` or None. A DTensor on the mesh of weight. Without vocab_dim it may be a Tensor beside a DTensor
            weight: each process then keeps the bias gradient of its own batch.
        reduction: how the gathered dimensions of the mesh combine the gradients of their processes. "avg": each process
            has the mean loss of its own batch, and the loss is the mean over processes, as FSDP and DDP take it. "sum":
            the loss is the sum of what the processes have. Where all processes of a dimension have the same loss,
            "avg" is right.
        vocab_dim: name (or index) of the mesh dimension over which tensor parallelism splits the vocabulary, where
            weight is ``Shard(0)``. The vocabulary stays split over it: the result has this process's rows, and the
            options for the functions. None: every dimension is gathered.

    Returns:
        `GatheredHead`; process_group and vocab_shards are None without vocab_dim.

    Raises:
        ValueError: an option is none of its values; a DTensor bias beside a Tensor weight, or with vocab_dim the
            reverse; weight and bias of different meshes; a DTensor is ``Partial``; vocab_dim for a Tensor, for a mesh
            without that dimension, for a weight that is not ``Shard(0)`` over it, or where a process would have no row.
    """
    if reduction not in ("avg", "sum"):
        raise ValueError(f'reduction must be "avg" or "sum", got {reduction!r}')
    if not _is_dtensor(weight):
        if _is_dtensor(bias):
            raise ValueError(f"bias must be a Tensor like weight, got {_described(bias)}")
        if vocab_dim is not None:
            raise ValueError(
                f"weight must be a DTensor whose mesh has the dimension vocab_dim={vocab_dim!r}, got a Tensor; give "
                "the functions process_group and vocab_shards for a Tensor of this process's rows"
            )
        return GatheredHead(weight, bias, None, None)
    mesh: DeviceMesh = weight.device_mesh  # type: ignore[attr-defined]
    split = None if vocab_dim is None else _mesh_dim(mesh, vocab_dim)
    whole = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if split is not None or _is_dtensor(bias):
        _check_one_mesh(whole)
    rows = [_local_rows(name, x, split, reduction) if _is_dtensor(x) else x for name, x in whole.items()]
    local_weight, local_bias = rows[0], rows[1] if len(rows) > 1 else None
    if split is None:
        return GatheredHead(local_weight, local_bias, None, None)
    return GatheredHead(local_weight, local_bias, *_vocabulary(mesh, split, {"weight": weight.shape[0]}))


def _local_rows(name: str, tensor: Any, split: int | None, reduction: str) -> Tensor:
    """The rows of a DTensor over mesh dimension split, gathered over the others; all rows where split is None."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"{name} must be sharded or replicated, got {_described(tensor)}")
        if dim == split and placement != Shard(0):
            raise ValueError(f"{name} must be Shard(0) over vocab_dim, got {_described(tensor)}")
    over = range(tensor.device_mesh.ndim)
    gathered = tensor.redistribute(placements=[Shard(0) if dim == split else Replicate() for dim in over])
    return gathered.to_local(grad_placements=[Shard(0) if dim == split else Partial(reduction) for dim in over])


def takes_dtensors(**vocabulary: int) -> Callable[[Function], Function]:
    """Decorator of a public function or a module's forward: DTensor arguments are taken, or refused by a sentence.

    A call without DTensors goes to the function as it is. DTensors of one mesh are taken in two cases:

    - Each is replicated over the mesh. The function gets the local Tensors.
    - Logits or a head are sharded along the vocabulary over one dimension of the mesh, evenly or not. All other
      DTensors are replicated. The function gets the local Tensors, and the process_group and vocab_shards of that
      dimension. Plain Tensors must be the same in each of its processes.

    The result is made of replicated DTensors if every tensor argument is a DTensor, else of Tensors. A mesh dimension
    of one process counts as replicated. Over a mesh dimension that does not split the vocabulary, a plain Tensor may
    differ between processes, and the gradient of a DTensor depends on that: plain Tensors are refused there, unless no
    DTensor needs a gradient.

    Args:
        vocabulary: the dimension of the vocabulary, by the name of each argument that has it.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            for value in args:
                if type(value) not in _NEVER_DTENSORS and _is_dtensor(value):
                    return _on_local_tensors(function, vocabulary, args, keywords)
            for value in keywords.values():
                if type(value) not in _NEVER_DTENSORS and _is_dtensor(value):
                    return _on_local_tensors(function, vocabulary, args, keywords)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate


# The types of nearly all arguments: a look-up settles what `_is_dtensor` would take ten times as long for.
_NEVER_DTENSORS = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})


def _is_dtensor(value: object) -> bool:
    if not isinstance(value, Tensor) or type(value) in _NEVER_DTENSORS or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # half a second, which only callers with tensor subclasses pay

    return isinstance(value, DTensor)


def _on_local_tensors(
    function: Callable[..., Any], vocabulary: Mapping[str, int], args: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    """The function's result for arguments of which one is a DTensor at least."""
    bound = inspect.signature(function).bind(*args, **keywords)
    given = bound.arguments
    module = given.get("self")
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    dtensors = {name: tensor for name, tensor in tensors.items() if _is_dtensor(tensor)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in dtensors}
    mesh = _check_one_mesh(dtensors)
    for option in ("inplace_backward", "overwrite_logits"):
        if given.get(option) or getattr(module, option, False):
            raise ValueError(f"{option} must be False for DTensors, got True with {', '.join(dtensors)}")
    for option in ("process_group", "vocab_shards") if vocabulary else ():
        value = given.get(option, getattr(module, option, None))
        if value is not None:
            raise ValueError(
                f"{option} must be None for DTensors, whose placements say what a process holds, got {value} with "
                f"{', '.join(dtensors)}"
            )
    split = _split_dim(dtensors, vocabulary, mesh)
    _check_plain(plain, dtensors, vocabulary, mesh, split)

    for name, tensor in dtensors.items():
        given[name] = _local(tensor, split, vocabulary.get(name))
    if split is not None:
        sizes = {name: dtensors[name].shape[dim] for name, dim in vocabulary.items() if name in dtensors}
        process_group, vocab_shards = _vocabulary(mesh, split, sizes)
        _check_same(plain, process_group)
        if module is None:
            given["process_group"], given["vocab_shards"] = process_group, vocab_shards
        else:
            given["self"] = _with_group(module, process_group, vocab_shards)
    result = function(*bound.args, **bound.kwargs)
    return result if plain else _replicated(result, mesh)


def _split_dim(dtensors: Mapping[str, Any], vocabulary: Mapping[str, int], mesh: DeviceMesh) -> int | None:
    """The mesh dimension that splits the vocabulary, or None; ValueError for placements that are not taken."""
    from torch.distributed.tensor import Shard

    splits = set()
    for name, tensor in dtensors.items():
        along = vocabulary.get(name)
        for dim, placement in enumerate(tensor.placements):
            if mesh.size(dim) == 1 or placement.is_replicate():
                continue
            shard = None if along is None else Shard(along % max(tensor.dim(), 1))
            if placement == shard:
                splits.add(dim)
            if placement != shard or len(splits) > 1:
                taken = "" if shard is None else f", or {shard!r} over one mesh dimension"
                raise ValueError(f"{name} must be replicated{taken}, got {_described(tensor)}; {_REMEDY}")
    return splits.pop() if splits else None


def _check_plain(
    plain: Mapping[str, Tensor],
    dtensors: Mapping[str, Tensor],
    vocabulary: Mapping[str, int],
    mesh: DeviceMesh,
    split: int | None,
) -> None:
    """ValueError for plain Tensors, beside DTensors, that may hold all columns or some, or one batch or many."""
    for name in plain:
        if split is not None and name in vocabulary:
            other = next(other for other in dtensors if other in vocabulary)
            raise ValueError(
                f"{name} must be a DTensor like {other}, got a Tensor with {other} {_described(dtensors[other])}; "
                f"{_REMEDY}"
            )
    wanting = [name for name, x in dtensors.items() if x.requires_grad] if torch.is_grad_enabled() else []
    if plain and wanting and any(mesh.size(dim) > 1 for dim in range(mesh.ndim) if dim != split):
        first, name = next(iter(plain)), wanting[0]
        raise ValueError(
            f"{first} must be a DTensor like {name}, got a Tensor with {name} {_described(dtensors[name])}: the "
            f"gradient of {name} depends on whether {first} is the same in every process; {_REMEDY}"
        )


def _local(tensor: Any, split: int | None, along: int | None) -> Tensor:
    """What this process holds of a checked DTensor; of its own columns where the vocabulary is split."""
    from torch.distributed.tensor import Shard

    placements = list(tensor.placements)
    if split is not None and along is not None:
        placements[split] = Shard(along % tensor.dim())
    return tensor.redistribute(placements=placements).to_local()


def _replicated(result: Any, mesh: DeviceMesh) -> Any:
    """The Tensors of a result as DTensors, in tuples and records too."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(result, tuple):
        items = [_replicated(item, mesh) for item in result]
        return type(result)(*items) if hasattr(result, "_fields") else tuple(items)
    if not isinstance(result, Tensor):
        return result
    return DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _check_one_mesh(tensors: Mapping[str, Any]) -> DeviceMesh:
    """The mesh of DTensors; ValueError where one is not on the mesh of the first."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if not _is_dtensor(tensor) or tensor.device_mesh != like.device_mesh:
            raise ValueError(
                f"{name} must be a DTensor on the mesh of {first}, got {_described(tensor)} with {first} "
                f"{_described(like)}; {_REMEDY}"
            )
    return like.device_mesh


def _mesh_dim(mesh: DeviceMesh, vocab_dim: str | int) -> int:
    names = mesh.mesh_dim_names or ()
    if isinstance(vocab_dim, str) and vocab_dim in names:
        return names.index(vocab_dim)
    if isinstance(vocab_dim, int) and 0 <= vocab_dim < mesh.ndim:
        return vocab_dim
    known = ", ".join([*map(repr, names), *map(str, range(mesh.ndim))])
    raise ValueError(f"vocab_dim must be a dimension of the mesh of weight: {known}; got {vocab_dim!r}")


def _vocabulary(mesh: DeviceMesh, split: int, sizes: Mapping[str, int]) -> tuple[ProcessGroup, tuple[int, ...]]:
    """The group and the shards of a vocabulary of these sizes, which DTensors split over a mesh dimension.

    Every process gets the same answer or the same ValueError: one that went on alone would wait for the others.
    """
    (first, vocab_size), *others = sizes.items()
    for name, size in others:
        if size != vocab_size:
            raise ValueError(f"{name} must have the vocabulary of {first}, {vocab_size}, got {size}")
    if not _in_order_of_ranks(mesh, split):
        raise ValueError(f"the mesh must list its processes in the order of ranks, got {mesh}")
    count = mesh.size(split)
    rows = -(-vocab_size // count)  # as torch.chunk splits
    shards = tuple(max(0, min(rows, vocab_size - rank * rows)) for rank in range(count))
    if shards[-1] == 0:
        raise ValueError(f"{first} must have a vocabulary for {count} processes, got {vocab_size}: shards {shards}")
    return mesh.get_group(split), shards


@torch.compiler.assume_constant_result
def _in_order_of_ranks(mesh: DeviceMesh, dim: int) -> bool:
    """Whether a mesh dimension lists its processes as their group does, which sorts them."""
    ranks = mesh.mesh.movedim(dim, -1)
    return bool((ranks.diff() > 0).all())


def _check_same(plain: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """ValueError for Tensors that differ between processes; compares the first number of each row.

    A parameter of FSDP looks like a shard of the vocabulary, but its processes have different batches. Compiled code
    cannot raise here: it relies on the ops, which check labels, masks and weights.
    """
    if not plain or torch.compiler.is_compiling():
        return
    try:
        first = {name: torch.atleast_1d(x.detach())[..., :1] for name, x in plain.items()}
        Columns(0, 0, group.group_name).check_same(**first)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from None


_REMEDY = (
    "spo_kernels.gather_head(weight, bias) makes Tensors of a sharded head, .full_tensor() or .redistribute() changes "
    "the placements of another DTensor"
)


def _described(tensor: Any) -> str:
    if not _is_dtensor(tensor):
        return "a Tensor"
    mesh = tensor.device_mesh
    dims = mesh.mesh_dim_names or range(mesh.ndim)
    over = ", ".join(f"{name!r}: {mesh.size(dim)}" for dim, name in enumerate(dims))
    return f"placements {tensor.placements} on the mesh {{{over}}}"


class HoldsProcessGroup(nn.Module):
    """A module with an attribute `process_group`, which it can be copied and pickled with.

    A copy (``copy.deepcopy``) has the same group. A pickle (``torch.save`` of the module) has the group's name. The
    loaded module looks for a group of that name when it first needs one, and raises RuntimeError if there is none: make
    the group, or assign `process_group`.
    """

    _process_group: ProcessGroup | str | None  # the name, from a pickle whose group was not needed yet

    @property
    def process_group(self) -> ProcessGroup | None:
        if isinstance(self._process_group, str):
            self._process_group = _found(self._process_group)
        return self._process_group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._process_group = group

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_process_group"] = _Shared(state["_process_group"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.get("_process_group", _Shared(None))  # earlier pickles hold no group and no such key
        super().__setstate__(state | {"_process_group": held.group})


class _Shared:
    """A process group in a module's state: deepcopy keeps it, pickle writes its name."""

    def __init__(self, group: ProcessGroup | str | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def __reduce__(self) -> tuple[type[_Shared], tuple[str | None]]:
        group = self.group
        return _Shared, (group if group is None or isinstance(group, str) else group.group_name,)


def _found(name: str) -> ProcessGroup:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        except RuntimeError:
            pass
    raise RuntimeError(
        f"the module was pickled with the process group {name!r}, which this process does not have: make it before "
        "the first call, or assign the module's process_group"
    )


def _with_group(module: nn.Module, group: ProcessGroup, shards: tuple[int, ...]) -> nn.Module:
    """The same module (parameters, buffers and submodules are shared) with the options of a split vocabulary."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__ | {"_process_group": group, "vocab_shards": shards})
    return twin
