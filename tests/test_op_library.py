"""Ops defined by the signature of a function: schemas, records as arguments, shapes, gradients, autocast."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_kernels import op_library
from spo_kernels.op_library import Size


class Line(NamedTuple):
    slope: Tensor
    offset: Tensor | None


class Settings(NamedTuple):
    factor: float
    width: Size | None
    name: str | None


class Plan(NamedTuple):
    settings: Settings
    negate: bool


@op_library.op
def library_test_line(line: Line, other: Line | None, x: Tensor, times: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """(the scaled sum of both lines at x, the value of the first line)."""
    assert isinstance(line, Line) and isinstance(plan.settings, Settings)
    first = line.slope * x + (0 if line.offset is None else line.offset)
    second = 0 if other is None else other.slope * x
    value = times * plan.settings.factor * (first + second)
    return (-value if plan.negate else value), first.clone()


@library_test_line.fake
def _empty(x: Tensor, line: Line) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(line.slope)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = library_test_line.records(inputs)
    ctx.scale = given["times"] * given["plan"].settings.factor
    ctx.save_for_backward(given["x"])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dvalue: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    (x,) = ctx.saved_tensors
    return ctx.scale * dvalue * x, ctx.scale * dvalue


library_test_line.gradient(_save, _backward, of="line")
_Eager = library_test_line.eager_function()

X = torch.tensor([1.0, 2.0])
PLAN = Plan(Settings(0.5, 7, "a"), False)


def line() -> Line:
    return Line(torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True))


def test_the_schema_is_the_signature_with_records_as_their_fields() -> None:
    assert library_test_line.schema == (
        "(Tensor line_slope, Tensor? line_offset, Tensor? other_slope, Tensor? other_offset, Tensor x, int times, "
        "float plan_settings_factor, SymInt? plan_settings_width, str? plan_settings_name, bool plan_negate) "
        "-> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("other", [None, Line(X, None)])
def test_records_come_back_as_they_were(other: Line | None) -> None:
    arguments = (line(), other, X, 2, PLAN)
    flat = library_test_line.flat(*arguments)
    assert len(flat) == 10
    assert tuple(library_test_line.records(flat).values()) == arguments


def test_a_call_and_its_gradient() -> None:
    given = line()
    value, first = library_test_line(given, Line(X, None), X, 2, PLAN)
    assert value.tolist() == [5, 13] and first.tolist() == [4, 9]
    assert [x.tolist() for x in torch.autograd.grad(value.sum(), given)] == [[1, 2], [1, 1]]
    eager, _ = _Eager.apply(*library_test_line.flat(given, Line(X, None), X, 2, PLAN))
    assert torch.equal(eager, value)
    assert [x.tolist() for x in torch.autograd.grad(eager.sum(), given)] == [[1, 2], [1, 1]]


def test_compiled_in_one_graph() -> None:
    def call(slope: Tensor, offset: Tensor, x: Tensor) -> Tensor:
        return library_test_line(Line(slope, offset), None, x, 2, Plan(Settings(0.5, x.shape[0], None), True))[0]

    given = line()
    value = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)(*given, X)
    assert torch.equal(value, call(*given, X))
    assert [x.tolist() for x in torch.autograd.grad(value.sum(), given)] == [[1, 2], [1, 1]]


def test_a_fake_function_gets_the_parameters_that_it_names() -> None:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (X, X)]
        value, first = library_test_line(Line(*fakes), None, mode.from_tensor(X), 2, PLAN)
    assert value.shape == first.shape == X.shape


def test_opcheck() -> None:
    torch.library.opcheck(library_test_line.packet.default, tuple(library_test_line.flat(line(), None, X, 2, PLAN)))


def test_autocast_is_off_inside() -> None:
    seen = []

    @op_library.op
    def library_test_autocast(line: Line) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return line.slope.clone()

    with torch.autocast("cpu"):
        library_test_autocast(Line(X, None))
    assert seen == [False]


def test_a_call_with_a_wrong_number_of_arguments_is_refused() -> None:
    for call in (lambda: library_test_line(line(), None, X, 2), lambda: library_test_line(line(), None, X, 2, PLAN, 1)):
        with pytest.raises(TypeError, match="library_test_line takes 5 arguments: line, other, x, times, plan"):
            call()


def test_arguments_may_be_named() -> None:
    by_name = library_test_line(line(), None, plan=PLAN, times=2, x=X)
    assert torch.equal(by_name[0], library_test_line(line(), None, X, 2, PLAN)[0])


def test_a_record_of_one_field_is_a_record() -> None:
    class Single(NamedTuple):
        x: Tensor

    globals()["Single"] = Single  # the annotation is looked up there

    @op_library.op
    def library_test_single(single: Single, by: float) -> Tensor:
        return single.x * by

    assert library_test_single.schema == "(Tensor single_x, float by) -> Tensor"
    assert library_test_single(Single(X), 2.0).tolist() == [2, 4]


def test_records_that_could_not_come_back_are_refused() -> None:
    class MayBegin(NamedTuple):
        first: Tensor | None
        second: Tensor

    class Empty(NamedTuple):
        pass

    for record in (MayBegin, Empty):

        def library_test_refused(x: Any) -> Tensor:
            return x

        library_test_refused.__annotations__ = {"x": record | None, "return": Tensor}
        with pytest.raises(TypeError, match="x must be a record with fields; the first field of an optional record"):
            op_library.op(library_test_refused)


def test_an_op_that_writes_says_so() -> None:
    @op_library.backend_op(mutates="x")
    def library_test_write_(x: Tensor, by: Tensor | None) -> None:
        """Writes to x."""

    assert library_test_write_.schema == "(Tensor(a!) x, Tensor? by) -> ()"
