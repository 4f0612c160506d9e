"""Every public function in every kind of transform, context and compiler: right, or refused by a sentence.

Right is equal to the same function in plain torch, in float64. ``python tests/test_kinds.py`` writes the table of
docs/transforms.md.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import spo_kernels

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests/support"))

from public_functions import FUNCTIONS, PublicFunction, Sizes  # noqa: E402

PAGE = ROOT / "docs/transforms.md"
BATCH = 3

Function = Callable[..., Tensor]
Pairs = Iterator[tuple[Tensor, Tensor]]  # what ours gives, and what plain torch gives


def made(function: PublicFunction, *, requires_grad: bool = False, sizes: Sizes | None = None) -> tuple[Any, Any]:
    leaves, constants = function.inputs(sizes or Sizes())
    return [leaf.requires_grad_(requires_grad) for leaf in leaves], constants


def weighted(outputs: Tensor) -> Tensor:
    """A sum with other weights than 1, negative ones among them."""
    return (outputs.flatten() * torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype)).sum()


def gradients(output: Tensor, leaves: Any, **options: Any) -> list[Tensor]:
    """Of the weighted sum; 0 for what does not depend on a leaf."""
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    options = {"materialize_grads": True, **options}
    return list(torch.autograd.grad(weighted(output), leaves, **options))


def true_value_and_gradients(function: PublicFunction, sizes: Sizes | None = None) -> list[Tensor]:
    leaves, constants = made(function, requires_grad=True, sizes=sizes)
    output = function.truth(*leaves, *constants)
    return [output.detach(), *gradients(output, leaves)]


def value_and_gradients(function: PublicFunction, call: Function | None = None, sizes: Any = None) -> list[Tensor]:
    leaves, constants = made(function, requires_grad=True, sizes=sizes)
    output = (call or function.call)(*leaves, *constants)
    return [output.detach(), *gradients(output, leaves)]


def directions(tensors: Iterable[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(tensor.shape, generator=g, dtype=tensor.dtype) for tensor in tensors]


def true_jvp(function: PublicFunction) -> tuple[Tensor, Tensor]:
    leaves, constants = made(function)
    return torch.func.jvp(lambda *x: function.truth(*x, *constants), tuple(leaves), tuple(directions(leaves)))


# ---- the kinds


def forward_mode(function: PublicFunction) -> Pairs:
    value, tangent = true_jvp(function)
    for requires_grad in (False, True):
        leaves, constants = made(function, requires_grad=requires_grad)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, directions(leaves), strict=True)]
            output = forward_ad.unpack_dual(function.call(*duals, *constants))
            yield output.primal, value
            yield torch.zeros_like(value) if output.tangent is None else output.tangent, tangent


def forward_mode_of_constants(function: PublicFunction) -> Pairs:
    """References, temperatures and weights are constants: without a tangent in the result, or refused."""
    leaves, constants = made(function)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) if x.is_floating_point() else x for x in constants]
        output = forward_ad.unpack_dual(function.call(*leaves, *duals))
        yield output.primal, function.truth(*leaves, *constants)
        yield torch.zeros(1) if output.tangent is None else output.tangent.abs().max()[None], torch.zeros(1)


def of_leaves(transform: Callable[..., Any]) -> Callable[[PublicFunction], Pairs]:
    """A transform of a function of the leaves, which returns one or more tensors for them."""

    def kind(function: PublicFunction) -> Pairs:
        leaves, constants = made(function)
        argnums = tuple(range(len(leaves)))
        both = (transform(lambda *x, of=of: of(*x, *constants), argnums)(*leaves) for of in function[1:3])
        return zip(*map(tensors, both), strict=True)

    return kind


def tensors(nested: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(nested)


def grad(function: Function, argnums: Any) -> Function:
    return torch.func.grad(lambda *x: weighted(function(*x)), argnums)


def jvp(function: PublicFunction) -> Pairs:
    leaves, constants = made(function)
    ours = torch.func.jvp(lambda *x: function.call(*x, *constants), tuple(leaves), tuple(directions(leaves)))
    return zip(ours, true_jvp(function), strict=True)


def batched(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensor and others like it. Bounds and labels stay legal: bounds repeat, and labels move on by a row."""
    if tensor.dtype == torch.int64 and tensor.dim() == 1 and bool((tensor.diff() >= 0).all()):
        return torch.stack([tensor] * BATCH, dim)
    if not tensor.is_floating_point():
        return torch.stack([tensor.roll(i, -1) for i in range(BATCH)], dim)
    return torch.stack([tensor * (1 + i / 4) for i in range(BATCH)], dim)


def in_a_loop(function: Function, dims: Any, inputs: Any) -> Any:
    results = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)))
        for i in range(BATCH)
    ]
    return [torch.stack(parts) for parts in zip(*map(tensors, results), strict=True)]


def vmap(function: PublicFunction) -> Pairs:
    """Leaves and constants in the batch; with a backward through the result."""
    both = []
    for mapped, of in (
        (torch.vmap, function.call),
        (lambda f: lambda *given: in_a_loop(f, [0] * len(given), given)[0], function.truth),
    ):
        inputs = [[batched(x) for x in some] for some in made(function)]
        leaves = [leaf.requires_grad_() for leaf in inputs[0]]
        output = mapped(of)(*leaves, *inputs[1])
        both.append([output.detach(), *gradients(output, leaves)])
    return zip(*both, strict=True)


def vmap_in_part(function: PublicFunction) -> Pairs:
    """Only the first leaf in the batch, along its last dimension; then only constants; then only the last leaf."""
    leaves, constants = made(function)
    inputs = [*leaves, *constants]
    for chosen in ({0}, set(range(len(leaves), len(inputs))), {len(leaves) - 1}):
        dims = tuple((0 if x.dim() == 1 else 1) if i in chosen else None for i, x in enumerate(inputs))
        given = [x if dim is None else batched(x, dim) for x, dim in zip(inputs, dims, strict=True)]
        expected = in_a_loop(function.truth, dims, given)[0]
        yield torch.vmap(function.call, in_dims=dims)(*given), expected


def vmap_of_grad(function: PublicFunction) -> Pairs:
    leaves, constants = made(function)
    argnums = tuple(range(len(leaves)))
    dims = [0] * len(leaves) + [None] * len(constants)
    inputs = [*map(batched, leaves), *constants]
    ours = torch.vmap(grad(function.call, argnums), in_dims=tuple(dims))(*inputs)
    return zip(tensors(ours), in_a_loop(grad(function.truth, argnums), dims, inputs), strict=True)


def double_backward(function: PublicFunction) -> Pairs:
    both = []
    for of in function[1:3]:
        leaves, constants = made(function, requires_grad=True)
        output = of(*leaves, *constants)
        first = gradients(output, leaves, create_graph=True)
        penalty = sum(weighted(gradient).square() for gradient in first) + sum(leaf.sum() for leaf in leaves)
        both.append(torch.autograd.grad(penalty, leaves))
    return zip(*both, strict=True)


def backward_twice(function: PublicFunction) -> Pairs:
    _, *expected = true_value_and_gradients(function)
    leaves, constants = made(function, requires_grad=True)
    output = function.call(*leaves, *constants)
    yield from zip(gradients(output, leaves, retain_graph=True), expected, strict=True)
    yield from zip(gradients(output, leaves), expected, strict=True)


def checkpointed(use_reentrant: bool) -> Callable[[PublicFunction], Pairs]:
    def kind(function: PublicFunction) -> Pairs:
        expected = true_value_and_gradients(function)
        leaves, constants = made(function, requires_grad=True)
        output = checkpoint(function.call, *leaves, *constants, use_reentrant=use_reentrant)
        yield output.detach(), expected[0]
        if any(gradient.any() for gradient in expected[1:]):  # reentrant: else torch raises an error of its own
            weighted(output).backward()
        for leaf, gradient in zip(leaves, expected[1:], strict=True):
            yield torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, gradient

    return kind


def saved_on_cpu(function: PublicFunction) -> Pairs:
    with torch.autograd.graph.save_on_cpu():
        leaves, constants = made(function, requires_grad=True)
        output = function.call(*leaves, *constants)
    return zip([output.detach(), *gradients(output, leaves)], true_value_and_gradients(function), strict=True)


def inference_inputs(function: PublicFunction) -> Pairs:
    """Labels, masks and references made under inference_mode; then everything under it."""
    leaves, _ = made(function, requires_grad=True)
    expected = true_value_and_gradients(function)
    with torch.inference_mode():
        inputs = made(function)
        yield function.call(*inputs[0], *inputs[1]), expected[0]
    output = function.call(*leaves, *inputs[1])
    yield from zip([output.detach(), *gradients(output, leaves)], expected, strict=True)
    if "grad" not in function.refused:
        of = grad(lambda *leaves: function.call(*leaves, *inputs[1]), tuple(range(len(leaves))))
        yield from zip(of(*made(function)[0]), expected[1:], strict=True)


def empty_axes(function: PublicFunction) -> Pairs:
    for sizes in function.empty:
        yield from zip(
            value_and_gradients(function, sizes=sizes), true_value_and_gradients(function, sizes), strict=True
        )


class Exported(nn.Module):
    def __init__(self, call: Function) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def exported(function: PublicFunction) -> Pairs:
    leaves, constants = made(function)
    inputs = (*leaves, *constants)
    program = torch.export.export(Exported(function.call), inputs, strict=False)
    yield program.module()(*inputs), function.truth(*inputs)


def fake_tensors(function: PublicFunction) -> Pairs:
    """Shapes and dtypes."""
    expected = true_value_and_gradients(function)
    with FakeTensorMode() as mode:
        leaves, constants = ([mode.from_tensor(x) for x in some] for some in made(function, requires_grad=True))
        output = function.call(*leaves, *constants)
        results = [output, *gradients(output, leaves)]
    for got, want in zip(results, expected, strict=True):
        yield torch.zeros(got.shape, dtype=got.dtype), torch.zeros_like(want)


def flops(function: PublicFunction) -> Pairs:
    """The result is the same, and the matrix products of a head are counted."""
    leaves, constants = made(function, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = function.call(*leaves, *constants)
        if output.requires_grad:
            weighted(output).backward()  # autograd.grad fails in this mode wherever a module was called
    got = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    yield from zip([output.detach(), *got], true_value_and_gradients(function), strict=True)
    yield torch.tensor(counter.get_total_flops()), torch.tensor(function.flops)


def compiled(function: PublicFunction) -> Pairs:
    torch._dynamo.reset()
    call = torch.compile(function.call, fullgraph=True, backend="aot_eager", dynamic=False)
    return zip(value_and_gradients(function, call), true_value_and_gradients(function), strict=True)


def compiled_grad(fullgraph: bool) -> Callable[[PublicFunction], Pairs]:
    """The transform within the compiled function."""

    def kind(function: PublicFunction) -> Pairs:
        leaves, constants = made(function)
        ours, truth = (grad(of, tuple(range(len(leaves)))) for of in function[1:3])
        torch._dynamo.reset()
        results = torch.compile(ours, fullgraph=fullgraph, backend="aot_eager", dynamic=False)(*leaves, *constants)
        return zip(results, truth(*leaves, *constants), strict=True)

    return kind


KINDS: dict[str, Callable[[PublicFunction], Pairs]] = {
    "forward-mode AD": forward_mode,
    "forward-mode AD of constants": forward_mode_of_constants,
    "grad": of_leaves(grad),
    "vmap": vmap,
    "vmap in part": vmap_in_part,
    "vmap(grad)": vmap_of_grad,
    "jvp": jvp,
    "jacrev": of_leaves(torch.func.jacrev),
    "jacfwd": of_leaves(torch.func.jacfwd),
    "hessian": of_leaves(lambda f, argnums: torch.func.hessian(lambda *x: weighted(f(*x)), argnums)),
    "double backward": double_backward,
    "backward twice": backward_twice,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "save_on_cpu": saved_on_cpu,
    "inference_mode": inference_inputs,
    "empty axes": empty_axes,
    "export": exported,
    "FakeTensorMode": fake_tensors,
    "FlopCounterMode": flops,
    "compile": compiled,
    "compile of grad": compiled_grad(fullgraph=True),
}


def assert_right(pairs: Pairs) -> None:
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def outcome(kind: str, function: PublicFunction) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # torch's own loop over the batch
        assert_right(KINDS[kind](function))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
@pytest.mark.parametrize("kind", KINDS)
def test_right_or_refused(kind: str, function: PublicFunction) -> None:
    if kind not in function.refused:
        outcome(kind, function)
        return
    with pytest.raises((RuntimeError, ValueError), match=function.refused[kind].message):
        outcome(kind, function)


@pytest.mark.parametrize("name", ["token_logps", "linear_token_logps", "spo_loss"])
def test_a_transform_in_compiled_code_breaks_the_graph(name: str) -> None:
    (function,) = (function for function in FUNCTIONS if function.name == name)
    assert_right(compiled_grad(fullgraph=False)(function))


def test_every_refusal_is_of_a_kind() -> None:
    assert {kind for function in FUNCTIONS for kind in function.refused} <= set(KINDS)


def test_every_public_function_is_here() -> None:
    of_no_tensor = {"GatheredHead", "backends", "gather_head", "head_options"}
    named = {re.split(r"[,(]", function.name)[0] for function in FUNCTIONS}
    assert named == set(spo_kernels.__all__) - of_no_tensor


def table() -> str:
    """Functions by kinds. Kinds with the same outcomes share a column; kinds that refuse nothing are left out."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for kind in KINDS:
        refusals = [function.refused.get(kind) for function in FUNCTIONS]
        column = tuple("right" if refusal is None else f"refused: {refusal.why}" for refusal in refusals)
        columns.setdefault(column, []).append(kind)
    right = columns.pop(("right",) * len(FUNCTIONS))
    rows = [["function", *map(", ".join, columns.values())], ["---"] * (1 + len(columns))]
    rows += [[f"`{f.name}`", *(column[i] for column in columns)] for i, f in enumerate(FUNCTIONS)]
    lines = [f"Right in every function: {', '.join(right)}.", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def page_with(new: str) -> str:
    before, begin, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    assert begin and end
    return before + begin + new + end + after


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_forward_mode_over_forward_mode_is_no_silent_zero(function: PublicFunction) -> None:
    leaves, constants = made(function)

    def second(call: Any) -> Any:
        def first(*x: Tensor) -> Any:
            return torch.func.jvp(lambda *z: tensors(call(*z, *constants)), x, tuple(leaf.cos() for leaf in leaves))[1]

        return torch.func.jvp(first, tuple(leaves), tuple(leaf.sin() for leaf in leaves))[1]

    try:
        got = second(function.call)
    except RuntimeError as error:
        assert re.search("take one of the derivatives in reverse mode|leave the option out", str(error))  # noqa: PT017
        return
    torch.testing.assert_close(got, second(function.truth), rtol=1e-9, atol=1e-10)


def test_the_page_has_the_table() -> None:
    assert PAGE.read_text() == page_with(table()), "run python tests/test_kinds.py"


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
