"""``trl``: a step of `SPOTrainer` against TRL's ``DPOTrainer`` and eager SPO: CPU seconds, memory, and the bars."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks import ROOT
from benchmarks.commands.arguments import add_out, count
from benchmarks.harness.results import markdown_table
from benchmarks.workloads.trl_training import KINDS, Measured, Size

HELP = "time a training step of SPOTrainer against TRL's DPOTrainer (needs the extra [trl]; CPU)"

# Name, what it is the ratio of, and the most that it may be.
_BARS = (
    ("SPO linear / TRL DPO, time with draws", 0.85),
    ("SPO linear / SPO eager, time with draws", 0.70),
    ("SPO linear / TRL DPO, peak memory above start-up", 0.75),
    ("SPO linear / SPO eager, peak memory above start-up", 0.75),
    ("buffer, hidden states / logits", 0.02),
    ("draws, share of a step", 0.15),
    ("metrics, share of a step", 0.01),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=count, default=3, help="interleaved runs of each kind (default: 3)")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=count, default=value, help=f"default: {value}")
    add_out(parser, "where the page goes (default: out/benchmarks)")


def run(options: argparse.Namespace) -> int:
    if not all(map(importlib.util.find_spec, ("trl", "peft"))):
        raise ValueError('this needs TRL and PEFT: pip install "spo_kernels[trl]"')
    size = {name: getattr(options, name) for name in asdict(Size())}
    measured: dict[str, list[Measured]] = {kind: [] for kind in options.kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for kind in options.kinds:
                measured[kind].append(_measure(kind, Path(folder), size, options.threads))
                print(measured[kind][-1], file=sys.stderr)
    page = _page(measured, size, options.threads)
    print(page)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trl.md").write_text(page + "\n")
    return 0


def _measure(kind: str, folder: Path, size: Mapping[str, int], threads: int) -> Measured:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.workloads.trl_training", kind, str(folder), json.dumps(dict(size))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"the run of {kind} failed:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _page(measured: Mapping[str, Sequence[Measured]], size: Mapping[str, int], threads: int) -> str:
    def of(kind: str, name: str) -> float:
        return median(getattr(run, name) for run in measured[kind]) if measured.get(kind) else float("nan")

    header = ["kind", "CPU s a step", "of it draws", "metrics", "peak MiB", "buffer MiB", "last loss"]
    rows = [
        [
            kind,
            f"{of(kind, 'step_seconds'):.3f}",
            f"{of(kind, 'draw_seconds'):.3f}",
            f"{of(kind, 'metrics_seconds'):.4f}",
            f"{of(kind, 'peak_mib'):.0f}",
            f"{of(kind, 'buffer_mib'):.2f}",
            f"{of(kind, 'loss'):.4f}",
        ]
        for kind in measured
    ]
    step = of("SPO linear", "step_seconds")
    values = (
        step / of("TRL DPO", "step_seconds"),
        step / of("SPO eager", "step_seconds"),
        of("SPO linear", "peak_mib") / of("TRL DPO", "peak_mib"),
        of("SPO linear", "peak_mib") / of("SPO eager", "peak_mib"),
        of("SPO linear", "buffer_mib") / of("SPO logits", "buffer_mib"),
        of("SPO linear", "draw_seconds") / step,
        of("SPO linear", "metrics_seconds") / step,
    )
    verdicts = [
        [name, f"{value:.3f}", f"<= {most:g}", "pass" if value <= most else "MISS"]
        for (name, most), value in zip(_BARS, values, strict=True)
    ]
    runs = max(len(runs) for runs in measured.values())
    sizes = ", ".join(f"{name} {value}" for name, value in size.items())
    return "\n".join(
        [
            f"Medians of {runs} interleaved runs, {threads} thread(s); {sizes}.",
            "",
            markdown_table(header, rows, 1),
            "",
            markdown_table(["bar", "measured", "needed", ""], verdicts, 1),
        ]
    )
