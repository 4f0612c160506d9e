"""A whole SPO training step, ours against the same step in eager PyTorch, and where its time goes.

The step is Appendix B of the paper: P pairs through a causal transformer, the preference loss (eq. 8) with
SoftImportance weights (eq. 24) and its backward; the exact token KL on S sequences drawn from the policy, and its
backward; clipping; AdamW. The S sequences and the reference's logits of them are drawn anew every k steps: the refresh.
Everyone runs the same model (spo_train's `Llama`), refresh and optimizer; only what happens between hidden states
and loss differs. One entry of `LOSSES` per implementation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import spo_kernels
from benchmarks.harness import measure
from benchmarks.harness import results as report
from benchmarks.harness.case import Settings
from spo_train.models.llama import Llama, ModelConfig

_ALPHA, _BETA, _GAMMA = 0.1, 0.03, 0.1
_IGNORED = -100
# Against float64 through a whole model; what a wrong coefficient costs is far beyond it. In half precision the model's
# own activations are rounded, for everyone.
_GATE_BUDGETS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_GATE_SHAPE = (1, 64)  # at most so many pairs and sampled sequences, and tokens of each: float64 of all would not fit
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class KLBatch:
    """Sampled sequences, and what the reference says of them."""

    ids: Tensor  # [S, T]
    mask: Tensor  # [S, T], False in the prompt
    ref_hidden: Tensor  # [S, T, H]
    ref_weight: Tensor  # [V, H]
    ref_logits: Tensor  # [S, T, V]


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [2P, T], chosen then rejected
    labels: Tensor  # [2P, T], the next ids, ignored in the prompt
    kl: KLBatch


PreferenceLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
KLLoss = Callable[[Tensor, Tensor, KLBatch], Tensor]


@dataclass(frozen=True)
class Losses:
    """From the policy's hidden states [.., T, H] and its head's weight [V, H]."""

    preference: PreferenceLoss  # (hidden, weight, labels [2P, T]) -> scalar
    kl: KLLoss  # (hidden, weight, batch) -> scalar
    compiled: bool = False


def _wide(logits: Tensor) -> Tensor:
    """At least float32, as trainers cast logits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def eager_preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = F.log_softmax(_wide(F.linear(hidden, weight)), -1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    logp_w, logp_l = (picked * (labels != _IGNORED)).sum(-1).chunk(2)
    scores = _GAMMA * torch.logaddexp(logp_w, logp_l).detach()
    mu = torch.sigmoid(scores - scores.mean())
    return (-mu * F.logsigmoid(_ALPHA * (logp_w - logp_l)) / _ALPHA).mean()


def eager_kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
    logps, ref_logps = (F.log_softmax(_wide(x), -1) for x in (F.linear(hidden, weight), batch.ref_logits))
    return _BETA * ((logps.exp() * (logps - ref_logps)).sum(-1) * batch.mask).sum(-1).mean()


def _per_row(batch: KLBatch) -> Tensor:
    return torch.full(batch.mask.shape, _BETA / len(batch.mask), device=batch.mask.device)


def _ours(*, inplace: bool) -> Losses:
    importance = spo_kernels.SoftImportance(_GAMMA)

    def preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = spo_kernels.sequence_logps(F.linear(hidden, weight), labels, inplace_backward=inplace)
        losses, _, _ = spo_kernels.spo_loss(*logps.chunk(2), alpha=_ALPHA, weight=importance)
        return losses.mean()

    def kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
        return spo_kernels.kl_loss(
            F.linear(hidden, weight),
            batch.ref_logits,
            batch.mask,
            row_weight=_per_row(batch),
            overwrite_logits=inplace,
        )

    return Losses(preference, kl)


def _ours_head() -> Losses:
    """Without logits. The normalizer of the weights is the batch's, so the preference part recomputes."""
    loss = spo_kernels.LinearSPOLoss(_ALPHA, weight=spo_kernels.SoftImportance(_GAMMA))

    def preference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        objective, _ = loss(hidden, weight, labels)
        return objective

    def kl(hidden: Tensor, weight: Tensor, batch: KLBatch) -> Tensor:
        return spo_kernels.linear_kl_loss(
            hidden, weight, batch.ref_hidden, batch.ref_weight, batch.mask, row_weight=_per_row(batch)
        )

    return Losses(preference, kl)


LOSSES: dict[str, Losses] = {
    "ours": _ours(inplace=False),
    "ours_inplace": _ours(inplace=True),
    "ours_head": _ours_head(),
    "eager": Losses(eager_preference, eager_kl),
    "compile": Losses(eager_preference, eager_kl, compiled=True),
}
# The step with a ready-made gradient of the logits in place of a loss: what no implementation with logits can go below.
MODEL_ONLY = "model_only"
REFRESH = "refresh"  # not a step: what every k-th of anyone's steps has on top
PROVIDERS = (*LOSSES, MODEL_ONLY)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class StepRow:
    """One implementation of the step, or the refresh, in one run of the command."""

    provider: str
    pairs: int
    kl_samples: int
    kl_every: int
    tokens: int
    vocabulary: int
    hidden: int
    layers: int
    status: str = ""
    rounds: int | None = None
    wall_ms: float | None = None
    wall_p20_ms: float | None = None
    wall_p80_ms: float | None = None
    cpu_ms: float | None = None
    with_refresh_ms: float | None = None  # medians: the step and its share of a refresh
    extra_mib: float | None = None  # peak beyond parameters, optimizer state and batch
    extra_resident_mib: float | None = None
    error_loss: float | None = None  # relative, against the float64 step
    error_grad: float | None = None  # largest relative error of a parameter's gradient, by norm
    over_ours: float | None = None
    over_ours_inplace: float | None = None


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("--pairs", type=count, default=8, help="pairs P; the paper's 128 and 32 samples scaled down")
    parser.add_argument("--kl-samples", type=count, default=2, help="sampled sequences S")
    parser.add_argument("--kl-every", type=count, default=8, help="steps k between two refreshes of the samples")
    parser.add_argument("--tokens", type=count, default=128, help="tokens T a sequence, a quarter of them prompt")
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument(
        "--hidden", type=count, default=256, help="width of the model, a multiple of 64 or less than 64"
    )
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the model, its gradients and AdamW")
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="default: all")


class Step:
    """The training step of one implementation on a shared model, optimizer and batch."""

    def __init__(self, name: str, model: Llama, optimizer: torch.optim.Optimizer | None, batch: Batch) -> None:
        self._model = model
        self._optimizer = optimizer
        self._batch = batch
        self._gradients: tuple[Tensor, Tensor] | None = None
        if name == MODEL_ONLY:
            self._gradients = (
                batch.kl.ref_logits.new_full((*batch.ids.shape, model.vocab_size), 1e-6),
                torch.full_like(batch.kl.ref_logits, 1e-6),
            )
            return
        losses = LOSSES[name]
        wrap = torch.compile if losses.compiled else lambda function: function
        self._preference, self._kl = wrap(losses.preference), wrap(losses.kl)

    def run(self) -> Tensor:
        """One step; returns the objective. Without an optimizer it stops at the gradients."""
        model, batch = self._model, self._batch
        model.zero_grad(set_to_none=True)
        if self._gradients is not None:
            model(batch.ids).backward(self._gradients[0])
            model(batch.kl.ids).backward(self._gradients[1])
            objective = torch.zeros(())
        else:
            # A backward each, so that the two sets of logits never live at once.
            preference = self._preference(model.hidden(batch.ids), model.embedding.weight, batch.labels)
            preference.backward()
            kl = self._kl(model.hidden(batch.kl.ids), model.embedding.weight, batch.kl)
            kl.backward()
            objective = (preference + kl).detach()
        if self._optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self._optimizer.step()
        return objective


class Refresh:
    """Sampling from the policy, and the reference's logits of what was drawn."""

    def __init__(self, options: argparse.Namespace, model: Llama, generator: torch.Generator) -> None:
        self._model = model
        self._tokens = options.tokens
        # bos stands before them.
        size = (options.kl_samples, max(_prompt(options) - 1, 0))
        ids = torch.randint(4, options.vocabulary, size, device=generator.device, generator=generator)
        self._prompts: list[list[int]] = ids.tolist()
        # A reference near the policy, as in training: their KL is small but not 0.
        self._reference = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in self._reference.parameters():
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(0.05 * parameter.std(correction=0) * noise)

    def run(self) -> KLBatch:
        generator = torch.Generator(self._model.embedding.weight.device).manual_seed(0)
        samples = self._model.sample(self._prompts, max_length=self._tokens + 1, generator=generator)
        ids = samples.tokens[:, :-1]
        with torch.no_grad():
            hidden, weight = self._reference.hidden(ids), self._reference.embedding.weight.detach()
            return KLBatch(ids, samples.labels() != _IGNORED, hidden, weight, F.linear(hidden, weight))


def _prompt(options: argparse.Namespace) -> int:
    return options.tokens // 4


def _make_model(options: argparse.Namespace, device: torch.device) -> Llama:
    config = ModelConfig(
        options.vocabulary,
        dim=options.hidden,
        layers=options.layers,
        heads=max(options.hidden // 64, 1),
        ffn_dim=max(options.hidden * 11 // 4, 1),
        max_length=options.tokens + 1,
    )
    with device:
        return Llama(config).to(_DTYPES[options.dtype])


def _make_batch(options: argparse.Namespace, refresh: Refresh, generator: torch.Generator) -> Batch:
    shape = (2 * options.pairs, options.tokens + 1)
    ids = torch.randint(options.vocabulary, shape, device=generator.device, generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : _prompt(options)] = _IGNORED
    return Batch(ids[:, :-1], labels, refresh.run())


def _gradients(name: str, model: Llama, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    objective = Step(name, model, None, batch).run().item()
    return objective, {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def _gate_batch(batch: Batch) -> Batch:
    """The first pairs and samples, their last tokens: those after the prompt."""
    pairs, tokens = _GATE_SHAPE
    chosen, rejected = (half[:pairs] for half in batch.ids.chunk(2))
    labels = torch.cat([half[:pairs] for half in batch.labels.chunk(2)])
    kl = batch.kl
    return Batch(
        torch.cat((chosen, rejected))[:, -tokens:].contiguous(),
        labels[:, -tokens:].contiguous(),
        KLBatch(
            kl.ids[:pairs, -tokens:].contiguous(),
            kl.mask[:pairs, -tokens:].contiguous(),
            kl.ref_hidden[:pairs, -tokens:].contiguous(),
            kl.ref_weight,
            kl.ref_logits[:pairs, -tokens:].contiguous(),
        ),
    )


def _truth(model: Llama, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    kl = batch.kl
    exact = KLBatch(kl.ids, kl.mask, kl.ref_hidden.double(), kl.ref_weight.double(), kl.ref_logits.double())
    return _gradients("eager", copy.deepcopy(model).double(), Batch(batch.ids, batch.labels, exact))


def _gate(row: StepRow, model: Llama, batch: Batch, truth: tuple[float, dict[str, Tensor]]) -> None:
    objective, gradients = _gradients(row.provider, model, batch)
    row.error_loss = abs(objective - truth[0]) / abs(truth[0])
    row.error_grad = max(
        ((gradients[key].double() - grad).norm() / grad.norm().clamp(min=1e-30)).item()
        for key, grad in truth[1].items()
        if grad.norm() > 0
    )
    budget = _GATE_BUDGETS[model.embedding.weight.dtype]
    if not (row.error_loss <= budget and row.error_grad <= budget):
        row.status = f"wrong: loss off by {row.error_loss:.3g}, gradients by {row.error_grad:.3g}, relative"


def run_step(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    torch.manual_seed(0)
    device = settings.device
    model = _make_model(options, device)
    generator = torch.Generator(device).manual_seed(0)
    refresh = Refresh(options, model, generator)
    batch = _make_batch(options, refresh, generator)
    gate_batch = _gate_batch(batch)
    truth = _truth(model, gate_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    rows, entries = {}, {}
    for name in (*(options.providers or PROVIDERS), REFRESH):
        sizes = (options.pairs, options.kl_samples, options.kl_every, options.tokens)
        row = rows[name] = StepRow(name, *sizes, options.vocabulary, options.hidden, options.layers)
        if name in LOSSES:
            _gate(row, model, gate_batch, truth)
        if not row.status:
            run = refresh.run if name == REFRESH else Step(name, model, optimizer, batch).run
            entries[name] = measure.Entry(run)
    del truth
    for name, entry in entries.items():
        entry.call()  # compiles, and makes the optimizer's state, which is not the step's memory
        model.zero_grad(set_to_none=True)
        peak = measure.peak_memory(measure.Entry(entry.call, finish=lambda: model.zero_grad(set_to_none=True)), device)
        rows[name].extra_mib = peak.allocator / (1 << 20)
        rows[name].extra_resident_mib = None if peak.resident is None else peak.resident / (1 << 20)
    samples = measure.interleave(entries, device, settings.repeats)
    refresh_ms = 1e3 * statistics.median(samples[REFRESH].wall)
    for name, times in samples.items():
        row = rows[name]
        row.status, row.rounds = "ok", len(times.wall)
        row.wall_ms, row.cpu_ms = (1e3 * statistics.median(values) for values in (times.wall, times.cpu))
        row.wall_p20_ms, row.wall_p80_ms = (1e3 * measure.quantile(times.wall, q) for q in (0.2, 0.8))
        if name == REFRESH:
            continue
        row.with_refresh_ms = row.wall_ms + refresh_ms / options.kl_every
        for ours in ("ours", "ours_inplace"):
            if ours in samples:
                setattr(row, f"over_{ours}", measure.paired_ratio(times.wall, samples[ours].wall))
    profiles = {
        name: profile(entries[name].call, device) for name in ("ours_inplace", "eager", REFRESH) if name in entries
    }
    writer = report.CsvWriter(report.output_path(options.out, "step"), StepRow, environment)
    writer.write(rows.values())
    page = writer.path.with_suffix(".md")
    text = f"**Training step.** {report.machine_line(environment)} {_markdown(list(rows.values()), profiles)}"
    page.write_text(text + "\n")
    print(text, "", writer.path, page, sep="\n")
    return 1 if any(name.startswith("ours") and row.status != "ok" for name, row in rows.items()) else 0


# Parts of a profile, by what the names of their operators contain; the first that fits.
_PARTS = {
    "row kernels": ("spo_kernels::",),
    "attention": ("attention",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "log-softmax": ("log_softmax",),
    "optimizer and clipping": ("adam", "Optimizer", "_foreach", "aten::norm", "linalg_vector_norm"),
}
_REST = "everything else"

Profile = dict[str, float]


def profile(call: Callable[[], object], device: torch.device) -> Profile:
    """Milliseconds of a call by part, of the profiler's own times; the instrument makes the many small ops longer."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_PROFILED_STEPS):
            call()
    parts = dict.fromkeys((*_PARTS, _REST), 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        parts[part_of(event.key)] += microseconds / 1e3 / _PROFILED_STEPS
    return parts


def part_of(operator: str) -> str:
    return next((part for part, names in _PARTS.items() if any(name in operator for name in names)), _REST)


def _markdown(rows: list[StepRow], profiles: dict[str, Profile]) -> str:
    first = rows[0]
    title = (
        f"{first.pairs} pairs and {first.kl_samples} KL samples of {first.tokens} tokens, V = {first.vocabulary}, "
        f"hidden {first.hidden}, {first.layers} layers, float32. `refresh` draws the samples and asks the reference "
        f"about them, every {first.kl_every} steps; the same for everyone."
    )
    lines = []
    for row in rows:
        if row.wall_ms is None:
            lines.append([row.provider, row.status, *[""] * 5])
            continue
        lines.append(
            [
                row.provider,
                f"{row.wall_ms:.1f} ({row.wall_p20_ms:.1f}-{row.wall_p80_ms:.1f})",
                f"{row.cpu_ms:.1f}",
                "" if row.with_refresh_ms is None else f"{row.with_refresh_ms:.1f}",
                "" if row.over_ours_inplace is None else f"{row.over_ours_inplace:.2f}x",
                f"{row.extra_mib:.0f}",
                "" if row.error_grad is None else f"{row.error_grad:.1e}",
            ]
        )
    header = ["step", "ms (p20-p80)", "CPU ms", "with refresh", "÷ ours in place", "peak MiB", "gradient error"]
    parts = [title, report.markdown_table(header, lines, 1)]
    if profiles:
        parts += ["Where the time goes, ms (share), under the profiler:", _profile_markdown(profiles)]
    return "\n\n".join(parts)


def _profile_markdown(profiles: dict[str, Profile]) -> str:
    def cells(values: Iterable[float], wholes: Iterable[float]) -> list[str]:
        return [f"{value:.1f} ({value / whole:.0%})" for value, whole in zip(values, wholes, strict=True)]

    wholes = [sum(parts.values()) or 1.0 for parts in profiles.values()]
    lines = [
        [part, *cells((parts[part] for parts in profiles.values()), wholes)]
        for part in (*_PARTS, _REST)
        if any(parts[part] for parts in profiles.values())
    ]
    return report.markdown_table(["part", *profiles], lines, 1)
