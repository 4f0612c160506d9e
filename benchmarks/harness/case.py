"""One case after another: correctness gate, peak memory, interleaved timing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.harness.results import Row
from benchmarks.peers.row_ops import PROVIDERS, Function, Provider, is_ours
from benchmarks.workloads.row_ops import DENORMAL_SCALE, OPS, SCALED_UPSTREAM, Case, Op, Workload

_MIB = 1 << 20
# Rows the gate compares; both ends, because that is where offsets and tails go wrong.
_GATE_ROWS = 8
# Below this, starting threads and calling from Python take as long as moving the bytes, and their share means nothing.
_LIMITED_BYTES = 8 << 20
# What the greediest peer needs, in float32 [N, V] tensors (eager KL of half-precision logits, forward+backward).
_PEER_TENSORS = 12


@dataclass(frozen=True)
class Settings:
    device: torch.device
    threads: int
    repeats: int


class _FromModel(torch.autograd.Function):
    """Logits as a model returns them, requiring grad and not a leaf, without copying them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class Problem:
    """The inputs of one op at one case, the upstream gradients of its outputs, and the truth about a few rows."""

    def __init__(self, op: Op, case: Case, inputs: dict[str, Tensor], pristine: Mapping[str, Tensor]) -> None:
        self.op = op
        self.case = case
        self.inputs = inputs
        self.pristine = pristine  # copies of what an in-place backward overwrites
        self.anchor = torch.zeros((), requires_grad=True)
        rows = inputs[op.arguments[0]].shape[0]
        picked = {*range(min(_GATE_ROWS // 2, rows)), *range(max(rows - _GATE_ROWS // 2, 0), rows)}
        self.rows = torch.tensor(sorted(picked), device=inputs[op.arguments[0]].device)

    def upstream(self, pass_name: str) -> dict[str, Tensor]:
        """Gradients of the outputs, none of them 1 except a scalar's where the pass says so."""
        logits = self.inputs[self.op.arguments[0]]
        if pass_name == "fwd":
            return {}
        generator = torch.Generator(logits.device).manual_seed(1)
        return {
            name: torch.tensor(1.0 if pass_name == "fwd_bwd" else SCALED_UPSTREAM, device=logits.device)
            if name == "loss"
            else torch.rand(logits.shape[0], device=logits.device, generator=generator) + 0.5
            for name in self.op.outputs
        }


class Call:
    """One provider on one problem and pass; `entry` is what gets timed."""

    def __init__(
        self,
        function: Function,
        problem: Problem,
        upstream: Mapping[str, Tensor],
        *,
        restores: bool = False,
        warm: bool = False,
        simd: str | None = None,
    ) -> None:
        self._function = function
        self._problem = problem
        self._upstream = upstream
        self._restores = restores
        self._warm = warm
        self._simd = simd
        self._arguments: dict[str, Tensor] = {}
        self._edges: list[torch.autograd.graph.GradientEdge] = []

    @property
    def entry(self) -> measure.Entry:
        # Not an attribute: the cycle would keep the inputs, gigabytes of them, until the collector happens to run.
        return measure.Entry(self.call, self.prepare, self.finish)

    def prepare(self) -> None:
        problem = self._problem
        self._arguments = {name: problem.inputs[name] for name in problem.op.arguments}
        if self._warm:
            measure.touch(list(self._arguments.values()))
        if self._upstream:
            for name in problem.op.differentiable:
                self._arguments[name] = _FromModel.apply(problem.anchor, problem.inputs[name])
            # Of the logits as the model gave them: an op that overwrites them takes the tensor itself out of the graph.
            wrt = [self._arguments[name] for name in problem.op.differentiable]
            self._edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in wrt]
        if self._simd:
            self._level, _ = set_simd_level(self._simd)

    def call(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, gradients of the differentiable inputs)."""
        if not self._upstream:
            with torch.no_grad():
                return _as_tuple(self._function(*self._arguments.values())), ()
        outputs = _as_tuple(self._function(*self._arguments.values()))
        return outputs, torch.autograd.grad(outputs, self._edges, self._gradients_for(outputs))

    def finish(self) -> None:
        self._arguments, self._edges = {}, []
        if self._restores:
            for name, tensor in self._problem.pristine.items():
                self._problem.inputs[name].copy_(tensor)
        if self._simd:
            set_simd_level(self._level)

    def _gradients_for(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Upstream gradients in the dtype of the outputs, converted by the first call, which is never timed."""
        named = zip(self._problem.op.outputs, outputs, strict=True)
        self._upstream = {name: self._upstream[name].to(output.dtype) for name, output in named}
        return list(self._upstream.values())


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class GateResult:
    error_out: float  # largest |output - truth|
    error_grad: float | None  # largest |gradient - truth| over the largest |truth|
    wrong: str | None  # what exceeded its budget


def gate(provider: Provider, call: Call, problem: Problem, upstream: Mapping[str, Tensor]) -> GateResult:
    """Compare one call with the float64 reference on a few rows.

    The budgets catch a wrong formula, row or scale, not a lost digit (the tests' business). Providers that compute in
    half precision get budgets that half precision needs: eager bfloat16 log-probs are off by 0.05 here.
    """
    native_half = provider.native and problem.case.dtype.itemsize == 2
    out_budget, out_relative = (0.25, 0.05) if native_half else (1e-4, 2e-5)
    grad_budget = 0.15 if native_half else 0.01 if problem.case.dtype.itemsize == 2 else 1e-4
    truth = problem.op.truth(problem.inputs, problem.rows, upstream)
    call.prepare()
    outputs, grads = call.call()
    wrong = []
    error_out = 0.0
    for name, output in zip(problem.op.outputs, outputs, strict=True):
        got = (output if output.dim() == 0 else output[problem.rows]).double()
        error = (got - truth[name]).abs()
        error_out = max(error_out, error.max().item())
        if not bool((error <= out_budget + out_relative * truth[name].abs()).all()):  # so that NaN is wrong
            wrong.append(f"{name} off by {error.max().item():.3g}")
    error_grad = None
    for name, grad in zip(problem.op.differentiable, grads, strict=bool(grads)):
        scale = truth[name].abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        error_grad = ((grad[problem.rows].double() - truth[name]).abs() / scale).max().item()
        # Half of what lies between float16's smallest numbers, of which a gradient of 1e-6 consists.
        numbers = torch.finfo(grad.dtype)
        least = numbers.smallest_normal * numbers.eps / 2 if grad.dtype == torch.float16 else 0.0
        if not error_grad <= grad_budget + least / scale.min().item():
            wrong.append(f"gradient of {name} off by {error_grad:.3g} of its largest element")
    del outputs, grads
    call.finish()
    return GateResult(error_out, error_grad, "; ".join(wrong) or None)


def set_simd_level(level: str) -> tuple[str, str]:
    """Set the level of the compiled CPU kernels; returns (the one before, the one now). ValueError without them."""
    from spo_kernels import backends
    from spo_kernels.backends import cpu

    if backends.active("cpu") != "cpu":
        raise ValueError(f"the SIMD level belongs to the compiled cpu backend, but {backends.active('cpu')} is active")
    control = cpu.load()
    before = control.simd_level()
    control.set_simd_level(level)
    return before, control.simd_level()


class CaseRunner:
    """Inputs of one case, shared by the ops measured on it: making them costs more than measuring."""

    def __init__(self, case: Case, settings: Settings, providers: Iterable[str]) -> None:
        self.case = case
        self.settings = settings
        self.providers = list(providers)
        self._inputs: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def problem(self, op: Op) -> Problem:
        key = id(op.make_inputs)
        if key not in self._inputs:
            inputs = op.make_inputs(self.case.shape, self.case.dtype, self.settings.device, self.case.scale)
            overwritten = any(PROVIDERS[name].inplace for name in self.providers)
            pristine = {name: inputs[name].clone() for name in op.differentiable} if overwritten else {}
            self._inputs[key] = inputs, pristine
        return Problem(op, self.case, *self._inputs[key])

    def run(self, workload: Workload, run: int = 0) -> list[Row]:
        """Gate, memory and time of every provider that has the op; a row each, with the reason it was not timed."""
        if any(PROVIDERS[name].compiled for name in self.providers):
            torch._dynamo.reset()  # each case is compiled for itself, whatever was compiled before
        op = OPS[workload.op]
        problem = self.problem(op)
        upstream = problem.upstream(workload.pass_name)
        rows, entries = {}, {}
        for name in self.providers:
            provider = PROVIDERS[name]
            if not self._applies(provider, workload):
                continue
            row = rows[name] = self._row(name, workload, run)
            if reason := provider.missing(self.settings.device) or self._too_big(name):
                row.status = f"skipped: {reason}"
                continue
            call = Call(
                provider.function(workload.op),
                problem,
                upstream,
                restores=provider.inplace,
                warm=self._is_warm(op),
                simd=provider.simd,
            )
            try:
                result = gate(provider, call, problem, upstream)
                if run == 0:  # it does not vary
                    peak = measure.peak_memory(call.entry, self.settings.device)
                    row.extra_mib = peak.allocator / _MIB
                    row.extra_resident_mib = None if peak.resident is None else peak.resident / _MIB
            except RuntimeError as error:  # a peer that this machine cannot compile or hold; ours fails the run
                row.status = f"failed: {str(error).strip().splitlines()[0]}"
                call.finish()
                continue
            row.error_out, row.error_grad = result.error_out, result.error_grad
            if result.wrong:
                row.status = f"wrong: {result.wrong}"
            else:
                entries[name] = call.entry
        if entries:
            self._time(entries, rows, op, workload)
        return list(rows.values())

    def _time(self, entries: dict[str, measure.Entry], rows: dict[str, Row], op: Op, workload: Workload) -> None:
        traffic = op.bytes_moved(workload.pass_name, self.case.shape, self.case.dtype)
        tensor_bytes = self.problem(op).inputs[op.arguments[0]].nbytes
        bandwidth = measure.Bandwidth(tensor_bytes, self.settings.device, self.settings.threads)
        samples = measure.interleave(entries, self.settings.device, self.settings.repeats, bandwidth.sample)
        limits = [
            traffic.read / read + traffic.update / update
            for read, update in zip(bandwidth.read[1:], bandwidth.update[1:], strict=True)  # the first is the warm-up's
        ]
        for name, times in samples.items():
            row = rows[name]
            median = statistics.median(times.wall)
            row.status = "ok"
            row.rounds = len(times.wall)
            row.wall_ms, row.wall_p20_ms, row.wall_p80_ms = (
                1e3 * t for t in (median, measure.quantile(times.wall, 0.2), measure.quantile(times.wall, 0.8))
            )
            row.cpu_ms, row.cpu_p20_ms, row.cpu_p80_ms = (1e3 * measure.quantile(times.cpu, q) for q in (0.5, 0.2, 0.8))
            row.model_mb = (traffic.read + traffic.update) / 1e6
            row.gb_per_s = (traffic.read + traffic.update) / 1e9 / median
            if tensor_bytes >= _LIMITED_BYTES:
                row.limit_share = measure.paired_ratio(limits, times.wall)
            row.read_gb_per_s, row.update_gb_per_s = (
                statistics.median(rates) / 1e9 for rates in (bandwidth.read, bandwidth.update)
            )
            row.limit_source = bandwidth.source
            for ours in ("ours", "ours_inplace"):
                if ours in samples:
                    setattr(row, f"over_{ours}", measure.paired_ratio(times.wall, samples[ours].wall))
                    setattr(row, f"over_{ours}_cpu", measure.paired_ratio(times.cpu, samples[ours].cpu))

    def _row(self, provider: str, workload: Workload, run: int) -> Row:
        case = self.case
        return Row(
            run=run,
            op=workload.op,
            pass_name=workload.pass_name,
            shape=case.shape_name,
            dtype=case.dtype_name,
            scale=case.scale,
            cache="warm" if self._is_warm(OPS[workload.op]) else "cold",
            provider=provider,
        )

    def _applies(self, provider: Provider, workload: Workload) -> bool:
        return (
            workload.op in provider.functions
            and self.case.dtype in provider.dtypes
            and not (provider.backward_only and workload.pass_name == "fwd")
        )

    def _is_warm(self, op: Op) -> bool:
        """Inputs that fit the last-level cache are read once before every call, since others' calls evict them."""
        inputs = self.problem(op).inputs
        total = sum(inputs[name].nbytes for name in op.arguments)
        return self.settings.device.type == "cpu" and total <= 1.1 * measure.last_level_cache_bytes()

    def _too_big(self, provider: str) -> str | None:
        """A note, rather than the system killing the run."""
        available = measure.available_bytes(self.settings.device)
        need = _PEER_TENSORS * 4 * torch.Size(self.case.shape).numel()
        if is_ours(provider) or available is None or available > need:
            return None
        return f"may need {need / _MIB:.0f} MiB, {available / _MIB:.0f} MiB are available"


def denormal_ratio(workload: Workload, provider: str, case: Case, settings: Settings) -> tuple[float, float]:
    """How much slower the op is on logits times `DENORMAL_SCALE`: median ratio of interleaved calls, wall and CPU."""
    op = OPS[workload.op]
    entries = {}
    for label, scale in (("plain", 1.0), ("scaled", DENORMAL_SCALE)):
        runner = CaseRunner(case._replace(scale=scale), settings, [provider])
        problem = runner.problem(op)
        call = Call(
            PROVIDERS[provider].function(workload.op),
            problem,
            problem.upstream(workload.pass_name),
            restores=PROVIDERS[provider].inplace,
        )
        result = gate(PROVIDERS[provider], call, problem, problem.upstream(workload.pass_name))
        if result.wrong:
            raise RuntimeError(f"{provider} is wrong at {runner.case}: {result.wrong}")
        entries[label] = call.entry
    samples = measure.interleave(entries, settings.device, settings.repeats)
    scaled, plain = samples["scaled"], samples["plain"]
    return measure.paired_ratio(scaled.wall, plain.wall), measure.paired_ratio(scaled.cpu, plain.cpu)


def failures_of_ours(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if is_ours(row.provider) and row.status.startswith(("wrong", "failed"))]
