"""What only a device shows: streams, graphs, synchronization, many rows, several devices, and the public functions.

The tests of the row ops run on a GPU through the fixture ``backend`` (test_ops.py). Tests in this file that a CPU can
run also run on the CPU, so that the owner of a GPU is not the first to run them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from on_device import OnDevice
from torch import Tensor

import spo_kernels
from spo_kernels import backends, precision, sequences
from spo_kernels.reference import PLAIN

IMPORTANCE = spo_kernels.SoftImportance(0.1)

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
on_gpu = pytest.mark.usefixtures("gpu")
on_any_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@pytest.fixture(params=[pytest.param(None, marks=GPU)])
def gpu() -> Iterator[None]:
    """A test with this fixture needs a GPU. Afterwards torch frees cached memory, for tests that measure memory."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def make_inputs(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits of a policy and a reference, labels some of which are ignored, and a mask; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (3 * torch.randn(*shape, generator=generator) for _ in range(2))
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.2] = -100
    mask = torch.rand(shape[:-1], generator=generator) < 0.8
    return {
        "logits": logits.to(device, dtype).requires_grad_(),
        "ref_logits": ref_logits.to(device, dtype),
        "labels": labels.to(device),
        "mask": mask.to(device),
    }


def objective(logits: Tensor, ref_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """A training step's loss, through most of the public functions; logits ``[2P, T, V]``."""
    chosen, rejected = spo_kernels.sequence_logps(logits, labels).chunk(2)
    kl = spo_kernels.token_kl(logits, ref_logits, mask).sum(-1)
    losses, _, _ = spo_kernels.spo_loss(chosen, rejected, alpha=0.1, kl=kl, beta=0.03, weight=IMPORTANCE)
    average = spo_kernels.sequence_logps(logits, labels, average=True)
    logps, kl_again = spo_kernels.token_logps_kl(logits, labels, ref_logits, mask)
    return losses.mean() + average.mean() + (logps * 0.1).sum() + kl_again.mean()


def gradient(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The value and the gradient of the logits, in float64 on the CPU."""
    inputs["logits"].grad = None
    value = run(**inputs)
    value.backward()
    assert inputs["logits"].grad is not None
    return value.detach().double().cpu(), inputs["logits"].grad.double().cpu()


def assert_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance * expected[1].abs().max().item())


def test_on_device_keeps_layouts_and_writes_in_place() -> None:
    """`OnDevice` over a backend of the CPU, whose results are known."""
    direct = backends.get(backends.active("cpu"))
    carried = OnDevice(direct, "cpu", "cpu")
    buffer = torch.randn(5, 40)
    logits, ref_logits, labels = buffer[:, 3:33], torch.randn(5, 30), torch.randint(30, (5,))
    expected = direct.token_stats_fwd(logits, labels, ref_logits, None, -100)
    got = carried.token_stats_fwd(logits, labels, ref_logits, None, -100)
    assert all(map(torch.equal, got, expected))
    margin = buffer[:, :3].clone()
    arguments = (torch.ones(5), torch.ones(5), logits, labels, ref_logits, None, *got[1:], -100)
    gradient = carried.token_stats_bwd(*arguments, False)
    assert gradient.data_ptr() != logits.data_ptr()
    assert carried.token_stats_bwd(*arguments, True) is logits
    assert torch.equal(logits, gradient)
    assert torch.equal(buffer[:, :3], margin)


@on_any_device
@pytest.mark.parametrize("dtype", precision.LOGITS_DTYPES, ids=str)
def test_a_training_step_is_that_of_float64(device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(device, 4, 6, 1003, dtype=dtype)
    exact = {
        name: tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    exact["logits"].requires_grad_()
    assert_near(gradient(objective, inputs), gradient(objective, exact), dtype)


@on_any_device
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("rows", [3, 400])  # a GPU splits few rows, and does not split many
def test_kl_loss_is_the_sum_of_token_kl(device: str, rows: int, overwrite: bool) -> None:
    inputs = make_inputs(device, rows, 40_000)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device)

    def fused(logits: Tensor, ref_logits: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        own = logits * 1 if overwrite else logits
        return spo_kernels.kl_loss(own, ref_logits, mask, row_weight=weight, overwrite_logits=overwrite) * 0.7

    def apart(logits: Tensor, ref_logits: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return (spo_kernels.token_kl(logits, ref_logits, mask) * weight).sum() * 0.7

    assert_near(gradient(fused, inputs), gradient(apart, inputs), torch.float32)


@on_any_device
def test_rows_are_independent_of_their_batch_under_deterministic_algorithms(device: str) -> None:
    inputs = make_inputs(device, 600, 33_001)
    logits, ref_logits, labels, mask = (inputs[name].detach() for name in ("logits", "ref_logits", "labels", "mask"))

    def run(start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(start, stop)
        return spo_kernels.token_logps_kl(logits[rows], labels[rows], ref_logits[rows], mask[rows])

    torch.use_deterministic_algorithms(True)
    try:
        whole, one = run(0, 600), run(37, 38)
    finally:
        torch.use_deterministic_algorithms(False)
    for all_rows, alone in zip(whole, one, strict=True):
        assert torch.equal(all_rows[37:38], alone)


@on_any_device
def test_sums_of_long_sequences_are_the_same_every_time_and_in_both_layouts(device: str) -> None:
    values = (-5 * torch.rand(3, 131072, generator=torch.Generator().manual_seed(0))).to(device).requires_grad_()
    bounds = torch.arange(4, device=device) * 131072
    upstream = torch.tensor([1.5, float("nan"), -2.0], device=device)
    exact = values.detach().double().sum(1).float()
    for _ in range(5):
        for sums in (
            sequences.checked_sums(values, None, "values"),
            sequences.checked_sums(values.flatten(), bounds, "values"),
        ):
            torch.testing.assert_close(sums, exact, rtol=2e-7, atol=0)
            assert torch.equal(sums, sequences.checked_sums(values, None, "values"))
            (gradient_of_values,) = torch.autograd.grad(sums, values, upstream)
            expected = upstream[:, None].expand(3, 131072)
            torch.testing.assert_close(gradient_of_values, expected, rtol=0, atol=0, equal_nan=True)


@on_any_device
def test_compiled_in_one_graph(device: str) -> None:
    inputs = make_inputs(device, 4, 6, 1003)
    eager = gradient(objective, inputs)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"  # the CPU's code generator is not what is tested here
    assert_near(gradient(torch.compile(objective, fullgraph=True, backend=backend), inputs), eager, torch.float32)


@on_any_device
def test_memory_in_place_does_not_grow_with_the_logits(device: str) -> None:
    inputs = make_inputs(device, 256, 32_000)
    held = inputs["logits"].detach().clone()
    anchor = torch.zeros((), device=device, requires_grad=True)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.data_ptr() != held.data_ptr():
                    largest = max(largest, tensor.numel())
            return out

    class FromModel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor):  # type: ignore[no-untyped-def]
            return held.detach()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return None

    with Largest():
        logps = spo_kernels.token_logps(FromModel.apply(anchor), inputs["labels"], inplace_backward=True)
        logps.backward(torch.ones_like(logps))
    assert 0 < largest <= 4 * 256


@on_gpu
def test_the_selected_backend_is_the_default_of_this_machine() -> None:
    expected = "cuda" if "cuda" in backends.available() else "triton"
    assert backends.active("cuda") == expected


@on_gpu
def test_kernels_run_on_the_current_stream() -> None:
    """The logits are written late on the current stream. Another stream would read the zeros before."""
    inputs = make_inputs("cuda", 64, 32_000)
    logits = inputs["logits"].detach()
    expected = spo_kernels.token_logps(logits, inputs["labels"])
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        got = spo_kernels.token_logps(late, inputs["labels"])
    stream.synchronize()
    assert torch.equal(got, expected)


@on_gpu
@pytest.mark.parametrize("name", [name for name in ("cuda", "triton") if name in backends.available()])
@pytest.mark.parametrize("rows", [3, 400])
def test_a_captured_graph_computes_on_new_logits(name: str, rows: int) -> None:
    backend = backends.get(name)
    inputs = make_inputs("cuda", rows, 40_000)
    logits, ref_logits, labels, mask = (inputs[key].detach() for key in ("logits", "ref_logits", "labels", "mask"))
    ones = torch.ones(rows, device="cuda")

    def run() -> tuple[Tensor, Tensor, Tensor]:
        logps, kl, stats = backend.token_stats_fwd(logits, labels, ref_logits, mask, -100)
        dlogits = backend.token_stats_bwd(ones, ones, logits, labels, ref_logits, mask, kl, stats, -100, False)
        return logps, kl, dlogits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        assert torch.equal(got, expected)


@on_gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    inputs = make_inputs("cuda", 4, 6, 1003)
    gradient(objective, inputs)  # loads and compiles what is loaded and compiled once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(**inputs).backward()
        loss = spo_kernels.kl_loss(inputs["logits"], inputs["ref_logits"], inputs["mask"])
        (loss * 0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_more_rows_than_a_grid_dimension_and_more_elements_than_32_bits() -> None:
    rows, vocabulary = 70_000, 32_000  # 2.24e9 elements, 4.5 GB
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    tile = make_inputs("cuda", 1000, vocabulary, dtype=torch.bfloat16)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits.view(70, 1000, vocabulary).copy_(tile["logits"].detach())
    labels = tile["labels"].repeat(70)
    anchor = torch.zeros((), device="cuda", requires_grad=True)
    expected = spo_kernels.token_logps(tile["logits"], tile["labels"])
    (one,) = torch.autograd.grad(expected.sum(), tile["logits"])
    logps = spo_kernels.token_logps(logits + anchor.bfloat16(), labels, inplace_backward=True)
    assert torch.equal(logps.view(70, 1000), expected.expand(70, 1000))
    del logps
    leaf = logits.requires_grad_()
    (all_rows,) = torch.autograd.grad(spo_kernels.token_logps(leaf, labels).sum(), leaf)
    assert torch.equal(all_rows[-1000:], one)
    assert torch.equal(all_rows[:1000], one)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    inputs = make_inputs("cuda:1", 4, 6, 1003)
    with torch.cuda.device(0):
        got = gradient(objective, inputs)
    assert_near(got, gradient(objective, make_inputs("cuda:0", 4, 6, 1003)), torch.float32)


@on_gpu
def test_values_on_another_device_are_refused() -> None:
    """The row ops check devices themselves, because a kernel that reads a host pointer ends the context."""
    logits, ones = torch.randn(4, 9, device="cuda"), torch.ones(4)
    op = torch.ops.spo_kernels.token_stats_fwd
    for name, arguments in {
        "labels": (torch.zeros(4, dtype=torch.int64), None, None),
        "ref_logits": (None, torch.randn(4, 9), None),
        "mask": (None, logits, ones.bool()),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name} must be on cuda:0 like the logits, got cpu"):
            op(logits, *arguments, -100, False)
    with pytest.raises(RuntimeError, match="row_weight must be on cuda:0 like the logits, got cpu"):
        torch.ops.spo_kernels.kl_loss_fwd(logits, logits, ones, *PLAIN)
    with pytest.raises(RuntimeError, match="scale must be on cuda:0 like the logits, got cpu"):
        torch.ops.spo_kernels.scale_(logits, ones[0])


@on_any_device
def test_an_error_in_the_library_reaches_python(device: str, tmp_path: Path) -> None:
    """In a new process: on one machine with a GPU an exception of the library once ended the interpreter."""
    program = (
        "import torch, spo_kernels\n"
        f"logits = torch.randn(2, 5, device='{device}')\n"
        "try:\n"
        "    inputs = logits, logits[:, 0].int(), None, None, -100, False, None, None, None, 0.0\n"
        "    torch.ops.spo_kernels.token_stats_fwd(*inputs)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    # In another folder: from the repository's root Python would import the source tree, not the installed package.
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "labels must be int64, got int32" in done.stdout) == (0, True), done.stderr


@on_gpu
@pytest.mark.parametrize("name", [name for name in ("cuda", "triton") if name in backends.available()])
def test_a_label_out_of_range_stops_the_program(name: str, tmp_path: Path) -> None:
    """In a new process, because a trap leaves the GPU unusable for its process."""
    program = (
        "import torch, spo_kernels\n"
        "labels = torch.full((8,), 1000, device='cuda')\n"
        "spo_kernels.backends.get('" + name + "').token_stats_fwd("
        "torch.randn(8, 1000, device='cuda'), labels, None, None, -100)\n"
        "torch.cuda.synchronize()\n"
    )
    # In another folder: from the repository's root Python would import the source tree, not the installed package.
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()


@on_any_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 1040])
def test_a_head_is_that_of_float64(device: str, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 4, 70, width, generator=generator)
    weight, ref_weight = torch.randn(2, 1003, width, generator=generator) / width**0.5
    labels = torch.randint(1003, (4, 70), generator=generator)
    labels[:, :5] = -100
    loss = spo_kernels.LinearSPOLoss(0.1, beta=0.03, weight=IMPORTANCE)

    def of(where: str, to: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).to(where, to).requires_grad_() for x in (hidden, weight)]
        reference = [x.to(dtype).to(where, to) for x in (ref_hidden, ref_weight)]
        kl = {"kl_hidden": leaves[0], "kl_ref_hidden": reference[0], "kl_ref_weight": reference[1]}
        value, _ = loss(*leaves, labels.to(where), **kl)
        with torch.no_grad():  # where no gradient follows, as for a reference's log-probs
            logps = spo_kernels.linear_token_logps(*leaves, labels.to(where))
        return [x.double().cpu() for x in (value.detach(), logps, *torch.autograd.grad(value, leaves))]

    for got, want in zip(of(device, dtype), of("cpu", torch.float64), strict=True):
        assert (got - want).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * want.norm()
