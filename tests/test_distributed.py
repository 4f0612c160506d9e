"""Heads of sharded models, DTensor arguments, and copies of modules that hold a process group, against one process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import spo_kernels as sk

V, H, B, T = 13, 6, 4, 3  # 13 is uneven over 2 processes (7 + 6) and leaves one row for the last of 4
IGNORE = -100


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    pool = Processes(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()


def results_of(processes: Processes, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """By rank; raises what a process raised."""
    results = processes.run(size, function, *arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def batch() -> tuple[Tensor, Tensor]:
    """ids and labels, [B, T]; the same number of unignored labels in each half, as a mean over processes wants."""
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[0, 0] = labels[3, 2] = IGNORE
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2)), labels


class Model(nn.Module):
    """hidden states of ids, or what `use` makes of them and the head, inside forward."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        self.body = nn.Linear(H, H, dtype=torch.float64)
        self.head = nn.Linear(H, V, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = noise(*parameter.shape, seed=10 + i)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, use: Callable[[Tensor, nn.Linear], Tensor] | None = None) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        return hidden if use is None else use(hidden, self.head)


def loss_of(hidden: Tensor, head: sk.GatheredHead, labels: Tensor) -> Tensor:
    split = {"process_group": head.process_group, "vocab_shards": head.vocab_shards}
    return -sk.linear_token_logps(hidden, head.weight, labels, head.bias, **split).mean()


def step(model: nn.Module, place: str, ids: Tensor, labels: Tensor, **options: Any) -> None:
    if place == "outside":
        hidden = model(ids)
        loss_of(hidden, sk.gather_head(model.head.weight, model.head.bias, **options), labels).backward()
    else:
        use = lambda hidden, head: loss_of(hidden, sk.gather_head(head.weight, head.bias, **options), labels)  # noqa: E731
        model(ids, use).backward()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor), name
        assert parameter.grad.placements == parameter.placements, name
        gradients[name] = parameter.grad.full_tensor()
    return gradients


def gradients_of_one_process(tied: bool, steps: int) -> dict[str, Tensor]:
    model, (ids, labels) = Model(tied), batch()
    for i in range(steps):
        step(model, "inside", ids.roll(i, -1), labels)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def fsdp_gradients(group: ProcessGroup, place: str, tied: bool, steps: int) -> dict[str, Tensor]:
    """place: "root": head in the root's unit, used in forward; "own": a unit of its own; "outside": after forward."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    model = Model(tied)
    if place == "own":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=place == "outside")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    ids, labels = (x.chunk(group.size())[group.rank()] for x in batch())
    for i in range(steps):
        model.set_requires_gradient_sync(i == steps - 1)
        step(model, place, ids.roll(i, -1), labels)
    return whole_gradients(model)


@pytest.mark.parametrize("steps", [1, 2], ids=["sync", "deferred"])
@pytest.mark.parametrize(
    ("place", "tied"),
    [("root", False), ("root", True), ("own", False), ("outside", False), ("outside", True)],
    ids=["root", "root-tied", "own", "outside", "outside-tied"],
)
def test_fsdp_head(processes: Processes, place: str, tied: bool, steps: int) -> None:
    expected = gradients_of_one_process(tied, steps)
    for gradients in results_of(processes, 2, fsdp_gradients, place, tied, steps):
        assert gradients.keys() == expected.keys()
        for name in expected:
            near(gradients[name], expected[name])


def one_process_head(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for the mean loss of the batch, times scale."""
    hidden, weight, bias = (x.requires_grad_() for x in head_tensors())
    (loss_of(hidden, sk.gather_head(weight, bias), batch()[1]) * scale).backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    return hidden.grad, weight.grad, bias.grad


def head_tensors() -> tuple[Tensor, Tensor, Tensor]:
    return noise(B, T, H, seed=3), noise(V, H, seed=4), noise(V, seed=5)


def sharded(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> Tensor:
    """A leaf that wants a gradient. Not nn.Parameter: a parameter and a DTensor of any other kind are taken alike."""
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_()


def gathered_shares(group: ProcessGroup) -> dict[str, Tensor]:
    """Each process has its share of a sum, as the ranks of a context-parallel group do."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    hidden, weight, bias = head_tensors()
    weight, bias = sharded(weight, mesh, Shard(1)), sharded(bias, mesh, Replicate())
    hidden, labels = (x.chunk(group.size())[group.rank()] for x in (hidden, batch()[1]))
    head = sk.gather_head(weight, bias, reduction="sum")
    assert type(head.weight) is Tensor and head.process_group is None and head.vocab_shards is None
    (loss_of(hidden, head, labels) / group.size()).backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    assert isinstance(bias.grad, DTensor) and bias.grad.placements == bias.placements
    return {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}


def test_shares_of_a_sum(processes: Processes) -> None:
    _, dweight, dbias = one_process_head()
    for gradients in results_of(processes, 2, gathered_shares):
        near(gradients["weight"], dweight)
        near(gradients["bias"], dbias)


def tensor_parallel(group: ProcessGroup, vocab_dim: str | int) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    hidden, weight, bias = head_tensors()
    weight, bias = (nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in (weight, bias))
    hidden.requires_grad_()
    head = sk.gather_head(weight, bias, vocab_dim=vocab_dim)
    assert head.process_group is group and head.vocab_shards is not None
    assert head.weight.shape[0] == head.vocab_shards[group.rank()]
    loss_of(hidden, head, batch()[1]).backward()
    for parameter in (weight, bias):
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
        assert parameter.grad.to_local().shape == parameter.to_local().shape
    assert hidden.grad is not None
    return head.vocab_shards, {
        "hidden": hidden.grad,
        "weight": weight.grad.full_tensor(),
        "bias": bias.grad.full_tensor(),
    }


@pytest.mark.parametrize(("size", "shards"), [(2, (7, 6)), (4, (4, 4, 4, 1))])
@pytest.mark.parametrize("vocab_dim", ["tp", 0])
def test_tensor_parallel_head(processes: Processes, size: int, shards: tuple[int, ...], vocab_dim: str | int) -> None:
    expected = dict(zip(("hidden", "weight", "bias"), one_process_head(), strict=True))
    for vocab_shards, gradients in results_of(processes, size, tensor_parallel, vocab_dim):
        assert vocab_shards == shards
        for name in expected:
            near(gradients[name], expected[name])


def data_and_tensor_parallel(group: ProcessGroup, place: str, steps: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model(tied=False)
    for name in ("weight", "bias"):
        whole = getattr(model.head, name).detach()
        setattr(model.head, name, nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)])))
    if place == "own":
        fully_shard(model.head, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=place == "outside")
    assert model.head.weight.device_mesh.ndim == 2
    dp = mesh.get_local_rank("dp")
    ids, labels = (x.chunk(2)[dp] for x in batch())
    for i in range(steps):
        model.set_requires_gradient_sync(i == steps - 1)
        step(model, place, ids.roll(i, -1), labels, vocab_dim="tp")
    return whole_gradients(model)


@pytest.mark.parametrize("steps", [1, 2], ids=["sync", "deferred"])
@pytest.mark.parametrize("place", ["root", "own", "outside"])
def test_data_and_tensor_parallel_head(processes: Processes, place: str, steps: int) -> None:
    expected = gradients_of_one_process(False, steps)
    for gradients in results_of(processes, 4, data_and_tensor_parallel, place, steps):
        assert gradients.keys() == expected.keys()
        for name in expected:
            near(gradients[name], expected[name])
