"""One report from a machine with a GPU: its tests, the selfcheck, the benchmarks. Each step is a program of its own.

A step that fails does not stop the others: the report says so, and so does the exit status.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT, report
from benchmarks.run import Settings

_STEP_SECONDS = 2 * 3600
_KEPT_LINES = 400  # of a step's output, from its end


class Step(NamedTuple):
    title: str
    command: list[str]
    folder: Path = ROOT  # to start in


class Outcome(NamedTuple):
    step: Step
    status: int | None  # None: it ran out of time
    seconds: float
    output: str

    @property
    def verdict(self) -> str:
        return "ok" if self.status == 0 else "out of time" if self.status is None else f"FAILED with {self.status}"


def steps(device: str, out: Path, quick: bool) -> Iterator[Step]:
    """What a report consists of. quick: small enough to try all of it on a CPU."""
    python = [sys.executable, "-m"]
    # All but the benchmarks start elsewhere: Python would import the source tree before the installed package.
    yield Step("Environment", [*python, "spo_kernels.env"], out)
    for tool in ("nvidia-smi", "rocm-smi"):
        if device != "cpu" and shutil.which(tool):
            yield Step("Device", [tool])
    # On a CPU nothing that is marked would run: the file that also runs there stands in.
    chosen = ["-m", "gpu", str(ROOT / "tests")] if device != "cpu" else [str(ROOT / "tests/test_gpu.py")]
    yield Step("Tests", [*python, "pytest", *chosen], out)
    rows = ["--rows", "8"] if quick else []
    yield Step("Selfcheck", [*python, "spo_kernels.selfcheck", "--device", device, *rows], out)
    common = ["--device", device, "--out", str(out), *(["--repeats", "1"] if quick else [])]
    ops = [*python, "benchmarks", "ops", *common]
    if quick:
        yield Step("Ops", [*ops, "--shapes", "16x130", "--providers", "ours", "ours_inplace", "eager"])
    else:
        yield Step("Ops", ops)
        yield Step("Ops at the size of a training step", [*ops, "--shapes", "8192x128256", "--dtypes", "bfloat16"])
    small = ["--pairs", "1", "--tokens", "8", "--vocabulary", "130", "--hidden", "64", "--layers", "1"]
    narrow = [
        "--pairs",
        "1",
        "--tokens",
        "8",
        "--vocabulary",
        "130",
        "--hidden",
        "64",
        "--providers",
        "recompute",
        "eager",
    ]
    yield Step("Head", [*python, "benchmarks", "head", *common, *(narrow if quick else [])])
    yield Step("Training step", [*python, "benchmarks", "step", *common, *(small if quick else [])])


def run(step: Step) -> Outcome:
    start = time.perf_counter()
    status: int | None
    try:
        done = subprocess.run(
            step.command,
            cwd=step.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_STEP_SECONDS,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = None, (expired.stdout or b"").decode(errors="replace")
    except OSError as error:
        status, output = error.errno or 1, str(error)
    return Outcome(step, status, time.perf_counter() - start, output)


def run_gpu(options: argparse.Namespace, environment: report.Environment, settings: Settings) -> int:
    out = options.out.resolve()  # the steps start in other folders
    page = report.output_path(out, "gpu", ".md")
    outcomes: list[Outcome] = []
    for step in steps(str(options.device), out, options.quick):
        print(f"{step.title}: {shlex.join(step.command)}", flush=True)
        outcomes.append(run(step))
        print(f"  {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
        page.write_text(_markdown(outcomes, environment))  # after each step, so that an interrupted report is one too
    print("", page, sep="\n")
    return 0 if all(outcome.status == 0 for outcome in outcomes) else 1


def _markdown(outcomes: list[Outcome], environment: report.Environment) -> str:
    summary = [[o.step.title, o.verdict, f"{o.seconds:.0f}"] for o in outcomes]
    parts = [
        "# spo_kernels on a GPU",
        report.machine_line(environment),
        report.markdown_table(["step", "result", "seconds"], summary, 2),
    ]
    for outcome in outcomes:
        lines = outcome.output.rstrip().splitlines()
        cut = [f"[{len(lines) - _KEPT_LINES} lines left out]"] if len(lines) > _KEPT_LINES else []
        text = "\n".join([*cut, *lines[-_KEPT_LINES:]])
        parts.append(f"## {outcome.step.title}: {outcome.verdict}\n\n`{shlex.join(outcome.step.command)}`")
        parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
