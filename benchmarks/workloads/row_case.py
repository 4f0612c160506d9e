"""A row op at one case: the row of its results, the call that is timed, the gate, and the runner of all providers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.harness.bench import Settings, set_simd_level
from benchmarks.harness.contest import Contender, contest
from benchmarks.harness.gate import ElementBudget, Verdict, by_element
from benchmarks.harness.rows import Memory, Timing, keyed, part
from benchmarks.peers.row_ops import PROVIDERS, Function, Provider, is_ours
from benchmarks.workloads.row_ops import DENORMAL_SCALE, OPS, SCALED_UPSTREAM, Case, Op, Workload

_MIB = 1 << 20
# Number of rows that the gate compares: the first and the last, because offsets and tails go wrong there.
_GATE_ROWS = 8
# Smaller logits get no share of the limit: starting threads and calling from Python take as long as moving the bytes.
_LIMITED_BYTES = 8 << 20
# Memory of the peer that needs most, in float32 [N, V] tensors: eager KL of half-precision logits with its backward.
_PEER_TENSORS = 12


@dataclass
class RowOpRow:
    """One provider at one op, pass and case in one run. Empty cells were not measured. Times are those of one call."""

    run: int
    op: str
    pass_name: str
    shape: str
    dtype: str
    scale: float
    cache: str  # warm: inputs fit the last-level cache and are read just before the call; cold: otherwise
    provider: str
    status: str = ""
    timing: Timing | None = field(default=None, metadata=part(Timing))
    cpu_p20_ms: float | None = None
    cpu_p80_ms: float | None = None
    model_mb: float | None = None  # the byte model: what the op must move at least
    gb_per_s: float | None = None  # bytes of the model over the median time
    limit_share: float | None = None  # time of the byte model at the same round's limits / the call's time
    read_gb_per_s: float | None = None  # measured limit of read-only loops, median over rounds
    update_gb_per_s: float | None = None  # the same of loops that read and write
    limit_source: str = ""
    memory: Memory | None = field(default=None, metadata=part(Memory))
    error: dict[str, float] = field(default_factory=dict, metadata=keyed("out", "grad"))
    over: dict[str, float] = field(
        default_factory=dict, metadata=keyed("ours", "ours_cpu", "ours_inplace", "ours_inplace_cpu")
    )

    @property
    def ours(self) -> bool:
        return is_ours(self.provider)


class _FromModel(torch.autograd.Function):
    """Logits as a model returns them: they require grad and are no leaf. Makes no copy."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class Problem:
    """The inputs of one op at one case, the upstream gradients of its outputs, and the rows that the gate compares."""

    def __init__(self, op: Op, case: Case, inputs: dict[str, Tensor], pristine: Mapping[str, Tensor]) -> None:
        self.op = op
        self.case = case
        self.inputs = inputs
        self.pristine = pristine  # copies of the inputs that an in-place backward overwrites
        self.anchor = torch.zeros((), requires_grad=True)
        rows = inputs[op.arguments[0]].shape[0]
        picked = {*range(min(_GATE_ROWS // 2, rows)), *range(max(rows - _GATE_ROWS // 2, 0), rows)}
        self.rows = torch.tensor(sorted(picked), device=inputs[op.arguments[0]].device)

    def upstream(self, pass_name: str) -> dict[str, Tensor]:
        """Upstream gradients of the outputs. Outputs per row get random ones, a scalar loss 1 or `SCALED_UPSTREAM`."""
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
    """One provider on one problem and pass. `entry` is timed."""

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
        # Not an attribute, which would be a reference cycle: gigabytes of inputs would live until the collector runs.
        return measure.Entry(self.call, self.prepare, self.finish)

    def prepare(self) -> None:
        problem = self._problem
        self._arguments = {name: problem.inputs[name] for name in problem.op.arguments}
        if self._warm:
            measure.touch(list(self._arguments.values()))
        if self._upstream:
            for name in problem.op.differentiable:
                self._arguments[name] = _FromModel.apply(problem.anchor, problem.inputs[name])
            # Edges, not tensors: an op that overwrites the logits detaches the tensor from the graph.
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
        """Upstream gradients in the dtype of the outputs. The first call, which is never timed, converts them."""
        named = zip(self._problem.op.outputs, outputs, strict=True)
        self._upstream = {name: self._upstream[name].to(output.dtype) for name, output in named}
        return list(self._upstream.values())


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gate(provider: Provider, call: Call, problem: Problem, upstream: Mapping[str, Tensor]) -> Verdict:
    """Compare one call with the float64 reference on a few rows.

    Providers that compute in half precision get wide budgets: eager bfloat16 log-probs are off by 0.05 here.
    """
    half = problem.case.dtype.itemsize == 2
    budget = ElementBudget(out=1e-4, out_relative=2e-5, grad=0.01 if half else 1e-4)
    if half and provider.native:
        budget = ElementBudget(out=0.25, out_relative=0.05, grad=0.15)
    op, rows = problem.op, problem.rows
    truth = op.truth(problem.inputs, rows, upstream)
    call.prepare()
    outputs, grads = call.call()
    picked = [output if output.dim() == 0 else output[rows] for output in outputs]
    verdict = by_element(
        dict(zip(op.outputs, picked, strict=True)),
        dict(zip(op.differentiable, (grad[rows] for grad in grads), strict=bool(grads))),
        truth,
        budget,
    )
    del outputs, grads, picked
    call.finish()
    return verdict


class CaseRunner:
    """Measures ops at one case. They share its inputs, because making inputs costs more than measuring."""

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

    def run(self, workload: Workload, run: int = 0) -> list[RowOpRow]:
        """A row for every provider that has the op. If a provider was not timed, its row's status says why."""
        if any(PROVIDERS[name].compiled for name in self.providers):
            torch._dynamo.reset()  # so that what was compiled before does not affect this case
        problem = self.problem(OPS[workload.op])
        names = [name for name in self.providers if self._applies(PROVIDERS[name], workload)]
        rows = {name: self._row(name, workload, run) for name in names}
        contenders = []
        for name, row in rows.items():
            if reason := PROVIDERS[name].missing(self.settings.device) or self._too_big(name):
                row.status = f"skipped: {reason}"
            else:
                contenders.append(self._contender(row, problem, workload))
        bandwidth = measure.Bandwidth(self._tensor_bytes(problem), self.settings.device, self.settings.threads)
        over = {"ours": ["ours"], "ours_inplace": ["ours_inplace"]}
        samples = contest(contenders, self.settings, over=over, every_round=bandwidth.sample)
        for name, times in samples.items():
            self._rates(rows[name], times, bandwidth, problem, workload)
        return list(rows.values())

    def _contender(self, row: RowOpRow, problem: Problem, workload: Workload) -> Contender:
        provider = PROVIDERS[row.provider]
        upstream = problem.upstream(workload.pass_name)
        call = Call(
            provider.function(workload.op),
            problem,
            upstream,
            restores=provider.inplace,
            warm=self._is_warm(problem),
            simd=provider.simd,
        )
        return Contender(
            row=row,
            entry=call.entry,
            check=lambda: gate(provider, call, problem, upstream),
            memory=call.entry if row.run == 0 else None,  # it does not vary from run to run
        )

    def _rates(
        self, row: RowOpRow, times: measure.Samples, bandwidth: measure.Bandwidth, problem: Problem, workload: Workload
    ) -> None:
        """Fill the columns of the byte model and of the bandwidth limits measured in the same rounds."""
        traffic = problem.op.bytes_moved(workload.pass_name, self.case.shape, self.case.dtype)
        moved = traffic.read + traffic.update
        row.cpu_p20_ms, row.cpu_p80_ms = (1e3 * measure.quantile(times.cpu, q) for q in (0.2, 0.8))
        row.model_mb, row.gb_per_s = moved / 1e6, moved / 1e9 / statistics.median(times.wall)
        if self._tensor_bytes(problem) >= _LIMITED_BYTES:
            limits = [
                traffic.read / read + traffic.update / update
                for read, update in zip(bandwidth.read[1:], bandwidth.update[1:], strict=True)  # after the warm-up
            ]
            row.limit_share = measure.paired_ratio(limits, times.wall)
        row.read_gb_per_s = statistics.median(bandwidth.read) / 1e9
        row.update_gb_per_s = statistics.median(bandwidth.update) / 1e9
        row.limit_source = bandwidth.source

    def _row(self, provider: str, workload: Workload, run: int) -> RowOpRow:
        case = self.case
        return RowOpRow(
            run=run,
            op=workload.op,
            pass_name=workload.pass_name,
            shape=case.shape_name,
            dtype=case.dtype_name,
            scale=case.scale,
            cache="warm" if self._is_warm(self.problem(OPS[workload.op])) else "cold",
            provider=provider,
        )

    def _applies(self, provider: Provider, workload: Workload) -> bool:
        return (
            workload.op in provider.functions
            and self.case.dtype in provider.dtypes
            and not (provider.backward_only and workload.pass_name == "fwd")
        )

    def _tensor_bytes(self, problem: Problem) -> int:
        return problem.inputs[problem.op.arguments[0]].nbytes

    def _is_warm(self, problem: Problem) -> bool:
        """Whether to read inputs before every call: they fit the last-level cache, but other providers evict them."""
        total = sum(problem.inputs[name].nbytes for name in problem.op.arguments)
        return self.settings.device.type == "cpu" and total <= 1.1 * measure.last_level_cache_bytes()

    def _too_big(self, provider: str) -> str | None:
        """Why a peer is left out: the system could end a run that exhausts the memory. None if it fits."""
        available = measure.available_bytes(self.settings.device)
        need = _PEER_TENSORS * 4 * torch.Size(self.case.shape).numel()
        if is_ours(provider) or available is None or available > need:
            return None
        return f"may need {need / _MIB:.0f} MiB, {available / _MIB:.0f} MiB are available"


class WrongResultError(ValueError):
    """A result did not pass the gate, so its time means nothing."""


def denormal_ratio(workload: Workload, provider: str, case: Case, settings: Settings) -> tuple[float, float]:
    """Time of the op on logits times `DENORMAL_SCALE` over its time on plain logits: medians of (wall, CPU) ratios.

    Raises:
        WrongResultError: a result does not pass the gate.
    """
    op = OPS[workload.op]
    entries = {}
    for label, scale in (("plain", 1.0), ("scaled", DENORMAL_SCALE)):
        runner = CaseRunner(case._replace(scale=scale), settings, [provider])
        problem = runner.problem(op)
        upstream = problem.upstream(workload.pass_name)
        function = PROVIDERS[provider].function(workload.op)
        call = Call(function, problem, upstream, restores=PROVIDERS[provider].inplace)
        verdict = gate(PROVIDERS[provider], call, problem, upstream)
        if verdict.problem:
            raise WrongResultError(f"{workload}, {provider} at {runner.case}: {verdict.problem}")
        entries[label] = call.entry
    samples = measure.interleave(entries, settings.device, settings.repeats)
    scaled, plain = samples["scaled"], samples["plain"]
    return measure.paired_ratio(scaled.wall, plain.wall), measure.paired_ratio(scaled.cpu, plain.cpu)
