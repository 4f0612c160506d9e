"""A whole SPO training step, ours against the same step in eager PyTorch.

The step is Appendix B of the paper without the sampling, which is no kernel's business: P pairs through a causal
transformer, the preference loss (eq. 8) with SoftImportance weights (eq. 24) and its backward; S sampled sequences with
the reference's logits kept from their refresh, the exact token KL and its backward; clipping; AdamW. Everyone runs the
same model and optimizer; only what happens between logits and loss differs. One entry of `LOSSES` per implementation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spo_kernels
from benchmarks import measure, report
from benchmarks.run import Settings

_ALPHA, _BETA, _GAMMA = 0.1, 0.03, 0.1
_IGNORED = -100
# float32 against float64 through a whole model and a clipped gradient; what a wrong coefficient costs is far beyond it.
_GATE_BUDGET = 1e-3


class Transformer(nn.Module):
    """A small causal language model: ids ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, max(hidden // 64, 1), 4 * hidden, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [2P, T], chosen then rejected
    labels: Tensor  # [2P, T], the next ids, ignored in the prompt
    kl_ids: Tensor  # [S, T]
    kl_mask: Tensor  # [S, T], False in the prompt
    kl_ref_logits: Tensor  # [S, T, V]


PreferenceLoss = Callable[[Tensor, Tensor], Tensor]
KLLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    preference: PreferenceLoss  # (logits [2P, T, V], labels [2P, T]) -> scalar
    kl: KLLoss  # (logits [S, T, V], reference logits, mask [S, T]) -> scalar
    compiled: bool = False


def eager_preference(logits: Tensor, labels: Tensor) -> Tensor:
    picked = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    logp_w, logp_l = (picked * (labels != _IGNORED)).sum(-1).chunk(2)
    scores = _GAMMA * torch.logaddexp(logp_w, logp_l).detach()
    mu = torch.sigmoid(scores - scores.mean())
    return (-mu * F.logsigmoid(_ALPHA * (logp_w - logp_l)) / _ALPHA).mean()


def eager_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    logps, ref_logps = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return _BETA * ((logps.exp() * (logps - ref_logps)).sum(-1) * mask).sum(-1).mean()


def _ours(*, inplace: bool) -> Losses:
    weight = spo_kernels.SoftImportance(_GAMMA)

    def preference(logits: Tensor, labels: Tensor) -> Tensor:
        logps = spo_kernels.sequence_logps(logits, labels, inplace_backward=inplace)
        losses, _, _ = spo_kernels.spo_loss(*logps.chunk(2), alpha=_ALPHA, weight=weight)
        return losses.mean()

    def kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
        per_sequence = logits.new_full(mask.shape, _BETA / mask.shape[0], dtype=torch.float32)
        return spo_kernels.kl_loss(logits, ref_logits, mask, row_weight=per_sequence, overwrite_logits=inplace)

    return Losses(preference, kl)


LOSSES: dict[str, Losses] = {
    "ours": _ours(inplace=False),
    "ours_inplace": _ours(inplace=True),
    "eager": Losses(eager_preference, eager_kl),
    "compile": Losses(eager_preference, eager_kl, compiled=True),
}
# The step with a ready-made gradient of the logits in place of a loss: what no implementation can go below.
MODEL_ONLY = "model_only"


@dataclass
class StepRow:
    """One implementation of the step in one run of the command."""

    provider: str
    pairs: int
    kl_samples: int
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
    extra_mib: float | None = None  # peak beyond parameters, optimizer state and batch
    extra_resident_mib: float | None = None
    error_loss: float | None = None  # relative, against the float64 step
    error_grad: float | None = None  # largest relative error of a parameter's gradient, by norm
    over_ours: float | None = None
    over_ours_inplace: float | None = None


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("--pairs", type=count, default=8, help="pairs P; the paper's 128 and 32 samples scaled down")
    parser.add_argument("--kl-samples", type=count, default=2, help="sampled sequences S")
    parser.add_argument("--tokens", type=count, default=128, help="tokens T a sequence, a quarter of them prompt")
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument("--hidden", type=count, default=256)
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--providers", choices=(*LOSSES, MODEL_ONLY), nargs="+", metavar="NAME", help="default: all")


class Step:
    """The training step of one implementation on a shared model, optimizer and batch."""

    def __init__(self, name: str, model: Transformer, optimizer: torch.optim.Optimizer | None, batch: Batch) -> None:
        self._model = model
        self._optimizer = optimizer
        self._batch = batch
        self._gradients: tuple[Tensor, Tensor] | None = None
        if name == MODEL_ONLY:
            vocabulary = batch.kl_ref_logits.shape[-1]
            self._gradients = (
                torch.full((*batch.ids.shape, vocabulary), 1e-6, device=batch.ids.device),
                torch.full_like(batch.kl_ref_logits, 1e-6),
            )
            return
        losses = LOSSES[name]
        wrap = torch.compile if losses.compiled else lambda function: function
        self._preference, self._kl = wrap(losses.preference), wrap(losses.kl)

    def run(self) -> Tensor:
        """One step; returns the objective. Without an optimizer it stops at the gradients."""
        batch = self._batch
        self._model.zero_grad(set_to_none=True)
        if self._gradients is not None:
            self._model(batch.ids).backward(self._gradients[0])
            self._model(batch.kl_ids).backward(self._gradients[1])
            objective = torch.zeros(())
        else:
            # A backward each, so that the two sets of logits never live at once.
            preference = self._preference(self._model(batch.ids), batch.labels)
            preference.backward()
            kl = self._kl(self._model(batch.kl_ids), batch.kl_ref_logits, batch.kl_mask)
            kl.backward()
            objective = (preference + kl).detach()
        if self._optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
        return objective


def _make_batch(options: argparse.Namespace, model: Transformer, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    ids, kl_ids = (
        torch.randint(options.vocabulary, (count, options.tokens + 1), device=device, generator=generator)
        for count in (2 * options.pairs, options.kl_samples)
    )
    prompt = options.tokens // 4
    labels = ids[:, 1:].clone()
    labels[:, :prompt] = _IGNORED
    mask = torch.ones(options.kl_samples, options.tokens, dtype=torch.bool, device=device)
    mask[:, :prompt] = False
    with torch.no_grad():
        # A reference near the policy, as in training: their KL is small but not 0.
        reference = copy.deepcopy(model)
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, device=device, generator=generator)
            parameter.add_(0.05 * parameter.std(correction=0) * noise)
        ref_logits = reference(kl_ids[:, :-1])
    return Batch(ids[:, :-1], labels, kl_ids[:, :-1], mask, ref_logits)


def _gradients(name: str, model: Transformer, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    objective = Step(name, model, None, batch).run().item()
    return objective, {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def _gate(row: StepRow, model: Transformer, batch: Batch, truth: tuple[float, dict[str, Tensor]]) -> None:
    objective, gradients = _gradients(row.provider, model, batch)
    row.error_loss = abs(objective - truth[0]) / abs(truth[0])
    row.error_grad = max(
        ((gradients[key].double() - grad).norm() / grad.norm().clamp(min=1e-30)).item()
        for key, grad in truth[1].items()
        if grad.norm() > 0
    )
    if not (row.error_loss <= _GATE_BUDGET and row.error_grad <= _GATE_BUDGET):
        row.status = f"wrong: loss off by {row.error_loss:.3g}, gradients by {row.error_grad:.3g}, relative"


def run_step(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    torch.manual_seed(0)
    device = settings.device
    model = Transformer(options.vocabulary, options.hidden, options.layers).to(device)
    batch = _make_batch(options, model, device)
    exact_batch = Batch(batch.ids, batch.labels, batch.kl_ids, batch.kl_mask, batch.kl_ref_logits.double())
    truth = _gradients("eager", copy.deepcopy(model).double(), exact_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    rows, entries = {}, {}
    for name in options.providers or (*LOSSES, MODEL_ONLY):
        sizes = (options.pairs, options.kl_samples, options.tokens, options.vocabulary, options.hidden, options.layers)
        row = rows[name] = StepRow(name, *sizes)
        if name != MODEL_ONLY:
            _gate(row, model, batch, truth)
        if not row.status:
            entries[name] = measure.Entry(Step(name, model, optimizer, batch).run)
    del truth
    for name, entry in entries.items():
        entry.call()  # compiles, and makes the optimizer's state, which is not the step's memory
        model.zero_grad(set_to_none=True)
        peak = measure.peak_memory(measure.Entry(entry.call, finish=lambda: model.zero_grad(set_to_none=True)), device)
        rows[name].extra_mib = peak.allocator / (1 << 20)
        rows[name].extra_resident_mib = None if peak.resident is None else peak.resident / (1 << 20)
    samples = measure.interleave(entries, device, settings.repeats) if entries else {}
    for name, times in samples.items():
        row = rows[name]
        row.status, row.rounds = "ok", len(times.wall)
        row.wall_ms, row.cpu_ms = (1e3 * statistics.median(values) for values in (times.wall, times.cpu))
        row.wall_p20_ms, row.wall_p80_ms = (1e3 * measure.quantile(times.wall, q) for q in (0.2, 0.8))
        for ours in ("ours", "ours_inplace"):
            if ours in samples:
                setattr(row, f"over_{ours}", measure.paired_ratio(times.wall, samples[ours].wall))
    writer = report.CsvWriter(report.output_path(options.out, "step"), StepRow, environment)
    writer.write(rows.values())
    page = writer.path.with_suffix(".md")
    text = f"**Training step.** {report.machine_line(environment)} {_markdown(list(rows.values()))}"
    page.write_text(text + "\n")
    print(text, "", writer.path, page, sep="\n")
    return 1 if any(name.startswith("ours") and row.status != "ok" for name, row in rows.items()) else 0


def _markdown(rows: list[StepRow]) -> str:
    first = rows[0]
    title = (
        f"{first.pairs} pairs and {first.kl_samples} KL samples of {first.tokens} tokens, V = "
        f"{first.vocabulary}, hidden {first.hidden}, {first.layers} layers, float32."
    )
    lines = []
    for row in rows:
        if row.wall_ms is None:
            lines.append([row.provider, row.status, *[""] * 4])
            continue
        ratio = "" if row.over_ours_inplace is None else f"{row.over_ours_inplace:.2f}x"
        lines.append(
            [
                row.provider,
                f"{row.wall_ms:.1f} ({row.wall_p20_ms:.1f}-{row.wall_p80_ms:.1f})",
                f"{row.cpu_ms:.1f}",
                ratio,
                f"{row.extra_mib:.0f}",
                "" if row.error_grad is None else f"{row.error_grad:.1e}",
            ]
        )
    header = ["step", "ms (p20-p80)", "CPU ms", "÷ ours in place", "peak MiB", "gradient error"]
    return f"{title}\n\n{report.markdown_table(header, lines, 1)}"
