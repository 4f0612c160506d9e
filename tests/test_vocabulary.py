"""A vocabulary split over processes: every function gives the same as for the whole vocabulary in one process."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from processes import Processes
from torch import Tensor
from torch.distributed import ProcessGroup

from spo_kernels import (
    LinearSPOLoss,
    SPOLoss,
    kl_loss,
    linear_kl_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_logps,
    precision,
    sequence_logps,
    token_kl,
    token_logps,
    token_logps_kl,
)
from spo_kernels.divergences import DIVERGENCES
from spo_kernels.linear import tiles
from spo_kernels.shards import digest

V, H = 37, 8
# Uneven, because V is prime; one shard of a single column; not in the order of size. Even shards have their own test.
SHARDS = [(30, 7), (10, 1, 22, 4)]
IGNORE = -100
WORLD = pytest.mark.parametrize("shards", SHARDS, ids=["2", "4"])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    pool = Processes(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(tensor: Tensor, group: ProcessGroup | None, shards: tuple[int, ...], dim: int) -> Tensor:
    """This process's columns, or all without a group, as a leaf that requires grad."""
    part = tensor if group is None else tensor.split(shards, dim)[group.rank()]
    return part.detach().clone().requires_grad_()


def split_options(group: ProcessGroup | None, shards: tuple[int, ...]) -> dict[str, Any]:
    return {} if group is None else {"process_group": group, "vocab_shards": shards}


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-10 if dtype == torch.float64 else 2e-6)


def same_everywhere(results: list[Tensor]) -> Tensor:
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)
    return results[0]


def row_inputs(dtype: torch.dtype, rows: str) -> dict[str, Tensor]:
    """[2, 6, V]; every fourth row ignored, every third masked."""
    logits, ref_logits = 3 * noise(2, 6, V, seed=0), 3 * noise(2, 6, V, seed=1)
    if rows == "far":
        logits += 1e4 * torch.arange(12).view(2, 6, 1)
    if rows == "empty":  # of 4 shards the first has no probability, and in one sequence only the last has any
        logits[..., :10] = -torch.inf
        logits[0, :, :33] = -torch.inf
    labels = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(2))
    labels.view(-1)[::4] = IGNORE
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask.view(-1)[1::3] = False
    return {"logits": logits.to(dtype), "ref_logits": ref_logits.to(dtype), "labels": labels, "mask": mask}


Function = Callable[..., tuple[Tensor, ...]]
ROW_FUNCTIONS: dict[str, Function] = {
    "token_logps": lambda z, r, labels, mask, **kw: (token_logps(z, labels, **kw),),
    "inplace": lambda z, r, labels, mask, **kw: (token_logps(z * 1, labels, inplace_backward=True, **kw),),
    "sequence_logps": lambda z, r, labels, mask, **kw: (sequence_logps(z, labels, average=True, **kw),),
    "packed": lambda z, r, labels, mask, **kw: (
        sequence_logps(z.flatten(0, 1), labels.flatten(), cu_seqlens=torch.tensor([0, 5, 5, 12]), **kw),
    ),
    "entropy and lse": lambda z, r, labels, mask, **kw: token_logps(
        z, labels, return_entropy=True, return_lse=True, **kw
    ),
    "token_kl": lambda z, r, labels, mask, **kw: (token_kl(z, r, mask, **kw),),
    "token_logps_kl": lambda z, r, labels, mask, **kw: token_logps_kl(z, labels, r, mask, **kw),
    "kl_loss": lambda z, r, labels, mask, **kw: (
        kl_loss(
            z * 1,
            r,
            mask,
            row_weight=torch.linspace(0, 2, mask.numel(), dtype=z.dtype).view(mask.shape),
            overwrite_logits=True,
            **kw,
        ),
    ),
    "SPOLoss": lambda z, r, labels, mask, **kw: (
        SPOLoss(0.1, 0.2, 0.05, **kw)(z, labels, kl_logits=z, kl_ref_logits=r, kl_mask=mask)[0],
    ),
}


def padded_like(shards: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """The shards of a reference with this many columns: the last has more padding, or less."""
    return *shards[:-1], columns - sum(shards[:-1])


def rows_result(
    group: ProcessGroup | None,
    shards: tuple[int, ...],
    name: str,
    inputs: dict[str, Tensor],
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """(outputs, gradient of this process's logits), with an upstream gradient that differs from row to row."""
    logits = own(inputs["logits"], group, shards, -1)
    ref_logits = inputs["ref_logits"]
    ref_logits = own(ref_logits, group, padded_like(shards, ref_logits.shape[-1]), -1).detach()
    given = {**split_options(group, shards), **(options or {})}
    outputs = ROW_FUNCTIONS[name](logits, ref_logits, inputs["labels"], inputs["mask"], **given)
    flat = torch.cat([out.flatten() for out in outputs])
    (gradient,) = torch.autograd.grad(flat @ torch.linspace(-1, 2, flat.numel(), dtype=flat.dtype), logits)
    return flat.detach(), gradient


@WORLD
@pytest.mark.parametrize("name", ROW_FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float64, "noise"),
        (torch.float64, "far"),
        (torch.float64, "empty"),
        (torch.float32, "noise"),
        (torch.bfloat16, "noise"),
    ],
    ids=["float64", "far", "empty", "float32", "bfloat16"],
)
def test_functions_of_logits(
    processes: Processes, dtype: torch.dtype, rows: str, name: str, shards: tuple[int, ...]
) -> None:
    inputs = row_inputs(dtype, rows)
    if rows == "empty":  # only labels with probability: a log-prob of -inf would make the loss infinite
        inputs["labels"] = inputs["labels"].where(inputs["labels"] == IGNORE, 33 + inputs["labels"] % 4)
    expected, gradient = rows_result(None, shards, name, inputs)
    results = processes.run(len(shards), rows_result, shards, name, inputs)
    near(same_everywhere([out for out, _ in results]), expected, torch.float32 if dtype == torch.bfloat16 else dtype)
    near(torch.cat([part for _, part in results], -1), gradient, dtype)


# The vocabulary ends before the last process's columns do, and the policy has more padding than the reference.
VOCAB_SIZE, REF_COLUMNS = V - 2, V - 1
REF_OPTIONS = {"ref_temperature": 0.8, "ref_softcap": float("inf"), "ref_logit_scale": -0.4}


MODULES = ("SPOLoss", "recompute", "recompute_free", "long_pairs")


def each_with_divergences(names: Iterable[str]) -> list[tuple[str, str]]:
    with_reference = [name for name in names if "kl" in name or name in MODULES]
    return [(name, "kl") for name in names] + [
        (name, other) for name in with_reference for other in ("reverse_kl", "jsd")
    ]


def every_option(name: str, divergence: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """Every option that a function takes; modules and packed rows take a number as the temperature."""
    temperature = torch.linspace(0.5, 2, rows[0] * rows[1]).view(rows)
    by_number = name == "packed" or name in MODULES
    with_reference = "kl" in name or name in MODULES
    return {
        **({} if divergence == "kl" else {"divergence": divergence}),
        **({"mixture": 0.3} if divergence == "jsd" else {}),
        "temperature": 1.3 if by_number else temperature,
        "softcap": 3.0,
        "logit_scale": 0.6,
        "vocab_size": VOCAB_SIZE,
        **(REF_OPTIONS if with_reference else {}),
    }


@WORLD
@pytest.mark.parametrize(("name", "divergence"), each_with_divergences(ROW_FUNCTIONS))
def test_options_of_functions_of_logits(
    processes: Processes, name: str, divergence: str, shards: tuple[int, ...]
) -> None:
    """Every option at once, and NaN in the padding."""
    inputs = row_inputs(torch.float64, "noise")
    inputs["labels"] = inputs["labels"].clamp(max=VOCAB_SIZE - 1)
    for key in ("logits", "ref_logits"):
        inputs[key][..., VOCAB_SIZE:] = torch.nan
    inputs["ref_logits"] = inputs["ref_logits"][..., :REF_COLUMNS]
    options = every_option(name, divergence, (2, 6))
    expected, gradient = rows_result(None, shards, name, inputs, options)
    assert expected.isfinite().all()
    assert not gradient[..., VOCAB_SIZE:].any()
    results = processes.run(len(shards), rows_result, shards, name, inputs, options)
    near(same_everywhere([out for out, _ in results]), expected)
    near(torch.cat([part for _, part in results], -1), gradient)


def equal_logits(group: ProcessGroup, shards: tuple[int, ...], divergence: str) -> Tensor:
    logits = own(noise(5, V, seed=3, dtype=torch.float32), group, shards, -1)
    options = {"process_group": group, "vocab_shards": shards, "divergence": divergence}
    return token_kl(logits, logits.detach(), **options).detach()


@WORLD
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_a_divergence_of_exactly_zero(
    processes: Processes, divergence: str, shards: tuple[int, ...]
) -> None:
    for kl in processes.run(len(shards), equal_logits, shards, divergence):
        assert kl.count_nonzero() == 0


def even_shards(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    logits, labels = noise(3, 36, seed=4), torch.tensor([0, 35, 17])
    return token_logps(own(logits, group, (36 // group.size(),) * group.size(), -1), labels, process_group=group), (
        token_logps(logits, labels)
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_even_shards_need_no_sizes(processes: Processes, size: int) -> None:
    for sharded, whole in processes.run(size, even_shards):
        near(sharded.detach(), whole)


def ignore_index_is_a_column(group: ProcessGroup, shards: tuple[int, ...]) -> Tensor:
    """Label 0 is ignored. Label 10 is not, though with 4 shards it is column 0 of the second shard."""
    logits = own(noise(3, V, seed=5), group, shards, -1)
    labels = torch.tensor([0, 10, 31])
    out = token_logps(logits, labels, ignore_index=0, **split_options(group, shards))
    out.sum().backward()
    assert logits.grad is not None and logits.grad[0].count_nonzero() == 0
    return out.detach()


@WORLD
def test_an_ignore_index_that_is_a_column(processes: Processes, shards: tuple[int, ...]) -> None:
    expected = token_logps(noise(3, V, seed=5), torch.tensor([0, 10, 31]), ignore_index=0)
    near(same_everywhere(processes.run(len(shards), ignore_index_is_a_column, shards)), expected)


def compiled_rows(group: ProcessGroup, shards: tuple[int, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    logits = own(inputs["logits"], group, shards, -1)
    ref_logits = own(inputs["ref_logits"], group, shards, -1).detach()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(z: Tensor) -> Tensor:
        logps, kl = token_logps_kl(
            z, inputs["labels"], ref_logits, inputs["mask"], process_group=group, vocab_shards=shards
        )
        return torch.cat([logps.flatten(), kl.flatten()])

    out = function(logits)
    (gradient,) = torch.autograd.grad(out @ torch.linspace(-1, 2, out.numel(), dtype=out.dtype), logits)
    return out.detach(), gradient


@WORLD
def test_compile(processes: Processes, shards: tuple[int, ...]) -> None:
    inputs = row_inputs(torch.float64, "noise")
    expected = rows_result(None, shards, "token_logps_kl", inputs)
    results = processes.run(len(shards), compiled_rows, shards, inputs)
    near(same_everywhere([out for out, _ in results]), expected[0])
    near(torch.cat([part for _, part in results], -1), expected[1])


TILES = tiles.TILE_SIZES["cpu"]._replace(
    rows=5, bytes=1, least_columns=10, column_multiple=4, wide_bytes=2**11, least_wide_rows=12
)
OPTIONS = {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.6}


def head_inputs(dtype: torch.dtype, rows: tuple[int, ...] = (4, 6)) -> dict[str, Tensor]:
    labels = torch.randint(0, V, rows, generator=torch.Generator().manual_seed(6))
    labels.view(-1)[::4] = IGNORE
    mask = torch.ones(rows, dtype=torch.bool)
    mask.view(-1)[1::3] = False
    return {
        "hidden": noise(*rows, H, seed=7, dtype=dtype),
        "weight": noise(V, H, seed=8, dtype=dtype),
        "bias": noise(V, seed=9, dtype=dtype),
        "ref_hidden": noise(*rows, H + 3, seed=10, dtype=dtype),
        "ref_weight": noise(V, H + 3, seed=11, dtype=dtype),
        "ref_bias": noise(V, seed=12, dtype=dtype),
        "labels": labels,
        "mask": mask,
    }


def spo_objective(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    loss = LinearSPOLoss(0.1, 0.3, nll_weight=0.2, **{**OPTIONS, **options})
    given = {f"kl_{name}": x[name] for name in ("hidden", "mask")}
    given |= {f"kl_{name}": x[name] for name in ("ref_hidden", "ref_weight", "ref_bias")}
    objective, metrics = loss(x["hidden"], x["weight"], x["labels"], x["bias"], **given)
    return objective, metrics.chosen_logps


def kl_arguments(x: dict[str, Tensor]) -> list[Tensor]:
    return [x[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight", "mask", "bias", "ref_bias")]


HEAD_FUNCTIONS: dict[str, Function] = {
    "linear_token_logps": lambda x, **kw: linear_token_logps(
        x["hidden"], x["weight"], x["labels"], x["bias"], return_entropy=True, **{**OPTIONS, **kw}
    ),
    "chunks": lambda x, **kw: (
        linear_token_logps(x["hidden"], x["weight"], x["labels"], x["bias"], chunk_size=5, **kw),
    ),
    "linear_sequence_logps": lambda x, **kw: (
        linear_sequence_logps(x["hidden"], x["weight"], x["labels"], average=True, **kw),
    ),
    "linear_token_kl": lambda x, **kw: (linear_token_kl(*kl_arguments(x), **{**OPTIONS, **kw}),),
    "linear_kl_loss": lambda x, **kw: (linear_kl_loss(*kl_arguments(x), **{**OPTIONS, **kw}),),
    "recompute": lambda x, **kw: spo_objective(x, route="recompute", **kw),
    "recompute_free": lambda x, **kw: spo_objective(x, route="recompute_free", **kw),
    "long_pairs": lambda x, **kw: spo_objective(x, chunk_size=7, **kw),
}


def head_result(
    group: ProcessGroup | None,
    shards: tuple[int, ...],
    name: str,
    inputs: dict[str, Tensor],
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, ...]:
    """(outputs, gradient of hidden, of this process's weight, of its bias or 0 if the function takes none)."""
    with pytest.MonkeyPatch.context() as patch:
        # Tiles so small that there are several, with other sizes in every process.
        patch.setitem(tiles.TILE_SIZES, "cpu", TILES)
        x = dict(inputs)
        x["hidden"] = inputs["hidden"].detach().clone().requires_grad_()
        for key in ("weight", "bias", "ref_weight", "ref_bias"):
            x[key] = own(inputs[key], group, padded_like(shards, inputs[key].shape[0]), 0)
        x["ref_weight"], x["ref_bias"] = x["ref_weight"].detach(), x["ref_bias"].detach()
        outputs = HEAD_FUNCTIONS[name](x, **{**split_options(group, shards), **(options or {})})
        flat = torch.cat([out.flatten() for out in outputs])
        upstream = torch.linspace(-1, 2, flat.numel(), dtype=flat.dtype)
        leaves = [x["hidden"], x["weight"], x["bias"]]
        gradients = torch.autograd.grad(flat @ upstream, leaves, allow_unused=True, materialize_grads=True)
    return flat.detach(), *gradients


@WORLD
@pytest.mark.parametrize("name", HEAD_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_functions_of_hidden_states(
    processes: Processes, dtype: torch.dtype, name: str, shards: tuple[int, ...]
) -> None:
    inputs = head_inputs(dtype)
    expected = head_result(None, shards, name, inputs)
    results = processes.run(len(shards), head_result, shards, name, inputs)
    by_kind = list(zip(*results, strict=True))
    scale = max(float(gradient.abs().max()) for gradient in expected[1:])
    for want, got in zip(
        expected[:2], by_kind[:2], strict=True
    ):  # outputs and the gradient of hidden, whole everywhere
        near(same_everywhere(list(got)) / scale, want / scale, dtype)
    for want, got in zip(expected[2:], by_kind[2:], strict=True):
        near(torch.cat(got) / scale, want / scale, dtype)


@WORLD
@pytest.mark.parametrize(("name", "divergence"), each_with_divergences(HEAD_FUNCTIONS))
def test_options_of_functions_of_hidden_states(
    processes: Processes, name: str, divergence: str, shards: tuple[int, ...]
) -> None:
    """Every option at once, and NaN in the padding of weight and bias."""
    inputs = head_inputs(torch.float64)
    inputs["labels"] = inputs["labels"].clamp(max=VOCAB_SIZE - 1)
    for key in ("weight", "bias", "ref_weight", "ref_bias"):
        inputs[key][VOCAB_SIZE:] = torch.nan
    inputs["ref_weight"], inputs["ref_bias"] = inputs["ref_weight"][:REF_COLUMNS], inputs["ref_bias"][:REF_COLUMNS]
    options = every_option(name, divergence, (4, 6))
    expected = head_result(None, shards, name, inputs, options)
    assert expected[0].isfinite().all()
    assert not expected[2][VOCAB_SIZE:].any()
    assert not expected[3][VOCAB_SIZE:].any()
    results = list(zip(*processes.run(len(shards), head_result, shards, name, inputs, options), strict=True))
    for want, got in zip(expected[:2], results[:2], strict=True):
        near(same_everywhere(list(got)), want)
    for want, got in zip(expected[2:], results[2:], strict=True):
        near(torch.cat(got), want)


def wide_forward(group: ProcessGroup | None, shards: tuple[int, ...], inputs: dict[str, Tensor]) -> Tensor:
    """Tiles of whole rows, as on a GPU. The rows that fit a tile depend on the columns, which differ by process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE_SIZES, "cpu", TILES._replace(least_forward_rows=1, bytes=60 * 8))
        weight = own(inputs["weight"], group, shards, 0)
        return linear_token_logps(inputs["hidden"], weight, inputs["labels"], **split_options(group, shards)).detach()


@WORLD
def test_processes_take_the_same_rows_at_a_time(processes: Processes, shards: tuple[int, ...]) -> None:
    inputs = head_inputs(torch.float64)
    got = processes.run(len(shards), wide_forward, shards, inputs)
    near(same_everywhere(got), wide_forward(None, shards, inputs))


def half_gradient_of_hidden(group: ProcessGroup | None, shards: tuple[int, ...], inputs: dict[str, Tensor]) -> Tensor:
    hidden = inputs["hidden"].detach().clone().requires_grad_()
    weight = own(inputs["weight"], group, shards, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "native_products", lambda device_type, dtype: False)
        linear_token_logps(hidden, weight, inputs["labels"], **split_options(group, shards)).sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def test_the_gradient_of_half_precision_hidden_states_is_rounded_once(processes: Processes) -> None:
    """The gradients of two processes cancel but for 1/64. Rounding each before the sum would be off by 64 * 2**-9."""
    inputs = head_inputs(torch.bfloat16)
    inputs["weight"] = 64 + inputs["weight"]
    truth = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = half_gradient_of_hidden(None, SHARDS[0], truth)
    (ours, again) = processes.run(2, half_gradient_of_hidden, SHARDS[0], inputs)
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-3)


NO_SAMPLE_IS_AN_ERROR = ("SPOLoss", "recompute", "recompute_free", "long_pairs")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in (*ROW_FUNCTIONS, *HEAD_FUNCTIONS)
        for shape in ((0, 6), (2, 0))
        if name != "packed" and (shape[0] or name not in NO_SAMPLE_IS_AN_ERROR)
    ],
    ids=str,
)
def test_no_rows(processes: Processes, name: str, shape: tuple[int, int]) -> None:
    """No sequence, or only sequences without rows."""
    rows = name in ROW_FUNCTIONS
    inputs = row_inputs(torch.float64, "noise") if rows else head_inputs(torch.float64)
    per_row = ("logits", "ref_logits", "labels", "mask", "hidden", "ref_hidden")
    inputs = {key: x[: shape[0], : shape[1]] if key in per_row else x for key, x in inputs.items()}
    function: Callable[..., tuple[Tensor, ...]] = rows_result if rows else head_result
    expected = function(None, SHARDS[0], name, inputs)
    for out, *gradients in processes.run(2, function, SHARDS[0], name, inputs):
        near(out, expected[0])
        assert not any(gradient.any() for gradient in gradients)


def refused(group: ProcessGroup, shards: tuple[int, ...], held: tuple[int, ...] | None, label: int, name: str) -> Any:
    columns = shards[group.rank()]
    labels = torch.full((3,), label)
    options = {"process_group": group, "vocab_shards": held}
    if name == "logits":
        return token_logps(torch.zeros(3, columns), labels, **options)
    return linear_token_logps(torch.zeros(3, H), torch.zeros(columns, H), labels, **options)


@pytest.mark.parametrize("name", ["logits", "head"])
@pytest.mark.parametrize(
    ("shards", "held", "label", "message"),
    [
        ((30, 7), None, 0, r"the shards of process_group must be \[0, (60|14)\) .*\[0, 30\), \[7, 14\) by rank"),
        ((10, 1), (10, 1, 22, 4), 0, r"vocab_shards must have one entry for each of 2 processes, got \[10, 1, 22, 4\]"),
        ((30, 7), (7, 30), 0, r"vocab_shards must have the (30|7) columns of this process as entry (0|1)"),
        ((30, 7), (30, 7), 37, r"labels must be in \[0, 37\) or ignore_index -100, got 37"),
        ((30, 7), (30, 7), -1, r"labels must be in \[0, 37\) or ignore_index -100, got -1"),
    ],
    ids=["uneven", "another size", "another order", "label too large", "negative label"],
)
def test_bad_shards_are_named_in_every_process(
    processes: Processes, shards: tuple[int, ...], held: tuple[int, ...] | None, label: int, message: str, name: str
) -> None:
    for error in processes.run(len(shards), refused, shards, held, label, name):
        assert isinstance(error, RuntimeError if "label" in message else ValueError), error
        with pytest.raises(type(error), match=message):
            raise error


def transformed(group: ProcessGroup, name: str, transform: str) -> Any:
    labels, options = torch.zeros(3, dtype=torch.int64), {"process_group": group}
    z, weight = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, H, dtype=torch.float64)
    call, x = {
        "logits": (lambda z: token_logps(z, labels, **options), z),
        "head": (lambda h: linear_token_logps(h, weight, labels, **options), torch.zeros(3, H, dtype=torch.float64)),
        "module": (lambda z: SPOLoss(**options)(z.expand(2, -1, -1), labels.expand(2, -1))[0], z),
    }[name]
    return {
        "grad": lambda: torch.func.grad(lambda x: call(x).sum())(x),
        "vmap": lambda: torch.vmap(call)(x.expand(2, *x.shape)),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
    }[transform]()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("name", ["logits", "head", "module"])
def test_transforms_are_refused_in_every_process(processes: Processes, name: str, transform: str) -> None:
    for error in processes.run(2, transformed, name, transform):
        with pytest.raises(
            RuntimeError, match=r"process_group cannot be used under torch\.func .* leave the option out"
        ):
            raise error


def of_vocab_size(group: ProcessGroup, shards: tuple[int, ...], vocab_size: int, label: int, name: str) -> Any:
    """A call with columns of these numbers; one number for all: every process has so many."""
    columns = shards[group.rank()] if len(shards) > 1 else shards[0]
    options = {"process_group": group, "vocab_size": vocab_size}
    options["vocab_shards"] = shards if len(shards) > 1 else None
    labels = torch.full((3,), label)
    z, head = torch.zeros(3, columns), (torch.zeros(3, H), torch.zeros(columns, H))
    return {
        "token_logps": lambda: token_logps(z, labels, **options),
        "token_kl": lambda: token_kl(z, z, **options),
        "SPOLoss": lambda: SPOLoss(**options)(z.expand(2, -1, -1), labels.expand(2, -1)),
        "linear_token_logps": lambda: linear_token_logps(*head, labels, **options),
        "linear_kl_loss": lambda: linear_kl_loss(*head, *head, **options),
    }[name]()


@pytest.mark.parametrize("name", ["token_logps", "token_kl", "SPOLoss", "linear_token_logps", "linear_kl_loss"])
@pytest.mark.parametrize(
    ("shards", "vocab_size"),
    [((30,), 30), ((30, 7), 38), ((30, 7), 30), ((30, 7), 7)],
    ids=["whole vocabulary in each", "too large", "no column in the last", "too small"],
)
def test_shards_must_add_up_to_the_vocab_size(
    processes: Processes, shards: tuple[int, ...], vocab_size: int, name: str
) -> None:
    held = list(shards) if len(shards) > 1 else [30, 30]
    message = (
        f"vocab_size must end in the last of the shards {held}, got {vocab_size}; where every process has the whole"
    )
    for error in processes.run(2, of_vocab_size, shards, vocab_size, 0, name):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=re.escape(message)):
            raise error


@pytest.mark.parametrize("name", ["token_logps", "SPOLoss", "linear_token_logps"])
@pytest.mark.parametrize("label", [35, 36])
def test_labels_in_the_padding_are_errors(processes: Processes, label: int, name: str) -> None:
    for error in processes.run(2, of_vocab_size, SHARDS[0], 35, label, name):
        assert isinstance(error, RuntimeError), error
        with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 35\) or ignore_index -100, got {label}\b"):
            raise error


def differ(tensor: Tensor, group: ProcessGroup, kind: str) -> Tensor:
    """The tensor, with a change in the last process."""
    other = tensor.clone()
    flat = other.view(-1)
    if kind == "value":
        flat[5] = ~flat[5] if tensor.dtype == torch.bool else flat[5] / 2 if tensor.is_floating_point() else flat[5] + 1
    elif kind == "order":  # swaps two unequal elements
        at = next(i for i in range(1, flat.numel()) if flat[i] != flat[0])
        flat[[0, at]] = flat[[at, 0]]
    elif kind == "ignored":
        flat[1] = IGNORE
    elif kind == "illegal":
        flat[1] = 10**12
    return other if group.rank() == group.size() - 1 else tensor


def given_differently(
    group: ProcessGroup, shards: tuple[int, ...], name: str, what: str, kind: str, inputs: dict[str, Tensor]
) -> Any:
    x = {**inputs, what: differ(inputs[what], group, kind)}
    options = split_options(group, shards)
    if name in ROW_FUNCTIONS:
        arguments = (own(x["logits"], group, shards, -1), own(x["ref_logits"], group, shards, -1).detach())
        return ROW_FUNCTIONS[name](*arguments, x["labels"], x["mask"], **options)
    for key in ("weight", "bias", "ref_weight", "ref_bias"):
        x[key] = own(x[key], group, shards, 0)
    x["ref_weight"], x["ref_bias"] = x["ref_weight"].detach(), x["ref_bias"].detach()
    if what == "row_weight":
        return linear_kl_loss(*kl_arguments(x), row_weight=x["row_weight"], **options)
    if what in ("pair_weight", "cu_seqlens"):
        rows = (x["hidden"].flatten(0, 1), x["weight"], x["labels"].flatten())
        return LinearSPOLoss(**options)(*rows, cu_seqlens=x["cu_seqlens"], pair_weight=x["pair_weight"])
    return HEAD_FUNCTIONS[name](x, **options)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((name, "labels") for name in ROW_FUNCTIONS if name not in ("token_kl", "kl_loss")),
        *((name, "mask") for name in ("token_kl", "token_logps_kl", "kl_loss", "SPOLoss")),
        *((name, "labels") for name in HEAD_FUNCTIONS if "kl" not in name),
        *((name, "mask") for name in ("linear_token_kl", "linear_kl_loss", "recompute", "recompute_free")),
        ("linear_kl_loss", "row_weight"),
        ("packed pairs", "pair_weight"),
        ("packed pairs", "cu_seqlens"),
    ],
)
def test_what_differs_between_processes_is_named_in_all(processes: Processes, name: str, what: str) -> None:
    rows = name in ROW_FUNCTIONS
    inputs = row_inputs(torch.float32, "noise") if rows else head_inputs(torch.float32)
    inputs["row_weight"] = torch.linspace(1, 2, 24).view(4, 6)
    inputs["pair_weight"] = torch.linspace(1, 2, 6)
    inputs["cu_seqlens"] = torch.tensor([0, 2, 4, 6, 8, 9, 10, 12, 14, 18, 19, 20, 24])
    message = {
        "row_weight": "row_weight",
        "mask": "mask" if name not in ("linear_kl_loss", "recompute_free") else "row_weight",
    }
    kinds = ["value", "order"] if what != "labels" else ["value", "order", "ignored", "illegal"]
    for kind in ["value"] if what == "cu_seqlens" else kinds:
        for error in processes.run(2, given_differently, SHARDS[0], name, what, kind, inputs):
            assert isinstance(error, ValueError), (kind, error)
            with pytest.raises(ValueError, match=f"^{message.get(what, what)} must be the same in every process"):
                raise error


def fresh_warnings(group: ProcessGroup, shards: tuple[int, ...], inputs: dict[str, Tensor]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rows_result(group, shards, "token_logps_kl", inputs)
    return [
        str(warning.message)
        for warning in seen
        if "spo_kernels" in warning.filename or "deprecated" in str(warning.message)
    ]


def test_no_deprecated_call(processes: Processes) -> None:
    for seen in processes.run(2, fresh_warnings, SHARDS[0], row_inputs(torch.float32, "noise")):
        assert not seen


@pytest.mark.parametrize(
    "tensor", [torch.arange(4), torch.zeros(0, dtype=torch.int64), torch.ones(3, dtype=torch.bool)]
)
def test_digest_is_held_exactly_by_float64(tensor: Tensor) -> None:
    assert int(digest(tensor).double()) == digest(tensor)
    assert digest(tensor) != digest(torch.cat([tensor, tensor[:1] if len(tensor) else torch.zeros(1)]))


def test_a_group_is_needed_and_must_be_one() -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vocab_shards needs a process_group, got \(5,\)"):
        token_logps(logits, labels, vocab_shards=(5,))
    with pytest.raises(ValueError, match="process_group must be a torch.distributed.ProcessGroup .* got str"):
        token_kl(logits, logits, process_group="model")  # type: ignore[arg-type]


def different_references(group: ProcessGroup) -> Tensor:
    return linear_token_kl(
        torch.zeros(3, H), torch.zeros(5, H), torch.zeros(3, H), torch.zeros(6, H), process_group=group
    )


def test_different_vocabularies_of_policy_and_reference(processes: Processes) -> None:
    for error in processes.run(2, different_references):
        with pytest.raises(ValueError, match="ref_weight must have V = 5 rows like weight, got 6"):
            raise error
