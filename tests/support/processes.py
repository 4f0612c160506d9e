"""A few gloo processes that wait for work: starting them takes seconds, a call of all of them milliseconds."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = 120  # seconds


def _import(name: str, file: str) -> None:
    """Import a test module, which no search path leads to, under the name that pytest gave it, for pickle to find."""
    parts = name.split(".")
    for package in (".".join(parts[:i]) for i in range(1, len(parts))):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    while (message := connection.recv_bytes()) != b"":
        module, file, size, call = pickle.loads(message)
        try:
            _import(module, file)
            function, arguments = pickle.loads(call)
            result = function(groups[size], *arguments) if rank < size else None
        except Exception as error:
            result = error
        connection.send_bytes(pickle.dumps(result))
    groups.clear()  # gloo aborts now and then when the last reference to a group goes at interpreter exit
    dist.destroy_process_group()


class Processes:
    """`run` calls a function of a test module in the first processes of the pool, with their group."""

    def __init__(self, world: int, folder: Path) -> None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results by rank; an exception is a result. Raises TimeoutError if a process does not answer."""
        call = pickle.dumps((function, arguments))
        message = pickle.dumps((function.__module__, inspect.getfile(function), size, call))
        for connection in self._connections:
            connection.send_bytes(message)
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(_TIMEOUT):
                raise TimeoutError(f"process {rank} did not answer in {_TIMEOUT} s")
            results.append(pickle.loads(connection.recv_bytes()))
        return results[:size]

    def close(self) -> None:
        for connection in self._connections:
            connection.send_bytes(b"")
        for process in self._processes:
            process.join(10)
            process.kill()
