"""Triton in the interpreter: bf16 as a GPU treats it, and which of these tests a process can run.

``TRITON_INTERPRET=1`` must be set before triton is first imported, and changes every kernel of the process. So
test_triton_interpreter.py starts a new process for the interpreted tests, and other processes do not collect them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = ["test_triton_interpreter.py", "test_triton_compiles.py"] if INTERPRETING else ["test_triton_ops.py"]


@pytest.fixture(autouse=True, scope="session")
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Casts to bf16 round to nearest even. Arithmetic in bf16 is refused, except products of matrices.

    The interpreter holds bf16 as 16-bit integers. In casts it truncates where a GPU rounds. In arithmetic, products of
    matrices included, it computes with the integers. So products of matrices are widened here, and for other
    arithmetic the kernels themselves must widen.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        old, new = source.dtype.scalar, target.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return original_cast(self, source, target)
        values = torch.from_numpy(source.data.copy())
        if old == tl.bfloat16:
            return TensorHandle(values.view(torch.bfloat16).float().numpy().astype(_get_np_dtype(new)), new)
        return TensorHandle(values.to(torch.bfloat16).view(torch.uint16).numpy(), new)

    def binary(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError(f"{op.__name__} on bf16 in a kernel: widen the operands first")
        return original_binary(self, left, right, op)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            a, b = (cast(self, operand, tl.float32) for operand in (a, b))
        return original_dot(self, a, b, *args)

    original_cast, original_binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    original_dot = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        patch.setattr(InterpreterBuilder, "binary_op", binary)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def language_patched_once_per_launch() -> Iterator[None]:
    """A launch patches all of triton.language once, and calls of helper functions within it do not patch again.

    The interpreter itself patches the language at every call of a helper function, which takes most of its time.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    original = interpreter._patch_lang
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda _: original(everything))
        patch.setattr(
            interpreter.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
        )
        yield


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of unmasked elements of every block that kernels load in this test. Loads of scalars do not count."""
    from triton.runtime.interpreter import InterpreterBuilder

    sizes: list[int] = []
    original = InterpreterBuilder.create_masked_load

    def load(self: InterpreterBuilder, ptrs: Any, mask: Any, *args: Any) -> Any:
        if ptrs.data.size > 1:
            sizes.append(int(mask.data.sum()))
        return original(self, ptrs, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    return sizes
