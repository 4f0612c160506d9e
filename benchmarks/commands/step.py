"""``step``: a training step of a small transformer, the time of every provider, and where the time goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch

from benchmarks.commands.arguments import add_common, count, open_bench
from benchmarks.harness.results import Report, markdown_table
from benchmarks.workloads.step import DTYPES, PROVIDERS, REFRESH, StepRow, StepRunner, StepSize

HELP = "time an SPO training step"

_PROFILED = ("ours_inplace", "eager", REFRESH)
# Steps to profile, by type of device. The profiler takes minutes for a GPU's events. A refresh has hundreds of
# thousands of events, so it is not profiled on a GPU.
_PROFILED_STEPS = {"cpu": 3, "cuda": 1}
# Parts of a step, by what the names of their operators contain. An operator belongs to the first part that fits.
_PARTS = {
    "row kernels": ("spo_kernels::",),
    "attention": ("attention",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "log-softmax": ("log_softmax",),
    "optimizer and clipping": ("adam", "Optimizer", "_foreach", "aten::norm", "linalg_vector_norm"),
}
_REST = "everything else"

Profile = dict[str, float]  # milliseconds of a call, by part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "An SPO training step of a small transformer, forward to optimizer, ours against eager PyTorch."
    )
    add_common(parser)
    parser.add_argument("--pairs", type=count, default=8, help="pairs P; the paper has 128 pairs and 32 samples")
    parser.add_argument("--kl-samples", type=count, default=2, help="sampled sequences S")
    parser.add_argument("--kl-every", type=count, default=8, help="steps k between two refreshes of the samples")
    parser.add_argument("--tokens", type=count, default=128, help="tokens T a sequence, a quarter of them prompt")
    parser.add_argument("--vocabulary", type=count, default=32000)
    parser.add_argument(
        "--hidden", type=count, default=256, help="width of the model, a multiple of 64 or less than 64"
    )
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model, its gradients and AdamW")
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", metavar="NAME", help="default: all")


def run(options: argparse.Namespace) -> int:
    size = StepSize(
        pairs=options.pairs,
        kl_samples=options.kl_samples,
        kl_every=options.kl_every,
        tokens=options.tokens,
        vocabulary=options.vocabulary,
        hidden=options.hidden,
        layers=options.layers,
    )
    bench = open_bench(options)
    runner = StepRunner(size, options.dtype, bench.settings, options.providers or PROVIDERS)
    report = Report(bench, "step", StepRow)
    rows = runner.run()
    report.add(rows)
    # Written before the profile, which may outlast a time limit.
    report.write_page("Training step", _times(rows, size, options.dtype))
    device = bench.settings.device
    if profiles := {name: profile(runner.calls[name], device) for name in to_profile(rows, device)}:
        report.append(f"Where the time goes, ms (share), under the profiler:\n\n{_profiles(profiles)}")
    return report.exit_status()


def to_profile(rows: list[StepRow], device: torch.device) -> list[str]:
    right = {row.provider for row in rows if row.status == "ok"}
    return [name for name in _PROFILED if name in right and not (name == REFRESH and device.type == "cuda")]


def profile(call: Callable[[], object], device: torch.device) -> Profile:
    """Milliseconds of each part, by the profiler. It makes small operators look longer than they are."""
    steps = _PROFILED_STEPS[device.type]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            call()
    parts = dict.fromkeys((*_PARTS, _REST), 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        parts[part_of(event.key)] += microseconds / 1e3 / steps
    return parts


def part_of(operator: str) -> str:
    return next((part for part, names in _PARTS.items() if any(name in operator for name in names)), _REST)


def _times(rows: list[StepRow], size: StepSize, dtype: str) -> str:
    title = (
        f"{size.pairs} pairs and {size.kl_samples} KL samples of {size.tokens} tokens, V = {size.vocabulary}, "
        f"hidden {size.hidden}, {size.layers} layers, {dtype}. `refresh` draws the samples and "
        f"computes the reference's logits of them, every {size.kl_every} steps; it is the same for every provider."
    )
    header = ["step", "ms (p20-p80)", "CPU ms", "with refresh", "÷ ours in place", "peak MiB", "gradient error"]
    return f"{title}\n\n{markdown_table(header, map(_line, rows), 1)}"


def _line(row: StepRow) -> list[str]:
    if row.timing is None:
        return [row.provider, row.status, *[""] * 5]
    status = "" if row.status == "ok" else f", {row.status}"
    return [
        row.provider,
        row.timing.with_spread(".1f") + status,
        f"{row.timing.cpu_ms:.1f}",
        "" if row.with_refresh_ms is None else f"{row.with_refresh_ms:.1f}",
        f"{row.over['ours_inplace']:.2f}x" if "ours_inplace" in row.over else "",
        "" if row.memory is None else f"{row.memory.extra_mib:.0f}",
        f"{row.error['grad']:.1e}" if "grad" in row.error else "",
    ]


def _profiles(profiles: dict[str, Profile]) -> str:
    def cells(values: Iterable[float], wholes: Iterable[float]) -> list[str]:
        return [f"{value:.1f} ({value / whole:.0%})" for value, whole in zip(values, wholes, strict=True)]

    wholes = [sum(parts.values()) or 1.0 for parts in profiles.values()]
    lines = [
        [part, *cells((parts[part] for parts in profiles.values()), wholes)]
        for part in (*_PARTS, _REST)
        if any(parts[part] for parts in profiles.values())
    ]
    return markdown_table(["part", *profiles], lines, 1)
