"""How this package defines its ops: the schema of an op is the signature of a Python function.

A parameter may be a record: a NamedTuple of tensors, numbers and other records. Torch's ops take flat arguments, so
calling an `Op` flattens records, and the functions behind the op get them back. The flat names in the schema are
``parameter_field``. A record annotated ``| None`` is all None when it is absent.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

library = torch.library.Library("spo_kernels", "DEF")

Size = Annotated[int, "SymInt"]  # an int that torch.compile may leave symbolic

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Size: "SymInt",
    bool: "bool",
    float: "float",
    int: "int",
    str: "str",
    torch.dtype: "ScalarType",
}


class _Slot(NamedTuple):
    """A parameter of a signature or a field of a record, and the flat arguments that stand for it."""

    name: str
    type: Any  # a key of _SCHEMA_TYPES, or the record
    optional: bool
    fields: tuple[_Slot, ...]  # of a record, else empty

    @property
    def size(self) -> int:
        return sum(field.size for field in self.fields) if self.fields else 1

    def schema(self, mutates: Sequence[str], optional: bool = False) -> Iterator[str]:
        optional = optional or self.optional
        for field in self.fields:
            yield from field._replace(name=f"{self.name}_{field.name}").schema(mutates, optional)
        if not self.fields:
            alias = "(a!)" if self.name in mutates else ""
            yield f"{_SCHEMA_TYPES[self.type]}{alias}{'?' if optional else ''} {self.name}"

    def value(self, flat: Iterator[Any]) -> Any:
        """Take this slot's values off the flat arguments."""
        if not self.fields:
            return next(flat)
        values = [field.value(flat) for field in self.fields]
        return None if self.optional and values[0] is None else self.type(*values)


def _slot(name: str, annotation: Any) -> _Slot:
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        (annotation,) = (option for option in get_args(annotation) if option is not types.NoneType)
    fields: tuple[_Slot, ...] = ()
    if hasattr(annotation, "_fields"):
        fields = tuple(_slot(*hint) for hint in get_type_hints(annotation, include_extras=True).items())
    return _Slot(name, annotation, optional, fields)


def _returns(annotation: Any) -> str:
    if annotation is types.NoneType:
        return "()"
    if annotation is Tensor:
        return "Tensor"
    return f"({', '.join('Tensor' for _ in get_args(annotation))})"


def _append_flat(flat: list[Any], value: Any) -> None:
    if isinstance(value, tuple):
        for field in value:
            _append_flat(flat, field)
    else:
        flat.append(value)


class Op:
    """An op of ``torch.ops.spo_kernels``, defined by the signature of a function."""

    def __init__(self, signature: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name = signature.__name__
        self.__doc__ = signature.__doc__
        hints = get_type_hints(signature, include_extras=True)
        returns = _returns(hints.pop("return"))
        self._slots = [_slot(*hint) for hint in hints.items()]
        self._sizes = [slot.size for slot in self._slots]
        arguments = ", ".join(text for slot in self._slots for text in slot.schema(mutates))
        self.schema = f"({arguments}) -> {returns}"
        library.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.packet: Any = getattr(torch.ops.spo_kernels, self.name)

    def __call__(self, *arguments: Any) -> Any:
        """Call the op through torch's dispatcher, with records in place of their fields."""
        return self.packet(*self.flat(*arguments))

    def flat(self, *arguments: Any) -> list[Any]:
        """The op's arguments: records as their fields."""
        flat: list[Any] = []
        for argument, size in zip(arguments, self._sizes, strict=True):
            if argument is None:
                flat.extend([None] * size)
            else:
                _append_flat(flat, argument)
        return flat

    def records(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The arguments by the signature's names, from flat ones."""
        values = iter(flat)
        return {slot.name: slot.value(values) for slot in self._slots}

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the shapes and dtypes of the outputs. The function takes the parameters it needs, by name."""
        names = function.__code__.co_varnames[: function.__code__.co_argcount]

        def on_fake_tensors(*flat: Any) -> Any:
            given = self.records(flat)
            return function(*(given[name] for name in names))

        torch.library.register_fake(f"spo_kernels::{self.name}", on_fake_tensors, lib=library)
        return function

    def on_every_device(self, function: Callable[..., Any]) -> None:
        """Register the implementation. Autocast is off inside: the caller has cast already."""

        def on_every_device(*flat: Any) -> Any:
            device = next(argument.device for argument in flat if isinstance(argument, Tensor))
            if not torch.is_autocast_enabled(device.type):
                return function(**self.records(flat))
            with torch.autocast(device.type, enabled=False):
                return function(**self.records(flat))

        library.impl(self.name, on_every_device, "CompositeExplicitAutograd")

    def gradient(self, setup: Callable[..., None], backward: Callable[..., Any], *, of: str) -> Any:
        """Register the gradient, and return an ``autograd.Function`` of it that costs eager calls half the time.

        Args:
            setup: ``(ctx, flat inputs, output)`` saves what backward needs.
            backward: ``(ctx, *upstream gradients)`` returns the gradients of one parameter: a Tensor or None, or a
                tuple of them for a record.
            of: that parameter's name.
        """
        position = [slot.name for slot in self._slots].index(of)
        before, after = sum(self._sizes[:position]), sum(self._sizes[position + 1 :])

        def padded_backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            gradients = backward(ctx, *upstream)
            of_record = gradients if isinstance(gradients, tuple) else (gradients,)
            return (*(None,) * before, *of_record, *(None,) * after)

        qualified = f"spo_kernels::{self.name}"
        torch.library.register_autograd(qualified, padded_backward, setup_context=setup, lib=library)

        def eager_forward(ctx: Any, *flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # past the gradient that is registered with torch
                output = self.packet(*flat)
            setup(ctx, flat, output)
            return output

        functions = {"forward": staticmethod(eager_forward), "backward": staticmethod(padded_backward)}
        return type(self.name, (torch.autograd.Function,), functions)


def op(function: Callable[..., Any]) -> Op:
    """Decorator: an op that this function implements on every device."""
    defined = Op(function)
    defined.on_every_device(function)
    return defined


def backend_op(mutates: str = "") -> Callable[[Callable[..., Any]], Op]:
    """Decorator: an op that backends implement. The function gives the shapes and dtypes of the outputs.

    mutates: name of the parameter that the op writes to.
    """

    def define(fake: Callable[..., Any]) -> Op:
        defined = Op(fake, [mutates] if mutates else [])
        defined.fake(fake)
        return defined

    return define


def refuse_double_backward() -> None:
    """RuntimeError in a backward under ``create_graph``: its gradients would come back as constants."""
    # Grad mode is on in a backward only under create_graph.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("spo_kernels: these gradients cannot be differentiated again (double backward)")


def run_once(ctx: Any, message: str) -> None:
    """RuntimeError in the second backward of a function whose first has overwritten what it saved."""
    if getattr(ctx, "has_run", False):
        raise RuntimeError(f"spo_kernels.{message}")
    ctx.has_run = True


def mark_written(tensor: Tensor) -> None:
    """Count an op's write in the tensor's version: whatever saved the tensor before then raises when it needs it."""
    if not torch.compiler.is_compiling():  # functionalized there: nothing was written
        torch.autograd.graph.increment_version(tensor)
