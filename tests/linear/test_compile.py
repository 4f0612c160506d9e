"""The head under the compiler and fake tensors, and its ops under opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import (
    FUNCTIONS,
    OPTIONS,
    ROUTE,
    Inputs,
    all_near,
    differentiate,
    kl_arguments,
    pair_inputs,
)
from oracle import IGNORE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from spo_kernels import (
    LinearSPOLoss,
    SoftImportance,
    SPOLoss,
    linear_kl_loss,
    linear_token_logps,
    precision,
)
from spo_kernels.linear import ops
from spo_kernels.linear.records import Head, HeadOptions, Needs, PairObjective, PairWeights
from spo_kernels.op_library import Op
from spo_kernels.shards import Columns


def test_native_products_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    precision.native_products.cache_clear()
    calls = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (calls.append(a.dtype), product(a, b))[1])
    first = precision.native_products("cpu", torch.bfloat16)
    assert {torch.bfloat16, torch.float32} == set(calls)
    before = len(calls)
    assert precision.native_products("cpu", torch.bfloat16) == first
    assert len(calls) == before


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(autocast: bool, name: str) -> None:
    x = Inputs(3, 7, dtype=torch.float32)
    ours, _ = FUNCTIONS[name]

    def call(*policy: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return ours(x, policy, **OPTIONS["all"])

    got, want = differentiate(compiled(call), x.policy, x.upstream), differentiate(call, x.policy, x.upstream)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_dynamic_shapes_compile_once() -> None:
    x = Inputs(3, 7, dtype=torch.float32)
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiles.append(len(inputs))
        return graph

    torch._dynamo.reset()
    call = torch.compile(linear_token_logps, fullgraph=True, dynamic=True, backend=backend)
    hidden, labels = x.policy[0].detach().flatten(0, 1), x.labels.flatten().clamp(max=9)
    for rows, columns in ((5, 10), (7, 12), (4, 11)):
        weight = x.policy[1].detach()[:columns]
        got = call(hidden[:rows], weight, labels[:rows])
        torch.testing.assert_close(got, linear_token_logps(hidden[:rows], weight, labels[:rows]))
    assert len(compiles) == 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Types of the operands of the products that `native_products` measures; it has not measured yet."""
    precision.native_products.cache_clear()
    operands: list[type] = []
    product = torch.mm

    def spy(a: Tensor, b: Tensor, **out: Tensor) -> Tensor:
        if not out:
            operands.append(type(a))
        return product(a, b, **out)

    monkeypatch.setattr(torch, "mm", spy)
    return operands


def test_fake_tensors_do_not_measure(measured: list[type]) -> None:
    """Products of fake tensors take no time, and a wrong measurement would stay for the whole process."""
    x = pair_inputs(dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, weight = (mode.from_tensor(tensor).requires_grad_() for tensor in x.policy[:2])
        loss, _ = LinearSPOLoss(route="recompute_free")(hidden, weight, mode.from_tensor(x.labels))
    assert isinstance(loss, FakeTensor)
    assert measured and set(measured) == {Tensor}


def test_compile_does_not_trace_the_measurement(measured: list[type]) -> None:
    x = pair_inputs(dtype=torch.bfloat16)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        objective, _ = LinearSPOLoss(route="recompute_free")(hidden, weight, x.labels)
        return objective + linear_kl_loss(hidden, weight, x.ref_hidden, x.ref_weight)

    got, want = differentiate(compiled(call), x.policy[:2]), differentiate(call, x.policy[:2])
    assert measured and set(measured) == {Tensor}
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


@ROUTE
def test_compile_linear_spo_loss(route: str) -> None:
    x = pair_inputs(dtype=torch.float32)
    cu_seqlens = torch.arange(0, 37, 6)
    loss = LinearSPOLoss(beta=0.2, weight=SoftImportance(0.05, -1.0), nll_weight=0.1, route=route)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        packed = hidden.flatten(0, 1)
        first = loss(hidden, weight, x.labels, bias, kl_hidden=hidden * 2, **kl_arguments(x))[0]
        reference = {"kl_ref_hidden": x.ref_hidden, "kl_ref_weight": x.ref_weight}
        second = loss(packed, weight, x.labels.flatten(), cu_seqlens=cu_seqlens, kl_hidden=hidden, **reference)[0]
        return first + 3 * second

    got, want = differentiate(compiled(call), x.policy), differentiate(call, x.policy)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compile_dynamic_shapes() -> None:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        logps, entropy = linear_token_logps(hidden * 1, weight, labels, chunk_size=chunk_size, return_entropy=True)
        of_logits = SPOLoss()(hidden @ weight.T, labels)[0]
        return (logps + 0.1 * entropy).sum() + LinearSPOLoss()(hidden, weight, labels)[0] + of_logits

    function = compiled(call, dynamic=True)
    for rows, length, chunk_size in ((2, 7, 3), (6, 5, 4)):
        x = Inputs(rows, length)
        got = differentiate(lambda h, w, y=x.labels, c=chunk_size: function(h, w, y, c), x.policy[:2])
        want = differentiate(lambda h, w, y=x.labels, c=chunk_size: call(h, w, y, c), x.policy[:2])
        all_near(got, want)


def op_arguments(op: str) -> tuple[Any, ...]:
    """Arguments of an op, records included, with every option set."""
    x = Inputs(12, dtype=torch.float32)
    head, ref_head = Head(*(tensor.requires_grad_() for tensor in x.policy)), Head(*x.reference)
    options = HeadOptions(5, Columns(0, x.weight.shape[0], None), torch.tensor([[0.2], [2.3]]), None)
    needs = Needs(True, True, True, torch.float32)
    constant = Head(*(tensor.detach() for tensor in head))
    _, kl, stats = ops.linear_token_stats_fwd(constant, x.labels, None, None, IGNORE, True, options)
    upstream = (torch.rand(12), torch.rand(12), torch.rand(12))
    weights = PairWeights(None, torch.tensor(-1.0), torch.tensor(0.05))
    pairs = (x.labels, torch.arange(5) * 3, torch.full((4,), 2.0), weights)
    return {
        "linear_token_stats_fwd": (head, x.labels, None, None, IGNORE, True, options),
        "linear_token_stats_bwd": (
            *upstream,
            constant,
            x.labels,
            None,
            None,
            kl,
            stats,
            IGNORE,
            True,
            needs._replace(bias=False),
            options,
        ),
        "linear_kl_loss_fwd": (head, ref_head, torch.rand(12), needs, options),
        "linear_spo_loss_fwd": (
            head,
            *pairs,
            PairObjective(torch.tensor(0.1), torch.tensor(0.2), center=False, average=True),
            IGNORE,
            False,
            needs,
            options._replace(chunk_size=20),
        ),
    }[op]


@pytest.mark.parametrize(
    "op", ["linear_token_stats_fwd", "linear_token_stats_bwd", "linear_kl_loss_fwd", "linear_spo_loss_fwd"]
)
def test_opcheck(op: str) -> None:
    op_of: Op = getattr(ops, op)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "loss" not in op:  # a backward that scales an output in place fails there; see test_functional.test_opcheck
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op_of.packet.default, tuple(op_of.flat(*op_arguments(op))), test_utils=tests)
