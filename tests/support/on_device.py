"""A backend that computes on a device and is called with CPU tensors, so that the cases of the CPU run there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import Backend
from spo_kernels.reference import RowOptions


class OnDevice:
    """The functions of a backend, with tensors copied to the device and, since the functions may write to them, back.

    Whole storages are copied, so a slice keeps its strides, offset and neighbours, and two views still share memory.
    Results are on the CPU. A result in place is the caller's own tensor, as from any backend.
    """

    def __init__(self, backend: Backend, name: str, device: str) -> None:
        self._backend = backend
        self.name = name
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._backend, name)

        def call(*args: Any) -> Any:
            flat = [x for arg in args for x in (arg if isinstance(arg, RowOptions) else (arg,))]
            here = {_address(arg): arg for arg in flat if isinstance(arg, Tensor)}
            there = {address: _elements(arg).to(self._device, copy=True) for address, arg in here.items()}

            def carried(arg: Any) -> Any:
                if isinstance(arg, RowOptions):
                    return RowOptions(*map(carried, arg))
                if not isinstance(arg, Tensor):
                    return arg
                return there[_address(arg)].as_strided(arg.shape, arg.stride(), arg.storage_offset())

            moved = [carried(arg) for arg in args]
            results = function(*moved)
            for address, arg in here.items():
                _elements(arg).copy_(there[address])

            def back(result: Any) -> Any:
                if not isinstance(result, Tensor):
                    return result
                return next((arg for arg, copy in zip(args, moved, strict=True) if copy is result), result.cpu())

            return tuple(map(back, results)) if isinstance(results, tuple) else back(results)

        return call


def _address(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _elements(tensor: Tensor) -> Tensor:
    """All elements of a tensor's memory, in a row."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
