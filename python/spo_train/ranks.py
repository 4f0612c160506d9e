"""Processes that share a run: each takes its part of the pairs and of the samples, and gradients are summed.

`torchrun` starts them. The result is that of one process with the whole batch, to rounding: settings count pairs and
samples over all processes. The model is not sharded, every process holds all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The others wait this long for the first process, which evaluates and writes files. A process that dies ends the others
# at once: their connections to it break, and torchrun ends them.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """The processes of a run, as one of them sees it. Each method that communicates must be called by all.

    Attributes:
        process_group: the processes; None for a run in one process.
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        """
        Args:
            process_group: one that takes tensors of the CPU and of the models' device; None does not communicate.
        """
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` items; parts differ by one item at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, in place."""
        if self.process_group is not None:
            dist.all_reduce(values, group=self.process_group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum of a tensor over the processes, in place."""
        if self.process_group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.process_group)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in a process."""
        return bool(self.largest(torch.tensor(int(flag))))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the processes. A parameter without a gradient in any process stays without."""
        if self.process_group is None:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has_gradient = self.largest(torch.tensor([int(parameter.grad is not None) for parameter in trained]))
        works = []
        for parameter, somewhere in zip(trained, has_gradient.tolist(), strict=True):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, group=self.process_group, async_op=True))
        for work in works:
            work.wait()

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.process_group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.process_group, group_src=0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the first one; [] in the others. Tensors must be on the CPU."""
        if self.process_group is None:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, group=self.process_group, group_dst=0)
        return values or []

    def check_same(self, name: str, value: int) -> None:
        """Raise ValueError, in all processes, unless the value is the same in all."""
        both = self.largest(torch.tensor([value, -value]))
        if both[0] != -both[1]:
            raise ValueError(f"{name} must be the same in all processes, got {value} in process {self.rank}")

    def wait(self) -> None:
        """Wait for all processes."""
        if self.process_group is not None:
            dist.barrier(group=self.process_group)


@contextmanager
def launched(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the processes that torchrun started. Yield them, and the device of this one.

    A default process group that exists already is used, and left as it is.

    Args:
        device: "cpu", or "cuda", of which each process takes the GPU of its local rank.

    Raises:
        ValueError: another device with several processes, or a launcher that asks for sharded models.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(), device
        return
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true"):
            raise ValueError(
                f"spo-train does not shard models, and ACCELERATE_USE_{engine} asks for it: start it with torchrun, "
                "each process then holds the whole model; spo_kernels.integrations.trl.SPOTrainer trains sharded models"
            )
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f'device must be "cpu" or "cuda" under torchrun, which gives each process a GPU of its own, got {device!r}'
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Ranks(dist.group.WORLD), device
        return
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    yield Ranks(dist.group.WORLD), device
    dist.destroy_process_group()
