"""How this package defines its ops: the schema of an op is the signature of a Python function.

A parameter may be a record: a NamedTuple of tensors, numbers and other records. Torch's ops take flat arguments, so
calling an `Op` flattens records, and the functions behind the op get them back. The flat names in the schema are
``parameter_field``. A parameter that is a record may be None; its flat arguments are then all None.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_COMPILED_TRANSFORM = (
    "spo_kernels: torch.compile cannot trace these functions under torch.func transforms or forward-mode AD: call the "
    "transformed function outside of compiled code, or through torch.compiler.disable"
)

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

    def append(self, flat: list[Any], value: Any) -> None:
        """Append the flat arguments of this slot's value."""
        if not self.fields:
            flat.append(value)
        elif value is None:
            flat.extend([None] * self.size)
        else:
            for field, item in zip(self.fields, value, strict=True):
                field.append(flat, item)

    def reader(self, start: int) -> Callable[[Sequence[Any]], Any]:
        """Return a function that builds this slot's value from the flat arguments. The slot begins at index start."""
        if not self.fields:
            return operator.itemgetter(start)
        make, optional, end = self.type, self.optional, start + self.size
        if self.size == len(self.fields):  # no records among them

            def read_plain(flat: Sequence[Any]) -> Any:
                return None if optional and flat[start] is None else make(*flat[start:end])

            return read_plain
        starts = itertools.accumulate((field.size for field in self.fields), initial=start)
        readers = [field.reader(start) for field, start in zip(self.fields, starts, strict=False)]

        def read(flat: Sequence[Any]) -> Any:
            return None if optional and flat[start] is None else make(*[read_field(flat) for read_field in readers])

        return read


def _slot(name: str, annotation: Any) -> _Slot:
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        (annotation,) = (option for option in get_args(annotation) if option is not types.NoneType)
    if not hasattr(annotation, "_fields"):
        return _Slot(name, annotation, optional, ())
    fields = tuple(_slot(*hint) for hint in get_type_hints(annotation, include_extras=True).items())
    if not fields or (optional and fields[0].optional):
        raise TypeError(
            f"{name} must be a record with fields; the first field of an optional record must not be optional"
        )
    return _Slot(name, annotation, optional, fields)


def _returns(annotation: Any) -> str:
    if annotation is types.NoneType:
        return "()"
    if annotation is Tensor:
        return "Tensor"
    return f"({', '.join('Tensor' for _ in get_args(annotation))})"


class Op:
    """An op of ``torch.ops.spo_kernels``, defined by the signature of a function."""

    def __init__(self, signature: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name = signature.__name__
        self.__doc__ = signature.__doc__
        hints = get_type_hints(signature, include_extras=True)
        returns = _returns(hints.pop("return"))
        self._slots = [_slot(*hint) for hint in hints.items()]
        self._sizes = [slot.size for slot in self._slots]
        starts = itertools.accumulate(self._sizes, initial=0)
        self._readers = [(slot.name, slot.reader(start)) for slot, start in zip(self._slots, starts, strict=False)]
        self._implementation: Callable[..., Any] | None = None
        self._gradient: tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]
        self._transformable: Any = None
        arguments = ", ".join(text for slot in self._slots for text in slot.schema(mutates))
        self.schema = f"({arguments}) -> {returns}"
        library.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.packet: Any = getattr(torch.ops.spo_kernels, self.name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the op through torch's dispatcher, with records in place of their fields."""
        flat = self.flat(*arguments, **keywords)
        if self._transformable is not None and is_transforming():
            return self._transformable.apply(*flat)
        return self.packet(*flat)

    def flat(self, *arguments: Any, **keywords: Any) -> list[Any]:
        """The op's arguments: records as their fields."""
        if keywords:
            arguments += tuple(keywords.pop(slot.name) for slot in self._slots[len(arguments) :])
        if len(arguments) != len(self._slots) or keywords:
            raise TypeError(f"{self.name} takes {len(self._slots)} arguments: {', '.join(s.name for s in self._slots)}")
        flat: list[Any] = []
        for argument, slot in zip(arguments, self._slots, strict=True):
            slot.append(flat, argument)
        return flat

    def records(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The arguments by the signature's names, from flat ones."""
        return {name: read(flat) for name, read in self._readers}

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the shapes and dtypes of the outputs. The function takes the parameters it needs, by name."""
        torch.library.register_fake(f"spo_kernels::{self.name}", self._from_flat(function), lib=library)
        return function

    def flops(self, function: Callable[..., int]) -> Callable[..., int]:
        """Decorator: what torch's FlopCounterMode counts. The function takes the parameters it needs, by name."""
        from_flat = self._from_flat(function)
        register_flop_formula(self.packet, get_raw=True)(lambda *flat, out_val: from_flat(*flat))
        return function

    def _from_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]

        def from_flat(*flat: Any) -> Any:
            given = self.records(flat)
            return function(*(given[name] for name in names))

        return from_flat

    def on_every_device(self, function: Callable[..., Any]) -> None:
        """Register the implementation. An op over records runs with autocast off: its caller has cast already."""
        if not any(slot.fields for slot in self._slots):
            self._implementation = function
            library.impl(self.name, function, "CompositeExplicitAutograd")
            return

        def on_every_device(*flat: Any) -> Any:
            device = next(argument.device for argument in flat if isinstance(argument, Tensor))
            if not torch.is_autocast_enabled(device.type):
                return function(**self.records(flat))
            with torch.autocast(device.type, enabled=False):
                return function(**self.records(flat))

        library.impl(self.name, on_every_device, "CompositeExplicitAutograd")

    def on_device(self, dispatch_key: str, function: Callable[..., Any]) -> None:
        """Register a backend's implementation, which takes the parameters by name."""
        library.impl(self.name, lambda *flat: function(**self.records(flat)), dispatch_key)

    def gradient(self, setup: Callable[..., None], backward: Callable[..., Any], *, of: str) -> None:
        """Register the gradient.

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

        self._gradient = (setup, padded_backward)
        torch.library.register_autograd(f"spo_kernels::{self.name}", padded_backward, setup_context=setup, lib=library)

    def transform_with_loops(self, jvp: Callable[..., Any]) -> None:
        """Let torch.func and forward-mode AD take the op. vmap calls it for each of the batch.

        jvp: ``(ctx, *tangents of the flat arguments)`` returns the tangents of the outputs.
        """
        register_vmap(self, vmap_by_loop(self.packet))
        setup, backward = self._gradient

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        functions = {
            "forward": staticmethod(lambda *flat: self.packet(*flat)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "jvp": staticmethod(jvp),
            "generate_vmap_rule": True,
        }
        self._transformable = type(self.name, (torch.autograd.Function,), functions)

    def eager_function(self) -> Any:
        """An ``autograd.Function`` with the registered gradient, which halves the overhead of an eager call."""
        setup, backward = self._gradient

        def below_autograd(*flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # past the gradient that is registered with torch
                return self.packet(*flat)

        implementation = self._implementation or below_autograd

        def forward(ctx: Any, *flat: Any) -> Any:
            output = implementation(*flat)
            setup(ctx, flat, output)
            return output

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
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


def register_vmap(op: Op, rule: Callable[..., Any]) -> None:
    """Register what torch.vmap does with an op.

    rule: ``(info, batch dimensions, *flat arguments)`` -> (outputs, their batch dimensions).
    """
    torch.library.register_vmap(f"spo_kernels::{op.name}", rule, lib=library)


Dims = Sequence[int | None]  # of vmap: the batch dimension of each argument, None for one that has none


def fold(tensor: Tensor | None, dim: int | None, batch: int, at: int = 0) -> Tensor | None:
    """The batch dimension of vmap, moved to `at` and merged with the dimension that stands there."""
    if tensor is None:
        return None
    if dim is None:
        batched = tensor.unsqueeze(at).expand(*tensor.shape[:at], batch, *tensor.shape[at:])
    else:
        batched = tensor.movedim(dim, at)
    return batched.flatten(at, at + 1)


def vmap_by_loop(op: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of vmap that calls the op for each of the batch."""

    def rule(info: Any, dims: Dims, *flat: Any) -> Any:
        results = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(flat, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


_NESTED_FORWARD_MODE = (
    "spo_kernels: forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) cannot be used: take one of the "
    "derivatives in reverse mode (grad, jacrev)"
)


def is_transforming() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work."""
    transforming = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if not transforming:
        return False
    if torch.compiler.is_compiling():  # Dynamo cannot trace a function with a jvp
        raise RuntimeError(_COMPILED_TRANSFORM)
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    if levels.count(torch._C._functorch.TransformType.Jvp) > 1:  # torch takes second tangents of a Function for 0
        raise RuntimeError(_NESTED_FORWARD_MODE)
    return True


def refuse_transforms(option: str) -> None:
    """RuntimeError under a transform, for a call with this option."""
    if is_transforming():
        raise RuntimeError(
            f"spo_kernels: a function with {option} cannot be used under torch.func transforms or forward-mode AD: "
            "leave the option out"
        )


def without_batches(tensor: Tensor) -> Tensor:
    """The values of a tensor with all its batches of vmap, for a check of every element."""
    if is_transforming():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_differentiated_again() -> bool:
    """Whether a backward runs under ``create_graph``."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_double_backward(call: str, instead: str) -> None:
    """RuntimeError in a backward under ``create_graph``: its gradients would come back as constants."""
    if is_differentiated_again():
        raise RuntimeError(
            f"spo_kernels: the gradients of {call} cannot be differentiated again (double backward): {instead}"
        )


def refuse_second_backward(ctx: Any, message: str) -> None:
    """RuntimeError in the second backward of a function whose first backward has overwritten the saved tensors.

    The message begins with a public name; this function puts "spo_kernels." before it.
    """
    if getattr(ctx, "has_run", False):
        raise RuntimeError(f"spo_kernels.{message}")
    ctx.has_run = True


def mark_written(tensor: Tensor) -> None:
    """Count an op's write in the tensor's version: a function that saved the tensor earlier raises in its backward."""
    if not torch.compiler.is_compiling():  # functionalized there: nothing was written
        torch.autograd.graph.increment_version(tensor)
