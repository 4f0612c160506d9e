"""The operators: schemas, shapes (fake kernels) and gradients (autograd), once for every backend.

``torch.ops.spo_kernels.*`` are the row ops beneath the public functions. What they compute, and what each argument
means, is in `spo_kernels.reference`; here is what torch needs to know about them. Logits are ``[N, V]`` or
``[B, T, V]`` with a unit last stride and any other strides; rows are everything but the last dimension.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from spo_kernels import head, sequences, vocabulary
from spo_kernels.reference import accumulate_dtype

library = torch.library.Library("spo_kernels", "DEF")

_BWD_ARGS = "Tensor? labels, Tensor? ref_logits, Tensor? mask, Tensor kl, Tensor stats, int ignore_index"

SCHEMAS = {
    # inplace_backward is read by the gradient formula alone.
    "token_stats_fwd": "(Tensor logits, Tensor? labels, Tensor? ref_logits, Tensor? mask, int ignore_index, "
    "bool inplace_backward) -> (Tensor logps, Tensor kl, Tensor stats)",
    "token_stats_bwd": f"(Tensor? dlogps, Tensor? dkl, Tensor logits, {_BWD_ARGS}) -> Tensor",
    "token_stats_bwd_": f"(Tensor? dlogps, Tensor? dkl, Tensor(a!) logits, {_BWD_ARGS}) -> ()",
    "kl_loss_fwd": "(Tensor logits, Tensor ref_logits, Tensor? row_weight) -> (Tensor loss, Tensor dlogits)",
    "kl_loss_fwd_": "(Tensor(a!) logits, Tensor ref_logits, Tensor? row_weight) -> Tensor",
    "scale_": "(Tensor(a!) tensor, Tensor scale) -> ()",
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"spo_kernels::{name}", lib=library)


def _token_stats_like(
    logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[:-1]
    logps = logits.new_empty(rows if labels is not None else (0,), dtype=dtype)
    kl = logits.new_empty(rows if ref_logits is not None else (0,), dtype=dtype)
    return logps, kl, logits.new_empty((2 if ref_logits is None else 4, *rows), dtype=dtype)


@_fake("token_stats_fwd")
def _(logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _token_stats_like(logits, labels, ref_logits)


@_fake("token_stats_bwd")
def _(dlogps: Tensor | None, dkl: Tensor | None, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("token_stats_bwd_")
def _(dlogps: Tensor | None, dkl: Tensor | None, logits: Tensor, *args: Any) -> None:
    return None


@_fake("kl_loss_fwd")
def _(logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulate_dtype(logits.dtype))
    return loss, torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("kl_loss_fwd_")
def _(logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> Tensor:
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype))


@_fake("scale_")
def _(tensor: Tensor, scale: Tensor) -> None:
    return None


# The forward over shards: logits are this process's columns, labels are global. With the statistics of the whole
# vocabulary known, the gradient of a shard is the row op's own.

library.define(
    "sharded_token_stats_fwd(Tensor logits, Tensor? labels, Tensor? ref_logits, Tensor? mask, int ignore_index, "
    "bool inplace_backward, SymInt vocab_start, SymInt vocab_size, str process_group) "
    "-> (Tensor logps, Tensor kl, Tensor stats)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _sharded_token_stats_fwd(
    logits: Tensor,
    labels: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    vocab_start: int,
    vocab_size: int,
    process_group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape[:-1], logits.shape[-1]
    local = None if labels is None else vocabulary.local_labels(labels, vocab_start, columns, ignore_index)
    part = vocabulary.part_of(logits, local, ref_logits, mask)
    shard = vocabulary.Shard(vocab_start, vocab_size, process_group)
    whole = vocabulary.combine(part, shard, columns, labels=labels, mask=mask)
    if labels is not None:  # after the all-gather, so that labels that differ are an error in every process
        vocabulary.check_labels(labels, vocab_size, ignore_index)
    logps, kl = whole.logps(), whole.kl
    # Ignored and masked rows carry no statistics; report 0.
    if labels is not None:
        logps = torch.where(labels.flatten() == ignore_index, 0, logps).view(rows)
    if ref_logits is not None:
        kl = (kl if mask is None else torch.where(mask.flatten(), kl, 0)).view(rows)
    dtype = accumulate_dtype(logits.dtype)
    return logps.to(dtype), kl.to(dtype), whole.stats.view(whole.stats.shape[0], *rows).to(dtype)


library.impl("sharded_token_stats_fwd", _sharded_token_stats_fwd, "CompositeExplicitAutograd")


@_fake("sharded_token_stats_fwd")
def _(logits: Tensor, labels: Tensor | None, ref_logits: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _token_stats_like(logits, labels, ref_logits)


# Sums of what the row ops gave, the same for every backend. An op because of its gradient: torch.segment_reduce's own
# gives a sequence one thread of a GPU.

library.define("sequence_sums(Tensor values, Tensor? cu_seqlens) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _sequence_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums ``[B]`` of values ``[B, T]``, or ``[N]`` with cu_seqlens ``[B + 1]``, in their dtype."""
    if cu_seqlens is None:
        bounds = sequences.padded_bounds(values)
    else:
        bounds = cu_seqlens.contiguous()
        sequences.check_bounds(bounds, values.shape[0])
    return sequences.sums(values.flatten().double(), bounds).to(values.dtype)


library.impl("sequence_sums", _sequence_sums, "CompositeExplicitAutograd")


@_fake("sequence_sums")
def _(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def register_autograd(name: str, backward: Any, setup_context: Any = None) -> None:
    torch.library.register_autograd(f"spo_kernels::{name}", backward, setup_context=setup_context, lib=library)


def _written(tensor: Tensor) -> None:
    """Count an op's write in the tensor's version, so that whatever saved the tensor raises when it needs it."""
    if not torch.compiler.is_compiling():  # functionalized there: nothing was written
        torch.autograd.graph.increment_version(tensor)


def _refuse_double_backward() -> None:
    # Grad mode is on in a backward only under create_graph. Without this the gradient would come back as a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("spo_kernels: these gradients cannot be differentiated again (double backward)")


def _runs_once(ctx: Any, message: str) -> None:
    """RuntimeError in the second backward of a function whose first has overwritten what it saved."""
    if getattr(ctx, "has_run", False):
        raise RuntimeError(f"spo_kernels.{message}")
    ctx.has_run = True


def _token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ref_logits, mask, ctx.ignore_index, ctx.inplace_backward, *shard = inputs
    ctx.vocab_start = shard[0] if shard else None
    ctx.inputs = len(inputs)
    logps, kl, stats = output
    not_asked = [out for out, source in ((logps, labels), (kl, ref_logits)) if source is None]
    ctx.mark_non_differentiable(stats, *not_asked)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, ref_logits, mask, kl, stats)


def _token_stats_backward(ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dlogps is None and dkl is None:
        return (None,) * ctx.inputs
    _refuse_double_backward()
    if ctx.inplace_backward and not torch.compiler.is_compiling():
        _runs_once(
            ctx,
            "functional: with inplace_backward=True (of kl_loss: overwrite_logits=True) backward can run only once: "
            "the first has replaced the logits by their gradient; leave the option out",
        )
    logits, labels, *rest = ctx.saved_tensors
    ignore_index = ctx.ignore_index
    if ctx.vocab_start is not None and labels is not None:
        labels = vocabulary.local_labels(labels, ctx.vocab_start, logits.shape[-1], ignore_index)
        ignore_index = vocabulary.IGNORED
    # While compiling, memory is the compiler's business: functionalization does not see that a second function saved
    # the same logits (in eager mode the version counter does), and would hand it gradients in their place.
    if ctx.inplace_backward and not torch.compiler.is_compiling():
        dlogits = logits.detach()
        torch.ops.spo_kernels.token_stats_bwd_(dlogps, dkl, dlogits, labels, *rest, ignore_index)
        _written(dlogits)
    else:
        dlogits = torch.ops.spo_kernels.token_stats_bwd(dlogps, dkl, logits, labels, *rest, ignore_index)
    return dlogits, *(None,) * (ctx.inputs - 1)


class TokenStats(torch.autograd.Function):
    """`token_stats_fwd` with its gradient, for eager mode: calls take half the time of those through torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():  # past the op's own registration
            output: tuple[Tensor, Tensor, Tensor] = torch.ops.spo_kernels.token_stats_fwd(*inputs)
        _token_stats_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _token_stats_backward(ctx, *gradients)


def _sequence_sums_setup(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    values, cu_seqlens = inputs
    ctx.shape = values.shape
    ctx.save_for_backward(cu_seqlens)


def _sequence_sums_backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None]:
    (cu_seqlens,) = ctx.saved_tensors
    if cu_seqlens is None:
        return dsums[:, None].expand(ctx.shape), None
    return dsums[sequences.of_rows(cu_seqlens, ctx.shape[0])], None


class SequenceSums(torch.autograd.Function):
    """`sequence_sums` with its gradient, for eager mode, as `TokenStats`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        sums = _sequence_sums(values, cu_seqlens)
        _sequence_sums_setup(ctx, (values, cu_seqlens), sums)
        return sums

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None]:
        return _sequence_sums_backward(ctx, dsums)


def _kl_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # or torch would fill a dlogits-sized tensor with zeros for the output nobody uses
    ctx.save_for_backward(dlogits)


def _kl_loss_backward(ctx: Any, dloss: Tensor, _: Any = None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    _runs_once(
        ctx,
        "kl_loss can run backward only once: its gradient was computed in the forward and scaled in place by the first "
        "backward; use (row_weight * spo_kernels.token_kl(...)).sum()",
    )
    (dlogits,) = ctx.saved_tensors
    torch.ops.spo_kernels.scale_(dlogits, dloss)
    _written(dlogits)
    return dlogits, None, None


class KlLoss(torch.autograd.Function):
    """`kl_loss_fwd` with its gradient, for eager mode, as `TokenStats`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, dlogits = torch.ops.spo_kernels.kl_loss_fwd(*inputs)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _kl_loss_backward(ctx, dloss)


class KlLossOverwrite(torch.autograd.Function):
    """``kl_loss_fwd_`` with its gradient: the unit gradient has replaced the logits when forward returns.

    `Overwritten` comes next. This cannot mark the logits itself: with a second output autograd allows that of no view.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, row_weight: Tensor | None) -> Tensor:
        dlogits = logits.detach()
        loss = torch.ops.spo_kernels.kl_loss_fwd_(dlogits, ref_logits, row_weight)
        _written(dlogits)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _kl_loss_backward(ctx, dloss)


class Overwritten(torch.autograd.Function):
    """Marks logits that `KlLossOverwrite` has overwritten: an error where autograd asks for a gradient of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.is_view = logits._is_view()
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        # Where the logits are a part of a tensor, a use of its other parts sends zeros here. On a GPU it pays a sync.
        if not ctx.is_view or dlogits.any():
            raise RuntimeError(
                "spo_kernels.kl_loss with overwrite_logits=True has replaced the logits by their gradient, but "
                "something used them afterwards; leave the option out"
            )
        return dlogits  # zeros; for None autograd would drop the gradient of the other parts


def overwriting_kl_loss(logits: Tensor, rows: Tensor, ref_rows: Tensor, row_weight: Tensor | None) -> Tensor:
    """`KlLossOverwrite` of logits as rows, after which autograd knows that the logits have been overwritten."""
    loss: Tensor = KlLossOverwrite.apply(rows, ref_rows, row_weight)
    # Marking counts as a write, which would spoil the gradient that has just been saved; nothing is written.
    with torch.autograd._unsafe_preserve_version_counter(logits):
        Overwritten.apply(logits)
    return loss


register_autograd("token_stats_fwd", _token_stats_backward, _token_stats_setup)
register_autograd("sharded_token_stats_fwd", _token_stats_backward, _token_stats_setup)
register_autograd("sequence_sums", _sequence_sums_backward, _sequence_sums_setup)
register_autograd("kl_loss_fwd", _kl_loss_backward, _kl_loss_setup)


# The head: hidden states and a weight in place of logits. These ops are tile loops over the ops above (`head`), the
# same for every device. Rows are ``[N]``; a head is hidden ``[N, H]``, weight ``[V, H]``, bias ``[V]`` or None.

HEAD_ARGS = "Tensor hidden, Tensor weight, Tensor? bias"
_REF_HEAD_ARGS = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"
# Weight and bias are the columns from vocab_start on of a vocabulary of vocab_size; all of it without a process group.
OPTION_ARGS = (
    "float temperature, float? softcap, float logit_scale, SymInt? chunk_size, SymInt vocab_start, "
    "SymInt vocab_size, str? process_group"
)
_OPTIONS = OPTION_ARGS.count(",") + 1
NEEDS_ARGS = "bool need_hidden, bool need_weight, bool need_bias"
# Of a forward that computes the gradients for an upstream gradient of 1, and keeps them in gradient_dtype.
UNIT_GRADIENT_ARGS = f"ScalarType gradient_dtype, {NEEDS_ARGS}"

HEAD_SCHEMAS = {
    # With uniform, the KL is that to the uniform distribution over the vocabulary.
    "linear_token_stats_fwd": f"({HEAD_ARGS}, Tensor? labels, {_REF_HEAD_ARGS}, Tensor? mask, int ignore_index, "
    f"bool uniform, {OPTION_ARGS}) -> (Tensor logps, Tensor kl, Tensor stats)",
    "linear_token_stats_bwd": f"(Tensor? dlogps, Tensor? dkl, {HEAD_ARGS}, Tensor? labels, {_REF_HEAD_ARGS}, "
    f"Tensor? mask, Tensor kl, Tensor stats, int ignore_index, bool uniform, {NEEDS_ARGS}, {OPTION_ARGS}) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    "linear_kl_loss_fwd": f"({HEAD_ARGS}, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor row_weight, "
    f"{UNIT_GRADIENT_ARGS}, {OPTION_ARGS}) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
}

for _name, _schema in HEAD_SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def head_op(name: str) -> Any:
    """Decorator: what an op over a head does on any device, outside autocast, whose casts its caller has made."""

    def register(function: Any) -> Any:
        def on_any_device(*args: Any) -> Any:
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            with torch.autocast(device.type, enabled=False):
                return function(*args)

        library.impl(name, on_any_device, "CompositeExplicitAutograd")
        return function

    return register


def shard_of(vocab_start: int, vocab_size: int, process_group: str | None) -> vocabulary.Shard | None:
    return None if process_group is None else vocabulary.Shard(vocab_start, vocab_size, process_group)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake dhidden, dweight, dbias: ``[0]`` where not wanted.

    args are the op's, whose last are `NEEDS_ARGS` or `UNIT_GRADIENT_ARGS`, and `OPTION_ARGS`.
    """
    before, *needs = args[-_OPTIONS - 4 : -_OPTIONS]
    dtype = before if isinstance(before, torch.dtype) else hidden.dtype
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dhidden, dweight, dbias = (
        hidden.new_empty(shape if want else (0,), dtype=dtype) for shape, want in zip(shapes, wanted, strict=True)
    )
    return dhidden, dweight, dbias


def _kept(labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    return mask if labels is None else labels != ignore_index


def _ref_head(ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None) -> head.Head | None:
    return None if ref_hidden is None or ref_weight is None else head.Head(ref_hidden, ref_weight, ref_bias)


@head_op("linear_token_stats_fwd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    uniform: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    vocab_start: int,
    vocab_size: int,
    process_group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shard = shard_of(vocab_start, vocab_size, process_group)
    if shard is not None and (labels is not None or mask is not None):
        shard.check_same(labels=labels, mask=mask)
    if labels is not None:
        vocabulary.check_labels(labels, vocab_size, ignore_index)
    return head.token_stats_fwd(
        head.Head(hidden, weight, bias, shard),
        labels,
        _ref_head(ref_hidden, ref_weight, ref_bias),
        _kept(labels, mask, ignore_index),
        uniform,
        head.LogitOptions(temperature, softcap, logit_scale),
        chunk_size,
    )


@_fake("linear_token_stats_fwd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    uniform: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
    with_kl = uniform or ref_hidden is not None
    logps = hidden.new_empty(rows if labels is not None else 0, dtype=dtype)
    kl = hidden.new_empty(rows if with_kl else 0, dtype=dtype)
    return logps, kl, hidden.new_empty((4 if with_kl else 2, rows), dtype=dtype)


@head_op("linear_token_stats_bwd")
def _(
    dlogps: Tensor | None,
    dkl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    stats: Tensor,
    ignore_index: int,
    uniform: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    vocab_start: int,
    vocab_size: int,
    process_group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # A row with an upstream gradient of 0 is not read: its hidden states may be NaN.
    read = functools.reduce(operator.or_, (upstream != 0 for upstream in (dlogps, dkl) if upstream is not None))
    kept = _kept(labels, mask, ignore_index)
    return head.token_stats_bwd(
        dlogps,
        dkl,
        head.Head(hidden, weight, bias, shard_of(vocab_start, vocab_size, process_group)),
        labels,
        _ref_head(ref_hidden, ref_weight, ref_bias),
        read if kept is None else read & kept,
        kl,
        stats,
        uniform,
        head.Needs(need_hidden, need_weight, need_bias),
        head.LogitOptions(temperature, softcap, logit_scale),
        chunk_size,
    )


@_fake("linear_token_stats_bwd")
def _(
    dlogps: Tensor | None, dkl: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, args)


@head_op("linear_kl_loss_fwd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    row_weight: Tensor,
    gradient_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    vocab_start: int,
    vocab_size: int,
    process_group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shard = shard_of(vocab_start, vocab_size, process_group)
    if shard is not None:
        shard.check_same(row_weight=row_weight)  # 0 where masked
    return head.kl_loss_fwd(
        head.Head(hidden, weight, bias, shard),
        head.Head(ref_hidden, ref_weight, ref_bias),
        row_weight,
        gradient_dtype,
        head.Needs(need_hidden, need_weight, need_bias),
        head.LogitOptions(temperature, softcap, logit_scale),
        chunk_size,
    )


@_fake("linear_kl_loss_fwd")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=accumulate_dtype(hidden.dtype))
    return loss, *empty_gradients(hidden, weight, bias, args)


def _linear_token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:8], inputs[10:]
    ctx.ignore_index, ctx.uniform = inputs[8:10]
    logps, kl, stats = output
    labels, ref_hidden = inputs[3:5]
    not_asked = [logps] if labels is None else []
    not_asked += [kl] if ref_hidden is None and not ctx.uniform else []
    ctx.mark_non_differentiable(stats, *not_asked)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, kl, stats)


def _linear_token_stats_backward(
    ctx: Any, dlogps: Tensor | None, dkl: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    others = (None,) * (7 + len(ctx.options))
    if dlogps is None and dkl is None:
        return (None, None, None, *others)
    _refuse_double_backward()
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.spo_kernels.linear_token_stats_bwd(
        dlogps,
        dkl,
        *ctx.saved_tensors,
        ctx.ignore_index,
        ctx.uniform,
        *needs,
        *ctx.options,
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *others)


def _setup_unit_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For an op ``(hidden, weight, bias, ...) -> (loss, ..., dhidden, dweight, dbias)``."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(*output[-3:])


def _scale_unit_gradients(ctx: Any, dloss: Tensor | None, message: str) -> tuple[Tensor | None, ...]:
    """The gradients that the forward computed, times the upstream scalar; scaled in place, so this runs only once."""
    if dloss is None:
        return (None,) * ctx.inputs
    _refuse_double_backward()
    _runs_once(ctx, message)
    gradients: list[Tensor | None] = []
    for gradient, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True):
        if need:
            rows = gradient if gradient.dim() > 1 else gradient[None]
            torch.ops.spo_kernels.scale_(rows, dloss)
            _written(gradient)
        gradients.append(gradient.to(ctx.dtype) if need else None)
    return (*gradients, *(None,) * (ctx.inputs - 3))


def unit_gradients_of(message: str) -> tuple[Any, Any]:
    """(backward, setup_context) for an op whose last outputs are unit gradients; a second backward raises message."""

    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _scale_unit_gradients(ctx, dloss, message)

    return backward, _setup_unit_gradients


register_autograd("linear_token_stats_fwd", _linear_token_stats_backward, _linear_token_stats_setup)
register_autograd(
    "linear_kl_loss_fwd",
    *unit_gradients_of(
        "linear_kl_loss can run backward only once: its gradients were computed in the forward and scaled in place by "
        "the first backward; use (row_weight * spo_kernels.linear_token_kl(...)).sum(), or in LinearSPOLoss route "
        '"recompute"'
    ),
)
